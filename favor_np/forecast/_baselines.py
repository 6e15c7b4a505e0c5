"""Forecasts of volatility that any other has to beat, with the interface of scikit-learn.

X has log returns in its first column, y the squared return over the next `horizon` steps; the
forecast is its variance: see `samples`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from favor_np import validation

from ._windows import F64

FLOOR = 0.01  # a smaller square, of the mean square, counts as that: a tenth of the usual return
SETTLED = 1e-6  # what is left of a square that no longer counts in an average


class Parameters:
    """`get_params` and `set_params` of a dataclass, so that scikit-learn can clone it."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """Return the arguments of the constructor."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)  # type: ignore[arg-type]
        }

    def set_params(self, **params: Any) -> Self:
        """Change arguments of the constructor."""
        unknown = set(params) - set(self.get_params())
        if unknown:
            raise ValueError(f"unknown parameters: {', '.join(sorted(unknown))}")
        vars(self).update(params)
        return self


@dataclass
class Constant(Parameters):
    """The mean of all that is known.

    Examples
    --------
    >>> from favor_np.forecast import Constant
    >>> Constant().fit([[0.0], [0.0]], [1.0, 3.0]).predict([[5.0]])
    array([2.])
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:  # noqa: ARG002
        """Take the mean of y."""
        self.mean_ = float(np.asarray(y, np.float64).mean())
        return self

    def predict(self, X: npt.ArrayLike) -> F64:
        """Return it for every row."""
        return np.full(len(np.asarray(X)), self.mean_)


@dataclass
class EWMA(Parameters):
    """Exponentially weighted mean of squared returns (RiskMetrics 1996).

    Parameters
    ----------
    decay : float
        Weight of each square over that of the next.
    horizon : int
        Steps ahead, whose variances add up.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.forecast import EWMA
    >>> EWMA(decay=0.5).fit(np.ones((4, 1)), np.ones(4)).predict([[1.0], [3.0]])
    array([1., 5.])
    """

    decay: float = 0.94
    horizon: int = 1

    @property
    def context(self) -> int:
        """Rows before that a prediction takes."""
        return 0 if self.decay == 0 else int(np.log(SETTLED) / np.log(self.decay)) + 1

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:  # noqa: ARG002
        """Take the mean square, to begin with."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be from 0 to below 1, got {self.decay}")
        validation.integer("horizon", self.horizon)
        self.variance_ = float(np.mean(returns_of(X) ** 2))
        return self

    def predict(self, X: npt.ArrayLike) -> F64:
        """Return the variance after each row, from the rows up to it."""
        average, found = self.variance_, []
        for square in (returns_of(X) ** 2).tolist():
            average = self.decay * average + (1 - self.decay) * square
            found.append(average)
        return self.horizon * np.array(found)


@dataclass
class HAR(Parameters):
    """Regression of the log variance on those of the last day, week and month (HAR-log).

    The logarithms of the mean squares of the last 1, 5 and 22 returns explain that of what
    follows, by least squares over the last `window` rows; the level is corrected so that the mean
    of outcome over forecast is 1.

    Parameters
    ----------
    spans : tuple of int
        Returns in each mean.
    window : int, optional
        Last rows that a fit looks at; None: all.

    References
    ----------
    Corsi 2009, "A simple approximate long-memory model of realized volatility", Journal of
    Financial Econometrics 7.

    Examples
    --------
    >>> from favor_np.forecast import HAR, backtest, read_prices, samples
    >>> backtest(HAR(), *samples(read_prices()), refit=20)
    <Backtest: 9,224 forecasts, 462 fits, qlike 2.6..., R² +0.17...>
    """

    spans: tuple[int, ...] = (1, 5, 22)
    window: int | None = 2000

    @property
    def context(self) -> int:
        """Rows before that a prediction takes."""
        return max(self.spans) - 1

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Regress."""
        if not self.spans:
            raise ValueError("spans must hold at least one number of rows, got none")
        for span in self.spans:
            validation.integer("spans", span)
        if self.window is not None:
            validation.integer("window", self.window)
        returns, outcome = returns_of(X), np.asarray(y, np.float64)
        last = slice(0 if self.window is None else max(0, len(outcome) - self.window), None)
        if not (returns[last].any() and outcome[last].any()):
            last = slice(None)  # no trade for so long: what was before says more
        mean = float(np.mean(returns[last] ** 2))
        if not (mean > 0 and outcome[last].any()):
            raise ValueError("the returns never vary: no volatility can be fitted")
        self.floor_ = FLOOR * mean
        rows = _with_ones(self.features(returns)[last])
        target = np.log(np.maximum(outcome[last], FLOOR * np.mean(outcome[last])))
        self.coefficients_ = np.linalg.lstsq(rows, target, rcond=None)[0]
        self.coefficients_[0] += np.log(np.mean(outcome[last] / np.exp(rows @ self.coefficients_)))
        return self

    def predict(self, X: npt.ArrayLike) -> F64:
        """Return the variance after each row, from the rows up to it."""
        return self.variance(self.features(returns_of(X)))

    def variance(self, features: F64) -> F64:
        """Return the variance that features say."""
        return np.asarray(np.exp(_with_ones(features) @ self.coefficients_))

    def features(self, returns: F64) -> F64:
        """Return logarithms of mean squares (n, spans); the first rows have shorter means."""
        total = np.concatenate([[0.0], np.cumsum(returns**2)])
        ends = np.arange(1, len(total))
        columns = []
        for span in self.spans:
            begins = np.maximum(ends - span, 0)
            mean = (total[ends] - total[begins]) / (ends - begins)
            columns.append(np.log(np.maximum(mean, self.floor_)))
        return np.stack(columns, axis=1)


@dataclass
class GARCH(Parameters):
    """GARCH(1,1) with Student's t, by maximum likelihood: needs the package arch.

    Parameters
    ----------
    horizon : int
        Steps ahead, whose variances add up.
    context : int
        Rows before that a prediction takes.

    Notes
    -----
    ``pip install 'favor_np[volatility]'``.  Bollerslev 1987, "A conditionally heteroskedastic time
    series model for speculative prices and rates of return", Review of Economics and Statistics 69.
    """

    horizon: int = 1
    context: int = 1000

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:  # noqa: ARG002
        """Maximise the likelihood of the returns in X."""
        try:
            from arch import arch_model
        except ImportError:
            raise ImportError(
                "GARCH needs arch: pip install 'favor_np[volatility]'", name="arch"
            ) from None
        validation.integer("horizon", self.horizon)
        returns = returns_of(X)
        unit = float(np.std(returns))
        if not unit > 0:
            raise ValueError("the returns never vary: no volatility can be fitted")
        model = arch_model(returns / unit, mean="Zero", vol="GARCH", p=1, q=1, dist="t")
        found = model.fit(disp="off", show_warning=False).params
        self.alpha_, self.beta_ = float(found["alpha[1]"]), float(found["beta[1]"])
        self.omega_, self.variance_ = float(found["omega"]) * unit**2, unit**2
        return self

    def predict(self, X: npt.ArrayLike) -> F64:
        """Return the variance after each row, from the rows up to it."""
        variance, found = self.variance_, []
        for square in (returns_of(X) ** 2).tolist():
            variance = self.omega_ + self.alpha_ * square + self.beta_ * variance
            found.append(variance)
        total = step = np.array(found)
        for _ in range(self.horizon - 1):
            step = self.omega_ + (self.alpha_ + self.beta_) * step
            total = total + step
        return total


def returns_of(X: npt.ArrayLike) -> F64:
    """Return the first column, which must be finite."""
    rows = np.asarray(X, np.float64)
    returns = rows if rows.ndim == 1 else rows[:, 0]
    missing = np.flatnonzero(~np.isfinite(returns))
    if len(missing):
        raise ValueError(
            f"returns, the first column of X, must be finite, row {missing[0]} is "
            f"{returns[missing[0]]}"
        )
    return returns


def _with_ones(features: F64) -> F64:
    return np.hstack([np.ones((len(features), 1)), features])
