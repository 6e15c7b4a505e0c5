"""Layers that look up or multiply: Linear, Embedding; and Dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from favor_np import validation
from favor_np.nn.layer import Key, Layer, Pullback, Step, cotangent, generator, leaf, normal, rows
from favor_np.nn.products import add_product, add_sum, multiply, multiply_back, multiply_few
from favor_np.nn.tree import Array, Params


@dataclass(frozen=True)
class Linear(Layer):
    """``y = x @ weight.T + bias``.

    Parameters
    ----------
    inputs, outputs : int
        Lengths of the rows of x and y.
    bias : bool, default True
        Whether there is one; it begins with zeros.
    std : float, optional
        Standard deviation of the first weights, default ``inputs ** -0.5``.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.Linear(3, 2)
    >>> params = layer.init(np.random.default_rng(0))
    >>> y, pullback = layer.vjp(params, np.ones((4, 3)))
    >>> grads = nn.zeros_like(params)
    >>> pullback(np.ones((4, 2)), grads).shape, grads["bias"]
    ((4, 3), array([4., 4.], dtype=float32))
    """

    inputs: int
    outputs: int
    bias: bool = True
    std: float | None = None

    def init(self, rng: np.random.Generator) -> Params:
        std = self.inputs**-0.5 if self.std is None else self.std
        params = {"weight": normal(rng, (self.outputs, self.inputs), std)}
        if self.bias:
            params["bias"] = np.zeros(self.outputs, np.float32)
        return params

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        weight = leaf(params, "weight", (self.outputs, self.inputs))
        x = rows("x", x, self.inputs, weight.dtype)
        y = multiply(x, weight)
        if self.bias:
            y += leaf(params, "bias", (self.outputs,))
        shape = y.shape

        def pullback(grad: Array, grads: Params) -> Array:
            grad = cotangent(grad, shape, weight.dtype)
            add_product(grads["weight"], grad, x)
            if self.bias:
                add_sum(grads["bias"], grad)
            return multiply_back(grad, weight)

        return y, pullback

    def prepare(self, params: Params) -> Step:
        weight = leaf(params, "weight", (self.outputs, self.inputs))
        bias = leaf(params, "bias", (self.outputs,)) if self.bias else None

        def step(_: dict[str, Any], x: Array) -> Array:
            y = multiply_few(x, weight)
            return y if bias is None else y + bias

        return step


def tokens_of(name: str, value: Any, count: int) -> Array:
    """Return integers from 0 to count - 1."""
    array = validation.array_of(name, value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {validation.got(array)}")
    if not array.size:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    low, high = array.min(), array.max()
    if low < 0 or high >= count:
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {low if low < 0 else high}")
    return array


@dataclass(frozen=True)
class Embedding(Layer):
    """A row of numbers for each token.

    Parameters
    ----------
    count : int
        How many tokens there are: they are integers from 0 to count - 1.
    dim : int
        Length of a row.
    std : float, default 0.02
        Standard deviation of the first weights.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.Embedding(256, 8)
    >>> layer.apply(layer.init(np.random.default_rng(0)), [[1, 2, 3]]).shape
    (1, 3, 8)
    """

    count: int
    dim: int
    std: float = 0.02

    def init(self, rng: np.random.Generator) -> Params:
        return {"weight": normal(rng, (self.count, self.dim), self.std)}

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        weight = leaf(params, "weight", (self.count, self.dim))
        tokens = tokens_of("tokens", x, self.count)

        def pullback(grad: Array, grads: Params) -> None:
            grad = cotangent(grad, (*tokens.shape, self.dim), weight.dtype).reshape(-1, self.dim)
            flat = tokens.ravel()
            order = np.argsort(flat, kind="stable")
            found, first = np.unique(flat[order], return_index=True)
            grads["weight"][found] += np.add.reduceat(grad[order], first, axis=0)

        return weight[tokens], pullback

    def prepare(self, params: Params) -> Step:
        weight = leaf(params, "weight", (self.count, self.dim))
        return lambda _, x: weight[tokens_of("tokens", x, self.count)]


@dataclass(frozen=True)
class Dropout(Layer):
    """Zeros in place of some numbers in training, the others larger by so much; else nothing.

    Parameters
    ----------
    rate : float
        Share of the numbers that become zero, in [0, 1). Which ones is a function of the key.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> nn.Dropout(0.5).apply({}, np.ones(6), key=(0, 1))
    array([0., 0., 0., 2., 2., 0.])
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be at least 0 and less than 1, got {self.rate}")

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        if key is None or self.rate == 0:
            return x, lambda grad, _: grad
        kept = generator(key).random(x.shape, np.float32) >= np.float32(self.rate)
        factor = x.dtype.type(1 / (1 - self.rate))

        def masked(array: Array) -> Array:
            out: Array = array * factor
            out *= kept
            return out

        return masked(x), lambda grad, _: masked(grad)
