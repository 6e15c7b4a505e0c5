"""The layer that treats every position alike: up, a function of each number, and down again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from favor_np import validation
from favor_np.nn.fused import GATED, activate, activate_back
from favor_np.nn.layer import InOrder, Key, Layer, Pullback
from favor_np.nn.linear import Dropout, Linear
from favor_np.nn.tree import Array, Params

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "geglu", "swiglu")


@dataclass(frozen=True)
class _Activation(Layer):
    name: str

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        return activate(self.name, x), lambda grad, _: activate_back(self.name, x, grad)


@dataclass(frozen=True)
class FeedForward(InOrder):
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
