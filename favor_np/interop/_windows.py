"""Estimators for scikit-learn that are a trained Performer: each row of X is a window."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from favor_np import nn, validation
from favor_np.nn.layer import Key, Pullback, part
from favor_np.nn.tree import Params

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]

RIDGE = 1e-3  # of the linear regression that training begins with, a row and a column of variance 1
FEWEST = 30  # rows below which this regression is all


def _scales(columns: F64) -> tuple[F64, F64]:
    """Return means and standard deviations, 1 for 0: also where squares are beyond float64."""
    centre = columns.mean(0)
    unit = np.ldexp(1.0, np.frexp(np.abs(columns - centre).max(0))[1])
    spread = (columns / unit).std(0) * unit
    return centre, np.where(spread > 0, spread, 1.0)


@dataclass(frozen=True)
class _Last(nn.Layer):
    """What a body makes of the last step of windows, whose steps are `channels` numbers each."""

    body: nn.Layer
    channels: int

    @cached_property
    def parts(self) -> dict[str, nn.Layer]:
        return {"body": self.body}

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        steps = np.reshape(x, (len(x), -1, self.channels))
        y, pull = part(self.body, "body", params, steps, key)

        def pullback(grad: Array, grads: Params) -> Array:
            whole = np.zeros_like(y)
            whole[:, -1] = grad
            back: Array = pull(whole, grads)
            return back.reshape(np.shape(x))

        return np.ascontiguousarray(y[:, -1]), pullback


class _Performer(BaseEstimator):
    """What regression and classification share: scaling, the model, and training."""

    def __init__(
        self,
        channels: int = 1,
        *,
        dim: int = 32,
        depth: int = 1,
        heads: int = 4,
        num_features: int = 32,
        epochs: int = 50,
        batch: int = 64,
        rate: float = 3e-3,
        patience: int = 5,
        validation: float = 0.1,
        dropout: float = 0.1,
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        self.channels = channels
        self.dim = dim
        self.depth = depth
        self.heads = heads
        self.num_features = num_features
        self.epochs = epochs
        self.batch = batch
        self.rate = rate
        self.patience = patience
        self.validation = validation
        self.dropout = dropout
        self.random_state = random_state
        self.verbose = verbose

    model_: nn.Layer
    params_: Params

    def _begin(self, X: F64) -> F64:
        """Check the parameters, and take the scale of columns; return them in it."""
        for name in ("channels", "depth", "batch", "patience"):
            validation.integer(name, getattr(self, name))
        validation.integer("epochs", self.epochs, minimum=0)
        validation.positive_float("rate", self.rate)
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must be between 0 and 1, got {self.validation}")
        if X.shape[1] % self.channels:
            raise ValueError(
                f"the columns of X must be a multiple of channels = {self.channels}, got "
                f"{X.shape[1]}"
            )
        self.centre_, self.spread_ = _scales(X)
        return self._scaled(X)

    def _scaled(self, X: F64) -> F64:
        return np.asarray((X - self.centre_) / self.spread_)

    def _learn(
        self, X: F64, start: tuple[F64, F64], targets: Array, held: Array, loss: Any
    ) -> None:
        """Begin with a linear map (weights, bias), and train; rows in `held` say when to stop."""
        weights, bias = start
        columns, outputs = X.shape[1], len(bias)
        body = nn.Performer(
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            num_features=self.num_features,
            causal=True,
            dropout=self.dropout,
        )
        steps = (
            nn.Linear(self.channels, self.dim),
            nn.SinusoidalPositions(self.dim),
            body,
            nn.Linear(self.dim, outputs, std=0.0),
        )
        self.model_ = nn.Sum((nn.Linear(columns, outputs), _Last(nn.Chain(steps), self.channels)))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        params = self.model_.init(np.random.default_rng(seed))
        params["0"] = {"weight": weights.astype(np.float32), "bias": bias.astype(np.float32)}
        self.params_, self.loss_curve_, self.validation_scores_ = params, [], []
        self.n_iter_, self.best_loss_ = 0, np.nan
        if not self.epochs or len(X) < FEWEST:
            return
        rows = X.astype(np.float32)
        learned = np.setdiff1d(np.arange(len(X)), held)
        each = -(-len(learned) // self.batch)

        def batches(step: int) -> tuple[F32, Array]:
            order = np.random.default_rng((seed, step // each)).permutation(learned)
            some = np.array_split(order, each)[step % each]
            return rows[some], targets[some]

        begin = {name: array.copy() for name, array in params["0"].items()}
        blank = self.model_.init(np.random.default_rng(seed)) | {"0": begin}
        before = loss(self.model_.apply(params, rows[held]), targets[held])[0]
        total = self.epochs * each
        with warnings.catch_warnings():
            # The features are not redrawn: they need not be those of softmax attention.
            warnings.filterwarnings("ignore", ".*no longer approximate softmax", RuntimeWarning)
            history = nn.train(
                self.model_,
                params,
                batches,
                steps=total,
                rate=nn.cosine(self.rate, steps=total, warmup=max(total // 20, 1)),
                loss=loss,
                optimizer=nn.AdamW(params, weight_decay=0.01),
                seed=seed,
                validation_batches=[(rows[held], targets[held])],
                every=each,
                patience=self.patience,
                progress=bool(self.verbose),
            )
        losses = np.array_split(history.losses, range(each, len(history.losses), each))
        self.loss_curve_ = [float(part.mean()) for part in losses]
        self.validation_scores_ = [before, *(value for _, value in history.validation)]
        self.n_iter_, self.best_loss_ = len(losses), min(self.validation_scores_)
        better = history.best is not None and history.best[1] < before
        self.params_ = history.best_params if better and history.best_params else blank

    def _outputs(self, X: npt.ArrayLike) -> F64:
        """Return the outputs for rows, in float64: they do not depend on the rows beside them."""
        check_is_fitted(self)
        rows = self._scaled(validate_data(self, X, dtype=np.float64, reset=False))
        return np.asarray(self.model_.apply(nn.astype(self.params_, np.float64), rows))

    def _held(self, groups: list[Array]) -> Array:
        """Return the last rows of each group: those that training is stopped by."""
        last = [rows[len(rows) - int(np.ceil(self.validation * len(rows))) :] for rows in groups]
        return np.sort(np.concatenate(last))


class PerformerRegressor(RegressorMixin, _Performer):
    """Regression on windows by a small Performer, which begins as a linear regression.

    Each row of X is a sequence of steps, the last one the newest, and rows are independent.  The
    Performer is added to a ridge regression, begins with zero, and is stopped by the last part of
    the rows; if it is no better there, the regression is what remains.

    Parameters
    ----------
    channels : int
        Numbers of each step: a row has those of the first step, then those of the second, and so
        on.
    dim, depth, heads, num_features : int
        Sizes of the Performer.
    epochs : int
        Passes over the rows at most.
    batch : int
        Rows of a step of training.
    rate : float
        Highest rate of learning.
    patience : int
        Passes without improvement after which to stop.
    validation : float
        Share of the rows, the last ones, that training is stopped by.
    dropout : float
        Share dropped in training.
    random_state : int, RandomState or None
        Of first parameters, of the order of rows, and of dropout.
    verbose : bool
        Whether to show a progress bar.

    Attributes
    ----------
    model_ : Layer
        The model, of `favor_np.nn`, for columns of mean 0 and variance 1.
    params_ : dict
        Its parameters.
    loss_curve_, validation_scores_ : list of float
        Mean loss of each pass, and that of the last part: before the first pass, and after each.
    n_iter_ : int
        Passes.
    best_loss_ : float
        Least loss of the last part.
    n_features_in_ : int
        Columns of X.
    feature_names_in_ : ndarray
        Their names, where they have some.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.interop.sklearn import PerformerRegressor
    >>> X = np.random.default_rng(0).standard_normal((2000, 16))
    >>> y = np.abs(X[:, -4:]).max(1)  # no linear regression finds that
    >>> model = PerformerRegressor(epochs=20).fit(X[:1500], y[:1500])
    >>> model.score(X[1500:], y[1500:]) > 0.3
    True
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Train.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            Windows.
        y : array_like, shape (n,) or (n, outputs)
            What is known of them.

        Returns
        -------
        PerformerRegressor
        """
        rows, values = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True
        )
        self._flat = values.ndim == 1
        values = values.reshape(len(rows), -1).astype(np.float64)
        rows = self._begin(rows)
        self._mean, self._unit = _scales(values)
        values = (values - self._mean) / self._unit
        ridge = RIDGE * len(rows) * np.eye(rows.shape[1])
        weights = np.linalg.solve(rows.T @ rows + ridge, rows.T @ values).T
        start = weights, np.zeros(len(weights))
        held = self._held([np.arange(len(rows))])
        self._learn(rows, start, values.astype(np.float32), held, nn.mean_squared)
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Predict.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            Windows.

        Returns
        -------
        ndarray, shape (n,) or (n, outputs)
        """
        found = self._outputs(X) * self._unit + self._mean
        return np.asarray(found[:, 0] if self._flat else found)

    def __sklearn_tags__(self) -> Any:
        """Say that y may have several columns."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class PerformerClassifier(ClassifierMixin, _Performer):
    """Classification of windows by a small Performer, which begins as logistic regression.

    As `PerformerRegressor`, but for the loss, and that training is stopped by the last rows of each
    class.

    Parameters
    ----------
    channels, dim, depth, heads, num_features, epochs, batch, rate, patience, validation, dropout, \
random_state, verbose
        As for `PerformerRegressor`.

    Attributes
    ----------
    classes_ : ndarray
        The classes.
    model_ : Layer
        The model, of `favor_np.nn`, for columns of mean 0 and variance 1.
    params_ : dict
        Its parameters.
    loss_curve_, validation_scores_, n_iter_, best_loss_
        As of `PerformerRegressor`.
    n_features_in_ : int
        Columns of X.
    feature_names_in_ : ndarray
        Their names, where they have some.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.interop.sklearn import PerformerClassifier
    >>> X = np.random.default_rng(0).standard_normal((2000, 16))
    >>> y = np.where(np.abs(X[:, -4:]).max(1) > 1.5, "wild", "calm")
    >>> model = PerformerClassifier(epochs=20).fit(X[:1500], y[:1500])
    >>> model.score(X[1500:], y[1500:]) > 0.65
    True
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Train.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            Windows.
        y : array_like, shape (n,)
            Their classes.

        Returns
        -------
        PerformerClassifier
        """
        rows, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y must hold at least two classes, got one class")
        rows = self._begin(rows)
        linear = LogisticRegression(max_iter=1000).fit(rows, numbers)
        weights, bias = linear.coef_, linear.intercept_
        if len(bias) == 1:  # of two classes the first has zeros
            weights, bias = np.vstack([0 * weights, weights]), np.append(0.0, bias)
        held = self._held([np.flatnonzero(numbers == number) for number in np.unique(numbers)])
        self._learn(rows, (weights, bias), numbers, held, nn.cross_entropy)
        return self

    def predict_proba(self, X: npt.ArrayLike) -> F64:
        """Predict the probability of each class.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            Windows.

        Returns
        -------
        ndarray, shape (n, classes)
            They sum to 1; the order is that of `classes_`.
        """
        logits = self._outputs(X)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def predict(self, X: npt.ArrayLike) -> Array:
        """Predict the most likely class.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            Windows.

        Returns
        -------
        ndarray, shape (n,)
        """
        likely = self._outputs(X).argmax(1)
        return np.asarray(self.classes_[likely])
