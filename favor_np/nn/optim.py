"""AdamW on one vector, and how its rate changes from step to step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from favor_np import validation
from favor_np.nn import fused, memory
from favor_np.nn.tree import Params, leaves, pack, zeros_like

#: Numbers of a vector that are changed, or whose squares are summed, at a time.
BLOCK = 1 << 14


def matches(name: str, words: Iterable[str]) -> bool:
    """Whether one of the words is part of a dotted name: "attention.projection", or "blocks.0"."""
    return any(f".{word}." in f".{name}." for word in words)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101).

    Parameters
    ----------
    params : dict
        Parameters, float32 or float64. Its arrays are replaced by views of one vector, in place;
        arrays that take their place later, of the same shapes, are packed again by `step`.
    betas : tuple of float, default (0.9, 0.95)
        How much of the means of gradients, and of their squares, is kept from step to step.
    eps : float, default 1e-8
        Added to the root of the mean of squares.
    weight_decay : float, default 0.1
        Share of a weight, times the rate, by which it shrinks at every step.
    undecayed : tuple of str, default ()
        Names of what does not shrink; arrays with a single axis never do.
    frozen : tuple of str, default ("projection",)
        Names of what is not changed at all. A name is a part of a dotted name: "blocks.0",
        "attention", "norm.weight".

    Attributes
    ----------
    grads : dict
        A tree like `params`, to which pullbacks add. `step` sets it to zero.
    m, v : ndarray
        Means of gradients and of their squares: vectors.
    count : int
        Steps so far.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or range, or a name is that of no parameter.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> model = nn.Linear(2, 1)
    >>> params = model.init(np.random.default_rng(0))
    >>> optimizer = nn.AdamW(params)
    >>> y, pullback = model.vjp(params, np.ones((5, 2)))
    >>> loss, grad = nn.mean_squared(y, np.ones((5, 1)))
    >>> grad_x = pullback(grad, optimizer.grads)
    >>> norm = optimizer.step(rate=0.01, clip=1.0)
    """

    def __init__(
        self,
        params: Params,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        undecayed: tuple[str, ...] = (),
        frozen: tuple[str, ...] = ("projection",),
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {betas}")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")
        self.betas, self.eps = tuple(betas), validation.positive_float("eps", eps)
        self.weight_decay = float(weight_decay)
        self.undecayed, self.frozen = tuple(undecayed), tuple(frozen)
        names = [name for name, _ in leaves(params)]
        for word in (*self.undecayed, *self.frozen):
            if word != "projection" and not any(matches(name, [word]) for name in names):
                raise ValueError(f"params must hold what undecayed and frozen name, got {word!r}")
        self.params, self.vector = params, pack(params)
        self.grads = zeros_like(params)
        self.gradient = pack(self.grads)
        self.m, self.v, self.count = np.zeros_like(self.vector), np.zeros_like(self.vector), 0
        self._forms = _forms(params)
        #: A row for each piece: where it begins, where it ends, and whether it decays.
        self._pieces = np.array(list(self._cut()), np.int64).reshape(-1, 3)
        self._keep_memory()

    def _keep_memory(self) -> None:
        memory.begin()
        weakref.finalize(self, memory.end)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, whose parameters are views of its own vector."""
        self.__dict__.update(state)
        self._pack_again()
        self._keep_memory()

    def _pack_again(self) -> None:
        """Make parameters and gradients views of the vectors again, if others were put there."""
        for tree, vector in (("params", "vector"), ("grads", "gradient")):
            of, whole = getattr(self, tree), getattr(self, vector)
            if all(array.base is whole for _, array in leaves(of)):
                continue
            found = _forms(of)
            for name, what in self._forms.items():
                if found.get(name) != what:
                    raise ValueError(f"{tree}: {name} must be {what}, got {found.get(name)}")
            if more := found.keys() - self._forms.keys():
                raise ValueError(f"{tree} must not have more arrays than before, got {min(more)}")
            setattr(self, vector, pack(of))

    def _cut(self) -> Iterable[tuple[int, int, bool]]:
        """Cut the vectors into pieces: parameters treated alike, of a size that a cache holds."""
        start = 0
        for name, array in leaves(self.params):
            stop = start + array.size
            if not matches(name, self.frozen):
                decayed = array.ndim > 1 and not matches(name, self.undecayed)
                for at in range(start, stop, BLOCK):
                    yield at, min(at + BLOCK, stop), decayed
            start = stop

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, without `params`."""
        names = ("betas", "eps", "weight_decay", "undecayed", "frozen")
        return {name: getattr(self, name) for name in names}

    def norm(self) -> float:
        """Return the norm of the gradients that are not frozen.

        Returns
        -------
        float
            Their root of the sum of squares, the same on every number of threads.
        """
        self._pack_again()
        return math.sqrt(fused.square_sum(self.gradient, self._pieces))

    def step(self, rate: float, *, clip: float | None = None) -> float:
        """Change the parameters by the gradients, which are set to zero.

        Parameters
        ----------
        rate : float
            How far.
        clip : float, optional
            What the norm of all gradients is reduced to if it is larger.

        Returns
        -------
        float
            The norm before that.

        Raises
        ------
        FloatingPointError
            If a gradient is NaN or infinite. Parameters, `m`, `v` and `count` are unchanged then,
            and the gradients are zero.
        ValueError
            If `params` or `grads` holds an array of another shape or dtype than at first.
        """
        rate = float(rate)
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"rate must be finite and at least 0, got {rate}")
        if clip is not None:
            clip = validation.positive_float("clip", clip)
        norm = self.norm()
        if not math.isfinite(norm):
            self._refuse()
        factor = 1.0 if clip is None or norm <= clip else clip / norm
        self.count += 1
        a, b = self.betas
        first = rate / (1 - a**self.count)
        second = 1 / math.sqrt(1 - b**self.count)
        kept = 1 - rate * self.weight_decay
        constants = np.array([factor, a, b, first, second, self.eps, kept], np.float64)
        fused.adam((self.vector, self.gradient, self.m, self.v), self._pieces, constants)
        for name, gradient in leaves(self.grads):
            if matches(name, self.frozen):
                gradient[...] = 0
        memory.turn()
        return norm

    def _refuse(self) -> None:
        wrong = [name for name, g in leaves(self.grads) if not np.isfinite(g).all()]
        wrong = [name for name in wrong if not matches(name, self.frozen)]
        self.gradient[:] = 0
        what = wrong[0] if wrong else "of all parameters, squared and summed,"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise FloatingPointError(
            f"the gradient of {what}{more} is not finite; the parameters are unchanged"
        )


def _forms(tree: Params) -> dict[str, str]:
    """Return the shapes and dtypes of the arrays of a tree, in words."""
    return {name: f"{array.shape} of {array.dtype}" for name, array in leaves(tree)}


def constant(rate: float, *, warmup: int = 0) -> Callable[[int], float]:
    """Return a schedule: one rate, after a linear rise.

    Parameters
    ----------
    rate : float
        The rate.
    warmup : int, default 0
        Steps of the rise.

    Returns
    -------
    callable
        ``schedule(step)``, for steps from 0.

    Examples
    --------
    >>> from favor_np import nn
    >>> [nn.constant(1.0, warmup=2)(step) for step in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """
    rate, warmup = _checked(rate, warmup)
    return lambda step: rate * _rise(step, warmup)


def cosine(
    peak: float, *, steps: int, warmup: int = 0, final: float = 0.1
) -> Callable[[int], float]:
    """Return a schedule: a linear rise, then half a cosine down.

    Parameters
    ----------
    peak : float
        The highest rate.
    steps : int
        All steps, those of the rise included.
    warmup : int, default 0
        Steps of the rise.
    final : float, default 0.1
        The last rate, as a share of the highest.

    Returns
    -------
    callable
        ``schedule(step)``, for steps from 0.

    Examples
    --------
    >>> from favor_np import nn
    >>> rate = nn.cosine(1.0, steps=100, warmup=10)
    >>> rate(0), rate(9), round(rate(54), 2), round(rate(99), 2)
    (0.1, 1.0, 0.55, 0.1)
    """
    peak, warmup = _checked(peak, warmup, steps)

    def schedule(step: int) -> float:
        done = min(max(step + 1 - warmup, 0) / max(steps - warmup, 1), 1.0)
        share = final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
        return peak * (_rise(step, warmup) if step < warmup else share)

    return schedule


def warmup_stable_decay(
    peak: float, *, steps: int, warmup: int = 0, decay: int = 0, final: float = 0.0
) -> Callable[[int], float]:
    """Return a schedule: a linear rise, one rate, a linear fall.

    Parameters
    ----------
    peak : float
        The highest rate.
    steps : int
        All steps, those of rise and fall included.
    warmup, decay : int, default 0
        Steps of the rise and of the fall.
    final : float, default 0
        The last rate, as a share of the highest.

    Returns
    -------
    callable
        ``schedule(step)``, for steps from 0.

    Examples
    --------
    >>> from favor_np import nn
    >>> rate = nn.warmup_stable_decay(1.0, steps=10, warmup=2, decay=4)
    >>> [rate(step) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    peak, warmup = _checked(peak, warmup, steps)
    decay = validation.integer("decay", decay, minimum=0)

    def schedule(step: int) -> float:
        left = min(max(steps - 1 - step, 0) / max(decay, 1), 1.0)
        return peak * _rise(step, warmup) * (final + (1 - final) * left)

    return schedule


def _rise(step: int, warmup: int) -> float:
    return min((step + 1) / warmup, 1.0) if warmup else 1.0


def _checked(rate: float, warmup: int, steps: int = 1) -> tuple[float, int]:
    validation.integer("steps", steps)
    return validation.positive_float("rate", rate), validation.integer("warmup", warmup, minimum=0)
