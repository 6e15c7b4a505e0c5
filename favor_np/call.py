"""One call of attention: what a user asked for, checked once, as one object for an engine."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from favor_np import decay, validation
from favor_np.features import FeatureMap
from favor_np.jobs import Shapes

if TYPE_CHECKING:
    from favor_np.engine import Engine

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
#: Queries, keys, values and mask, as the caller gave them.
Arrays: TypeAlias = tuple[Any, Any, Any, Any]


class ErrorBars(NamedTuple):
    """Where the standard errors of a result go, and what they are made of: see `diagnose`."""

    errors: Array  # (rows, dv)
    sizes: Array  # (rows,): effective sample sizes
    variances: Array  # (batch of v, dv): of the values
    dof: float  # degrees of freedom of the errors of one column
    prior_dof: float  # those for which counts what all columns have in common
    t_factor: float  # by which Student's t for so few is wider than the normal distribution
    group: int  # rows of the projection that are independent of all others


@dataclass(slots=True, eq=False)
class Call:
    """The checked arguments of one call.

    Attributes
    ----------
    engine : Engine
        What computes it.
    q, k, v : ndarray, shapes (..., L_q, d), (..., L_k, d), (..., L_k, dv)
        In their own dtypes; on a device its arrays.
    mask : ndarray of bool, shape (..., L_k), or None
        True where a key takes part.
    log2_bias : ndarray of float64, shape (..., L_k), or None
        log2 of what the weight of a key is multiplied with, decay included.
    key_bias, gates : ndarray or None
        The bias, and the decay of one factor a token, as the caller gave them.
    faded : ndarray of float64 or None
        By how much, in log2, such factors make what came before fade: for each slot of a state.
    decay_rates : ndarray of float64 or None
        -log2 of a constant decay for each batch and head, flat.
    feature_map : FeatureMap or None
        None for exact attention.
    causal, grouped : bool
        Whether query i sees keys up to i only, and whether heads of q share those of k and v.
    num_threads : int or None
        As the caller gave it.
    state_shape, out_shape : tuple of int
        Leading axes of keys and values together; shape of the result.
    result, compute : dtype
        Of the result, and what it is computed in.
    offsets : ndarray of int64, shape (sequences + 1,), or None
        Where packed sequences begin, and where the last one ends.
    window : int or None
        Positions that a query sees.
    bfloat16 : bool
        Whether matrix products are of numbers rounded to bfloat16.
    check_finite : bool
        Whether NaN and infinity are refused, in the cotangents of its gradient as well.
    scale : float
        Factor of the logits of exact attention.
    error_bars : ErrorBars or None
        Where standard errors go.
    band : (int, int)
        How many keys a query of exact attention sees before, and after, its own position.
    """

    engine: Engine
    q: Array
    k: Array
    v: Array
    mask: Array | None
    feature_map: FeatureMap | None
    causal: bool
    grouped: bool
    num_threads: int | None
    state_shape: Shape
    out_shape: Shape
    result: np.dtype[Any]
    compute: np.dtype[Any]
    offsets: Array | None = None
    key_bias: Array | None = None
    log2_bias: Array | None = None
    gates: Array | None = None
    faded: Array | None = None
    decay_rates: Array | None = None
    window: int | None = None
    bfloat16: bool = False
    check_finite: bool = False
    scale: float = 1.0
    error_bars: ErrorBars | None = None
    band: tuple[int, int] = (0, 0)

    @property
    def map(self) -> FeatureMap:
        """The feature map, of a call that has one."""
        assert self.feature_map is not None
        return self.feature_map

    @property
    def keys(self) -> int:
        """Number of keys."""
        keys: int = self.k.shape[-2]
        return keys

    def shapes(self, *, stateful: bool = False) -> Shapes:
        """Return the shapes of the arrays, and of the states if there are any."""
        return Shapes(
            self.q.shape,
            self.k.shape,
            self.v.shape,
            None if self.mask is None else self.mask.shape,
            None if self.log2_bias is None else self.log2_bias.shape,
            self.grouped,
            self.state_shape if stateful else None,
        )


class StateShape(Protocol):
    """What a state asks of the keys and values that are folded into it."""

    @property
    def batch_shape(self) -> Shape:
        """Leading axes of keys and values."""

    @property
    def value_dim(self) -> int:
        """Length of a value."""


class StateForm(NamedTuple):
    """What decides how an engine lays the arrays of a state out."""

    feature_map: FeatureMap
    dtype: np.dtype[Any]
    value_dim: int


class StateParts(NamedTuple):
    """All that states hold, a row each, without an engine's padding: see ``cpu.kernels.state``."""

    c: Array
    s: Array
    z: Array
    s_rest: Array | None = None  # what rounding has taken from S and z
    z_rest: Array | None = None
    tail: Array | None = None  # how many tokens wait to be folded; their features and values
    tail_features: Array | None = None
    tail_values: Array | None = None


class Forward(NamedTuple):
    """What a forward pass leaves behind for its pullback."""

    out: Any  # as it was computed, in 32 or 64 bits
    normalizers: tuple[Any, Any]
    state: Any = None  # arrays of the state that it began with, or None


class Cotangents(NamedTuple):
    """Gradients of the inputs, and of the first state: arrays (c, S, z), or None.

    That of the bias is by its natural logarithm.
    """

    q: Any
    k: Any
    v: Any
    key_bias: Any = None
    state: Any = None


class Options(TypedDict, total=False):
    """What attention functions take beside arrays and a feature map, as their callers gave it."""

    key_mask: object
    key_bias: object
    causal: object
    enable_gqa: object
    check_finite: object
    num_threads: object
    #: What is computed and returned, whatever the arrays hold: that of a state.
    dtype: np.dtype[Any] | None


def check_call(
    engine: Engine,
    q: object,
    k: object,
    v: object,
    feature_map: FeatureMap | None = None,
    state: StateShape | None = None,
    *,
    key_mask: object = None,
    key_bias: object = None,
    causal: object = False,
    enable_gqa: object = False,
    check_finite: object = False,
    num_threads: object = None,
    dtype: np.dtype[Any] | None = None,
) -> Call:
    """Check the arguments that all attention functions take.

    With a state, `q` may be None, or `k` and `v`: there are none of them.
    """
    # A step is short: what is True or False need not be checked by a call.
    is_causal = causal is True or (causal is not False and validation.flag("causal", causal))
    is_grouped = enable_gqa is not False and validation.flag("enable_gqa", enable_gqa)
    dim = heads = batch_shape = value_dim = mask = bias = unmasked = None
    if feature_map is not None:
        dim, heads = feature_map.dim, feature_map.num_heads
    if state is not None:
        batch_shape, value_dim = state.batch_shape, state.value_dim
        if q is None:
            q = np.empty((*batch_shape, 0, dim or 0), np.float32)
        if k is None:
            k = np.empty((*batch_shape, 0, dim or 0), np.float32)
            v = np.empty((*batch_shape, 0, value_dim), np.float32)
    q, k, v = validation.tensor("q", q), validation.tensor("k", k), validation.tensor("v", v)
    if key_mask is not None:
        mask = validation.mask_of(key_mask, k.shape[-2])
    if key_bias is not None:
        bias, unmasked = validation.key_bias_of(key_bias, k.shape[-2])
    state_shape, out_shape = call_shapes(
        (
            q.shape,
            k.shape,
            v.shape,
            None if mask is None else mask.shape,
            None if bias is None else bias.shape,
        ),
        (dim, heads, batch_shape, value_dim),
        is_causal,
        is_grouped,
    )
    if unmasked is not None:
        mask = np.ascontiguousarray(unmasked if mask is None else mask & unmasked)
    finite = check_finite is not False and validation.flag("check_finite", check_finite)
    if finite:
        validation.finite_as(dtype, q=q, k=k, v=v)
    result, compute = validation.dtypes(q, k, v) if dtype is None else (dtype, dtype)
    return Call(
        engine,
        q,
        k,
        v,
        mask,
        feature_map,
        is_causal,
        is_grouped,
        None if num_threads is None else validation.integer("num_threads", num_threads),
        state_shape,
        out_shape,
        result,
        compute,
        key_bias=bias,
        log2_bias=None if bias is None else decay.in_log2(bias),
        check_finite=finite,
    )


@functools.lru_cache(maxsize=256)
def call_shapes(
    arrays: tuple[Shape, Shape, Shape, Shape | None, Shape | None],
    wanted: tuple[int | None, int | None, Shape | None, int | None],
    causal: bool,
    grouped: bool,
) -> tuple[Shape, Shape]:
    """Check the shapes of q, k, v, key_mask and key_bias; return those of a state and the result.

    `wanted` are dimension and heads of a feature map, and the shape and length of values of a
    state.
    """
    (q, k, v, mask, bias), (dim, heads, state, value_dim) = arrays, wanted
    if dim is None and q[-1] == 0:
        raise ValueError(f"q must have at least one dimension, got shape {q}")
    of, dim = ("q", q[-1]) if dim is None else ("feature_map", dim)
    validation.last_axis("q", q, dim, of)
    validation.last_axis("k", k, dim, of)
    if value_dim is not None:
        validation.last_axis("v", v, value_dim, "the state")
    if k[-2] != v[-2]:
        raise ValueError(
            f"v must have one row for each row of k, got {v[-2]} rows (shape {v}) "
            f"for {k[-2]} (shape {k})"
        )
    if causal and q[-2] != k[-2]:
        raise ValueError(
            f"causal=True needs as many queries as keys, got {q[-2]} rows of q and {k[-2]} of k"
        )
    shapes = {"k": k[:-2], "v": v[:-2]}
    if mask is not None:
        shapes["key_mask"] = mask[:-1]
    if bias is not None:
        shapes["key_bias"] = bias[:-1]
    if heads is not None:
        shapes["feature_map"] = (heads,)
    if state is not None:
        shapes["state"] = state
    common = validation.broadcast(**shapes)
    if state is not None and common != state:
        raise ValueError(f"state has batch_shape {state}, but k and v need {common}")
    batch = (
        grouped_shape(q[:-2], common) if grouped else validation.broadcast(q=q[:-2], keys=common)
    )
    return common, (*batch, q[-2], v[-1])


def grouped_shape(q: tuple[int, ...], keys: tuple[int, ...]) -> tuple[int, ...]:
    """Return the leading axes of grouped-query attention."""
    if not q or not keys:
        raise ValueError(f"enable_gqa=True needs a head axis, got leading axes q {q}, keys {keys}")
    if keys[-1] == 0 or q[-1] % keys[-1]:
        raise ValueError(
            f"with enable_gqa=True the heads of q must be a multiple of those of k and v, "
            f"got {q[-1]} and {keys[-1]}"
        )
    return (*validation.broadcast(q=q[:-1], keys=keys[:-1]), q[-1])


def by_groups(call: Call) -> Call:
    """Return a grouped call as one whose heads have their groups' queries one after another."""
    *lead, heads, rows, width = call.out_shape
    shared = call.state_shape[-1]
    q = np.broadcast_to(call.q, (*lead, heads, *call.q.shape[-2:]))
    q = q.reshape(*lead, shared, heads // shared * rows, q.shape[-1])
    return replace(call, q=q, grouped=False, out_shape=(*lead, shared, q.shape[-2], width))


def sum_heads(grad: Array, like: Array, heads: Shape | None) -> Array:
    """Sum over groups of query heads that share those of `heads`, and to the shape of an array."""
    if heads is not None:
        batch = grad.shape[:-2]
        group = batch[-1] // heads[-1]
        grad = grad.reshape(*batch[:-1], heads[-1], group, *grad.shape[-2:]).sum(-3)
    return sum_to(grad, like)


def sum_to(grad: Array, like: Array) -> Array:
    """Return the gradient of an array that was broadcast: summed to its shape, in its dtype."""
    shape = (1,) * (grad.ndim - like.ndim) + like.shape
    axes = tuple(i for i, n in enumerate(shape) if n != grad.shape[i])
    if axes:
        grad = grad.sum(axes, dtype=np.float64, keepdims=True)
    return grad.reshape(like.shape).astype(like.dtype.newbyteorder("="), copy=False)
