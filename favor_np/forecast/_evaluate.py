"""How the forecasts did on the past, walk-forward: every one was made before its outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from favor_np import validation

from ._calendar import steps_per_year
from ._forecast import Forecast
from ._scores import z_score
from ._trading import DECAY, Trading, mean_of_signals, steady_position, trade
from ._windows import F64

Signals = npt.NDArray[np.int8]

DEFAULT_COST = 2e-4


@dataclass(frozen=True, eq=False)
class ReturnEvaluation:
    """Walk-forward record of forecasts of returns.

    Parameters
    ----------
    start, stop : int
        The judged forecasts are rows ``start:stop``: after the warm-up, outcome known.
    moves, hits : int
        Outcomes other than zero, and those whose sign was predicted.
    hit_low, hit_high : float
        Wilson's 95% interval of the hit rate (outcomes that overlap count as 1 / horizon).
    up_share : float
        Share of up moves: the hit rate of a forecast that always says up.
    base_rate, z_hits : float
        Hit rate of the direction that was more frequent until then, and that of the forecasts less
        it over the standard error of the difference.
    rmse, rmse_zero : float
        Root mean square error of the forecast, and of the forecast zero, in log returns.
    r2 : float
        1 - (rmse / rmse_zero)²: above 0 is better than zero.
    z, z_thinned : float
        Mean difference of the squared errors (zero's less ours) over its standard error
        (Newey and West): beyond ±2 is more than chance.  The same for every `horizon`-th forecast
        alone, whose outcomes do not overlap.
    coverage : float
        Share of outcomes within one standard deviation (`Forecast.spread`) of the forecast.
    signals : ndarray, shape (L,), int8
        1 BUY, -1 SELL, 0 HOLD, for every forecast.
    threshold, cost : float
        Predicted log return beyond which a signal is given; cost of a whole position, as a
        part of its value.
    strategy, hold, steady : Trading
        From forecast `start` to the last price, with costs: BUY is one unit long, SELL one short,
        HOLD none, and with a horizon of h the position is the mean of the last h signals; buying
        and holding; and a long position of equal risk, the mean volatility so far over the present
        one (decay 0.94), at most 2, changed where it is off by a tenth.
    steps_per_year : float
        From the times of the series; 1 where they are not known, or too few to tell.
    year : str
        How the steps of a year were counted, in words; empty where they were not.
    """

    start: int
    stop: int
    moves: int
    hits: int
    hit_low: float
    hit_high: float
    up_share: float
    base_rate: float
    z_hits: float
    rmse: float
    rmse_zero: float
    r2: float
    z: float
    z_thinned: float
    coverage: float
    signals: Signals = field(repr=False)
    threshold: float
    cost: float
    strategy: Trading
    hold: Trading
    steady: Trading
    steps_per_year: float
    year: str

    @property
    def hit_rate(self) -> float:
        """Share of moves whose sign was predicted."""
        return self.hits / self.moves if self.moves else math.nan


@dataclass(frozen=True, eq=False)
class VolatilityEvaluation:
    """Walk-forward record of forecasts of absolute returns.

    Parameters
    ----------
    start, stop : int
        The judged forecasts are rows ``start:stop``: after the warm-up, outcome known.
    rmse, rmse_constant, rmse_ewma : float
        Root mean square errors in log returns: the forecast, the mean of all outcomes known at
        that time, and their exponentially weighted average (decay 0.94).
    r2, r2_ewma : float
        1 - (rmse / rmse_constant)², and the same for the exponentially weighted average.
    z : float
        As in `ReturnEvaluation`, against the constant.
    constant, ewma : ndarray, shape (L,), float64
        The two simple forecasts, for every row.
    """

    start: int
    stop: int
    rmse: float
    rmse_constant: float
    rmse_ewma: float
    r2: float
    r2_ewma: float
    z: float
    constant: F64 = field(repr=False)
    ewma: F64 = field(repr=False)


@validation.own_error_state
def evaluate(
    result: Forecast, *, threshold: float | None = None, cost: float = DEFAULT_COST
) -> ReturnEvaluation | VolatilityEvaluation:
    """Judge the forecasts whose outcome is known.

    Parameters
    ----------
    result : Forecast
        From `forecast`.
    threshold : float, optional
        A predicted log return above it is a BUY, below its negative a SELL.  Default: `cost`,
        since a smaller move would not pay for the trade.
    cost : float
        Cost of buying or selling one whole position, as a part of its value.

    Returns
    -------
    ReturnEvaluation or VolatilityEvaluation
        By the target of the forecast; the options above matter for returns only.

    Examples
    --------
    >>> from favor_np.forecast import evaluate, forecast, read_prices
    >>> record = evaluate(forecast(read_prices(), target="volatility"))
    >>> bool(record.r2 > 0.03)                      # volatility can be predicted a little
    True
    """
    start, stop = result.warm_up, len(result) - result.horizon
    if result.target == "volatility":
        return _evaluate_volatility(result, start, stop)
    cost = non_negative("cost", cost)
    threshold = cost if threshold is None else non_negative("threshold", threshold)
    predicted, outcome = result.predicted[start:stop], result.outcome[start:stop]
    moved = outcome != 0
    moves = int(moved.sum())
    hits = int((np.sign(predicted) == np.sign(outcome))[moved].sum())
    low, high = wilson_interval(hits, moves, result.horizon)
    squares, zero = (outcome - predicted) ** 2, outcome**2
    signals = signals_of(result.predicted, threshold)
    per_year, year = steps_per_year(result.prices.times)
    values, first = result.prices.values, int(result.index[start])
    steps = np.diff(values[first:]) / values[first:-1]
    positions = (
        mean_of_signals(signals[start:-1], result.horizon),
        np.ones(len(steps)),
        steady_position(np.diff(values) / values[:-1], first),
    )
    strategy, hold, steady = (trade(steps, position, cost, per_year) for position in positions)
    base, right = _base_rate(result, start, stop, moved)
    difference = right - base
    return ReturnEvaluation(
        start=start,
        stop=stop,
        moves=moves,
        hits=hits,
        hit_low=low,
        hit_high=high,
        up_share=float(np.mean(outcome[moved] > 0)) if moves else math.nan,
        base_rate=float(base.mean()) if moves else math.nan,
        z_hits=z_score(difference, result.horizon) if moves else math.nan,
        rmse=math.sqrt(squares.mean()),
        rmse_zero=math.sqrt(zero.mean()),
        r2=_skill(squares, zero),
        z=z_score(zero - squares, result.horizon),
        z_thinned=z_score((zero - squares)[:: result.horizon], 1),
        coverage=float(np.mean(np.sqrt(squares) <= result.spread[start:stop])),
        signals=signals,
        threshold=threshold,
        cost=cost,
        strategy=strategy,
        hold=hold,
        steady=steady,
        steps_per_year=per_year,
        year=year,
    )


def _evaluate_volatility(result: Forecast, start: int, stop: int) -> VolatilityEvaluation:
    known = result.windows.known  # row i: the newest outcome that forecast i may know
    constant = np.cumsum(known) / np.arange(1, len(known) + 1)
    average, mean = [], float(known[0])
    for value in known.tolist():
        mean = DECAY * mean + (1 - DECAY) * value
        average.append(mean)
    ewma = np.array(average)
    outcome = result.outcome[start:stop]
    ours, theirs, weighted = (
        (outcome - p[start:stop]) ** 2 for p in (result.predicted, constant, ewma)
    )
    return VolatilityEvaluation(
        start=start,
        stop=stop,
        rmse=math.sqrt(ours.mean()),
        rmse_constant=math.sqrt(theirs.mean()),
        rmse_ewma=math.sqrt(weighted.mean()),
        r2=_skill(ours, theirs),
        r2_ewma=_skill(weighted, theirs),
        z=z_score(theirs - ours, result.horizon),
        constant=constant,
        ewma=ewma,
    )


def signals_of(predicted: F64, threshold: float) -> Signals:
    """1 (BUY) above the threshold, -1 (SELL) below its negative, else 0 (HOLD)."""
    return (predicted > threshold).astype(np.int8) - (predicted < -threshold).astype(np.int8)


def wilson_interval(hits: int, trials: int, overlap: int = 1) -> tuple[float, float]:
    """Wilson's 95% interval of a share; ``overlap`` trials carry the information of one."""
    if trials == 0:
        return 0.0, 1.0
    z2 = 1.959964**2
    count, share = trials / overlap, hits / trials
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * share * (1 - share) / count + z2**2 / (4 * count**2)) / (1 + z2 / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _skill(ours: F64, theirs: F64) -> float:
    """1 - mean squared error over that of the simple forecast."""
    total = float(theirs.sum())
    return 1 - float(ours.sum()) / total if total > 0 else math.nan


def _base_rate(
    result: Forecast, start: int, stop: int, moved: npt.NDArray[np.bool_]
) -> tuple[F64, F64]:
    """Whether the usual direction so far, and ours, was right, at each outcome that moved."""
    known = result.windows.known  # row i: the newest outcome that forecast i may know
    usual = np.where(np.cumsum(np.sign(known)) >= 0, 1.0, -1.0)[start:stop]
    direction = np.sign(result.outcome[start:stop])
    base, right = usual == direction, np.sign(result.predicted[start:stop]) == direction
    return base[moved].astype(np.float64), right[moved].astype(np.float64)


def non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not below 0, got {validation.got(value)}")
    return float(value)
