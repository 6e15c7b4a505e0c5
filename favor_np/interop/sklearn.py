"""Estimators for scikit-learn that are one attention state: fitted by folding, read by attending.

Softmax attention is Nadaraya-Watson regression: the prediction at x is the mean of all known y,
with weights that fall with the distance.  What FAVOR+ needs of the data for it is a state of fixed
size, which can be continued (`partial_fit`) and added to another (`merge`): fits in parts, or in
parallel, are those of all rows at once.

Rows are put on a sphere first, with a constant as one more coordinate: their softmax weights then
depend on angles alone, no row outweighs others by its length, and random features are at their
best.  The map is calibrated on normal rows, not on the data, and so the same in every part.

Needs scikit-learn: ``pip install 'favor_np[sklearn]'``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data

from favor_np import validation
from favor_np.features import FeatureMap, feature_map
from favor_np.sphere import on_sphere, sphere_map
from favor_np.state import AttentionState

from ._windows import PerformerClassifier, PerformerRegressor

__all__ = [
    "FavorClassifier",
    "FavorFeatures",
    "FavorRegressor",
    "PerformerClassifier",
    "PerformerRegressor",
]

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
DTYPES = (np.float64, np.float32)
#: The largest number must lie between these, for squares of rows to be added up, by the dtype.
SIZES = {"float64": (1e-140, 1e150), "float32": (1e-30, 1e30)}


def _check_size(X: Array, y: Array, dtype: Any) -> None:
    """Refuse numbers so large or small that sums of their squares would be infinite or zero."""
    least, most = SIZES[np.dtype(dtype).name]
    for name, array, low in (("X", X, least), ("y", y, 0.0)):
        largest = float(np.abs(array).max(initial=0))
        if largest and not low <= largest <= most:
            raise ValueError(
                f"{name} must have its largest number between {low:g} and {most:g}, "
                f"got {largest:.3g}: scale it first"
            )


def _seed(random_state: Any) -> int:
    """Return the seed of a map."""
    return int(check_random_state(random_state).randint(2**31 - 1))


@dataclass
class _Moments:
    """Count, mean and centred products of rows: enough for a regression, and they add up."""

    count: float
    mean: F64
    products: F64

    @classmethod
    def of(cls, rows: F64) -> _Moments:
        """Return those of some rows."""
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def __add__(self, other: _Moments) -> _Moments:
        """Return those of both (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        products = self.products + other.products
        products += np.outer(shift, shift) * (self.count * other.count / count)
        return _Moments(count, self.mean + shift * (other.count / count), products)

    def slopes(self, columns: int, ridge: float) -> F64:
        """Regress the last columns on the first ones, shrunk a little; shape (columns, others)."""
        inner, cross = self.products[:columns, :columns], self.products[:columns, columns:]
        penalty = ridge * np.trace(inner) / columns
        if not penalty > 0:  # rows that are all the same
            return np.zeros_like(cross)
        return np.asarray(np.linalg.solve(inner + penalty * np.eye(columns), cross))


class _Attention(BaseEstimator):
    """What regression and classification share: values of any kind, smoothed over rows of X."""

    def __init__(
        self,
        num_features: int = 256,
        *,
        scale: float = 16.0,
        linear: bool = True,
        ridge: float = 1e-3,
        random_state: Any = 0,
    ) -> None:
        self.num_features = num_features
        self.scale = scale
        self.linear = linear
        self.ridge = ridge
        self.random_state = random_state

    state_: AttentionState
    moments_: _Moments

    def merge(self, other: Self) -> Self:
        """Add what another estimator was fitted on, in place.

        Parameters
        ----------
        other : estimator
            Fitted with the same parameters on other rows; it is not changed.

        Returns
        -------
        estimator
            This one.

        Raises
        ------
        TypeError
            If `other` is no estimator of this class.
        ValueError
            If its parameters, columns or classes differ.
        """
        check_is_fitted(self)
        if type(other) is not type(self):
            raise TypeError(f"other must be a {type(self).__name__}, got {validation.got(other)}")
        check_is_fitted(other)
        if self.get_params() != other.get_params():
            raise ValueError("other must have the same parameters")
        self._check_merge(other)
        self.state_.merge(other.state_)
        self.moments_ = self.moments_ + other.moments_
        return self

    def _check_merge(self, other: Self) -> None:
        if self.n_features_in_ != other.n_features_in_:
            raise ValueError(
                f"other must have {self.n_features_in_} columns, got {other.n_features_in_}"
            )

    def _begin(self, X: Array, outputs: int) -> None:
        """Draw the map, and make a state that knows nothing."""
        dim = X.shape[1]
        seed = _seed(self.random_state)
        fm = sphere_map(dim, self.num_features, self.scale, seed, X.dtype.type)
        ridge = self.ridge
        if not (np.isfinite(ridge) and ridge > 0):
            raise ValueError(f"ridge must be finite and greater than 0, got {ridge}")
        columns = dim + outputs
        self.state_ = AttentionState(fm, columns if self.linear else outputs, dtype=X.dtype)
        self.moments_ = _Moments(0.0, np.zeros(columns), np.zeros((columns, columns)))

    def _fold(self, X: Array, values: Array) -> None:
        """Take rows and their values."""
        both = np.hstack([X, values]).astype(X.dtype, copy=False)
        self.state_.update(on_sphere(X), both if self.linear else both[:, X.shape[1] :])
        self.moments_ = self.moments_ + _Moments.of(both.astype(np.float64))

    def _smooth(self, X: Array) -> F64:
        """Weighted means of the values around a regression: those of ``y - X b``, plus ``x b``."""
        columns = X.shape[1]
        rows = on_sphere(X.astype(self.state_.dtype, copy=False))
        means = self.state_.attend(rows).astype(np.float64)
        if not self.linear:
            return np.asarray(means)
        slopes = self.moments_.slopes(columns, self.ridge)
        return np.asarray(means[:, columns:] + (X - means[:, :columns]) @ slopes)


class FavorRegressor(RegressorMixin, _Attention):
    """Kernel regression in linear time, from a state that can be continued and merged.

    Parameters
    ----------
    num_features : int
        Random features M, an even number: more are more exact.
    scale : float
        Weights are exp(scale cos a), a the angle between two rows with a last column of
        sqrt(columns): a larger one looks nearer.  Columns should have variance one
        (`StandardScaler`).
    linear : bool
        Smooth what a linear regression leaves over, which is right at the edges and beyond.
    ridge : float
        Of this regression, in units of the mean variance of the columns.
    random_state : int, RandomState or None
        Of the features; an int where estimators are merged.

    Attributes
    ----------
    state_ : AttentionState
        What the rows have left behind.
    n_features_in_ : int
        Columns of X.
    feature_names_in_ : ndarray
        Their names, where they have some.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.interop.sklearn import FavorRegressor
    >>> X = np.random.default_rng(0).standard_normal((20_000, 2))
    >>> y = np.sin(2 * X[:, 0]) + X[:, 1]
    >>> whole = FavorRegressor().fit(X, y)
    >>> whole.score(X, y) > 0.85
    True
    >>> halves = [FavorRegressor().fit(X[i::2], y[i::2]) for i in (0, 1)]
    >>> merged = halves[0].merge(halves[1])
    >>> bool(np.allclose(merged.predict(X), whole.predict(X)))
    True
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Forget all, and fold these rows.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            The rows.
        y : array_like, shape (n,) or (n, outputs)
            What is known of them.

        Returns
        -------
        FavorRegressor
        """
        return self._take(X, y, reset=True)

    def partial_fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fold more rows: as if they had been there from the beginning.

        Parameters
        ----------
        X, y : array_like
            As `fit`.

        Returns
        -------
        FavorRegressor
        """
        return self._take(X, y, reset=not hasattr(self, "state_"))

    def predict(self, X: npt.ArrayLike) -> Array:
        """Predict.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            The rows.

        Returns
        -------
        ndarray, shape (n,) or (n, outputs)
        """
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=DTYPES, reset=False)
        found = self._smooth(rows).astype(rows.dtype, copy=False)
        return found[:, 0] if self._flat else found

    def _take(self, X: npt.ArrayLike, y: npt.ArrayLike, *, reset: bool) -> Self:
        rows, values = validate_data(
            self, X, y, dtype=DTYPES, multi_output=True, y_numeric=True, reset=reset
        )
        _check_size(rows, values, rows.dtype if reset else self.state_.dtype)
        if reset:
            self._flat = values.ndim == 1
            self._begin(rows, 1 if self._flat else values.shape[1])
        self._fold(rows.astype(self.state_.dtype, copy=False), values.reshape(len(rows), -1))
        return self

    def __sklearn_tags__(self) -> Any:
        """Say that y may have several columns, and that a mean alone fits no line."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.regressor_tags.poor_score = not self.linear
        return tags


class FavorClassifier(ClassifierMixin, _Attention):
    """Kernel classification in linear time: `FavorRegressor` of what is 1 for one class.

    Parameters
    ----------
    num_features : int
        Random features M, an even number: more are more exact.
    scale : float
        As `FavorRegressor`.
    linear : bool
        As `FavorRegressor`.
    ridge : float
        As `FavorRegressor`.
    random_state : int, RandomState or None
        As `FavorRegressor`.

    Attributes
    ----------
    classes_ : ndarray
        The classes.
    state_ : AttentionState
        What the rows have left behind.
    n_features_in_ : int
        Columns of X.
    feature_names_in_ : ndarray
        Their names, where they have some.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.interop.sklearn import FavorClassifier
    >>> X = np.random.default_rng(0).standard_normal((20_000, 2))
    >>> y = np.where(X[:, 0] * X[:, 1] > 0, "same", "other")
    >>> model = FavorClassifier().fit(X, y)
    >>> model.score(X, y) > 0.95
    True
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Forget all, and fold these rows.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            The rows.
        y : array_like, shape (n,)
            Their classes.

        Returns
        -------
        FavorClassifier
        """
        return self._take(X, y, None, reset=True)

    def partial_fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None
    ) -> Self:
        """Fold more rows: as if they had been there from the beginning.

        Parameters
        ----------
        X, y : array_like
            As `fit`.
        classes : array_like, optional
            All classes that there will be; the first call needs them.

        Returns
        -------
        FavorClassifier
        """
        first = not hasattr(self, "state_")
        if first and classes is None:
            raise ValueError("classes must be given to the first call of partial_fit")
        if (
            not first
            and classes is not None
            and list(unique_labels(classes)) != list(self.classes_)
        ):
            raise ValueError(f"classes must be those of the first call, {list(self.classes_)}")
        return self._take(X, y, classes, reset=first)

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Predict the probability of each class.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            The rows.

        Returns
        -------
        ndarray, shape (n, classes)
            They sum to 1; the order is that of `classes_`.
        """
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=DTYPES, reset=False)
        found = np.maximum(self._smooth(rows), np.finfo(np.float32).tiny)
        return np.asarray(found / found.sum(1, keepdims=True))

    def predict(self, X: npt.ArrayLike) -> Array:
        """Predict the most likely class.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            The rows.

        Returns
        -------
        ndarray, shape (n,)
        """
        likely = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[likely])

    def _take(
        self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None, *, reset: bool
    ) -> Self:
        rows, labels = validate_data(self, X, y, dtype=DTYPES, reset=reset)
        check_classification_targets(labels)
        _check_size(rows, np.zeros(0), rows.dtype if reset else self.state_.dtype)
        if reset:
            self.classes_ = unique_labels(labels if classes is None else classes)
            self._begin(rows, len(self.classes_))
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown):
            raise ValueError(f"y has classes that were not known before: {list(unknown)}")
        values = labels[:, None] == self.classes_
        self._fold(rows.astype(self.state_.dtype, copy=False), values.astype(self.state_.dtype))
        return self

    def _check_merge(self, other: Self) -> None:
        super()._check_merge(other)
        if not np.array_equal(self.classes_, other.classes_):
            raise ValueError(f"other must have the classes {list(self.classes_)}")


class FavorFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Positive random features of the softmax kernel, or of the Gaussian one: see `RBFSampler`.

    The product of two rows estimates ``exp(scale x.x')``, or ``exp(-scale |x - x'|² / 2)``.  They
    are never negative, and where the kernel is small they are as well, which cosines are not.

    Parameters
    ----------
    num_features : int
        Random features M, an even number: more are more exact.
    kernel : {"softmax", "gaussian"}
        What is estimated.
    scale : float, optional
        Default: 1 / columns.  `RBFSampler` calls half of it gamma.
    random_state : int, RandomState or None
        Of the features.

    Attributes
    ----------
    feature_map_ : FeatureMap
        The map.
    n_features_in_ : int
        Columns of X.
    feature_names_in_ : ndarray
        Their names, where they have some.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.interop.sklearn import FavorFeatures
    >>> X = np.random.default_rng(0).standard_normal((5, 3))
    >>> phi = FavorFeatures(4096).fit_transform(X)
    >>> bool(np.allclose(phi @ phi.T, np.exp(X @ X.T / 3), rtol=0.15))
    True
    """

    def __init__(
        self,
        num_features: int = 256,
        *,
        kernel: str = "softmax",
        scale: float | None = None,
        random_state: Any = 0,
    ) -> None:
        self.num_features = num_features
        self.kernel = kernel
        self.scale = scale
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: object = None) -> Self:  # noqa: ARG002
        """Draw the features: of X only its shape counts.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            Rows.
        y : object
            Not used.

        Returns
        -------
        FavorFeatures
        """
        rows = validate_data(self, X, dtype=DTYPES)
        validation.choice("kernel", self.kernel, ("softmax", "gaussian"))
        dim = rows.shape[1]
        scale = 1.0 / dim if self.scale is None else self.scale
        seed = _seed(self.random_state)
        self.feature_map_: FeatureMap = feature_map(
            "positive", dim, self.num_features, scale=scale, rng=seed
        )
        self._n_features_out = self.feature_map_.num_features
        return self

    def transform(self, X: npt.ArrayLike) -> Array:
        """Compute the features.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            The rows.

        Returns
        -------
        ndarray, shape (n, num_features)
        """
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=DTYPES, reset=False)
        features = self.feature_map_.key_features(rows)
        if self.kernel == "gaussian":
            squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
            features = features * np.exp(-0.5 * self.feature_map_.scale * squares)[:, None]
        return features.astype(rows.dtype, copy=False)

    def __sklearn_tags__(self) -> Any:
        """Say that float32 stays float32."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
