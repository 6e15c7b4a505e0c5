"""The tiles that a thread works on, by name, and how large they are.

Shapes are those of a chunk of CHUNK positions.  Rows of a tile are whole vectors; every tile begins
on a cache line.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np

from favor_np.cpu import record
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.record import (
    Array,
    Doubles1,
    Doubles2,
    Field,
    Floats1,
    Floats2,
    Floats3,
    Room,
    Whole1,
    Whole2,
)

#: Positions that kernels take at a time.
CHUNK = 64
#: Tiles of queries that share one packed tile of keys in exact attention; and of keys that share
#: one of queries in its gradient.
QUERY_TILES, KEY_TILES = 16, 8
#: Rows that a kernel of a layer takes at a time.
LAYER_ROWS = 64
#: Tokens that a state keeps before it folds them together.
TAIL = 16
#: Integers behind the exponents of a state, of which the first is used: rows begin on cache lines.
PAD = 16
#: Queries that are read at a time in bfloat16: what is between the products stays in the nearest
#: cache.
STRIP = 16
#: Pairs of bfloat16 that the matrix unit sums over at a time; tiles of pairs are padded to it with
#: zeros.
STEP = 16
#: The parts of a float32 that is split.
PARTS = 3


def pairs_for(numbers: int) -> int:
    """Return how many pairs a row of so many numbers takes, in whole steps."""
    return -(-numbers // (2 * STEP)) * STEP


def padded(count: int, itemsize: int) -> int:
    """Return `count` rounded up to whole vectors."""
    lanes = VECTOR_BYTES // itemsize
    return -(-count // lanes) * lanes


class PairTiles(NamedTuple):
    """Tiles of pairs of bfloat16, and what is beside them.

    Packed rows as left factor; key features as right factor for scores (after `turned`), and as
    `folded` for the state; values, of which `finite` are those that are if not all, and state as
    right factors, with c and z of the features that queries read.  Of a strip: projections,
    features, and their sums by lanes; and the bits that it keeps of the scores with its own keys
    and those after.
    """

    rows: Floats2
    turned: Floats2
    keys: Floats2
    values: Floats2
    finite: Floats2
    state: Floats2
    folded: Floats2
    folded_t: Floats2
    raw: Floats2
    phi: Floats2
    sums: Floats2
    part: Floats2
    z: Floats2
    seen: Floats2
    c: Whole2


class PartTiles(NamedTuple):
    """Packed rows split into parts, as left and as right factor."""

    left: Floats2
    right: Floats2


class GroupTiles(NamedTuple):
    """The sums of each group of features under its own top.

    Besides, the squares of the shares of its features, and the tiles in which these are computed.
    """

    den: Floats2
    top: Floats2
    shares: Floats2
    num: Floats2
    squares: Floats2
    turned: Floats2


class ChunkTiles(NamedTuple):
    """Tiles of attention."""

    rows: Floats2
    columns: Floats2
    raw: Floats2
    phi: Floats2
    values: Floats2
    num: Floats2
    spare: Floats2
    scores: Floats2
    keys: Floats3
    log_norm: Floats1
    bias_exponent: Whole1
    share: Floats1
    den: Floats2
    part: Floats2
    sums: Floats2
    scale: Floats2
    token: Floats2
    square: Doubles1
    stretched: Floats2
    top: Whole2
    higher: Whole2
    excess: Whole2
    pairs: Annotated[Array | None, Field(variants=("pairs",), block=PairTiles)] = None
    parts: Annotated[Array | None, Field(variants=("parts",), block=PartTiles)] = None
    groups: Annotated[Array | None, Field(variants=("error_bars",), block=GroupTiles)] = None


class GradientTiles(NamedTuple):
    """Tiles of the gradient of attention."""

    rows: Floats2
    columns: Floats2
    raws: Floats2
    phi: Floats2
    slope: Floats2
    back: Floats2
    error: Floats2
    values: Floats2
    other: Floats2
    turned: Floats2
    num: Floats2
    spare: Floats2
    scores: Floats2
    products: Floats2
    keys: Floats3
    grad: Floats2
    log_norm: Floats1
    bias_exponent: Whole1
    share: Floats1
    extra: Floats2
    factor: Floats2
    total: Floats2
    sums: Floats2
    scale: Floats2
    square: Doubles1
    stretched: Floats2
    top: Whole2
    excess: Whole2
    pairs: Annotated[Array | None, Field(variants=("pairs",), block=PairTiles)] = None
    parts: Annotated[Array | None, Field(variants=("parts",), block=PartTiles)] = None


class ExactPairTiles(NamedTuple):
    """The same in bfloat16, query by query.

    Packed queries and features are left factors, keys (first as `rows`) and values right ones.  The
    sums of features by lanes are those of all tiles of queries and, in `part`, of a strip.
    """

    queries: Floats2
    rows: Floats2
    keys: Floats2
    values: Floats2
    phi: Floats2
    sums: Floats2
    part: Floats2


class ExactPartTiles(NamedTuple):
    """Packed queries as right factors and keys as left one, split into parts."""

    queries: Floats3
    keys: Floats2


class ExactTiles(NamedTuple):
    """Tiles of exact attention."""

    rows: Floats2
    keys: Floats2
    values: Floats2
    raw: Floats2
    phi: Floats2
    across: Floats3
    num: Floats3
    spare: Floats2
    den: Floats2
    part: Floats2
    ones: Floats2
    longest: Doubles1
    square: Doubles2
    key_square: Doubles1
    c: Whole2
    top: Whole2
    higher: Whole2
    pairs: Annotated[Array | None, Field(variants=("pairs",), block=ExactPairTiles)] = None
    parts: Annotated[Array | None, Field(variants=("parts",), block=ExactPartTiles)] = None


class ExactGradientTiles(NamedTuple):
    """Tiles of the gradient of exact attention."""

    q: Floats2
    g: Floats2
    q_columns: Floats2
    g_columns: Floats2
    k: Floats3
    k_columns: Floats3
    v: Floats2
    v_columns: Floats3
    p: Floats2
    ds: Floats2
    dk: Floats3
    dv: Floats3
    square: Doubles1
    share: Floats2
    sums: Floats2
    dbias: Doubles2
    c: Whole2


class Sizes(NamedTuple):
    """What tiles depend on: widths of keys and values, and how the features are cut into blocks."""

    dtype: np.dtype[Any]
    dim: int
    value_columns: int
    signs: int = 1
    blocks: int = 1
    width: int = CHUNK


def chunk_room(of: Sizes, variants: frozenset[str]) -> Room:
    """Return the room of a thread of attention."""
    lanes, columns, blocks, width = _lanes(of), of.value_columns, of.blocks, of.width
    shapes = {
        **_chunk(of, variants),
        "raw": (width, CHUNK),
        **dict.fromkeys(("den", "part", "higher"), (1, CHUNK)),
        "token": (1, blocks * of.signs * width),
    }
    if "pairs" in variants:
        shapes["pairs"] = _pairs(of)
    if "error_bars" in variants:
        shapes["groups"] = {
            **dict.fromkeys(("den", "top", "shares"), (blocks, CHUNK)),
            "num": (blocks * CHUNK, columns),
            "squares": (CHUNK, lanes),
            "turned": (CHUNK, width),
        }
    return record.room(ChunkTiles, shapes, of.dtype)


def gradient_room(of: Sizes, variants: frozenset[str]) -> Room:
    """Return the room of a thread of the pullback."""
    columns, blocks, width = of.value_columns, of.blocks, of.width
    shapes = {
        **_chunk(of, variants),
        "raws": (blocks * width, CHUNK),
        **dict.fromkeys(("slope", "back", "error"), (width, CHUNK)),
        "other": (CHUNK, columns),
        "turned": (columns, CHUNK),
        "products": (CHUNK, CHUNK),
        "grad": (CHUNK, padded(of.dim, of.dtype.itemsize)),
        **dict.fromkeys(("extra", "factor", "total"), (1, CHUNK)),
    }
    return record.room(GradientTiles, shapes, of.dtype)


def _lanes(of: Sizes) -> int:
    return padded(1, of.dtype.itemsize)


def _chunk(of: Sizes, variants: frozenset[str]) -> dict[str, Any]:
    """Return the shapes of the tiles that attention and its gradient have in common."""
    dim, columns, width = padded(of.dim, of.dtype.itemsize), of.value_columns, of.width
    tiles = of.blocks * of.signs
    shapes: dict[str, Any] = {
        **dict.fromkeys(("rows", "stretched"), (CHUNK, dim)),
        "columns": (dim, CHUNK),
        "phi": (width, CHUNK),
        **dict.fromkeys(("values", "num", "spare"), (CHUNK, columns)),
        "scores": (CHUNK, CHUNK),
        "keys": (tiles, CHUNK, width),
        **dict.fromkeys(("log_norm", "bias_exponent", "share", "square"), (CHUNK,)),
        **dict.fromkeys(("sums", "scale"), (1, tiles * width)),
        "top": (1, CHUNK),
        "excess": (CHUNK, _lanes(of)),
    }
    if "parts" in variants:
        depth = PARTS * pairs_for(of.dim)
        shapes["parts"] = {"left": (CHUNK, depth), "right": (depth, CHUNK)}
    return shapes


def _pairs(of: Sizes) -> Any:
    tiles, lanes, width = of.blocks * of.signs, _lanes(of), of.width
    depth, features, columns = pairs_for(of.dim), pairs_for(width), of.value_columns
    return {
        "rows": (CHUNK, depth),
        "turned": (CHUNK, features),
        "keys": (tiles * features, CHUNK),
        "values": (CHUNK // 2, columns),
        "finite": (CHUNK // 2, columns),
        "state": (tiles * features, columns),
        "folded": (CHUNK // 2, width),
        "folded_t": (width, CHUNK // 2),
        "raw": (STRIP, CHUNK),
        "phi": (STRIP, CHUNK // 2),
        "sums": (CHUNK, lanes),
        "part": (STRIP, lanes),
        "z": (tiles, CHUNK),
        "seen": (STRIP, 2 * STRIP),
        "c": (tiles, CHUNK),
    }


def exact_room(of: Sizes, variants: frozenset[str]) -> Room:
    """Return the room of a thread of exact attention."""
    dim, columns, tiles = padded(of.dim, of.dtype.itemsize), of.value_columns, QUERY_TILES
    line, chunk, lanes = (1, CHUNK), (CHUNK, CHUNK), _lanes(of)
    shapes: dict[str, Any] = {
        "rows": (CHUNK, dim),
        "keys": (dim, CHUNK),
        "values": (CHUNK, columns),
        **dict.fromkeys(("raw", "phi"), chunk),
        "across": (tiles, dim, CHUNK),
        "num": (tiles, CHUNK, columns),
        "spare": (CHUNK, columns),
        "den": (tiles, CHUNK),
        **dict.fromkeys(("part", "ones"), line),
        "longest": (CHUNK,),
        "square": (tiles, CHUNK),
        "key_square": (CHUNK,),
        "c": line,
        "top": (tiles, CHUNK),
        "higher": line,
    }
    if "pairs" in variants:
        depth = pairs_for(of.dim)
        shapes["pairs"] = {
            "queries": (tiles * CHUNK, depth),
            "rows": (CHUNK, depth),
            "keys": (depth, CHUNK),
            "values": (CHUNK // 2, columns),
            "phi": (STRIP, CHUNK // 2),
            "sums": (tiles * CHUNK, lanes),
            "part": (STRIP, lanes),
        }
    if "parts" in variants:
        depth = PARTS * pairs_for(of.dim)
        shapes["parts"] = {"queries": (tiles, depth, CHUNK), "keys": (CHUNK, depth)}
    return record.room(ExactTiles, shapes, of.dtype)


def exact_gradient_room(of: Sizes) -> Room:
    """Return the room of a thread of the gradient of exact attention."""
    dim, columns, tiles = padded(of.dim, of.dtype.itemsize), of.value_columns, KEY_TILES
    shapes = {
        "q": (CHUNK, dim),
        "g": (CHUNK, columns),
        "q_columns": (dim, CHUNK),
        "g_columns": (columns, CHUNK),
        "k": (tiles, CHUNK, dim),
        "k_columns": (tiles, dim, CHUNK),
        "v": (CHUNK, columns),
        "v_columns": (tiles, columns, CHUNK),
        **dict.fromkeys(("p", "ds"), (CHUNK, CHUNK)),
        "dk": (tiles, CHUNK, dim),
        "dv": (tiles, CHUNK, columns),
        "square": (CHUNK,),
        "sums": (1, CHUNK),
        **dict.fromkeys(("share", "dbias", "c"), (tiles, CHUNK)),
    }
    return record.room(ExactGradientTiles, shapes, of.dtype)
