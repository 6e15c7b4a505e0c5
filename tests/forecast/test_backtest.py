"""Walk-forward: who knew what when, scores and tests, and the baselines."""

import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from favor_np.forecast import (
    EWMA,
    GARCH,
    HAR,
    Constant,
    FavorHAR,
    backtest,
    diebold_mariano,
    qlike,
    read_prices,
    samples,
    simulated_minutes,
)

BASELINES = [Constant(), EWMA(), HAR(), HAR(window=None), GARCH(), FavorHAR(seed=1)]


@pytest.fixture(scope="module")
def minutes():
    return samples(simulated_minutes(3000, seed=1))


class Spy:
    """An estimator that predicts 1 and writes down what it is shown."""

    def __init__(self, context=0):
        self.context = context
        self.seen = []

    def __deepcopy__(self, memo):
        return self  # so that copies write into one list

    def fit(self, X, y):
        self.seen.append(("fit", X[:, 0], y))

    def predict(self, X):
        self.seen.append(("predict", X[:, 0]))
        return np.ones(len(X))


@pytest.mark.parametrize("context", [0, 3, 500])
@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("refit", [1, 10, None])
def test_an_estimator_sees_what_was_known_and_no_more(context, horizon, gap, stride, refit):
    count, start = 60, 20
    X = np.arange(count)
    y = np.append(10.0 * X[:-horizon], np.full(horizon, np.nan))
    spy = Spy(context)
    made = backtest(
        spy, X, y, horizon=horizon, start=start, stride=stride, refit=refit, gap=gap, loss="squared"
    )
    assert np.array_equal(made.index, np.arange(start, count, stride))
    fits, predictions = ([s[1:] for s in spy.seen if s[0] == what] for what in ("fit", "predict"))
    assert made.fits == len(fits) == len(predictions)
    forecasts = []
    for (rows, labels), (shown,) in zip(fits, predictions, strict=True):
        first = made.index[len(forecasts)]
        assert np.array_equal(rows, np.arange(first - horizon - gap + 1))
        assert np.array_equal(labels, 10.0 * rows)
        assert shown[0] == max(0, first - context)
        block = [i for i in made.index if first <= i <= shown[-1]]
        assert block[-1] == shown[-1]
        if refit is not None:
            assert shown[-1] - first < refit
        forecasts += block
    assert forecasts == list(made.index)


@pytest.mark.parametrize("estimator", BASELINES, ids=repr)
@pytest.mark.parametrize("horizon", [1, 3])
def test_noise_in_the_future_moves_no_past_bit(estimator, horizon, minutes):
    X, _ = minutes
    cut, options = 1500, {"horizon": horizon, "start": 1000, "refit": 100}

    def run(returns):
        logs = np.concatenate([[0.0], np.cumsum(returns[:, 0] / 100)])
        return backtest(estimator, *samples(np.exp(logs), horizon=horizon), **options)

    other = X.copy()
    other[cut:] += 5 * np.random.default_rng(0).standard_normal(other[cut:].shape)
    ours, theirs = run(X), run(other)
    past = ours.index < cut
    assert np.array_equal(ours.predicted[past], theirs.predicted[past])
    assert np.array_equal(ours.mean[past], theirs.mean[past])
    assert np.array_equal(ours.ratio[past], theirs.ratio[past])
    assert not np.array_equal(ours.predicted[~past], theirs.predicted[~past])


def test_estimators_of_others_are_the_same_as_by_hand(minutes):
    X, y = minutes
    size = np.log(np.maximum(X[:, 0] ** 2, 1e-6))
    lagged = np.stack([np.roll(size, lag) for lag in range(5)], axis=1)
    model = make_pipeline(StandardScaler(), LinearRegression())
    made = backtest(model, lagged, y, horizon=1, start=2500, refit=50, loss="squared")
    assert not hasattr(model[-1], "coef_")  # the caller's own is not fitted
    for place in (0, 49, 50, 498):
        row = 2500 + place
        first = 2500 + place // 50 * 50
        fitted = clone(model).fit(lagged[:first], y[:first])  # the last label is known at `first`
        assert made.predicted[place] == pytest.approx(fitted.predict(lagged[row : row + 1])[0])
    known = y[: made.index[0]]
    assert made.mean[0] == pytest.approx(known.mean())
    errors = (made.outcome - made.predicted)[:-1] ** 2
    assert np.isnan(made.outcome[-1])
    assert made.score == pytest.approx(errors.mean())


def test_the_measured_table():
    """QLIKE and R² of docs/volatility.md, on the bundled prices from step 1,000 on."""
    X, y = samples(read_prices())
    found = {
        "constant": (backtest(Constant(), X, y, refit=1), 3.0614, -0.003),
        "EWMA": (backtest(EWMA(), X, y), 2.6127, 0.153),
        "HAR": (backtest(HAR(window=1500), X, y), 2.6150, 0.156),
        "GARCH": (backtest(GARCH(), X, y, refit=1000), 2.6000, 0.155),
    }
    for made, score, r2 in found.values():
        assert made.score == pytest.approx(score, abs=0.012)
        assert made.r2 == pytest.approx(r2, abs=0.021)
    assert found["EWMA"][0].against(found["constant"][0]).p_value < 0.01


@pytest.mark.parametrize("horizon", [1, 2, 12])
@pytest.mark.parametrize("count", [40, 500])
def test_diebold_mariano_is_that_of_statsmodels(horizon, count):
    from statsmodels.tsa.stattools import diebold_mariano_test

    rng = np.random.default_rng(count + horizon)
    y = rng.standard_normal(count) ** 2
    ours, theirs = np.exp(0.3 * rng.standard_normal((2, count)))
    found = diebold_mariano(qlike(y, ours), qlike(y, theirs), horizon=horizon)
    expected = diebold_mariano_test(
        y, theirs, ours, criterion=qlike, harvey_adj=True, horizon=horizon, lags=found.lags
    )
    assert found.statistic == pytest.approx(float(expected.statistic), rel=1e-9)
    assert found.p_value == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert found.lags >= horizon - 1
    thin = slice(None, None, horizon)
    alone = diebold_mariano(qlike(y, ours)[thin], qlike(y, theirs)[thin]) if count > 40 else None
    assert alone is None or found.thinned == pytest.approx(alone.statistic)


def test_overlapping_outcomes_raise_few_false_alarms():
    """Equally good forecasts of sums over 8 steps: a test that took them as independent errs often."""
    alarms, naive, horizon = 0, 0, 8
    rng = np.random.default_rng(0)
    for _ in range(300):
        noise = rng.standard_normal(600)
        difference = np.convolve(noise, np.ones(horizon), "valid")
        alarms += diebold_mariano(0 * difference, difference, horizon=horizon).p_value < 0.05
        naive += abs(difference.mean()) > 1.96 * difference.std() / np.sqrt(len(difference))
    assert naive > 0.4 * 300
    assert alarms < 0.14 * 300


def test_what_is_better_every_time_is_better():
    found = diebold_mariano(np.zeros(50), np.ones(50))
    assert found.verdict("X") == "better than X (p = 0)"
    assert diebold_mariano(np.ones(50), np.ones(50)).verdict("X") == "no better than X (p = 1)"


def test_verdicts_are_words():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1000)
    assert (
        diebold_mariano(noise, noise + 1 + rng.random(1000))
        .verdict("B")
        .startswith("better than B")
    )
    assert (
        diebold_mariano(noise + 1 + rng.random(1000), noise).verdict("B").startswith("worse than B")
    )
    assert diebold_mariano(noise, noise[::-1]).verdict("B").startswith("no better than B (p = ")


def test_qlike_is_least_at_the_truth():
    outcome = np.random.default_rng(0).standard_normal(100_000) ** 2 * 3
    losses = [qlike(outcome, np.full(len(outcome), h)).mean() for h in (2.5, 3.0, 3.5)]
    assert min(losses) == losses[1]


# -- The baselines --------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", BASELINES, ids=repr)
def test_baselines_are_estimators(estimator, minutes):
    X, y = minutes
    known = slice(0, 1500)
    copied = clone(estimator)
    assert copied is not estimator
    assert copied.get_params() == estimator.get_params()
    assert copied.fit(X[known], y[known]) is copied
    found = copied.predict(X[1400:1500])
    assert found.shape == (100,)
    assert (found > 0).all()
    before = X[max(0, 1480 - getattr(estimator, "context", 0)) : 1500]
    assert np.allclose(copied.predict(before)[-20:], copied.predict(X[:1500])[-20:], rtol=1e-5)
    with pytest.raises(ValueError, match="unknown parameters: nothing"):
        copied.set_params(nothing=1)


def test_ewma_is_its_definition(minutes):
    X, y = minutes
    model = EWMA(decay=0.9, horizon=3).fit(X, y)
    weights = 0.1 * 0.9 ** np.arange(len(X))[::-1]
    expected = 3 * (weights @ X[:, 0] ** 2 + 0.9 ** len(X) * np.mean(X**2))
    assert model.predict(X)[-1] == pytest.approx(expected)


def test_har_is_a_regression(minutes):
    X, y = minutes
    X, y = X[:-1], y[:-1]
    model = HAR(spans=(1, 4), window=500).fit(X, y)
    squares, floor = X[:, 0] ** 2, 0.01 * np.mean(X[-500:] ** 2)
    rows = []
    for t in range(len(X) - 500, len(X)):
        means = [squares[t], squares[t - 3 : t + 1].mean()]
        rows.append(np.log(np.maximum(means, floor)))
    target = np.log(np.maximum(y[-500:], 0.01 * y[-500:].mean()))
    fitted = LinearRegression().fit(rows, target)
    forecast = np.exp(fitted.predict(rows))
    forecast *= np.mean(y[-500:] / forecast)
    assert np.allclose(model.predict(X)[-500:], forecast, rtol=1e-9)


def test_har_outlasts_a_time_without_trades(minutes):
    X, y = (x.copy() for x in minutes)
    X[1000:1600] = y[999:1600] = 0
    for model in (HAR(window=500), FavorHAR(window=500, seed=0)):
        assert np.isfinite(model.fit(X[:1550], y[:1550]).predict(X[:1560])).all()
    flat, whole = HAR(window=500).fit(X[:1550], y[:1550]), HAR(window=None).fit(X[:1550], y[:1550])
    assert flat.floor_ == whole.floor_
    assert np.isfinite(backtest(HAR(window=500), X, y, start=600, refit=50).predicted).all()


@pytest.mark.parametrize("horizon", [1, 5])
def test_garch_is_that_of_arch(minutes, horizon):
    from arch import arch_model

    X, y = minutes
    returns = X[:1500, 0]
    unit = returns.std()
    model = arch_model(returns / unit, mean="Zero", dist="t")
    expected = model.fit(disp="off").forecast(horizon=horizon).variance.to_numpy()[-1].sum()
    found = GARCH(horizon=horizon).fit(X[:1500], y[:1500]).predict(X[:1500])[-1]
    assert found == pytest.approx(expected * unit**2, rel=1e-6)


def test_garch_without_arch_names_the_extra(monkeypatch, minutes):
    monkeypatch.setitem(sys.modules, "arch", None)
    with pytest.raises(ImportError, match=r"pip install 'favor_np\[volatility\]'"):
        GARCH().fit(*minutes)


# -- Bad input ------------------------------------------------------------------------------------


class Wrong(Constant):
    def __init__(self, answer):
        self.answer = answer

    def predict(self, X):
        return self.answer(len(X))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"horizon": 0}, ValueError, "horizon must be at least 1"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"gap": -1}, ValueError, "gap must be"),
        ({"refit": 0}, ValueError, "refit must be at least 1"),
        ({"start": 100}, ValueError, "start must be below the number of rows, 100, got 100"),
        ({"start": 5, "gap": 4}, ValueError, "too few rows to fit"),
        ({"loss": "mse"}, ValueError, "loss must be"),
        ({"y": np.ones(99)}, ValueError, r"X and y must be .* got \(100, 1\), \(99,\)"),
        ({"X": np.ones((2, 2, 2))}, ValueError, "X and y must be"),
        ({"y": np.where(np.arange(100) == 7, np.nan, 1.0)}, ValueError, "row 7 is not"),
        ({"y": np.linspace(-1, 1, 100)}, ValueError, "y must be at least 0 with loss='qlike'"),
        (
            {"estimator": HAR(), "X": np.where(np.arange(100) == 7, np.nan, 1.0)},
            ValueError,
            "returns, the first column of X, must be finite, row 7 is nan",
        ),
        ({"estimator": object()}, TypeError, "estimator needs a method fit"),
        ({"estimator": Wrong(lambda n: np.ones((n, 1)))}, ValueError, "a number a row"),
        ({"estimator": Wrong(np.zeros)}, ValueError, r"above 0.*: row 50 has 0\.0"),
        ({"estimator": EWMA(decay=1.0)}, ValueError, "decay must be from 0 to below 1"),
        ({"estimator": HAR(), "X": np.zeros(100)}, ValueError, "the returns never vary"),
        ({"estimator": HAR(window=0)}, ValueError, "window must be at least 1"),
        ({"estimator": HAR(spans=(1, 0))}, ValueError, "spans must be at least 1"),
        ({"estimator": HAR(spans=(1, 2), window=-3)}, ValueError, "window must be at least 1"),
        ({"estimator": GARCH(), "X": np.zeros(100)}, ValueError, "the returns never vary"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"estimator": Constant(), "X": np.ones(100), "y": np.ones(100), "start": 50}
    with pytest.raises(error, match=message):
        backtest(**arguments | change)


def test_a_backtest_without_outcomes_has_no_score(minutes):
    X, y, *_ = minutes
    y = np.where(np.arange(500) < 499, y[:500], np.nan)
    made = backtest(EWMA(), X[:500], y, start=499)
    assert np.isnan(made.score)
    assert np.isnan(made.r2)
    assert "nan" in repr(made)


def test_only_the_same_outcomes_are_compared(minutes):
    made = backtest(Constant(), *minutes, refit=None)
    for options in ({"stride": 2}, {"start": 999}):
        with pytest.raises(ValueError, match="the same outcomes"):
            made.against(backtest(Constant(), *minutes, refit=None, **options))
    with pytest.raises(ValueError, match="the same loss and horizon"):
        made.against(backtest(Constant(), *minutes, refit=None, loss="squared"))


def test_bad_losses_are_named():
    with pytest.raises(ValueError, match="as many on both sides"):
        diebold_mariano(np.ones(10), np.ones(11))
    with pytest.raises(ValueError, match="finite"):
        diebold_mariano(np.full(10, np.nan), np.ones(10))
    with pytest.raises(ValueError, match="10 losses are too few for a horizon of 6"):
        diebold_mariano(np.ones(10), np.ones(10), horizon=6)
    with pytest.raises(ValueError, match="3 prices are too few for a horizon of 2"):
        samples([1.0, 2.0, 3.0], horizon=2)


# -- HAR corrected by attention -------------------------------------------------------------------


def test_favor_har_is_har_times_a_weighted_mean_of_ratios(minutes):
    X, y = minutes
    X, y = X[:2000], y[:2000]
    model = FavorHAR(num_features=1024, scale=4.0).fit(X, y)
    har = HAR(model.spans, None).fit(X, y)
    logs = har.features(X[:, 0])
    rows = np.hstack([(logs - logs.mean(0)) / logs.std(0), np.full((2000, 1), 2.0)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights = np.exp(4 * rows @ rows.T)
    ratio = weights @ (y / har.predict(X)) / weights.sum(1)
    found = model.predict(X) / har.predict(X)
    assert np.std(ratio) > 0.02
    assert np.corrcoef(found, ratio)[0, 1] > 0.95
    assert np.abs(found - ratio).mean() < 0.3 * np.std(ratio)


def test_favor_har_learns_what_no_regression_of_logarithms_can():
    """Volatility that falls after it has been largest, and rises after it has been least."""
    rng = np.random.default_rng(0)
    level = np.repeat(np.tile([0.0, 1.5, 3.0], 100), 40)  # each a spell, then from large to small
    returns = np.exp(level / 2) * rng.standard_normal(len(level))
    returns *= np.where(np.arange(len(level)) % 40 < 20, 1.0, np.exp(-level / 2))
    X, y = samples(np.exp(np.cumsum(returns) / 100))
    ours, har = (
        backtest(model, X, y, start=4000, refit=1000)
        for model in (FavorHAR(), HAR((1, 5, 22, 100), None))
    )
    test = ours.against(har)
    assert test.verdict("HAR").startswith("better than HAR")
    assert test.difference > 0.01


def test_favor_har_is_no_worse_than_its_start():
    """Within noise, on real prices and on returns that have no structure at all."""
    noise = np.exp(np.cumsum(0.01 * np.random.default_rng(0).standard_normal(4000)))
    for prices in (read_prices(), noise):
        X, y = samples(prices)
        ours, start = (
            backtest(model, X, y, refit=250) for model in (FavorHAR(), HAR((1, 5, 22, 100), None))
        )
        assert ours.against(start).statistic > -2
