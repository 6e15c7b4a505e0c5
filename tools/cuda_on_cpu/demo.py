"""Small kernels on which the checkers are tested: each has a tail, a barrier and a loop."""

import math

import numba
import numpy as np
from numba import cuda

f4 = numba.float32
THREADS = 64


def softmax_rows(x, out, columns):
    """out[b] = softmax of x[b], one block a row; its threads go over the columns together."""
    most = cuda.shared.array(THREADS, f4, alignment=16)
    total = cuda.shared.array(THREADS, f4, alignment=16)
    row = cuda.blockIdx.x
    t = cuda.threadIdx.x
    highest = f4(-math.inf)
    for i in range(t, columns, THREADS):
        highest = max(highest, x[row, i])
    most[t] = highest
    cuda.syncthreads()
    width = THREADS // 2
    while width > 0:
        if t < width:
            most[t] = max(most[t], most[t + width])
        cuda.syncthreads()
        width //= 2
    highest = most[0]
    mine = f4(0)
    for i in range(t, columns, THREADS):
        mine += math.exp(x[row, i] - highest)
    total[t] = mine
    cuda.syncthreads()
    width = THREADS // 2
    while width > 0:
        if t < width:
            total[t] += total[t + width]
        cuda.syncthreads()
        width //= 2
    for i in range(t, columns, THREADS):
        out[row, i] = math.exp(x[row, i] - highest) / total[0]


def softmax(x):
    """What `softmax_rows` has to find, in float64."""
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def running_total(x, out, n):
    """out[i] = x[0] + ... + x[i], one block; tile by tile through shared memory."""
    tile = cuda.shared.array(THREADS, f4, alignment=16)
    t = cuda.threadIdx.x
    before = f4(0)
    for first in range(0, n, THREADS):
        if first + t < n:
            tile[t] = x[first + t]
        else:
            tile[t] = f4(0)
        cuda.syncthreads()
        if first + t < n:
            mine = before
            for i in range(t + 1):
                mine += tile[i]
            out[first + t] = mine
        for i in range(THREADS):
            before += tile[i]
        cuda.syncthreads()


#: (what is planted, kernel, old, new, what is found)
BUGS = [
    ("a barrier less before the tile is read", running_total,
     "        cuda.syncthreads()\n        if first", "        if first", "race"),
    ("a barrier less before the tile is written anew", running_total,
     "            before += tile[i]\n        cuda.syncthreads()\n",
     "            before += tile[i]\n", "race"),
    ("no guard where the tail is read", running_total,
     "        if first + t < n:\n            tile[t]", "        if True:\n            tile[t]",
     "out of bounds"),
    ("no guard where the tail is written", running_total,
     "        if first + t < n:\n            mine", "        if True:\n            mine",
     "out of bounds"),
    ("a read one place too far", running_total,
     "before += tile[i]", "before += tile[i + 1]", "out of bounds"),
    ("a tail that nothing fills", running_total,
     "        else:\n            tile[t] = f4(0)\n", "", "uninitialised"),
    ("a result that nothing writes", running_total,
     "out[first + t] = mine", "out[first + (t & 31)] = mine", "unwritten"),
    ("a barrier that some threads pass by", running_total,
     "            before += tile[i]\n        cuda.syncthreads()\n",
     "            before += tile[i]\n        if first + t < n:\n            cuda.syncthreads()\n",
     "barrier"),
    ("a barrier less in the tree of a sum", softmax_rows,
     "            total[t] += total[t + width]\n        cuda.syncthreads()\n",
     "            total[t] += total[t + width]\n", "race"),
    ("all blocks write one row", softmax_rows, "out[row, i]", "out[0, i]", "race"),
]  # fmt: skip
