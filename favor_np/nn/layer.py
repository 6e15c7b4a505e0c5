"""What a layer is, how layers are put together, and where their randomness comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self, TypeAlias
from zlib import crc32

import numpy as np

from favor_np import validation
from favor_np.nn.tree import Array, Params

#: Integers (seed, step, ...): what is random in training is a function of them and of names.
Key: TypeAlias = tuple[int, ...]
Pullback: TypeAlias = Callable[[Array, Params], Any]
#: What `Layer.prepare` returns: `extend` of certain parameters.
Step: TypeAlias = Callable[[dict[str, Any], Array], Array]


class Layer:
    """A layer: a frozen dataclass of sizes, that has no parameters and no state.

    A layer of one's own defines `init` and `vjp`, or `parts` and `vjp`; the rest follows.
    """

    def __init_subclass__(cls) -> None:
        """Let a class that computes something else not prepare what its parent computes."""
        own = vars(cls)
        if "prepare" not in own and {"vjp", "apply", "extend"} & own.keys():
            cls.prepare = Layer.prepare  # type: ignore[method-assign]

    @cached_property
    def parts(self) -> dict[str, Layer]:
        """The layers that this one is made of; their parameters have these names in its own."""
        return {}

    def init(self, rng: np.random.Generator) -> Params:
        """Return new parameters.

        Parameters
        ----------
        rng : numpy.random.Generator
            Where they are drawn from.

        Returns
        -------
        dict
            Arrays, and dictionaries of the arrays of parts, in float32.
        """
        found = {name: layer.init(rng) for name, layer in self.parts.items()}
        return {name: params for name, params in found.items() if params}

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        """Compute, and return how cotangents are pulled back.

        Parameters
        ----------
        params : dict
            As `init` returns them, in float32 or float64: that is what is computed in.
        x : ndarray
            Input.
        key : tuple of int, optional
            None evaluates. A key, such as (seed, step), trains: dropout is a function of it.

        Returns
        -------
        y : ndarray
            Output.
        pullback : callable
            ``grad_x = pullback(grad_y, grads)`` adds the gradients of parameters to the arrays of
            `grads`, a tree like `params`.
        """
        raise NotImplementedError

    def apply(self, params: Params, x: Any, **options: Any) -> Array:
        """Return the output alone.

        Parameters
        ----------
        params, x, **options
            As for `vjp`.

        Returns
        -------
        ndarray
            Output.
        """
        return self.vjp(params, x, **options)[0]

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        """Return the output for the rows that follow those that `state` has seen.

        Parameters
        ----------
        params : dict
            Parameters.
        state : dict
            What is known of the rows before, empty at first; changed in place.
        x : ndarray, shape (..., n, dim)
            The next rows of each sequence.

        Returns
        -------
        ndarray
            What `apply` to all rows so far has in these.
        """
        return self.apply(params, x)

    def prepare(self, params: Params) -> Step:
        """Return `extend` for many short calls: parameters are looked up and checked once, here.

        Parameters
        ----------
        params : dict
            Parameters, which must not change from here on.

        Returns
        -------
        callable
            ``y = step(state, x)`` is ``extend(params, state, x)``, and takes turns with it.

        Examples
        --------
        >>> import numpy as np
        >>> from favor_np import nn
        >>> model = nn.PerformerLM(vocab=256, dim=16, depth=1, heads=2, num_features=16)
        >>> step, state = model.prepare(model.init(np.random.default_rng(0))), {}
        >>> for token in b"to be":
        ...     logits = step(state, np.array([token]))
        >>> logits.shape
        (1, 256)
        """
        return lambda state, x: self.extend(params, state, x)

    def redraw(self, params: Params, key: Key) -> None:
        """Draw the projections of random features anew, in place.

        Parameters
        ----------
        params : dict
            Parameters.
        key : tuple of int
            Such as (seed, step): the projections are a function of it.
        """
        for name, layer in self.parts.items():
            if name in params:
                layer.redraw(params[name], fold(key, name))

    def replace(self, **changes: Any) -> Self:
        """Return a layer with other sizes or options.

        Parameters
        ----------
        **changes
            Fields by name. ``replace(exact=True)`` is the same model with exact attention.

        Returns
        -------
        Layer
            Of the same class.
        """
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def fold(key: Key, *names: str | int) -> Key:
    """Return the key of something within what has this key."""
    words = (name if isinstance(name, int) else crc32(name.encode()) for name in names)
    return (*key, *words)


def generator(key: Key) -> np.random.Generator:
    """Return the random numbers of a key."""
    words = [validation.integer("key", word, minimum=0) for word in key]
    return np.random.Generator(np.random.SFC64(words))


@contextmanager
def within(name: str) -> Iterator[None]:
    """Let errors name what they are about by its dotted name: "norm.weight must ..."."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (f"{name}.{error.args[0]}", *error.args[1:])
        raise


def part(
    layer: Layer, name: str, params: Params, x: Any, key: Key | None = None, **options: Any
) -> tuple[Array, Pullback]:
    """Compute the part of a layer that has this name in its parameters, key and gradients."""
    mine = None if key is None else fold(key, name)
    with within(name):
        y, pull = layer.vjp(params.get(name, {}), x, key=mine, **options)
    shape = y.shape

    def pullback(grad: Array, grads: Params) -> Any:
        if np.shape(grad) != shape:
            raise ValueError(f"{name}.grad_y must have shape {shape}, got {np.shape(grad)}")
        return pull(grad, grads.get(name, {}))

    return y, pullback


def extend_part(layer: Layer, name: str, params: Params, state: dict[str, Any], x: Any) -> Array:
    """Extend a part by the next rows."""
    with within(name):
        return layer.extend(params.get(name, {}), state.setdefault(name, {}), x)


def prepare_parts(parts: dict[str, Layer], params: Params) -> Step:
    """Prepare parts that are applied one after the other."""
    steps = []
    for name, layer in parts.items():
        with within(name):
            steps.append((name, layer.prepare(params.get(name, {}))))

    def step(state: dict[str, Any], x: Array) -> Array:
        for name, do in steps:
            x = do(state.setdefault(name, {}), x)
        return x

    return step


def leaf(params: Params, name: str, shape: tuple[int, ...]) -> Array:
    """Return a parameter; ValueError if it is not there, or not of this shape."""
    array = params.get(name)
    if array is None:
        raise ValueError(f"{name} must be an array of shape {shape}, but there is none")
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must hold float32 or float64, got {validation.got(array)}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def rows(name: str, value: Any, dim: int, dtype: Any) -> Array:
    """Return input (..., dim) in C order, in the dtype of the parameters."""
    array = validation.tensor(name, value, 1)
    if array.shape[-1] != dim:
        raise ValueError(f"{name} must have shape (..., {dim}), got {array.shape}")
    return validation.contiguous(array, np.dtype(dtype))


def cotangent(grad: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the gradient of an output of this shape in C order, in the dtype of the parameters."""
    array = validation.tensor("grad_y", grad, 0)
    if array.shape != shape:
        raise ValueError(f"grad_y must have shape {shape}, got {array.shape}")
    return validation.contiguous(array, np.dtype(dtype))


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Array:
    """Draw parameters."""
    if std == 0:
        return np.zeros(shape, np.float32)
    return (std * rng.standard_normal(shape)).astype(np.float32)


class InOrder(Layer):
    """A layer whose parts are applied one after the other."""

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, **options: Any
    ) -> tuple[Array, Pullback]:
        pulls = []
        for name, layer in self.parts.items():
            x, pull = part(layer, name, params, x, key, **options)
            pulls.append(pull)

        def pullback(grad: Array, grads: Params) -> Any:
            for pull in reversed(pulls):
                grad = pull(grad, grads)
            return grad

        return x, pullback

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        for name, layer in self.parts.items():
            x = extend_part(layer, name, params, state, x)
        return x

    def prepare(self, params: Params) -> Step:
        return prepare_parts(self.parts, params)


@dataclasses.dataclass(frozen=True)
class Chain(InOrder):
    """Layers one after the other; their parameters are named "0", "1" and so on.

    Parameters
    ----------
    layers : tuple of Layer
        In the order in which they are applied.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> model = nn.Chain((nn.Linear(3, 8), nn.RMSNorm(8), nn.Linear(8, 1)))
    >>> params = model.init(np.random.default_rng(0))
    >>> model.apply(params, np.ones((5, 3))).shape
    (5, 1)
    """

    layers: tuple[Layer, ...]

    @cached_property
    def parts(self) -> dict[str, Layer]:
        return {str(number): layer for number, layer in enumerate(self.layers)}


@dataclasses.dataclass(frozen=True)
class Sum(Layer):
    """Layers that all take the same input, and whose outputs are added.

    Their parameters are named "0", "1" and so on.

    Parameters
    ----------
    layers : tuple of Layer
        With outputs of one shape.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> model = nn.Sum((nn.Linear(3, 1), nn.Chain((nn.Linear(3, 8), nn.Linear(8, 1)))))
    >>> params = model.init(np.random.default_rng(0))
    >>> model.apply(params, np.ones((5, 3))).shape
    (5, 1)
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must hold at least one layer, got none")

    @cached_property
    def parts(self) -> dict[str, Layer]:
        return {str(number): layer for number, layer in enumerate(self.layers)}

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, **options: Any
    ) -> tuple[Array, Pullback]:
        found = [part(layer, name, params, x, key, **options) for name, layer in self.parts.items()]

        def pullback(grad: Array, grads: Params) -> Any:
            backs = [pull(grad, grads) for _, pull in found]
            return None if any(back is None for back in backs) else _total(backs)

        return _total([y for y, _ in found]), pullback

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        return _total(
            [extend_part(layer, name, params, state, x) for name, layer in self.parts.items()]
        )


def _total(arrays: list[Array]) -> Array:
    """Return the sum of arrays of one shape."""
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(
            f"layers must have outputs of one shape, got {[array.shape for array in arrays]}"
        )
    total: Array = sum(arrays[1:], start=arrays[0])
    return total
