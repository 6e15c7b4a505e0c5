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
from ._windows import F64

Signals = npt.NDArray[np.int8]

DEFAULT_COST = 2e-4
CONSTANT = 1e-3  # returns that vary by less than this part of their mean do so by rounding
DECAY = 0.94  # of the exponentially weighted average (RiskMetrics 1996, daily)


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
    rmse, rmse_zero : float
        Root mean square error of the forecast, and of the forecast zero, in log returns.
    r2 : float
        1 - (rmse / rmse_zero)²: above 0 is better than zero.
    z : float
        Mean difference of the squared errors (zero's less ours) over its standard error
        (Newey and West): beyond ±2 is more than chance.
    coverage : float
        Share of outcomes within one standard deviation (`Forecast.spread`) of the forecast.
    signals : ndarray, shape (L,), int8
        1 BUY, -1 SELL, 0 HOLD, for every forecast.
    threshold, cost : float
        Predicted log return beyond which a signal is given; cost of a whole position, as a
        part of its value.
    equity, equity_hold : ndarray, shape (steps + 1,), float64
        Worth of 1 put into the strategy and into buy-and-hold, both with costs, from forecast
        `start` to the last price.  BUY is one unit long, SELL one short, HOLD none; with a
        horizon of h the position is the mean of the last h signals.
    turnover : float
        Sum of all changes of position.
    sharpe, sharpe_hold : float
        Mean over standard deviation of a step's return, times the root of `steps_per_year`;
        NaN where the returns are constant, as without a single trade.
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
    rmse: float
    rmse_zero: float
    r2: float
    z: float
    coverage: float
    signals: Signals = field(repr=False)
    threshold: float
    cost: float
    equity: F64 = field(repr=False)
    equity_hold: F64 = field(repr=False)
    turnover: float
    sharpe: float
    sharpe_hold: float
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
    equity, equity_hold, turnover = _trade(result, signals, start, cost)
    per_year, year = steps_per_year(result.prices.times)
    return ReturnEvaluation(
        start=start,
        stop=stop,
        moves=moves,
        hits=hits,
        hit_low=low,
        hit_high=high,
        up_share=float(np.mean(outcome[moved] > 0)) if moves else math.nan,
        rmse=math.sqrt(squares.mean()),
        rmse_zero=math.sqrt(zero.mean()),
        r2=_skill(squares, zero),
        z=z_score(zero - squares, result.horizon),
        coverage=float(np.mean(np.sqrt(squares) <= result.spread[start:stop])),
        signals=signals,
        threshold=threshold,
        cost=cost,
        equity=equity,
        equity_hold=equity_hold,
        turnover=turnover,
        sharpe=_sharpe(equity, per_year),
        sharpe_hold=_sharpe(equity_hold, per_year),
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


def _trade(result: Forecast, signals: Signals, start: int, cost: float) -> tuple[F64, F64, float]:
    """Equity of the strategy and of buy-and-hold from forecast `start` on, and the turnover."""
    values = result.prices.values
    steps = values[result.index[start:-1] + 1] / values[result.index[start:-1]] - 1
    total = np.concatenate([[0], np.cumsum(signals[start:-1], dtype=np.int64)])
    first = np.maximum(np.arange(len(steps)) + 1 - result.horizon, 0)
    position = (total[1:] - total[first]) / result.horizon
    changes = np.abs(np.diff(position, prepend=0.0))
    hold_cost = np.zeros(len(steps))
    hold_cost[:1] = cost
    return (
        _equity(position * steps - cost * changes),
        _equity(steps - hold_cost),
        float(changes.sum()),
    )


def _equity(returns: F64) -> F64:
    """Growth of 1; who has lost all stays at 0."""
    return np.cumprod(np.concatenate([[1.0], np.maximum(1 + returns, 0.0)]))


def _sharpe(equity: F64, per_year: float) -> float:
    alive = equity[:-1] > 0
    returns = equity[1:][alive] / equity[:-1][alive] - 1
    mean, spread = (float(np.mean(returns)), float(np.std(returns))) if len(returns) else (0.0, 0.0)
    if spread <= CONSTANT * abs(mean):
        return math.nan
    return mean / spread * math.sqrt(per_year)


def non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not below 0, got {validation.got(value)}")
    return float(value)
