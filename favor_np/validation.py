"""Checks of user input: the only place that raises on a bad argument.

Every error is a builtin type whose message names the argument, what was expected and
what was got, and is raised before anything is compiled.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import columns

#: Decorates functions that compute with NumPy: whatever the caller's error state is (`np.seterr`),
#: they see the one that NumPy begins with.
own_error_state = np.errstate(divide="warn", over="warn", under="ignore", invalid="warn")

# ----------------------------------------------------------------------------------------
# Scalars and options
# ----------------------------------------------------------------------------------------


def got(value: object) -> str:
    """Describe `value` for an error message, in a few words."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def integer(name: str, value: object, *, minimum: int = 1) -> int:
    """Return `value` as an int of at least `minimum`; bool and float are refused."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {got(value)}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {got(value)}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def positive_float(name: str, value: object) -> float:
    """Return `value` as a float that is finite and greater than zero."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {got(value)}")
    number = float(value)
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"{name} must be finite and greater than 0, got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """Return `value` as a bool; only True and False (Python's or NumPy's) are accepted."""
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False, got {got(value)}")
    return bool(value)


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """Return the one of the strings `options` that `value` is: a plain str, not `numpy.str_`."""
    if isinstance(value, str) and value in options:
        return options[options.index(value)]
    listed = ", ".join(map(repr, options))
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {listed}, got {got(value)}")
    raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def float_dtype(name: str, value: npt.DTypeLike | None) -> np.dtype[Any]:
    """Return `value` as the native dtype float32 or float64."""
    try:
        dtype = np.dtype(value).newbyteorder("=")
    except TypeError:
        raise TypeError(f"{name} must be float32 or float64, got {got(value)}") from None
    if value is None or dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"{name} must be float32 or float64, got {got(value)}")
    return np.dtype(dtype.type)  # the one object that arrays have: compared in no time


# ----------------------------------------------------------------------------------------
# Small arrays: projections, and the inputs of the readable feature maps
# ----------------------------------------------------------------------------------------


def real_array(name: str, value: object) -> npt.NDArray[np.floating[Any]]:
    """Return `value` as a native float32 or float64 array; other real types become those."""
    array = tensor(name, value, axes=0)
    dtype = np.dtype(np.float32) if array.dtype.itemsize <= 2 else array.dtype.newbyteorder("=")
    real: npt.NDArray[np.floating[Any]] = array.astype(dtype, copy=False)
    return real


def projection_matrix(name: str, value: object) -> npt.NDArray[np.floating[Any]]:
    """Return a private, read-only, finite copy of a projection (m, d) or (heads, m, d)."""
    array = np.array(real_array(name, value), order="C", copy=True)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"{name} must have shape (m, d) or (heads, m, d) with no axis empty, "
            f"got shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    array.setflags(write=False)
    return array


def calibration(arrays: Sequence[object], dim: int, heads: int | None) -> dict[str, Any]:
    """Return private, read-only, finite float64 copies of the arrays of a `Calibration`."""
    checked: dict[str, Any] = {}
    axes, counts = set(), set() if heads is None else {heads}
    shapes = {
        "query_center": (dim,),
        "key_center": (dim,),
        "change": (dim, dim),
        "quadratic": (dim,),
    }
    for (name, shape), value in zip(shapes.items(), arrays, strict=True):
        if value is None and name == "change":
            checked[name] = None
            continue
        array = np.array(real_array(name, value), dtype=np.float64, order="C", copy=True)
        own = array.ndim - len(shape)
        if own not in (0, 1) or array.shape[own:] != shape or 0 in array.shape:
            raise ValueError(
                f"{name} must have shape {shape}, with or without an axis of heads in front, "
                f"got shape {array.shape}"
            )
        axes.add(own)
        counts.update(array.shape[:own])
        finite(**{name: array})
        if name == "quadratic" and not (array < 0.125).all():
            raise ValueError(f"quadratic must be less than 1/8, got {array.max()}")
        array.setflags(write=False)
        checked[name] = array
    if len(axes) > 1 or len(counts) > 1:
        raise ValueError(
            "the arrays of a calibration must be shared by all heads, or all have an entry for "
            f"each head of the map; got the numbers of heads {sorted(counts)}"
        )
    return checked


def calibration_data(
    q: object, k: object, dim: int, heads: int | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], bool]:
    """Return queries and keys as (heads or 1, tokens, d), and whether each head has its own."""
    queries, keys = feature_input("q", q, dim), feature_input("k", k, dim)
    finite(q=queries, k=keys)
    if not queries.size or not keys.size:
        raise ValueError(
            f"q and k must hold at least one token, got shapes {queries.shape} and {keys.shape}"
        )
    own = max(queries.ndim, keys.ndim) > 2
    queries, keys = (
        np.moveaxis(x, -3, 0).reshape(x.shape[-3], -1, dim) if x.ndim > 2 else x[None]
        for x in (queries, keys)
    )
    grouped = len(keys) > 1 or heads == 1
    if grouped and len(queries) % len(keys) == 0:  # several heads read one of the keys
        queries = queries.reshape(len(keys), -1, dim)
    if not own and heads is not None:  # one set of data for all the projections
        own, queries = True, np.broadcast_to(queries, (heads, *queries.shape[1:]))
    count = max(len(queries), len(keys))
    if {len(queries), len(keys)} - {1, count} or (own and heads not in (None, count)):
        of_map = "" if heads is None else f"; feature_map has {heads}"
        raise ValueError(
            "q and k must have the same number of heads, "
            f"got {len(queries)} and {len(keys)}{of_map}"
        )
    shape = (count, -1, dim)
    queries, keys = (np.broadcast_to(x, (count, *x.shape[1:])) for x in (queries, keys))
    return queries.reshape(shape), keys.reshape(shape), own


def feature_input(name: str, value: object, dim: int) -> npt.NDArray[np.float64]:
    """Return `value` (..., L, dim) as float64."""
    array = real_array(name, value)
    if array.ndim < 2 or array.shape[-1] != dim:
        raise ValueError(f"{name} must have shape (..., L, {dim}), got shape {array.shape}")
    return array.astype(np.float64, copy=False)


# ----------------------------------------------------------------------------------------
# The arrays of attention
# ----------------------------------------------------------------------------------------

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
_FLOATS = tuple(np.dtype(order + size) for order in "=<>" for size in ("f4", "f8"))


def given(**values: object) -> None:
    """Refuse None, which inside a state stands for no rows at all."""
    for name, value in values.items():
        if value is None:
            raise TypeError(f"{name} must be an array, got None")


def array_of(name: str, value: object) -> Array:
    """Return `value` as an array; refuse what would lose a mask, or is not rectangular."""
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            instead = "fill it" if name == "key_mask" else "use key_mask instead"
            raise TypeError(f"{name} is a masked array with a mask set; {instead}")
        value = value.data
    if isinstance(value, np.matrix):
        raise TypeError(f"{name} must be an array, got numpy.matrix; use numpy.asarray")
    if hasattr(value, "toarray"):
        raise TypeError(f"{name} is sparse; use its method toarray")
    try:
        if type(value).__module__.partition(".")[0] in columns.LIBRARIES:
            value = columns.values(name, value)
        elif not hasattr(value, "__array__") and hasattr(value, "__dlpack__"):
            value = np.from_dlpack(value)
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(f"{name} does not lie in this machine's memory: {error}") from None
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not a rectangular array: {error}") from None
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"{name} cannot be read as an array: {error}") from None


def tensor(name: str, value: object, axes: int = 2) -> Array:
    """Return `value` as an array of real numbers with at least `axes` axes, in its own dtype."""
    array: Array = value if type(value) is np.ndarray else array_of(name, value)
    if array.dtype not in _FLOATS:
        if array.dtype.kind in "biu":
            array = array.astype(np.float64)
        elif not _is_small_float(array.dtype):
            raise TypeError(f"{name} must hold real numbers up to float64, got dtype {array.dtype}")
    if array.ndim < axes:
        raise ValueError(f"{name} must have at least {axes} axes, got shape {array.shape}")
    return array


def _is_small_float(dtype: np.dtype[Any]) -> bool:
    """Whether dtype is float16, or bfloat16 of ml_dtypes: not its numbers of 8 bits and fewer."""
    if dtype.kind not in "fV" or dtype.itemsize != 2 or dtype.names is not None:
        return False
    return bool(np.can_cast(dtype, np.float32))


def dtypes(q: Array, k: Array, v: Array) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Return the dtype of the result, and the one it is computed in."""
    result = q.dtype
    if result is _FLOATS[0] and k.dtype is result and v.dtype is result:
        return result, result  # the most frequent case, in half the time
    if not result == k.dtype == v.dtype:
        result = np.result_type(q, k, v)
    if not result.isnative:
        result = result.newbyteorder("=")
    return result, result if result in _FLOATS else _FLOATS[0]


def contiguous(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array as kernels read it: in this dtype, in C order, aligned."""
    same = array.dtype is dtype or array.dtype == dtype
    if same and array.flags.num & _CONTIGUOUS == _CONTIGUOUS:
        return array
    return np.require(array, dtype, ("C", "A"))


#: Bits of an array's flags: C order, aligned.
_CONTIGUOUS = 0x0101


def last_axis(name: str, shape: Shape, length: int, of: str) -> None:
    """Refuse an array whose last axis is not `length`."""
    if shape[-1] != length:
        raise ValueError(
            f"{name} must have shape (..., L, {length}) to fit {of}, got shape {shape}"
        )


def mask_of(value: object, keys: int) -> Array:
    """Return a key mask (..., keys) of bool."""
    mask = array_of("key_mask", value)
    if mask.dtype != np.bool_:
        raise TypeError(f"key_mask must be boolean, True where a key takes part, got {got(mask)}")
    if mask.ndim < 1 or mask.shape[-1] != keys:
        raise ValueError(f"key_mask must have shape (..., {keys}), got shape {mask.shape}")
    return np.ascontiguousarray(mask)


#: Largest bias of a key, in log2: see ``numerics.UNREACHED``.
LARGEST_BIAS = 2**25


def key_bias_of(value: object, keys: int) -> tuple[Array, Array | None]:
    """Return a ``key_bias`` (..., keys), and a mask of the keys whose bias is not -inf, if any is.

    Where it is, the bias becomes 0.
    """
    if getattr(value, "dtype", None) == np.bool_:
        raise TypeError(f"key_bias must hold log-weights, got {got(value)}: see key_mask")
    bias = tensor("key_bias", value, 1)
    if bias.shape[-1] != keys:
        raise ValueError(f"key_bias must have shape (..., {keys}), got shape {bias.shape}")
    if not (bias < np.inf).all():
        raise ValueError("key_bias must be finite, or -inf to mask a key, got NaN or +inf")
    mask, limit = None, LARGEST_BIAS * math.log(2)
    if np.isneginf(bias).any():
        mask = ~np.isneginf(bias)
        bias = np.where(mask, bias, bias.dtype.type(0))
    largest = float(bias.max(initial=0))
    if largest > limit:
        raise ValueError(f"key_bias must be at most {limit:.2g}, got {largest:.3g}")
    return bias, mask


#: More keys than there can be.
UNLIMITED = 2**40


def band(window: object, *, causal: bool) -> tuple[int, int]:
    """Return how many keys a query sees before its own position, and how many after it."""
    if window is None:
        return UNLIMITED, 0 if causal else UNLIMITED
    if causal:
        return min(integer("window", window) - 1, UNLIMITED), 0
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(
            f"window needs causal=True, or must be a pair (left, right), got {got(window)}"
        )
    left, right = (
        UNLIMITED if n is None else min(integer("window", n, minimum=0), UNLIMITED) for n in window
    )
    return left, right


def sequence_offsets(value: object, length: int, queries: int | None = None) -> Array:
    """Return ``cu_seqlens`` as int64: where packed sequences begin, and where the last one ends."""
    if queries is not None and queries != length:
        raise ValueError(
            f"cu_seqlens needs as many queries as keys, got {queries} rows of q and {length} of k"
        )
    offsets = array_of("cu_seqlens", value)
    if offsets.dtype.kind not in "iu":
        raise TypeError(f"cu_seqlens must hold integers, got {got(offsets)}")
    if offsets.ndim != 1 or offsets.size < 2:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got shape {offsets.shape}")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != length or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {length} rows of q, k and v, "
            f"got {got(offsets.tolist())}"
        )
    return offsets


def token(
    q: object, k: object, v: object, batch: tuple[int, ...], dim: int, sequences: int | None = None
) -> tuple[tuple[Any, Any, Any], bool]:
    """Return one token (..., d) or (..., 1, d) as rows, and whether their axis was added.

    With packed sequences one of each: (..., sequences, d).
    """
    q = tensor("q", q, 1)
    if sequences is not None:
        if q.ndim < 2 or q.shape[-2] != sequences:
            raise ValueError(
                f"q must be one token of each of the {sequences} sequences, got shape {q.shape}"
            )
        return (q, k, v), False
    if q.ndim == len(batch) + 1:
        if type(k) is not np.ndarray or k.ndim == 0:  # what is an array is checked as rows
            k = tensor("k", k, 1)
        if type(v) is not np.ndarray or v.ndim == 0:
            v = tensor("v", v, 1)
        return (q[..., None, :], k[..., None, :], v[..., None, :]), True
    if q.ndim != len(batch) + 2 or q.shape[-2] != 1:
        raise ValueError(f"q must be one token, of shape {(*batch, dim)}, got shape {q.shape}")
    return (q, k, v), False


def number_a_token(
    name: str, value: object, batch: tuple[int, ...], sequences: int | None = None
) -> Array:
    """Return a number for each token of a step: (*batch, 1) or (*batch, sequences)."""
    array = tensor(name, value, 0)
    if sequences is None and array.ndim <= len(batch):
        array = array[..., None]
    try:
        return np.broadcast_to(array, (*batch, sequences or 1))
    except ValueError:
        wanted = batch if sequences is None else (*batch, sequences)
        raise ValueError(f"{name} must broadcast to {wanted}, got shape {array.shape}") from None


def state_arguments(
    value_dim: object, batch_shape: object, dtype: npt.DTypeLike, heads: int | None
) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Check what a state is made of; `heads` are those of its feature map."""
    length = integer("value_dim", value_dim)
    axes = batch_shape if isinstance(batch_shape, (tuple, list)) else (batch_shape,)
    shape = tuple(integer("batch_shape", n, minimum=0) for n in axes)
    if heads is not None and (not shape or shape[-1] != heads):
        raise ValueError(f"batch_shape must end with the {heads} heads of the map, got {shape}")
    return length, shape, float_dtype("dtype", dtype)


def decay_of(value: object, *, causal: bool = True) -> Array:
    """Return a ``decay`` as an array of numbers in (0, 1]."""
    if not causal:
        raise ValueError("decay needs causal=True")
    decay = array_of("decay", value)
    if decay.dtype.kind in "iu":
        decay = decay.astype(np.float64)
    if decay.dtype not in _FLOATS and not _is_small_float(decay.dtype):
        raise TypeError(f"decay must be a real number or an array of them, got {got(value)}")
    if not ((decay > 0) & (decay <= 1)).all():
        raise ValueError(f"decay must be greater than 0 and at most 1, got {got(value)}")
    return decay


def gates_of(decay: Array, batch: tuple[int, ...], keys: int) -> Array:
    """Return -log2 of a ``decay`` of one factor a token: (*batch, keys)."""
    gates_shape(decay.shape, batch, keys)
    gates = np.broadcast_to(decay, (*batch, keys))
    return -np.log2(gates.astype(np.float64))


def gates_shape(shape: Shape, batch: Shape, keys: int) -> None:
    """Refuse a ``decay`` of one factor a token that has another shape."""
    if any(n not in (1, m) for n, m in zip(shape, (*batch, keys), strict=True)):
        raise ValueError(
            f"decay of {len(batch) + 1} axes must have a factor a token, of shape "
            f"{(*batch, keys)}, got shape {shape}"
        )


def decay_rates(value: object, batch: tuple[int, ...], *, causal: bool = True) -> Array | None:
    """Return -log2 of ``decay`` for every batch and head, flat; None if nothing decays."""
    if value is None:
        return None
    decay = decay_of(value, causal=causal).astype(np.float64)
    try:
        decay = np.broadcast_to(decay, batch)
    except ValueError:
        raise ValueError(
            f"decay must broadcast to the leading axes {batch} of k and v, or have one axis more, "
            f"of a factor a token, got shape {decay.shape}"
        ) from None
    return None if (decay == 1).all() else -np.log2(decay).ravel()


#: What weights may decay by in one call, as a power of two: see ``numerics.NOTHING``.
LONGEST_DECAY = 2**28


def decay_span(total: float, keys: int) -> None:
    """Refuse a call over which weights decay by more, in log2, than an exponent can say."""
    if total > LONGEST_DECAY:
        raise ValueError(
            f"decay must be larger for {keys} positions in one call, got one of 2**-{total:.3g} in "
            "all: take fewer at a time, each call going on from the state before"
        )


@functools.lru_cache(maxsize=256)
def outline(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """Return ones of this shape and dtype that take no memory: checked in place of an array."""
    return np.broadcast_to(np.ones((), dtype), shape)


def broadcast(**shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the common shape of the leading axes."""
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the leading axes do not broadcast: {listed}") from None


def finite(**arrays: Array) -> None:
    """Refuse arrays that hold NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def finite_as(dtype: np.dtype[Any] | None, **arrays: Array) -> None:
    """Refuse arrays that are not finite or, as this dtype, would not be."""
    if dtype is not None:
        with np.errstate(over="ignore"):
            arrays = {name: array.astype(dtype, copy=False) for name, array in arrays.items()}
    finite(**arrays)


def output(value: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Check an array that the result is to be written to."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"out must be a numpy.ndarray, got {got(value)}")
    if value.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {value.shape}")
    if not value.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    return value


def cotangent(value: object, shape: tuple[int, ...]) -> Array:
    """Return ``grad_out`` as an array; its shape must be that of the result."""
    array = tensor("grad_out", value)
    if array.shape != shape:
        raise ValueError(f"grad_out must have shape {shape}, got {array.shape}")
    return array


def is_bfloat16(precision: object, compute: np.dtype[Any]) -> bool:
    """Whether ``precision`` is "bfloat16"; what is computed in `compute` must not need more."""
    if choice("precision", precision, ("full", "bfloat16")) == "full":
        return False
    if compute.itemsize > 4:
        raise ValueError(
            "precision='bfloat16' needs arrays of at most 32 bits (integers count as float64), "
            f"got {compute}"
        )
    return True


# ----------------------------------------------------------------------------------------
# Attention weights
# ----------------------------------------------------------------------------------------


def row_positions(name: str, value: object, rows: int) -> npt.NDArray[np.int64]:
    """Return the positions of `rows` queries in a sequence, integers from 0."""
    array = array_of(name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, got {got(array)}")
    if array.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one a row of q, got {array.shape}")
    if (array < 0).any():
        raise ValueError(f"{name} must be at least 0, got {array.min()}")
    return array.astype(np.int64)
