"""How good forecasts are, and whether one is better than another by more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._windows import F64

SURE = 0.05  # a difference with a larger p-value is none


def qlike(outcome: npt.ArrayLike, variance: npt.ArrayLike) -> F64:
    """Loss of forecasts of a variance: ``outcome / variance + log(variance)``, one by one.

    Unlike the error of an absolute move it ranks forecasts as if the variance itself had been seen,
    of which the squared return is but a noisy sign.

    Parameters
    ----------
    outcome : array_like
        Squared returns, or another unbiased proxy of the variance; zeros are no problem.
    variance : array_like
        The forecasts, above 0.

    Returns
    -------
    ndarray

    References
    ----------
    Patton 2011, "Volatility forecast comparison using imperfect volatility proxies", Journal of
    Econometrics 160.

    Examples
    --------
    >>> from favor_np.forecast import qlike
    >>> qlike([1.0, 0.0], [1.0, 1.0])
    array([1., 0.])
    """
    outcome, variance = np.asarray(outcome, np.float64), np.asarray(variance, np.float64)
    return np.asarray(outcome / variance + np.log(variance))


def squared_error(outcome: npt.ArrayLike, predicted: npt.ArrayLike) -> F64:
    """Return the squared errors, one by one."""
    return np.asarray((np.asarray(outcome, np.float64) - np.asarray(predicted, np.float64)) ** 2)


#: What `backtest` can judge by.
LOSSES: dict[str, Callable[[npt.ArrayLike, npt.ArrayLike], F64]] = {
    "qlike": qlike,
    "squared": squared_error,
}


@dataclass(frozen=True)
class DieboldMariano:
    """Whether one forecast is better than another.

    Parameters
    ----------
    difference : float
        Mean loss of the other less that of ours: above 0 ours is better.
    statistic, p_value : float
        It over its standard error (Newey and West), with the correction of Harvey, Leybourne and
        Newbold; two-sided, by Student's t.
    thinned : float
        The same statistic from every `horizon`-th forecast alone, whose outcomes do not overlap.
    count, lags : int
        Losses, and autocovariances in the standard error.
    """

    difference: float
    statistic: float
    p_value: float
    thinned: float
    count: int
    lags: int

    def verdict(self, rival: str) -> str:
        """Say it in words: "better than EWMA (p = 0.01)", "no better than HAR (p = 0.4)"."""
        word = "no better"
        if self.p_value < SURE:
            word = "better" if self.statistic > 0 else "worse"
        return f"{word} than {rival} (p = {self.p_value:.2g})"


def diebold_mariano(
    losses: npt.ArrayLike, rival: npt.ArrayLike, *, horizon: int = 1
) -> DieboldMariano:
    """Test whether forecasts have smaller losses than others of the same outcomes.

    Parameters
    ----------
    losses, rival : array_like, shape (n,)
        Losses of ours and of the other, in order of time.
    horizon : int
        Steps that an outcome spans: those of neighbouring forecasts overlap, if there are several.

    Returns
    -------
    DieboldMariano

    Raises
    ------
    ValueError
        If the losses are not as many, not finite, or too few for the horizon.

    References
    ----------
    Diebold and Mariano 1995, Journal of Business and Economic Statistics 13; Harvey, Leybourne and
    Newbold 1997, International Journal of Forecasting 13.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.forecast import diebold_mariano
    >>> rng = np.random.default_rng(0)
    >>> ours = rng.standard_normal(500) ** 2
    >>> diebold_mariano(ours, ours + 0.1 + 0.5 * rng.standard_normal(500)).verdict("the other")
    'better than the other (p = 0.0028)'
    """
    ours, theirs = np.asarray(losses, np.float64), np.asarray(rival, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise ValueError(f"losses must be as many on both sides, got {ours.shape}, {theirs.shape}")
    difference = theirs - ours
    if not np.isfinite(difference).all():
        raise ValueError("losses must be finite")
    if len(ours) < max(2 * horizon, 8):
        raise ValueError(f"{len(ours)} losses are too few for a horizon of {horizon}")
    lags = newey_west_lags(len(ours), horizon)
    statistic = _corrected(difference, horizon)
    from scipy.special import stdtr

    thin = difference[::horizon]
    return DieboldMariano(
        difference=float(difference.mean()),
        statistic=statistic,
        p_value=float(2 * stdtr(len(ours) - 1, -abs(statistic))),
        thinned=_corrected(thin, 1) if len(thin) > 2 else math.nan,
        count=len(ours),
        lags=lags,
    )


def newey_west_lags(count: int, horizon: int) -> int:
    """Autocovariances that a standard error needs: those of the overlap, or the cube root."""
    return min(max(horizon - 1, int(count ** (1 / 3))), count - 1)


def z_score(values: F64, horizon: int) -> float:
    """Mean over its standard error, with the autocovariances of overlapping outcomes."""
    mean, error = float(values.mean()), standard_error(values, horizon)
    if error > 0:
        return mean / error
    return math.copysign(math.inf, mean) if mean else 0.0


def standard_error(values: F64, horizon: int) -> float:
    """Return that of a mean, by Newey and West: weights fall with the lag."""
    count, centred = len(values), values - values.mean()
    lags = newey_west_lags(count, horizon)
    variance = centred @ centred
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * (centred[lag:] @ centred[:-lag])
    return math.sqrt(max(float(variance), 0.0)) / count


def _corrected(difference: F64, horizon: int) -> float:
    count = len(difference)
    factor = (count + 1 - 2 * horizon + horizon * (horizon - 1) / count) / count
    return z_score(difference, horizon) * math.sqrt(factor)
