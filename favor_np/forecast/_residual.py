"""What a small causal Performer adds to a regression: how it is made, and how it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._scores import standard_error
from ._start import Tail
from ._windows import F32, F64

if TYPE_CHECKING:
    from favor_np.nn.layer import Layer
    from favor_np.nn.tree import Params

#: Rows of a sequence in training, and those at its beginning that are not learned from: what heads
#: remember from before it is missing there.
LENGTH, WARM_UP = 512, 128
PIECE = (
    256  # rows that are predicted at a time, always as many, so that bits depend on no later row
)
BATCH = 2  # sequences of a step
CLIP = 1.0
CLEAR = 1.645  # standard errors: the upper twentieth of a normal distribution


@dataclass(frozen=True)
class Targets:
    """What is learned, and by which likelihood.

    Outputs are logarithms of variances, one a horizon; where returns themselves are learned, their
    means over the standard deviation come first.
    """

    horizons: int
    means: bool
    tail: Tail
    overlap: int = 1  # rows that outcomes span: those of neighbours overlap

    @property
    def outputs(self) -> int:
        """Numbers that the model returns for a row."""
        return self.horizons * (1 + self.means)

    def split(self, output: Any) -> tuple[Any, Any]:
        """Return the means in standard deviations, 0 if there are none, and the log variances."""
        if not self.means:
            return 0.0, output
        return output[..., : self.horizons], output[..., self.horizons :]

    def losses(self, output: Any, outcome: Any) -> Any:
        """Minus twice the log-likelihood of each outcome; NaN where it is not known."""
        mean, log_variance = self.split(np.asarray(output, np.float64))
        ratio = (outcome * np.exp(-log_variance / 2) - mean) ** 2
        return self.tail.loss(ratio, log_variance)

    def loss(self, output: Any, outcome: Any) -> tuple[float, Any]:
        """Mean of minus twice the log-likelihood over outcomes that are known, and its gradient.

        Outcomes are returns; their signs do not count where only the variance is learned.
        """
        known = np.isfinite(outcome)
        count = max(int(known.sum()), 1)
        total = np.nansum(self.losses(output, outcome))
        mean, log_variance = self.split(np.asarray(output, np.float64))
        relative = np.where(known, outcome, 0.0) * np.exp(-log_variance / 2)
        surprise = relative - mean
        weight = self.tail.weight(surprise**2)
        slope = np.where(known, 1 - weight * surprise * relative, 0.0)
        if self.means:
            slope = np.concatenate([np.where(known, -2 * weight * surprise, 0.0), slope], axis=-1)
        return float(total) / count, slope / count


def network(columns: int, outputs: int, dim: int, depth: int, heads: int, features: int) -> Layer:
    """Return the model of one seed: it begins with returning zeros."""
    from favor_np import nn

    decays = tuple(1 - 2.0 ** -(2 + 4.5 * head / max(heads - 1, 1)) for head in range(heads))
    body = nn.Performer(
        dim=dim,
        depth=depth,
        heads=heads,
        num_features=features,
        causal=True,
        decay=decays,
        hidden=2 * dim,
        dropout=0.1,
    )
    return nn.Chain((nn.Linear(columns, dim), body, nn.Linear(dim, outputs, std=0.0)))


@dataclass
class Learned:
    """The parameters of one seed, and its mean losses: `validation` begins before any pass.

    `best` is the validation loss of the parameters, those of zero outputs if nothing was better.
    """

    params: Params
    training: list[float]
    validation: list[float]
    best: float
    interrupted: bool = False


class Effort(NamedTuple):
    """Passes at most, the highest learning rate, and passes without improvement to stop after."""

    epochs: int
    rate: float
    patience: int


def train(
    model: Layer,
    columns: F32,
    outcome: F64,
    start: F64,
    split: tuple[int, int],
    targets: Targets,
    effort: Effort,
    *,
    seed: int,
    report: Callable[[int, str], object],
) -> Learned:
    """Learn what `start` leaves over from rows up to ``split[0]``; stop by those from ``split[1]``.

    What is learned counts if it is better there than nothing by more than chance.

    Interrupts (Ctrl-C) end training with the best parameters so far.
    """
    from favor_np import nn
    from favor_np.nn.blas import one_thread

    rng = np.random.default_rng(seed)
    params = model.init(rng)
    optimizer = nn.AdamW(params, weight_decay=0.1)
    known = outcome.copy()
    known[split[0] :] = np.nan
    batches = _sequences(columns, known, start, split[0])
    held, base = outcome[split[1] :], start[split[1] :]
    before = targets.losses(base, held)
    first = float(np.nanmean(before))
    found = Learned(_copy(params), [], [first], first)
    epochs = effort.epochs
    steps = epochs * -(-len(batches[0]) // BATCH)
    schedule = nn.cosine(effort.rate, steps=steps, warmup=max(steps // 20, 1))
    step = 0
    with one_thread():
        try:
            for epoch in range(epochs):
                losses = []
                for rows in np.array_split(rng.permutation(len(batches[0])), steps // epochs):
                    x, y, said = (each[rows] for each in batches)
                    out, pullback = model.vjp(params, x, key=(seed, step))
                    loss, grad = targets.loss(said + out, y)
                    pullback(grad.astype(np.float32), optimizer.grads)
                    optimizer.step(schedule(step), clip=CLIP)
                    losses.append(loss)
                    step += 1
                rest = apply(model, params, columns)[split[1] :]
                gains = before - targets.losses(base + rest, held)
                value = first - float(np.nanmean(gains))
                if value < found.best and _clear(gains, targets.overlap):
                    found.params, found.best = _copy(params), value
                found.training.append(float(np.mean(losses)))
                found.validation.append(value)
                report(epoch + 1, f"validation {value - first:+.4f}")
                if epoch + 1 - int(np.argmin(found.validation)) >= effort.patience:
                    break
        except KeyboardInterrupt:
            warnings.warn("training was interrupted; its best is kept", stacklevel=2)
            found.interrupted = True
    return found


def _clear(gains: F64, overlap: int) -> bool:
    """Whether the mean is above 0 by more than chance would have it once in twenty times."""
    known = gains[np.isfinite(gains).all(1)].mean(1)
    return bool(known.mean() > CLEAR * standard_error(known, overlap))


def _sequences(columns: F32, outcome: F64, start: F64, stop: int) -> tuple[Any, Any, Any]:
    """Cut rows into sequences that overlap by the rows that are not learned from."""
    length = min(LENGTH, stop)
    warm = WARM_UP if stop > LENGTH else 0
    count = max(-(-(stop - warm) // (length - warm)), 1)
    places = np.unique(np.linspace(0, stop - length, count).astype(np.intp))
    rows = places[:, None] + np.arange(length)
    outcomes = outcome[rows]
    outcomes[:, :warm] = np.nan
    return columns[rows], outcomes, start[rows]


def apply(model: Layer, params: Params, columns: F32) -> F64:
    """Return the outputs for rows, in pieces of one size."""
    count = len(columns)
    state: dict[str, Any] = {}
    padded = np.zeros((-(-count // PIECE) * PIECE, columns.shape[1]), np.float32)
    padded[:count] = columns
    pieces = [
        model.extend(params, state, padded[at : at + PIECE]) for at in range(0, len(padded), PIECE)
    ]
    made: npt.NDArray[np.float64] = np.concatenate(pieces)[:count].astype(np.float64)
    return made


def _copy(tree: Params) -> Params:
    return {name: _copy(x) if isinstance(x, dict) else x.copy() for name, x in tree.items()}
