"""Uneven bars: the gaps in a series, and how many steps a year has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._windows import F64

if TYPE_CHECKING:
    from ._prices import Prices, Times

HOUR, DAY = 3600.0, 86400.0
WEEK, YEAR = 7 * DAY, 365.25 * DAY
SESSIONS = 252  # days a year on which an exchange is open
COUNTED = 360 * DAY  # a series of this length is counted; a shorter one may miss a holiday season
SHORTEST_SESSION, LONGEST_SESSION = 4 * HOUR, 12 * HOUR  # of one day that is all there is


@dataclass(frozen=True)
class Gaps:
    """Steps that are longer than the usual one: nights, weekends, holidays, missing rows.

    Parameters
    ----------
    count, steps : int
        How many of all steps.
    longest : float
        Seconds of the longest.
    ratio : float
        Root mean square of the log returns over them, over that of the others.
    """

    count: int
    steps: int
    longest: float
    ratio: float


def gaps(prices: Prices) -> Gaps | None:
    """Find the steps that are over 1.5 times the usual one; None if there are none, or no usual."""
    if prices.times is None:
        return None
    steps = np.diff(prices.times) / np.timedelta64(1, "s")
    usual = np.median(steps)
    long = steps > 1.5 * usual
    if not long.any() or np.mean(abs(steps - usual) <= 0.01 * usual) < 0.5:
        return None
    squares = np.diff(np.log(prices.values)) ** 2
    others = float(squares[~long].mean())
    ratio = float(squares[long].mean() / others) ** 0.5 if others > 0 else float("inf")
    return Gaps(int(long.sum()), len(steps), float(steps.max()), ratio)


def steps_per_year(times: Times | None) -> tuple[float, str]:
    """Return how many steps a year has and how they were counted; 1 and "" where none can tell.

    The length of a series does not tell it: a session of 390 minutes is no 365th of the minutes
    of a year.  What is shorter than a year is told by its days: where in the clock it has no prices
    (the night, where a new day begins), how many of the seven weekdays it has, and how many prices
    a day.
    """
    if times is None:
        return 1.0, ""
    # A float64 has microseconds of ten years, and the first of 1970 was a Thursday.
    seconds = (times - np.datetime64(0, "s")) / np.timedelta64(1, "s")
    span, step = float(seconds[-1] - seconds[0]), float(np.median(np.diff(seconds)))
    rate = (len(seconds) - 1) / span * YEAR
    if span >= COUNTED:
        return rate, f"counted over {span / YEAR:.1f} years"
    opening = _opening(seconds, step)
    days, counts = np.unique((seconds - (opening or 0.0)) // DAY, return_counts=True)
    weekdays = len(np.unique(days % 7))
    if step > 0.75 * DAY:
        if step < 1.5 * DAY and weekdays <= 5 and span >= WEEK:
            return float(SESSIONS), "a weekday each, less holidays"
        return rate, f"counted over {span / DAY:.0f} days"
    if opening is None:
        return _around_the_clock(seconds, rate, step)
    if len(days) == 1:
        weekend = (seconds[0] // DAY + 3) % 7 >= 5
        if weekend or not SHORTEST_SESSION <= span <= LONGEST_SESSION:
            return 1.0, ""
    a_day = float(np.median(counts[1:-1]) if len(days) > 3 else counts.max())
    if weekdays <= 5:
        return a_day * SESSIONS, f"{a_day:,.0f} a session, {SESSIONS} sessions"
    a_year = 365.25 * weekdays / 7
    return a_day * a_year, f"{a_day:,.0f} a day, {a_year:.0f} days"


def _opening(seconds: F64, step: float) -> float | None:
    """Second of the day at which the longest time without any price ends; None without a night."""
    clock = np.unique(seconds % DAY)
    pauses = np.diff(clock, append=clock[0] + DAY)
    longest = int(np.argmax(pauses))
    if pauses[longest] <= max(2 * step, HOUR):
        return None
    return float(clock[(longest + 1) % len(clock)])


def _around_the_clock(seconds: F64, rate: float, step: float) -> tuple[float, str]:
    weeks = int((seconds[-1] - seconds[0]) // WEEK)
    if weeks:
        count = int((seconds > seconds[-1] - weeks * WEEK).sum())
        return count / weeks * YEAR / WEEK, f"{count / weeks:,.0f} a week"
    if np.diff(seconds).max() > DAY:  # closed at the weekend
        return DAY / step * SESSIONS, f"{DAY / step:,.0f} a day, {SESSIONS} days"
    return rate, "around the clock, every day"
