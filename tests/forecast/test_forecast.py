"""The forecast: what it predicts, what it cannot have seen, how it is judged."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from support.tuning import tuned

from favor_np.cpu import tuning
from favor_np.forecast import (
    PriceError,
    Prices,
    compare_with_exact,
    error_bars,
    evaluate,
    forecast,
    plot,
    read_prices,
    replay,
    simulated_minutes,
)
from favor_np.forecast._evaluate import signals_of, wilson_interval, z_score
from favor_np.forecast._maps import PREFIX

TARGETS = ["return", "volatility"]


def walk(count, seed=0, size=0.01):
    """A random walk with quiet and wild times, and with zero returns."""
    rng = np.random.default_rng(seed)
    wild = np.exp(0.7 * np.sin(np.arange(count) / 60))
    returns = size * wild * rng.standard_t(5, count) * (rng.random(count) > 0.05)
    return 50 * np.exp(np.cumsum(returns))


def naive(prices, target, window, horizon, scale=None):
    """The definition, one time after the other, in float64 with exact softmax weights.

    Returns a dict: time t -> (prediction, standard deviation, probabilities).
    """
    p = np.log(np.asarray(prices, dtype=np.float64))
    r = [math.nan, *(p[t] - p[t - 1] for t in range(1, len(p)))]

    def seen(t):  # the returns known at t
        return np.array(r[1 : t + 1])

    def vector(t):
        if target == "return":
            unit = max(
                np.sqrt(np.mean(seen(t)[-window:] ** 2)), 0.1 * np.sqrt(np.mean(seen(t) ** 2))
            )
            return seen(t)[-window:] / unit, unit
        logs = []
        for u in range(1, t + 1):
            sizes = np.abs(seen(u))
            logs.append(math.log(max(sizes[-1], 0.1 * sizes.mean())))
        levels = []
        for u in range(len(logs)):
            past = np.array(logs[: u + 1])
            variance = (past.size * past.var() + 16 * math.pi**2 / 8) / (past.size + 16)
            levels.append((past[-1] - past.mean()) / math.sqrt(variance))
        spans = sorted({min(2**i, window) for i in range(12)})
        return np.array([math.tanh(np.mean(levels[-span:])) for span in spans]), 1.0

    vectors = {t: vector(t) for t in range(window, len(p))}
    if scale is None:
        scale = 1 / window if target == "return" else 4 / len(vectors[window][0])
    results = {}
    for t in range(window + horizon, len(p)):
        past = range(window, t - horizon + 1)  # windows whose outcome is known at t
        weights = np.array([math.exp(scale * vectors[t][0] @ vectors[s][0]) for s in past])
        weights /= weights.sum()
        moves = np.array([p[s + horizon] - p[s] for s in past])
        if target == "return":
            relative = moves / np.array([vectors[s][1] for s in past])
            chances = (weights @ (moves > 0), weights @ (moves < 0))
        else:
            moves = relative = np.abs(moves)
            known = [np.mean(moves[: i + 1]) for i in range(len(moves))]
            chances = (weights @ (moves > known), math.nan)
        mean = weights @ relative
        deviation = math.sqrt(max(weights @ relative**2 - mean**2, 0))
        results[t] = (mean * vectors[t][1], deviation * vectors[t][1], chances)
    return results


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("window", "horizon"), [(8, 1), (5, 3), (1, 2)])
def test_it_is_exact_kernel_regression_up_to_the_features(target, window, horizon):
    prices = walk(160, seed=window)
    expected = naive(prices, target, window, horizon)
    result = forecast(prices, target=target, window=window, horizon=horizon, num_features=8192)
    exact = compare_with_exact(result)
    assert list(result.index) == list(expected)
    rows = [expected[t] for t in result.index]
    mean, spread, chance = (np.array([row[i] for row in rows]) for i in range(3))
    size = np.std(mean)
    np.testing.assert_allclose(exact.predicted, mean, atol=2e-4 * size, rtol=2e-5)
    assert result.next.exact == pytest.approx(mean[-1], abs=1e-4 * size)
    late = slice(20, None)
    np.testing.assert_allclose(result.predicted[late], mean[late], atol=0.35 * size)
    np.testing.assert_allclose(result.spread[late], spread[late], rtol=0.2)
    np.testing.assert_allclose(result.chance[late], chance[late, 0], atol=0.1)
    np.testing.assert_allclose(result.chance_down[late], chance[late, 1], atol=0.1)
    assert exact.correlation > 0.98
    outcome = np.log(prices[horizon:] / prices[:-horizon])[result.index[:-horizon]]
    outcome = np.abs(outcome) if target == "volatility" else outcome
    np.testing.assert_allclose(result.outcome[:-horizon], outcome, atol=1e-12)
    assert np.isnan(result.outcome[-horizon:]).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("cut", [120, 333, 560])
def test_the_future_moves_no_past_forecast_by_a_bit(target, horizon, cut):
    prices = walk(600)
    other = prices.copy()
    other[cut:] = prices[cut - 1] * np.exp(np.cumsum(np.linspace(-0.9, 0.8, 600 - cut)))
    options = {"target": target, "horizon": horizon, "window": 16, "num_features": 64}
    results = [forecast(p, **options) for p in (prices, other)]
    past = results[0].index < cut
    assert 0 < past.sum() < len(past)
    exact = [compare_with_exact(r) for r in results]
    for a, b in [(getattr(results[0], n), getattr(results[1], n)) for n in ("predicted", "spread",
                 "chance", "chance_down")] + [(exact[0].predicted, exact[1].predicted)]:  # fmt: skip
        np.testing.assert_array_equal(a[past], b[past])
    assert (results[0].predicted[~past][1:] != results[1].predicted[~past][1:]).any()
    if target == "return":
        signals = [evaluate(r).signals[past] for r in results]
        np.testing.assert_array_equal(*signals)
    else:
        for name in ("constant", "ewma"):
            np.testing.assert_array_equal(*(getattr(evaluate(r), name)[past] for r in results))


@pytest.mark.parametrize("target", TARGETS)
def test_a_forecast_does_not_depend_on_what_comes_after_the_series(target):
    prices = walk(500)
    short, long = (forecast(p, target=target, num_features=64) for p in (prices[:400], prices))
    np.testing.assert_allclose(long.predicted[: len(short)], short.predicted, rtol=1e-5, atol=1e-9)


def test_a_forecast_uses_the_newest_outcome_it_may_know():
    prices = walk(300)
    for horizon in (1, 3):
        options = {"horizon": horizon, "window": 8, "num_features": 64}
        before = forecast(prices[:250], **options).predicted[-1]
        changed = prices[:250].copy()
        changed[249] *= 1.05  # the price at which the newest outcome ends
        windows = forecast(changed, **options).windows
        assert windows.known[-1] == pytest.approx(math.log(changed[249] / changed[249 - horizon]))
        assert forecast(changed, **options).predicted[-1] != before


# ----------------------------------------------------------------------------------------
# Calibration and error bars
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_map_knows_the_first_windows_and_no_others(target):
    """Whatever follows the prefix, map and forecasts of the prefix stay as they are."""
    prices, options = walk(600), {"target": target, "window": 16, "num_features": 64}
    result = forecast(prices, **options)
    assert [part[:2] for part in result.sections] == [(0, PREFIX), (PREFIX, len(result))]
    known = result.sections[1].feature_map
    last = int(result.index[PREFIX - 1])  # the price at which the prefix ends
    for cut, same in ((last + 1, True), (last, False)):
        other = prices.copy()
        other[cut:] = prices[cut - 1] * np.exp(np.cumsum(np.linspace(-0.9, 0.8, 600 - cut)))
        assert (forecast(other, **options).sections[1].feature_map == known) == same
    plain = forecast(prices, calibration="none", **options)
    assert [part[:2] for part in plain.sections] == [(0, len(result))]
    np.testing.assert_array_equal(result.predicted[:PREFIX], plain.predicted[:PREFIX])
    assert (result.predicted[PREFIX:] != plain.predicted[PREFIX:]).all()


def test_a_short_series_is_not_calibrated():
    result = forecast(walk(PREFIX + 33), num_features=64)
    assert len(result) == PREFIX
    assert len(result.sections) == 1
    assert result.sections[0].feature_map.calibration is None
    assert len(forecast(walk(PREFIX + 34), num_features=64).sections) == 2


@pytest.mark.parametrize(("target", "share"), [("return", 0.7), ("volatility", 0.4)])
def test_calibration_brings_real_forecasts_nearer_to_exact_ones(target, share):
    """The reason why it is on by default: at the default size, mean square over four seeds."""
    errors = {}
    for method in ("none", "auto"):
        results = [
            forecast(read_prices(), target=target, calibration=method, seed=s) for s in range(4)
        ]
        errors[method] = np.mean([compare_with_exact(r).rmse ** 2 for r in results]) ** 0.5
    assert errors["auto"] < share * errors["none"]


@pytest.mark.parametrize("target", TARGETS)
def test_error_bars_hold_what_they_promise(target):
    """The bundled prices, at the default size: all forecasts of a draw share its luck."""
    inside, exact = [], None
    for seed in range(4):
        result = forecast(read_prices(), target=target, seed=seed)
        bars, exact = error_bars(result), exact or compare_with_exact(result)
        judged = slice(result.warm_up, None)
        error = abs(result.predicted - exact.predicted)
        inside.append((error < 1.96 * bars.standard_error)[judged].mean())
        assert np.median(bars.effective_sample_size[judged]) > 80
        assert bars.effective_sample_size.max() <= result.num_features
        assert bars.warnings == ()
    assert 0.9 < np.mean(inside) < 0.98
    assert error_bars(forecast(read_prices(), target=target, num_features=32)).warnings


def test_fewer_windows_than_pay_are_known():
    """There both take the same time, with the calibration: exact attention's grows with the square."""
    exact = compare_with_exact(forecast(read_prices()))
    exact = dataclasses.replace(exact, seconds=8.0, favor_seconds=0.5, calibration_seconds=0.25)
    windows, paying = np.sqrt(exact.matrix_bytes / 4), exact.pays_from
    assert exact.speedup == 16
    for rows, faster in ((paying - 1, False), (paying, True)):
        share = rows / windows
        assert (8.0 * share**2 > 0.5 * share + 0.25) == faster


def test_simulated_minutes_have_clusters_and_no_direction():
    prices = simulated_minutes(50_000, seed=3)
    steps = np.diff(np.log(prices.values))
    size = np.abs(steps)

    def correlation(x, lag):
        return np.corrcoef(x[lag:], x[:-lag])[0, 1]

    assert prices.step == "1 minute"
    assert steps.std() == pytest.approx(5e-4, rel=0.3)
    assert np.mean((steps / steps.std()) ** 4) > 5
    assert correlation(size, 1) > 0.15
    assert correlation(size, 1000) > 0.02
    assert abs(correlation(steps, 1)) < 0.03
    assert np.array_equal(simulated_minutes(50_000, seed=3).values, prices.values)
    assert not np.array_equal(simulated_minutes(50_000, seed=4).values, prices.values)
    with pytest.raises(ValueError, match="rows must be at least 2"):
        simulated_minutes(1)


def test_a_pattern_is_found_and_traded():
    rng = np.random.default_rng(1)
    returns = 0.01 * np.tile([1, 1, -1, 1, -1, -1], 120) + 0.001 * rng.standard_normal(720)
    prices = 20 * np.exp(np.cumsum(returns))
    result = forecast(prices, window=6, scale=1.5, num_features=512)
    record = evaluate(result, cost=0.0)
    assert record.hit_low > 0.9
    assert record.r2 > 0.8
    assert record.z > 5
    assert record.strategy.gain > 10 * record.hold.gain
    assert result.next.move == pytest.approx(0.01, abs=0.003)  # the next of the six goes up
    assert result.next.chance > 0.9
    assert math.copysign(1, result.next.similar[0].move) == 1


def test_bundled_returns_cannot_be_predicted_and_features_are_enough():
    result = forecast(read_prices())
    record, exact = evaluate(result), compare_with_exact(result)
    assert result.mean_s == pytest.approx(2.0, abs=0.01)
    assert exact.correlation > 0.98
    assert exact.rows == len(result) == 10192
    assert not exact.extrapolated
    assert abs(record.z) < 2
    assert record.hit_low < record.hit_rate < record.hit_high
    assert record.hit_low < record.up_share


@pytest.mark.parametrize("cycle", [0, 0.05])
def test_similar_windows_are_the_heaviest_and_apart(cycle):
    window, horizon, prices = 10, 2, walk(400)
    for end in (230, 400):  # cycles of six steps, here and now: windows a cycle apart are alike
        prices[end - 30 : end] *= np.exp(cycle * np.sin(np.arange(30) * np.pi / 3))
    result = forecast(prices, window=window, horizon=horizon, num_features=64)
    labels = {f"price {t + 1}": t for t in range(len(prices))}
    ends = [labels[p.time] for p in result.next.similar]
    assert len(ends) == 3
    assert all(abs(a - b) >= window // 2 for a in ends for b in ends if a is not b)
    weights = [p.weight for p in result.next.similar]
    assert weights == sorted(weights, reverse=True)
    keys, query = result.windows.keys.astype(float), result.windows.queries[-1].astype(float)
    kept = []
    for row in np.argsort(-(keys @ query), kind="stable"):
        if all(abs(row - other) >= window // 2 for other in kept):
            kept.append(int(row))
    assert ends == (result.index[kept[:3]] - horizon).tolist()
    moves = [np.log(prices[t + horizon] / prices[t]) for t in ends]
    np.testing.assert_allclose([p.move for p in result.next.similar], moves)


@pytest.mark.parametrize("seed", [0, 1])
def test_bundled_volatility_beats_the_constant(seed):
    result = forecast(read_prices(), target="volatility", seed=seed)
    record, exact = evaluate(result), compare_with_exact(result)
    assert record.r2 > 0.05
    assert record.z > 2
    assert 0.16 < record.r2_ewma < 0.18
    assert exact.correlation > 0.98
    assert result.mean_s < 2.5


def test_outside_the_good_regime_the_estimate_is_bad_and_says_so():
    result = forecast(read_prices(), scale=4 / 32)
    assert result.mean_s == pytest.approx(8, abs=0.1)
    assert result.weight_error > 1
    assert compare_with_exact(result).correlation < 0.9


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [8760, 33_000])
def test_hourly_and_longer_series(target, rows):
    times = np.datetime64("2024-01-01T00", "us") + np.arange(rows) * np.timedelta64(1, "h")
    prices = Prices(walk(rows, size=1e-3), times.astype("M8[us]"), "hours")
    stages = []
    result = forecast(
        prices, target=target, num_features=64, progress=lambda *args: stages.append(args)
    )
    assert np.isfinite(result.predicted).all()
    assert len(result) == rows - 33
    assert stages[-1][1:] == (len(result), len(result))
    record, exact = evaluate(result), compare_with_exact(result, max_seconds=1e-3)
    assert exact.extrapolated
    assert exact.rows == 4096
    assert exact.seconds == pytest.approx(exact.measured_seconds * (len(result) / 4096) ** 2)
    assert exact.correlation > 0.7  # with 64 features only
    assert record.stop == len(result) - 1


def test_slices_do_not_change_the_forecast():
    prices = walk(1000)
    whole = forecast(prices, num_features=64)
    with tuned(SLICE=100):
        sliced = forecast(prices, num_features=64)
    np.testing.assert_allclose(sliced.predicted, whole.predicted, rtol=1e-4, atol=1e-8)


def test_quiet_stretches_are_no_trouble():
    prices = walk(400)
    prices[:60] = prices[0]  # no move yet: there is no unit
    prices[100:200] = prices[99]  # no trade for longer than a window
    for target in TARGETS:
        result = forecast(prices, target=target, num_features=64)
        assert np.isfinite(result.predicted).all()
        assert np.isfinite(result.spread).all()
        if target == "return":  # no move is neither up nor down
            assert (result.windows.known == 0).sum() > 90
            assert result.next.chance + result.next.chance_down < 0.8
    spike = np.full(300, 10.0)
    spike[200] = 11.0
    for target in TARGETS:
        result = forecast(spike, target=target, num_features=64)
        assert np.isfinite(result.predicted).all()
        assert evaluate(result).stop > 0


# ----------------------------------------------------------------------------------------
# The record
# ----------------------------------------------------------------------------------------


def test_signals_need_more_than_the_threshold():
    values = np.array([0.02, 0.01, 0.0, -0.01, -0.02])
    np.testing.assert_array_equal(signals_of(values, 0.01), [1, 0, 0, 0, -1])
    np.testing.assert_array_equal(signals_of(values, 0.0), [1, 1, 0, -1, -1])


@pytest.mark.parametrize("horizon", [1, 3])
def test_equity_is_that_of_a_ledger(horizon):
    prices = walk(200)
    result = forecast(prices, window=8, horizon=horizon, num_features=64)
    record = evaluate(result, threshold=1e-4, cost=0.003)
    cash, hold, position, turnover, trades = 1.0, 1.0, 0.0, 0.0, 0
    given = []
    for row in range(record.start, len(result) - 1):
        t = result.index[row]
        move = prices[t + 1] / prices[t] - 1
        predicted = result.predicted[row]
        given.append(1 if predicted > 1e-4 else -1 if predicted < -1e-4 else 0)
        target = sum(given[-horizon:]) / horizon
        turnover += abs(target - position)
        trades += target != position
        cash *= 1 + target * move - 0.003 * abs(target - position)
        hold *= 1 + move - (0.003 if row == record.start else 0)
        position = target
    assert record.strategy.equity[-1] == pytest.approx(cash, rel=1e-12)
    assert record.hold.equity[-1] == pytest.approx(hold, rel=1e-12)
    assert record.strategy.turnover == pytest.approx(turnover)
    assert record.strategy.trades == trades
    assert (record.hold.turnover, record.hold.trades) == (1.0, 1)
    judged = slice(record.start, record.stop)
    agree = np.sign(result.predicted[judged]) == np.sign(result.outcome[judged])
    moved = result.outcome[judged] != 0
    assert record.hits == (agree & moved).sum()
    assert record.moves == moved.sum()


def test_the_base_rate_is_that_of_the_usual_direction_so_far():
    ups = np.tile([1, -1, -1, 1], 150)  # after every second move both directions were as frequent
    prices = 50 * np.exp(np.append(0, np.cumsum(0.01 * ups)))
    result = forecast(prices, num_features=16, calibration="none")
    record, right = evaluate(result), 0
    for row in range(record.start, record.stop):
        before = ups[: result.index[row]].sum()
        right += (1 if before >= 0 else -1) == np.sign(result.outcome[row])
    assert record.base_rate == pytest.approx(right / record.moves)


def test_wilson_interval():
    low, high = wilson_interval(50, 100)  # the textbook's 0.404 to 0.596
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    wide = wilson_interval(50, 100, overlap=4)
    assert wide == pytest.approx(wilson_interval(12.5, 25))


def test_z_score_is_calibrated_for_overlapping_values():
    rng = np.random.default_rng(0)
    independent = [z_score(rng.standard_normal(400), 1) for _ in range(400)]
    assert np.std(independent) == pytest.approx(1, abs=0.12)
    sums = [np.convolve(rng.standard_normal(404), np.ones(5), "valid") for _ in range(400)]
    assert np.std([z_score(s, 5) for s in sums]) < 1.5  # sqrt(5) if overlap were ignored
    assert z_score(np.zeros(10), 1) == 0


# ----------------------------------------------------------------------------------------
# Arguments, imports, picture
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "price"}, ValueError, "target"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 2.5}, TypeError, "window"),
        ({"horizon": 0}, ValueError, "horizon"),
        ({"num_features": 7}, ValueError, "num_features"),
        ({"calibration": "best"}, ValueError, "calibration must be one of 'auto', 'none', 'oprf'"),
        ({"calibration": None}, TypeError, "calibration"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"seed": -1}, ValueError, "seed"),
        ({"window": 290}, PriceError, "300 usable prices are too few: .* at least 308"),
        ({"horizon": 10**9}, PriceError, "too few"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        forecast(walk(300), **options)


@pytest.mark.parametrize("target", TARGETS)
def test_a_price_that_hardly_moves(target):
    """Only at the end; or back and forth, by so little that its logarithm is the same."""
    late, trembling = np.full(100, 50.0), np.full(100, 5e8)
    late[-1], trembling[::2] = 51, np.nextafter(5e8, 6e8)
    for prices in (late, trembling):
        with pytest.raises(PriceError, match="hardly ever moves"):
            forecast(prices, target=target)


def test_bad_costs():
    result = forecast(walk(100), num_features=16)
    for options in ({"cost": -1.0}, {"threshold": math.nan}, {"cost": math.inf}):
        with pytest.raises(ValueError, match=next(iter(options))):
            evaluate(result, **options)


@pytest.mark.parametrize("count", [50, 51, 60])
def test_the_shortest_series(count):
    for target in TARGETS:
        result = forecast(walk(count), target=target, num_features=16)
        record, exact = evaluate(result), compare_with_exact(result)
        assert record.stop - record.start > 0
        assert math.isfinite(exact.rmse)
    with pytest.raises(PriceError, match="at least 50"):
        forecast(walk(49))


def test_what_is_timed_was_compiled_before():
    """Threads share a long sequence by a kernel of its own: a first run that is short is not enough."""
    from favor_np.forecast._compare import timed

    rows = []
    timed(rows.append, 9000)
    assert rows[0] < tuning.MIN_SHARED_LENGTH <= rows[1] - PREFIX
    assert set(rows[2:]) == {9000}


def test_importing_it_loads_neither_numba_nor_matplotlib():
    code = (
        "import sys, favor_np.forecast as f; f.read_prices(); "
        "print([m for m in ('numba', 'matplotlib', 'tqdm', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [50, 700])
def test_plot(tmp_path, target, count):
    result = forecast(walk(count), target=target, num_features=64)
    figure = result.plot()
    figure.savefig(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 20_000
    assert len(figure.axes) == 6
    latency = result.plot(replayed=replay(result)).axes[-1]
    assert sum(bar.get_height() for bar in latency.patches) == len(result)


def test_a_picture_shows_what_it_is_given():
    result = forecast(walk(100), num_features=16)
    exact = dataclasses.replace(compare_with_exact(result), correlation=0.123)
    record = evaluate(result, threshold=1.0, cost=0.5)
    bars = error_bars(result)
    figure = result.plot(record=record, exact=exact, bars=bars)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles[2] == "Worth of 1, costs of 50% a position included"
    assert titles[4].endswith("correlation 0.1230")
    with pytest.warns(DeprecationWarning, match="is now result.plot"):
        old = plot(result, record, exact, bars, replay(result))
    assert [axes.get_title("left") for axes in old.axes[:6]] == titles
    assert len(old.axes) == 7
    with pytest.raises(ImportError, match="cannot import name 'draw'"):
        from favor_np.forecast import draw  # noqa: F401


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    result = forecast(walk(100), num_features=16)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'favor_np\[plot\]'"):
        result.plot()
