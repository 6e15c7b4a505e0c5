"""The kernels of FAVOR+ attention: threads take jobs, and go through the chunks of each."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from favor_np.kernels.chunk import WHOLE, Problem, attend_chunk, carve, piece, read
from favor_np.kernels.floats import FLUSH, IEEE, ordinary_sums, set_float_mode
from favor_np.kernels.jit import jit
from favor_np.kernels.jobs import OVERFLOW, claim, enter, leave, report
from favor_np.kernels.pack import CHUNK, Map, Result, holds_large
from favor_np.kernels.products import begin_unit, end_unit, load_state
from favor_np.kernels.relay import attend_relay
from favor_np.kernels.spread import carve_groups
from favor_np.kernels.state import PAD, begin, fold_tail
from favor_np.kernels.step import step_token

#: What a kernel needs to know about the feature map and the call.
Parameters = namedtuple(
    "Parameters",
    "kind signs filled key_norm affine factored kernel_epsilon limit far nothing idle span causal",
)
#: The same as an array of one: a tuple takes four times as long from Python to a kernel.
CONSTANTS = np.dtype(
    [(name, np.int64) for name in ("kind", "signs", "filled", "nothing", "idle", "span")]
    + [(name, np.float64) for name in ("key_norm", "kernel_epsilon", "limit", "far")]
    + [(name, np.bool_) for name in ("affine", "factored", "causal")],
    align=True,
)


@jit()
def parameters(constants):
    """The parameters that an array of CONSTANTS holds."""
    p = constants[0]
    return Parameters(p.kind, p.signs, p.filled, p.key_norm, p.affine, p.factored, p.kernel_epsilon,
                      p.limit, p.far, p.nothing, p.idle, p.span, p.causal)  # fmt: skip


@jit()
def clock_of(clocks, job):
    """By how much the first key of a job is raised, and by how much more every further one."""
    if clocks.size > 0:
        return clocks[job, 0], clocks[job, 1]
    return 0.0, 0.0


@jit()
def attend_one(par, p, c, s, z, slot, t):
    """Everything for one problem: its keys and values, one state, its group of queries."""
    start, keys_count, queries_count, split = 0, p.row[3], p.row[6], False
    while start < keys_count:
        count = piece(start, keys_count, split)
        taken = attend_chunk(par, p, WHOLE, start, count, count, c, s, z, slot, t.keys, t)
        start, split = start + taken, taken < count
    if not par.causal and queries_count > 0:
        set_float_mode(IEEE | FLUSH if ordinary_sums(s, slot, c.shape[1] - PAD) else IEEE)
        load_state(t.words, par, p.row[7], c, s, z, slot, t.keys.shape[2])
        for g in range(p.q_rows.size):
            for start in range(0, queries_count, CHUNK):
                count, following = min(CHUNK, queries_count - start), queries_count - start - CHUNK
                read(t.words, par, p, g, start, count, c, s, z, slot, t.keys, True, CHUNK,
                     min(CHUNK, following), t)  # fmt: skip


@jit()
def attend_jobs(par, q, k, v, mask, fm, jobs, q_rows, out_rows, clocks, relay, out, room, spread,
                unit, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """What all kernels but one do; what of `spread`, `unit` and `fm` is None is known to the compiler.

    Jobs are the rows of a table or, where there is a relay, those of the one problem in it.  With a unit
    products are in bfloat16 or, if the map's weights are cut into planes, projections are products of
    planes.
    """
    me, mode = enter(ctl)
    width = fm.key.shape[2]
    blocks = (c.shape[1] - PAD) // (width * par.signs)
    t = carve(par, unit, fm.key_planes, floats[me], ints[me], q.shape[1], s.shape[2], width, blocks)
    groups = carve_groups(spread, room, me, blocks, s.shape[2], width)
    finished = 0
    while True:
        job = claim(ctl)
        if job >= n:
            break
        at = job if relay is None else 0
        row = jobs[at]
        clock, rate = clock_of(clocks, at)
        p = Problem(
            q, k, v, mask, fm, row, q_rows[at], out_rows[at], clock, rate, out, spread, groups
        )
        begin_unit(unit)
        if relay is not None:
            attend_relay(par, p, relay, job, c, s, z, floats, t)
        else:
            slot = begin(par, row, me, c, s, z, width)
            if row[3] > 0 or row[6] == 0:  # who only reads changes nothing: others may read, too
                fold_tail(c, s, z, slot)
            attend_one(par, p, c, s, z, slot, t)
        end_unit(unit)
        finished += 1
    return leave(ctl, finished, mode)


@jit(cache=True)
def attend(constants, q, k, v, mask, query, key, bias, affine, jobs, q_rows, out_rows, clocks,
           relay, rows, weights, tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """Take jobs until none is left; how many are finished by now."""
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), None, None, None, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_spread(constants, q, k, v, mask, query, key, bias, affine, jobs, q_rows, out_rows, clocks,
                  relay, rows, weights, tops, room, spread, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """The same, and how far the groups of features are apart: each block of the map is one.

    There is room for them for each thread.
    """
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), room, spread, None, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_words(constants, q, k, v, mask, query, key, bias, affine, unit, jobs, q_rows, out_rows,
                 clocks, relay, rows, weights, tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """The same as `attend`, its products in bfloat16: `query` and `key` are words."""
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), None, None, unit, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_planes(constants, q, k, v, mask, query, key, bias, affine, query_planes, key_planes, unit,
                  jobs, q_rows, out_rows, clocks, relay, rows, weights, tops, c, s, z, floats,
                  ints, ctl, n):  # fmt: skip
    """The same as `attend`, with projections from the matrix unit: no less exact, and faster."""
    fm = Map(query, key, bias, affine, query_planes, key_planes)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), None, None, unit, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_tokens(constants, q, k, v, query, key, bias, affine, jobs, q_rows, out_rows, clocks, rows, weights,
                  tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """The same as `attend` for causal problems of one token each, which is not masked.

    States take no large values: where there are any, and states, nothing is done.
    """
    par, finished, refused = parameters(constants), 0, jobs[0, 5] >= 0 and holds_large(v)
    me, mode = enter(ctl)
    fm, width = Map(query, key, bias, affine, None, None), key.shape[2]
    blocks = (c.shape[1] - PAD) // (width * par.signs)
    t = carve(par, None, None, floats[me], ints[me], q.shape[1], s.shape[2], width, blocks)
    while True:
        job = claim(ctl)
        if job >= n:
            break
        finished += 1
        if refused:
            report(ctl, OVERFLOW)
            continue
        row, clock = jobs[job], clock_of(clocks, job)[0]
        slot = begin(par, row, me, c, s, z, width)
        step_token(par, q, q_rows[job, 0], k, row[0], v, row[1], fm, row[4], row[7], clock, c, s, z, slot,
                   Result(rows, weights, tops, ctl), out_rows[job, 0], t)  # fmt: skip
    return leave(ctl, finished, mode)
