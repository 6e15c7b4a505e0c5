"""Intervals that cover: conformal, scaled by predicted volatility, adaptive."""

from __future__ import annotations

import bisect
import functools
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from favor_np import validation

from ._windows import F64

FEWEST = 100  # scores before the first interval
SHOCKS, AFTER = 0.005, 60  # share of outcomes that are shocks, and steps after each that are judged


@dataclass(frozen=True, eq=False, repr=False)
class Intervals:
    """Intervals of forecasts, each made from what was known, and how often they held.

    The first ones, made before enough outcomes were known, are NaN and not counted.

    Parameters
    ----------
    lower, upper : ndarray, shape (n,), float64
        The intervals.
    outcome, scale : ndarray, shape (n,), float64
        What happened (NaN where it is not known yet), and the scale that they were made with.
    target : float
        The share of outcomes that they should cover.
    level : ndarray, shape (n,), float64
        The share that was aimed at each time, to cover `target` in the long run.
    """

    lower: F64
    upper: F64
    outcome: F64
    scale: F64 = field(repr=False)
    target: float
    level: F64 = field(repr=False)

    def __repr__(self) -> str:
        """One line: what they should cover, and what they do."""
        thirds = ", ".join(f"{100 * share:.1f}" for share in self.by_scale)
        return (
            f"<Intervals: {100 * self.coverage:.1f}% covered of {100 * self.target:g}%; "
            f"calm to wild: {thirds}%; after shocks: {100 * self.after_shocks:.1f}%>"
        )

    @functools.cached_property
    def judged(self) -> npt.NDArray[np.bool_]:
        """Those that were made and whose outcome is known."""
        return np.isfinite(self.lower) & np.isfinite(self.outcome)

    @functools.cached_property
    def covered(self) -> npt.NDArray[np.bool_]:
        """Whether each holds its outcome."""
        return (self.lower <= self.outcome) & (self.outcome <= self.upper)

    @property
    def coverage(self) -> float:
        """Share of outcomes that are covered."""
        return _mean(self.covered[self.judged])

    @property
    def by_scale(self) -> tuple[float, float, float]:
        """The same by terciles of the predicted scale: calm, usual and wild times."""
        covered, scale = self.covered[self.judged], self.scale[self.judged]
        thirds = np.array_split(covered[np.argsort(scale, kind="stable")], 3)
        calm, usual, wild = map(_mean, thirds)
        return calm, usual, wild

    @property
    def after_shocks(self) -> float:
        """The same in the 60 steps after each of the largest outcomes (0.5 % of them)."""
        size = np.where(self.judged, abs(self.outcome), 0.0)
        count = max(1, round(SHOCKS * self.judged.sum()))
        after = np.zeros(len(size), np.bool_)
        for shock in np.argsort(size)[-count:]:
            after[shock + 1 : shock + 1 + AFTER] = True
        after &= self.judged
        return _mean(self.covered[after])

    @property
    def score(self) -> float:
        """Mean interval score of Winkler: width, and 2 / (1 - target) times what is missed."""
        lower, upper, outcome = (x[self.judged] for x in (self.lower, self.upper, self.outcome))
        missed = np.maximum(lower - outcome, 0) + np.maximum(outcome - upper, 0)
        return _mean(upper - lower + 2 / (1 - self.target) * missed)


def _mean(numbers: npt.NDArray[np.bool_] | F64) -> float:
    """Return their mean: NaN if there are none."""
    return float(numbers.mean()) if numbers.size else math.nan


def conformal_intervals(
    outcome: npt.ArrayLike,
    predicted: npt.ArrayLike,
    scale: npt.ArrayLike,
    *,
    coverage: float = 0.9,
    horizon: int = 1,
    window: int = 1000,
    rate: float = 0.005,
) -> Intervals:
    """Make intervals that hold a given share of outcomes, whatever their distribution.

    The interval at t is ``predicted[t] ± q scale[t]``: q is the quantile of the last errors over
    their scales that were known at t.  The share it is taken at goes up by `rate` times what a miss
    weighs, and down a little otherwise, so that the share of misses is right in the long run even
    where the world changes.

    Parameters
    ----------
    outcome, predicted, scale : array_like, shape (n,)
        What happened (NaN where it is not known yet), the forecasts, and their predicted standard
        deviations, above 0, in order of time.
    coverage : float
        Share of outcomes to hold, between 0 and 1.
    horizon : int
        Forecasts from each to the first one made when its outcome is known.
    window : int
        Last errors that count.
    rate : float
        Of the adaptation; 0 for none.

    Returns
    -------
    Intervals

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or shape or out of its range.

    References
    ----------
    Gibbs and Candès 2021, "Adaptive conformal inference under distribution shift"
    (arXiv:2106.00170).

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.forecast import conformal_intervals
    >>> rng = np.random.default_rng(0)
    >>> scale = np.exp(rng.standard_normal(5000))
    >>> conformal_intervals(scale * rng.standard_t(3, 5000), np.zeros(5000), scale)
    <Intervals: 89.9% covered of 90%; calm to wild: 90.0, 89.8, 89.7%; after shocks: 91.3%>
    """
    happened, centre, spread = (np.asarray(x, np.float64) for x in (outcome, predicted, scale))
    shapes = [x.shape for x in (happened, centre, spread)]
    if happened.ndim != 1 or len(set(shapes)) > 1:
        raise ValueError(
            f"outcome, predicted and scale must be (n,), got {', '.join(map(str, shapes))}"
        )
    if not (np.isfinite(centre).all() and np.isfinite(spread).all() and (spread > 0).all()):
        raise ValueError("predicted must be finite, and scale finite and above 0")
    coverage = _between("coverage", coverage, 0.0, 1.0)
    rate = _between("rate", rate, -1e-300, 1.0)
    horizon = validation.integer("horizon", horizon)
    window = validation.integer("window", window, minimum=FEWEST)
    return _made(happened, centre, spread, coverage, horizon, window, rate)


def _made(
    outcome: F64,
    predicted: F64,
    scale: F64,
    coverage: float,
    horizon: int,
    window: int,
    rate: float,
) -> Intervals:
    count = len(outcome)
    errors = abs(outcome - predicted) / scale
    half, aims = np.full(count, np.nan), np.full(count, np.nan)
    ranked: list[float] = []
    recent: deque[float] = deque()
    aim = coverage
    for now in range(count):
        known = now - horizon
        if known >= 0 and math.isfinite(errors[known]):
            error = float(errors[known])
            if math.isfinite(half[known]):
                aim += rate * ((error > half[known]) - (1 - coverage))
            bisect.insort(ranked, error)
            recent.append(error)
            if len(recent) > window:
                del ranked[bisect.bisect_left(ranked, recent.popleft())]
        if len(ranked) >= FEWEST:
            aims[now] = aim
            place = math.ceil(aim * (len(ranked) + 1)) - 1
            half[now] = ranked[min(max(place, 0), len(ranked) - 1)]
    half *= scale
    return Intervals(predicted - half, predicted + half, outcome, scale, coverage, aims)


def _between(name: str, value: float, low: float, high: float) -> float:
    value = float(value)
    if not low < value < high:
        raise ValueError(f"{name} must be between {max(low, 0):g} and {high:g}, got {value:g}")
    return value
