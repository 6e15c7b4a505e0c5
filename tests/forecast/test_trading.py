"""What forecasts would have earned, and that nothing of it looks ahead."""

import math

import numpy as np
import pytest

from favor_np.forecast import Prices, evaluate, forecast, read_prices, simulated_minutes
from favor_np.forecast._trading import sharpe_ratio, steady_position, trade


def test_noise_in_the_future_moves_no_past_number_by_a_bit():
    """Forecasts, signals, positions and what they earned: windows, scales and calibration as well."""
    values, rng = read_prices().values, np.random.default_rng(0)
    cut = 3000
    noisy = np.append(values[:cut], values[cut - 1] * np.exp(rng.standard_normal(1500)))
    usual = values[: cut + 1500]
    records = []
    for series in (usual, noisy):
        result = forecast(series, horizon=3)
        record = evaluate(result)
        past = slice(0, int(np.searchsorted(result.index, cut)))
        steps = slice(0, past.stop - record.start)  # equity that prices before the cut have made
        records.append(
            [
                *(getattr(result, x)[past] for x in ("index", "predicted", "spread", "chance")),
                result.windows.known[past],
                record.signals[past],
                *(x.equity[steps] for x in (record.strategy, record.hold, record.steady)),
                record.start,
            ]
        )
    for ours, theirs in zip(*records, strict=True):
        assert np.array_equal(ours, theirs)
    assert len(records[0][-2]) > 2000


def test_a_steady_position_keeps_its_risk():
    """On wild and calm minutes: the volatility of what is held varies less than that of the price."""
    prices = simulated_minutes(30_000, seed=2).values
    returns = np.diff(prices) / prices[:-1]
    position = steady_position(returns, 1000)
    held = position * returns[1000:]

    def unevenness(x):
        risk = np.sqrt(np.mean(x[: len(x) // 100 * 100].reshape(-1, 100) ** 2, axis=1))
        return risk.std() / risk.mean()

    assert unevenness(held) < 0.8 * unevenness(returns[1000:])
    assert position.min() > 0
    assert position.max() <= 2
    assert np.count_nonzero(np.diff(position)) < 0.5 * len(position)


def test_a_steady_position_is_its_definition():
    returns = 0.01 * np.random.default_rng(0).standard_normal(300)
    position = steady_position(returns, 50)
    held = 0.0
    for t in range(50, 300):
        weights = 0.06 * 0.94 ** np.arange(t)[::-1]
        weights[0] /= 0.06
        wanted = min(math.sqrt(np.mean(returns[:t] ** 2) / (weights @ returns[:t] ** 2)), 2.0)
        held = wanted if abs(wanted - held) > 0.1 * held else held
        assert position[t - 50] == pytest.approx(held, rel=1e-9)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_the_standard_error_of_a_sharpe_ratio_is_its_spread(kind):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2000, 500))
    if kind == "skewed":
        noise = 1 - rng.standard_exponential((2000, 500))
    found = np.array([sharpe_ratio(row) for row in noise + 0.5])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.06)


def test_costs_are_paid_for_every_change():
    steps = np.array([0.1, -0.1, 0.0, 0.2])
    made = trade(steps, np.array([1.0, 1.0, -1.0, 0.0]), 0.01, 4.0)
    assert made.equity == pytest.approx(np.cumprod([1, 1.09, 0.9, 0.98, 0.99]))
    assert (made.turnover, made.trades) == (4.0, 3)
    returns = np.array([0.09, -0.1, -0.02, -0.01])
    assert made.sharpe == pytest.approx(2 * returns.mean() / returns.std())
    assert made.gain == pytest.approx(made.equity[-1] - 1)
    ruined = trade(np.array([0.5, -3.0, 0.5]), np.ones(3), 0.0, 1.0)
    assert ruined.equity[-1] == 0.0


def test_hits_are_judged_by_the_more_frequent_direction():
    """Prices that mostly rise: to say so is no skill, though it is right in far more than half."""
    rng = np.random.default_rng(0)
    returns = np.where(rng.random(3000) < 0.7, 0.01, -0.01) * rng.uniform(0.5, 1.5, 3000)
    record = evaluate(forecast(Prices(np.exp(np.cumsum(returns)))))
    assert record.hit_low > 0.6
    assert record.base_rate > 0.65
    assert record.z_hits < 2
    pattern = np.tile([0.01, 0.01, -0.01, 0.01, -0.01, -0.01], 300) * rng.uniform(0.9, 1.1, 1800)
    record = evaluate(forecast(np.exp(np.cumsum(pattern)), window=6, scale=1.5))
    assert record.z_hits > 5


def test_overlapping_outcomes_are_thinned_as_well():
    result = forecast(read_prices().values[:3000], horizon=5)
    record = evaluate(result)
    judged = slice(record.start, record.stop)
    outcome, predicted = result.outcome[judged][::5], result.predicted[judged][::5]
    gain = outcome**2 - (outcome - predicted) ** 2
    lags = int(len(gain) ** (1 / 3))
    centred = gain - gain.mean()
    terms = [2 * (1 - k / (lags + 1)) * (centred[k:] @ centred[:-k]) for k in range(1, lags + 1)]
    error = math.sqrt(centred @ centred + sum(terms)) / len(gain)
    assert record.z_thinned == pytest.approx(gain.mean() / error)
