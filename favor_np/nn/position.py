"""Layers that tell positions apart: rotations, learned rows, and the token before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from favor_np import validation
from favor_np.nn.layer import Key, Layer, Pullback, cotangent, leaf, normal, rows
from favor_np.nn.tree import Array, Params


@lru_cache(maxsize=16)
def angles(length: int, dim: int, base: float, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return cosine and sine (length, dim / 2) of position times frequency."""
    turns = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    return np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)


@lru_cache(maxsize=16)
def _tables(
    length: int, dim: int, base: float, pairs: str, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """Return the tables of `Rotary.turns`."""
    cos, sin = angles(length, dim, base, dtype)
    if pairs == "halves":
        return np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
    return np.repeat(cos, 2, -1), np.stack([-sin, sin], -1).reshape(length, dim)


@dataclass(frozen=True)
class Rotary(Layer):
    """Rotations of pairs of numbers by angles that grow with the position.

    The product of a query and a key then depends on the distance between them alone
    (Su et al. 2021, arXiv:2104.09864).

    Parameters
    ----------
    dim : int
        Length of a vector, even.
    pairs : {"adjacent", "halves"}, default "adjacent"
        Which numbers make a pair: 2i and 2i + 1, as in performer-pytorch; or i and i + dim / 2.
    base : float, default 10000
        Pair i turns by ``base ** (-2i / dim)`` a position.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> nn.Rotary(2).apply({}, np.array([[1.0, 0], [1, 0]])).round(4)
    array([[1.    , 0.    ],
           [0.5403, 0.8415]])
    """

    dim: int
    pairs: Literal["adjacent", "halves"] = "adjacent"
    base: float = 1e4

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ValueError(f"dim must be even, got {self.dim}")
        validation.choice("pairs", self.pairs, ("adjacent", "halves"))

    def turns(self, start: int, count: int, dtype: Any) -> tuple[Array, Array]:
        """Return tables (count, dim) of the positions from `start` on.

        A rotated number is its product with the first, plus that of its partner with the second.
        """
        end = start + count
        known = 1 << (end - 1).bit_length() if end else 0  # so that few tables are made
        cos, sin = _tables(known, self.dim, self.base, self.pairs, np.dtype(dtype))
        return cos[start:end], sin[start:end]

    def _partners(self, x: Array) -> Array:
        """Return the other number of each pair."""
        if self.pairs == "halves":
            return np.roll(x, self.dim // 2, -1)
        return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)

    def rotate(self, x: Array, start: int = 0, *, back: bool = False) -> Array:
        """Rotate vectors (..., L, dim) of the positions from `start` on, or back."""
        cos, sin = self.turns(start, x.shape[-2], x.dtype)
        return x * cos + self._partners(x) * (-sin if back else sin)

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        x = validation.tensor("x", x)
        validation.last_axis("x", x.shape, self.dim, "the rotation")
        return self.rotate(x), lambda grad, _: self.rotate(grad, back=True)

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        start = state.get("length", 0)
        state["length"] = start + x.shape[-2]
        return self.rotate(x, start)


@dataclass(frozen=True)
class LearnedPositions(Layer):
    """A learned row for each position, added to the input.

    Parameters
    ----------
    length : int
        The longest input.
    dim : int
        Length of a row.
    std : float, default 0.02
        Standard deviation of the first weights.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.LearnedPositions(100, 8)
    >>> layer.apply(layer.init(np.random.default_rng(0)), np.zeros((2, 10, 8))).shape
    (2, 10, 8)
    """

    length: int
    dim: int
    std: float = 0.02

    def init(self, rng: np.random.Generator) -> Params:
        return {"weight": normal(rng, (self.length, self.dim), self.std)}

    def _rows(self, params: Params, start: int, count: int) -> Array:
        weight = leaf(params, "weight", (self.length, self.dim))
        if start + count > self.length:
            raise ValueError(f"x must have at most {self.length} positions, got {start + count}")
        return weight[start : start + count]

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        table = self._rows(params, 0, np.shape(x)[-2])
        x = rows("x", x, self.dim, table.dtype)

        def pullback(grad: Array, grads: Params) -> Array:
            grad = cotangent(grad, x.shape, x.dtype)
            grads["weight"][: len(table)] += grad.reshape(-1, *table.shape).sum(0)
            return grad

        return x + table, pullback

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        start = state.get("length", 0)
        table = self._rows(params, start, x.shape[-2])
        state["length"] = start + x.shape[-2]
        return x + table


@dataclass(frozen=True)
class SinusoidalPositions(Layer):
    """Sines and cosines of the position, added to the input (Vaswani et al. 2017).

    Parameters
    ----------
    dim : int
        Length of a row, even: first the sines, then the cosines, of dim / 2 frequencies.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> nn.SinusoidalPositions(2).apply({}, np.zeros((2, 2))).round(4)
    array([[0.    , 1.    ],
           [0.8415, 0.5403]])
    """

    dim: int

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ValueError(f"dim must be even, got {self.dim}")

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        return self.extend(params, {}, x), lambda grad, _: grad

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        x = validation.tensor("x", x)
        validation.last_axis("x", x.shape, self.dim, "the positions")
        start = state.get("length", 0)
        end = state["length"] = start + x.shape[-2]
        known = 1 << (end - 1).bit_length() if end else 0
        cos, sin = angles(known, self.dim, 1e4, x.dtype)
        return x + np.concatenate([sin, cos], -1)[start:end]


@dataclass(frozen=True)
class ShiftTokens(Layer):
    """Some columns of every row come from the row before, and some from the next.

    So a single layer can compare a token with the one before it. It has no parameters.

    Parameters
    ----------
    causal : bool, default True
        True: the second half of the columns comes from the row before. False: the first third
        comes from the next row, the last third from the row before. As in performer-pytorch.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> nn.ShiftTokens().apply({}, np.array([[1, 2], [3, 4], [5, 6]]))
    array([[1, 0],
           [3, 2],
           [5, 4]])
    """

    causal: bool = True

    def _shifts(self, dim: int) -> list[tuple[slice, int]]:
        """Return which columns come from how many rows earlier."""
        if self.causal:
            return [(slice(dim // 2, dim // 2 * 2), 1)]
        third = dim // 3
        return [(slice(0, third), -1), (slice(2 * third, 3 * third), 1)]

    def _shifted(self, x: Array, sign: int) -> Array:
        y = x.copy()
        for columns, by in self._shifts(x.shape[-1]):
            if by * sign > 0:
                y[..., 1:, columns], y[..., :1, columns] = x[..., :-1, columns], 0
            else:
                y[..., :-1, columns], y[..., -1:, columns] = x[..., 1:, columns], 0
        return y

    def vjp(self, params: Params, x: Any, *, key: Key | None = None) -> tuple[Array, Pullback]:
        return self._shifted(np.asarray(x), 1), lambda grad, _: self._shifted(grad, -1)

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        if not self.causal:
            raise ValueError("causal must be True to go on from earlier rows, got False")
        ((columns, _),) = self._shifts(x.shape[-1])
        y = self._shifted(x, 1)
        y[..., 0, columns] = state.get("last", 0)
        state["last"] = x[..., -1, columns].copy()
        return y
