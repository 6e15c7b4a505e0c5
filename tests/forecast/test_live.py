"""The live forecast: the batch forecast, tick by tick, at a constant price."""

import dataclasses
import gc
import math
import pickle
import sys

import numpy as np
import pytest

from favor_np.forecast import (
    LiveForecast,
    Prices,
    Replay,
    evaluate,
    forecast,
    read_prices,
    replay,
)
from favor_np.forecast._maps import PREFIX
from favor_np.forecast._setting import Setting
from favor_np.forecast._windows import (
    ReturnStream,
    VolatilityStream,
    return_windows,
    volatility_windows,
)

TARGETS = ["return", "volatility"]
MAKERS = {
    "return": (return_windows, ReturnStream),
    "volatility": (volatility_windows, VolatilityStream),
}


def walk(count, seed=0, still=0):
    """A random walk with zero returns, `still` for its first prices."""
    rng = np.random.default_rng(seed)
    returns = 0.01 * rng.standard_t(5, count) * (rng.random(count) > 0.1)
    returns[:still] = 0
    return 50 * np.exp(np.cumsum(returns))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("calibration", ["auto", "none", "aderf+sderf"])
def test_real_prices_tick_by_tick_are_the_batch_forecast(target, horizon, calibration):
    options = {"target": target, "horizon": horizon, "num_features": 256}
    options["calibration"] = calibration
    prices = read_prices()
    batch = forecast(prices, **options)
    live = LiveForecast(**options)
    ticks = [live.push(price) for price in prices.values]
    assert [i for i, tick in enumerate(ticks) if tick is not None] == list(batch.index)
    ticks = ticks[batch.index[0] :]
    assert [tick.price for tick in ticks] == list(prices.values[batch.index])
    for name, expected in [("move", batch.predicted), ("spread", batch.spread),
                           ("chance", batch.chance), ("chance_down", batch.chance_down)]:  # fmt: skip
        got = np.array([getattr(tick, name) for tick in ticks])
        late = slice(10, None)  # a spread of hardly any windows is a small difference
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            got[late], expected[late], rtol=1e-5, atol=2e-5 * np.median(abs(expected))
        )
    if target == "return":
        np.testing.assert_array_equal([t.signal for t in ticks], evaluate(batch).signals)
    else:
        assert {tick.signal for tick in ticks} == {0}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("window", [1, 2, 5, 32])
@pytest.mark.parametrize("still", [0, 60])
def test_streamed_windows_are_those_of_the_whole_series(target, window, still):
    logs, horizon = np.log(walk(300, still=still)), 3
    make, stream = MAKERS[target]
    batch, live = make(logs, window, horizon), stream(window)
    assert live.scale == batch.scale
    assert (live.dim, live.columns) == (batch.keys.shape[1], batch.values.shape[1])
    found = [(t, live.push(r)) for t, r in enumerate(np.diff(logs).tolist(), start=1)]
    found = [(t, *item) for t, item in found if item is not None]
    assert [t for t, _, _ in found[horizon:]] == list(batch.index)
    vectors = np.array([vector for _, vector, _ in found])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[horizon:], batch.queries, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(vectors[:-horizon], batch.keys, rtol=1e-6, atol=1e-7)
    units = np.array([unit for _, _, unit in found])
    np.testing.assert_allclose(units[horizon:], batch.unit, rtol=1e-12)
    values = [live.value(logs[t + horizon] - logs[t], u) for t, _, u in found[:-horizon]]
    np.testing.assert_allclose(values, batch.values, rtol=1e-6)


def calls(function, *arguments):
    """How many Python and C functions a call runs through."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += 1

    gc.disable()  # others may have hung functions on it
    sys.setprofile(seen)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("target", TARGETS)
def test_a_tick_costs_the_same_whatever_came_before(target):
    live = LiveForecast(target=target, horizon=3, num_features=64)
    prices = walk(3000)
    work, sizes = [], []
    for done, price in enumerate(prices):
        if done in (500, 516, 1508, 2996):  # 16 tokens, a tail, apart; after the map is calibrated
            work.append(calls(live.push, price))
            sizes.append(len(pickle.dumps(live)))
        else:
            live.push(price)
    assert min(work) == max(work) > 10
    assert max(sizes) - min(sizes) < 16  # an integer may take another byte


def test_the_windows_of_the_calibration_are_forgotten():
    plain, fitted = (LiveForecast(num_features=64, calibration=c) for c in ("none", "auto"))
    for done, price in enumerate(walk(600)):
        before = fitted.state.feature_map
        assert (plain.push(price) == fitted.push(price)) == (done < 33 + PREFIX)
        changed = fitted.state.feature_map is not before
        assert changed == (done == 33 + PREFIX)  # the price after the last of them
    assert fitted._prefix is plain._prefix is None


def test_a_call_between_two_prices_calibrates_and_no_price_does():
    early, late = LiveForecast(num_features=64), LiveForecast(num_features=64)
    for done, price in enumerate(walk(600)):
        before = early.state.feature_map
        assert early.push(price) == late.push(price)
        assert early.state.feature_map is before
        assert early.calibrate() == (done == 32 + PREFIX)
    assert not LiveForecast(num_features=64, calibration="none").calibrate()


def test_a_copy_goes_its_own_way():
    live, prices = LiveForecast(num_features=64), walk(200)
    for price in prices[:150]:
        live.push(price)
    copy = pickle.loads(pickle.dumps(live))
    copy.push(1e6)
    again = pickle.loads(pickle.dumps(live))
    assert [live.push(p) for p in prices[150:]] == [again.push(p) for p in prices[150:]]


def test_a_price_that_cannot_be_used_changes_nothing():
    prices = walk(120)
    clean, disturbed = LiveForecast(num_features=64), LiveForecast(num_features=64)
    for price in prices:
        for bad in (0, -37.63, math.nan, math.inf):
            with pytest.raises(ValueError, match="price must be finite and greater than 0"):
                disturbed.push(bad)
        with pytest.raises(TypeError, match="price must be a real number"):
            disturbed.push("12")
        assert clean.push(price) == disturbed.push(np.float64(price))


def test_signals_need_more_than_the_threshold():
    prices = walk(400)
    ticks = {}
    for threshold in (0.0, 1e-3, 1.0):
        live = LiveForecast(num_features=64, threshold=threshold)
        ticks[threshold] = [tick for price in prices if (tick := live.push(price))]
    for threshold, made in ticks.items():
        for tick in made:
            assert tick.signal == np.sign(tick.move) * (abs(tick.move) > threshold)
    assert {tick.signal for tick in ticks[1e-3]} == {-1, 0, 1}
    assert {tick.signal for tick in ticks[1.0]} == {0}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": "price"}, ValueError),
        ({"window": 0}, ValueError),
        ({"horizon": 1.5}, TypeError),
        ({"num_features": 7}, ValueError),
        ({"calibration": "spherical "}, ValueError),
        ({"scale": 0.0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"threshold": -1.0}, ValueError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        LiveForecast(**options)


@pytest.mark.parametrize("target", TARGETS)
def test_replay(target):
    seen = []
    batch = forecast(walk(300), target=target, window=8, horizon=2, num_features=64, seed=3)
    record = replay(batch, threshold=1e-3, progress=lambda *step: seen.append(step))
    assert len(record.predicted) == len(record.signals) == len(record.seconds) == len(batch)
    assert 0 < record.difference < 1e-5
    error = abs(record.predicted - batch.predicted).max() / abs(batch.predicted).max()
    assert record.difference == error
    assert (record.seconds > 0).all()
    assert seen == [("replay", 300, 300)]
    longer = replay(forecast(walk(600), target=target, window=8, num_features=64))
    assert longer.state_bytes == record.state_bytes
    assert longer.calibration_seconds > 0  # and in no tick
    assert record.calibration_seconds > 0


def test_a_forecast_is_made_again_and_goes_on_live_by_its_settings():
    prices = walk(400)
    batch = forecast(prices, target="volatility", window=8, horizon=2, num_features=64,
                     calibration="none", seed=3)  # fmt: skip
    again = forecast(prices, **batch.settings)
    np.testing.assert_array_equal(again.predicted, batch.predicted)
    live = LiveForecast(**batch.settings)
    ticks = [live.push(price) for price in prices]
    assert ticks[-1].move == pytest.approx(batch.next.move, rel=1e-4)
    assert forecast(prices).settings == vars(Setting()) | {"scale": 1 / 32}


def test_replay_sees_a_difference():
    batch = forecast(Prices.from_array(walk(200)), num_features=64)
    batch.predicted[50] += 1.0
    assert replay(batch).difference > 0.9


EMPTY = Replay(np.empty(0), np.empty(0, np.int8), 0.0, np.empty(0), 0)


@pytest.mark.parametrize("tail", [1e-4, 1.0])
def test_histogram(tail):
    times = np.append(np.linspace(31e-6, 52e-6, 1000), [tail] * 5)
    edges, counts = dataclasses.replace(EMPTY, seconds=times).histogram()
    np.testing.assert_allclose(edges, np.arange(30, 56, 5) * 1e-6)
    expected = [((times >= low) & (times < low + 5e-6)).sum() for low in edges[:-1]]
    assert list(counts) == [*expected, 5]


def test_histogram_of_a_coarse_clock():
    _, counts = dataclasses.replace(EMPTY, seconds=np.full(7, 1e-4)).histogram()
    assert counts.sum() == 7
