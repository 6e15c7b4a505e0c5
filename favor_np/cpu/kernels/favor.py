"""The kernels of FAVOR+ attention: threads take jobs, and go through the chunks of each."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from favor_np.cpu.kernels.chunk import WHOLE, Problem, attend_chunk, carve, piece, read
from favor_np.cpu.kernels.floats import FLUSH, IEEE, ordinary_sums, set_float_mode
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.jobs import OVERFLOW, claim, enter, leave, report
from favor_np.cpu.kernels.pack import CHUNK, Map, Result, count_large
from favor_np.cpu.kernels.products import load_state, load_tile_config, release_tiles
from favor_np.cpu.kernels.relay import attend_relay
from favor_np.cpu.kernels.spread import carve_groups
from favor_np.cpu.kernels.state import PAD, begin, fold_tail
from favor_np.cpu.kernels.step import step_token
from favor_np.jobs import BLOCK, K_ROW, KEYS, QUERIES, ROWS, SLOT, V_ROW

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
    start, keys_count, queries_count, split = 0, p.row[KEYS], p.row[QUERIES], False
    while start < keys_count:
        count = piece(start, keys_count, split)
        taken = attend_chunk(par, p, WHOLE, start, count, count, c, s, z, slot, t.keys, t)
        start, split = start + taken, taken < count
    if not par.causal and queries_count > 0:
        set_float_mode(IEEE | FLUSH if ordinary_sums(s, slot, c.shape[1] - PAD) else IEEE)
        load_state(t.pairs, par, p.row[ROWS], c, s, z, slot, t.keys.shape[2])
        for g in range(p.q_rows.size):
            for start in range(0, queries_count, CHUNK):
                count, next_count = min(CHUNK, queries_count - start), queries_count - start - CHUNK
                read(t.pairs, par, p, g, start, count, c, s, z, slot, t.keys, True, CHUNK,
                     min(CHUNK, next_count), t)  # fmt: skip


@jit()
def attend_jobs(par, q, k, v, mask, fm, jobs, q_rows, out_rows, clocks, relay, out, room, spread,
                config, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """The body of all kernels but `attend_tokens`; how many jobs are finished by now.

    Which of `spread`, `config`, `relay` and the parts of `fm` are None the compiler knows: each
    kernel below is this function with some of them.

    Parameters
    ----------
    par : Parameters
    q, k, v : (N, d), (N_k, d) and (N_k, dv) arrays
        The rows of all problems, one behind the other: where those of a job begin says the table.
    mask : (N_k,) array of bool
        Which keys take part, in jobs that have a MASK_ROW.
    fm : Map
        Weights (heads * blocks, d, width) and what else belongs to the map, block by block.
    jobs : (jobs, 8) array of int64
        Its columns are named in ``favor_np.jobs``.
    q_rows, out_rows : (jobs, group) arrays of int64
        The first row of each run of queries that reads the state of a job, and that of its results.
    clocks : (jobs, 2) or (0, 2) array
        By how much, in log2, the first key of a job is raised, and by how much more every further
        one.
    relay : array of int64 or None
        What threads know of the one problem that they share: then `n` are its jobs.  See
        ``kernels.relay``.
    out : Result
        Rows (N, dv) and, unless these are empty, the denominators (N,) and their exponents.
    room, spread : (threads, floats) array and Spread, or None
        Tiles and results of standard errors: each block of the map is a group of features.
    config : TILE_CONFIG or None
        Given, products are in bfloat16 or, if the map has weights in three parts, projections are
        of these.
    c, s, z : (slots, F + PAD), (slots, 2 F + TAIL, X) and (slots, (2 + TAIL) F) arrays
        States, as ``kernels.state`` describes them: those of the jobs, or one for each thread.
    floats, ints : (threads, ...) arrays
        Workspaces.
    ctl, n : array of int64, int
        The counters by which threads share the jobs, and how many jobs there are.
    """
    me, mode = enter(ctl)
    width = fm.key.shape[2]
    blocks = (c.shape[1] - PAD) // (width * par.signs)
    t = carve(floats[me], ints[me], par.signs, config, fm.key_parts, q.shape[1], s.shape[2], width,
              blocks)  # fmt: skip
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
        load_tile_config(config)
        if relay is not None:
            attend_relay(par, p, relay, job, c, s, z, floats, t)
        else:
            slot = begin(par, row, me, c, s, z, width)
            if (
                row[KEYS] > 0 or row[QUERIES] == 0
            ):  # who only reads changes nothing: others may read, too
                fold_tail(c, s, z, slot)
            attend_one(par, p, c, s, z, slot, t)
        release_tiles(config)
        finished += 1
    return leave(ctl, finished, mode)


@jit(cache=True)
def attend(constants, q, k, v, mask, query, key, bias, affine, jobs, q_rows, out_rows, clocks,
           relay, rows, weights, tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """In the precision of the arrays."""
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), None, None, None, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_spread(constants, q, k, v, mask, query, key, bias, affine, jobs, q_rows, out_rows, clocks,
                  relay, rows, weights, tops, room, spread, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """The same, with standard errors."""
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), room, spread, None, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_bf16(constants, q, k, v, mask, query, key, bias, affine, config, jobs, q_rows, out_rows,
                 clocks, relay, rows, weights, tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """In bfloat16: `query` and `key` are pairs."""
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), None, None, config, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_bf16x3(constants, q, k, v, mask, query, key, bias, affine, query_parts, key_parts, config,
                  jobs, q_rows, out_rows, clocks, relay, rows, weights, tops, c, s, z, floats,
                  ints, ctl, n):  # fmt: skip
    """As `attend`, projections in bf16x3 on the matrix unit: no less exact, and faster."""
    fm = Map(query, key, bias, affine, query_parts, key_parts)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       relay, Result(rows, weights, tops, ctl), None, None, config, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_tokens(constants, q, k, v, query, key, bias, affine, jobs, q_rows, out_rows, clocks, rows, weights,
                  tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """As `attend`, for causal problems of one token each, which is not masked.

    States take no large values: if there are any of either, nothing is done.
    """
    par, finished = parameters(constants), 0
    refused = jobs[0, SLOT] >= 0 and count_large(v) > 0
    me, mode = enter(ctl)
    fm, width = Map(query, key, bias, affine, None, None), key.shape[2]
    blocks = (c.shape[1] - PAD) // (width * par.signs)
    t = carve(floats[me], ints[me], par.signs, None, None, q.shape[1], s.shape[2], width, blocks)
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
        step_token(par, q, q_rows[job, 0], k, row[K_ROW], v, row[V_ROW], fm, row[BLOCK], row[ROWS], clock, c, s, z, slot,
                   Result(rows, weights, tops, ctl), out_rows[job, 0], t)  # fmt: skip
    return leave(ctl, finished, mode)
