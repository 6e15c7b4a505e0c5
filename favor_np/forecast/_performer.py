"""A causal Performer that begins as a regression on moving averages and learns what it misses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.progress import Progress, reporting

from ._baselines import Parameters
from ._inputs import Memory
from ._residual import Effort, Learned, Targets, apply, network, train
from ._scores import qlike
from ._start import TAILS, fit_mean, fit_variance, level
from ._windows import F64

if TYPE_CHECKING:
    from favor_np.nn.checkpoint import Checkpoint
    from favor_np.nn.layer import Layer
    from favor_np.nn.tree import Params

TARGETS = ("volatility", "return")
MEAN_RIDGE = 1.0  # of the regression of returns themselves: half of what is there remains
OTHERS_RIDGE = 0.1  # of columns that are not made of returns, such as hours: part of `ridge`
FEWEST = 100  # rows to fit
SCORES = 1000  # last errors that intervals are made of
#: What a file has beside the model: arrays, and what JSON can hold.
SAVED = ("start", "scores", "recent")
FACTS = ("loss_curve", "validation_scores", "n_iter", "best_loss")
KIND = "favor_np.forecast.PerformerForecaster"


@dataclass
class PerformerForecaster(Parameters):
    """A small causal Performer that begins as a regression, and learns what it misses.

    The regression explains the log variance of what follows by logarithms of mean squares of
    returns (exponentially weighted with several decays, and of the last few returns, as in HAR), by
    means of returns over their volatility (falls make prices wilder than rises), and by whatever
    else is in X.  A Performer over the same columns adds to it: it begins with zero, learns by the
    likelihood of returns, and is stopped by the last part of the rows, where what it has learned
    has to be better than nothing by more than chance.  So it is never worse than its start by more
    than that.

    Parameters
    ----------
    target : {"volatility", "return"}
        Whether `predict` returns variances of returns, or returns.
    horizons : tuple of int
        Steps ahead, each predicted.
    decays : tuple of float
        Of exponentially weighted mean squares.
    spans : tuple of int
        Returns in plain mean squares.
    signed : tuple of float
        Decays of means of returns over their volatility.
    tail : {"student", "qlike"}
        The likelihood: Student's t with 5 degrees of freedom, or the normal one, which for
        volatility is the loss QLIKE.
    ridge : float
        Penalty of the regression.
    dim, depth, heads, num_features : int
        Sizes of the Performer.
    epochs : int
        Passes over the rows at most; 0 is the regression alone.
    rate : float
        Highest rate of learning.
    patience : int
        Passes without improvement after which to stop.
    validation : float
        Share of the rows, the last ones, that training is stopped by.
    members : int
        Seeds, whose Performers are averaged.
    seed : int
        The first of them.
    window : int, optional
        Last rows that a fit looks at; None: all.

    Attributes
    ----------
    model_ : favor_np.nn.Sum
        An ordinary model of `favor_np.nn`: the regression, and the Performer of each seed.
    params_ : dict
        Its parameters.  It takes the columns of `memory_` and returns, for each row, logarithms of
        variances, and for ``target="return"`` before them means in standard deviations.
    memory_ : Memory
        What makes its columns: ``memory_.columns(X)``, standardised by ``centre_`` and ``spread_``.
    start_ : ndarray, shape (columns + 1, outputs)
        The regression, intercepts first.
    loss_curve_, validation_scores_ : list of float
        Mean losses of the seeds over the rows learned from in each pass, and over the last part
        after it; the latter begins with that of the regression.
    n_iter_ : int
        Passes of the seed that took most.
    best_loss_ : float
        Mean of the validation losses of what was kept: that of the regression where nothing that a
        seed learned was better by more than chance.
    scores_ : ndarray, shape (rows, horizons)
        Errors over predicted standard deviations, of which intervals are made.
    n_features_in_ : int
        Columns of X.

    Examples
    --------
    >>> from favor_np.forecast import PerformerForecaster, read_prices, samples
    >>> X, y = samples(read_prices())
    >>> model = PerformerForecaster(members=1, epochs=2).fit(X, y)
    >>> model.predict(X)[-3:].round(1).shape
    (3,)
    >>> low, high = model.predict_interval(X)[-1]
    >>> bool(low < 0 < high)
    True
    """

    target: str = "volatility"
    horizons: tuple[int, ...] = (1,)
    decays: tuple[float, ...] = (0.0, 0.5, 0.8, 0.94, 0.97, 0.99, 0.997)
    spans: tuple[int, ...] = (1, 5, 22, 100)
    signed: tuple[float, ...] = (0.0, 0.8, 0.95)
    tail: str = "student"
    ridge: float = 0.1
    dim: int = 16
    depth: int = 1
    heads: int = 4
    num_features: int = 16
    epochs: int = 8
    rate: float = 1e-2
    patience: int = 2
    validation: float = 0.2
    members: int = 3
    seed: int = 0
    window: int | None = None

    #: Rows before that a prediction takes.
    context = 2500

    def fit(
        self,
        X: npt.ArrayLike,
        y: npt.ArrayLike | None = None,
        *,
        progress: bool | Progress | None = False,
    ) -> Self:
        """Regress, and learn what the regression misses.

        Parameters
        ----------
        X : array_like, shape (n, columns)
            Returns in the first column, whatever else is known of each row in others: see
            `inputs`.  Rows are time.
        y : array_like, shape (n,) or (n, horizons), optional
            What followed each row, NaN where it is not known: returns over each horizon, or for
            ``target="volatility"`` their squares.  Default: made of the first column.
        progress : bool or callable, optional
            As `stream_attention`; False shows nothing.

        Returns
        -------
        PerformerForecaster

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong type or shape, or the returns never vary.
        """
        targets = self._targets()
        rows = _as_rows(X)
        outcome = self._outcome(rows, y)
        last = slice(None if self.window is None else -self.window, None)
        rows, outcome = rows[last], outcome[last].copy()
        outcome[: min(max(self.spans, default=1), len(rows) // 10)] = np.nan  # averages form
        fewest = np.isfinite(outcome).sum(0).min()
        if fewest < FEWEST:
            raise ValueError(f"y must be known for at least {FEWEST} rows, got {fewest}")
        self.n_features_in_ = rows.shape[1]
        self.memory_ = Memory(self.decays, self.spans, self.signed).fit(rows)
        columns = self.memory_.columns(rows)
        learned = self._learn(columns, outcome, targets, progress) if self.epochs else []
        self.start_ = self._regress(columns, outcome, targets)
        self._assemble(learned, targets)
        logs = targets.split(self._outputs(columns))[1]
        for horizon in range(targets.horizons):
            known = np.isfinite(outcome[:, horizon])
            shift = level(outcome[known, horizon] ** 2, logs[known, horizon])
            self.start_[0, horizon - targets.horizons] += shift
            self.params_["0"]["bias"][horizon - targets.horizons] += shift
        self.loss_curve_ = _mean_curve([each.training for each in learned])
        self.validation_scores_ = _mean_curve([each.validation for each in learned])
        self.n_iter_ = max((len(each.training) for each in learned), default=0)
        self.best_loss_ = float(np.mean([each.best for each in learned] or [np.nan]))
        self.scores_ = self._scores(columns, outcome)
        self.recent_ = rows[-self.context :]
        return self

    def predict(self, X: npt.ArrayLike | None = None) -> F64:
        """Predict what follows each row, from the rows up to it.

        Parameters
        ----------
        X : array_like, shape (n, columns), optional
            The rows; those before the first are not looked at, so it should have `context` rows
            more than predictions are wanted.  Default: the last row that `fit` or `update` has
            seen, with those before it.

        Returns
        -------
        ndarray, shape (n,) or (n, horizons)
            Variances of returns over each horizon, or for ``target="return"`` returns.
        """
        mean, variance = self.moments(X)
        found = mean if self.target == "return" else variance
        return found[:, 0] if len(self.horizons) == 1 else found

    def moments(self, X: npt.ArrayLike | None) -> tuple[F64, F64]:
        """Predict mean and variance of the return that follows each row.

        Parameters
        ----------
        X : array_like, shape (n, columns), optional
            As `predict`.

        Returns
        -------
        mean, variance : ndarray, shape (n, horizons)
            The means are 0 for ``target="volatility"``.
        """
        self._check_fitted()
        rows = self.recent_ if X is None else self._rows(X)
        output = self._outputs(self.memory_.columns(rows))
        means, logs = self._targets().split(output if X is not None else output[-1:])
        variance = np.exp(logs)
        return np.asarray(means * np.sqrt(variance)), variance

    def predict_interval(self, X: npt.ArrayLike | None = None, *, coverage: float = 0.9) -> F64:
        """Predict an interval of the return that follows each row.

        Its width is a multiple of the predicted standard deviation, which would have held this
        share of the last thousand outcomes known.

        Parameters
        ----------
        X : array_like, shape (n, columns), optional
            As `predict`.
        coverage : float
            Share of outcomes that it should hold, between 0 and 1.

        Returns
        -------
        ndarray, shape (n, 2) or (n, horizons, 2)
            Lower and upper ends.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must be between 0 and 1, got {coverage}")
        mean, variance = self.moments(X)
        half = np.sqrt(variance) * self._quantiles(coverage)
        found = np.stack([mean - half, mean + half], axis=-1)
        return np.asarray(found[:, 0] if len(self.horizons) == 1 else found)

    def update(self, X: npt.ArrayLike, y: npt.ArrayLike | None = None) -> Self:
        """Take rows that follow, without fitting anew.

        ``predict()`` goes on from them, and intervals learn from what followed.

        Parameters
        ----------
        X, y : array_like
            As `fit`: the rows behind those known so far.

        Returns
        -------
        PerformerForecaster
        """
        self._check_fitted()
        new = self._rows(X)
        rows = np.concatenate([self.recent_, new])
        if y is None:
            outcome = self._outcome(rows, None)
            outcome[: len(self.recent_) - max(self.horizons)] = np.nan  # known before
        else:
            outcome = np.full((len(rows), len(self.horizons)), np.nan)
            outcome[len(self.recent_) :] = self._outcome(new, y)
        scores = self._scores(self.memory_.columns(rows), outcome)
        self.scores_ = np.concatenate([self.scores_, scores])
        self.recent_ = rows[-self.context :]
        return self

    def score(self, X: npt.ArrayLike, y: npt.ArrayLike | None = None) -> float:
        """Return minus the mean of QLIKE, or for returns R² against zero: higher is better.

        Parameters
        ----------
        X, y : array_like
            As `fit`.

        Returns
        -------
        float
            Over all rows and horizons whose outcome is known.
        """
        self._check_fitted()
        rows = self._rows(X)
        outcome = self._outcome(rows, y)
        known = np.isfinite(outcome)
        mean, variance = self.moments(rows)
        if self.target == "volatility":
            return -float(qlike(outcome[known] ** 2, variance[known]).mean())
        return 1 - float(np.sum((outcome - mean)[known] ** 2) / np.sum(outcome[known] ** 2))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, with the rows that the next forecast goes on from.

        Parameters
        ----------
        path : str or os.PathLike
            The file, in the format of safetensors; nothing is pickled.

        Raises
        ------
        ImportError
            If safetensors is missing.
        """
        from favor_np import nn

        self._check_fitted()
        arrays = {name: getattr(self, f"{name}_") for name in SAVED}
        arrays |= {name: getattr(self.memory_, f"{name}_") for name in ("centre", "spread")}
        facts = {name: getattr(self, f"{name}_") for name in FACTS}
        nn.save(
            path,
            self.model_,
            {**self.params_, "forecaster": arrays},
            kind=KIND,
            settings=self.get_params(),
            floor=self.memory_.floor_,
            facts=facts,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or os.PathLike
            The file.

        Returns
        -------
        PerformerForecaster
            Fitted, as it was.

        Raises
        ------
        ImportError
            If safetensors is missing.
        OSError
            If there is no such file.
        ValueError
            If it holds no forecaster.
        """
        from favor_np import nn

        return cls._of(nn.load(path), path)

    @classmethod
    def _of(cls, found: Checkpoint, path: str | os.PathLike[str]) -> Self:
        """Return the forecaster of a checkpoint, which was read from this file."""
        try:
            if found.info["kind"] != KIND:
                raise ValueError(f"it holds a {found.info['kind']}")
            settings: dict[str, Any] = dict(found.info["settings"])
            for name, value in settings.items():
                settings[name] = tuple(value) if isinstance(value, list) else value
            made = cls(**settings)
            made._targets()
            arrays = found.params.pop("forecaster")
            made.model_, made.params_ = found.model, found.params
            made.memory_ = Memory(made.decays, made.spans, made.signed)
            made.memory_.floor_ = float(found.info["floor"])
            made.memory_.centre_, made.memory_.spread_ = arrays["centre"], arrays["spread"]
            for name in SAVED:
                setattr(made, f"{name}_", arrays[name])
            for name in FACTS:
                setattr(made, f"{name}_", found.info["facts"][name])
            made.n_features_in_ = made.recent_.shape[1]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} holds no forecaster: {error}") from error
        return made

    # -- How it is done ---------------------------------------------------------------------------

    def _targets(self) -> Targets:
        """Check the parameters; return what is learned."""
        validation.choice("target", self.target, TARGETS)
        validation.choice("tail", self.tail, tuple(TAILS))
        for name in ("dim", "depth", "heads", "patience", "members", "num_features"):
            validation.integer(name, getattr(self, name))
        for name in ("epochs", "seed"):
            validation.integer(name, getattr(self, name), minimum=0)
        for name in ("ridge", "rate"):
            validation.positive_float(name, getattr(self, name))
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must be between 0 and 1, got {self.validation}")
        if self.window is not None:
            validation.integer("window", self.window)
        if np.ndim(self.horizons) != 1 or not len(self.horizons):
            raise ValueError(f"horizons must hold at least one integer, got {self.horizons!r}")
        for horizon in self.horizons:
            validation.integer("horizons", horizon)
        overlap = max(self.horizons)
        return Targets(len(self.horizons), self.target == "return", TAILS[self.tail], overlap)

    def _check_fitted(self) -> None:
        if not hasattr(self, "params_"):
            raise ValueError("the forecaster must be fitted first: fit(X, y)")

    def _rows(self, X: npt.ArrayLike) -> F64:
        rows = _as_rows(X)
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(f"X must have {self.n_features_in_} columns, got {rows.shape[1]}")
        return rows

    def _outcome(self, rows: F64, y: npt.ArrayLike | None) -> F64:
        """Return what followed each row: returns (n, horizons), for volatility their size alone."""
        if y is None:
            total = np.concatenate([[0.0], np.cumsum(rows[:, 0])])
            found = np.full((len(rows), len(self.horizons)), np.nan)
            for column, horizon in enumerate(self.horizons):
                count = max(len(rows) - horizon, 0)
                found[:count, column] = total[1 + horizon :] - total[1 : 1 + count]
            return found
        given = np.array(y, np.float64)
        given = given[:, None] if given.ndim == 1 else given
        if given.shape != (len(rows), len(self.horizons)):
            raise ValueError(
                f"y must have shape ({len(rows)}, {len(self.horizons)}), got {given.shape}"
            )
        if np.isinf(given).any():
            raise ValueError("y must be finite, or NaN where it is not known")
        if self.target == "return":
            return given
        if (given < 0).any():
            raise ValueError(
                'y must be squares of returns for target="volatility", got some below 0'
            )
        return np.sqrt(given)

    def _learn(
        self,
        columns: F64,
        outcome: F64,
        targets: Targets,
        progress: bool | Progress | None,
    ) -> list[Learned]:
        """Train the members on what a regression on the rows learned from leaves over."""
        held = int(len(columns) * (1 - self.validation))
        stop = max(held - max(self.horizons), 1)  # what followed later ones was not known
        if np.isfinite(outcome[:stop]).sum(0).min() < FEWEST // 2:
            raise ValueError(f"validation = {self.validation} leaves too few rows to learn from")
        base = _linear(self._regress(columns[:stop], outcome[:stop], targets), columns)
        model, learned = self._network(targets), []
        rows, split = columns.astype(np.float32), (stop, held)
        effort = Effort(self.epochs, self.rate, self.patience)
        with reporting(progress) as report:
            for member in range(self.members):

                def told(epoch: int, note: str, done: int = member * self.epochs) -> None:
                    report("training", done + epoch, self.members * self.epochs, note)

                seed = self.seed + member
                found = train(
                    model, rows, outcome, base, split, targets, effort, seed=seed, report=told
                )
                learned.append(found)
                if found.interrupted:
                    break
        return learned

    def _network(self, targets: Targets) -> Layer:
        columns = self.memory_.centre_.size
        return network(
            columns, targets.outputs, self.dim, self.depth, self.heads, self.num_features
        )

    def _regress(self, columns: F64, outcome: F64, targets: Targets) -> F64:
        """Return the regression (1 + columns, outputs), at the level of the likelihood."""
        own = self.memory_.own
        penalty = np.full(columns.shape[1], self.ridge)
        penalty[own:] *= OTHERS_RIDGE
        logs, means = [], []
        for moves in outcome.T:
            known = np.isfinite(moves)
            rows, moves = columns[known], moves[known]
            logs.append(fit_variance(rows, moves**2, penalty, targets.tail))
            if targets.means:
                relative = moves * np.exp(-_linear(logs[-1], rows) / 2)
                means.append(fit_mean(rows, relative, MEAN_RIDGE))
        return np.stack(means + logs, axis=1)

    def _assemble(self, learned: list[Learned], targets: Targets) -> None:
        """Put the regression and the mean of the members into one model."""
        from favor_np import nn

        columns = self.memory_.centre_.size
        self.model_: Layer = nn.Sum(
            (nn.Linear(columns, targets.outputs), *[self._network(targets)] * len(learned))
        )
        regression = self.start_.astype(np.float32)
        self.params_: Params = {"0": {"weight": regression[1:].T.copy(), "bias": regression[0]}}
        for number, each in enumerate(learned, 1):
            for array in each.params["2"].values():
                array /= len(learned)
            self.params_[str(number)] = each.params

    def _outputs(self, columns: F64) -> F64:
        return apply(self.model_, self.params_, columns.astype(np.float32))

    def _scores(self, columns: F64, outcome: F64) -> F64:
        """Return errors over predicted standard deviations, of the last rows with an outcome."""
        means, logs = self._targets().split(self._outputs(columns))
        errors = abs(outcome * np.exp(-logs / 2) - means)
        return np.asarray(errors[np.isfinite(errors).any(1)][-SCORES:])

    def _quantiles(self, coverage: float) -> F64:
        """Return the errors that this share of the last ones is not above, one a horizon."""
        found = []
        for errors in self.scores_[-SCORES:].T:
            ranked = np.sort(errors[np.isfinite(errors)])
            place = int(np.ceil(coverage * (len(ranked) + 1))) - 1
            found.append(ranked[min(max(place, 0), len(ranked) - 1)])
        return np.array(found)


def _as_rows(X: npt.ArrayLike) -> F64:
    rows = np.asarray(X, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"X must have shape (n, columns), not empty, got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("X must be finite")
    return rows


def _linear(coefficients: F64, columns: F64) -> F64:
    """Return what a regression says, intercepts first."""
    return np.asarray(coefficients[0] + columns @ coefficients[1:])


def _mean_curve(curves: list[list[float]]) -> list[float]:
    """Return the means of curves, of which the shorter ones stay where they end."""
    length = max(map(len, curves), default=0)
    whole = [curve + curve[-1:] * (length - len(curve)) for curve in curves]
    return [float(np.mean(values)) for values in zip(*whole, strict=True)]
