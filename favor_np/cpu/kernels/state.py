"""What a slot of a state holds, and how it grows for a hundred million tokens without drifting.

With F features, padding included, and X columns of values:

    c (F + PAD)             exponents; c[F] counts the tokens in the tail
    S (2 F + TAIL, X)       sums over features, what rounding took from them, values of the tail
    z (2 F + TAIL F)        the same; features of the tail (TAIL, F)

A sum in float32 that grows by one token, or one chunk, at a time loses up to half a unit in its
last place each time, and if all keys are equal always on the same side.  So each sum is a pair:
what an addition rounds off is kept (Knuth's two-sum) and goes in with the next one.  Only the first
of the pair is read.

A single token would have to read and write all pairs.  It is kept in the tail instead, which is
folded when it is full: in between a step only reads S.  z holds the tokens of the tail already.
"""

from __future__ import annotations

from favor_np.cpu.kernels.counters import each_job
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.simd import exp2, fma, load, maximum, splat, store, view
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.tiles import PAD, TAIL
from favor_np.jobs import ROWS, SLOT


@jit()
def begin(par, job, me, c, s, z, width):
    """The slot of a job's state; if it has none, that of this thread, without a key."""
    if job[SLOT] >= 0:
        return job[SLOT]
    features = c.shape[1] - PAD
    tiles = features // width
    blocks = tiles // par.signs
    for b in range(tiles):
        real = min(par.filled, job[ROWS] - b % blocks * par.filled)
        for r in range(width):
            c[me, b * width + r] = par.nothing if r < real else par.padding_exponent
    c[me, features] = 0
    s[me, : 2 * features] = 0
    z[me, : 2 * features] = 0
    return me


@jit(fastmath=EXACT)
def add_pair(sums, i, x, rest, y, value):
    """Add a vector to ``sums[i, x:]``; what rounding has taken is at ``sums[rest, y:]``."""
    high, value = load(sums, i, x), value + load(sums, rest, y)
    total = high + value
    moved = total - high
    store(sums, i, x, total)
    store(sums, rest, y, (high - (total - moved)) + (value - moved))


@jit(fastmath=EXACT)
def add_rows(state, first, rest, rows, more):
    """``state[first + r] += more[r]`` for the rows of more; what is rounded off goes to `rest`."""
    for r in range(rows):
        for x in range(0, state.shape[1], VECTOR_BYTES // state.itemsize):
            add_pair(state, first + r, x, rest + r, x, load(more, r, x))


@jit(fastmath=EXACT)
def add_sums(z, slot, features, sums, i, first):
    """``z[slot] += sums[i, first:]``."""
    for r in range(0, features, VECTOR_BYTES // z.itemsize):
        add_pair(z, slot, r, slot, features + r, load(sums, i, first + r))


@jit(fastmath=EXACT)
def raise_state(old, new, s, z, slot, features, r, scale):
    """Rescale a vector of features of a state, from r on, as their c goes from old to new."""
    by = exp2(splat(z, 0), old - new)
    store(z, slot, r, load(z, slot, r) * by)
    store(z, slot, features + r, load(z, slot, features + r) * by)
    store(scale, 0, 0, by)
    for lane in range(VECTOR_BYTES // z.itemsize):
        if scale[0, lane] != 1:
            scale_row(s[slot], r + lane, scale[0, lane])
            scale_row(s[slot], features + r + lane, scale[0, lane])


@jit()
def holds_nothing(z, slot, features):
    """Whether no key has been folded into a state that has no tail."""
    found = 0
    for r in range(features):
        found += z[slot, r] != 0
    return found == 0


@jit()
def scale_row(rows, r, by):
    """Multiply a row."""
    for x in range(rows.shape[1]):
        rows[r, x] *= by


@jit()
def tail(s, z, slot, features):
    """The features (TAIL, F) and the values (TAIL, X) of a slot's tail."""
    keys = view(z, slot * z.shape[1] + 2 * features, TAIL, features)
    return keys, view(s, (slot * s.shape[1] + 2 * features) * s.shape[2], TAIL, s.shape[2])


@jit(fastmath=EXACT)
def fold_tail(c, s, z, slot):
    """Fold the tokens of the tail, which is empty afterwards; z holds them already."""
    features, lanes, columns = c.shape[1] - PAD, VECTOR_BYTES // s.itemsize, s.shape[2]
    count, state = c[slot, features], s[slot]
    keys, values = tail(s, z, slot, features)
    # Four rows and two vectors at a time: eight sums in registers.
    for r in range(0, features if count > 0 else 0, 4):
        for x in range(0, columns, 2 * lanes):
            y = min(x + lanes, columns - lanes)
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(s, 0)
            for j in range(count):
                u, v = load(values, j, x), load(values, j, y)
                k0, k1 = splat(s, keys[j, r]), splat(s, keys[j, r + 1])
                k2, k3 = splat(s, keys[j, r + 2]), splat(s, keys[j, r + 3])
                a0, a1, a2, a3 = fma(k0, u, a0), fma(k1, u, a1), fma(k2, u, a2), fma(k3, u, a3)
                b0, b1, b2, b3 = fma(k0, v, b0), fma(k1, v, b1), fma(k2, v, b2), fma(k3, v, b3)
            add_pair(state, r, x, features + r, x, a0)
            add_pair(state, r + 1, x, features + r + 1, x, a1)
            add_pair(state, r + 2, x, features + r + 2, x, a2)
            add_pair(state, r + 3, x, features + r + 3, x, a3)
            if y > x:
                add_pair(state, r, y, features + r, y, b0)
                add_pair(state, r + 1, y, features + r + 1, y, b1)
                add_pair(state, r + 2, y, features + r + 2, y, b2)
                add_pair(state, r + 3, y, features + r + 3, y, b3)
    c[slot, features] = 0


@jit()
def copy_state(s, z, source, target, features):
    """Copy S and z of a state without a tail."""
    for r in range(2 * features):
        z[target, r] = z[source, r]
        for x in range(s.shape[2]):
            s[target, r, x] = s[source, r, x]


@jit(fastmath=EXACT)
def add_state(c, s, z, slot, total):
    """Add the sums of a slot to a total of the same c, and put in its place what that was."""
    features, lanes = c.shape[1] - PAD, VECTOR_BYTES // z.itemsize
    sums, own = s[total], s[slot]
    for r in range(0, features, lanes):
        more, before = load(z, slot, r), load(z, total, r)
        add_pair(z, total, r, total, features + r, more)
        store(z, slot, r, before)
    for r in range(features):
        for x in range(0, s.shape[2], lanes):
            more, before = load(own, r, x), load(sums, r, x)
            add_pair(sums, r, x, features + r, x, more)
            store(own, r, x, before)


@jit(fastmath=EXACT)
def merge_pairs(sums, others, i, x, rest, y, keep, add):
    """``sums[i, x:] = keep * sums[i, x:] + add * others[i, x:]``, with what was rounded off."""
    store(sums, i, x, keep * load(sums, i, x))
    store(sums, rest, y, add * load(others, rest, y) + keep * load(sums, rest, y))
    add_pair(sums, i, x, rest, y, add * load(others, i, x))


@each_job
def merge(call, slot):
    """Add a slot of other states, without a tail, to that of states: a job of `records.Merge`."""
    c, z, other_c, other_z = call.c, call.z, call.other_c, call.other_z
    sums, others = call.s[slot], call.other_s[slot]
    features, lanes = c.shape[1] - PAD, VECTOR_BYTES // z.itemsize
    for r in range(0, features, lanes):
        mine, theirs = load(c, slot, r), load(other_c, slot, r)
        top = maximum(mine, theirs)
        keep, add = exp2(splat(z, 0), mine - top), exp2(splat(z, 0), theirs - top)
        merge_pairs(z, other_z, slot, r, slot, features + r, keep, add)
    one = z.dtype.type(1)
    for r in range(features):
        by, keep, add = other_c[slot, r] - c[slot, r], one, one
        if by > 0:
            c[slot, r] = other_c[slot, r]
            keep = z.dtype.type(2.0 ** -float(by))
        elif by < 0:
            add = z.dtype.type(2.0 ** float(by))
        for x in range(0, sums.shape[1], lanes):
            merge_pairs(sums, others, r, x, features + r, x, splat(z, keep), splat(z, add))
