"""What a call looks like before it runs: layouts, workspaces, and the table of jobs.

Everything here is a function of shapes, dtypes and the feature map.  Nothing but the number of
workspaces depends on the number of threads, so no bit of a result does.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.cpu.kernels import activate, bfloat16, exact_vjp
from favor_np.cpu.kernels import exact as exact_kernels
from favor_np.cpu.kernels import favor as kernels
from favor_np.cpu.kernels import favor_vjp as vjp_kernels
from favor_np.cpu.kernels import relay as relay_kernel
from favor_np.cpu.kernels.chunk import FOLD
from favor_np.cpu.kernels.pack import CHUNK, Map
from favor_np.cpu.kernels.simd import VECTOR_BYTES
from favor_np.cpu.kernels.state import PAD, TAIL
from favor_np.features import FeatureMap
from favor_np.tables import kept

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

#: Largest |log2-feature| kept, by itemsize: longer queries and keys are shortened to it.  The
#: activations round by adding a large number, so it stays well below 2**22 and 2**51.
FAR = {4: 2.0**20, 8: 2.0**28}
#: c of features that no key has reached, and of those that only pad and that no key may reach.  Decay raises
#: keys by up to ``validation.LONGEST_DECAY``.  A masked key has the log2-feature minus infinity, of which
#: `nearest` makes -1.27e9 in float32: sums and differences of all these stay within 32 bits.
NOTHING, UNREACHED = {4: -(2**29), 8: -(2**40)}, {4: 5 * 2**26, 8: 2**40}
#: log2-features of the keys of one chunk may pass its first key by this much (see raise_keys).
SPAN = {4: 40, 8: 400}
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
#: relu and elu features are not exponentials of the projection: it only has to stay finite.
LONGEST = 2.0**60


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


def cut_words(dim: int) -> int:
    """Return the words of a row of that length that is cut into planes."""
    return bfloat16.PLANES * bfloat16.words_for(dim)


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
    kind = {"positive": activate.POSITIVE, "relu": activate.RELU, "elu": activate.ELU}
    blocks = -(-rows // (group or CHUNK))
    width = -(-(group or -(-rows // blocks)) // 16) * 16
    filled = group or width
    half = blocks * width
    places = np.arange(rows) // filled * width + np.arange(rows) % filled
    unit = activate.LOG2E if positive else 1.0
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
    longest = unit * max(
        math.sqrt((weight**2).sum(-1).max())
        for weight in (feature_map.query_weight, feature_map.key_weight)
    )
    value_columns = padded(value_dim, size)

    # Features that only pad: no key may reach their exponents and so move those of others.
    idle = UNREACHED[size] if positive else NOTHING[size]
    real = np.concatenate([s * half + places for s in range(signs)])
    fresh = np.full(signs * half, idle, integer_of(dtype))
    fresh[real] = NOTHING[size]

    def parameters(causal: bool) -> Array:
        of = kernels.Parameters(
            kind=kind[feature_map.kind],
            signs=signs,
            filled=filled,
            key_norm=feature_map.key_norm * activate.LOG2E,
            affine=affine,
            factored=factor is not None,
            kernel_epsilon=float(feature_map.kernel_epsilon),
            limit=FAR[size] / max(longest, 1e-30) if positive else LONGEST / max(longest, 1.0),
            far=FAR[size],
            nothing=NOTHING[size],
            idle=idle,
            span=SPAN[size] if causal else 2**30,
            causal=causal,
        )
        constants = np.zeros(1, kernels.CONSTANTS)
        for name, value in of._asdict().items():
            constants[name] = value
        return constants

    floats = (
        3 * CHUNK * columns  # rows, across, stretched
        + 2 * CHUNK * width  # raw, phi
        + 3 * CHUNK * value_columns  # values, num, spare
        + CHUNK * CHUNK  # scores
        + signs * half * CHUNK  # keys
        + 5 * CHUNK  # height, share, den, part, others
        + 3 * signs * half  # sums, scale, token
        + CHUNK * 8 // size  # square
    )
    if planes:
        floats += 2 * CHUNK * cut_words(dim)  # left, right
    if words:
        floats += _words_workspace(columns, value_columns, width, signs * blocks)
    ints = 2 * CHUNK + CHUNK * (VECTOR_BYTES // size) + (signs * blocks * CHUNK if words else 0)
    return Layout(
        dtype=dtype,
        map=weights,
        arrays=(*weights[: None if planes else 4], *([bfloat16.UNIT] if planes or words else [])),
        natural=natural,
        blocks=blocks,
        half=half,
        features=signs * half,
        value_columns=value_columns,
        stateless=workspace(dtype, floats, ints),
        stateful=workspace(dtype, floats, ints, (signs * half, value_columns)),
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


def _words_workspace(columns: int, value_columns: int, width: int, tiles: int) -> int:
    """Return how many floats the tiles for words take."""
    depth, features = bfloat16.words_for(columns), bfloat16.words_for(width)
    lanes = VECTOR_BYTES // 4
    return (
        CHUNK * (depth + features)  # rows, turned
        + tiles * features * (CHUNK + value_columns)  # keys, state
        + CHUNK * value_columns  # values, finite
        + CHUNK * width  # folded, folded_t
        + bfloat16.STRIP * (CHUNK + CHUNK // 2 + lanes + 2 * bfloat16.STRIP)  # raw, phi, part, seen
        + CHUNK * (lanes + tiles)  # sums, z
    )


def longest_row(size: int, scale: float) -> float:
    """Return the norm from which on a row of exact attention, once scaled or squared, may overflow."""
    return 2.0**100 / max(scale, 1.0) if size == 4 else 1e150


def exact_parameters(dtype: np.dtype[Any], scale: float, causal: bool) -> Any:
    """Return the constants of exact attention."""
    far, limit = 2.0**20 if dtype.itemsize == 4 else 2.0**48, longest_row(dtype.itemsize, scale)
    return exact_kernels.ExactParameters(
        kind=activate.POSITIVE,
        kernel_epsilon=0.0,
        scale=scale * activate.LOG2E,
        limit=limit,
        far=far,
        masked=8 * far,
        causal=causal,
    )


def exact_workspace(
    dtype: np.dtype[Any], dim: int, value_dim: int, *, words: bool = False, planes: bool = False
) -> Workspace:
    """Return what a thread of exact attention works on."""
    size, group = dtype.itemsize, exact_kernels.GROUP
    columns, value_columns = padded(dim, size), padded(value_dim, size)
    floats = (
        (2 + group) * CHUNK * columns  # rows, keys, across
        + (2 + group) * CHUNK * value_columns  # values, spare, num
        + 2 * CHUNK * CHUNK  # raw, phi
        + (group + 2) * CHUNK  # den, part, ones
        + (2 + group) * CHUNK * 8 // size  # longest, square, key_square
    )
    if planes:
        floats += (group + 1) * CHUNK * cut_words(dim)  # queries, keys
    if words:
        depth = bfloat16.words_for(dim)
        strip, lanes = bfloat16.STRIP, VECTOR_BYTES // size
        floats += (
            CHUNK * ((2 + group) * depth + value_columns // 2)  # queries, rows, keys, values
            + strip * CHUNK // 2  # phi
            + (group * CHUNK + strip) * lanes  # sums, part
        )
    return workspace(dtype, floats, (group + 2) * CHUNK)


def spread_room(of: Layout) -> int:
    """Return how many floats a thread needs beside its workspace to compare the blocks."""
    lanes = VECTOR_BYTES // of.dtype.itemsize
    return CHUNK * (of.blocks * (3 + of.value_columns) + lanes + of.width)


def vjp_workspace(of: Layout, *, stateful: bool) -> Workspace:
    """Return what a thread of the pullback works on."""
    size, columns = of.dtype.itemsize, of.natural.key.shape[-1]
    floats = (
        4 * CHUNK * columns  # rows, columns, grad, stretched
        + of.half * CHUNK  # raws
        + 4 * CHUNK * of.width  # phi, slope, back, error
        + 5 * CHUNK * of.value_columns  # values, other, turned, num, spare
        + 2 * CHUNK * CHUNK  # scores, pair
        + of.features * CHUNK  # keys
        + 5 * CHUNK  # height, share, extra, factor, total
        + 2 * of.features  # sums, scale
        + CHUNK * 8 // size  # square
    )
    if of.map.key_planes is not None:
        floats += 2 * CHUNK * cut_words(columns)  # left, right
    state = (of.features, of.value_columns) if stateful else None
    return workspace(of.dtype, floats, CHUNK + CHUNK * (VECTOR_BYTES // size), state)


def vjp_jobs(of: Jobs, q_length: int, k_length: int) -> Jobs:
    """Turn jobs into those of the pullback: for each query head its own side and that of its keys.

    A row of the table has, from column 8 on, the side (1: of keys), the q row, the row of out, the row
    of the gradients of keys and values, which every query head has for itself, and its own number.
    """
    heads = of.q_rows.shape[1]
    table = np.repeat(of.table, heads, axis=0)
    out_rows = of.out_rows.ravel()
    head, start = np.divmod(out_rows, max(q_length, 1))
    rows = np.empty((2, len(table), 13), np.int64)
    rows[:, :, :8] = table
    rows[:, :, 8] = np.array([1, 0])[:, None]
    rows[:, :, 9], rows[:, :, 10] = of.q_rows.ravel(), out_rows
    rows[:, :, 11] = head * k_length + start
    rows[:, :, 12] = np.arange(2 * len(table)).reshape(2, -1)
    clocks = np.tile(np.repeat(of.clocks, heads, axis=0), (2, 1)) if len(of.clocks) else of.clocks
    nothing = np.empty((2 * len(table), 0), np.int64)
    return Jobs(rows.reshape(-1, 13), nothing, nothing, clocks)


def exact_vjp_workspace(dtype: np.dtype[Any], dim: int, value_dim: int) -> Workspace:
    """Return what a thread of its gradient works on."""
    size, group = dtype.itemsize, exact_vjp.GROUP
    columns, value_columns = padded(dim, size), padded(value_dim, size)
    floats = (
        (2 + 3 * group) * CHUNK * columns  # q, q_columns; k, k_columns, dk
        + (3 + 2 * group) * CHUNK * value_columns  # g, g_columns, v; v_columns, dv
        + 2 * CHUNK * CHUNK  # p, ds
        + CHUNK * 8 // size  # square
    )
    return workspace(dtype, floats, group * CHUNK)


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


@dataclass(frozen=True, eq=False)
class Jobs:
    """Who attends to whom: one job for each state, with the group of queries that reads it.

    A row of the table is (k row, v row, mask row or -1, keys, first block of the weights, slot of the
    state or -1, queries, rows of W).  `clocks` is empty, or has how far each job's
    first key is raised, in log2, and by how much more every further one.
    """

    table: Array
    q_rows: Array
    out_rows: Array
    clocks: Array

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values())

    def skip_keys(self, start: Any) -> None:
        """Let every job begin at its key number `start`, in place."""
        skip_rows(self.table, start)
        if len(self.clocks):
            self.clocks[:, 0] += start * self.clocks[:, 1]

    def take(self, rows: Any) -> Jobs:
        """Return some of the jobs."""
        clocks = self.clocks[rows] if len(self.clocks) else self.clocks
        return Jobs(self.table[rows], self.q_rows[rows], self.out_rows[rows], clocks)


def skip_rows(table: Array, start: Any) -> None:
    """Move the rows of keys, values and mask, where there is one."""
    table[:, :2] += np.reshape(start, (-1, 1))
    table[:, 2] += np.where(table[:, 2] < 0, 0, start)


_NO_CLOCKS = np.zeros((0, 2))


def jobs_without_rows(slots: int, rows: int) -> Jobs:
    """Return jobs that only fold the tail of each slot."""
    table = np.zeros((slots, 8), np.int64)
    table[:, 2], table[:, 5], table[:, 7] = -1, np.arange(slots), rows
    nothing = np.empty((slots, 0), np.int64)
    return Jobs(table, nothing, nothing, _NO_CLOCKS)


@kept(256, lambda of: of.nbytes)
def jobs(
    q: Shape, k: Shape, v: Shape, mask: Shape | None, heads: int | None, state: Shape | None,
    grouped: bool, q_length: int, k_length: int, blocks: int, rows: int,
) -> Jobs:  # fmt: skip
    """Return the jobs for leading axes that broadcast (validated before).

    With `grouped` the last of the leading axes holds the heads, and several query heads share one
    head of keys and values.
    """
    state_shape = np.broadcast_shapes(k, v, mask or (), (heads,) if heads else (), state or ())
    q_full, state_full = q, state_shape
    if grouped:
        q_full = (*q[:-1], state_shape[-1], q[-1] // state_shape[-1])
        state_full = (*state_shape, 1)
    full = np.broadcast_shapes(q_full, state_full)
    count = math.prod(state_shape)

    def index(shape: Shape, into: Shape) -> Array:
        numbers = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
        return np.broadcast_to(numbers, into).ravel()

    group = math.prod(full) // max(count, 1)
    order = np.argsort(index(state_full, full), kind="stable").reshape(count, group)
    head = index((heads,), state_shape) if heads else np.zeros(count, np.int64)
    table = np.stack(
        [
            index(k, state_shape) * k_length,
            index(v, state_shape) * k_length,
            np.full(count, -1) if mask is None else index(mask, state_shape) * k_length,
            np.full(count, k_length),
            head * blocks,
            np.full(count, -1) if state is None else np.arange(count),
            np.full(count, q_length),
            np.full(count, rows),
        ],
        axis=1,
    ).astype(np.int64)
    return Jobs(
        np.ascontiguousarray(table),
        np.ascontiguousarray(index(q_full, full)[order] * q_length),
        np.ascontiguousarray(order * max(q_length, 1)),  # without rows the head's number still
        _NO_CLOCKS,
    )


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
    to_do = jobs(
        q[:-2], k[:-2], v[:-2], None if mask is None else mask[:-1], feature_map.num_heads, state,
        grouped, q[-2], k[-2], of.blocks, of.rows,
    )  # fmt: skip
    longest = max(q[-2], k[-2])
    constants = of.causal if causal else of.bidirectional
    return Schedule(of, constants, to_do, longest, longest * of.features * q[-1])


def packed(of: Jobs, offsets: Array) -> Jobs:
    """Cut every job into one for each sequence offsets[i]:offsets[i + 1], the longest first.

    Slots are numbered state by state and, within each, sequence by sequence; the clocks of `of` are
    those of the slots.
    """
    count, lengths = len(offsets) - 1, np.diff(offsets)
    owner, sequence = np.divmod(np.arange(len(of.table) * count), count)
    start, length = offsets[sequence], lengths[sequence]
    table = of.table[owner]
    skip_rows(table, start)
    table[:, [3, 6]] = np.minimum(table[:, [3, 6]], length[:, None])  # none where there were none
    table[:, 5] = np.where(table[:, 5] < 0, -1, owner * count + sequence)
    q_rows, out_rows = of.q_rows[owner] + start[:, None], of.out_rows[owner] + start[:, None]
    cut = Jobs(table, q_rows, out_rows, of.clocks)
    order = np.argsort(-length, kind="stable")
    return cut.take(order[length[order] > 0])


def segments(of: Jobs) -> tuple[Jobs, Jobs]:
    """Cut bidirectional jobs into jobs that only fold and jobs that only read, by SEGMENT.

    Their slots are the numbers of the jobs that they are cut from.
    """

    def cut(lengths: Array) -> tuple[Jobs, Array, Array]:
        counts = -(-lengths // SEGMENT)
        owner = np.repeat(np.arange(len(lengths)), counts)
        start = SEGMENT * (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))
        part = of.take(owner)
        part.table[:, 5] = owner
        return part, start, np.minimum(SEGMENT, lengths[owner] - start)

    folds, start, length = cut(of.table[:, 3])
    folds.skip_keys(start)
    folds.table[:, 3], folds.table[:, 6] = length, 0
    nothing = np.empty((len(length), 0), np.int64)
    reads, start, length = cut(of.table[:, 6])
    reads.table[:, 3], reads.table[:, 6] = 0, length
    shift = start[:, None]
    return (
        Jobs(folds.table, nothing, nothing, folds.clocks),
        Jobs(reads.table, reads.q_rows + shift, reads.out_rows + shift, reads.clocks),
    )


def few(of: Jobs, threads: int) -> int:
    """Return how many of the first jobs are long causal ones that threads had better share."""
    length = of.table[:, 3]
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
    of = jobs(q, k, v, mask, None, None, grouped, q_length, k_length, 0, 0)
    block = CHUNK * exact_kernels.GROUP
    while len(of.q_rows) * of.q_rows.shape[1] * -(-q_length // block) < FEW and block > 4 * CHUNK:
        block //= 2
    # The last blocks of a causal problem have the most keys: they go first.
    starts = np.arange(0, q_length, block, dtype=np.int64)[::-1]
    heads = of.q_rows.shape[1]
    rows = np.repeat(of.table[:, [0, 1, 2, 3]], heads, axis=0)
    q_rows, out_rows = of.q_rows.ravel(), of.out_rows.ravel()
    table = np.empty((len(q_rows), len(starts), 8), np.int64)
    table[..., 0] = q_rows[:, None] + starts
    table[..., 1], table[..., 2], table[..., 3] = rows[:, :3].T[..., None]
    table[..., 4] = out_rows[:, None] + starts
    table[..., 5] = np.minimum(block, q_length - starts)
    table[..., 6] = k_length
    table[..., 7] = starts
    return table.swapaxes(0, 1).reshape(-1, 8).copy()


class GradientJobs(NamedTuple):
    """The jobs of the gradient of exact attention: every `parts`-th block of keys of one problem.

    A row of the table is (problem, k row, v row, mask row or -1, row of dk and dv, keys, queries,
    first row of the part's dq, first key, keys from one block to the next).  The queries `q_rows`
    read a problem; their results are `out_rows` and, with `rows` a head, `dq_rows`.
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
    of = jobs(q, k, v, mask, None, None, grouped, q_length, k_length, 0, 0)
    block, count = CHUNK * exact_vjp.GROUP, len(of.table)
    parts = min(-(-PARTS // count), -(-k_length // block))
    rows = -(-q_length // 8) * 8
    owner, part = np.divmod(np.arange(count * parts), parts)
    table = np.empty((count * parts, 10), np.int64)
    table[:, 0] = owner
    table[:, 1:4] = of.table[owner, :3]
    table[:, 4], table[:, 5], table[:, 6] = owner * k_length, k_length, q_length
    table[:, 7] = part * of.out_rows.size * rows
    table[:, 8], table[:, 9] = part * block, parts * block
    return GradientJobs(table, of.q_rows, of.out_rows, of.out_rows // q_length * rows, parts, rows)
