"""What a call looks like before it runs: layouts, workspaces, and the table of jobs.

Everything here is a function of shapes, dtypes and the feature map.  Nothing but the number of
workspaces depends on the number of threads, so no bit of a result does.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from favor_np import numerics
from favor_np.cpu.kernels import bfloat16, chunk, exact_vjp
from favor_np.cpu.kernels import exact as exact_kernels
from favor_np.cpu.kernels import favor as kernels
from favor_np.cpu.kernels import favor_vjp as vjp_kernels
from favor_np.cpu.kernels import relay as relay_kernel
from favor_np.cpu.kernels.chunk import FOLD
from favor_np.cpu.kernels.pack import CHUNK, Map
from favor_np.cpu.kernels.simd import VECTOR_BYTES
from favor_np.cpu.kernels.spread import carve_groups
from favor_np.cpu.kernels.state import PAD, TAIL
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
    Shape,
    broadcast_jobs,
)
from favor_np.tables import kept

#: Positions that bidirectional attention folds, and reads, as one job.  Longer sequences are folded
#: in segments and these merged in order, whatever the number of threads: the same bits for any.
SEGMENT = 8192
#: Causal problems of at least this length may be shared out chunk by chunk.  A group has so many chunks for
#: each thread, or fewer: states and features of all groups in memory take about so many bytes at most.
LONG, EACH, ROOM = 1024, 2, 8 << 20
#: Jobs that the gradient of few heads is cut into.  Each takes the memory of its own dq.
PARTS = 8
#: Exact attention has at least so many jobs, if these need not be less than 256 queries for that.
FEW = 4
#: States that are under way at a time.
WAVE = 32
#: Weights of a head from which on its rows are worth cutting into planes: in whole calls, for a processor
#: that has just used its matrix unit runs vectors up to a fifth slower, for up to a tenth of a millisecond.
PLANES_FROM = 64 * 32


def padded(count: int, itemsize: int) -> int:
    """Return `count` rounded up to whole vectors."""
    lanes = VECTOR_BYTES // itemsize
    return -(-count // lanes) * lanes


def integer_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the integer dtype of the same width: that of the exponents c."""
    return np.dtype(np.int32 if dtype.itemsize == 4 else np.int64)


def aligned(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Return zeros that begin on a cache line: a vector that crosses two is loaded twice."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def state_shapes(count: int, features: int, columns: int) -> tuple[Shape, Shape, Shape]:
    """Return the shapes of (c, S, z) for so many slots: see ``kernels.state``."""
    rows = 2 * features + TAIL
    return (count, features + PAD), (count, rows, columns), (count, (2 + TAIL) * features)


def state_arrays(
    count: int, features: int, columns: int, dtype: np.dtype[Any]
) -> tuple[Array, ...]:
    """Return zeros for so many slots."""
    c, s, z = state_shapes(count, features, columns)
    return aligned(c, integer_of(dtype)), aligned(s, dtype), aligned(z, dtype)


def tail(of: Layout, s: Array, z: Array) -> tuple[Array, Array]:
    """Return the tails of states: features (slots, TAIL, F) and values (slots, TAIL, X), both views."""
    return z[:, 2 * of.features :].reshape(len(z), TAIL, of.features), s[:, 2 * of.features :]


def aligned_copy(array: Array) -> Array:
    """Return a copy in C order that begins on a cache line."""
    new = aligned(array.shape, array.dtype)
    new[...] = array
    return new


@dataclass(frozen=True, eq=False)
class Workspace:
    """The memory that a thread of a kernel works on: one object for all of the same size."""

    dtype: np.dtype[Any]
    floats: int
    ints: int
    state: tuple[int, int] | None  # features and columns, if each thread has one

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of one thread."""
        shapes = () if self.state is None else state_shapes(1, *self.state)
        return (self.floats + self.ints + sum(map(math.prod, shapes))) * self.dtype.itemsize

    def make(self, threads: int) -> tuple[Array, ...]:
        """Return the arrays: (c, S, z) if there is a state, floats and integers; a row a thread."""
        whole = integer_of(self.dtype)
        state: tuple[Array, ...] = ()
        if self.state is not None:
            state = state_arrays(threads, *self.state, self.dtype)
        floats = aligned((threads, self.floats), self.dtype)
        return *state, floats, aligned((threads, self.ints), whole)


#: Bytes of the workspaces that a Python thread keeps.
SPARE = 128 << 20


@functools.lru_cache(maxsize=256)
def workspace(
    dtype: np.dtype[Any], floats: int, ints: int, state: tuple[int, int] | None = None
) -> Workspace:
    """Return the one workspace of this size; rows begin on cache lines."""
    return Workspace(dtype, -(-floats // 16) * 16, ints, state)


def measure(carve: Any, *args: Any) -> Counter[np.dtype[Any]]:
    """Return how many numbers of each dtype a kernel's `carve` cuts from the workspaces in `args`.

    Its own source is run, with a `cut` that only counts: what it takes is written down nowhere else.
    """
    sizes: Counter[np.dtype[Any]] = Counter()

    def count(buffer: Array, start: int, rows: int, columns: int) -> tuple[Array, int]:
        end = start + rows * columns
        sizes[buffer.dtype] = max(sizes[buffer.dtype], end)
        return np.zeros((rows, columns), buffer.dtype), end

    def source(function: Any) -> Any:
        names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
        called = {name: source(x.py_func) for name, x in names.items() if hasattr(x, "py_func")}
        return FunctionType(function.__code__, {**function.__globals__, **called, "cut": count})

    source(carve.py_func)(*args)
    return sizes


@functools.lru_cache(maxsize=256)
def _sizes(carve: Any, dtype: np.dtype[Any], *args: Any) -> tuple[int, int]:
    """Return how many floats and integers `carve` cuts for these arguments."""
    kinds = dtype, integer_of(dtype)
    sizes = measure(carve, *(np.empty(0, kind) for kind in kinds), *args)
    return sizes[kinds[0]], sizes[kinds[1]]


@dataclass(frozen=True, eq=False)
class Layout:
    """How the features of one map lie in memory, for one dtype and width of values.

    `arrays` are what kernels take of `map`. The rows of W are cut into `blocks` of `width`; feature r of sign s is row ``s * half + r`` of
    the state, padded rows are features of W = 0 that no query reads.  `fresh` is c of no keys.
    """

    dtype: np.dtype[Any]
    map: Any
    arrays: tuple[Any, ...]
    natural: Any
    blocks: int
    half: int
    features: int
    value_columns: int
    stateless: Workspace
    stateful: Workspace
    real: Array
    fresh: Array
    causal: Array
    bidirectional: Array
    rows: int
    signs: int
    width: int


def worth_planes(dtype: np.dtype[Any], rows: int, dim: int) -> bool:
    """Whether products with a matrix (rows, dim) are faster on the matrix unit, its factors being cut."""
    large = min(rows, dim) >= 32 and rows * dim >= PLANES_FROM
    return dtype == np.float32 and large and not bfloat16.refusal()


@functools.lru_cache(maxsize=64)
def layout(
    feature_map: FeatureMap, dtype: np.dtype[Any], value_dim: int, group: int | None = None,
    words: bool = False,
) -> Layout:  # fmt: skip
    """Return the layout, with the map's weights packed for the kernels.

    With `group` every block has so many rows of W; with `words` the weights are for bfloat16.
    """
    size = dtype.itemsize
    heads, rows, dim = feature_map.key_weight.shape
    signs = 2 if feature_map.antithetic else 1
    positive = feature_map.kind == "positive"
    blocks = -(-rows // (group or CHUNK))
    width = -(-(group or -(-rows // blocks)) // 16) * 16
    filled = group or width
    half = blocks * width
    places = np.arange(rows) // filled * width + np.arange(rows) % filled
    unit = numerics.LOG2E if positive else 1.0
    affine, factor = feature_map.calibration is not None, feature_map.key_factor
    columns = padded(dim, size)

    def packed_weight(weight: Array) -> tuple[Array, Array]:
        """Blocks of the weight, times `unit` and transposed; and as they are, for gradients."""
        padding = np.zeros((heads, half, dim))
        padding[:, places] = weight
        padding = padding.reshape(heads * blocks, width, dim)
        turned = aligned((heads * blocks, dim, width), dtype)
        turned[:] = padding.swapaxes(1, 2) * unit
        natural = aligned((heads * blocks, width, columns), dtype)
        natural[..., :dim] = padding
        return turned, natural

    def of_blocks(array: Array) -> Array:
        """The same for every block of a head, its last axis padded."""
        array = np.repeat(array, blocks, axis=0)
        new = aligned((*array.shape[:-1], columns), dtype)
        new[..., :dim] = array
        return new

    key, natural_key = packed_weight(feature_map.key_weight)
    query, natural_query = key, natural_key
    if affine:
        query, natural_query = packed_weight(feature_map.query_weight)
    if words:  # right factors
        query, key = (
            aligned_copy(bfloat16.words_of(x * np.float32(unit)).swapaxes(1, 2))
            for x in (natural_query, natural_key)
        )
    planes = not words and group is None and worth_planes(dtype, rows, dim)
    bias = aligned((heads, half), dtype)
    bias[:, places] = feature_map.bias * unit
    # No matrix of d x d where there is none.
    of_affine, hessian = np.zeros((2, 0, 1, columns), dtype)
    linear = np.zeros((0, columns), dtype)
    if affine:
        linear = of_blocks(feature_map.key_linear)
        vectors = (feature_map.query_center, feature_map.key_center, feature_map.key_linear * unit)
        rows_of_affine = [np.broadcast_to(x, (heads, dim))[:, None] for x in vectors]
        if factor is not None:
            hessian = of_blocks(factor.swapaxes(1, 2) @ factor)
            turned = factor.swapaxes(1, 2) * math.sqrt(0.5 * unit)
            rows_of_affine.append(np.broadcast_to(turned, (heads, dim, dim)))
        of_affine = of_blocks(np.concatenate(rows_of_affine, axis=1))
    query_left = query_right = key_left = key_right = None
    if planes:
        query_left, query_right = key_left, key_right = _factors(key)
        if affine:
            query_left, query_right = _factors(query)
    weights = Map(
        query=query,
        key=key,
        bias=bias.reshape(heads * blocks, width),
        affine=of_affine,
        query_planes=query_left,
        key_planes=key_right,
    )
    natural = vjp_kernels.Natural(
        query=natural_query,
        key=natural_key,
        hessian=hessian,
        linear=linear,
        query_planes=query_right,
        key_planes=key_left,
        unit=bfloat16.UNIT if planes else None,
    )
    value_columns = padded(value_dim, size)

    # Features that only pad: no key may reach their exponents and so move those of others.
    idle = numerics.UNREACHED[size] if positive else numerics.NOTHING[size]
    real = np.concatenate([s * half + places for s in range(signs)])
    fresh = np.full(signs * half, idle, integer_of(dtype))
    fresh[real] = numerics.NOTHING[size]

    def parameters(causal: bool) -> Array:
        of = kernels.Parameters(
            kind=numerics.KINDS[feature_map.kind],
            signs=signs,
            filled=filled,
            key_norm=feature_map.key_norm * numerics.LOG2E,
            affine=affine,
            factored=factor is not None,
            kernel_epsilon=float(feature_map.kernel_epsilon),
            limit=numerics.projection_limit(feature_map, size),
            far=numerics.FAR[size],
            nothing=numerics.NOTHING[size],
            idle=idle,
            span=numerics.SPAN[size] if causal else 2**30,
            causal=causal,
        )
        constants = np.zeros(1, kernels.CONSTANTS)
        for name, value in of._asdict().items():
            constants[name] = value
        return constants

    unit_or_none, cut_or_none = (True if x else None for x in (planes or words, planes))
    sizes = _sizes(
        chunk.carve, dtype, signs, unit_or_none, cut_or_none, dim, value_columns, width, blocks
    )
    return Layout(
        dtype=dtype,
        map=weights,
        arrays=(*weights[: None if planes else 4], *([bfloat16.UNIT] if planes or words else [])),
        natural=natural,
        blocks=blocks,
        half=half,
        features=signs * half,
        value_columns=value_columns,
        stateless=workspace(dtype, *sizes),
        stateful=workspace(dtype, *sizes, (signs * half, value_columns)),
        real=real,
        fresh=fresh,
        causal=parameters(True),
        bidirectional=parameters(False),
        rows=rows,
        signs=signs,
        width=width,
    )


def _factors(weight: Array) -> tuple[Array, Array]:
    """Return blocks of weights (d, width), cut into planes, as left and as right factors."""
    left = bfloat16.planes_of(weight.swapaxes(1, 2))
    return aligned_copy(left), aligned_copy(left.swapaxes(1, 2))


def longest_row(size: int, scale: float) -> float:
    """Return the norm from which on a row of exact attention, once scaled or squared, may overflow."""
    return 2.0**100 / max(scale, 1.0) if size == 4 else 1e150


def exact_parameters(dtype: np.dtype[Any], scale: float, causal: bool) -> Any:
    """Return the constants of exact attention."""
    far = numerics.EXACT_FAR[dtype.itemsize]
    return exact_kernels.ExactParameters(
        kind=numerics.POSITIVE,
        kernel_epsilon=0.0,
        scale=scale * numerics.LOG2E,
        limit=longest_row(dtype.itemsize, scale),
        far=far,
        masked=numerics.MASKED * far,
        causal=causal,
    )


@functools.lru_cache(maxsize=64)
def exact_workspace(
    dtype: np.dtype[Any], dim: int, value_dim: int, *, words: bool = False, planes: bool = False
) -> Workspace:
    """Return what a thread of exact attention works on."""
    unit, cut_unit = (True if x else None for x in (words, planes))
    columns = padded(value_dim, dtype.itemsize)
    return workspace(dtype, *_sizes(exact_kernels.carve_exact, dtype, unit, cut_unit, dim, columns))


def spread_room(of: Layout) -> int:
    """Return how many floats a thread needs beside its workspace to compare the blocks."""
    room = np.empty((1, 0), of.dtype)
    return measure(carve_groups, (), room, 0, of.blocks, of.value_columns, of.width)[of.dtype]


def vjp_workspace(of: Layout, *, stateful: bool) -> Workspace:
    """Return what a thread of the pullback works on."""
    planes = None if of.map.key_planes is None else True
    dim, columns = of.map.key.shape[1], of.value_columns
    sizes = _sizes(vjp_kernels.carve, of.dtype, of.signs, planes, dim, columns, of.width, of.blocks)
    return workspace(of.dtype, *sizes, (of.features, columns) if stateful else None)


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
    clocks = np.tile(np.repeat(of.clocks, heads, axis=0), (2, 1)) if len(of.clocks) else of.clocks
    nothing = np.empty((2 * len(table), 0), np.int64)
    return Jobs(rows.reshape(-1, NUMBER + 1), nothing, nothing, clocks)


def exact_vjp_workspace(dtype: np.dtype[Any], dim: int, value_dim: int) -> Workspace:
    """Return what a thread of its gradient works on."""
    return workspace(dtype, *_sizes(exact_vjp.carve_gradient, dtype, dim, value_dim))


class _Spare(threading.local):
    """Workspaces that this Python thread used before and may use again."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Workspace, int], tuple[Array, ...]] = {}


_spare = _Spare()


def borrow(of: Workspace, threads: int) -> tuple[Array, ...]:
    """Take the arrays that were given back, or make them: nobody else has them meanwhile."""
    return _spare.kept.pop((of, threads), None) or of.make(threads)


def give_back(of: Workspace, threads: int, arrays: tuple[Array, ...]) -> None:
    """Keep arrays for the next call of this Python thread; the oldest of five go, or of too many bytes."""
    kept = _spare.kept
    kept[of, threads] = arrays
    if len(kept) <= 4 and of.nbytes * threads <= SPARE // 4:
        return
    # A signal handler may have called since, or call now: no iterator may be open.
    held = list(kept)
    total = sum(space.nbytes * count for space, count in held)
    for oldest in held:
        if len(held) <= 4 and total <= SPARE:
            break
        held = held[1:]
        total -= oldest[0].nbytes * oldest[1]
        kept.pop(oldest, None)


class Schedule(NamedTuple):
    """What depends on the shapes of a call alone."""

    layout: Layout
    constants: Array
    jobs: Jobs
    longest: int
    work: int  # multiply-adds of a job's projections


@kept(64, lambda of: of.jobs.nbytes)
def schedule(
    feature_map: FeatureMap, dtype: np.dtype[Any], q: Shape, k: Shape, v: Shape,
    mask: Shape | None, causal: bool, grouped: bool, state: Shape | None, group: int | None = None,
    words: bool = False,
) -> Schedule:  # fmt: skip
    """Return layout and jobs for arrays of these shapes."""
    of = layout(feature_map, dtype, v[-1], group, words)
    to_do = broadcast_jobs(
        q[:-2], k[:-2], v[:-2], None if mask is None else mask[:-1], feature_map.num_heads, state,
        grouped, q[-2], k[-2], of.blocks, of.rows,
    )  # fmt: skip
    longest = max(q[-2], k[-2])
    constants = of.causal if causal else of.bidirectional
    return Schedule(of, constants, to_do, longest, longest * of.features * q[-1])


def segments(of: Jobs) -> tuple[Jobs, Jobs]:
    """Cut bidirectional jobs into jobs that only fold and jobs that only read, by SEGMENT.

    Their slots are the numbers of the jobs that they are cut from.
    """

    def cut(lengths: Array) -> tuple[Jobs, Array, Array]:
        counts = -(-lengths // SEGMENT)
        owner = np.repeat(np.arange(len(lengths)), counts)
        start = SEGMENT * (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))
        part = of.take(owner)
        part.table[:, SLOT] = owner
        return part, start, np.minimum(SEGMENT, lengths[owner] - start)

    folds, start, length = cut(of.table[:, KEYS])
    folds.skip_keys(start)
    folds.table[:, KEYS], folds.table[:, QUERIES] = length, 0
    nothing = np.empty((len(length), 0), np.int64)
    reads, start, length = cut(of.table[:, QUERIES])
    reads.table[:, KEYS], reads.table[:, QUERIES] = 0, length
    shift = start[:, None]
    return (
        Jobs(folds.table, nothing, nothing, folds.clocks),
        Jobs(reads.table, reads.q_rows + shift, reads.out_rows + shift, reads.clocks),
    )


def few(of: Jobs, threads: int) -> int:
    """Return how many of the first jobs are long causal ones that threads had better share."""
    length = of.table[:, KEYS]
    count = len(length) % threads
    if length.size and length[0] > length[-1]:  # packed, the longest first
        count = int(2 * length[0] > length.sum())
    if not count or 4 * count > 3 * threads or length[:count].min() < LONG:
        return 0
    return count


@dataclass(frozen=True, eq=False)
class Relay:
    """How one long causal problem is shared out: words, how many jobs and states, and where the last one is.

    A workspace has so many rows: states and their sum, and floats for threads and, behind those, for the
    features of the keys of each state.
    """

    words: Array
    count: int
    states: int
    last: int
    rows: int


def relay(of: Layout, length: int, threads: int) -> Relay:
    """Return the plan of a relay: see ``kernels.relay``."""
    chunks = -(-length // CHUNK)
    size = of.features * (of.value_columns + CHUNK) * of.dtype.itemsize
    group = max(min(EACH * threads, ROOM // (relay_kernel.RING * size)), 1)
    turns, states = -(-chunks // group), relay_kernel.RING * group
    words = np.zeros(relay_kernel.LEFT + 3 * (relay_kernel.RING + turns + states + 1), np.int64)
    words[[relay_kernel.CHUNKS, relay_kernel.GROUP, relay_kernel.THREADS]] = chunks, group, threads
    left = words[relay_kernel.LEFT :][: 3 * (relay_kernel.RING + turns)].reshape(-1, 3)
    left[relay_kernel.RING - 1, FOLD] = 1  # the first chunk, which finds c
    left[relay_kernel.RING :, :] = group, group, 1
    left[-1, : relay_kernel.SCAN] = chunks - group * (turns - 1)
    words[-2:] = -1, 1  # at the beginning c has not moved, and there is no key that would not fit
    behind = -(-states * of.features * CHUNK // of.stateful.floats)
    rows = max(states + 1, threads + behind)
    return Relay(words, (turns + 2) * (2 * group + 1), states, (chunks - 1) % states, rows)


@kept(256, lambda table: table.nbytes)
def exact_jobs(
    q: Shape, k: Shape, v: Shape, mask: Shape | None, grouped: bool, q_length: int, k_length: int
) -> Array:
    """Return the jobs of exact attention, a block of queries each."""
    of = broadcast_jobs(q, k, v, mask, None, None, grouped, q_length, k_length, 0, 0)
    block = CHUNK * exact_kernels.GROUP
    while len(of.q_rows) * of.q_rows.shape[1] * -(-q_length // block) < FEW and block > 4 * CHUNK:
        block //= 2
    # The last blocks of a causal problem have the most keys: they go first.
    starts = np.arange(0, q_length, block, dtype=np.int64)[::-1]
    heads = of.q_rows.shape[1]
    table = np.zeros((len(starts), of.q_rows.size, START + 1), np.int64)
    table[..., : ROWS + 1] = np.repeat(of.table, heads, axis=0)
    table[..., Q_ROW] = of.q_rows.ravel() + starts[:, None]
    table[..., OUT_ROW] = of.out_rows.ravel() + starts[:, None]
    table[..., QUERIES] = np.minimum(block, q_length - starts)[:, None]
    table[..., START] = starts[:, None]
    return table.reshape(-1, START + 1)


class GradientJobs(NamedTuple):
    """The jobs of the gradient of exact attention: every `parts`-th block of keys of one problem.

    The queries `q_rows` read a problem; their results are `out_rows` and, with `rows` a head, `dq_rows`.
    """

    table: Array
    q_rows: Array
    out_rows: Array
    dq_rows: Array
    parts: int
    rows: int


@kept(256, lambda of: of.table.nbytes + of.q_rows.nbytes + of.out_rows.nbytes + of.dq_rows.nbytes)
def exact_vjp_jobs(
    q: Shape, k: Shape, v: Shape, mask: Shape | None, grouped: bool, q_length: int, k_length: int
) -> GradientJobs:
    """Return the jobs of the gradient of exact attention."""
    of = broadcast_jobs(q, k, v, mask, None, None, grouped, q_length, k_length, 0, 0)
    block, count = CHUNK * exact_vjp.GROUP, len(of.table)
    parts = min(-(-PARTS // count), -(-k_length // block))
    rows = -(-q_length // 8) * 8
    owner, part = np.divmod(np.arange(count * parts), parts)
    table = np.zeros((count * parts, DQ_ROW + 1), np.int64)
    table[:, : ROWS + 1] = of.table[owner]
    table[:, NUMBER], table[:, GRAD_ROW] = owner, owner * k_length
    table[:, START], table[:, STRIDE] = part * block, parts * block
    table[:, DQ_ROW] = part * of.out_rows.size * rows
    return GradientJobs(table, of.q_rows, of.out_rows, of.out_rows // q_length * rows, parts, rows)
