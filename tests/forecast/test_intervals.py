"""Conformal intervals: how often they hold, in calm and in wild times, and who knew what when."""

import numpy as np
import pytest

from favor_np.forecast import EWMA, HAR, backtest, conformal_intervals, read_prices, samples


def stock(name):
    from bokeh_sampledata import stocks

    return np.asarray(getattr(stocks, name)["adj_close"], np.float64)


def index(name):
    from importlib import import_module

    return import_module(f"arch.data.{name}").load()["Adj Close"].to_numpy(np.float64)


SERIES = {
    "WTI": read_prices,
    **{name: lambda name=name: stock(name) for name in ("AAPL", "GOOG", "IBM", "MSFT")},
    **{name: lambda name=name: index(name) for name in ("sp500", "nasdaq")},
}


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("estimator", [EWMA(), HAR()], ids=["EWMA", "HAR"])
def test_intervals_hold_on_real_prices(name, estimator):
    prices = SERIES[name]()
    made = backtest(estimator, *samples(prices), start=700)
    outcome = samples(prices, squared=False).y[made.index]
    found = conformal_intervals(outcome, np.zeros(len(outcome)), np.sqrt(made.predicted))
    assert 0.88 < found.coverage < 0.92
    assert found.by_scale[2] > 0.85
    assert min(found.by_scale) > 0.84
    assert found.after_shocks > 0.85


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_intervals_are_their_definition(horizon, rate):
    rng = np.random.default_rng(0)
    count, window, target = 500, 120, 0.8
    outcome, predicted = rng.standard_normal((2, count))
    outcome[-3:] = np.nan
    scale = np.exp(rng.standard_normal(count))
    found = conformal_intervals(
        outcome, predicted, scale, coverage=target, horizon=horizon, window=window, rate=rate
    )
    errors = abs(outcome - predicted) / scale
    aim, half = target, np.full(count, np.nan)
    for t in range(horizon, count):
        if np.isfinite(half[t - horizon]) and np.isfinite(errors[t - horizon]):
            aim += rate * ((errors[t - horizon] > half[t - horizon]) - (1 - target))
        known = errors[: t - horizon + 1]
        known = np.sort(known[np.isfinite(known)][-window:])
        if len(known) >= 100:
            place = min(max(int(np.ceil(aim * (len(known) + 1))), 1), len(known))
            half[t] = known[place - 1]
            assert found.level[t] == pytest.approx(aim)
    assert np.allclose(found.upper, predicted + half * scale, equal_nan=True)
    assert np.allclose(found.lower, predicted - half * scale, equal_nan=True)
    held = abs(outcome - predicted) <= half * scale
    held = held[np.isfinite(half) & np.isfinite(outcome)]
    assert found.coverage == pytest.approx(np.mean(held))
    assert len(held) == found.judged.sum() == count - 99 - horizon - 3


def test_adaptation_recovers_from_a_break():
    rng = np.random.default_rng(0)
    outcome = rng.standard_normal(4000) * np.where(np.arange(4000) < 2000, 1, 3)
    after = slice(2000, 2300)
    covered = [
        conformal_intervals(outcome, np.zeros(4000), np.ones(4000), rate=rate).covered[after].mean()
        for rate in (0.0, 0.05)
    ]
    assert covered[0] < 0.7
    assert covered[1] > covered[0] + 0.15


def test_scaling_by_volatility_covers_wild_times():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal(6000))
    outcome = scale * rng.standard_normal(6000)
    scaled, plain = (
        conformal_intervals(outcome, np.zeros(6000), s) for s in (scale, np.ones(6000))
    )
    wild = scale > np.quantile(scale, 2 / 3)
    assert scaled.covered[wild & scaled.judged].mean() > 0.88
    assert plain.covered[wild & plain.judged].mean() < 0.8
    assert scaled.score < plain.score


def test_the_future_moves_no_past_interval():
    rng = np.random.default_rng(0)
    outcome, scale = rng.standard_normal(1000), np.exp(rng.standard_normal(1000))
    other = outcome.copy()
    other[600:] *= 50
    ours, theirs = (conformal_intervals(x, np.zeros(1000), scale) for x in (outcome, other))
    assert np.array_equal(ours.upper[:601], theirs.upper[:601], equal_nan=True)
    assert not np.array_equal(ours.upper[601:], theirs.upper[601:])


def test_intervals_of_too_few_outcomes_have_no_coverage():
    found = conformal_intervals(np.ones(50), np.ones(50), np.ones(50))
    assert not found.judged.any()
    assert "nan% covered" in repr(found)
    assert np.isnan([found.score, found.after_shocks, *found.by_scale]).all()


def test_repr_tells_the_coverages():
    outcome = np.random.default_rng(0).standard_normal(2000)
    found = conformal_intervals(outcome, np.zeros(2000), np.ones(2000), coverage=0.75)
    assert f"{100 * found.coverage:.1f}% covered of 75%" in repr(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": np.ones(4)}, r"must be \(n,\), got \(4,\), \(3,\), \(3,\)"),
        ({"scale": np.array([1.0, 0.0, 1.0])}, "scale finite and above 0"),
        ({"predicted": np.full(3, np.nan)}, "predicted must be finite"),
        ({"coverage": 1.0}, "coverage must be between 0 and 1, got 1"),
        ({"coverage": 0.0}, "coverage must be between 0 and 1, got 0"),
        ({"rate": -0.1}, "rate must be between 0 and 1"),
        ({"window": 99}, "window must be at least 100"),
        ({"horizon": 0}, "horizon must be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"outcome": np.ones(3), "predicted": np.ones(3), "scale": np.ones(3)}
    with pytest.raises(ValueError, match=message):
        conformal_intervals(**arguments | change)
