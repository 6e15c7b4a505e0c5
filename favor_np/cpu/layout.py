"""How a feature map lies in memory for the kernels, and what these are told about it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import numerics
from favor_np.cpu import memory, pairs, records, tiles, tuning
from favor_np.cpu.code import Kernel, kernel
from favor_np.cpu.memory import Workspace, aligned_copy, integer_of, workspace
from favor_np.cpu.processor import amx_unavailable, bfloat16_pays
from favor_np.cpu.tiles import CHUNK, Sizes, padded
from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]


class Weights(NamedTuple):
    """What kernels take of a map, block by block: see `records.Attend`."""

    query: Array
    key: Array
    bias: Array
    affine: Array


class Parts(NamedTuple):
    """Weights split into parts: see `records.Attend` and `records.Pull`."""

    query_parts: Array
    key_parts: Array
    query_rows_parts: Array
    key_rows_parts: Array


class Natural(NamedTuple):
    """What kernels of the gradient take besides: see `records.Pull`."""

    none: Array
    query_rows: Array
    key_rows: Array
    hessian: Array
    linear: Array


@dataclass(frozen=True, eq=False)
class Layout:
    """A map for one dtype and width of values: what kernels take, and how it is cut.

    Attributes
    ----------
    weights, natural : Weights, Natural
        What kernels, and those of the gradient, take of `map`.
    parts : Parts or None
        Weights in three parts, where products with them are faster.
    variant : frozenset
        The variant of the kernels: with "pairs", "parts" or "error_bars", or with none of them.
    blocks, width, half
        The rows of W are cut into `blocks` of `width`, `half` rows together; feature r of sign s is
        row ``s * half + r`` of a state.  Padded rows are features of W = 0 that no query reads.
    real : (M,) ndarray
        Where the map's features are among all `features`.
    fresh : (features,) ndarray
        Exponents c of a state without a key.
    causal, bidirectional
        Parameters of the kernels.
    """

    dtype: np.dtype[Any]
    sizes: Sizes
    weights: Weights
    natural: Natural
    parts: Parts | None
    variant: frozenset[str]
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

    @functools.cached_property
    def attend(self) -> Kernel:
        """The kernel for attention of one thread a job."""
        return kernel("attend", self.dtype, self.variant)

    @functools.cached_property
    def attend_tokens(self) -> Kernel:
        """The kernel for jobs of one token."""
        return kernel("attend_tokens", self.dtype)

    @functools.cached_property
    def more(self) -> tuple[Any, ...]:
        """The fields of `records.Attend` of which there are variants: its last.

        Those of pipelines and of error bars are for whoever has some.
        """
        parts = (None, None) if self.parts is None else self.parts[:2]
        return (*[None] * 6, *parts, pairs.TILE_CONFIG)


class _Blocks:
    """How the rows of W are cut into blocks of `width`, the first `filled` of which are used."""

    def __init__(self, feature_map: FeatureMap, dtype: np.dtype[Any], group: int | None) -> None:
        self.heads, self.rows, self.dim = feature_map.key_weight.shape
        self.count = -(-self.rows // (group or CHUNK))
        self.width = -(-(group or -(-self.rows // self.count)) // 16) * 16
        self.filled = group or self.width
        self.half = self.count * self.width
        block, row = np.divmod(np.arange(self.rows), self.filled)
        self.places = block * self.width + row  # of the rows of W among those of all blocks
        self.dtype, self.columns = dtype, padded(self.dim, dtype.itemsize)
        self.unit = numerics.LOG2E if feature_map.kind == "positive" else 1.0

    def weight(self, weight: Array) -> tuple[Array, Array]:
        """Return the blocks of W times `unit` and transposed; and as they are, for gradients."""
        padding = np.zeros((self.heads, self.half, self.dim))
        padding[:, self.places] = weight
        padding = padding.reshape(self.heads * self.count, self.width, self.dim)
        turned = memory.aligned((len(padding), self.dim, self.width), self.dtype)
        turned[:] = padding.swapaxes(1, 2) * self.unit
        natural = memory.aligned((len(padding), self.width, self.columns), self.dtype)
        natural[..., : self.dim] = padding
        return turned, natural

    def bias(self, bias: Array) -> Array:
        """Return the bias, block by block."""
        new = memory.aligned((self.heads, self.half), self.dtype)
        new[:, self.places] = bias * self.unit
        return new.reshape(self.heads * self.count, self.width)

    def repeated(self, array: Array) -> Array:
        """Return what is of a head for each of its blocks, its last axis padded."""
        array = np.repeat(array, self.count, axis=0)
        new = memory.aligned((*array.shape[:-1], self.columns), self.dtype)
        new[..., : self.dim] = array
        return new

    def affine(self, of: FeatureMap) -> tuple[Array, Array, Array]:
        """Return what calibrated maps have besides, for each block: see `records.Attend`.

        For gradients also the matrix (d, d) of the quadratic part, if there is one, and the linear
        part.
        """
        none = np.zeros((0, 1, self.columns), self.dtype)
        if of.calibration is None:
            return none, none, np.zeros((0, self.columns), self.dtype)
        vectors = (of.query_center, of.key_center, of.key_linear * self.unit)
        rows = [np.broadcast_to(x, (self.heads, self.dim))[:, None] for x in vectors]
        hessian, factor = none, of.key_factor
        if factor is not None:
            hessian = self.repeated(factor.swapaxes(1, 2) @ factor)
            turned = factor.swapaxes(1, 2) * math.sqrt(0.5 * self.unit)
            rows.append(np.broadcast_to(turned, (self.heads, self.dim, self.dim)))
        return self.repeated(np.concatenate(rows, axis=1)), hessian, self.repeated(of.key_linear)


def worth_bf16x3(dtype: np.dtype[Any], rows: int, dim: int) -> bool:
    """Whether products with a matrix (rows, dim) are faster in bf16x3, on the matrix unit."""
    if tuning.USE_BF16X3 is not None:
        return dtype == np.float32 and tuning.USE_BF16X3
    large = min(rows, dim) >= tuning.MIN_BF16X3_SIDE and rows * dim >= tuning.MIN_BF16X3_SIZE
    return dtype == np.float32 and large and not amx_unavailable()


def worth_bfloat16() -> bool:
    """Whether to compute products of bfloat16, where a caller allows them."""
    return bfloat16_pays() if tuning.USE_BFLOAT16 is None else tuning.USE_BFLOAT16


@tuning.depends_on_tuning
@functools.lru_cache(maxsize=64)
def layout(
    feature_map: FeatureMap,
    dtype: np.dtype[Any],
    value_dim: int,
    group: int | None = None,
    bfloat16: bool = False,
) -> Layout:
    """Return the layout, with the map's weights packed for the kernels.

    With `group` every block has so many rows of W; with `bfloat16` the weights are pairs.
    """
    blocks = _Blocks(feature_map, dtype, group)
    split = not bfloat16 and group is None and worth_bf16x3(dtype, blocks.rows, blocks.dim)
    weights, natural, parts = _weights(feature_map, blocks, bfloat16=bfloat16, split=split)
    par = _parameters(feature_map, blocks)
    signs, half, value_columns = par.signs, blocks.half, padded(value_dim, dtype.itemsize)
    real = np.concatenate([s * half + blocks.places for s in range(signs)])
    fresh = np.full(signs * half, par.padding_exponent, integer_of(dtype))
    fresh[real] = par.nothing
    chosen = {"error_bars": group is not None, "pairs": bfloat16, "parts": split}
    variant = frozenset(name for name, there in chosen.items() if there)
    sizes = Sizes(dtype, blocks.dim, value_columns, signs, blocks.count, blocks.width)
    room, state = tiles.chunk_room(sizes, variant), (signs * half, value_columns)
    keys = (blocks.count * signs, CHUNK, blocks.width)
    return Layout(
        dtype=dtype,
        sizes=sizes,
        weights=weights,
        natural=natural,
        parts=parts,
        variant=variant,
        blocks=blocks.count,
        half=half,
        features=signs * half,
        value_columns=value_columns,
        stateless=workspace(dtype, room),
        stateful=workspace(dtype, room, state, keys),
        real=real,
        fresh=fresh,
        causal=records.constants(par),
        bidirectional=records.constants(par._replace(causal=False, max_rise=2**30)),
        rows=blocks.rows,
        signs=signs,
        width=blocks.width,
    )


def _weights(
    feature_map: FeatureMap, blocks: _Blocks, *, bfloat16: bool, split: bool
) -> tuple[Weights, Natural, Parts | None]:
    """Return what kernels take of a map, and what those of its gradient take besides."""
    key, key_rows = query, query_rows = blocks.weight(feature_map.key_weight)
    if feature_map.calibration is not None:
        query, query_rows = blocks.weight(feature_map.query_weight)
    parts = None
    if split:
        query_left, query_right = key_left, key_right = _factors(key)
        if query is not key:
            query_left, query_right = _factors(query)
        parts = Parts(query_left, key_right, query_right, key_left)
    if bfloat16:  # right factors
        query, key = (
            aligned_copy(pairs.pairs_of(x * np.float32(blocks.unit)).swapaxes(1, 2))
            for x in (query_rows, key_rows)
        )
    affine, hessian, linear = blocks.affine(feature_map)
    weights = Weights(query, key, blocks.bias(feature_map.bias), affine)
    none = np.zeros_like(weights.bias)
    return weights, Natural(none, query_rows, key_rows, hessian, linear), parts


def _factors(weight: Array) -> tuple[Array, Array]:
    """Return blocks of weights (d, width), split into parts, as left and as right factors."""
    left = pairs.parts_of(weight.swapaxes(1, 2))
    return aligned_copy(left), aligned_copy(left.swapaxes(1, 2))


def _parameters(feature_map: FeatureMap, blocks: _Blocks) -> records.Parameters:
    """Return what causal kernels are told about the map."""
    size = blocks.dtype.itemsize
    # Features that only pad: no key may reach their exponents and so move those of others.
    padding_exponent = numerics.UNREACHED if feature_map.kind == "positive" else numerics.NOTHING
    return records.Parameters(
        kind=numerics.KINDS[feature_map.kind],
        signs=2 if feature_map.antithetic else 1,
        filled=blocks.filled,
        key_norm=feature_map.key_norm * numerics.LOG2E,
        affine=feature_map.calibration is not None,
        factored=feature_map.key_factor is not None,
        kernel_epsilon=float(feature_map.kernel_epsilon),
        limit=numerics.projection_limit(feature_map, size),
        far=numerics.FAR[size],
        nothing=numerics.NOTHING[size],
        padding_exponent=padding_exponent[size],
        max_rise=numerics.MAX_RISE[size],
        causal=True,
    )


@functools.lru_cache(maxsize=64)
def vjp_workspace(of: Layout, *, stateful: bool) -> Workspace:
    """Return what a thread of the pullback works on."""
    room = tiles.gradient_room(of.sizes, of.variant)
    return workspace(of.dtype, room, (of.features, of.value_columns) if stateful else None)


@functools.lru_cache(maxsize=64)
def exact_parameters(dtype: np.dtype[Any], scale: float, left: int, right: int) -> Array:
    """Return the constants of exact attention to so many keys before and after a query's own."""
    return records.constants(
        records.ExactParameters(
            kind=numerics.POSITIVE,
            kernel_epsilon=0.0,
            scale=scale * numerics.LOG2E,
            limit=numerics.longest_row(dtype.itemsize, scale),
            far=numerics.EXACT_FAR[dtype.itemsize],
            hidden=numerics.HIDDEN[dtype.itemsize],
            left=left,
            right=right,
        )
    )


@functools.lru_cache(maxsize=64)
def exact_workspace(
    dtype: np.dtype[Any], dim: int, value_dim: int, variant: frozenset[str]
) -> Workspace:
    """Return what a thread of exact attention works on."""
    sizes = Sizes(dtype, dim, padded(value_dim, dtype.itemsize))
    return workspace(dtype, tiles.exact_room(sizes, variant))


@functools.lru_cache(maxsize=64)
def exact_vjp_workspace(dtype: np.dtype[Any], dim: int, value_dim: int) -> Workspace:
    """Return what a thread of its gradient works on."""
    sizes = Sizes(dtype, dim, padded(value_dim, dtype.itemsize))
    return workspace(dtype, tiles.exact_gradient_room(sizes))
