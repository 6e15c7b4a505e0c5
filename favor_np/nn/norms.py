"""Layers that bound the size of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from favor_np.nn.fused import Norm
from favor_np.nn.layer import Key, Layer, Pullback, cotangent, leaf, rows
from favor_np.nn.tree import Array, Params


def _dot(a: Array, b: Array) -> Array:
    """Return the products of rows with rows, (..., 1)."""
    return np.einsum("...i,...i->...", a, b)[..., None]


def _back(norm: Norm, grad: Array, grads: Params) -> Array:
    """Pull a cotangent back through a norm, and add the gradients of weight and bias."""
    dx, sums = norm.back(grad)
    for name, total in zip(("weight", "bias"), sums, strict=False):
        grads[name] += total
    return dx


@dataclass(frozen=True)
class LayerNorm(Layer):
    """Rows of mean 0 and variance 1, times a weight, plus a bias.

    Parameters
    ----------
    dim : int
        Length of a row.
    eps : float, default 1e-5
        Added to the variance.
    bias : bool, default True
        Whether there is one.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.LayerNorm(4, eps=0)
    >>> layer.apply(layer.init(np.random.default_rng(0)), [[1, 1, 3, 3]])
    array([[-1., -1.,  1.,  1.]], dtype=float32)
    """

    dim: int
    eps: float = 1e-5
    bias: bool = True

    def init(self, rng: np.random.Generator) -> Params:
        params = {"weight": np.ones(self.dim, np.float32)}
        if self.bias:
            params["bias"] = np.zeros(self.dim, np.float32)
        return params

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, shifted: bool = False
    ) -> tuple[Array, Pullback]:
        weight = leaf(params, "weight", (self.dim,))
        bias = leaf(params, "bias", (self.dim,)) if self.bias else None
        x = rows("x", x, self.dim, weight.dtype)
        norm = Norm(x, weight, bias, self.eps, centred=True, shifted=shifted)
        return norm.y, lambda grad, grads: _back(norm, cotangent(grad, x.shape, x.dtype), grads)


@dataclass(frozen=True)
class RMSNorm(Layer):
    """Rows whose root mean square is 1, times a weight.

    Parameters
    ----------
    dim : int
        Length of a row.
    eps : float, default 1e-6
        Added to the mean square.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.RMSNorm(2, eps=0)
    >>> layer.apply(layer.init(np.random.default_rng(0)), [[1, 7]])
    array([[0.2, 1.4]], dtype=float32)
    """

    dim: int
    eps: float = 1e-6

    def init(self, rng: np.random.Generator) -> Params:
        return {"weight": np.ones(self.dim, np.float32)}

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, shifted: bool = False
    ) -> tuple[Array, Pullback]:
        weight = leaf(params, "weight", (self.dim,))
        x = rows("x", x, self.dim, weight.dtype)
        norm = Norm(x, weight, None, self.eps, centred=False, shifted=shifted)
        return norm.y, lambda grad, grads: _back(norm, cotangent(grad, x.shape, x.dtype), grads)


@dataclass(frozen=True)
class ScaleNorm(Layer):
    """Rows of one length, which is learned (Nguyen and Salazar 2019, arXiv:1910.05895).

    Parameters
    ----------
    dim : int
        Length of a row.
    eps : float, default 1e-5
        The least that a row's norm counts as.

    Notes
    -----
    ``x / max(|x|, eps) * weight``, as in performer-pytorch; the one number ``weight`` begins with
    ``sqrt(dim)``.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.ScaleNorm(4)
    >>> layer.apply(layer.init(np.random.default_rng(0)), [[1, 7, 5, 5]])
    array([[0.2, 1.4, 1. , 1. ]], dtype=float32)
    """

    dim: int
    eps: float = 1e-5

    def init(self, rng: np.random.Generator) -> Params:
        return {"weight": np.full(1, self.dim**0.5, np.float32)}

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        weight = leaf(params, "weight", (1,))
        x = rows("x", x, self.dim, weight.dtype)
        size = np.sqrt(_dot(x, x))
        inverse = 1 / np.maximum(size, x.dtype.type(self.eps))
        unit = x * inverse

        def pullback(grad: Array, grads: Params) -> Array:
            grad = cotangent(grad, x.shape, x.dtype)
            along = _dot(grad, unit)
            grads["weight"] += along.sum()
            along[size < self.eps] = 0  # there x is divided by a constant
            return (grad - along * unit) * (inverse * weight)

        return unit * weight, pullback


@dataclass(frozen=True)
class UnitScale(Layer):
    """Vectors of heads on spheres: ``|y|**2 = bound * sigmoid(radius)``, one radius a head.

    Where queries and keys are bounded like this, random features stay accurate: their error of a
    single weight grows with ``exp(|q + k|**2)``. Learned radii of at most 2 leave weights that
    differ by a factor of up to ``exp(4)``; where attention has to be sharper, take exact layers.

    Parameters
    ----------
    heads : int
        Number of radii. Inputs may have a multiple of it as heads, which then share radii.
    bound : float or tuple of float, default 2.0
        What ``|y|**2`` stays below, one for all heads or one for each; it begins with half of it.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.UnitScale(heads=1)
    >>> layer.apply(layer.init(np.random.default_rng(0)), [[[3, 4]]])
    array([[[0.6, 0.8]]], dtype=float32)
    """

    heads: int
    bound: float | tuple[float, ...] = 2.0

    def __post_init__(self) -> None:
        if np.shape(self.bound) not in ((), (self.heads,)):
            raise ValueError(f"bound must be one number, or {self.heads}, got {self.bound}")

    def init(self, rng: np.random.Generator) -> Params:
        return {"radius": np.zeros(self.heads, np.float32)}

    @np.errstate(over="ignore")  # far below zero it is zero
    def lengths(self, params: Params) -> Array:
        """Return the radius of each head."""
        radius = leaf(params, "radius", (self.heads,))
        return np.sqrt(np.asarray(self.bound, radius.dtype) / (1 + np.exp(-radius)))

    def add_gradient(self, lengths: Array, of_lengths: Array, grads: Params) -> None:
        """Add the gradient of the parameters, from that of the radii."""
        grads["radius"] += (
            of_lengths * lengths * (1 - lengths**2 / np.asarray(self.bound, lengths.dtype)) / 2
        )

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        lengths = self.lengths(params)
        x = rows("x", x, np.shape(x)[-1], lengths.dtype)
        if x.ndim < 3 or x.shape[-3] % self.heads:
            raise ValueError(f"x must have shape (..., {self.heads}, L, d), got {x.shape}")
        group = x.shape[-3] // self.heads
        each = np.repeat(lengths, group)[:, None, None]
        inverse = 1 / np.sqrt(np.maximum(_dot(x, x), np.finfo(x.dtype).tiny))
        unit = x * inverse

        def pullback(grad: Array, grads: Params) -> Array:
            grad = cotangent(grad, x.shape, x.dtype)
            along = _dot(grad, unit)
            per_head = along.reshape(-1, self.heads, group * x.shape[-2]).sum((0, 2))
            self.add_gradient(lengths, per_head, grads)
            return (grad - along * unit) * (each * inverse)

        return unit * each, pullback
