"""The forecast itself: one causal attention call over the whole history."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.progress import Progress, reporting, silent

from ._maps import Section, plain_map, sections
from ._next import NextStep, last_row
from ._prices import PriceError, Prices
from ._setting import Setting
from ._windows import F32, F64, Windows, return_windows, volatility_windows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ._compare import ExactComparison
    from ._error_bars import ErrorBars
    from ._evaluate import ReturnEvaluation, VolatilityEvaluation
    from ._live import Replay

GOOD_REGIME = 4.0  # mean of s = |x + y|² up to which the estimator is good
SLICE = 16_384  # rows a call: fixed, so that a progress bar cannot change a result
FEWEST_FORECASTS = 16


@dataclass(frozen=True, eq=False, repr=False)
class Forecast:
    """Every forecast that could have been made, each from its own past only.

    Parameters
    ----------
    prices : Prices
        The series.
    target : {"return", "volatility"}
        What is predicted.
    window, horizon, num_features, seed : int
        The settings.
    scale : float
        Scale of attention: weights are softmax(scale q.k).
    index : ndarray, shape (L,), intp
        Position of the price at which each forecast was made; the last is that of the last
        price, and its outcome is not known.
    predicted : ndarray, shape (L,), float64
        Log return over the horizon, or its absolute value.
    spread : ndarray, shape (L,), float64
        Standard deviation of the outcomes that `predicted` is the mean of.
    chance, chance_down : ndarray, shape (L,), float64
        Probabilities: see `NextStep`.
    outcome : ndarray, shape (L,), float64
        What happened; NaN for the last `horizon`.
    calibration : str
        How the map was fitted to the first windows: see `forecast`.
    sections : tuple of Section
        ``(start, stop, feature_map)``: the map of which rows.
    mean_s : float
        Mean of ``s = |x + y|²`` over queries and keys: a plain map is good up to about 4.
    next : NextStep
        The forecast made at the last price, in detail.
    windows : Windows
        The sequence that attention ran over.
    """

    prices: Prices
    target: str
    window: int
    horizon: int
    num_features: int
    seed: int
    scale: float
    index: npt.NDArray[np.intp]
    predicted: F64
    spread: F64
    chance: F64
    chance_down: F64
    outcome: F64
    calibration: str
    sections: tuple[Section, ...]
    mean_s: float
    next: NextStep
    windows: Windows

    def __repr__(self) -> str:
        """One line: what was predicted, from what."""
        return (
            f"<Forecast of {self.target}: {len(self):,} windows of {self.window}, "
            f"horizon {self.horizon}, next {self.next.move:+.3g} at {self.next.price:g}>"
        )

    def __len__(self) -> int:
        """Number of forecasts."""
        return len(self.index)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `forecast` that make it again; `LiveForecast` takes them too."""
        return {name: getattr(self, name) for name in vars(Setting())}

    @property
    def warm_up(self) -> int:
        """Number of first forecasts that are not judged: 500, or a quarter of a short series."""
        return min(500, (len(self) - self.horizon) // 4)

    @property
    def weight_error(self) -> float:
        """Relative standard error of a single attention weight at s = `mean_s`, uncalibrated.

        Closed form for independent antithetic rows, sqrt(2 (cosh s - 1) / M); orthogonal rows
        do a little better, calibrated ones and the forecast, a mean of many weights, much better.
        """
        return math.sqrt(2 * (math.cosh(min(self.mean_s, 700)) - 1) / self.num_features)

    def plot(
        self,
        *,
        record: ReturnEvaluation | VolatilityEvaluation | None = None,
        exact: ExactComparison | None = None,
        bars: ErrorBars | None = None,
        replayed: Replay | None = None,
    ) -> Figure:
        """Draw the forecasts, their record, and FAVOR+ against exact attention.

        Parameters
        ----------
        record : ReturnEvaluation or VolatilityEvaluation, optional
            Default: `evaluate` finds it.
        exact : ExactComparison, optional
            Default: `compare_with_exact` finds it, which may take some ten seconds.
        bars : ErrorBars, optional
            Default: `error_bars` finds them.
        replayed : Replay, optional
            From `replay`: one more panel, with the time of a live forecast.

        Returns
        -------
        matplotlib.figure.Figure
            Ready for ``savefig``.

        Raises
        ------
        ImportError
            If matplotlib is not installed (``pip install 'favor_np[plot]'``).

        Examples
        --------
        >>> from favor_np.forecast import forecast, read_prices
        >>> figure = forecast(read_prices(), num_features=64).plot()
        >>> [axes.get_title("left") for axes in figure.axes[:2]]
        ['Price and signals', 'The last 90 prices and what had been forecast for them']
        """
        from ._plot import draw

        return draw(self, record, exact, bars, replayed)


@validation.own_error_state
def forecast(
    prices: Prices | npt.ArrayLike,
    *,
    target: str = Setting.target,
    window: int = Setting.window,
    horizon: int = Setting.horizon,
    num_features: int = Setting.num_features,
    calibration: str = Setting.calibration,
    scale: float | None = Setting.scale,
    seed: int = Setting.seed,
    num_threads: int | None = None,
    progress: bool | Progress | None = None,
) -> Forecast:
    """Predict every step of a price series from the steps before it, and the next one.

    The prediction at time t is a weighted mean of what followed each past window of returns,
    with the softmax attention weights between those windows and the present one: patterns that
    resemble the present count most.  Nothing is trained, and only windows whose outcome was
    known at t take part.

    Parameters
    ----------
    prices : Prices or array_like, shape (n,)
        The series, from `read_prices` or as numbers.
    target : {"return", "volatility"}
        Predict the next log return from windows scaled to root mean square 1, or the next
        absolute log return from windows of log absolute returns, which keep their scale.
    window : int
        Returns in a window.
    horizon : int
        Steps ahead.
    num_features : int
        Features M of the FAVOR+ map, an even number.
    calibration : str
        How the map is fitted to the first 256 windows, to be used from there on: "auto", "none",
        or a method of `FeatureMap.calibrate`.  A shorter series is forecast without.
    scale : float, optional
        Scale of attention.  Larger: fewer, more similar windows count.  Default: 1 / window
        ("return") so that ``|x|² = 1`` after scaling, 4 / number of spans ("volatility"), so that
        ``|x|² ≤ 4``: this keeps the estimator in its good regime.
    seed : int
        Seed of the random features.
    num_threads : int, optional
        Threads of the attention calls.
    progress : bool or callable, optional
        As `stream_attention`.

    Returns
    -------
    Forecast

    Raises
    ------
    PriceError
        If the series is too short for `window` and `horizon`.
    TypeError, ValueError
        If an option is of the wrong type or out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.forecast import forecast
    >>> prices = 100 + np.sin(np.arange(400) / 2)               # a series with a pattern
    >>> result = forecast(prices, window=4)
    >>> result
    <Forecast of return: 395 windows of 4, horizon 1, next ...>
    >>> known = result.outcome[result.warm_up : -1]
    >>> predicted = result.predicted[result.warm_up : -1]
    >>> bool(np.mean(np.sign(predicted) == np.sign(known)) > 0.8)
    True
    """
    reported = reporting(progress)
    if not isinstance(prices, Prices):
        prices = Prices.from_array(prices)
    setting = Setting(target, window, horizon, num_features, calibration, scale, seed)
    window, horizon, scale = setting.window, setting.horizon, setting.scale
    needed = window + 2 * horizon + FEWEST_FORECASTS
    if len(prices) < needed:
        raise PriceError(
            f"{prices.name}: {len(prices):,} usable prices are too few: a window of {window:,} and "
            f"a horizon of {horizon:,} need at least {needed:,}"
        )

    make = return_windows if target == "return" else volatility_windows
    logs = np.log(prices.values)
    still = PriceError(f"{prices.name}: the price hardly ever moves: too little to forecast from")
    if not np.ptp(logs):  # prices that differ may have the same logarithm
        raise still
    windows = make(logs, window, horizon)
    if len(windows) < horizon + FEWEST_FORECASTS:
        raise still
    scale = windows.scale if scale is None else scale
    fm = plain_map(windows.queries.shape[1], setting.num_features, scale, setting.seed)
    parts = sections(windows, fm, calibration)
    with reported as report:
        out = attend(windows, parts, len(windows), num_threads, report)
    predicted, spread, chance, chance_down = predictions(out, windows.unit)
    return Forecast(
        prices=prices,
        **asdict(replace(setting, scale=scale)),
        index=windows.index,
        predicted=predicted,
        spread=spread,
        chance=chance,
        chance_down=chance_down,
        outcome=windows.outcome,
        sections=parts,
        mean_s=_mean_s(windows, scale),
        next=NextStep(
            time=prices.time_label(-1),
            price=float(prices.values[-1]),
            move=float(predicted[-1]),
            spread=float(spread[-1]),
            chance=float(chance[-1]),
            chance_down=float(chance_down[-1]),
            **last_row(prices, windows, target, scale, window, horizon),
        ),
        windows=windows,
    )


def predictions(out: F32, unit: Any) -> tuple[F64, F64, F64, F64]:
    """Log return, its spread, and chances of up and down, from attention's rows (..., columns)."""
    mean, square = out[..., 0].astype(np.float64), out[..., 1].astype(np.float64)
    spread = np.sqrt(np.maximum(square - mean**2, 0.0)) * unit
    chances = np.clip(out[..., 2:].astype(np.float64), 0.0, 1.0)
    down = chances[..., 1] if chances.shape[-1] == 2 else np.full(mean.shape, np.nan)
    return mean * unit, spread, chances[..., 0], down


def attend(
    windows: Windows,
    parts: tuple[Section, ...],
    rows: int,
    num_threads: int | None = None,
    report: Progress = silent,
) -> F32:
    """Outputs of FAVOR+ for the first rows of the sequence."""
    from favor_np.attention import favor_attention
    from favor_np.state import AttentionState

    out = np.empty((rows, windows.values.shape[1]), dtype=np.float32)
    for first, last, known in parts:
        state = AttentionState.zeros(known, out.shape[1])
        state.update(windows.keys[:first], windows.values[:first])
        for start in range(first, min(last, rows), SLICE):
            part = slice(start, min(start + SLICE, last, rows))
            out[part], state = favor_attention(
                windows.queries[part],
                windows.keys[part],
                windows.values[part],
                known,
                causal=True,
                state=state,
                return_state=True,
                num_threads=num_threads,
            )
            report("FAVOR+ attention", part.stop, rows)
    return out


def _mean_s(windows: Windows, scale: float) -> float:
    """Mean of |x + y|² over all pairs: |x|² + |y|² + 2 x.y, each by its mean."""
    q, k = windows.queries, windows.keys
    squares = (np.einsum("ij,ij->", x, x, dtype=np.float64) / len(x) for x in (q, k))
    return float(scale * (sum(squares) + 2 * q.mean(0, np.float64) @ k.mean(0, np.float64)))
