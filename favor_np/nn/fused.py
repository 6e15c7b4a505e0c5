"""The seam between layers and their compiled kernels: every pass over memory is one call."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from favor_np.cpu.code import kernel
from favor_np.cpu.threads import POOL, resolve_threads
from favor_np.cpu.tiles import LAYER_ROWS
from favor_np.nn.memory import empty, empty_like
from favor_np.nn.tree import Array

#: Numbers below which a second thread costs more than it does.
LEAST = 1 << 16
#: The functions of feed-forward layers, in the order that kernels know them by.
FUNCTIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")
#: Functions of half the columns, that multiply the other half.
GATED = {"geglu": "gelu", "swiglu": "silu"}
_NONE = {np.dtype(kind): np.empty((1, 0), kind) for kind in (np.float32, np.float64)}


@lru_cache(maxsize=256)
def _numbers(dtype: Any, *numbers: float) -> Array:
    """Return constants of kernels, which only read them."""
    return np.array(numbers, dtype)


def _run(name: str, arrays: tuple[Array, ...], rest: tuple[Array, ...], count: int) -> None:
    """Run so many jobs; the first array has the dtype that is computed in."""
    if count:
        threads = 1 if arrays[0].size + arrays[1].size < LEAST else resolve_threads(None)
        POOL.call(kernel(name, arrays[0].dtype), arrays, rest, count, threads)


def _blocks(rows: int) -> int:
    return -(-rows // LAYER_ROWS)


def flat(x: Array) -> Array:
    """Return rows without their leading axes."""
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


class Norm:
    """Rows normalised: the call, and how it is pulled back.

    Columns from `turn` on come from the row before, in sequences of `length` rows.
    """

    def __init__(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        eps: float,
        *,
        centred: bool,
        shifted: bool = False,
    ) -> None:
        length, dim = x.shape[-2] if x.ndim > 1 else 1, x.shape[-1]
        turn = dim - dim // 2 if shifted else dim
        self._x, self._weight, self._biased = flat(x), weight, bias is not None
        self._stats = np.empty((len(self._x), 2), x.dtype)
        self._constants = _numbers(np.float64, eps, centred, max(length, 1), turn)
        self.y = empty_like(x)
        bias = _NONE[x.dtype][0] if bias is None else bias
        rest = (weight, bias, self._constants)
        _run("normalize", (self._x, flat(self.y), self._stats), rest, _blocks(len(self._x)))

    def back(self, grad: Array) -> tuple[Array, Array]:
        """Return the gradient of x, and those of weight and, if there is one, of bias."""
        blocks, dx = _blocks(len(self._x)), empty_like(grad)
        sums = np.zeros((blocks, 1 + self._biased, grad.shape[-1]), grad.dtype)
        arrays = (self._x, self._stats, flat(grad), flat(dx), sums)
        _run("normalize_back", arrays, (self._weight, self._constants), blocks)
        return dx, sums.sum(0)


def _function(name: str, x: Array) -> tuple[Array, int]:
    """Return how kernels know a function, and how many columns it makes of those of x."""
    gated = name in GATED
    number = FUNCTIONS.index(GATED.get(name, name))
    return _numbers(np.int64, number, gated), x.shape[-1] // 2 if gated else x.shape[-1]


def activate(name: str, x: Array) -> Array:
    """Return the function of every number; if gated, of half the columns, times the others."""
    constants, width = _function(name, x)
    y, x = empty((*x.shape[:-1], width), x.dtype), flat(x)
    _run("activate", (x, flat(y)), (constants,), _blocks(len(x)))
    return y


def activate_back(name: str, x: Array, grad: Array) -> Array:
    """Return the gradient of x."""
    constants, _ = _function(name, x)
    dx, x = empty_like(x), flat(x)
    _run("activate_back", (x, flat(grad), flat(dx)), (constants,), _blocks(len(x)))
    return dx


class Heads:
    """How rows (..., L, all heads * d) are cut into heads (..., heads, L, d), and put together.

    Heads of queries and keys are put on spheres of these lengths, if there are any, and rotated, if
    there are tables of cosines and sines (L, d): see `Rotary.turns`.
    """

    def __init__(
        self,
        counts: tuple[int, int, int],
        dim: int,
        *,
        lengths: Array | None = None,
        turns: tuple[Array, Array] | None = None,
        adjacent: bool = True,
    ) -> None:
        self._counts, self._dim = counts, dim
        self.lengths, self._turns, self._adjacent = lengths, turns, adjacent

    def _rest(self, dtype: Any, length: int) -> tuple[Array, ...]:
        lengths = _NONE[dtype][0] if self.lengths is None else self.lengths
        cos, sin = (_NONE[dtype],) * 2 if self._turns is None else self._turns
        apart = 1 if self._adjacent else self._dim // 2
        return lengths, cos, sin, _numbers(np.int64, length, *self._counts, apart)

    def split(self, rows: Array) -> list[Array]:
        """Return the heads of queries, keys and values."""
        *lead, length, _ = rows.shape
        heads = [empty((*lead, n, length, self._dim), rows.dtype) for n in self._counts]
        rows, none = flat(rows), _NONE[rows.dtype]
        arrays = (rows, none, *(x.reshape(-1, self._dim) for x in heads), np.empty((0, 0)))
        _run("split_heads", arrays, self._rest(rows.dtype, length), _blocks(len(rows)))
        return heads

    def merge(self, heads: Iterable[Array], rows: Array | None = None) -> tuple[Array, Array]:
        """Pull cotangents of heads back to `rows`, which they were made of; that of the lengths.

        Without rows heads are just put together.
        """
        heads = [np.ascontiguousarray(x) for x in heads]
        *lead, _, length, dim = heads[0].shape
        out = empty((*lead, length, sum(self._counts) * dim), heads[0].dtype)
        blocks = _blocks(out.size // out.shape[-1])
        sums = np.zeros((blocks, self._counts[0] + self._counts[1]))
        source = _NONE[out.dtype] if rows is None else flat(rows)
        rest = self._rest(out.dtype, length)
        arrays = (source, flat(out), *(x.reshape(-1, dim) for x in heads), sums)
        _run("merge_heads", arrays, rest, blocks)
        return out, sums.sum(0)


def cross_entropy(logits: Array, targets: Array, factor: float) -> tuple[Array, Array]:
    """Return the losses of rows, and `factor` times the gradient of their sum."""
    grad, losses = empty_like(logits), np.empty(len(logits))
    rest = (np.array([factor]),)
    _run("cross_entropy", (logits, grad, losses, targets), rest, _blocks(len(logits)))
    return losses, grad


def square_sum(x: Array, pieces: Array) -> float:
    """Return the sum of the squares of the numbers in pieces of a vector."""
    sums = np.empty(len(pieces))
    _run("square_sums", (x, sums), (pieces,), len(pieces))
    return float(sums.sum())


def adam(vectors: tuple[Array, ...], pieces: Array, constants: Array) -> None:
    """Change parameters, in pieces, by gradients, which become zero, and both moments."""
    _run("adam", vectors, (pieces, constants), len(pieces))
