"""The loop of training, for those who do not want to write its ten lines."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from favor_np import validation
from favor_np.diagnostics import Diagnosis, diagnose
from favor_np.nn.attention import seen
from favor_np.nn.blas import one_thread
from favor_np.nn.checkpoint import ready, save
from favor_np.nn.layer import Key, Layer
from favor_np.nn.losses import cross_entropy
from favor_np.nn.optim import AdamW, constant
from favor_np.nn.tree import Array, Params
from favor_np.progress import Progress, reporting

Batches: TypeAlias = Callable[[int], tuple[Any, Any]]
Loss: TypeAlias = Callable[[Any, Any], tuple[float, Array]]

#: The effective sample size of a head's median row, as a share of the features, below which it no
#: longer approximates softmax attention.  It is 0.4 at |q|**2 = |k|**2 = 1, 0.16 at 2, 0.07 at 4.
GOOD = 0.1


@dataclasses.dataclass(eq=False)
class History:
    """What happened in training.

    Attributes
    ----------
    steps, losses, norms : list
        Each step, its loss, and the norm of its gradients before clipping.
    validation : list of tuple of int and float
        Steps, and the losses on validation batches after them.
    attention : list of tuple
        Step, number of the layer with random features, number of the head, and the effective
        sample size of its median row: see `favor_np.diagnose`.
    step : int
        The step that would come next.
    best : tuple of int and float, or None
        The step after which the validation loss was least, and this loss.
    best_params : dict or None
        The parameters then; None if that was before a resume.
    stopped : str
        Why training ended: "finished", "interrupted", or "no improvement".
    seconds : float
        How long it took.
    tokens : int
        Targets that were learned from.
    """

    steps: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    attention: list[tuple[int, int, int, float]] = dataclasses.field(default_factory=list)
    step: int = 0
    best: tuple[int, float] | None = None
    best_params: Params | None = None
    stopped: str = "finished"
    seconds: float = 0.0
    tokens: int = 0

    def __repr__(self) -> str:
        last = f", loss {self.losses[-1]:.4g}" if self.losses else ""
        rate = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.seconds else ""
        return f"<History of {len(self.losses)} steps{last}{rate}, {self.stopped}>"

    def plot(self) -> Any:
        """Draw the losses.

        Returns
        -------
        matplotlib.figure.Figure
            The picture; ``.savefig(path)`` writes it.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        from favor_np import figures

        with figures.style():
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6, 3.5), layout="constrained")
            axes = figure.subplots()
            axes.plot(self.steps, self.losses, color=figures.BLUE, lw=0.8, label="training")
            if self.validation:
                axes.plot(
                    *zip(*self.validation, strict=True),
                    "o-",
                    color=figures.ORANGE,
                    ms=3,
                    label="validation",
                )
            axes.set(xlabel="step", ylabel="loss", title="Loss")
            axes.legend()
        return figure


def diagnose_attention(model: Layer, params: Params, x: Any) -> list[Diagnosis]:
    """Estimate how well each layer with random features approximates softmax attention.

    Parameters
    ----------
    model : Layer
        The model.
    params : dict
        Its parameters.
    x : array_like
        Input, of a few sequences.

    Returns
    -------
    list of Diagnosis
        What `favor_np.diagnose` says, for each layer of kind "positive", in order.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> model = nn.PerformerLM(vocab=256, dim=64, depth=1, heads=2)
    >>> params = model.init(np.random.default_rng(0))
    >>> (found,) = nn.diagnose_attention(model, params, np.arange(200))
    >>> found.effective_sample_size.shape
    (2, 200)
    """
    return [found for found, _ in _diagnoses(model, params, x)]


def _diagnoses(model: Layer, params: Params, x: Any) -> list[tuple[Diagnosis, int]]:
    """Return what is found in each layer, and how many features it has."""
    with seen() as found:
        model.apply(params, x)
    found = [each for each in found if each[3].kind == "positive"]
    return [(diagnose(q, k, v, fm, **options), fm.num_features) for q, k, v, fm, options in found]


@dataclasses.dataclass
class _Run:
    """One run of `train`: what its parts have in common."""

    model: Layer
    params: Params
    optimizer: AdamW
    loss: Loss
    seed: int
    history: History
    seen: Any = None  # the latest input

    def learn(self, batches: Batches, step: int, accumulate: int) -> float:
        """Add the gradients of a step, and return its loss; after an error there are none."""
        try:
            return self._learn(batches, step, accumulate)
        except BaseException:
            self.optimizer.gradient[:] = 0
            raise

    def _learn(self, batches: Batches, step: int, accumulate: int) -> float:
        total = 0.0
        for part in range(accumulate):
            x, targets = batches(step * accumulate + part)
            key: Key = (self.seed, step) if accumulate == 1 else (self.seed, step, part)
            self.seen = x
            y, pullback = self.model.vjp(self.params, x, key=key)
            loss, grad = self.loss(y, targets)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {step} is {loss}; the parameters are those before it"
                )
            pullback(grad / accumulate if accumulate > 1 else grad, self.optimizer.grads)
            total += loss / accumulate
            self.history.tokens += np.size(targets)
        return total

    def evaluate(self, validation_batches: list[tuple[Any, Any]]) -> float:
        """Return the mean loss on batches."""
        losses = [self.loss(self.model.apply(self.params, x), t)[0] for x, t in validation_batches]
        return float(np.mean(losses))

    def look(self, step: int) -> None:
        """Note the effective sample sizes of heads, and warn of those that are too small."""
        bad = []
        for layer, (found, features) in enumerate(_diagnoses(self.model, self.params, self.seen)):
            sizes = np.moveaxis(found.effective_sample_size, -2, 0)
            for head, rows in enumerate(sizes.reshape(len(sizes), -1)):
                size = float(np.median(rows))
                self.history.attention.append((step, layer, head, size))
                if size < GOOD * features:
                    bad.append(f"{layer}.{head} ({size:.1f} of {features})")
        if bad:
            warnings.warn(
                f"step {step}: these heads (layer.head) no longer approximate softmax attention, "
                f"their effective sample size is too small: {', '.join(bad)}",
                RuntimeWarning,
                stacklevel=4,
            )


def train(
    model: Layer,
    params: Params,
    batches: Batches,
    *,
    steps: int,
    rate: float | Callable[[int], float],
    loss: Loss = cross_entropy,
    optimizer: AdamW | None = None,
    start: int = 0,
    best: tuple[int, float] | None = None,
    seed: int = 0,
    clip: float | None = 1.0,
    accumulate: int = 1,
    redraw: int | None = None,
    validation_batches: list[tuple[Any, Any]] | None = None,
    every: int = 100,
    patience: int | None = None,
    path: str | os.PathLike[str] | None = None,
    info: dict[str, Any] | None = None,
    progress: bool | Progress | None = None,
) -> History:
    """Train a model: ten lines, and what one would like to have around them.

    Parameters
    ----------
    model : Layer
        The model.
    params : dict
        Its parameters, which are changed.
    batches : callable
        ``x, targets = batches(step)``: a function of the step alone, so that a run can go on.
    steps : int
        The step to stop before, counted from 0 whatever `start` is.
    rate : float or callable
        The rate of the optimiser, or a function of the step: see `cosine`.
    loss : callable, default `cross_entropy`
        ``value, gradient = loss(output, targets)``.
    optimizer : AdamW, optional
        Default: a new one of these parameters.
    start : int, default 0
        The first step: that of a checkpoint.
    best : tuple of int and float, optional
        `History.best` so far: a checkpoint's ``info["best"]``.
    seed : int, default 0
        Of dropout, and of projections that are drawn anew.
    clip : float, optional
        What the norm of gradients is reduced to.
    accumulate : int, default 1
        Batches whose mean gradient makes a step.
    redraw : int, optional
        Draw the projections of random features anew before every so many steps.
    validation_batches : list of tuple, optional
        Pairs (x, targets), on which the loss is taken `every` so many steps.
    every : int, default 100
        Steps between looks: at validation, at attention, and for checkpoints.
    patience : int, optional
        Stop after so many looks without a smaller validation loss.
    path : str or os.PathLike, optional
        A checkpoint, written at every look and at the end.
    info : dict, optional
        What else the checkpoint shall hold, such as the seed and the rate: anything that JSON can.
        "best" is added: the best of the looks that a run without an end here would have had.
    progress : bool or callable, optional
        As in `favor_np.forecast.evaluate`: None shows a bar in a terminal, True anywhere.

    Returns
    -------
    History
        Losses, validation, effective sample sizes; ``print`` it. An interrupt (Ctrl-C) ends
        training between two steps, writes the checkpoint, and returns it as well.

    Raises
    ------
    FloatingPointError
        If a loss or a gradient is not finite. The parameters are those before that step.
    TypeError, ValueError
        If an argument is of the wrong type or range.

    Warns
    -----
    RuntimeWarning
        If random features no longer approximate the attention of a head.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> model = nn.Chain((nn.Linear(1, 16), nn.RMSNorm(16), nn.Linear(16, 1)))
    >>> params = model.init(np.random.default_rng(0))
    >>> def batches(step):
    ...     x = np.random.default_rng((0, step)).uniform(-1, 1, (64, 1))
    ...     return x, x**2
    >>> history = nn.train(model, params, batches, steps=200, rate=0.01, loss=nn.mean_squared)
    >>> history.losses[-1] < history.losses[0] / 5
    True
    """
    steps, start = validation.integer("steps", steps), validation.integer("start", start, minimum=0)
    accumulate, every = (
        validation.integer(*pair) for pair in (("accumulate", accumulate), ("every", every))
    )
    if redraw is not None:
        redraw = validation.integer("redraw", redraw)
    if clip is not None:
        clip = validation.positive_float("clip", clip)
    if patience is not None:
        patience = validation.integer("patience", patience)
        validation.given(validation_batches=validation_batches)
    rate_of = rate if callable(rate) else constant(rate)
    optimizer = AdamW(params) if optimizer is None else optimizer
    if optimizer.params is not params:
        raise ValueError("optimizer must be that of params, got one of other parameters")
    if path is not None:
        ready(path, model)
    if best is not None:
        best = validation.integer("best", best[0], minimum=0), float(best[1])
    history = History(step=start, best=best)
    run = _Run(model, params, optimizer, loss, validation.integer("seed", seed, minimum=0), history)
    began, looked = time.perf_counter(), start

    def look() -> None:
        """Take stock after some steps: validation, checkpoint, attention."""
        nonlocal best, looked
        looked = history.step
        if validation_batches:
            value = run.evaluate(validation_batches)
            history.validation.append((history.step, value))
            if value < (history.best[1] if history.best else math.inf):
                history.best, history.best_params = (history.step, value), _copy(params)
                if looked % every == 0:
                    best = history.best
        if path is not None:
            known = (info or {}) | {"best": best}
            save(path, model, params, optimizer, step=looked, **known)
        run.look(history.step)

    with reporting(progress) as report, _interrupts() as interrupted, one_thread():
        for step in range(start, steps):
            if redraw is not None and step and step % redraw == 0:
                model.redraw(params, (run.seed, step))
            value = run.learn(batches, step, accumulate)
            norm = optimizer.step(rate_of(step), clip=clip)
            history.steps.append(step)
            history.losses.append(value)
            history.norms.append(norm)
            history.step = step + 1
            history.seconds = time.perf_counter() - began
            speed = history.tokens / history.seconds
            note = f"loss {value:.4g}, {speed:,.0f} tokens/s"
            report("training", step + 1 - start, steps - start, note)
            if interrupted:
                history.stopped = "interrupted"
                break
            if history.step % every == 0:
                look()
                if (
                    patience is not None
                    and looked - (best[0] if best else start) >= patience * every
                ):
                    history.stopped = "no improvement"
                    break
    if looked < history.step:
        look()
    history.seconds = time.perf_counter() - began
    return history


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect interrupts (Ctrl-C), so that none falls into a step; the second is raised at once."""
    found: list[int] = []

    def note(number: int, frame: Any) -> None:
        found.append(number)
        signal.signal(signal.SIGINT, before)
        del frame

    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _copy(tree: Params) -> Params:
    return {name: _copy(x) if isinstance(x, dict) else x.copy() for name, x in tree.items()}
