"""The trained forecaster: what it begins as, what it learns, what it cannot know, and its files."""

import pickle
import warnings

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.base import clone

import favor_np
from favor_np import nn
from favor_np.forecast import (
    HAR,
    PerformerForecaster,
    Prices,
    backtest,
    conformal_intervals,
    inputs,
    qlike,
    samples,
    simulated_minutes,
)
from favor_np.forecast._inputs import Memory, average
from favor_np.forecast._residual import PIECE, Targets, network
from favor_np.forecast._start import TAILS, fit_variance

SMALL = {"epochs": 2, "members": 2, "rate": 0.02}


@pytest.fixture(scope="module")
def minutes():
    return samples(simulated_minutes(2000, seed=1))


@pytest.fixture(scope="module")
def spells():
    """Volatility that falls after it has been largest: no regression of logarithms finds that."""
    rng = np.random.default_rng(0)
    level = np.repeat(np.tile([0.0, 1.5, 3.0], 60), 40)
    returns = np.exp(level / 2) * rng.standard_normal(len(level))
    returns *= np.where(np.arange(len(level)) % 40 < 20, 1.0, np.exp(-level / 2))
    return samples(np.exp(np.cumsum(returns) / 100))


@pytest.fixture(scope="module")
def fitted(minutes):
    return PerformerForecaster(**SMALL).fit(*minutes)


# -- The columns and the regression ---------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97])
def test_averages_are_what_attention_reads_where_all_keys_are_alike(decay):
    values = np.random.default_rng(0).standard_normal((300, 2))
    zeros, fm = np.zeros((300, 4)), favor_np.feature_map("positive", 4, 8, dtype=np.float64)
    if decay:
        read = favor_np.favor_attention(zeros, zeros, values, fm, causal=True, decay=decay)
    else:
        read = values
    found = np.stack([average(column, decay) for column in values.T], axis=1)
    np.testing.assert_allclose(found, read, atol=1e-12)


def test_columns_are_their_definition():
    rows = np.random.default_rng(0).standard_normal((500, 3)) * [2.0, 1.0, 0.0]
    memory = Memory((0.5,), (1, 5), (0.8,)).fit(rows)
    squares = rows[:, 0] ** 2
    plain = [squares, [squares[max(0, t - 4) : t + 1].mean() for t in range(500)]]
    scale = np.sqrt(np.maximum(average(squares, 0.97), memory.floor_))
    signed = average(np.clip(rows[:, 0] / scale, -4, 4), 0.8)
    logs = [np.log(np.maximum(x, 0.01 * squares.mean())) for x in (average(squares, 0.5), *plain)]
    expected = np.stack([*logs, signed, rows[:, 1]], axis=1)
    expected = (expected - expected.mean(0)) / expected.std(0)
    found = memory.columns(rows)
    np.testing.assert_allclose(found[:, :5], expected, atol=1e-9)
    assert not found[:, 5].any()  # what never varies tells nothing


@pytest.mark.parametrize(("days", "counts"), [(15, False), (25, True)])
def test_an_hour_counts_once_it_was_seen_on_twenty_days(days, counts):
    rng = np.random.default_rng(0)
    hour = (np.arange(24 * days) % 24 == 5).astype(float)
    rows = np.stack([rng.standard_normal(24 * days), hour], axis=1)
    found = Memory((0.5,), (), ()).fit(rows).columns(rows)[:, 1]
    assert bool(found.any()) == counts


@pytest.mark.parametrize("tail", TAILS)
def test_the_start_has_the_largest_penalised_likelihood(tail):
    rng = np.random.default_rng(1)
    columns = rng.standard_normal((400, 3))
    squares = np.exp(columns @ [0.5, -0.3, 0.0]) * rng.standard_t(5, 400) ** 2
    squares[::7] = 0
    penalty = np.array([0.1, 0.2, 0.01])

    def objective(b):
        said = b[0] + columns @ b[1:]
        loss = TAILS[tail].loss(squares * np.exp(-said), said).mean()
        return loss + (penalty * b[1:] ** 2).sum() / 2

    found = fit_variance(columns, squares, penalty, TAILS[tail])
    best = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found, best.x, atol=1e-5)


def test_qlike_is_the_loss_of_the_normal_tail():
    outcome, variance = np.random.default_rng(0).random((2, 50)) + 0.1
    loss = TAILS["qlike"].loss(outcome / variance, np.log(variance))
    np.testing.assert_allclose(loss, qlike(outcome, variance))


def test_without_training_it_is_its_start(minutes):
    X, y = minutes
    model = PerformerForecaster(epochs=0).fit(X, y)
    said = model.start_[0] + model.memory_.columns(X) @ model.start_[1:]
    np.testing.assert_allclose(model.predict(X), np.exp(said[:, 0]), rtol=1e-4)
    assert model.n_iter_ == 0
    settled = slice(100, -1)  # rows that count: averages have formed, the outcome is known
    assert np.mean(y[settled] / model.predict(X)[settled]) == pytest.approx(1, rel=1e-4)


def test_one_wrong_price_does_not_decide_the_level():
    rng = np.random.default_rng(0)
    returns = rng.standard_normal((1000, 1))
    returns[500] = 200.0
    model = PerformerForecaster(epochs=0).fit(returns)
    assert model.predict(returns)[900:].mean() < 3  # the mean square is 41


def test_a_network_begins_with_zeros():
    model = network(5, 2, 16, 1, 4, 16)
    params = model.init(np.random.default_rng(0))
    assert not model.apply(params, np.ones((2, 100, 5))).any()


# -- Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("means", [False, True])
def test_gradients_of_the_loss(tail, means):
    rng = np.random.default_rng(0)
    targets = Targets(2, means, tail)
    output = rng.standard_normal((4, 3, targets.outputs))
    outcome = rng.standard_normal((4, 3, 2))
    outcome[1, 2, 0] = np.nan
    loss, grad = targets.loss(output, outcome)
    direction = rng.standard_normal(output.shape)
    ahead, behind = (targets.loss(output + e * direction, outcome)[0] for e in (1e-6, -1e-6))
    assert (grad * direction).sum() == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)
    assert loss == pytest.approx(np.nanmean(targets.losses(output, outcome)))


def test_it_learns_what_its_start_cannot(spells):
    options = {"start": 4500, "refit": None}
    ours, start = (
        backtest(PerformerForecaster(**settings), *spells, **options)
        for settings in ({"members": 1}, {"epochs": 0})
    )
    assert ours.against(start).statistic > 2


def test_it_keeps_its_start_where_there_is_nothing_to_learn():
    """Of members that learn from noise, hardly one is better on what was held out."""
    noise = np.random.default_rng(2).standard_normal((1500, 1))
    model = PerformerForecaster(epochs=3, members=3).fit(noise)
    start = PerformerForecaster(epochs=0).fit(noise)
    assert np.abs(np.log(model.predict(noise) / start.predict(noise)))[100:].max() < 0.2
    assert model.best_loss_ <= model.validation_scores_[0]


def test_curves_tell_of_training(fitted):
    assert fitted.n_iter_ == len(fitted.loss_curve_) == len(fitted.validation_scores_) - 1
    assert 1 <= fitted.n_iter_ <= 2
    assert np.isfinite(fitted.loss_curve_ + fitted.validation_scores_).all()


def test_an_interrupt_keeps_what_there_is(minutes):
    def interrupt(stage, done, total):
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted") as told:
        model = PerformerForecaster(**SMALL).fit(*minutes, progress=interrupt)
    assert len(told) == 1  # the other seed is left out
    assert np.isfinite(model.predict()).all()


# -- Nothing looks ahead --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["volatility", "return"])
def test_noise_appended_to_the_future_moves_no_past_bit(target, minutes):
    X, _ = minutes
    horizon, model = 2, PerformerForecaster(target=target, horizons=(2,), **SMALL)
    squared = target == "volatility"
    noise = 20 * np.random.default_rng(0).standard_normal(333)
    made = []
    for returns in (X[:1500, 0], np.concatenate([X[:1500, 0], noise])):
        prices = np.exp(np.concatenate([[0.0], np.cumsum(returns / 100)]))
        made.append(
            backtest(
                model, *samples(prices, horizon=horizon, squared=squared), horizon=horizon,
                start=1000, refit=400, loss="qlike" if squared else "squared",
            )
        )  # fmt: skip
    ours, theirs = made
    assert ours.fits == 2
    assert theirs.fits > 2
    assert np.array_equal(ours.predicted, theirs.predicted[: len(ours)])


@pytest.mark.parametrize("count", [1, PIECE, PIECE + 1, 700])
def test_a_prediction_depends_on_no_later_row(count, fitted, minutes):
    X, _ = minutes
    for method in (fitted.predict, fitted.predict_interval):
        assert np.array_equal(method(X[:count]), method(X)[:count])


# -- Intervals, updates, files --------------------------------------------------------------------


def test_intervals_are_quantiles_of_scaled_errors(fitted, minutes):
    X, y = minutes
    mean, variance = fitted.moments(X)
    assert not mean.any()
    low, high = fitted.predict_interval(X, coverage=0.8).T
    np.testing.assert_allclose(low, -high)
    held = (np.sqrt(y) <= high)[-1001:-1]
    assert held.mean() == pytest.approx(0.8, abs=0.002)
    widths = high / np.sqrt(variance[:, 0])
    assert np.allclose(widths, widths[0])


def test_intervals_hold_in_walk_forward(spells):
    made = backtest(PerformerForecaster(epochs=0), *spells, refit=500)
    moves = np.sqrt(made.outcome)
    held = conformal_intervals(moves, np.zeros(len(moves)), np.sqrt(made.predicted))
    assert 0.88 < held.coverage < 0.92
    assert held.by_scale[2] > 0.85


@pytest.mark.parametrize("labelled", [True, False])
def test_updates_go_on_from_what_was_known(labelled, minutes):
    X, _ = minutes
    model = PerformerForecaster(horizons=(2,), **SMALL).fit(X[:1500])
    before = len(model.scores_)
    for part in (slice(1500, 1501), slice(1501, 1900)):
        model.update(X[part], np.full(len(X[part]), 4.0) if labelled else None)
    assert model.predict() == pytest.approx(model.predict(X[:1900])[-1:], rel=1e-5)
    assert len(model.scores_) == before + 400
    if labelled:
        expected = 2 / np.sqrt(model.predict(X[:1900])[1500:])
    else:
        moves = X[1:-1, 0] + X[2:, 0]
        expected = abs(moves[1498:1898]) / np.sqrt(model.predict(X[:1900])[1498:1898])
    np.testing.assert_allclose(model.scores_[-400:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("target", ["volatility", "return"])
def test_a_file_holds_all_of_it(target, minutes, tmp_path):
    X, _ = minutes
    model = PerformerForecaster(target=target, horizons=(1, 5), **SMALL).fit(X)
    model.save(tmp_path / "model.safetensors")
    found = PerformerForecaster.load(tmp_path / "model.safetensors")
    assert found == model  # the parameters
    assert np.array_equal(found.predict(X), model.predict(X))
    assert np.array_equal(found.predict_interval(), model.predict_interval())
    assert found.n_iter_ == model.n_iter_
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(), model.predict())
    checkpoint = nn.load(tmp_path / "model.safetensors")
    assert checkpoint.model == model.model_


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    layer = nn.Linear(2, 1)
    nn.save(path, layer, layer.init(np.random.default_rng(0)))
    with pytest.raises(ValueError, match="holds no forecaster"):
        PerformerForecaster.load(path)
    with pytest.raises(FileNotFoundError):
        PerformerForecaster.load(tmp_path / "none")


# -- The interface --------------------------------------------------------------------------------


def test_several_horizons_are_predicted_at_once(minutes):
    X, _ = minutes
    together = PerformerForecaster(horizons=(1, 4), epochs=0).fit(X)
    assert together.predict(X).shape == (len(X), 2)
    assert together.predict_interval(X).shape == (len(X), 2, 2)
    for column, horizon in enumerate((1, 4)):
        prices = np.exp(np.concatenate([[0.0], np.cumsum(X[:, 0] / 100)]))
        y = samples(prices, horizon=horizon).y
        alone = PerformerForecaster(horizons=(horizon,), epochs=0).fit(X, y)
        np.testing.assert_allclose(together.predict(X)[:, column], alone.predict(X), rtol=1e-5)


def test_returns_that_can_be_predicted_are(minutes):
    X, _ = minutes
    X = X.copy()
    X[1:, 0] += 0.5 * X[:-1, 0]
    model = PerformerForecaster("return", **SMALL).fit(X[:1500])
    assert model.score(X[1500:]) > 0.05
    with pytest.raises(ValueError, match="squares of returns"):
        PerformerForecaster(**SMALL).fit(X, -np.ones(len(X)))


def test_the_score_is_minus_qlike(fitted, minutes):
    X, y = minutes
    assert fitted.score(X, y) == pytest.approx(-qlike(y[:-1], fitted.predict(X)[:-1]).mean())
    assert fitted.score(X) == pytest.approx(fitted.score(X, y), rel=1e-6)


def test_it_is_an_estimator(minutes):
    model = PerformerForecaster(horizons=(3,), window=700, **SMALL)
    copied = clone(model)
    assert copied.get_params() == model.get_params()
    X, y = minutes
    shorter = PerformerForecaster(**SMALL).fit(X[-700:], y[-700:])
    windowed = PerformerForecaster(window=700, **SMALL).fit(X, y)
    assert np.array_equal(shorter.predict(), windowed.predict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "price"}, "target must be"),
        ({"tail": "heavy"}, "tail must be"),
        ({"horizons": ()}, "horizons must hold at least one"),
        ({"horizons": 1}, "horizons must hold at least one"),
        ({"horizons": (0,)}, "horizons must be at least 1"),
        ({"decays": (1.0,)}, "decays must be from 0 to below 1"),
        ({"decays": (), "spans": ()}, "decays or spans must hold"),
        ({"ridge": 0.0}, "ridge must be"),
        ({"validation": 1.0}, "validation must be between 0 and 1"),
        ({"validation": 0.99}, "leaves too few rows"),
        ({"members": 0}, "members must be at least 1"),
        ({"epochs": -1}, "epochs must be"),
        ({"window": 50}, "y must be known for at least 100 rows"),
        ({"dim": 6}, "dim must be a multiple of heads"),
    ],
)
def test_bad_parameters_are_named(settings, message, minutes):
    with pytest.raises(ValueError, match=message):
        PerformerForecaster(**SMALL | settings).fit(*minutes)


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.zeros((300, 1)), None, "the returns never vary"),
        (np.full((300, 1), np.nan), None, "X must be finite"),
        (np.ones((2, 2, 2)), None, "X must have shape"),
        (np.ones((300, 1)), np.ones(299), r"y must have shape \(300, 1\), got \(299, 1\)"),
        (np.ones((300, 1)), np.full(300, np.inf), "y must be finite"),
        (np.ones((300, 1)), np.zeros(300), "what follows never varies"),
    ],
)
def test_bad_rows_are_named(X, y, message):
    with pytest.raises(ValueError, match=message):
        PerformerForecaster(**SMALL).fit(X, y)


def test_what_is_not_fitted_says_so(fitted, minutes):
    model = PerformerForecaster()
    for call in (model.predict, lambda: model.update([[1.0]]), lambda: model.save("x")):
        with pytest.raises(ValueError, match="must be fitted first"):
            call()
    with pytest.raises(ValueError, match="X must have 1 columns, got 2"):
        fitted.predict(np.ones((5, 2)))
    with pytest.raises(ValueError, match="coverage must be between 0 and 1"):
        fitted.predict_interval(coverage=1.0)


# -- Inputs ---------------------------------------------------------------------------------------


def times(count, step):
    return np.datetime64("2024-01-01T00", "s") + np.arange(count) * np.timedelta64(step, "s")


@pytest.mark.parametrize(("step", "columns"), [(3600, 31), (86400, 7), (7 * 86400, 0), (60, 31)])
def test_the_calendar_is_one_column_for_each_hour_and_weekday(step, columns):
    prices = Prices(np.exp(np.sin(np.arange(300))), times(300, step))
    X = inputs(prices)
    assert X.shape == (299, 1 + columns)
    np.testing.assert_allclose(X[:, 0], samples(prices).X[:, 0])
    if columns:
        ends = prices.times[1:].astype(object)
        assert [int(row.argmax()) for row in X[:, 1:8]] == [end.weekday() for end in ends]
        assert (X[:, 1:8].sum(1) == 1).all()
    if columns > 7:
        assert [int(row.argmax()) for row in X[:, 8:]] == [end.hour for end in ends]


def bars(count=800):
    rng = np.random.default_rng(0)
    steps = 0.01 * rng.standard_normal((count, 20)) * np.exp(np.sin(np.arange(count) / 50))[:, None]
    path = np.exp(np.cumsum(steps.ravel()).reshape(count, 20))
    return path[:, 0], path.max(1), path.min(1), path[:, -1], 1000 * rng.random(count) + 1


def test_ranges_and_volume_are_columns():
    first, high, low, close, volume = bars()
    X = inputs(close, open=first, high=high, low=low, volume=volume)
    assert X.shape == (799, 6)
    variance = np.log(high / low) ** 2 / 2 - (2 * np.log(2) - 1) * np.log(close / first) ** 2
    floor = 0.01 * np.cumsum(variance) / np.arange(1, 801)
    expected = np.log(1e4 * np.maximum(variance, floor))[1:]
    np.testing.assert_allclose(X[:, 1], expected, atol=1e-9)
    traded = np.maximum(volume / average(volume, 0.97), 0.01)
    np.testing.assert_allclose(X[:, 5], np.log(traded)[1:], atol=1e-9)
    shorter = inputs(close[:500], open=first[:500], high=high[:500], low=low[:500],
                     volume=volume[:500])  # fmt: skip
    assert np.array_equal(shorter, X[:499])


def test_ranges_tell_more_than_closes():
    first, high, low, close, _ = bars(3000)
    y = samples(close).y
    whole, alone = (
        backtest(PerformerForecaster(epochs=0), X, y, refit=1000)
        for X in (inputs(close, open=first, high=high, low=low), inputs(close))
    )
    assert whole.against(alone).statistic > 2
    assert whole.against(backtest(HAR(), inputs(close), y, refit=1000)).statistic > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"open": None}, "open, high and low must be given together"),
        ({"high": np.ones(3)}, "high must be as long as prices, 800"),
        ({"low": np.full(800, 9.0)}, "low and high must be above 0"),
        ({"low": np.zeros(800)}, "low and high must be above 0"),
        ({"volume": np.full(800, -1.0)}, "volume must be finite and not below 0"),
        ({"volume": np.full(800, np.nan)}, "volume must be finite and not below 0"),
    ],
)
def test_bad_bars_are_named(change, message):
    first, high, low, close, volume = bars()
    columns = {"open": first, "high": high, "low": low, "volume": volume} | change
    with pytest.raises(ValueError, match=message):
        inputs(close, **columns)


def test_zero_volume_is_no_problem():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X = inputs(np.exp(np.sin(np.arange(300))), volume=np.zeros(300))
    assert np.isfinite(X).all()
