"""What a forecaster looks at: averages of the past of a series, and what else is known of a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from favor_np import validation

from ._calendar import DAY, HOUR
from ._prices import Prices
from ._windows import F64

FLOOR = 0.01  # a smaller square, of the mean square, counts as that: a tenth of the usual return
RANGES = (0.0, 0.8, 0.94, 0.99)  # decays of what is averaged of ranges within steps
SCALE_DECAY = 0.97  # of the volatility that returns are divided by
#: Changes that a column needs to tell anything: an hour, or a weekday, was seen twenty times then.
CHANGES = 40
WIDEST = 4.0  # a return of more standard deviations counts as that


def inputs(
    prices: Prices | npt.ArrayLike,
    *,
    open: npt.ArrayLike | None = None,
    high: npt.ArrayLike | None = None,
    low: npt.ArrayLike | None = None,
    volume: npt.ArrayLike | None = None,
) -> F64:
    """Return what is known of each step of a series, as `PerformerForecaster` takes it.

    Parameters
    ----------
    prices : Prices or array_like, shape (n,)
        Closing prices.  `Prices` with times add seven columns of weekdays, if they are daily or
        closer, and 24 of hours, if they are closer.
    open, high, low : array_like, shape (n,), optional
        The other prices of each step, all three or none: they tell its volatility better than the
        close alone (Garman and Klass 1980), and are averaged with several decays.
    volume : array_like, shape (n,), optional
        What was traded, compared with its average so far.

    Returns
    -------
    ndarray, shape (n - 1, columns)
        Log returns in percent, then the others.  A row knows nothing of later ones.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or shape, or its values cannot be.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.forecast import inputs, read_prices
    >>> inputs([1.0, 2.0, 4.0, 2.0]).round(2)[:, 0]
    array([ 69.31,  69.31, -69.31])
    >>> inputs(read_prices()).shape  # the return and seven weekdays
    (10224, 8)
    """
    if not isinstance(prices, Prices):
        prices = Prices.from_array(prices)
    columns = [100 * np.diff(np.log(prices.values))]
    if open is not None and high is not None and low is not None:
        others = (("open", open), ("high", high), ("low", low))
        columns += _ranges(prices.values, *(_like(prices, *each) for each in others))
    elif not (open is high is low):
        raise ValueError("open, high and low must be given together")
    if volume is not None:
        columns.append(_volume(_like(prices, "volume", volume)))
    return np.stack(columns + _calendar(prices), axis=1)


def _like(prices: Prices, name: str, values: npt.ArrayLike) -> F64:
    array = np.asarray(values, np.float64)
    if array.shape != prices.values.shape:
        raise ValueError(f"{name} must be as long as prices, {len(prices)}, got {array.shape}")
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"{name} must be finite and not below 0")
    return array


def _ranges(close: F64, first: F64, high: F64, low: F64) -> list[F64]:
    """Logarithms of averages of the variance within steps."""
    if (
        not (low > 0).all()
        or not ((low <= np.minimum(first, close)) & (high >= np.maximum(first, close))).all()
    ):
        raise ValueError("low and high must be above 0, with open and close between them")
    within = np.log(high / low) ** 2 / 2 - (2 * np.log(2) - 1) * np.log(close / first) ** 2
    variance = 1e4 * np.maximum(within, 0)
    floor = FLOOR * np.cumsum(variance) / np.arange(1, len(variance) + 1)
    floor = np.maximum(floor, np.finfo(np.float64).tiny)
    return [np.log(np.maximum(average(variance, g), floor))[1:] for g in RANGES]


def _volume(volume: F64) -> F64:
    """Logarithm of what was traded over its average so far."""
    usual = average(volume, SCALE_DECAY)
    floor = FLOOR * usual + np.finfo(np.float64).tiny
    return np.asarray(np.log(np.maximum(volume, floor) / np.maximum(usual, floor)))[1:]


def _calendar(prices: Prices) -> list[F64]:
    """A column of zeros and ones for each weekday, and of a series within days for each hour."""
    if prices.times is None:
        return []
    seconds = (prices.times - np.datetime64(0, "s")) / np.timedelta64(1, "s")
    step = float(np.median(np.diff(seconds)))
    places = [((seconds // DAY + 3) % 7, 7 if step < 1.5 * DAY else 0)]
    places.append((seconds % DAY // HOUR, 24 if step < 0.75 * DAY else 0))
    return [
        (values[1:] == each).astype(np.float64) for values, count in places for each in range(count)
    ]


def average(values: F64, decay: float) -> F64:
    """Mean of all values so far, each weighted `decay` times as much as the next.

    That is what attention with this decay reads if all keys are alike.
    """
    from scipy.signal import lfilter

    weights = 1 - decay ** np.arange(1, len(values) + 1)
    return np.asarray(lfilter([1 - decay], [1, -decay], values, axis=0) / weights)


def mean_squares(returns: F64, spans: tuple[int, ...]) -> F64:
    """Mean squares of the last returns, a column a span; the first rows have shorter means."""
    total = np.concatenate([[0.0], np.cumsum(returns**2)])
    ends = np.arange(1, len(total))
    begins = [np.maximum(ends - span, 0) for span in spans]
    return np.stack([(total[ends] - total[begin]) / (ends - begin) for begin in begins], axis=1)


@dataclass
class Memory:
    """Columns that a forecast is made from: each row has averages of the rows up to it.

    Logarithms of mean squares: exponentially weighted, and of the last few returns (as HAR); means
    of returns over their volatility, which tell whether prices fell; and what else is in X.
    """

    decays: tuple[float, ...]
    spans: tuple[int, ...]
    signed: tuple[float, ...]

    def __post_init__(self) -> None:
        for decay in (*self.decays, *self.signed):
            if not 0 <= decay < 1:
                raise ValueError(f"decays must be from 0 to below 1, got {decay}")
        for span in self.spans:
            validation.integer("spans", span)
        if not self.decays and not self.spans:
            raise ValueError("decays or spans must hold at least one number, got none")

    @property
    def own(self) -> int:
        """Columns that are made of returns."""
        return len(self.decays) + len(self.spans) + len(self.signed)

    def fit(self, rows: F64) -> Memory:
        """Take from known rows what no later one changes: units, centres, spreads."""
        mean = float(np.mean(rows[-2000:, 0] ** 2))
        if not mean > 0:
            raise ValueError("the returns never vary: no volatility can be fitted")
        self.floor_ = FLOOR * mean
        made = self._columns(rows)
        self.centre_, spread = made.mean(0), made.std(0)
        tells = spread > 1e-9 * (1 + abs(self.centre_))
        tells[self.own :] &= np.count_nonzero(np.diff(rows[:, 1:], axis=0), axis=0) >= CHANGES
        self.spread_ = np.where(tells, spread, np.inf)
        return self

    def columns(self, rows: F64) -> F64:
        """Return the columns of rows, standardised."""
        found: F64 = (self._columns(rows) - self.centre_) / self.spread_
        return found

    def _columns(self, rows: F64) -> F64:
        returns = rows[:, 0]
        squares = returns**2
        sizes = [average(squares, decay) for decay in self.decays]
        sizes += list(mean_squares(returns, self.spans).T) if self.spans else []
        scale = np.sqrt(np.maximum(average(squares, SCALE_DECAY), self.floor_))
        relative = np.clip(returns / scale, -WIDEST, WIDEST)
        signs = [average(relative, decay) for decay in self.signed]
        logs = [np.log(np.maximum(size, self.floor_)) for size in sizes]
        return np.column_stack([*logs, *signs, rows[:, 1:]])
