"""Uneven bars: gaps are found, and the steps of a year counted by sessions, not by the clock."""

import math

import numpy as np
import pytest

from favor_np.forecast import Prices, evaluate, forecast
from favor_np.forecast._calendar import gaps, steps_per_year

MINUTE, HOUR, DAY = (np.timedelta64(1, unit) for unit in "mhD")


def series(times, seed=0):
    rng = np.random.default_rng(seed)
    values = 50 * np.exp(np.cumsum(0.001 * rng.standard_normal(len(times))))
    return Prices(values, np.sort(times), "made up")


def sessions(first, days, bars, step, opening, weekdays=(0, 1, 2, 3, 4)):
    """Bars of the sessions of an exchange."""
    dates = np.datetime64(first) + np.arange(days)
    numbers = (dates.astype(int) + 3) % 7
    dates = dates[np.isin(numbers, weekdays)].astype("M8[m]")
    return (dates[:, None] + opening + step * np.arange(bars)).reshape(-1)


NEW_YORK, SYDNEY = 14 * HOUR + 30 * MINUTE, 23 * HOUR  # openings, UTC


@pytest.mark.parametrize("days", [1, 2, 3, 5, 8, 30, 200])
def test_a_session_of_390_minutes_is_98280_a_year(days):
    times = sessions("2024-03-04", days, 390, MINUTE, NEW_YORK)
    assert steps_per_year(times) == (98_280.0, "390 a session, 252 sessions")


def test_sessions_that_were_cut_off_or_shorter_do_not_count():
    times = sessions("2024-03-04", 12, 390, MINUTE, NEW_YORK)
    short = np.delete(times, slice(800, 980))  # a half day
    assert steps_per_year(short[200:-100])[0] == 98_280


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (sessions("2024-03-03", 26, 360, MINUTE, SYDNEY, (6, 0, 1, 2, 3)), 360 * 252),
        (sessions("2024-03-04", 60, 7, HOUR, NEW_YORK), 7 * 252),
        (sessions("2024-03-04", 40, 288, 5 * MINUTE, 0 * MINUTE, range(7)), 288 * 365.25),
        (sessions("2024-03-04", 3, 1440, MINUTE, 0 * MINUTE, range(7)), 1440 * 365.25),
        (sessions("2024-03-01", 4, 1440, MINUTE, 0 * MINUTE), 1440 * 252),  # a weekend without
        (sessions("2024-03-04", 61, 24, HOUR, 0 * HOUR), 24 * 5 * 365.25 / 7),
        (sessions("2024-03-04", 40, 300, MINUTE, 10 * HOUR, range(7)), 300 * 365.25),
        (sessions("2024-03-04", 100, 1, DAY, 0 * HOUR), 252),
        (sessions("2024-03-04", 100, 1, DAY, 0 * HOUR, range(7)), 365.25),
        (sessions("2020-03-02", 1461, 1, DAY, 0 * HOUR), 365.25 * 5 / 7),
        (sessions("2020-03-02", 1461, 390, MINUTE, NEW_YORK), 390 * 365.25 * 5 / 7),
    ],
)
def test_steps_per_year(times, expected):
    found, words = steps_per_year(times.astype("M8[us]"))
    assert found == pytest.approx(expected, rel=3e-3)
    assert words


@pytest.mark.parametrize("days", [360, 361])
def test_a_series_of_360_days_is_counted(days):
    times = np.datetime64("2024-01-01", "D") + np.arange(days)
    assert (steps_per_year(times)[1] == "counted over 1.0 years") == (days == 361)


def test_what_a_few_hours_cannot_tell_is_not_guessed():
    for start, bars in (("2024-03-04T10", 60), ("2024-03-04T02", 1000), ("2024-03-09T10", 390)):
        times = np.datetime64(start, "m") + MINUTE * np.arange(bars)
        assert steps_per_year(times) == (1.0, "")
    assert steps_per_year(None) == (1.0, "")


def test_gaps():
    times = sessions("2024-03-04", 60, 7, HOUR, NEW_YORK)
    prices = series(times)
    night = np.append(False, np.diff(times) > HOUR)
    prices.values[:] = 50 * np.exp(np.cumsum(np.where(night, 0.003, 0.001)))
    found = gaps(prices)
    assert (found.count, found.steps) == (night.sum(), len(times) - 1)
    assert found.ratio == pytest.approx(3)
    assert found.longest == (24 * 3 - 6) * 3600
    assert gaps(series(times[0] + HOUR * np.arange(300))) is None
    assert gaps(Prices(prices.values)) is None
    uneven = times[0] + MINUTE * np.cumsum(np.random.default_rng(0).integers(1, 90, 300))
    assert gaps(series(uneven)) is None


def test_the_sharpe_ratio_of_constant_returns_is_undefined():
    prices = Prices.from_array(100 * 1.001 ** np.arange(300))
    record = evaluate(forecast(prices, num_features=16), cost=0.0)
    assert math.isnan(record.hold.sharpe)
    assert math.isnan(record.strategy.sharpe)  # always long
    never = evaluate(forecast(prices, num_features=16), threshold=1.0)
    assert (never.signals == 0).all()
    assert math.isnan(never.strategy.sharpe)
    usual = evaluate(forecast(series(sessions("2024-03-04", 60, 7, HOUR, NEW_YORK))))
    growth = usual.hold.equity[1:] / usual.hold.equity[:-1] - 1
    assert usual.steps_per_year == 7 * 252
    assert usual.hold.sharpe == pytest.approx(growth.mean() / growth.std() * (7 * 252) ** 0.5)
