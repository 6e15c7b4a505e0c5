"""Matrix products of rows, in blocks that threads share: the same bits on any number of threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from favor_np.cpu.record import fixed
from favor_np.cpu.threads import POOL, resolve_threads
from favor_np.nn.blas import one_thread
from favor_np.nn.memory import empty
from favor_np.nn.tree import Array

#: Rows of the result that two blocks have at most, and multiply-adds below which there is but one.
BLOCK, LEAST = 2048, 1 << 22


class _Jobs:
    """Jobs in Python, which threads share as they share those of a kernel."""

    def __init__(self, do: Callable[[int], None], count: int) -> None:
        self._do, self._count = do, count
        self._next, self._finished = itertools.count(), 0
        self._lock = threading.Lock()

    def load(self) -> Callable[[bytes], int]:
        return self._run

    def _run(self, _: bytes) -> int:
        mine = 0
        while (job := next(self._next)) < self._count:
            self._do(job)
            mine += 1
        with self._lock:
            self._finished += mine
            return self._finished if mine else 0


def share(do: Callable[[int], None], count: int) -> None:
    """Do ``do(0)`` to ``do(count - 1)`` on our threads."""
    threads = resolve_threads(None)
    if count <= 1 or threads <= 1:
        for job in range(count):
            do(job)
    else:
        jobs = cast(Any, _Jobs(do, count))
        POOL.call(jobs, (), fixed(()), count, threads)


def _blocks(a: Array, b: Array, c: Array) -> None:
    """Compute c = a @ b, in blocks of the rows of a."""
    count, work = len(a), a.size * b.shape[1]
    # An even number of blocks, so that two threads have as much to do; small ones cost a tenth more.
    blocks = 2 * -(-count // BLOCK) if work >= LEAST else 1
    rows = -(-count // blocks)

    def block(job: int) -> None:
        these = slice(job * rows, (job + 1) * rows)
        np.matmul(a[these], b, out=c[these])

    with one_thread():
        share(block, blocks)


def multiply(x: Array, weight: Array) -> Array:
    """Return x @ weight.T for rows x (..., inputs) and a weight (outputs, inputs)."""
    y = empty((*x.shape[:-1], len(weight)), weight.dtype)
    _blocks(_flat(x), weight.T, _flat(y))
    return y


def multiply_back(grad: Array, weight: Array) -> Array:
    """Return grad @ weight: the gradient of the rows."""
    x = empty((*grad.shape[:-1], weight.shape[1]), weight.dtype)
    _blocks(_flat(grad), weight, _flat(x))
    return x


def add_product(to: Array, grad: Array, x: Array) -> None:
    """Add grad.T @ x, summed over all rows: the gradient of the weight."""
    product = empty(to.shape, to.dtype)
    _blocks(_flat(grad).T, _flat(x), product)
    to += product


def add_sum(to: Array, grad: Array) -> None:
    """Add the sum of rows: the gradient of a bias."""
    to += _flat(grad).sum(0)


def _flat(x: Array) -> Array:
    """Return rows without their leading axes."""
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])
