"""Gradients of FAVOR+ attention: exact, in linear time, from the inputs and one row of numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.attention import Prepared, prepare
from favor_np.exact import sum_to
from favor_np.features import FeatureMap

if TYPE_CHECKING:
    from favor_np.state import AttentionState

Array: TypeAlias = npt.NDArray[Any]


class StateGradient(NamedTuple):
    """Cotangent of the arrays of a state, its exponents c being constants."""

    S: Array
    z: Array


class Gradients:
    """What a pullback returns.

    Attributes
    ----------
    q, k, v : ndarray
        Gradients, of the shapes and dtypes of the arguments (float64 for integers).
    state : StateGradient or None
        Gradient of the incoming state's ``S`` and ``z``; None if there was none.
    projection : ndarray
        Gradient of the feature map's projection.  It is computed when it is first asked for.
    """

    def __init__(
        self, q: Array, k: Array, v: Array, state: StateGradient | None,
        projection: Callable[[], Array],
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.state = q, k, v, state
        self._pull_projection = projection

    @cached_property
    def projection(self) -> Array:
        """Gradient of the projection, of its shape, in the dtype that attention was computed in."""
        return self._pull_projection()


def favor_attention_vjp(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: npt.ArrayLike | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
    num_threads: int | None = None,
    check_finite: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
) -> tuple[Any, Callable[..., Gradients]]:
    """Attend as `favor_attention`, and return the function that pulls a cotangent back.

    Parameters
    ----------
    q, k, v, feature_map, causal, key_mask, cu_seqlens, enable_gqa, decay, state, return_state, \
num_threads, check_finite, device
        As for `favor_attention`.  On a CUDA device there is no state, and no gradient of the
        projection.

    Returns
    -------
    out : ndarray, shape (..., L_q, dv)
        The result of `favor_attention`; a pair (out, state) with `return_state`.
    pullback : callable
        ``pullback(grad_out, grad_state=None)`` returns `Gradients`.  `grad_out` has the shape of the
        result; `grad_state`, with `return_state` only, is a pair of arrays shaped like ``S`` and
        ``z`` of the returned state.  It may be called more than once.

    Raises
    ------
    TypeError, ValueError
        As `favor_attention`.

    Notes
    -----
    Kept between the two are the arguments themselves (change none before the pullback), the result
    and each row's denominator: O(L).  Time is O(L m d).  Features are computed anew tile by tile, keys
    and values get their gradient from a fold over the queries that runs backwards: nothing is rebuilt
    by subtraction, and there is no epsilon.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> out, pullback = favor_np.favor_attention_vjp(q, k, v, fm, causal=True)
    >>> grads = pullback(np.ones_like(out))
    >>> grads.q.shape, grads.v.sum().round(6)  # the weights of every row sum to one
    ((10, 4), np.float64(40.0))
    """
    call = prepare(
        q, k, v, feature_map, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens,
        enable_gqa=enable_gqa, decay=decay, state=state, return_state=return_state,
        num_threads=num_threads, check_finite=check_finite, device=device,
    )  # fmt: skip
    if call.place is not None:
        call.place.refuse(state=state, return_state=return_state)
    result, target = call.targets(whole=True)  # what is rounded would round the gradient, too
    weights, following = attend(call, target)
    result = call.finished(result, target)
    if call.place is not None:
        return result, _pullback_on_device(call, target, weights)
    if not return_state:
        return result, pullback_of(call, target, weights)
    return (result, following), pullback_of(call, target, weights, following)


def attend(call: Prepared, target: Any) -> tuple[tuple[Any, Any], AttentionState | None]:
    """Write the result to `target`; the denominators of its rows, and the state if one is kept."""
    weights = call.launch.new_weights(target)
    return weights, call.run(target, weights)


def pullback_of(
    call: Prepared, result: Array, weights: tuple[Array, Array],
    following: AttentionState | None = None,
) -> Callable[..., Gradients]:  # fmt: skip
    """Return the pullback from what `attend` left behind: all it needs beside the arguments."""
    feature_map, state, launch = call.feature_map, call.state, call.launch

    def pullback(grad_out: npt.ArrayLike, grad_state: Any = None) -> Gradients:
        grad = validation.tensor("grad_out", grad_out)
        if grad.shape != result.shape:
            raise ValueError(f"grad_out must have shape {result.shape}, got {grad.shape}")
        suffix = None
        if grad_state is not None:
            if following is None:
                raise ValueError("grad_state needs return_state=True")
            suffix = _suffix(call, following, grad_state)

        def pull(projection: bool) -> Any:
            arrays = call.arrays
            return launch.attend_vjp(
                feature_map, arrays.q, arrays.k, arrays.v, arrays.mask, result, weights, grad,
                dtype=arrays.compute, causal=arrays.causal, grouped=arrays.grouped,
                state=None if state is None else state.arrays, suffix=suffix,
                state_shape=arrays.state_shape, threads=arrays.threads, offsets=call.offsets,
                clock=call.clock, projection=projection,
            )  # fmt: skip

        like = call.arrays
        kept = like.state_shape if like.grouped else None
        q, k, v, first = pull(False)
        return Gradients(
            _onto(q, like.q, None),
            _onto(k, like.k, kept),
            _onto(v, like.v, kept),
            None if state is None else _state_gradient(state, first),
            lambda: _projection(feature_map, *pull(True)).astype(like.compute, copy=False),
        )

    return pullback


def _pullback_on_device(
    call: Prepared, target: Any, weights: tuple[Any, Any]
) -> Callable[..., Gradients]:
    """Return the pullback where the arrays lie on a CUDA device."""
    arrays, place, launch = call.arrays, call.place, call.launch
    assert place is not None

    def projection() -> Array:
        raise ValueError("the gradient of the projection is not computed on a CUDA device")

    def pullback(grad_out: Any) -> Gradients:
        grad = place.taken("grad_out", grad_out)
        if grad.shape != target.shape:
            raise ValueError(f"grad_out must have shape {target.shape}, got {grad.shape}")
        found = launch.attend_vjp(
            call.feature_map, arrays.q, arrays.k, arrays.v, arrays.mask, target, weights, grad,
            dtype=arrays.compute, causal=arrays.causal, grouped=arrays.grouped,
            threads=arrays.threads, offsets=call.offsets,
        )  # fmt: skip
        q, k, v = (
            place.give(x, like.dtype)
            for x, like in zip(found, (arrays.q, arrays.k, arrays.v), strict=True)
        )
        return Gradients(q, k, v, None, projection)

    return pullback


def _onto(grad: Array, like: Array, kept: tuple[int, ...] | None) -> Array:
    """Sum over the axes along which `like` was broadcast, or shared by groups of query heads."""
    if kept is not None:
        batch = grad.shape[:-2]
        group = batch[-1] // kept[-1]
        grad = grad.reshape(*batch[:-1], kept[-1], group, *grad.shape[-2:]).sum(-3)
    return sum_to(grad, like)


def _projection(feature_map: FeatureMap, weight: Array, bias: Array, owners: Array) -> Array:
    """Gradient of the projection from what the jobs found for weights and bias."""
    heads, rows, dim = feature_map.key_weight.shape
    sides = 2, len(owners) // 2

    def of_heads(array: Array) -> Array:
        """Sum over jobs, for the sides of keys and of queries apart: (2, heads, ...)."""
        total = np.zeros((2, heads, *array.shape[1:]), array.dtype)
        parts = array.reshape(*sides, *array.shape[1:])
        for side, part in zip(total, parts, strict=True):
            np.add.at(side, owners[: sides[1]], part)
        return total[:, :, :rows]

    keys, queries = of_heads(weight)[..., :dim]
    total: Array = (keys + queries) * np.sqrt(feature_map.scale)
    if feature_map.calibration is not None:
        of_keys, of_queries = feature_map.key_factor, feature_map.query_factor
        if of_keys is not None and of_queries is not None:
            total = keys @ of_keys.swapaxes(1, 2) + queries @ of_queries.swapaxes(1, 2)
        quadratic = feature_map.calibration.quadratic.reshape(-1, 1, dim)
        projection = feature_map.projection.reshape(-1, rows, dim)
        total = total * np.sqrt(1 - 4 * quadratic)
        total = total + 4 * of_heads(bias)[0][..., None] * quadratic * projection
    if feature_map.projection.ndim == 2:
        total = total.sum(0)
    return total


def _suffix(call: Prepared, following: AttentionState, grad_state: Any) -> Any:
    """Return the cotangent of the last state as the kernels fold it: relative to 2**-c."""
    from favor_np import launch

    fm, value_dim = following.feature_map, following.value_dim
    lead = (*following._slots, fm.num_features)
    shapes = {"S": (*lead, value_dim), "z": lead}
    try:
        given = dict(zip(shapes, grad_state, strict=True))
    except (TypeError, ValueError):
        raise TypeError(
            f"grad_state must be a pair of arrays, got {validation.got(grad_state)}"
        ) from None
    for name, shape in shapes.items():
        given[name] = validation.tensor(f"grad_state.{name}", given[name], 1)
        if given[name].shape != shape:
            raise ValueError(f"grad_state.{name} must have shape {shape}, got {given[name].shape}")
    rows = len(following.arrays[0]), fm.num_features
    c, weight = following.c.reshape(rows), np.ones(rows)
    seen, exponents = _folded(c), -c
    if following.rates is not None:
        whole, fraction = following._raised()
        before = 0 if call.state is None else call.state._raised()[0]
        exponents = exponents - (whole - before)[:, None].astype(c.dtype)
        weight *= np.exp2(-fraction)[:, None]
    weight[~seen] = 0
    raw = (
        np.where(seen, exponents, _nothing(c)),
        given["S"].reshape(*rows, value_dim) * weight[..., None],
        given["z"].reshape(rows) * weight,
    )
    return launch.with_padding(fm, following.dtype, value_dim, raw)


def _state_gradient(state: AttentionState, found: Any) -> StateGradient:
    """Return the cotangent of the first state's S and z from the fold that went back to it."""
    from favor_np import launch

    c, s, z = launch.without_padding(state.feature_map, state.dtype, state.value_dim, found)
    before = state.c.reshape(c.shape)
    seen = _folded(before) & _folded(c)
    weight = np.ldexp(np.where(seen, 1.0, 0.0), np.where(seen, c + before, 0))
    if state.rates is not None:
        weight = weight * np.exp2(state._raised()[1])[:, None]
    lead = (*state._slots, state.feature_map.num_features)
    with np.errstate(over="ignore"):  # what is beyond the dtype is infinite
        s, z = (s * weight[..., None]).astype(s.dtype), (z * weight).astype(z.dtype)
    return StateGradient(s.reshape(*lead, state.value_dim), z.reshape(lead))


def _nothing(c: Array) -> int:
    from favor_np import plan

    return plan.NOTHING[c.dtype.itemsize]


def _folded(c: Array) -> Any:
    """Return which exponents are those of features that some key has reached."""
    return c > _nothing(c) // 2 - 2**24
