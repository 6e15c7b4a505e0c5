"""Walk-forward: fit on what was known, forecast what follows, go on; the same for any estimator."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.progress import Progress, reporting

from ._prices import Prices
from ._scores import LOSSES, DieboldMariano, diebold_mariano
from ._windows import F64


class Estimator(Protocol):
    """What `backtest` takes: the conventions of scikit-learn; rows are time.

    An estimator whose prediction depends on rows before says on how many, by an attribute
    `context`: `predict` then gets those as well, and the last predictions count.
    """

    def fit(self, X: Any, y: Any) -> Any:
        """Fit."""

    def predict(self, X: Any) -> Any:
        """Predict a number a row."""


class Samples(NamedTuple):
    """The returns of a series and what followed them: see `samples`."""

    X: F64
    y: F64


def samples(prices: Prices | npt.ArrayLike, *, horizon: int = 1, squared: bool = True) -> Samples:
    """Return log returns, and what followed each, as `backtest` takes them.

    Parameters
    ----------
    prices : Prices or array_like
        The series.
    horizon : int
        Steps ahead.
    squared : bool
        Whether to forecast the square of what follows, a proxy of its variance, or itself.

    Returns
    -------
    X : ndarray, shape (n, 1)
        Log returns in percent.
    y : ndarray, shape (n,)
        Log return over the next `horizon` steps in percent, or its square; NaN for the last ones,
        for which it is not known.

    Examples
    --------
    >>> from favor_np.forecast import samples
    >>> X, y = samples([1.0, 2.0, 4.0, 2.0], squared=False)
    >>> X[:, 0].round(2), y.round(2)
    (array([ 69.31,  69.31, -69.31]), array([ 69.31, -69.31,    nan]))
    """
    if not isinstance(prices, Prices):
        prices = Prices.from_array(prices)
    horizon = validation.integer("horizon", horizon)
    logs = 100 * np.log(prices.values)
    if len(logs) <= horizon + 1:
        raise ValueError(f"{len(logs)} prices are too few for a horizon of {horizon}")
    moves = np.full(len(logs) - 1, np.nan)
    moves[:-horizon] = logs[1 + horizon :] - logs[1:-horizon]
    return Samples(np.diff(logs)[:, None], moves**2 if squared else moves)


@dataclass(frozen=True, eq=False, repr=False)
class Backtest:
    """Forecasts of the past, each made from what was known, and their losses.

    Parameters
    ----------
    index : ndarray, shape (n,), intp
        The row that each forecast was made at.
    predicted, outcome : ndarray, shape (n,), float64
        The forecast and what happened; NaN where that is not known yet.
    horizon : int
        Rows after which an outcome is known.
    loss : {"qlike", "squared"}
        What forecasts are judged by.
    mean : ndarray, shape (n,), float64
        Mean of what was known of `size` at each time: the forecast to beat in `r2`.
    ratio : ndarray, shape (n,), float64
        Mean of `size` over that of the forecasts' roots, as far as it was known; 1 for "squared".
    fits : int
        How often the estimator was fitted.
    """

    index: npt.NDArray[np.intp]
    predicted: F64
    outcome: F64
    horizon: int
    loss: str
    mean: F64 = field(repr=False)
    ratio: F64 = field(repr=False)
    fits: int

    def __len__(self) -> int:
        """Number of forecasts."""
        return len(self.index)

    def __repr__(self) -> str:
        """One line: how many, and how good."""
        return (
            f"<Backtest: {len(self):,} forecasts, {self.fits:,} fits, {self.loss} "
            f"{self.score:.4f}, R² {self.r2:+.3f}>"
        )

    @functools.cached_property
    def known(self) -> npt.NDArray[np.bool_]:
        """Forecasts whose outcome is known."""
        return np.isfinite(self.outcome)

    @functools.cached_property
    def losses(self) -> F64:
        """Losses of the forecasts whose outcome is known, one by one."""
        return LOSSES[self.loss](self.outcome[self.known], self.predicted[self.known])

    @property
    def score(self) -> float:
        """Mean loss: lower is better."""
        return float(self.losses.mean()) if len(self.losses) else math.nan

    @property
    def r2(self) -> float:
        """Part of the variance of outcomes that is explained, against their mean so far.

        For "qlike" of the absolute return, forecast by the root of the variance times `ratio`.
        """
        known, size, forecast = self.known, self.outcome, self.predicted
        if self.loss == "qlike":
            size, forecast = np.sqrt(size), np.sqrt(forecast) * self.ratio
        ours = np.sum((size - forecast)[known] ** 2)
        of_mean = np.sum((size - self.mean)[known] ** 2)
        return float(1 - ours / of_mean) if of_mean > 0 else math.nan

    def against(self, rival: Backtest) -> DieboldMariano:
        """Test whether these forecasts are better than others of the same outcomes.

        Parameters
        ----------
        rival : Backtest
            Another estimator, on the same data with the same settings.

        Returns
        -------
        DieboldMariano

        Raises
        ------
        ValueError
            If it judges other forecasts, or by another loss.
        """
        if self.loss != rival.loss or self.horizon != rival.horizon:
            raise ValueError("both need the same loss and horizon")
        same = np.array_equal(self.index, rival.index)
        if not same or not np.array_equal(self.outcome, rival.outcome, equal_nan=True):
            raise ValueError("both need forecasts of the same outcomes")
        step = max(1, int(np.min(np.diff(self.index), initial=self.horizon)))
        return diebold_mariano(self.losses, rival.losses, horizon=-(-self.horizon // step))


def backtest(
    estimator: Estimator,
    X: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    horizon: int = 1,
    start: int = 1000,
    stride: int = 1,
    refit: int | None = 20,
    gap: int = 0,
    loss: str = "qlike",
    progress: bool | Progress | None = None,
) -> Backtest:
    """Forecast the past as it would have been forecast: walk-forward, labels purged.

    The forecast at row t is made by an estimator that was fitted on rows up to
    ``t - horizon - gap`` alone: what followed later ones was not known at t.

    Parameters
    ----------
    estimator : object
        With ``fit(X, y)`` and ``predict(X)``, as in scikit-learn: ours, or anyone's.  It is copied
        for every fit, and stays as it is.
    X : array_like, shape (n, columns)
        What is known at each row, in order of time.
    y : array_like, shape (n,)
        What followed each row, known `horizon` rows later; NaN where it is not known yet.
    horizon : int
        Rows until an outcome is known.
    start : int
        Row of the first forecast.
    stride : int
        Rows from one forecast to the next.
    refit : int, optional
        Rows from one fit to the next; None fits once.
    gap : int
        Further rows to leave out between those of the fit and the forecast.
    loss : {"qlike", "squared"}
        "qlike" where y is a squared return and the forecast a variance; see `qlike`.
    progress : bool or callable, optional
        As `stream_attention`.

    Returns
    -------
    Backtest

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or shape or out of range, if too few rows are left to
        fit, or if a forecast is not finite (for "qlike": not above 0).

    Examples
    --------
    >>> from favor_np.forecast import EWMA, Constant, backtest, read_prices, samples
    >>> X, y = samples(read_prices())
    >>> ours, constant = (backtest(model, X, y, refit=250) for model in (EWMA(), Constant()))
    >>> ours
    <Backtest: 9,224 forecasts, 37 fits, qlike 2.6129, R² +0.150>
    >>> ours.against(constant).verdict("a constant")
    'better than a constant (p = 0.0057)'
    """
    reported = reporting(progress)
    horizon = validation.integer("horizon", horizon)
    start = validation.integer("start", start)
    stride = validation.integer("stride", stride)
    gap = validation.integer("gap", gap, minimum=0)
    validation.choice("loss", loss, tuple(LOSSES))
    rows, outcome = _checked(X, y, horizon, loss)
    count = len(outcome)
    refit = count if refit is None else validation.integer("refit", refit)
    if start >= count:
        raise ValueError(f"start must be below the number of rows, {count}, got {start}")
    if start - horizon - gap < 1:
        raise ValueError(
            f"start = {start} leaves too few rows to fit, with a horizon of {horizon} and a gap of "
            f"{gap}"
        )
    for method in ("fit", "predict"):
        if not callable(getattr(estimator, method, None)):
            raise TypeError(f"estimator needs a method {method}: {validation.got(estimator)}")

    index = np.arange(start, count, stride)
    predicted = np.empty(len(index))
    blocks = (index - start) // refit  # forecasts of a block share one fit
    firsts = np.flatnonzero(np.diff(blocks, prepend=-1))
    with reported as report:
        for first, last in zip(firsts, [*firsts[1:], len(index)], strict=True):
            part = slice(first, last)
            predicted[part] = _forecast(estimator, rows, outcome, index[part], horizon + gap)
            report("backtest", int(last), len(index))
    _check(predicted, index, loss)
    return Backtest(
        index,
        predicted,
        outcome[index],
        horizon,
        loss,
        *_simple(outcome, index, predicted, horizon, loss),
        len(firsts),
    )


def _checked(
    X: npt.ArrayLike, y: npt.ArrayLike, horizon: int, loss: str
) -> tuple[npt.NDArray[Any], F64]:
    rows, outcome = np.asarray(X), np.asarray(y, np.float64)
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.ndim != 2 or outcome.shape != rows.shape[:1]:
        raise ValueError(
            f"X and y must be (n, columns) and (n,), got {rows.shape}, {outcome.shape}"
        )
    missing = np.flatnonzero(~np.isfinite(outcome[: max(len(outcome) - horizon, 0)]))
    if len(missing):
        raise ValueError(
            f"y must be known but for the last {horizon} rows, row {missing[0]} is not"
        )
    if loss == "qlike" and (outcome < 0).any():
        row = int(np.argmax(outcome < 0))
        raise ValueError(
            f"y must be at least 0 with loss='qlike', squared returns as a rule: row {row} is "
            f"{outcome[row]}"
        )
    return rows, outcome


def _forecast(
    estimator: Estimator,
    rows: npt.NDArray[Any],
    outcome: F64,
    index: npt.NDArray[np.intp],
    purged: int,
) -> F64:
    """Fit a copy on what was known at the first of some rows, and predict them all."""
    known = slice(0, index[0] - purged + 1)
    model = copy.deepcopy(estimator)
    model.fit(rows[known], outcome[known])
    before = max(index[0] - int(getattr(estimator, "context", 0)), 0)
    found: F64 = np.asarray(model.predict(rows[before : index[-1] + 1]), np.float64)
    if found.shape != (index[-1] + 1 - before,):
        raise ValueError(
            f"predict must return a number a row, got {found.shape} for "
            f"{index[-1] + 1 - before} rows"
        )
    return np.asarray(found[index - before])


def _check(predicted: F64, index: npt.NDArray[np.intp], loss: str) -> None:
    good = np.isfinite(predicted)
    if loss == "qlike":
        good &= predicted > 0
    if not good.all():
        first = int(np.argmin(good))
        what = "finite and above 0, for it is a variance" if loss == "qlike" else "finite"
        raise ValueError(f"a forecast must be {what}: row {index[first]} has {predicted[first]}")


def _simple(
    outcome: F64, index: npt.NDArray[np.intp], predicted: F64, horizon: int, loss: str
) -> tuple[F64, F64]:
    """Mean of the outcomes known at each row, and what turns roots of variances into sizes."""
    size = np.sqrt(outcome) if loss == "qlike" else outcome
    total = np.cumsum(np.nan_to_num(size)) / np.arange(1, len(size) + 1)
    mean, ratio = total[index - horizon], np.ones(len(index))
    if loss == "qlike":
        root = np.sqrt(predicted)
        sizes, roots = np.cumsum(np.nan_to_num(size[index])), np.cumsum(root)
        known = np.searchsorted(index, index - horizon, side="right")
        some = known > 0
        ratio[:] = np.sqrt(2 / np.pi)  # of a normal distribution, as long as nothing is known
        ratio[some] = sizes[known[some] - 1] / roots[known[some] - 1]
    return mean, ratio
