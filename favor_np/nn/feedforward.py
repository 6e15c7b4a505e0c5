"""The layer that treats every position alike: up, a function of each number, and down again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from favor_np import validation
from favor_np.nn.layer import Key, Layer, Pullback, part
from favor_np.nn.linear import Dropout, Linear
from favor_np.nn.tree import Array, Params

#: The functions, and those of which a product with other columns is taken.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "geglu", "swiglu")
GATED = {"geglu": "gelu", "swiglu": "silu"}


def _gelu(x: Array) -> tuple[Array, Array]:
    from scipy.special import ndtr

    below = ndtr(x)
    return x * below, below + x * np.exp(x * x / -2) * (2 * np.pi) ** -0.5


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    scale, cubic = (2 / np.pi) ** 0.5, 0.044715
    t = np.tanh(scale * x * (1 + cubic * x * x))
    slope = (1 - t * t) * scale * (1 + 3 * cubic * x * x)
    return x * (1 + t) / 2, (1 + t + x * slope) / 2


def _relu(x: Array) -> tuple[Array, Array]:
    return np.maximum(x, 0), (x > 0).astype(x.dtype)


def _relu2(x: Array) -> tuple[Array, Array]:
    y = np.maximum(x, 0)
    return y * y, 2 * y


def _silu(x: Array) -> tuple[Array, Array]:
    s = 1 / (1 + np.exp(-np.abs(x)))  # of |x|: the exponential cannot overflow
    s = np.where(x < 0, 1 - s, s)
    return x * s, s * (1 + x * (1 - s))


#: What returns the value and the slope of each function.
FUNCTIONS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu, "relu2": _relu2, "silu": _silu,
}  # fmt: skip


def activate(name: str, x: Array) -> Array:
    """Return the function of every number; of half the columns, times the others, if it is gated."""
    if name in GATED:
        half = x.shape[-1] // 2
        return FUNCTIONS[GATED[name]](x[..., :half])[0] * x[..., half:]
    return FUNCTIONS[name](x)[0]


def activate_back(name: str, x: Array, grad: Array) -> tuple[Array, Array]:
    """Return what `activate` does, and the gradient of x."""
    if name in GATED:
        half = x.shape[-1] // 2
        y, slope = FUNCTIONS[GATED[name]](x[..., :half])
        other = x[..., half:]
        return y * other, np.concatenate([grad * other * slope, grad * y], -1)
    y, slope = FUNCTIONS[name](x)
    return y, grad * slope


@dataclass(frozen=True)
class _Activation(Layer):
    name: str

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        return activate(self.name, x), lambda grad, _: activate_back(self.name, x, grad)[1]


@dataclass(frozen=True)
class FeedForward(Layer):
    """Two linear layers with a function between them.

    Parameters
    ----------
    dim : int
        Length of the rows of input and output.
    hidden : int, optional
        Length of the rows between, default ``4 * dim``.
    activation : {"gelu", "gelu_tanh", "relu", "relu2", "geglu", "swiglu"}, default "gelu"
        "gelu" is exact, "gelu_tanh" its usual approximation, "relu2" the square of "relu". In
        "geglu" and "swiglu" a half of twice as many columns is multiplied with GELU, or SiLU, of
        the other.
    bias : bool, default True
        Whether the linear layers have one.
    dropout : float, default 0
        Share of the hidden numbers that are dropped in training.
    std : float, optional
        Standard deviation of the first weights of the second layer, default ``hidden ** -0.5``.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.FeedForward(8, activation="swiglu")
    >>> layer.apply(layer.init(np.random.default_rng(0)), np.ones((2, 8))).shape
    (2, 8)
    """

    dim: int
    hidden: int | None = None
    activation: str = "gelu"
    bias: bool = True
    dropout: float = 0.0
    std: float | None = None

    def __post_init__(self) -> None:
        validation.choice("activation", self.activation, ACTIVATIONS)

    @cached_property
    def parts(self) -> dict[str, Layer]:
        hidden = 4 * self.dim if self.hidden is None else self.hidden
        wide = hidden * (2 if self.activation in GATED else 1)
        return {
            "up": Linear(self.dim, wide, self.bias),
            "activation": _Activation(self.activation),
            "dropout": Dropout(self.dropout),
            "down": Linear(hidden, self.dim, self.bias, self.std),
        }

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        pulls = []
        for name, layer in self.parts.items():
            x, pull = part(layer, name, params, x, key)
            pulls.append(pull)

        def pullback(grad: Array, grads: Params) -> Array:
            for pull in reversed(pulls):
                grad = pull(grad, grads)
            return grad

        return x, pullback
