"""What forecasts would have earned: positions, costs, and how sure a Sharpe ratio is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ._windows import F64

CONSTANT = 1e-3  # returns that vary by less than this part of their mean do so by rounding
DECAY = 0.94  # of exponentially weighted averages (RiskMetrics 1996, daily)
LARGEST, BAND = 2.0, 0.1  # position by volatility, and by how much it may be off


@dataclass(frozen=True, eq=False)
class Trading:
    """What a way of trading earned, with its costs.

    Parameters
    ----------
    equity : ndarray, shape (steps + 1,), float64
        Worth of 1, step by step.
    turnover : float
        Sum of all changes of position, in positions.
    trades : int
        Number of changes.
    sharpe, sharpe_error : float
        Mean over standard deviation of a step's return, times the root of the steps of a year,
        and its standard error, with the skewness and the fat tails of returns (Mertens 2002); NaN
        where the returns are constant, as without a single trade.
    """

    equity: F64 = field(repr=False)
    turnover: float
    trades: int
    sharpe: float
    sharpe_error: float

    @property
    def gain(self) -> float:
        """Growth of the whole, as a part of what was put in."""
        return float(self.equity[-1]) - 1


def trade(steps: F64, position: F64, cost: float, per_year: float) -> Trading:
    """Hold `position` over each of some steps, at a cost of every change."""
    changes = np.abs(np.diff(position, prepend=0.0))
    equity = np.cumprod(np.append(1.0, np.maximum(1 + position * steps - cost * changes, 0.0)))
    alive = equity[:-1] > 0  # who has lost all stays at 0
    sharpe, error = sharpe_ratio(equity[1:][alive] / equity[:-1][alive] - 1)
    year = math.sqrt(per_year)
    trades = int(np.count_nonzero(changes))
    return Trading(equity, float(changes.sum()), trades, year * sharpe, year * error)


def sharpe_ratio(returns: F64) -> tuple[float, float]:
    """Mean over standard deviation, and the standard error of that."""
    mean, spread = (float(np.mean(returns)), float(np.std(returns))) if len(returns) else (0.0, 0.0)
    if spread <= CONSTANT * abs(mean):
        return math.nan, math.nan
    ratio, z = mean / spread, (returns - mean) / spread
    skewness, kurtosis = float(np.mean(z**3)), float(np.mean(z**4))
    variance = 1 - skewness * ratio + (kurtosis - 1) / 4 * ratio**2
    return ratio, math.sqrt(max(variance, 0.0) / len(returns))


def mean_of_signals(signals: npt.NDArray[np.int8], horizon: int) -> F64:
    """Position at each step: the mean of the last `horizon` signals, 0 for any before the first."""
    total = np.concatenate([[0], np.cumsum(signals, dtype=np.int64)])
    first = np.maximum(np.arange(len(signals)) + 1 - horizon, 0)
    return np.asarray((total[1:] - total[first]) / horizon)


def steady_position(returns: F64, start: int) -> F64:
    """Position of equal risk from step `start` on: mean volatility so far over the present one.

    It is at most 2, and changed where it is off by a tenth.  That of step t knows ``returns[:t]``.
    """
    average, total, held = 0.0, 0.0, 0.0
    positions = []
    for count, square in enumerate((returns**2).tolist()):
        if count >= start:
            wanted = min(math.sqrt(total / count / average), LARGEST) if average > 0 else 1.0
            if abs(wanted - held) > BAND * held:
                held = wanted
            positions.append(held)
        average = square if count == 0 else DECAY * average + (1 - DECAY) * square
        total += square
    return np.array(positions)
