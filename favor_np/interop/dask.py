"""FAVOR+ attention on dask arrays, chunked over batch, heads and sequence.

Blocks of keys are folded into states, states are merged, and blocks of queries read them: nothing
but states passes from one block of the sequence to another.

Every task is a function of states and of blocks at one place, and changes none of them: dask may
run a task twice, and may give one object to many.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

try:
    import dask.array as da
    from dask.base import normalize_token, tokenize
    from dask.highlevelgraph import HighLevelGraph
    from dask.sizeof import sizeof
except ImportError:
    raise ImportError(
        "favor_np.interop.dask needs dask: pip install 'favor_np[dask]'", name="dask"
    ) from None

import favor_np
from favor_np import AttentionState, FeatureMap, validation
from favor_np.call import Call, grouped_shape
from favor_np.engine import processor
from favor_np.features import ATTENTION_KINDS, Calibration, checked

__all__ = ["favor_attention"]

Array: TypeAlias = npt.NDArray[Any]
Chunks: TypeAlias = tuple[tuple[int, ...], ...]
Key: TypeAlias = tuple[Any, ...]
#: Keys and values, their mask, bias and factors.
Tokens: TypeAlias = tuple[Array, Array, Array | None, Array | None, Array | None]

normalize_token.register(FeatureMap, lambda fm: ("favor_np.FeatureMap", fm.fingerprint))
# A scheduler that knows what a state weighs moves states, not blocks.
sizeof.register(AttentionState, lambda state: state.nbytes)


def favor_attention(
    q: da.Array | npt.ArrayLike,
    k: da.Array | npt.ArrayLike,
    v: da.Array | npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: da.Array | npt.ArrayLike | None = None,
    key_bias: da.Array | npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: da.Array | npt.ArrayLike | None = None,
    precision: Literal["full", "bfloat16"] = "full",
    num_threads: int | None = 1,
) -> da.Array:
    """Attend in linear time on dask arrays: `favor_np.favor_attention`, lazy and in blocks.

    Each block of keys and values is folded into an `AttentionState`.  The states are merged in a
    tree (or, if `causal`, in a scan, so that every block has the state of all blocks before it),
    and each block of queries reads one.  Nothing is computed before the result is.

    Parameters
    ----------
    q : dask array or array_like, shape (..., L_q, d)
        Queries.  Leading axes of all arrays broadcast as in NumPy.
    k : dask array or array_like, shape (..., L_k, d)
        Keys.
    v : dask array or array_like, shape (..., L_k, dv)
        Values.
    feature_map : FeatureMap
        Of dimension d; any kind but "trig".  A map with a projection a head is matched with
        axis -3 of keys and values, and cut where that axis is.
    causal : bool, default False
        Query i sees keys up to i only, to the bit.
    key_mask : dask array or array_like of bool, shape (..., L_k), optional
        True where a key takes part.
    key_bias : dask array or array_like of float, shape (..., L_k), optional
        As for `favor_np.favor_attention`.
    enable_gqa : bool, default False
        Grouped queries, as in `favor_np.favor_attention`.  The chunks of q's axis -3 must hold
        whole groups.
    decay : dask array or array_like of float, optional
        As for `favor_np.favor_attention`: a constant, or with an axis for positions a factor a
        token.
    precision : {"full", "bfloat16"}, default "full"
        As for `favor_np.favor_attention`; states are folded in full.
    num_threads : int or None, default 1
        Threads of one task.  The scheduler runs as many tasks at once as it has been given
        cores; None is for workers of one task at a time (see `favor_np.thread_limit`).

    Returns
    -------
    dask array, shape (..., L_q, dv)
        In the dtype of `favor_np.favor_attention`, equal to its result within rounding.  Chunked
        as `q`, without its empty chunks, where `q` has the axis in full, else as `k` or `v`; dv is
        one chunk.

    Raises
    ------
    ImportError
        By ``import favor_np.interop.dask``, if dask is not installed.
    TypeError
        If an array is not real, `key_mask` is not boolean, or a dask array has other blocks than
        numpy.ndarray.
    ValueError
        If shapes do not fit, `causal` is set with L_q != L_k, the map is "trig" or of another
        dimension, the size of a chunk is unknown, a chunk of q's heads divides a group, or
        `precision` is "bfloat16" with float64.

    See Also
    --------
    favor_np.favor_attention : The same on NumPy arrays.

    Notes
    -----
    Errors are raised when the graph is made, but for numbers that are no bias or factor.  Arrays of
    h5py and zarr keep the chunks that they are stored in, those of xarray the ones that dask has
    given them; NumPy arrays become one chunk.  What is not chunked alike is rechunked, which moves
    data: d and dv to one chunk, leading axes as the result, `v`, `key_mask` and what else is of
    keys as `k` along the sequence, and if `causal` all three as `q`.

    Examples
    --------
    >>> import dask.array as da
    >>> import favor_np
    >>> from favor_np.interop.dask import favor_attention
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> q = k = da.ones((2, 300, 4), chunks=(1, 100, 4))
    >>> v = da.ones((2, 300, 3), chunks=(1, 100, 3))
    >>> out = favor_attention(q, k, v, fm, causal=True)
    >>> out.shape, out.chunks
    ((2, 300, 3), ((1, 1), (100, 100, 100), (3,)))
    >>> float(out.mean().compute(scheduler="sync").round(6))
    1.0
    """
    checked(feature_map, ATTENTION_KINDS)
    q, k, v = _wrap("q", q), _wrap("k", k), _wrap("v", v)
    mask = None if key_mask is None else _wrap("key_mask", key_mask)
    call = processor().check(
        _outline(q),
        _outline(k),
        _outline(v),
        feature_map,
        causal=causal,
        enable_gqa=enable_gqa,
        num_threads=num_threads,
    )
    validation.is_bfloat16(precision, call.compute)
    lead, shape = call.out_shape[:-2], call.state_shape
    bias = None if key_bias is None else _wrap("key_bias", key_bias)
    if mask is not None:
        _check_mask(mask, call.keys)
        shape = validation.broadcast(keys=shape, key_mask=mask.shape[:-1])
    if bias is not None:
        _check_bias(bias, call.keys)
        shape = validation.broadcast(keys=shape, key_bias=bias.shape[:-1])
    join = grouped_shape if call.grouped else np.broadcast_shapes
    lead = join(lead, shape)
    gates = None if decay is None else _gates(decay, shape, call)

    out_lead = _lead_chunks(lead, [q.chunks[:-2], k.chunks[:-2], v.chunks[:-2]])
    queries, keys = (_filled(x.chunks[-2]) for x in (q, k))
    chunks = (*out_lead, queries, v.shape[-1:])
    if 0 in (*lead, *call.out_shape[-2:], call.keys):
        return da.zeros((*lead, *call.out_shape[-2:]), chunks=chunks, dtype=call.result)
    if call.causal:
        keys = queries
    key_lead = _whole_groups(out_lead, lead[-1] // shape[-1]) if call.grouped else out_lead
    q = q.rechunk((*_fit(out_lead, q.shape[:-2]), queries, q.shape[-1:]))
    k, v = (x.rechunk((*_fit(key_lead, x.shape[:-2]), keys, x.shape[-1:])) for x in (k, v))
    of_keys = [
        None if x is None else x.rechunk((*_fit(key_lead, x.shape[:-1]), keys))
        for x in (mask, bias, gates)
    ]

    options = call.causal, call.grouped, precision, call.num_threads
    token = tokenize(q, k, v, *of_keys, feature_map, *options)
    name = f"favor_attention-{token}"
    given = tuple(x is not None for x in of_keys)
    bring = partial(_tokens, given=given)
    tokens = _blockwise(f"favor_attention-tokens-{token}", bring, k, v, of_keys=of_keys)
    empty = _empty(f"favor_attention-empty-{token}", feature_map, call, _fit(key_lead, shape))
    fold = partial(_fold, threads=call.num_threads)
    states = _blockwise(f"favor_attention-fold-{token}", fold, empty, tokens)
    before = _merged(f"favor_attention-merge-{token}", states, empty if call.causal else None)
    read = partial(
        _read,
        dtype=call.result,
        grouped=call.grouped,
        precision=precision,
        threads=call.num_threads,
    )
    seen = tokens if call.causal else None
    return _blockwise(name, read, q, before, seen, chunks=chunks, dtype=call.result)


# -- Tasks: they change none of their arguments ---------------------------------------------------


def _tokens(k: Array, v: Array, *of_keys: Array, given: tuple[bool, ...]) -> Tokens:
    """Bring together what fold and read share: the scheduler cannot place it apart."""
    found = iter(of_keys)
    mask, bias, gates = (next(found) if there else None for there in given)
    return k, v, mask, bias, gates


def _of_tokens(tokens: Tokens, state: AttentionState) -> dict[str, Any]:
    """Return what blocks of keys have beside keys and values."""
    *_, mask, bias, gates = tokens
    if gates is not None:  # one axis more than those of states says that it has a factor a token
        axes = len(state.batch_shape) + 1 - gates.ndim
        gates = gates.reshape(*[1] * axes, *gates.shape)
    return {"key_mask": mask, "key_bias": bias, "decay": gates}


def _fold(empty: AttentionState, tokens: Tokens, *, threads: int | None) -> AttentionState:
    k, v = tokens[:2]
    return empty.copy().update(k, v, **_of_tokens(tokens, empty), num_threads=threads)


def _merge(earlier: AttentionState, later: AttentionState) -> AttentionState:
    return earlier.copy().merge(later)


def _read(
    q: Array,
    state: AttentionState,
    tokens: Tokens | None = None,
    *,
    dtype: np.dtype[Any],
    grouped: bool,
    precision: Literal["full", "bfloat16"],
    threads: int | None,
) -> Array:
    """Attend to the state, and causally to the tokens of q's own block if given."""
    k = np.empty((*state.batch_shape, 0, state.feature_map.dim), dtype)
    v = np.empty((*state.batch_shape, 0, state.value_dim), dtype)
    more: dict[str, Any] = {}
    if tokens is not None:
        (k, v), more = tokens[:2], _of_tokens(tokens, state)
    out: Array = favor_np.favor_attention(
        q,
        k,
        v,
        state.feature_map,
        causal=tokens is not None,
        **more,
        enable_gqa=grouped,
        state=state,
        precision=precision,
        num_threads=threads,
    )
    return out


# -- Layers of the graph: blocks have the keys (name, *leading axes, sequence, 0) -----------------


def _blockwise(
    name: str,
    task: Callable[..., Any],
    *arrays: da.Array | None,
    of_keys: Sequence[da.Array | None] = (),
    chunks: Chunks | None = None,
    dtype: npt.DTypeLike = object,
) -> da.Array:
    """Map a task over blocks, matched from the right; where an axis is one block, it serves all.

    dask fuses such a layer with the reading of the arrays, if nothing else needs them: a block is
    then made where it is used.
    """
    pairs: list[Any] = []
    for x, last in (*((x, 0) for x in arrays), *((x, 1) for x in of_keys)):  # no last axis
        if x is not None:
            pairs += [x, tuple(range(last, last + x.ndim))[::-1]]
    out = tuple(range(max(ind[0] for ind in pairs[1::2]) + 1))[::-1]
    return da.blockwise(
        task,
        out,
        *pairs,
        name=name,
        align_arrays=False,
        meta=np.empty((0,) * len(out), dtype),
        adjust_chunks=None if chunks is None else dict(zip(out, chunks, strict=True)),
    )


def _of_heads(fm: FeatureMap, heads: slice) -> FeatureMap:
    """Return the map of some heads of a map that has several."""
    alone = fm.num_heads == 1

    def part(array: Any, axes: int) -> Any:
        if array is None or array.ndim < axes:
            return array
        return array[0] if alone else array[heads]

    calibration = fm.calibration
    if calibration is not None:
        matrix = part(calibration.change, 3)
        a, b, _, quadratic = (part(array, 2) for array in calibration)
        calibration = Calibration(a, b, matrix, quadratic)
    return dataclasses.replace(fm, projection=part(fm.projection, 3), calibration=calibration)


def _empty(name: str, feature_map: FeatureMap, call: Call, lead: Chunks) -> da.Array:
    """Return the empty states, each of the map of its heads."""
    graph = {}
    for cell in np.ndindex(*map(len, lead)):
        fm = feature_map
        if fm.num_heads is not None:
            first = sum(lead[-1][: cell[-1]])
            fm = _of_heads(fm, slice(first, first + lead[-1][cell[-1]]))
        shape = tuple(c[i] for c, i in zip(lead, cell, strict=True))
        zeros = partial(AttentionState.zeros, fm, call.v.shape[-1], shape, dtype=call.compute)
        graph[name, *cell, 0, 0] = (zeros,)
    return _states(name, graph, (*lead, (1,), (1,)), [])


def _merged(name: str, states: da.Array, empty: da.Array | None) -> da.Array:
    """Return the state of all blocks or, given the empty one, of the blocks before each."""
    graph: dict[Any, Any] = {}
    numbers = itertools.count()

    def merge(a: Key, b: Key) -> Key:
        key = (name, "pair", next(numbers))
        graph[key] = (_merge, a, b)
        return key

    *lead, blocks, _ = states.numblocks
    for cell in np.ndindex(*lead):
        keys = [(states.name, *cell, j, 0) for j in range(blocks)]
        if empty is None:
            result = [_total(keys, merge)]
        else:
            result = [(empty.name, *cell, 0, 0), *_prefixes(keys[:-1], merge)]
        graph |= {(name, *cell, j, 0): key for j, key in enumerate(result)}
    sequence = (1,) * (1 if empty is None else blocks)
    inputs = [states] if empty is None else [states, empty]
    return _states(name, graph, (*states.chunks[:-2], sequence, (1,)), inputs)


def _states(name: str, graph: Any, chunks: Chunks, inputs: list[da.Array]) -> da.Array:
    layers = HighLevelGraph.from_collections(name, graph, dependencies=inputs)
    return da.Array(layers, name, chunks, meta=np.empty((0,) * len(chunks), object))


def _pairs(states: list[Key], merge: Callable[[Key, Key], Key]) -> list[Key]:
    return [merge(a, b) for a, b in zip(states[::2], states[1::2], strict=False)]


def _total(states: list[Key], merge: Callable[[Key, Key], Key]) -> Key:
    """Merge all states, in order."""
    while len(states) > 1:
        states = _pairs(states, merge) + states[len(states) // 2 * 2 :]
    return states[0]


def _prefixes(states: list[Key], merge: Callable[[Key, Key], Key]) -> list[Key]:
    """Merge the first 1, 2, 3 ... states: fewer than 2 n merges, at most 2 log2(n) deep."""
    if len(states) < 2:
        return states
    result = states.copy()
    result[1::2] = _prefixes(_pairs(states, merge), merge)
    result[2::2] = map(merge, result[1::2], states[2::2])
    return result


# -- Chunks ---------------------------------------------------------------------------------------


def _filled(chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Drop empty chunks."""
    return tuple(n for n in chunks if n) or (0,)


def _lead_chunks(lead: tuple[int, ...], arrays: list[Chunks]) -> Chunks:
    """Return the chunks of each leading axis: those of the first array that has it in full."""
    return tuple(
        next(
            (_filled(c[axis]) for c in arrays if len(c) >= -axis and sum(c[axis]) == size),
            (size,),
        )
        for axis, size in zip(range(-len(lead), 0), lead, strict=True)
    )


def _whole_groups(chunks: Chunks, group: int) -> Chunks:
    """Return the chunks of the heads of keys, for those of the heads of queries."""
    if any(n % group for n in chunks[-1]):
        raise ValueError(
            f"with enable_gqa=True the chunks of the heads of q must be multiples of {group}, the "
            f"heads of a group, got {chunks[-1]}"
        )
    return (*chunks[:-1], tuple(n // group for n in chunks[-1]))


def _fit(chunks: Chunks, shape: tuple[int, ...]) -> Chunks:
    """Return chunks for leading axes `shape`, of which those of length 1 are broadcast."""
    last = chunks[len(chunks) - len(shape) :]
    return tuple((1,) if n == 1 else c for n, c in zip(shape, last, strict=True))


# -- Checks of what only dask arrays have; `validation` does the rest -------------------------


def _wrap(name: str, value: Any) -> da.Array:
    """Return `value` as a dask array of known chunks; what lies in memory becomes one chunk."""
    if type(value).__module__.startswith("xarray."):
        value = getattr(value, "data", value)
    elif not isinstance(value, da.Array) and hasattr(value, "chunks"):  # h5py's and zarr's
        value = da.from_array(value, getattr(value, "shards", None) or value.chunks or "auto")
    if not isinstance(value, da.Array):
        axes = 1 if name.startswith("key_") else 2
        array = np.asarray(value) if name == "key_mask" else validation.tensor(name, value, axes)
        return da.from_array(array, chunks=-1)
    if any(math.isnan(n) for n in value.shape):
        raise ValueError(
            f"{name} must have chunks of known size, got shape {value.shape}; "
            f"see its method compute_chunk_sizes"
        )
    if type(value._meta) is not np.ndarray:
        raise TypeError(f"{name} must have blocks of numpy.ndarray, got {type(value._meta)}")
    return value


def _outline(x: da.Array) -> Array:
    dtype = np.dtype(np.float64) if x.dtype.kind in "biu" else x.dtype  # as favor_attention
    return validation.outline(x.shape, dtype)


def _check_bias(bias: da.Array, keys: int) -> None:
    if bias.ndim < 1 or bias.shape[-1] != keys:
        raise ValueError(f"key_bias must have shape (..., {keys}), got shape {bias.shape}")


def _gates(decay: Any, batch: tuple[int, ...], call: Call) -> da.Array:
    """Return a decay as a factor a token, which blocks can share out."""
    if not isinstance(decay, da.Array):
        decay = validation.decay_of(decay, causal=call.causal)
    elif not call.causal:
        raise ValueError("decay needs causal=True")
    if decay.ndim <= len(batch):
        decay = decay[..., None]
    wanted = (1,) * (len(batch) + 1 - decay.ndim) + decay.shape
    if any(n not in (1, m) for n, m in zip(wanted, (*batch, call.keys), strict=False)):
        raise ValueError(
            f"decay must broadcast to the leading axes {batch} of k and v, or have one axis more, "
            f"of a factor a token, got shape {decay.shape}"
        )
    return da.broadcast_to(decay, (*decay.shape[:-1], call.keys))


def _check_mask(mask: da.Array, keys: int) -> None:
    if mask.dtype != np.bool_:
        raise TypeError(
            f"key_mask must be boolean, True where a key takes part, got dtype {mask.dtype}"
        )
    if mask.ndim < 1 or mask.shape[-1] != keys:
        raise ValueError(f"key_mask must have shape (..., {keys}), got shape {mask.shape}")
