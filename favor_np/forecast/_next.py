"""The forecast that is still open, in detail: what it rests on, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._prices import Prices
from ._windows import F64, Windows


@dataclass(frozen=True)
class Precedent:
    """A past window and what followed it: ``move`` is a log return (absolute for volatility)."""

    time: str
    weight: float
    move: float


@dataclass(frozen=True)
class NextStep:
    """The forecast that is still open, made at the last price; moves are log returns.

    Parameters
    ----------
    time : str
        When it was made.
    price : float
        The last price.
    move : float
        Predicted log return over the horizon (absolute for target "volatility").
    spread : float
        Standard deviation of what followed in the past, with the weights of attention.
    chance : float
        Probability of an up move; for "volatility" of one larger than the mean so far.
    chance_down : float
        Probability of a down move (NaN for "volatility").
    exact : float
        `move` by exact attention.
    standard_error : float
        Standard error of `exact`, if single returns are uncorrelated (for "volatility": if what
        followed is correlated only where it overlaps).  Infinite where one window decides alone.
    precedents : float
        Effective number of past windows in the mean: as many with equal weights, none
        overlapping another in what followed them, would know as much.
    similar : tuple of Precedent
        The past windows with the largest weights, none overlapping another by more than half.
    """

    time: str
    price: float
    move: float
    spread: float
    chance: float
    chance_down: float
    exact: float
    standard_error: float
    precedents: float
    similar: tuple[Precedent, ...]


def last_row(
    prices: Prices, windows: Windows, target: str, scale: float, window: int, horizon: int
) -> dict[str, Any]:
    """What exact attention says of the last row: one row costs next to nothing."""
    logits = scale * (windows.keys @ windows.queries[-1]).astype(np.float64)
    weights = np.exp(np.maximum(logits - logits.max(), -700))
    weights /= weights.sum()
    moves = windows.values[:, 0].astype(np.float64) * windows.unit[-1]
    exact = float(weights @ moves)
    if target == "return":
        steps = np.diff(np.log(prices.values))[windows.index[0] - horizon :]
        ratio = windows.unit[-1] / windows.key_unit
        error, precedents = error_of_mean_return(weights, ratio, steps, horizon)
    else:
        error, precedents = error_of_mean_size(weights, moves, horizon)
    similar: list[int] = []
    for row in np.argsort(-weights, kind="stable"):
        if all(abs(row - other) >= (window + 1) // 2 for other in similar):
            similar.append(int(row))
        if len(similar) == 3:
            break
    ends = windows.index - horizon
    return {
        "exact": exact,
        "standard_error": error,
        "precedents": precedents,
        "similar": tuple(
            Precedent(prices.time_label(int(ends[i])), float(weights[i]), float(windows.known[i]))
            for i in similar
        ),
    }


def error_of_mean_return(weights: F64, ratio: F64, steps: F64, horizon: int) -> tuple[float, float]:
    """Standard error of a weighted mean of moves over `horizon` steps, and its effective number.

    Move j is ``ratio[j] * steps[j : j + horizon].sum()``.  Moves that overlap share steps, so their
    mean is written as a sum over steps, each with the weights of all moves that contain it.  If
    steps are uncorrelated, the squares of these terms, less their mean, add up to its variance:
    all covariances of moves up to lag ``horizon - 1``, without one that has to be cut off or
    could make it negative (Hodrick 1992, Review of Financial Studies 5, standard errors 1B).
    """
    share = _moving_sum(weights, horizon) / horizon  # sums to 1
    terms = _moving_sum(weights * ratio, horizon) * steps
    terms -= terms.sum() * share
    square = share @ share
    fitted = 1 + square - 2 * (share**3).sum() / square
    return _error(float(terms @ terms), float(fitted)), float(1 / (horizon * square))


def error_of_mean_size(weights: F64, sizes: F64, horizon: int) -> tuple[float, float]:
    """Return the same for absolute moves, which are no sums over steps.

    Two moves that share all but `lag` of their steps correlate by r = 1 - lag / horizon, and their
    sizes by (r asin r + sqrt(1 - r²) - 1) / (π/2 - 1), if they are Gaussian.
    """
    r = 1 - abs(np.arange(1 - horizon, horizon)) / horizon
    correlation = (r * np.arcsin(r) + np.sqrt(1 - r**2) - 1) / (math.pi / 2 - 1)
    beside = np.convolve(weights, correlation)[horizon - 1 : horizon - 1 + len(weights)]
    overlap, square = weights @ beside, weights @ weights
    residuals = weights * (sizes - weights @ sizes)
    fitted = float(1 + overlap - 2 * weights**2 @ beside / square)
    variance = float((residuals @ residuals) * overlap / square)
    return _error(variance, fitted), float(1 / overlap)


def _moving_sum(values: F64, count: int) -> F64:
    """Sums of up to `count` neighbours, from the first alone to the last alone."""
    total = np.cumsum(np.concatenate([values, np.zeros(count - 1)]))
    total[count:] -= total[:-count].copy()
    return total


def _error(variance: float, fitted: float) -> float:
    """Root of a variance that was found beside a fitted mean, which makes it too small."""
    return math.sqrt(variance / fitted) if fitted > 1e-9 else math.inf
