"""Kernels of layers: norms of rows, and functions of every number, with their gradients.

A job is a block of rows.  Sums over all rows are made for each block apart, and added up in order
by who called: no bit depends on the number of threads.
"""

from __future__ import annotations

import math

from favor_np.cpu.kernels.counters import each_job
from favor_np.cpu.kernels.functions import gelu, gelu_tanh, relu, relu2, silu
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.simd import fma, load, splat, store, sum_lanes
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.tiles import LAYER_ROWS


@jit()
def block_of(job, rows):
    """The rows of a job: where they begin and end."""
    return job * LAYER_ROWS, min((job + 1) * LAYER_ROWS, rows)


@jit()
def normalize_row(call, i, eps, centred, length, turn):
    """Write one row, and those of its columns that the next row gets to there."""
    x, y, weight, bias = call.x, call.y, call.weight, call.bias
    dim = x.shape[1]
    zero = x.dtype.type(0)
    mean, square = zero, zero
    if centred:
        for j in range(dim):
            mean += x[i, j]
        mean /= x.dtype.type(dim)
    for j in range(dim):
        square += (x[i, j] - mean) * (x[i, j] - mean)
    inverse = x.dtype.type(1 / math.sqrt(square / dim + eps))
    call.stats[i, 0], call.stats[i, 1] = mean, inverse
    for j in range(turn):
        y[i, j] = (x[i, j] - mean) * inverse * weight[j]
    if turn < dim:
        if i % length == 0:
            for j in range(turn, dim):
                y[i, j] = zero
        if (i + 1) % length != 0:
            for j in range(turn, dim):
                y[i + 1, j] = (x[i, j] - mean) * inverse * weight[j]
    if bias.size > 0:
        for j in range(turn):
            y[i, j] += bias[j]
        if turn < dim and (i + 1) % length != 0:
            for j in range(turn, dim):
                y[i + 1, j] += bias[j]


@each_job
def normalize(call, job):
    """Normalise rows: a job of `records.Normalize`."""
    eps, centred = call.constants[0], call.constants[1] != 0
    length, turn = int(call.constants[2]), int(call.constants[3])
    first, last = block_of(job, call.x.shape[0])
    for i in range(first, last):
        normalize_row(call, i, eps, centred, length, turn)


@jit()
def back_row(call, job, i, turn, end, centred):
    """The gradient of one row, which has cotangents in the columns up to `end`."""
    x, grad, weight, sums, dx = call.x, call.grad, call.weight, call.sums, call.dx
    dim = x.shape[1]
    mean, inverse = call.stats[i, 0], call.stats[i, 1]
    along, total = x.dtype.type(0), x.dtype.type(0)
    for j in range(end):
        g, unit = grad[i if j < turn else i + 1, j], (x[i, j] - mean) * inverse
        sums[job, 0, j] += g * unit
        if sums.shape[1] > 1:
            sums[job, 1, j] += g
        along += g * weight[j] * unit
        total += g * weight[j]
    along /= x.dtype.type(dim)
    total = total / x.dtype.type(dim) if centred else x.dtype.type(0)
    for j in range(dim):
        g = grad[i if j < turn else i + 1, j] * weight[j] if j < end else x.dtype.type(0)
        dx[i, j] = (g - total - along * (x[i, j] - mean) * inverse) * inverse


@jit()
def back_row_of_vectors(call, job, i, turn, end, centred):
    """The same, of whole vectors."""
    x, grad, weight, sums, dx = call.x, call.grad, call.weight, call.sums[job], call.dx
    dim, lanes = x.shape[1], VECTOR_BYTES // x.itemsize
    mean, inverse = splat(x, call.stats[i, 0]), splat(x, call.stats[i, 1])
    along, total = splat(x, 0), splat(x, 0)
    for j in range(0, end, lanes):
        g, unit = load(grad, i if j < turn else i + 1, j), (load(x, i, j) - mean) * inverse
        store(sums, 0, j, fma(g, unit, load(sums, 0, j)))
        if sums.shape[0] > 1:
            store(sums, 1, j, g + load(sums, 1, j))
        weighted = g * load(weight, 0, j)
        along, total = fma(weighted, unit, along), total + weighted
    slope = splat(x, -sum_lanes(along) / x.dtype.type(dim))
    shift = splat(x, -sum_lanes(total) / x.dtype.type(dim) if centred else x.dtype.type(0))
    for j in range(0, dim, lanes):
        g = shift
        if j < end:
            g = fma(load(grad, i if j < turn else i + 1, j), load(weight, 0, j), shift)
        store(dx, i, j, fma(slope, (load(x, i, j) - mean) * inverse, g) * inverse)


@each_job
def normalize_back(call, job):
    """The gradient of that: a job of `records.NormalizeBack`."""
    rows, dim = call.x.shape
    centred = call.constants[1] != 0
    length, turn = int(call.constants[2]), int(call.constants[3])
    lanes = VECTOR_BYTES // call.x.itemsize
    whole = dim % lanes == 0 and turn % lanes == 0
    first, last = block_of(job, rows)
    for i in range(first, last):
        end = dim if (i + 1) % length != 0 else turn  # the last row's went to no other
        if whole:
            back_row_of_vectors(call, job, i, turn, end, centred)
        else:
            back_row(call, job, i, turn, end, centred)


def _rows_of(function):
    """Make what applies a function to rows, and what pulls cotangents back through it."""

    @jit()
    def forward(call, gated, first, last):
        x, y = call.x, call.y
        width = y.shape[1]
        for i in range(first, last):
            if gated:
                for j in range(width):
                    y[i, j] = function(x[i, j])[0] * x[i, width + j]
            else:
                for j in range(width):
                    y[i, j] = function(x[i, j])[0]

    @jit()
    def back(call, gated, first, last):
        x, grad, dx = call.x, call.grad, call.dx
        width = grad.shape[1]
        for i in range(first, last):
            if gated:
                for j in range(width):
                    value, slope = function(x[i, j])
                    other, g = x[i, width + j], grad[i, j]
                    dx[i, j] = g * other * slope
                    dx[i, width + j] = g * value
            else:
                for j in range(width):
                    dx[i, j] = grad[i, j] * function(x[i, j])[1]

    return forward, back


def _chosen(gelu, gelu_tanh, relu, relu2, silu):
    """Make what calls the one of these that the constants of a call name."""

    @jit()
    def choose(call, first, last):
        kind, gated = call.constants[0], call.constants[1] != 0
        if kind == 0:
            gelu(call, gated, first, last)
        elif kind == 1:
            gelu_tanh(call, gated, first, last)
        elif kind == 2:
            relu(call, gated, first, last)
        elif kind == 3:
            relu2(call, gated, first, last)
        else:
            silu(call, gated, first, last)

    return choose


_forward, _back = (
    _chosen(*each)
    for each in zip(*map(_rows_of, (gelu, gelu_tanh, relu, relu2, silu)), strict=True)
)


@each_job
def activate(call, job):
    """Apply a function to every number: a job of `records.Activate`."""
    first, last = block_of(job, call.x.shape[0])
    _forward(call, first, last)


@each_job
def activate_back(call, job):
    """The gradient of that: a job of `records.ActivateBack`."""
    first, last = block_of(job, call.x.shape[0])
    _back(call, first, last)
