"""A forecast of volatility that begins as HAR, and learns from the past what HAR gets wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from favor_np import validation

from ._baselines import HAR, Parameters, returns_of
from ._windows import F32, F64


@dataclass
class FavorHAR(Parameters):
    """HAR times what followed, over what HAR had said, in past times like the present one.

    Times are alike where the log mean squares of the last 1, 5, 22 and 100 returns are: the
    correction is the mean of all past ratios, weighted by attention over these four numbers.  If
    HAR is right everywhere, the ratios are noise around 1, and little is changed.  Nothing is
    trained but the regression: to fit is to fold the past into a state.

    Parameters
    ----------
    spans : tuple of int
        Returns in each mean.
    window : int, optional
        Last rows that the regression looks at; None: all.
    num_features : int
        Features M of the FAVOR+ map, an even number.
    scale : float
        Of attention, between rows on a sphere: a larger one looks nearer.
    seed : int
        Of the features.

    Examples
    --------
    >>> from favor_np.forecast import HAR, FavorHAR, backtest, read_prices, samples
    >>> X, y = samples(read_prices())
    >>> ours = backtest(FavorHAR(), X, y, refit=1000)
    >>> ours
    <Backtest: 9,224 forecasts, 10 fits, qlike 2.6..., R² +0.1...>
    >>> ours.score < backtest(HAR(), X, y, refit=1000).score
    True
    """

    spans: tuple[int, ...] = (1, 5, 22, 100)
    window: int | None = None
    num_features: int = 256
    scale: float = 16.0
    seed: int = 0

    @property
    def context(self) -> int:
        """Rows before that a prediction takes."""
        return max(self.spans) - 1

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Regress, and fold what the regression gets wrong."""
        from favor_np.sphere import sphere_map
        from favor_np.state import AttentionState

        validation.integer("num_features", self.num_features, minimum=2)
        scale = validation.positive_float("scale", self.scale)
        self.har_ = HAR(self.spans, self.window).fit(X, y)
        logs = self.har_.features(returns_of(X))
        self.centre_, spread = logs.mean(0), logs.std(0)
        self.spread_ = np.where(spread > 0, spread, 1.0)
        fm = sphere_map(len(self.spans), self.num_features, scale, self.seed, np.float32)
        ratios = np.asarray(y, np.float64) / self.har_.variance(logs)
        self.state_ = AttentionState(fm, value_dim=1)
        self.state_.update(self._rows(logs), ratios[:, None])
        return self

    def predict(self, X: npt.ArrayLike) -> F64:
        """Return the variance after each row, from the rows up to it."""
        logs = self.har_.features(returns_of(X))
        ratio = self.state_.attend(self._rows(logs))[:, 0].astype(np.float64)
        return np.asarray(self.har_.variance(logs) * ratio)

    def _rows(self, logs: F64) -> F32:
        from favor_np.sphere import on_sphere

        rows: F32 = on_sphere((logs - self.centre_) / self.spread_).astype(np.float32)
        return rows
