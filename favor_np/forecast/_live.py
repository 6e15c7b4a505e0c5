"""The same forecasts one price at a time, as they arrive: `forecast` for a live feed."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.guard import Guard

from ._evaluate import DEFAULT_COST, Signals, non_negative
from ._forecast import Forecast, Progress, checked, predictions
from ._maps import PREFIX, calibrated, plain_map
from ._windows import F32, F64, ReturnStream, VolatilityStream


@dataclass(frozen=True)
class Tick:
    """The forecast made at one price; the fields are those of `NextStep`.

    Parameters
    ----------
    price : float
        The price.
    move, spread : float
        Predicted log return over the horizon (absolute for target "volatility"), and the
        standard deviation of what it is the mean of.
    chance, chance_down : float
        Probabilities of an up and a down move; for "volatility" of a move larger than the mean
        so far, and NaN.
    signal : int
        1 BUY, -1 SELL, 0 HOLD; always 0 for "volatility", which has no direction.
    """

    price: float
    move: float
    spread: float
    chance: float
    chance_down: float
    signal: int


class LiveForecast:
    """Forecasts of a live series: every price in O(1) time and memory, however many came before.

    What `forecast` computes from a whole series, within rounding: it uses nothing that was not
    known at the time, and what it knows of the past is a state of fixed size.  A history is
    given like the feed, price after price.

    Threads may share one: prices are taken one after the other.  An interrupted `push` spoils it.

    Parameters
    ----------
    target, window, horizon, num_features, calibration, scale, seed
        As `forecast`.  The map is calibrated once, between the 256th forecast and the next: see
        `calibrate`.
    threshold : float, default 2e-4
        A predicted log return above it is a BUY, below its negative a SELL.

    Attributes
    ----------
    state : AttentionState
        All windows whose outcome is known, folded.

    Raises
    ------
    TypeError, ValueError
        If an option is of the wrong type or out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.forecast import LiveForecast, forecast
    >>> prices = 100 + np.sin(np.arange(400) / 2)
    >>> live = LiveForecast(window=4)
    >>> ticks = [live.push(price) for price in prices]
    >>> batch = forecast(prices, window=4)
    >>> bool(np.isclose(ticks[-1].move, batch.next.move, rtol=1e-4))
    True
    """

    @validation.own_error_state
    def __init__(
        self,
        *,
        target: str = "return",
        window: int = 32,
        horizon: int = 1,
        num_features: int = 1024,
        calibration: str = "auto",
        scale: float | None = None,
        seed: int = 0,
        threshold: float = DEFAULT_COST,
    ) -> None:
        from favor_np.state import AttentionState

        window, horizon, num_features, scale, seed = checked(
            target, window, horizon, num_features, calibration, scale, seed
        )
        self._threshold = non_negative("threshold", threshold)
        self._stream = (ReturnStream if target == "return" else VolatilityStream)(window)
        dim, columns = self._stream.dim, self._stream.columns
        scale = self._stream.scale if scale is None else scale
        fm = plain_map(dim, num_features, scale, seed)
        self.state = AttentionState.zeros(fm, columns)
        self.state.copy().step(np.zeros(dim), np.zeros(dim), np.zeros(columns))  # compiles
        self._calibration = calibration
        # Queries, keys and values that the map will be calibrated on, then None.
        self._prefix: list[tuple[F32, F32, tuple[float, ...]]] | None = []
        if calibration == "none":
            self._prefix = None
        self._horizon = horizon
        self._log_price: float | None = None
        # Vector, unit and log price of the newest windows: the oldest is the next key.
        self._windows: deque[tuple[F32, float, float]] = deque(maxlen=horizon + 1)
        self._guard = Guard("LiveForecast")

    @validation.own_error_state
    def push(self, price: float) -> Tick | None:
        """Take the next price, and forecast what follows it.

        Parameters
        ----------
        price : float
            Finite and greater than 0.

        Returns
        -------
        Tick or None
            None until a first window has an outcome: `window` + `horizon` returns, and those
            before the first move.

        Raises
        ------
        TypeError, ValueError
            If `price` is no usable price; nothing is changed then.
        RuntimeError
            If a `push` was interrupted before.
        """
        return self._guard.change(self._push, validation.positive_float("price", price))

    @validation.own_error_state
    def calibrate(self) -> bool:
        """Calibrate the map now, if that is due: a call between prices, while nobody waits.

        It is due once, after the 256th forecast, and takes about 0.1 s of processor time for 1,024
        features and 0.3 s for 4,096; several times that where threads of BLAS contend for busy
        processors.  If it was not called in time, the next `push` does it first, and takes as
        long.  A feed that begins with over 256 + `window` + `horizon` prices of history has it
        behind.

        Returns
        -------
        bool
            Whether anything was done; calling it after every price costs nothing.

        Examples
        --------
        >>> from favor_np.forecast import LiveForecast, read_prices
        >>> live, done = LiveForecast(), []
        >>> for number, price in enumerate(read_prices().values[:400]):
        ...     tick = live.push(price)                          # quick, every time
        ...     if live.calibrate():
        ...         done.append(number)
        >>> done
        [288]
        """
        return self._guard.change(lambda _: self._calibrate(), None)

    def _push(self, price: float) -> Tick | None:
        self._calibrate()
        before, now = self._log_price, math.log(price)
        self._log_price = now
        window = None if before is None else self._stream.push(now - before)
        if window is None:
            return None
        query, unit = window
        self._windows.append((query, unit, now))
        if len(self._windows) <= self._horizon:
            return None
        key, key_unit, then = self._windows[0]
        value = self._stream.value(now - then, key_unit)
        out = self.state.step(query, key, value)
        if self._prefix is not None:
            self._prefix.append((query, key, value))
        move, spread, chance, chance_down = map(float, predictions(out, unit))
        signal = (move > self._threshold) - (move < -self._threshold)
        if math.isnan(chance_down):
            signal = 0
        return Tick(price, move, spread, chance, chance_down, signal)

    def __getstate__(self) -> dict[str, Any]:
        """Return a deep copy of all that is not this object's own guard."""
        return self._guard.read(lambda: copy.deepcopy(vars(self)))

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, of this version or of one without guards."""
        vars(self).update({"_guard": Guard("LiveForecast")} | kept)

    def _calibrate(self) -> bool:
        """If it is due, fit the map to the first windows and fold these anew."""
        if self._prefix is None or len(self._prefix) < PREFIX:
            return False
        queries, keys, values = (np.array(x, np.float32) for x in zip(*self._prefix, strict=True))
        fm = calibrated(self.state.feature_map, queries, keys, self._calibration)
        self.state = type(self.state).zeros(fm, self.state.value_dim)
        self.state.update(keys, values)
        self._prefix = None
        return True


@dataclass(frozen=True, eq=False)
class Replay:
    """A series that was replayed price by price, beside the batch forecast of the whole.

    Parameters
    ----------
    predicted : ndarray, shape (L,), float64
        The live forecasts.
    signals : ndarray, shape (L,), int8
        Their signals.
    difference : float
        Largest difference from the batch forecasts, relative to the largest of those.
    seconds : ndarray, shape (L,), float64
        How long each forecast took, from the price to the signal.
    state_bytes : int
        Size of the attention state: the same before the first price and after the last.
    calibration_seconds : float
        How long the map's calibration took, between two prices: no part of `seconds`.
    """

    predicted: F64
    signals: Signals
    difference: float
    seconds: F64
    state_bytes: int
    calibration_seconds: float = 0.0

    def histogram(self) -> tuple[F64, npt.NDArray[np.intp]]:
        """Count the forecasts by their time, in about ten steps up to the 99th percentile.

        Returns
        -------
        edges : ndarray, shape (n,), float64
            Where each step begins, in seconds; the last has all that took longer.
        counts : ndarray, shape (n,), intp
            Forecasts in each.
        """
        low, high = np.percentile(self.seconds, (0, 99))
        least = max(high - low, 1e-9) / 10
        power = 10.0 ** math.floor(math.log10(least))
        step = power * min(factor for factor in (1, 2, 5, 10) if factor * power >= least)
        edges = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
        bins = np.searchsorted(edges, self.seconds, "right") - 1
        return edges, np.bincount(np.maximum(bins, 0), minlength=len(edges))


@validation.own_error_state
def replay(
    result: Forecast, *, threshold: float = DEFAULT_COST, progress: Progress | None = None
) -> Replay:
    """Feed the prices of a forecast to a `LiveForecast`, one by one, and time each.

    Parameters
    ----------
    result : Forecast
        From `forecast`: the series, the settings, and what to compare with.
    threshold : float, default 2e-4
        As `LiveForecast`.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Replay

    Raises
    ------
    TypeError, ValueError
        If `threshold` is not a finite number from 0.

    Examples
    --------
    >>> from favor_np.forecast import forecast, read_prices, replay
    >>> record = replay(forecast(read_prices(), num_features=64))
    >>> record.difference < 1e-5
    True
    """
    live = LiveForecast(
        target=result.target,
        window=result.window,
        horizon=result.horizon,
        num_features=result.num_features,
        calibration=result.calibration,
        scale=result.scale,
        seed=result.seed,
        threshold=threshold,
    )
    ticks, seconds, calibration = [], [], 0.0
    prices = result.prices.values.tolist()
    for done, price in enumerate(prices, start=1):
        start = time.perf_counter()
        tick = live.push(price)
        stop = time.perf_counter()
        if tick is not None:
            ticks.append(tick)
            seconds.append(stop - start)
        start = time.perf_counter()
        if live.calibrate():
            calibration = time.perf_counter() - start
        if progress is not None and (done % 1024 == 0 or done == len(prices)):
            progress("replay", done, len(prices))
    predicted = np.array([tick.move for tick in ticks])
    largest = float(abs(result.predicted).max()) or 1.0
    return Replay(
        predicted=predicted,
        signals=np.array([tick.signal for tick in ticks], np.int8),
        difference=float(abs(predicted - result.predicted).max()) / largest,
        seconds=np.array(seconds),
        state_bytes=live.state.nbytes,
        calibration_seconds=calibration,
    )
