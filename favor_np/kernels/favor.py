"""The fused FAVOR+ kernels: fold keys and values into a state, read it out with queries.

A state is ``(c, S, z)`` for each feature r: ``S[r] * 2**c[r] = sum_j phi_r(k_j) v_j`` and
``z[r] * 2**c[r] = sum_j phi_r(k_j)``.  The integer c[r] follows the largest log2-feature seen, so
that nothing overflows and some key always contributes at least 2**-RAISE to its feature; moving it
is exact, and therefore no bit of an earlier output depends on a later key.

Everything happens on chunks of CHUNK positions and tiles of up to CHUNK features:

    keys    (C, d) -> pack -> project (C, F) -> activate -> phi_k (C, F)
    queries (C, d) -> pack -> project (F, C) -> activate -> phi_q (F, C)
    num (C, dv) += phi_q.T S + tril(phi_q.T phi_k.T) V,   then   S += phi_k.T V

Keys lie token-major and queries feature-major: then both maxima run along vectors.
Features are numbered sign-major: with antithetic pairs, row ``r`` of W is feature r and, with its
sign turned, feature ``half + r``; one product serves both.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from favor_np.kernels.gemm import gemm, gemm_t, project_t, project_two
from favor_np.kernels.jit import EXACT, jit
from favor_np.kernels.simd import (
    VECTOR_BYTES,
    exp2,
    fetch_add,
    fma,
    highest,
    load,
    maximum,
    nearest,
    splat,
    store,
    sum_lanes,
    transpose,
    view,
)

CHUNK = 64
POSITIVE, RELU, ELU = 0, 1, 2
#: Sets of features that a single long causal problem is cut into.
SETS = 2
#: log2 head-room over the running maxima before they are moved.
RAISE_KEYS, RAISE_QUERIES = 16, 24
LOG2E = math.log2(math.e)

#: What a kernel needs to know about the feature map and the call.
Parameters = namedtuple(
    "Parameters",
    "kind signs key_norm kernel_epsilon limit far masked span causal partial",
)
#: The tiles a thread works on, cut from its workspace.
Tiles = namedtuple(
    "Tiles",
    "rows columns raw phi values num spare scores keys records height den part sums scale token square "
    "top higher excess",
)


@jit()
def cut(floats, start, rows, cols):
    """The next matrix of a workspace, and where the one after it starts."""
    end = start + rows * cols
    return view(floats, start, rows, cols), end


@jit()
def carve(par, floats, ints, d, vcols, width, blocks):
    """Cut the tiles from one thread's workspace; ``workspace_size`` says how much they need."""
    lanes = VECTOR_BYTES // floats.itemsize
    dcols = -(-d // lanes) * lanes
    tiles = blocks * par.signs
    rows, at = cut(floats, 0, CHUNK, dcols)
    columns, at = cut(floats, at, dcols, CHUNK)
    raw, at = cut(floats, at, width, CHUNK)
    phi, at = cut(floats, at, width, CHUNK)
    values, at = cut(floats, at, CHUNK, vcols)
    num, at = cut(floats, at, CHUNK, vcols)
    spare, at = cut(floats, at, CHUNK, vcols)
    scores, at = cut(floats, at, CHUNK, CHUNK)
    flat, at = cut(floats, at, tiles * CHUNK, width)
    records, at = cut(floats, at, SETS, CHUNK * (CHUNK + vcols + 2))
    height, at = cut(floats, at, 1, CHUNK)
    den, at = cut(floats, at, 1, CHUNK)
    part, at = cut(floats, at, 1, CHUNK)
    sums, at = cut(floats, at, 1, tiles * width)
    scale, at = cut(floats, at, 1, tiles * width)
    token, at = cut(floats, at, 1, tiles * width)
    square, at = cut(floats, at, 1, CHUNK * 8 // floats.itemsize)
    top, mark = cut(ints, 0, 1, CHUNK)
    higher, mark = cut(ints, mark, 1, CHUNK)
    excess, mark = cut(ints, mark, CHUNK, lanes)
    keys = flat.reshape(tiles, CHUNK, width)
    return Tiles(rows, columns, raw, phi, values, num, spare, scores, keys, records, height[0], den, part,
                 sums, scale, token, square[0].view(np.float64), top, higher, excess)  # fmt: skip


@jit(fastmath=EXACT)
def shorten(source, row, target, i, limit):
    """Copy one row to target[i], shortened to limit or, if it is not finite, as zeros; its square.

    Scaled by its largest entry first: the square of a finite row may be infinite.
    """
    largest, square = 0.0, 0.0
    for x in range(source.shape[1]):
        largest = max(largest, abs(float(source[row, x])))
        if not math.isfinite(source[row, x]):
            square = math.inf
    if square == math.inf:
        for x in range(source.shape[1]):
            target[i, x] = 0
        return square
    for x in range(source.shape[1]):
        square += (float(source[row, x]) / largest) ** 2
    norm = math.sqrt(square)
    for x in range(source.shape[1]):
        target[i, x] = float(source[row, x]) / largest * (limit / norm)
    return min(largest * norm, 1e150) ** 2


@jit()
def pack(source, row, count, target, limit, squares):
    """Copy rows row:row+count of source to the zero-padded tile; their squared norms to squares.

    A finite row longer than limit is shortened to it; a row with NaN or infinity is zeroed and its
    square is infinite.
    """
    width = source.shape[1]
    for i in range(count):
        total = 0.0
        for x in range(width):
            value = source[row + i, x]
            target[i, x] = value
            total += float(value) * float(value)
        if not total <= limit * limit:
            total = shorten(source, row + i, target, i, limit)
        squares[i] = total
        for x in range(width, target.shape[1]):
            target[i, x] = 0
    for i in range(count, target.shape[0]):
        for x in range(target.shape[1]):
            target[i, x] = 0


@jit()
def pack_values(source, row, count, target, mask, mask_row):
    """Copy value rows to the zero-padded tile, masked ones as zeros; False if one is not finite."""
    width = source.shape[1]
    check = target.dtype.type(0)
    for i in range(count):
        if mask_row >= 0 and not mask[mask_row + i]:
            target[i] = 0
            continue
        for x in range(width):
            value = source[row + i, x]
            target[i, x] = value
            check += value * 0
    target[:count, width:] = 0
    target[count:] = 0
    return check == 0


@jit()
def across(rows, columns):
    """Transpose packed rows: products read a column of their left matrix at a time."""
    lanes = VECTOR_BYTES // rows.itemsize
    for i in range(0, CHUNK, lanes):
        for x in range(0, rows.shape[1], lanes):
            transpose(rows, i, x, columns)


@jit(fastmath=EXACT)
def log_feature(par, y):
    """log2 of the exponential part of a feature map at the projection y."""
    zero = splat(y, 0)
    if par.kind == POSITIVE:
        return y
    if par.kind == ELU:
        return maximum((y - maximum(y, zero)) * splat(y, LOG2E), splat(y, -par.far))
    return zero


@jit(fastmath=EXACT)
def factor(par, y):
    """What a feature map multiplies its exponential part with: elu(y) + 1 = e**min(y, 0) (1 + y+)."""
    if par.kind == POSITIVE:
        return splat(y, 1)
    if par.kind == ELU:
        return splat(y, 1) + maximum(y, splat(y, 0))
    return splat(y, par.kernel_epsilon) + maximum(y, splat(y, 0))


@jit(fastmath=EXACT)
def activate_keys(par, sign, rows, raw, height, bias, b, c, slot, r0, target, sums):
    """Projections raw (C, F) to key features (C, F) and their sums; the largest log2-feature."""
    lanes = VECTOR_BYTES // raw.itemsize
    worst = splat(c, 0)
    turn = splat(raw, sign)
    for f in range(0, raw.shape[1], lanes):
        shift, beta, total = load(c, slot, r0 + f), load(bias, b, f), splat(raw, 0)
        if par.kind == POSITIVE:
            for i in range(rows):
                y = fma(turn, load(raw, i, f), beta) - splat(raw, height[i])
                n = nearest(y) - shift
                worst = maximum(worst, n)
                value = exp2(y, n)
                store(target, i, f, value)
                total = total + value
        else:
            for i in range(rows):
                x = load(raw, i, f)
                y = log_feature(par, x) - splat(raw, height[i])
                n = nearest(y) - shift
                worst = maximum(worst, n)
                value = exp2(y, n) * factor(par, x)
                store(target, i, f, value)
                total = total + value
        store(sums, 0, r0 + f, total)
    return highest(worst)


@jit(fastmath=EXACT)
def raise_keys(par, rows, count, keys, height, bias, w, c, s, z, slot, excess, scale):
    """Raise c to the largest log2-feature of the coming keys, rescaling the state; how many come.

    Keys stay together while they pass the state and the first key among them by at most par.span:
    beyond it the rows before the tall key would lose theirs to underflow.  Which key is tall
    depends on the keys before it alone, so cutting there keeps causality exact.
    """
    lanes = VECTOR_BYTES // z.itemsize
    width = keys.shape[2]
    blocks = keys.shape[0] // par.signs
    for i in range(rows):
        store(excess, i, 0, splat(c, 0))
    for side in range(par.signs):
        turn = splat(z, 1 - 2 * side)
        for b in range(blocks):
            raw = keys[b * par.signs]
            for f in range(0, width, lanes):
                r = (side * blocks + b) * width + f
                beta = load(bias, w + b, f)
                y = fma(turn, load(raw, 0, f), beta)
                y = log_feature(par, y) - splat(z, height[0])
                base = maximum(load(c, slot, r), nearest(y))
                for i in range(rows):
                    y = fma(turn, load(raw, i, f), beta)
                    y = log_feature(par, y) - splat(z, height[i])
                    store(excess, i, 0, maximum(load(excess, i, 0), nearest(y) - base))
    accepted = count
    for i in range(1, count):
        if highest(load(excess, i, 0)) > par.span:
            accepted = i
            break
    for side in range(par.signs):
        turn = splat(z, 1 - 2 * side)
        for b in range(blocks):
            raw = keys[b * par.signs]
            for f in range(0, width, lanes):
                r = (side * blocks + b) * width + f
                beta = load(bias, w + b, f)
                old = load(c, slot, r)
                top = old
                for i in range(accepted):
                    y = fma(turn, load(raw, i, f), beta)
                    y = log_feature(par, y) - splat(z, height[i])
                    top = maximum(top, nearest(y))
                by = exp2(splat(z, 0), old - top)
                store(scale, 0, f, by)
                store(z, slot, r, load(z, slot, r) * by)
                store(c, slot, r, top)
                for lane in range(lanes):
                    if scale[0, f + lane] != 1:
                        row = s[slot, r + lane]
                        for x in range(row.size):
                            row[x] *= scale[0, f + lane]
    return accepted


@jit(fastmath=EXACT)
def activate_queries(par, sign, cols, raw, features, c, z, slot, r0, top, target, part):
    """Projections raw (F, C) to query features relative to 2**(top - c), and part = z . phi_q.

    Returns how far the largest log2-feature passes top.
    """
    lanes = VECTOR_BYTES // raw.itemsize
    turn = splat(raw, sign)
    worst = splat(c, 0)
    for i in range(0, cols, lanes):
        level, total = load(top, 0, i), splat(raw, 0)
        if par.kind == POSITIVE:
            for r in range(features):
                y = turn * load(raw, r, i)
                n = nearest(y) + (splat(c, c[slot, r0 + r]) - level)
                worst = maximum(worst, n)
                value = exp2(y, n)
                store(target, r, i, value)
                total = fma(value, splat(raw, z[slot, r0 + r]), total)
        else:
            for r in range(features):
                x = load(raw, r, i)
                y = log_feature(par, x)
                n = nearest(y) + (splat(c, c[slot, r0 + r]) - level)
                worst = maximum(worst, n)
                value = exp2(y, n) * factor(par, x)
                store(target, r, i, value)
                total = fma(value, splat(raw, z[slot, r0 + r]), total)
        store(part, 0, i, total)
    for r in range(features, target.shape[0]):
        target[r] = 0
    return highest(worst)


@jit(fastmath=EXACT)
def measure_queries(par, sign, cols, raw, features, c, slot, r0, top):
    """top = the largest log2-feature of each query in this tile."""
    lanes = VECTOR_BYTES // raw.itemsize
    turn = splat(raw, sign)
    for i in range(0, cols, lanes):
        level = splat(c, c[slot, r0]) + nearest(log_feature(par, turn * load(raw, 0, i)))
        for r in range(1, features):
            y = log_feature(par, turn * load(raw, r, i))
            level = maximum(level, nearest(y) + splat(c, c[slot, r0 + r]))
        store(top, 0, i, level)


@jit()
def lift_queries(new, top, cols, rows, den, num, scores):
    """Raise top to new where that is higher, rescaling what was summed under the old one."""
    for i in range(cols):
        if new[0, i] > top[0, i]:
            by = 2.0 ** max(float(top[0, i] - new[0, i]), -1000.0)
            top[0, i] = new[0, i]
            den[0, i] *= by
            for x in range(num.shape[1]):
                num[i, x] *= by
            for j in range(rows):
                scores[j, i] *= by


@jit()
def fold_chunk(par, keys, values, count, s, z, slot, sums):
    """S += phi_k.T V and z += sum phi_k."""
    width, half = keys.shape[2], keys.shape[0] // par.signs * keys.shape[2]
    for t in range(keys.shape[0]):
        r0 = t % par.signs * half + t // par.signs * width
        gemm_t(
            keys[t], values, s[slot, r0 : r0 + width], 0, width, 0, values.shape[1], 0, count, True
        )
    for r in range(z.shape[1]):
        z[slot, r] += sums[0, r]


@jit()
def read_chunk(
    par,
    q,
    row,
    count,
    weight,
    w,
    features_count,
    sets,
    c,
    s,
    z,
    slot,
    keys,
    values,
    clean,
    out,
    out_row,
    t,
):
    """One chunk of outputs: the state's part and, where par.causal, that of the chunk's own keys.

    The sums of each of `sets` equal sets of features are formed apart and then added: so another
    thread can form them.  With par.partial, out receives the sums themselves, for ``combine``.
    """
    lanes = VECTOR_BYTES // q.itemsize
    cols = -(-count // lanes) * lanes
    rows = -(-count // 8) * 8
    d, vcols = q.shape[1], values.shape[1]
    blocks, width = keys.shape[0] // par.signs, keys.shape[2]
    half = blocks * width
    pack(q, row, count, t.rows, par.limit, t.square)
    across(t.rows, t.columns)
    first = True
    for b in range(blocks):
        features = min(width, features_count - b * width)
        project_t(weight[w + b], t.columns, t.raw, width, cols, d)
        for side in range(par.signs):
            sign, r0 = 1 - 2 * side, side * half + b * width
            if first:
                measure_queries(par, sign, cols, t.raw, features, c, slot, r0, t.top)
            over = activate_queries(
                par, sign, cols, t.raw, features, c, z, slot, r0, t.top, t.phi, t.part
            )
            if over > RAISE_QUERIES:
                measure_queries(par, sign, cols, t.raw, features, c, slot, r0, t.higher)
                lift_queries(t.higher, t.top, cols, rows, t.den, t.num, t.scores)
                activate_queries(
                    par, sign, cols, t.raw, features, c, z, slot, r0, t.top, t.phi, t.part
                )
            for i in range(cols):
                t.den[0, i] = t.part[0, i] if first else t.den[0, i] + t.part[0, i]
            gemm_t(t.phi, s[slot, r0 : r0 + width], t.num, 0, rows, 0, vcols, 0, width, not first)
            if par.causal:
                phi_k = keys[b * par.signs + side]
                for i in range(0, cols, 2 * lanes):  # keys after these queries are not needed
                    end = min(i + 2 * lanes, cols)
                    last = min(-(-end // 8) * 8, rows)
                    gemm(phi_k, t.phi, t.scores, 0, last, i, end, 0, width, not first)
            first = False
        if sets > 1 and (b + 1) % (blocks // sets) == 0:
            save(t, t.records, b * sets // blocks)
            first = True
    for r in range(sets if sets > 1 else 0):
        add_record(t, t.records, r, r == 0)
    if par.partial:
        save(t, out, out_row)
        return
    if par.causal:
        own_keys(count, cols, rows, values, clean, t)
    write_rows(t.num, t.den[0], t.square, count, out, out_row)


@jit()
def save(t, records, row):
    """Write the sums of a chunk, before its own keys are added, to a row of records."""
    vcols, at = t.num.shape[1], 2 * CHUNK
    for i in range(CHUNK):
        records[row, i] = t.den[0, i]
        records[row, CHUNK + i] = t.top[0, i]
        for x in range(vcols):
            records[row, at + x] = t.num[i, x]
        for j in range(CHUNK):
            records[row, at + vcols + j] = t.scores[j, i]
        at += vcols + CHUNK


@jit()
def add_record(t, records, row, first):
    """Add the sums that ``save`` wrote to those in t, under the higher of the two tops."""
    vcols, at = t.num.shape[1], 2 * CHUNK
    one = records.dtype.type(1)
    for i in range(CHUNK):
        top = int(records[row, CHUNK + i])
        mine, theirs = one * 0, one
        if not first:
            mine = one * 2.0 ** max(float(min(t.top[0, i] - top, 0)), -1000.0)
            theirs = one * 2.0 ** max(float(min(top - t.top[0, i], 0)), -1000.0)
            top = max(t.top[0, i], top)
        t.top[0, i] = top
        if first:
            t.den[0, i] = 0
            for x in range(vcols):
                t.num[i, x] = 0
            for j in range(CHUNK):
                t.scores[j, i] = 0
        t.den[0, i] = t.den[0, i] * mine + records[row, i] * theirs
        for x in range(vcols):
            t.num[i, x] = t.num[i, x] * mine + records[row, at + x] * theirs
        for j in range(CHUNK):
            t.scores[j, i] = t.scores[j, i] * mine + records[row, at + vcols + j] * theirs
        at += vcols + CHUNK


@jit()
def own_keys(count, cols, rows, values, clean, t):
    """num and den of the chunk's own keys, from scores[j, i] = phi_k[j] . phi_q[i], j <= i."""
    lanes = VECTOR_BYTES // values.itemsize
    for j in range(rows):
        t.scores[j, : min(j, cols)] = 0
    for i in range(0, cols, lanes):
        total = load(t.den, 0, i)
        for j in range(min(i + lanes, rows)):
            total = total + load(t.scores, j, i)
        store(t.den, 0, i, total)
    own_values(t.scores, values, clean, count, t.num, t.spare)


@jit()
def own_values(scores, values, clean, count, num, spare):
    """``num[i] += sum_j<=i scores[j, i] values[j]``, scores[j, i] being zero for j > i."""
    if clean:
        for i in range(0, count, 8):
            gemm_t(scores, values, num, i, i + 8, 0, num.shape[1], 0, i + 8, True)
    else:  # zero times infinity must not reach the rows before it
        for i in range(count):
            block = i // 8 * 8
            gemm_t(scores, values, spare, block, block + 8, 0, num.shape[1], 0, i + 1, False)
            for x in range(num.shape[1]):
                num[i, x] += spare[i, x]


@jit()
def write_rows(num, den, square, count, out, row):
    """out = num / den; zeros where there is no key, NaN where the query is not finite."""
    one = out.dtype.type(1)
    for i in range(count):
        inverse = den[i]
        if square[i] == math.inf:
            inverse *= math.nan
        elif inverse != 0:  # it vanishes only where there is no key at all
            inverse = one / inverse
        for x in range(out.shape[1]):
            out[row + i, x] = num[i, x] * inverse


@jit()
def keys_chunk(par, k, row, count, mask, mask_row, weight, bias, w, c, s, z, slot, t):
    """Pack and map the keys from row on, keeping c above them; how many of them were taken."""
    rows = -(-count // 8) * 8
    d = k.shape[1]
    blocks, width = t.keys.shape[0] // par.signs, t.keys.shape[2]
    half = blocks * width
    pack(k, row, count, t.rows, par.limit, t.square)
    for i in range(rows):
        t.height[i] = par.masked
    for i in range(count):
        if t.square[i] < math.inf and (mask_row < 0 or mask[mask_row + i]):
            t.height[i] = min(par.key_norm * t.square[i], par.far)
    accepted = count
    fresh = c[slot, 0] <= -par.far * 3  # nothing folded yet: there is no maximum to try
    across(t.rows, t.columns)
    for attempt in range(2):
        for b in range(blocks):
            project_t(t.columns, weight[w + b], t.keys[b * par.signs], rows, width, d)
        if attempt == 1 or fresh:
            accepted = raise_keys(
                par, rows, count, t.keys, t.height, bias, w, c, s, z, slot, t.excess, t.scale
            )
            for i in range(accepted, rows):
                t.height[i] = par.masked
        over = 0
        for b in range(blocks):
            for side in range(par.signs - 1, -1, -1):
                r0, tile = side * half + b * width, b * par.signs
                reach = activate_keys(
                    par, 1 - 2 * side, rows, t.keys[tile], t.height, bias, w + b, c, slot, r0,
                    t.keys[tile + side], t.sums,
                )  # fmt: skip
                over = max(over, reach)
        if over <= RAISE_KEYS:
            break
    for i in range(accepted):
        if t.square[i] == math.inf and (mask_row < 0 or mask[mask_row + i]):
            t.keys[:, i] = math.nan
            t.sums[:] = math.nan
    return accepted


@jit(fastmath=EXACT)
def step_token(
    par, q, q_row, k, k_row, v, v_row, weight, bias, w, features, c, s, z, slot, out, out_row, t
):
    """Fold one key and value, then read with one query: a chunk of one, without its tiles."""
    lanes = VECTOR_BYTES // q.itemsize
    width, state = weight.shape[2], s[slot]
    half = z.shape[1] // par.signs
    pack(q, q_row, 1, t.rows[0:1], par.limit, t.square[0:1])
    pack(k, k_row, 1, t.rows[1:2], par.limit, t.square[1:2])
    pack_values(v, v_row, 1, t.values[0:1], t.square, -1)
    height = splat(q, min(par.key_norm * t.square[1], par.far))
    raised = False
    for b in range(half // width):
        project_two(t.rows, weight[w + b], t.raw, width, q.shape[1])
        for side in range(par.signs):
            turn = splat(q, 1 - 2 * side)
            for f in range(0, width, lanes):
                r = side * half + b * width + f
                x = load(t.raw, 1, f)
                y = log_feature(par, fma(turn, x, load(bias, w + b, f))) - height
                old = load(c, slot, r)
                top, by = old, splat(q, 1)
                if highest(nearest(y) - old) > RAISE_KEYS:
                    top, raised = maximum(old, nearest(y)), True
                    by = exp2(splat(q, 0), old - top)
                value = exp2(y, nearest(y) - top) * factor(par, x)
                store(c, slot, r, top)
                store(z, slot, r, fma(load(z, slot, r), by, value))
                store(t.sums, 0, r, value)
                store(t.scale, 0, r, by)
                store(t.token, 0, r, turn * load(t.raw, 0, f))
    if t.square[1] == math.inf:
        for r in range(z.shape[1]):
            t.sums[0, r] = z[slot, r] = math.nan
    if raised:
        for r in range(z.shape[1]):
            for x in range(state.shape[1]):
                state[r, x] *= t.scale[0, r]
    level = splat(c, -8 * int(par.far))
    for side in range(par.signs):
        for r in range(side * half + features, (side + 1) * half):
            t.token[0, r] = -par.masked  # padding, no feature
    for r in range(0, z.shape[1], lanes):
        y = log_feature(par, load(t.token, 0, r))
        level = maximum(level, nearest(y) + load(c, slot, r))
    shift = splat(c, highest(level))
    for r in range(0, z.shape[1], lanes):
        x = load(t.token, 0, r)
        y = log_feature(par, x)
        value = exp2(y, nearest(y) + (load(c, slot, r) - shift))
        store(t.token, 0, r, value * factor(par, x))
    for side in range(par.signs):
        for r in range(side * half + features, (side + 1) * half):
            t.token[0, r] = 0
    den = splat(q, 0)
    for r in range(0, z.shape[1], lanes):
        den = fma(load(t.token, 0, r), load(z, slot, r), den)
    t.den[0, 0] = sum_lanes(den)
    step_values(state, t.values, t.sums, t.token, t.num)
    write_rows(t.num, t.den[0], t.square, 1, out, out_row)


@jit(fastmath=EXACT)
def step_values(state, values, phi_k, phi_q, num):
    """``state[r] += phi_k[r] v`` and ``num = phi_q . state``, in one pass over the state."""
    lanes = VECTOR_BYTES // state.itemsize
    x = 0
    while x + 4 * lanes <= state.shape[1]:
        v0, v1 = load(values, 0, x), load(values, 0, x + lanes)
        v2, v3 = load(values, 0, x + 2 * lanes), load(values, 0, x + 3 * lanes)
        n0 = n1 = n2 = n3 = splat(state, 0)
        for r in range(state.shape[0]):
            a, b = splat(state, phi_k[0, r]), splat(state, phi_q[0, r])
            s0 = fma(v0, a, load(state, r, x))
            s1 = fma(v1, a, load(state, r, x + lanes))
            s2 = fma(v2, a, load(state, r, x + 2 * lanes))
            s3 = fma(v3, a, load(state, r, x + 3 * lanes))
            store(state, r, x, s0)
            store(state, r, x + lanes, s1)
            store(state, r, x + 2 * lanes, s2)
            store(state, r, x + 3 * lanes, s3)
            n0, n1, n2, n3 = fma(s0, b, n0), fma(s1, b, n1), fma(s2, b, n2), fma(s3, b, n3)
        store(num, 0, x, n0)
        store(num, 0, x + lanes, n1)
        store(num, 0, x + 2 * lanes, n2)
        store(num, 0, x + 3 * lanes, n3)
        x += 4 * lanes
    while x < state.shape[1]:
        v0, n0 = load(values, 0, x), splat(state, 0)
        for r in range(state.shape[0]):
            s0 = fma(v0, splat(state, phi_k[0, r]), load(state, r, x))
            store(state, r, x, s0)
            n0 = fma(s0, splat(state, phi_q[0, r]), n0)
        store(num, 0, x, n0)
        x += lanes


@jit()
def attend_one(par, q, k, v, mask, weight, bias, job, q_rows, out_rows, c, s, z, slot, out, t):
    """Everything for one problem: its keys and values, one state, its group of queries.

    False if the sums of a chunk cannot be partial ones because the chunk has to be split.
    """
    k_row, v_row, mask_row, keys_count = job[0], job[1], job[2], job[3]
    w, queries_count, features, sets = job[4], job[6], job[7], job[8]
    if par.causal and keys_count == 1 and mask_row < 0 and q_rows.size == 1:
        step_token(par, q, q_rows[0], k, k_row, v, v_row, weight, bias, w, features, c, s, z, slot,
                   out, out_rows[0], t)  # fmt: skip
        return True
    start = 0
    while start < keys_count:
        count = min(CHUNK - start % CHUNK, keys_count - start)
        m_row = mask_row + start if mask_row >= 0 else -1
        taken = keys_chunk(par, k, k_row + start, count, mask, m_row, weight, bias, w, c, s, z,
                           slot, t)  # fmt: skip
        if par.partial and taken < count:  # other jobs, with other features, do not know of it
            return False
        clean = pack_values(v, v_row + start, taken, t.values, mask, m_row)
        if par.causal:
            for g in range(q_rows.size):
                row = out_rows[g] + (start // CHUNK if par.partial else start)
                read_chunk(par, q, q_rows[g] + start, taken, weight, w, features, sets, c, s, z,
                           slot, t.keys, t.values, clean, out, row, t)  # fmt: skip
        fold_chunk(par, t.keys, t.values, taken, s, z, slot, t.sums)
        start += taken
    if not par.causal:
        for g in range(q_rows.size):
            for start in range(0, queries_count, CHUNK):
                read_chunk(par, q, q_rows[g] + start, min(CHUNK, queries_count - start), weight, w,
                           features, 1, c, s, z, slot, t.keys, t.values, True, out,
                           out_rows[g] + start, t)  # fmt: skip
    return True


@jit(cache=True)
def attend(par, q, k, v, mask, weight, bias, jobs, q_rows, out_rows, c, s, z, out, floats, ints,
           ctl, n):  # fmt: skip
    """Take jobs until none is left; how many are finished by now.  ctl[12] counts those given up."""
    me = fetch_add(ctl, 4, 1)
    t = carve(par, floats[me], ints[me], q.shape[1], s.shape[2], weight.shape[2],
              c.shape[1] // (weight.shape[2] * par.signs))  # fmt: skip
    finished = 0
    while True:
        job = fetch_add(ctl, 0, 1)
        if job >= n:
            break
        slot = jobs[job, 5]
        if slot < 0:
            slot = me
            c[slot] = -4 * int(par.far)
            s[slot] = 0
            z[slot] = 0
        if not attend_one(par, q, k, v, mask, weight, bias, jobs[job], q_rows[job], out_rows[job],
                          c, s, z, slot, out, t):  # fmt: skip
            fetch_add(ctl, 12, 1)
        finished += 1
    if finished == 0:  # came too late: whoever finished the last job has said so
        return 0
    return fetch_add(ctl, 8, finished) + finished


@jit(cache=True)
def combine(par, q, v, mask, records, jobs, out, floats, ints, width, blocks, ctl, n):
    """Outputs of causal chunks from the sums that several sets of features gave (par.partial).

    A job is (q row, v row, mask row, count, out row, record of the first set, step, sets).
    """
    me = fetch_add(ctl, 4, 1)
    lanes = VECTOR_BYTES // q.itemsize
    vcols = -(-v.shape[1] // lanes) * lanes
    t = carve(par, floats[me], ints[me], q.shape[1], vcols, width, blocks)
    finished = 0
    while True:
        job = fetch_add(ctl, 0, 1)
        if job >= n:
            break
        count = jobs[job, 3]
        for r in range(jobs[job, 7]):
            add_record(t, records, jobs[job, 5] + r * jobs[job, 6], r == 0)
        pack(q, jobs[job, 0], count, t.rows, par.limit, t.square)
        clean = pack_values(v, jobs[job, 1], count, t.values, mask, jobs[job, 2])
        own_keys(count, -(-count // lanes) * lanes, -(-count // 8) * 8, t.values, clean, t)
        write_rows(t.num, t.den[0], t.square, count, out, jobs[job, 4])
        finished += 1
    if finished == 0:
        return 0
    return fetch_add(ctl, 8, finished) + finished
