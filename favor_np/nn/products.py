"""Matrix products of rows, in blocks that threads share: the same bits on any number of threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from favor_np.cpu.threads import POOL, resolve_threads
from favor_np.nn.blas import one_thread
from favor_np.nn.memory import empty
from favor_np.nn.tree import Array

#: Rows, or columns, that two blocks have at most, and multiply-adds below which there is but one.
BLOCK, LEAST = 2048, 1 << 22


class _Jobs:
    """Jobs in Python, which threads share as they share those of a kernel."""

    def __init__(self, do: Callable[[int], object], count: int) -> None:
        self._do, self._count, self._left = do, count, count
        self._next, self._lock = itertools.count(), threading.Lock()
        self._working, self._told = 0, False
        self.errors: list[BaseException] = []

    def load(self) -> Callable[[bytes], int]:
        return self._run

    def _run(self, _: bytes) -> int:
        """Do jobs until none is left; whoever is the last to work says how many there were."""
        with self._lock:
            self._working += 1
        try:
            while (job := next(self._next)) < self._left:
                self._do(job)
        except BaseException as error:  # an interrupt: others may still work on these arrays
            self.errors.append(error)
            self._left = 0
        with self._lock:
            self._working -= 1
            last = not self._working and not self._told
            self._told |= last
            return self._count if last else 0


def share(do: Callable[[int], object], count: int) -> None:
    """Do ``do(0)`` to ``do(count - 1)`` on our threads."""
    threads = resolve_threads(None)
    if count <= 1 or threads <= 1:
        for job in range(count):
            do(job)
        return
    jobs = _Jobs(do, count)
    POOL.call(cast(Any, jobs), (), (), count, threads)
    if jobs.errors:
        raise jobs.errors[0]


def _blocks(count: int, work: int, do: Callable[[slice], object]) -> None:
    """Do so many rows, or columns, of a product of so many multiply-adds, in blocks."""
    with one_thread():
        if work < LEAST:
            do(slice(count))
            return
        # An even number of blocks, so that two threads share evenly; small ones cost a tenth more.
        blocks = 2 * -(-count // BLOCK)
        size = -(-count // blocks)
        share(lambda job: do(slice(job * size, (job + 1) * size)), blocks)


def _multiply(a: Array, b: Array, shape: tuple[int, ...]) -> Array:
    """Return rows times a matrix, in an array of this shape."""
    out = empty(shape, b.dtype)
    rows, flat = _flat(a), out.reshape(-1, shape[-1])
    work = rows.size * shape[-1]
    _blocks(len(rows), work, lambda these: np.matmul(rows[these], b, out=flat[these]))
    return out


def multiply(x: Array, weight: Array) -> Array:
    """Return x @ weight.T for rows x (..., inputs) and a weight (outputs, inputs)."""
    return _multiply(x, weight.T, (*x.shape[:-1], len(weight)))


def multiply_few(x: Array, weight: Array) -> Array:
    """Return the same for a few rows, by one call of NumPy."""
    y: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    return y.reshape(*x.shape[:-1], len(weight))


def multiply_back(grad: Array, weight: Array) -> Array:
    """Return grad @ weight: the gradient of the rows."""
    return _multiply(grad, weight, (*grad.shape[:-1], weight.shape[1]))


def add_product(to: Array, grad: Array, x: Array) -> None:
    """Add grad.T @ x, summed over all rows: the gradient of the weight."""
    g, x, product = _flat(grad).T, _flat(x), empty(to.shape, to.dtype)
    work = g.size * x.shape[1]
    if len(g) >= x.shape[1]:  # the longer side is cut
        _blocks(len(g), work, lambda these: np.matmul(g[these], x, out=product[these]))
    else:
        _blocks(x.shape[1], work, lambda these: np.matmul(g, x[:, these], out=product[:, these]))
    to += product


def add_sum(to: Array, grad: Array) -> None:
    """Add the sum of rows: the gradient of a bias."""
    to += _flat(grad).sum(0)


def _flat(x: Array) -> Array:
    """Return rows without their leading axes."""
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])
