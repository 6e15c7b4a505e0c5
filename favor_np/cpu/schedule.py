"""Who does what in a call, as functions of shapes: schedules, and tables of jobs for each kernel.

Only how a long causal sequence is shared out depends on the number of threads, and no bit of a
result depends on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from favor_np.cpu import records as names
from favor_np.cpu import tuning
from favor_np.cpu.layout import Layout, layout
from favor_np.cpu.threads import give_way
from favor_np.cpu.tiles import CHUNK, KEY_TILES, QUERY_TILES
from favor_np.features import FeatureMap
from favor_np.jobs import (
    DQ_ROW,
    GRAD_ROW,
    KEYS,
    NUMBER,
    OUT_ROW,
    Q_ROW,
    QUERIES,
    ROWS,
    SIDE,
    SLOT,
    START,
    STRIDE,
    Array,
    Jobs,
    Shapes,
    broadcast_jobs,
    packed,
    skip_rows,
)
from favor_np.tables import kept


class Schedule(NamedTuple):
    """What depends on the shapes of a call alone."""

    layout: Layout
    constants: Array
    jobs: Jobs
    longest: int
    work: int  # multiply-adds of a job's projections
    fixed: tuple[Any, ...]  # the fields of `records.Attend` behind the control words


@tuning.depends_on_tuning
@kept(64, lambda of: of.jobs.nbytes)
def schedule(
    feature_map: FeatureMap,
    dtype: np.dtype[Any],
    shapes: Shapes,
    causal: bool,
    group: int | None = None,
    pairs: bool = False,
) -> Schedule:
    """Return layout and jobs for arrays of these shapes."""
    of = layout(feature_map, dtype, shapes.v[-1], group, pairs)
    to_do = broadcast_jobs(shapes, feature_map.num_heads, of.blocks, of.rows)
    longest = max(shapes.q[-2], shapes.k[-2])
    constants = of.causal if causal else of.bidirectional
    work = longest * of.features * shapes.q[-1]
    return Schedule(of, constants, to_do, longest, work, fixed_of(of, constants, to_do, of.more))


def fixed_of(of: Layout, constants: Array, jobs: Jobs, more: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the fields of `records.Attend` behind the control words.

    `more` are those of variants.
    """
    return constants, jobs.table, jobs.q_rows, jobs.out_rows, *of.weights, *more


def segments(of: Jobs) -> tuple[Jobs, Jobs]:
    """Cut bidirectional jobs into jobs that only fold and jobs that only read, by length.

    Their slots are the numbers of the jobs that they are cut from.
    """

    def cut(lengths: Array) -> tuple[Jobs, Array, Array]:
        counts = -(-lengths // tuning.SEGMENT_LENGTH)
        owner = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = tuning.SEGMENT_LENGTH * number
        part = of.take(owner)
        part.table[:, SLOT] = owner
        return part, start, np.minimum(tuning.SEGMENT_LENGTH, lengths[owner] - start)

    folds, start, length = cut(of.table[:, KEYS])
    skip_rows(folds.table, start)
    folds.table[:, KEYS], folds.table[:, QUERIES] = length, 0
    nothing = np.empty((len(length), 0), np.int64)
    reads, start, length = cut(of.table[:, QUERIES])
    reads.table[:, KEYS], reads.table[:, QUERIES] = 0, length
    shift = start[:, None]
    return (
        Jobs(folds.table, nothing, nothing),
        Jobs(reads.table, reads.q_rows + shift, reads.out_rows + shift),
    )


def shared_count(of: Jobs, threads: int) -> int:
    """Return how many of the first jobs are long causal ones that threads had better share."""
    length = of.table[:, KEYS]
    count = len(length) % threads
    if length.size and length[0] > length[-1]:  # packed, the longest first
        count = int(2 * length[0] > length.sum())
    if not count or 4 * count > 3 * threads or length[:count].min() < tuning.MIN_SHARED_LENGTH:
        return 0
    return count


@dataclass(frozen=True, eq=False)
class Pipeline:
    """How threads share one long causal problem: words, numbers of jobs and states, the last state.

    The sum of the states is one more.
    """

    words: Array
    count: int
    states: int
    last: int


def pipeline(of: Layout, length: int, threads: int) -> Pipeline:
    """Return the plan of a pipeline: see ``kernels.pipeline``."""
    chunks = -(-length // CHUNK)
    size = of.features * (of.value_columns + CHUNK) * of.dtype.itemsize
    most = tuning.MAX_GROUP_BYTES // (names.RING * size)
    group = max(min(tuning.CHUNKS_PER_THREAD * threads, most), 1)
    turns, states = -(-chunks // group), names.RING * group
    words = np.zeros(names.LEFT + 3 * (names.RING + turns + states + 1), np.int64)
    words[: names.LEFT] = chunks, group, threads, give_way()
    left = words[names.LEFT :][: 3 * (names.RING + turns)].reshape(-1, 3)
    left[names.RING - 1, names.FOLD] = 1  # the first chunk, which finds c
    left[names.RING :, :] = group, group, 1
    left[-1, : names.SCAN] = chunks - group * (turns - 1)
    words[-2:] = -1, 1  # at the beginning c has not moved, and there is no key that would not fit
    return Pipeline(words, (turns + 2) * (2 * group + 1), states, (chunks - 1) % states)


def vjp_jobs(of: Jobs, q_length: int, k_length: int) -> Jobs:
    """Turn jobs into those of the pullback: for each query head its own side and that of its keys.

    Gradients of keys and values every query head has for itself.
    """
    heads = of.q_rows.shape[1]
    table = np.repeat(of.table, heads, axis=0)
    out_rows = of.out_rows.ravel()
    head, start = np.divmod(out_rows, max(q_length, 1))
    rows = np.empty((2, len(table), NUMBER + 1), np.int64)
    rows[:, :, : ROWS + 1] = table
    rows[:, :, SIDE] = np.array([1, 0])[:, None]
    rows[:, :, Q_ROW], rows[:, :, OUT_ROW] = of.q_rows.ravel(), out_rows
    rows[:, :, GRAD_ROW] = head * k_length + start
    rows[:, :, NUMBER] = np.arange(2 * len(table)).reshape(2, -1)
    nothing = np.empty((2 * len(table), 0), np.int64)
    return Jobs(rows.reshape(-1, NUMBER + 1), nothing, nothing)


@tuning.depends_on_tuning
@kept(256, lambda table: table.nbytes)
def exact_jobs(shapes: Shapes, offsets: tuple[int, ...] | None = None) -> Array:
    """Return the jobs of exact attention, a block of queries each."""
    of = _exact_problems(shapes, offsets)
    heads, lengths = of.q_rows.shape[1], of.table[:, QUERIES]
    block = CHUNK * QUERY_TILES
    while heads * (-(-lengths // block)).sum() < tuning.MIN_EXACT_JOBS and block > 4 * CHUNK:
        block //= 2
    counts = -(-lengths // block)
    owner = np.repeat(np.arange(len(lengths)), counts)
    starts = block * (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))
    # The last blocks of a causal problem have the most keys: they go first.
    order = np.argsort(-starts, kind="stable")
    owner, starts = owner[order], starts[order, None]
    table = np.repeat(of.table[owner, None, : START + 1], heads, axis=1)
    table[..., Q_ROW], table[..., OUT_ROW] = of.q_rows[owner] + starts, of.out_rows[owner] + starts
    table[..., QUERIES] = np.minimum(block, table[..., QUERIES] - starts)
    table[..., START] = starts
    return table.reshape(-1, START + 1)


def _exact_problems(shapes: Shapes, offsets: tuple[int, ...] | None) -> Jobs:
    """Return the problems of exact attention, in tables with room for all columns.

    `shapes` are those of a call with states: a slot for each problem.
    """
    of, begin = broadcast_jobs(shapes), np.zeros(1, np.int64)
    if offsets is not None:
        begin = np.array(offsets)
        of = packed(of, begin)
    owner, sequence = np.divmod(of.table[:, SLOT], max(len(begin) - 1, 1))
    table = np.zeros((len(of.table), DQ_ROW + 1), np.int64)
    table[:, : ROWS + 1] = of.table
    table[:, GRAD_ROW] = owner * shapes.k[-2] + begin[sequence]
    return Jobs(table, of.q_rows, of.out_rows)


class GradientJobs(NamedTuple):
    """The jobs of the gradient of exact attention: every `parts`-th block of keys of one problem.

    The queries `q_rows` read a problem; their results are `out_rows` and, `rows` for each of
    `heads`, `dq_rows`, of which `places` are those of the positions.
    """

    table: Array
    q_rows: Array
    out_rows: Array
    dq_rows: Array
    parts: int
    heads: int
    rows: int
    places: Array


@tuning.depends_on_tuning
@kept(256, lambda of: sum(x.nbytes for x in of if isinstance(x, np.ndarray)))
def exact_vjp_jobs(shapes: Shapes, offsets: tuple[int, ...] | None = None) -> GradientJobs:
    """Return the jobs of the gradient of exact attention."""
    of, q_length = _exact_problems(shapes, offsets), shapes.q[-2]
    block, count = CHUNK * KEY_TILES, len(of.table)
    longest = of.table[:, KEYS].max(initial=0)
    parts = max(1, min(-(-tuning.EXACT_VJP_JOBS // max(count, 1)), -(-longest // block)))
    # Eight rows at a time are added to: no two sequences may share any.
    cuts = np.array((0, q_length) if offsets is None else offsets)
    lengths = np.diff(cuts)
    padded = -(-lengths // 8) * 8
    places = np.arange(q_length) + np.repeat(np.cumsum(padded) - padded - cuts[:-1], lengths)
    rows, (head, start) = int(padded.sum()), np.divmod(of.out_rows, q_length)
    heads = int(head.max(initial=-1)) + 1
    owner, part = np.divmod(np.arange(count * parts), parts)
    table = of.table[owner]
    table[:, NUMBER], table[:, START] = owner, part * block
    table[:, STRIDE], table[:, DQ_ROW] = parts * block, part * heads * rows
    dq_rows = head * rows + places[start]
    return GradientJobs(table, of.q_rows, of.out_rows, dq_rows, parts, heads, rows, places)
