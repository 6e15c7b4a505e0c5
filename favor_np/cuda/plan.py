"""What a device is asked to do, before it does it: tables of tiles, as pure functions of shapes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.cuda.code import RESIDENT, THREADS
from favor_np.cuda.device import Device
from favor_np.cuda.kernels.favor import COUNT, HEAD, OUT_ROW, STEP
from favor_np.cuda.kernels.tiles import MASKED, TILE
from favor_np.features import FeatureMap
from favor_np.jobs import (
    BIAS_ROW,
    BLOCK,
    K_ROW,
    KEYS,
    MASK_ROW,
    QUERIES,
    SLOT,
    V_ROW,
    Jobs,
    Shapes,
    broadcast_jobs,
    packed,
    segments,
)
from favor_np.numerics import KINDS, LOG2E, POSITIVE, projection_limit

Array: TypeAlias = npt.NDArray[Any]

#: Bytes that the states of causal chunks may take at a time: few enough to be kept for the next
#: call.
ROOM = 2**27
#: Bytes of shared memory that a block of the fold takes, with the kilobyte that CUDA reserves.
FOLD_BYTES = 42 * 1024
#: A fold of fewer tiles than this costs more to write and scan than it brings.
SHORTEST = 4


class Lengths(NamedTuple):
    """Positions that a block folds into one state, and those of a sequence under way at a time."""

    stretch: int
    span: int


def resident(device: Device) -> int:
    """Return how many blocks of the fold a multiprocessor holds at a time."""
    room = min(device.threads // THREADS, device.shared_memory // FOLD_BYTES)
    return max(min(RESIDENT, room), 1)


def state_bytes(slices: int, columns: int) -> int:
    """Return what a state of so many slices of features and columns of values takes."""
    return slices * TILE * (4 * TILE * columns + 8)


def lengths(
    device: Device, problems: int, keys: int, slices: int, columns: int, *, causal: bool
) -> Lengths:
    """Return how sequences are cut: bidirectional ones so that the blocks fill the device.

    A causal one is folded chunk by chunk, whatever the device: bits of its results do not depend on
    it.  Its states are kept for as many chunks as fit into ROOM.
    """
    if causal:
        state = state_bytes(slices, columns)
        chunks = -(-max(keys, 1) // TILE)
        spans = -(-chunks // max(ROOM // max(problems * state, 1), 1))
        each = -(-chunks // spans)  # of one size, for a rest would not fill the device
        return Lengths(TILE, TILE * each)
    blocks = max(problems * slices * columns, 1)
    parts = resident(device) * device.multiprocessors // blocks  # more would wait for the others
    tiles = max(-(-keys // (TILE * max(parts, 1))), SHORTEST)
    return Lengths(TILE * tiles, max(keys, 1))


@dataclass(frozen=True, eq=False)
class Layout:
    """How the features of a map lie on a device, in slices of 64: see `kernels.favor`."""

    kind: int
    signs: int
    features: int
    columns: int
    real: Array
    weight: Array
    bias: Array
    query_bias: Array
    centers: tuple[Array, Array]
    linear: Array
    #: What centred queries and keys are multiplied with, transposed never; of size 0 if with
    #: nothing.
    factors: tuple[Array, Array]
    #: The gradient of what is linear in the log-norm of a key, by the multiplied key.
    slope: Array
    unit: float
    limit: float
    key_norm: float
    epsilon: float

    @property
    def lines(self) -> int:
        """Rows of the weights of a head."""
        return self.features // self.signs


@functools.lru_cache(maxsize=64)
def layout(feature_map: FeatureMap) -> Layout:
    """Return the layout of a map, with its weights in log2 units and padded."""
    heads, rows, dim = feature_map.key_weight.shape
    signs = 2 if feature_map.antithetic else 1
    per_slice, columns = TILE // signs, -(-dim // 16) * 16
    slices = -(-rows // per_slice)
    kind = KINDS[feature_map.kind]
    unit = LOG2E if kind == POSITIVE else 1.0
    weight = np.zeros((heads, slices * per_slice, columns), np.float32)
    affine = feature_map.calibration is not None
    factored, key_norm = feature_map.key_factor is not None, feature_map.key_norm
    factors = np.zeros((2, heads if factored else 0, columns, columns), np.float32)
    of_map: Array = feature_map.key_weight
    slope = np.zeros((heads if affine else 0, columns), np.float32)
    if affine:
        slope[:, :dim] = feature_map.key_linear
    if feature_map.key_factor is not None and feature_map.calibration is not None:
        turned = np.swapaxes(feature_map.key_factor, 1, 2)
        slope[:, :dim] = np.linalg.solve(turned, feature_map.key_linear[..., None])[..., 0]
        factors[0, :, :dim, :dim] = feature_map.query_factor
        factors[1, :, :dim, :dim] = feature_map.key_factor
        quadratic = feature_map.calibration.quadratic.reshape(-1, 1, dim)
        of_map = feature_map.projection.reshape(-1, rows, dim) * np.sqrt(1 - 4 * quadratic)
        key_norm = 0.5
    weight[:, :rows, :dim] = of_map * unit
    part, at = np.divmod(np.arange(rows), per_slice)
    real = np.concatenate([part * TILE + side * per_slice + at for side in range(signs)])
    bias = np.full((heads, slices * TILE), -MASKED, np.float32)
    bias[:, real] = np.tile(feature_map.bias * unit, signs)
    query_bias = np.full_like(bias, -MASKED)
    query_bias[:, real] = 0
    query_center, key_center, linear = (
        np.ascontiguousarray(np.broadcast_to(x, (heads, dim))[: None if affine else 0], np.float32)
        for x in (feature_map.query_center, feature_map.key_center, feature_map.key_linear * unit)
    )
    return Layout(
        kind=kind,
        signs=signs,
        features=slices * TILE,
        columns=columns,
        real=real,
        weight=weight.reshape(-1, columns),
        bias=bias,
        query_bias=query_bias,
        centers=(query_center, key_center),
        linear=linear,
        factors=(factors[0].reshape(-1, columns), factors[1].reshape(-1, columns)),
        slope=slope,
        unit=unit,
        limit=projection_limit(feature_map, 4),
        key_norm=key_norm * LOG2E,
        epsilon=feature_map.kernel_epsilon,
    )


class Stretches(NamedTuple):
    """Parts of problems: whose each is, from which position, and how many positions."""

    owner: Array
    start: Array
    lengths: Array


def stretches(counts: Array, length: int, span: tuple[int, int]) -> Stretches:
    """Cut so many positions of each problem, those in the span only."""
    counts = np.clip(counts - span[0], 0, span[1] - span[0])
    parts = -(-counts // length)
    owner = np.repeat(np.arange(len(counts)), parts)
    start = length * (np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts))
    return Stretches(owner, start + span[0], np.minimum(length, counts[owner] - start))


class Owners(NamedTuple):
    """Which rows each head of the map packs, for as many positions each."""

    rows: Array
    heads: Array
    length: int


def row_heads(
    jobs: Jobs, q: tuple[int, ...], k: tuple[int, ...], of: Layout
) -> tuple[Owners | None, Owners | None]:
    """Return who packs queries and keys where every head has centres of its own; else None."""
    if of.linear.shape[0] <= 1:
        return None, None
    head = jobs.table[:, BLOCK]
    group = jobs.q_rows.shape[1]
    return (
        Owners(jobs.q_rows.ravel(), np.repeat(head, group), q[-2]),
        Owners(jobs.table[:, K_ROW], head, k[-2]),
    )


def with_own_rows(jobs: Jobs, q_length: int, k_length: int) -> Jobs:
    """Number the rows of queries and keys as `pack_table` packs them, job by job."""
    table = jobs.table.copy()
    table[:, K_ROW] = np.arange(len(table)) * k_length
    q_rows = np.arange(jobs.q_rows.size).reshape(jobs.q_rows.shape) * q_length
    return Jobs(table, q_rows, jobs.out_rows)


def pack_table(rows: int, owners: Owners | None) -> tuple[Array, int]:
    """Return the table of `pack`, and how many rows it packs: all, or those of each owner."""
    if owners is None:
        owners = Owners(np.zeros(1, np.int64), np.zeros(1, np.int64), rows)
    first = np.arange(0, owners.length, TILE)
    count = len(owners.rows)
    table = _table(
        owners.rows[:, None] + first,
        np.minimum(TILE, owners.length - first),
        np.arange(count)[:, None] * owners.length + first,
        owners.heads[:, None],
    )
    return np.ascontiguousarray(table.swapaxes(1, 2).reshape(-1, 4)), count * owners.length


def _table(*columns: Any) -> Array:
    return np.ascontiguousarray(np.stack(np.broadcast_arrays(*columns), axis=1), np.int32)


class Sides(NamedTuple):
    """The folding side, the keys of the jobs, and the reading side."""

    jobs: Jobs
    vectors: Array
    masks: Array
    log2_bias: Array

    @property
    def slots(self) -> Array:
        """The slot of every job: its own number if there is none."""
        slot: Array = self.jobs.table[:, SLOT]
        return np.where(slot < 0, np.arange(len(slot)), slot)


def keys_and_queries(jobs: Jobs) -> Sides:
    """Let queries read what keys are folded to."""
    return Sides(jobs, jobs.out_rows, np.zeros_like(jobs.out_rows), jobs.out_rows)


def queries_and_keys(jobs: Jobs, q_length: int, k_length: int) -> Sides:
    """Let the keys of each head read what its queries are folded to."""
    group = jobs.out_rows.shape[1]
    table = np.repeat(jobs.table, group, axis=0)
    k_row, v_row, mask_row, bias_row = (table[:, [x]] for x in (K_ROW, V_ROW, MASK_ROW, BIAS_ROW))
    out_row = jobs.out_rows.ravel()
    head, start = np.divmod(out_row, max(q_length, 1))
    table[:, K_ROW] = table[:, V_ROW] = table[:, BIAS_ROW] = out_row
    table[:, MASK_ROW], table[:, SLOT] = 0, -1
    table[:, [KEYS, QUERIES]] = table[:, [QUERIES, KEYS]]
    k_rows = (head * k_length + start)[:, None]
    return Sides(Jobs(table, k_row, k_rows), v_row, mask_row, bias_row)


def with_rows_of_result(jobs: Jobs, q_length: int) -> tuple[Jobs, Owners]:
    """Number the rows of queries as those of the result; who packs them so."""
    heads = np.repeat(jobs.table[:, BLOCK], jobs.q_rows.shape[1])
    order = np.argsort(jobs.out_rows.ravel())
    owners = Owners(jobs.q_rows.ravel()[order], heads[order], q_length)
    return Jobs(jobs.table, jobs.out_rows, jobs.out_rows), owners


def sums_over_heads(of: Array, results: Array, count: int) -> tuple[Array, Array] | None:
    """Return which results belong to each of `count` heads; None if each has its own."""
    order = np.argsort(results)
    first, parts = by_owner(of[order], count)
    parts = results[order][parts].astype(np.int32)
    if len(parts) == count and (parts == np.arange(count)).all():
        return None
    return first, parts


def by_owner(of: Array, count: int) -> tuple[Array, Array]:
    """Return what belongs to each of `count` owners: numbers, and where those of each begin."""
    order = np.argsort(of, kind="stable")
    first = np.searchsorted(of[order], np.arange(count + 1))
    return first.astype(np.int32), order.astype(np.int32)


def _ways(sides: Sides, parts: Stretches, backwards: bool) -> tuple[Array, int]:
    """First rows of stretches, from that of their problem on, and the step of rows."""
    if not backwards:
        return parts.start, 1
    return sides.jobs.table[parts.owner, KEYS] - 1 - parts.start, -1


def _rows_and_head(table: Array) -> tuple[Array, ...]:
    """Return the first rows of keys, values, mask and log2_bias of each job, and its head."""
    return tuple(table[:, column] for column in (K_ROW, V_ROW, MASK_ROW, BIAS_ROW, BLOCK))


def fold_table(sides: Sides, parts: Stretches, backwards: bool = False) -> Array:
    """Return the table of the fold of stretches: the state of each has its number."""
    k_row, v_row, mask_row, bias_row, head = _rows_and_head(sides.jobs.table[parts.owner])
    at, step = _ways(sides, parts, backwards)
    slots = np.arange(len(parts.owner))
    rows = (k_row + at, v_row + at, mask_row + at)
    return _table(0, step, parts.lengths, 0, 0, *rows, head, slots, 0, bias_row + at)


def scan_table(sides: Sides, parts: Stretches, fresh: bool) -> Array:
    """Return the table of the scan: the stretches of every job, in order."""
    counts = np.bincount(parts.owner, minlength=len(sides.jobs.table))
    return _table(sides.slots, np.cumsum(counts) - counts, counts, int(fresh))


def read_table(sides: Sides, parts: Stretches, slots: Array, backwards: bool = False) -> Array:
    """Return the table of the reads of stretches, each by the group of queries of its job."""
    owner, jobs = parts.owner, sides.jobs
    k_row, v_row, mask_row, bias_row, head = (x[:, None] for x in _rows_and_head(jobs.table[owner]))
    way, step = _ways(sides, parts, backwards)
    at = way[:, None]
    table = _table(
        jobs.q_rows[owner] + at,
        step,
        parts.lengths[:, None],
        sides.masks[owner] + at,
        jobs.out_rows[owner] + at,
        k_row + at,
        v_row + at,
        mask_row + at,
        head,
        slots[:, None],
        sides.vectors[owner] + at,
        bias_row + at,
        sides.log2_bias[owner] + at,
    )
    return np.ascontiguousarray(table.swapaxes(1, 2).reshape(-1, table.shape[1]))


def change_table(table: Array) -> Array:
    """Return the table by which `change` goes over the rows that a table of reads writes."""
    step, count, out_row, head = table.T[[STEP, COUNT, OUT_ROW, HEAD]]
    first = np.where(step > 0, out_row, out_row - count + 1)
    return _table(first, count, first, head)


class Piece(NamedTuple):
    """Reads whose sums for the gradient of a map are kept at a time, and which head has which."""

    read: Array
    first: Array
    parts: Array


def pieces(of: Layout, read: Array) -> tuple[Piece, ...]:
    """Cut the table of reads where their sums would take more than ROOM."""
    most = max(ROOM // (4 * of.lines * (of.columns + 1)), 1)
    tables = (read[start : start + most] for start in range(0, len(read), most))
    return tuple(Piece(table, *by_owner(table[:, HEAD], len(of.bias))) for table in tables)


class Span(NamedTuple):
    """What is under way at a time: so many stretches, and the tables of the kernels that take them.

    `change` goes over the rows that are read, for maps that multiply these; None for others.
    `pieces` are what is read for the gradient of the map itself.
    """

    parts: int
    fold: Array
    scan: Array
    read: Array
    change: Array | None
    pieces: tuple[Piece, ...] = ()


def spans(
    device: Device,
    of: Layout,
    sides: Sides,
    value_dim: int,
    *,
    causal: bool,
    fresh: bool,
    backwards: bool = False,
) -> tuple[Span, ...]:
    """Cut problems: causal ones read the states of their stretches, others the final one."""
    table = sides.jobs.table
    keys, queries = (int(table[:, column].max(initial=0)) for column in (KEYS, QUERIES))
    columns = -(-value_dim // TILE)
    cut = lengths(device, len(table), keys, of.features // TILE, columns, causal=causal)
    found = []
    for start in range(0, max(keys, 1), cut.span):
        parts = stretches(table[:, KEYS], cut.stretch, (start, start + cut.span))
        count = len(parts.owner)
        fold = fold_table(sides, parts, backwards)
        scan = scan_table(sides, parts, fresh and start == 0)
        slots = np.arange(count)
        if not causal:
            parts = stretches(table[:, QUERIES], TILE, (0, queries))
            slots = sides.slots[parts.owner]
        read = read_table(sides, parts, slots, backwards)
        change = change_table(read) if of.factors[0].size else None
        found.append(Span(count, fold, scan, read, change))
    return tuple(found)


class Attention(NamedTuple):
    """How attention is computed: the packing of queries and keys, and the spans that follow."""

    queries: tuple[Array, int]
    keys: tuple[Array, int]
    jobs: int
    spans: tuple[Span, ...]


def attention(
    device: Device,
    feature_map: FeatureMap,
    shapes: Shapes,
    offsets: bytes | None,
    *,
    fresh: bool,
    causal: bool,
) -> Attention:
    """Return how arrays of these shapes are attended; `fresh`: the states begin empty."""
    q, k, v = shapes.q, shapes.k, shapes.v
    of = layout(feature_map)
    jobs = broadcast_jobs(shapes, feature_map.num_heads, 1)
    q_owners, k_owners = row_heads(jobs, q, k, of)
    if q_owners is not None:  # each job has packed rows of its own
        jobs = with_own_rows(jobs, q[-2], k[-2])
    jobs = _in_sequences(jobs, offsets)
    return Attention(
        pack_table(_count(q), q_owners),
        pack_table(_count(k), k_owners),
        len(jobs.table),
        spans(device, of, keys_and_queries(jobs), v[-1], causal=causal, fresh=fresh),
    )


class Part(NamedTuple):
    """Positions whose rows are causal attention within packs, and where the packs begin and end."""

    queries: Array
    keys: Array
    packs: bytes


class Wave(NamedTuple):
    """Some segments of a window: what they see of themselves, and of those before.

    The second has rows turned round, as `favor_np.window` says.  Row i of `own` is joined with row
    joined[i] of `other`, if that is not negative.
    """

    own: Part
    other: Part | None
    joined: Array


def waves(
    feature_map: FeatureMap, shapes: Shapes, offsets: bytes | None, window: int
) -> tuple[Wave, ...]:
    """Cut sequences into segments as long as a window, so many at a time as states have room."""
    keys, value_dim = shapes.k[-2], shapes.v[-1]
    state = state_bytes(layout(feature_map).features // TILE, -(-value_dim // TILE))
    most = ROOM // (state * max(math.prod(shapes.state or ()), 1))
    ends = np.array([0, keys]) if offsets is None else np.frombuffer(offsets, np.int64)
    back, found = np.arange(window - 1, 0, -1), []
    for run in segments(ends, window, most):
        rows = np.arange(run.first, run.last)
        own, other = _part(rows, rows, np.append(run.begin, run.last) - run.first), None
        joined = np.full(len(rows), -1, np.int32)
        if run.later.any():
            begin, end = run.begin[run.later, None], run.end[run.later, None]
            queries = begin + back - 1
            there = queries < end
            joined[queries[there] - run.first] = np.flatnonzero(there)
            packs = np.arange(len(begin) + 1) * (window - 1)
            other = _part(np.minimum(queries, end - 1), begin - window + back, packs)
        found.append(Wave(own, other, joined))
    return tuple(found)


def _part(queries: Array, keys: Array, packs: Array) -> Part:
    first, second = (x.astype(np.int32).ravel() for x in (queries, keys))
    return Part(first, second, packs.astype(np.int64).tobytes())


class Steps(NamedTuple):
    """How one token for each state is folded and read: tables of `kernels.step`."""

    table: Array
    q_rows: Array
    out_rows: Array


def steps(feature_map: FeatureMap, shapes: Shapes, offsets: bytes | None) -> Steps:
    """Return how states take a token each."""
    jobs = _in_sequences(broadcast_jobs(shapes, feature_map.num_heads, 1), offsets)
    columns = (K_ROW, V_ROW, MASK_ROW, BIAS_ROW, BLOCK, SLOT)
    return Steps(
        np.ascontiguousarray(jobs.table[:, columns], np.int32),
        jobs.q_rows.astype(np.int32),
        jobs.out_rows.astype(np.int32),
    )


class Gradient(NamedTuple):
    """How gradients are computed: of queries, then of keys and values; and which results are added.

    Every head of the result, `results` of them, has gradients for itself; where heads share an
    array, `sums` has for it what `sums_over_heads` says.  Of queries there are `states[0]` states,
    of keys `states[1]`.  Scans by `last` and `first` go between the cotangents of the caller's
    states and those of keys: each is that of the last state of one of the heads that share it, and
    adds up to the cotangent of the first.
    """

    queries: tuple[Array, int]
    keys: tuple[Array, int]
    states: tuple[int, int]
    of_queries: tuple[Span, ...]
    of_keys: tuple[Span, ...]
    results: int
    sums: tuple[tuple[Array, Array] | None, ...]
    last: Array
    first: Array


def gradient(
    device: Device,
    feature_map: FeatureMap,
    shapes: Shapes,
    offsets: bytes | None,
    *,
    causal: bool,
    fresh: tuple[bool, bool],
    of_map: bool,
) -> Gradient:
    """Return how gradients for arrays of these shapes are found, or that `of_map`.

    `fresh`: whether there is no first state, and no cotangent of the last one.
    """
    q, k, v = shapes.q, shapes.k, shapes.v
    of = layout(feature_map)
    whole = broadcast_jobs(shapes, feature_map.num_heads, 1)
    _, k_owners = row_heads(whole, q, k, of)
    jobs, q_owners = with_rows_of_result(whole, q[-2])
    if k_owners is not None:
        own = with_own_rows(jobs, q[-2], k[-2])
        jobs = Jobs(own.table, jobs.q_rows, jobs.out_rows)
    jobs = _in_sequences(jobs, offsets)
    group = whole.q_rows.shape[1]
    heads = (
        whole.q_rows.ravel() // max(q[-2], 1),
        np.repeat(whole.table[:, K_ROW], group) // max(k[-2], 1),
        np.repeat(whole.table[:, V_ROW], group) // max(k[-2], 1),
    )
    numbers = whole.out_rows.ravel() // max(q[-2], 1)
    sides = queries_and_keys(jobs, q[-2], k[-2])
    queries = pack_table(_count(q), q_owners)

    def cut(sides: Sides, **options: bool) -> tuple[Span, ...]:
        found = spans(device, of, sides, v[-1], causal=causal, **options)
        if of_map:
            found = tuple(span._replace(pieces=pieces(of, span.read)) for span in found)
        return found

    slot, number = jobs.table[:, SLOT], np.arange(len(sides.jobs.table))
    return Gradient(
        queries,
        pack_table(_count(k), k_owners),
        (max(len(slot), slot.max(initial=-1) + 1), len(number)),
        cut(keys_and_queries(jobs), fresh=fresh[0]),
        cut(sides, fresh=fresh[1], backwards=causal),
        queries[1] // max(q[-2], 1),
        tuple(
            sums_over_heads(of_head, numbers, math.prod(x[:-2]))
            for of_head, x in zip(heads, (q, k, v), strict=True)
        ),
        _table(number, np.repeat(slot, group), number % max(group, 1) == 0, 1),
        _table(slot, group * np.arange(len(slot)), group, 1)[: len(number)],
    )


def _in_sequences(jobs: Jobs, offsets: bytes | None) -> Jobs:
    """Cut jobs where packed sequences begin; offsets are those of `validation.sequence_offsets`."""
    if offsets is None:
        return jobs
    return packed(jobs, np.frombuffer(offsets, np.int64))


def _count(shape: tuple[int, ...]) -> int:
    """Rows of a shape."""
    return math.prod(shape[:-1])
