"""From prices to the queries, keys and values of one causal attention call.

Notation: p[t] are the prices, r[t] = log(p[t] / p[t-1]) the returns.  The window "at t" is made
of r[t-window+1] ... r[t].  What follows it, log(p[t+horizon] / p[t]), is known at t + horizon.
So row i of the sequence, at time t = index[i], holds the window at t as its query and the window
at t - horizon, with what followed it, as its key and value: every causal prefix of the sequence
contains what was known at that time, and no more.  All statistics below are of the window itself
or of the returns up to its end.

`ReturnStream` and `VolatilityStream` make the same windows one return at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

QUIET = 0.1  # a window, or a return, below this part of the long-run size counts as that


@dataclass(frozen=True, eq=False)
class Windows:
    """The sequence that attention runs over; row i belongs to the price ``index[i]``.

    Parameters
    ----------
    index : ndarray, shape (L,), intp
        Position of the price at which the query's window ends.
    queries, keys : ndarray, shape (L, d), float32
        The window that ends at ``index``, and the one that ends `horizon` prices earlier.
    values : ndarray, shape (L, columns), float32
        What followed the key's window: its size in units of the window's own, the square of
        that, and indicators (up and down; or larger than the mean so far).
    unit, key_unit : ndarray, shape (L,), float64
        The query's unit, which turns attention's output into log returns, and the key's.
    known, outcome : ndarray, shape (L,), float64
        What followed the key's window and the query's, in log returns; the last `horizon`
        outcomes are not known yet (NaN).
    scale : float
        The default scale of attention: see `return_windows` and `volatility_windows`.
    """

    index: npt.NDArray[np.intp]
    queries: F32
    keys: F32
    values: F32
    unit: F64
    key_unit: F64
    known: F64
    outcome: F64
    scale: float

    def __len__(self) -> int:
        """Length of the sequence."""
        return len(self.index)


def return_windows(log_prices: F64, window: int, horizon: int) -> Windows:
    """Windows of returns divided by their own root mean square, which leaves their pattern.

    Every query and key then has squared length `window`, and the default scale 1 / window makes
    |x|² = 1 after scaling, whatever the data: s = |x + y|² is 2 in the mean and 4 at most.
    What followed a window is measured in units of the window's root mean square as well, so
    that a quiet year and a wild one can be averaged.  A window that is quieter than a tenth of
    the long run is divided by that tenth instead.
    """
    returns = np.diff(log_prices)
    long_run = np.sqrt(_expanding_mean(returns**2))
    windows = np.lib.stride_tricks.sliding_window_view(returns, window)
    size = np.sqrt(np.einsum("ij,ij->i", windows, windows) / window)
    unit = np.maximum(size, QUIET * long_run[window - 1 :])
    start = int(np.argmax(unit > 0))  # before the first move there is no unit
    windows, unit = windows[start:], unit[start:]
    vectors = np.empty(windows.shape, dtype=np.float32)
    np.divide(windows, unit[:, None], out=vectors, casting="same_kind")

    index = np.arange(window + start, len(log_prices))
    moves = _moves(log_prices, horizon)
    known = moves[index[:-horizon]]
    relative = known / unit[:-horizon]
    values = np.stack([relative, relative**2, known > 0, known < 0], axis=1)
    return _rows(vectors, values, unit, index, moves, horizon, 1.0 / window)


def volatility_windows(log_prices: F64, window: int, horizon: int) -> Windows:
    """Windows of log absolute returns, seen through their means over the last 1, 2, 4, ... steps.

    The logarithms are standardised by their mean and standard deviation up to that time, so the
    windows keep their scale: a wild one stays far from a quiet one.  A return smaller than a
    tenth of the mean absolute return so far, zero above all, counts as that tenth.  The means
    over the last 1, 2, 4, ..., `window` steps (as in the HAR model of Corsi 2009) spend the
    length of the vector on the level, not on the noise of single steps; tanh bounds each by 1,
    so one crash cannot push a pair out of the good regime.  The default scale, 4 over their
    number, bounds |x|² by 4, which leaves about 1 in the mean.
    """
    size = np.abs(np.diff(log_prices))
    mean = _expanding_mean(size)
    first = int(np.argmax(size > 0))
    level = np.zeros(len(size))
    level[first:] = _standardised(np.log(np.maximum(size[first:], QUIET * mean[first:])))
    spans = _spans(window)
    total = np.concatenate([[0.0], np.cumsum(level)])
    ends = np.arange(max(window, first + 1), len(log_prices))
    vectors = np.empty((len(ends), len(spans)), dtype=np.float32)
    for column, span in enumerate(spans):
        vectors[:, column] = np.tanh((total[ends] - total[ends - span]) / span)

    moves = np.abs(_moves(log_prices, horizon))
    known = moves[ends[:-horizon]]
    values = np.stack([known, known**2, known > _expanding_mean(known)], axis=1)
    unit = np.ones(len(ends))
    return _rows(vectors, values, unit, ends, moves, horizon, 4.0 / len(spans))


class ReturnStream:
    """`return_windows`, one return at a time: running sums instead of sums so far."""

    columns = 4  # of a value

    def __init__(self, window: int) -> None:
        self.dim, self.scale = window, 1.0 / window
        self._recent = np.zeros(window)
        self._square = _RunningMean()

    def push(self, log_return: float) -> tuple[F32, float] | None:
        """Take a return; the window that ends with it and its unit, as soon as there is one."""
        _shift_in(self._recent, log_return)
        long_run = math.sqrt(self._square.add(log_return**2))
        size = math.sqrt(self._recent @ self._recent / self.dim)
        unit = max(size, QUIET * long_run)
        if self._square.count < self.dim or unit == 0:
            return None
        return (self._recent / unit).astype(np.float32), unit

    def value(self, move: float, unit: float) -> tuple[float, ...]:
        """Return the value of a window of that unit, from the move that followed it."""
        return move / unit, (move / unit) ** 2, move > 0, move < 0


class VolatilityStream:
    """`volatility_windows`, one return at a time."""

    columns = 3

    def __init__(self, window: int) -> None:
        self._spans = np.array(_spans(window))
        self.dim, self.scale = len(self._spans), 4.0 / len(self._spans)
        self._levels = np.zeros(window)
        self._size, self._log, self._move = _RunningMean(), _RunningMean(), _RunningMean()
        self._square = _RunningMean()

    def push(self, log_return: float) -> tuple[F32, float] | None:
        """Take a return; the window that ends with it and its unit 1, as soon as there is one."""
        size = abs(log_return)
        mean_size = self._size.add(size)
        if mean_size == 0:
            return None
        log = math.log(max(size, QUIET * mean_size))
        mean, square = self._log.add(log), self._square.add(log**2)
        variance = _steadied(max(square - mean**2, 0.0), self._log.count)
        _shift_in(self._levels, (log - mean) / math.sqrt(variance))
        if self._size.count < len(self._levels):
            return None
        sums = np.cumsum(self._levels[::-1])[self._spans - 1]
        return np.tanh(sums / self._spans).astype(np.float32), 1.0

    def value(self, move: float, unit: float) -> tuple[float, ...]:
        """Return the value of a window, from the move that followed it."""
        move = abs(move) / unit
        return move, move**2, move > self._move.add(move)


class _RunningMean:
    """Mean of all values so far."""

    def __init__(self) -> None:
        self.count = 0
        self._total = 0.0

    def add(self, value: float) -> float:
        self.count += 1
        self._total += value
        return self._total / self.count


def _shift_in(recent: F64, value: float) -> None:
    recent[:-1] = recent[1:]
    recent[-1] = value


def _spans(window: int) -> list[int]:
    return [2**i for i in range(math.ceil(math.log2(window)))] + [window]


def _rows(
    vectors: F32,
    values: F64,
    unit: F64,
    index: npt.NDArray[np.intp],
    moves: F64,
    horizon: int,
    scale: float,
) -> Windows:
    return Windows(
        index=index[horizon:],
        queries=vectors[horizon:],
        keys=vectors[:-horizon],
        values=values.astype(np.float32),
        unit=unit[horizon:],
        key_unit=unit[:-horizon],
        known=moves[index[:-horizon]],
        outcome=moves[index[horizon:]],
        scale=scale,
    )


def _moves(log_prices: F64, horizon: int) -> F64:
    """Log return over the next `horizon` steps, NaN where it is not known yet."""
    moves = np.full(len(log_prices), np.nan)
    moves[:-horizon] = log_prices[horizon:] - log_prices[:-horizon]
    return moves


def _expanding_mean(values: F64) -> F64:
    """Mean of all values so far, at each of them."""
    return np.asarray(np.cumsum(values) / np.arange(1, len(values) + 1))


def _standardised(values: F64) -> F64:
    """Values less their mean so far, over their standard deviation so far."""
    count = np.arange(1, len(values) + 1)
    mean = np.cumsum(values) / count
    variance = np.maximum(np.cumsum(values**2) / count - mean**2, 0.0)
    return np.asarray((values - mean) / np.sqrt(_steadied(variance, count)))


def _steadied(variance: Any, count: Any) -> Any:
    """Sixteen imaginary values with the variance of log |N(0, 1)|, π²/8, steady the beginning."""
    return (count * variance + 16 * math.pi**2 / 8) / (count + 16)
