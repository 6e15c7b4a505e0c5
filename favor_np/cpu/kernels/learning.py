"""Kernels of learning: a loss with its gradient, and the optimiser."""

from __future__ import annotations

import math

from favor_np.cpu.kernels.counters import each_job
from favor_np.cpu.kernels.functions import exp
from favor_np.cpu.kernels.layers import block_of


@each_job
def cross_entropy(call, job):
    """Losses of rows of logits, and their gradient: a job of `records.Entropy`."""
    logits, grad = call.logits, call.grad
    factor, zero = logits.dtype.type(call.factor[0]), logits.dtype.type(0)
    classes = logits.shape[1]
    first, last = block_of(job, logits.shape[0])
    for i in range(first, last):
        target = call.targets[i]
        if target < 0:
            call.losses[i] = 0
            for j in range(classes):
                grad[i, j] = zero
            continue
        top = logits[i, 0]
        for j in range(1, classes):
            top = max(top, logits[i, j])
        total = zero
        for j in range(classes):
            grad[i, j] = exp(logits[i, j] - top)
            total += grad[i, j]
        call.losses[i] = math.log(total) - (logits[i, target] - top)
        scale = factor / total
        for j in range(classes):
            grad[i, j] *= scale
        grad[i, target] -= factor


@each_job
def square_sums(call, job):
    """The sum of squares of a piece: a job of `records.Squares`."""
    x, total = call.x, 0.0
    for i in range(call.pieces[job, 0], call.pieces[job, 1]):
        total += float(x[i]) * float(x[i])
    call.sums[job] = total


@each_job
def adam(call, job):
    """A step of AdamW on a piece, after which gradients are zero: a job of `records.Adam`."""
    x, grad, m, v, constants = call.x, call.grad, call.m, call.v, call.constants
    kind = x.dtype.type
    factor, a, b = kind(constants[0]), kind(1 - constants[1]), kind(1 - constants[2])
    rate, second, eps = kind(constants[3]), kind(constants[4]), kind(constants[5])
    kept = kind(constants[6]) if call.pieces[job, 2] else kind(1)
    zero = kind(0)
    for i in range(call.pieces[job, 0], call.pieces[job, 1]):
        g = grad[i] * factor
        first = m[i] + a * (g - m[i])
        square = v[i] + b * (g * g - v[i])
        m[i], v[i], grad[i] = first, square, zero
        x[i] = x[i] * kept - rate * first / (math.sqrt(square) * second + eps)
