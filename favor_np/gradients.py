"""Gradients of FAVOR+ attention: exact, in linear time, from the inputs and one row of numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import decay as decays
from favor_np import numerics, validation
from favor_np.attention import attend, check, state_after, windowed
from favor_np.call import Call, Cotangents, Forward, StateParts, sum_to
from favor_np.features import FeatureMap
from favor_np.state import AttentionState

Array: TypeAlias = npt.NDArray[Any]
#: The states before and after a call, or None.
States: TypeAlias = tuple[AttentionState | None, AttentionState | None]


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
    key_bias, decay : ndarray or None
        Those of the bias, and of a decay of one factor a token, if there was such.  That of a
        factor so small that it is lost in rounding is 0.
    state : StateGradient or None
        Gradient of the incoming state's ``S`` and ``z``; None if there was none.
    projection : ndarray
        Gradient of the feature map's projection.  It is computed when it is first asked for.
    """

    def __init__(
        self,
        found: Cotangents,
        weights: tuple[Array | None, Array | None],
        state: StateGradient | None,
        projection: Callable[[], Array],
    ) -> None:
        self.q, self.k, self.v, self.state = found.q, found.k, found.v, state
        self.key_bias, self.decay = weights
        self._pull_projection = projection

    def __repr__(self) -> str:
        """Say of what shapes the gradients are."""
        shapes = ", ".join(f"{name} {getattr(self, name).shape}" for name in "qkv")
        more = "" if self.state is None else ", state"
        return f"<Gradients of {shapes}, projection{more}>"

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
    key_bias: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: npt.ArrayLike | None = None,
    window: int | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
    precision: Literal["full", "bfloat16"] = "full",
    num_threads: int | None = None,
    check_finite: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
) -> tuple[Any, Callable[..., Gradients]]:
    """Attend as `favor_attention`, and return the function that pulls a cotangent back.

    Parameters
    ----------
    q, k, v, feature_map, causal, key_mask, key_bias, cu_seqlens, enable_gqa, decay, window, \
state, return_state, precision, num_threads, check_finite, device
        As for `favor_attention`.  With ``precision="bfloat16"`` the pullback computes in float32;
        with `check_finite` it refuses a `grad_out` that is not finite.  On a CUDA device gradients
        of bias, decay, state and projection are NumPy arrays, too, and `window` has none.

    Returns
    -------
    out : ndarray, shape (..., L_q, dv)
        The result of `favor_attention`; a pair (out, state) with `return_state`.
    pullback : callable
        ``pullback(grad_out, grad_state=None)`` returns `Gradients`.  `grad_out` has the shape of
        the result; `grad_state`, with `return_state` only, is a pair of arrays shaped like ``S``
        and ``z`` of the returned state.  It may be called more than once.

    Raises
    ------
    TypeError, ValueError
        As `favor_attention`.

    Notes
    -----
    Kept between the two are the arguments themselves (change none before the pullback), the result
    and each row's denominator: O(L).  Time is O(L m d).  Features are computed anew tile by tile,
    keys and values get their gradient from a fold over the queries that runs backwards: nothing is
    rebuilt by subtraction, and there is no epsilon.

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
    call = check(
        q,
        k,
        v,
        feature_map,
        causal=causal,
        key_mask=key_mask,
        key_bias=key_bias,
        cu_seqlens=cu_seqlens,
        enable_gqa=enable_gqa,
        decay=decay,
        window=window,
        state=state,
        return_state=return_state,
        precision=precision,
        num_threads=num_threads,
        check_finite=check_finite,
        device=device,
    )
    engine = call.engine
    after = state_after(call, state) if return_state else None
    forward = attend_forward(call, state, after)
    result = forward.out
    if call.result is not call.compute:
        result, _ = engine.outputs(call)
    result = engine.finish(call, result, forward.out)
    if after is None:
        return result, pullback_of(call, forward, state)
    return (result, after), pullback_of(call, forward, state, after)


def attend_forward(
    call: Call, state: AttentionState | None = None, after: AttentionState | None = None
) -> Forward:
    """Attend, and keep what the pullback needs beside the arguments."""
    engine = call.engine
    out = engine.new_output(call)  # what is rounded would round the gradients, too
    normalizers = engine.normalizers(out)
    if state is not None and after is None:
        after = state_after(call, state)
    attend(call, out, after, normalizers)
    return Forward(out, normalizers, None if state is None else state._arrays)


def pullback_of(
    call: Call,
    forward: Forward,
    state: AttentionState | None = None,
    after: AttentionState | None = None,
) -> Callable[..., Gradients]:
    """Return the pullback from what the forward pass left behind."""
    engine = call.engine

    @validation.own_error_state
    def pullback(grad_out: Any, grad_state: Any = None) -> Gradients:
        grad = engine.cotangent(call, grad_out)
        final = None
        if grad_state is not None:
            if after is None:
                raise ValueError("grad_state needs return_state=True")
            grad_state = _checked_cotangents(after, grad_state)
            final = _final_state(call, state, after, grad_state)
        if windowed(call):
            from favor_np import window

            found = window.attend_vjp(call, forward, grad)
        else:
            found = engine.attend_vjp(call, forward, grad, final)

        def projection() -> Array:
            parts: Any
            if windowed(call):
                parts = window.projection_vjp(call, forward, grad)
            else:
                parts = [engine.projection_vjp(call, forward, grad, final)]
            total: Any = sum(_projection(call.map, *part) for part in parts)
            found: Array = total.astype(call.compute, copy=False)
            return found

        first = None if state is None else _state_gradient(call, state, found.state)
        weights = _weights_gradient(call, found.key_bias, (state, after), grad_state)
        return Gradients(found, weights, first, projection)

    return pullback


def _weights_gradient(
    call: Call, found: Any, states: States, grad_state: Any
) -> tuple[Array | None, Array | None]:
    """Return the gradients of the bias and of the decay that the caller gave."""
    bias = factors = of_after = None
    before, after = states
    if call.key_bias is not None:
        bias = sum_to(found, call.key_bias)
    if call.gates is not None:
        if after is not None and grad_state is not None:  # what is folded fades as well
            s, z = (np.asarray(x, np.float64) for x in grad_state)
            of_after = (after.S * s).sum((-1, -2)) + (after.z * z).sum(-1)
        by_gates = decays.gradient_of(call, found, state=before is not None, of_after=of_after)
        factors = sum_to(by_gates, call.gates)
    return bias, factors


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


def _checked_cotangents(after: AttentionState, grad_state: Any) -> StateGradient:
    """Return the cotangents of the last state, in main memory."""
    lead = (*after._slots, after.feature_map.num_features)
    shapes = {"S": (*lead, after.value_dim), "z": lead}
    try:
        given = dict(zip(shapes, grad_state, strict=True))
    except (TypeError, ValueError):
        raise TypeError(
            f"grad_state must be a pair of arrays, got {validation.got(grad_state)}"
        ) from None
    for name, shape in shapes.items():
        array = after._engine.to_host(given[name])
        given[name] = validation.tensor(f"grad_state.{name}", array, 1)
        if given[name].shape != shape:
            raise ValueError(f"grad_state.{name} must have shape {shape}, got {given[name].shape}")
    return StateGradient(**given)


def _final_state(
    call: Call, before: AttentionState | None, after: AttentionState, given: StateGradient
) -> tuple[Any, ...]:
    """Return the cotangent of the last state as the kernels fold it: relative to 2**-c."""
    rows = len(after._arrays[0]), after.feature_map.num_features
    c, weight = after.c.reshape(rows), np.ones(rows)
    seen, exponents = _folded(c), -c
    fade = after._raised()
    if fade is not None:
        earlier = None if before is None else before._raised()
        whole = fade.whole if earlier is None else fade.whole - earlier.whole
        exponents = exponents - whole[:, None].astype(c.dtype)
        weight *= np.exp2(-fade.fraction)[:, None]
    weight[~seen] = 0
    parts = StateParts(
        np.where(seen, exponents, _nothing(c)),
        given.S.reshape(*rows, after.value_dim) * weight[..., None],
        given.z.reshape(rows) * weight,
    )
    states: tuple[Any, ...] = call.engine.states_of(after._form, parts)
    return states


def _state_gradient(call: Call, state: AttentionState, found: Any) -> StateGradient:
    """Return the cotangent of the first state's S and z from the fold that went back to it."""
    c, s, z = call.engine.state_sums(state._form, found)
    before = state.c.reshape(c.shape)
    seen = _folded(before) & _folded(c)
    weight = np.ldexp(np.where(seen, 1.0, 0.0), np.where(seen, c + before, 0))
    if (start := state._start) is not None:
        weight = weight * np.exp2(start)[:, None]
    lead = (*state._slots, state.feature_map.num_features)
    with np.errstate(over="ignore"):  # what is beyond the dtype is infinite
        s, z = (s * weight[..., None]).astype(s.dtype), (z * weight).astype(z.dtype)
    return StateGradient(s.reshape(*lead, state.value_dim), z.reshape(lead))


def _nothing(c: Array) -> int:
    return numerics.NOTHING[c.dtype.itemsize]


def _folded(c: Array) -> Any:
    """Return which exponents are those of features that some key has reached."""
    return c > _nothing(c) // 2 - 2**24
