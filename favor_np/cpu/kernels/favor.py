"""The kernels of FAVOR+ attention: threads take jobs, and go through the chunks of each."""

from __future__ import annotations

from favor_np.cpu.kernels.block import room_of
from favor_np.cpu.kernels.chunk import Problem, attend_chunk, piece, read
from favor_np.cpu.kernels.counters import claim, enter, leave, report
from favor_np.cpu.kernels.floats import FLUSH, IEEE, ordinary_sums, set_float_mode
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.pack import count_large
from favor_np.cpu.kernels.pipeline import attend_pipeline
from favor_np.cpu.kernels.products import (
    load_state,
    load_tile_config,
    prepare_pairs,
    release_tiles,
)
from favor_np.cpu.kernels.state import begin, fold_tail
from favor_np.cpu.kernels.step import step_token
from favor_np.cpu.records import OVERFLOW, WHOLE, Parameters
from favor_np.cpu.tiles import CHUNK, PAD
from favor_np.jobs import KEYS, QUERIES, ROWS, SLOT, V_ROW


@jit()
def parameters(constants):
    """The parameters that an array of PARAMETERS holds."""
    p = constants[0]
    return Parameters(
        p.kind,
        p.signs,
        p.filled,
        p.nothing,
        p.padding_exponent,
        p.max_rise,
        p.key_norm,
        p.kernel_epsilon,
        p.limit,
        p.far,
        p.affine,
        p.factored,
        p.causal,
    )


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
                read(
                    t.pairs,
                    par,
                    p,
                    g,
                    start,
                    0,
                    count,
                    c,
                    s,
                    z,
                    slot,
                    t.keys,
                    True,
                    CHUNK,
                    min(CHUNK, next_count),
                    t,
                )


@jit()
def attend_job(par, p, pipeline, job, me, t):
    """A job that has a problem of its own, or one of those that make up a pipeline."""
    call, row = p.call, p.row
    c, s, z = call.c, call.s, call.z
    if pipeline is not None:
        attend_pipeline(par, p, pipeline, call.features, job, c, s, z, t)
    else:
        slot = begin(par, row, me, c, s, z, call.key.shape[2])
        # Who only reads changes nothing: others may read, too.
        if row[KEYS] > 0 or row[QUERIES] == 0:
            fold_tail(c, s, z, slot)
        attend_one(par, p, c, s, z, slot, t)


@jit()
def number_of(pipeline, job):
    """The row of a job in the table."""
    return job if pipeline is None else 0


@jit()
def attend(call):
    """Take jobs of `records.Attend` until none is left; how many are finished by now.

    Variants: with a pipeline, with standard errors, with products of pairs, or of parts.
    """
    me, mode = enter(call.control)
    par, t = parameters(call.constants), room_of(call, me)
    prepare_pairs(t.pairs)
    finished = 0
    while True:
        job = claim(call.control)
        if job < 0:
            break
        at = number_of(call.pipeline, job)
        p = Problem(call, call.jobs[at], call.q_rows[at], call.out_rows[at])
        load_tile_config(call.config)
        attend_job(par, p, call.pipeline, job, me, t)
        release_tiles(call.config)
        finished += 1
    return leave(call.control, finished, mode)


@jit()
def hold_large(v, jobs):
    """Whether there is a large value among those of jobs of one token."""
    count = 0
    for job in range(jobs.shape[0]):
        count += count_large(v, jobs[job, V_ROW], jobs[job, V_ROW] + 1)
    return count > 0


@jit()
def attend_tokens(call):
    """As `attend`, for causal problems of one token each, which is not masked.

    States take no large values: if there are any of either, nothing is done.
    """
    par, jobs, finished = parameters(call.constants), call.jobs, 0
    refused = jobs[0, SLOT] >= 0 and hold_large(call.v, jobs)
    me, mode = enter(call.control)
    t = room_of(call, me)
    while True:
        job = claim(call.control)
        if job < 0:
            break
        finished += 1
        if refused:
            report(call.control, OVERFLOW)
            continue
        step_token(par, call, job, me, t)
    return leave(call.control, finished, mode)
