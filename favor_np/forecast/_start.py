"""The regression that a Performer starts as: penalised, with fat tails, by Newton's method."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._inputs import FLOOR
from ._windows import F64

DEGREES = 5.0  # of freedom, of Student's t
STEPS, CLOSE = 50, 1e-6  # of Newton's method
LARGEST = 100.0  # ratio of a squared return to its variance that counts in the level
LEAST = 0.1  # curvature of a row in Newton's method, so that each adds some


class Tail(NamedTuple):
    """How unlikely large returns are: those of a normal distribution, or of Student's t.

    `ratio` is the square of a return over its variance; slopes are those of minus twice the
    log-likelihood, by the logarithm of the variance.
    """

    degrees: float | None

    def loss(self, ratio: Any, log_variance: Any) -> Any:
        """Minus twice the log-likelihood, but for a constant: QLIKE for a normal distribution."""
        if self.degrees is None:
            return ratio + log_variance
        nu = self.degrees
        return (nu + 1) * np.log1p(ratio / nu) + log_variance

    def weight(self, ratio: Any) -> Any:
        """What a squared return counts, times its ratio less 1 makes minus the slope."""
        return 1.0 if self.degrees is None else (self.degrees + 1) / (self.degrees + ratio)

    def curvature(self, ratio: Any) -> Any:
        """Second derivative of the loss."""
        if self.degrees is None:
            return ratio
        nu = self.degrees
        return (nu + 1) * nu * ratio / (nu + ratio) ** 2


TAILS = {"student": Tail(DEGREES), "qlike": Tail(None)}


def fit_variance(columns: F64, squares: F64, penalty: F64, tail: Tail) -> F64:
    """Regress the log variance of squared returns on columns; the intercept comes first.

    It begins with least squares of logarithms, as HAR, and goes on to the largest likelihood, less
    a penalty on each coefficient.
    """
    rows = np.hstack([np.ones((len(columns), 1)), columns])
    ridge = np.diag(np.append(0.0, penalty))
    mean = float(squares.mean())
    if not mean > 0:
        raise ValueError("what follows never varies: no volatility can be fitted")
    logs = np.log(np.maximum(squares, FLOOR * mean))
    count = len(rows)
    found = np.asarray(
        np.linalg.solve(rows.T @ rows / count + ridge, rows.T @ logs / count), np.float64
    )
    found[0] += level(squares, rows @ found)
    for _ in range(STEPS):
        ratio = squares * np.exp(-(rows @ found))
        slope = rows.T @ (1 - tail.weight(ratio) * ratio) / count + ridge @ found
        bend = (rows.T * np.maximum(tail.curvature(ratio), LEAST)) @ rows / count + ridge
        step = np.linalg.solve(bend, slope)
        size = float(abs(step).max())
        found = found - step / max(1.0, size)
        if size < CLOSE:
            break
    return found


def fit_mean(columns: F64, relative: F64, ridge: float) -> F64:
    """Regress returns over their volatility on columns, shrunk a lot; the intercept comes first."""
    rows = np.hstack([np.ones((len(columns), 1)), columns])
    penalty = ridge * np.eye(rows.shape[1])
    count = len(rows)
    return np.asarray(
        np.linalg.solve(rows.T @ rows / count + penalty, rows.T @ relative / count), np.float64
    )


def level(squares: F64, log_variance: F64) -> float:
    """Return what has to be added to forecasts, so that the mean of outcome over forecast is 1.

    A single wrong price would decide that alone, so a return counts as ten standard deviations at
    most.
    """
    found = 0.0
    for _ in range(STEPS):
        ratio = np.minimum(squares * np.exp(-log_variance - found), LARGEST)
        step = float(np.log(np.mean(ratio)))
        found += step
        if abs(step) < CLOSE:
            break
    return found
