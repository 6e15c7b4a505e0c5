"""How far independent groups of features are apart: the standard error of what they have in common.

Each block of the map is a group.  ``read_chunk`` sums numerators and denominators of every group
apart, as the product with its part of the state gives them; here they are kept, joined and
compared.
"""

from __future__ import annotations

import math

from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.pack import write_rows
from favor_np.cpu.kernels.simd import (
    exp2,
    fma,
    load,
    maximum,
    nearest,
    splat,
    store,
    transpose,
)
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.tiles import CHUNK


@jit()
def count_shares(par, count, first, keys, phi, z, slot, r0, g):
    """Add the squares of what each feature of a tile has in the denominators."""
    lanes = VECTOR_BYTES // phi.itemsize
    for i in range(0, CHUNK, lanes):
        if first:
            for j in range(i, i + lanes):
                store(g.squares, j, 0, splat(phi, 0))
        for r in range(0, phi.shape[0], lanes):
            transpose(phi, r, i, g.turned)
    for r in range(0, phi.shape[0], lanes):
        folded = load(z, slot, r0 + r)
        for i in range(count):
            if par.causal:
                folded = folded + load(keys, i, r)
            share = load(g.turned, i, r) * folded
            store(g.squares, i, 0, fma(share, share, load(g.squares, i, 0)))


@jit()
def rescale_squares(new, top, cols, squares):
    """Rescale what was summed under `top` where `new` is higher."""
    for i in range(cols):
        if new[0, i] > top[0, i]:
            by = 4.0 ** max(float(top[0, i] - new[0, i]), -500.0)
            for lane in range(squares.shape[1]):
                squares[i, lane] *= by


@jit()
def keep_group(t, g, b):
    """Keep the sums of group b."""
    for i in range(CHUNK):
        g.den[b, i], g.top[b, i] = t.den[0, i], t.top[0, i]
        total = g.squares[i, 0]
        for lane in range(1, g.squares.shape[1]):
            total += g.squares[i, lane]
        g.shares[b, i] = total
        for x in range(t.num.shape[1]):
            g.num[b * CHUNK + i, x] = t.num[i, x]


@jit()
def join_groups(t, g, count, call, row, batch):
    """Write the rows of all groups together, their standard errors and effective sample sizes."""
    for i in range(0, CHUNK, VECTOR_BYTES // g.den.itemsize):
        higher = nearest(load(g.top, 0, i))
        for b in range(1, g.den.shape[0]):
            higher = maximum(higher, nearest(load(g.top, b, i)))
        den = shares = splat(g.den, 0)
        for b in range(g.den.shape[0]):
            weight = exp2(splat(g.den, 0), nearest(load(g.top, b, i)) - higher)
            store(g.top, b, i, weight)
            den = fma(weight, load(g.den, b, i), den)
            shares = fma(weight * weight, load(g.shares, b, i), shares)
        store(t.den, 0, i, den)
        store(t.top, 0, i, higher)
        store(t.part, 0, i, shares)
    for i in range(count):
        t.num[i] = 0
        for b in range(g.den.shape[0]):
            for x in range(t.num.shape[1]):
                t.num[i, x] += g.top[b, i] * g.num[b * CHUNK + i, x]
    write_rows(t.num, t.den[0], t.top[0], t.square, count, call, row)
    for i in range(count):
        compare_groups(t, g, i, call, row + i, batch)


@jit()
def compare_groups(t, g, i, call, row, batch):
    """The standard errors of one row: of each column its own and what all have in common."""
    rows, errors, sizes, variances = call.out, call.errors, call.sizes, call.variances
    groups, width = g.den.shape[0], rows.shape[1]
    dof, prior_dof, t_factor = call.error_bars[0], call.error_bars[1], call.error_bars[2]
    den, inverse = t.den[0, i], t.den[0, i]
    sizes[row] = 0
    if den != 0:
        inverse = 1 / den
        sizes[row] = den * (den / t.part[0, i])
    if t.square[i] == math.inf:
        inverse *= math.nan
    t.spare[i] = 0
    for b in range(groups):
        scale = g.top[b, i] * inverse
        share = g.den[b, i] * scale
        for x in range(width):
            apart = g.num[b * CHUNK + i, x] * scale - share * rows[row, x]
            t.spare[i, x] += apart * apart
    mean = rows.dtype.type(0)
    for x in range(width):
        if variances[batch, x] > 0:
            mean += t.spare[i, x] / variances[batch, x]
    mean *= prior_dof / width
    factor = t_factor**2 * groups / ((groups - 1) * (dof + prior_dof))
    for x in range(width):
        errors[row, x] = math.sqrt(factor * (dof * t.spare[i, x] + variances[batch, x] * mean))
