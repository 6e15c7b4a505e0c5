"""FAVOR+ attention: fold keys and values into a state, read it with queries."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, Unpack, overload

import numpy as np
import numpy.typing as npt

from favor_np import decay as decays
from favor_np import validation
from favor_np.call import Call, Options, StateForm
from favor_np.engine import Engine, engine_for, processor
from favor_np.features import ATTENTION_KINDS, FeatureMap, checked
from favor_np.state import AttentionState

Array: TypeAlias = npt.NDArray[Any]


@overload
def favor_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = ...,
    key_mask: npt.ArrayLike | None = ...,
    key_bias: npt.ArrayLike | None = ...,
    cu_seqlens: npt.ArrayLike | None = ...,
    enable_gqa: bool = ...,
    decay: npt.ArrayLike | None = ...,
    window: int | None = ...,
    state: AttentionState | None = ...,
    return_state: Literal[False] = ...,
    out: Array | None = ...,
    precision: Literal["full", "bfloat16"] = ...,
    num_threads: int | None = ...,
    check_finite: bool = ...,
    device: Literal["cpu", "cuda"] | None = ...,
) -> Array: ...
@overload
def favor_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = ...,
    key_mask: npt.ArrayLike | None = ...,
    key_bias: npt.ArrayLike | None = ...,
    cu_seqlens: npt.ArrayLike | None = ...,
    enable_gqa: bool = ...,
    decay: npt.ArrayLike | None = ...,
    window: int | None = ...,
    state: AttentionState | None = ...,
    return_state: Literal[True],
    out: Array | None = ...,
    precision: Literal["full", "bfloat16"] = ...,
    num_threads: int | None = ...,
    check_finite: bool = ...,
    device: Literal["cpu", "cuda"] | None = ...,
) -> tuple[Array, AttentionState]: ...
def favor_attention(
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
    out: Array | None = None,
    precision: Literal["full", "bfloat16"] = "full",
    num_threads: int | None = None,
    check_finite: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
) -> Array | tuple[Array, AttentionState]:
    """Attend in linear time: an estimate of softmax attention by random features.

    Row i of the result is ``sum_j a_ij v_j / sum_j a_ij`` with ``a_ij = phi_q(q_i) . phi_k(k_j)``,
    over all keys or, if `causal`, over j <= i.  Its expectation over projections follows
    ``softmax(scale * q k^T) v`` for a "positive" map.  Time is O(L m d), extra memory constant.

    Parameters
    ----------
    q : array_like, shape (..., L_q, d)
        Queries.
    k : array_like, shape (..., L_k, d)
        Keys.  Leading axes of all arrays broadcast as in NumPy.
    v : array_like, shape (..., L_k, dv)
        Values.
    feature_map : FeatureMap
        Of dimension d; any kind but "trig".  A map with a projection a head is matched with
        axis -3 of keys and values.
    causal : bool, default False
        Query i sees keys up to i only, to the bit.
    key_mask : array_like of bool, shape (..., L_k), optional
        True where a key takes part.  A masked key vanishes wholly, NaN in it included.
    key_bias : array_like of float, shape (..., L_k), optional
        The weight of a key is multiplied with ``exp(key_bias)``: soft masks, importance weights.
        At most 2.3e7; below -2.3e7 it counts as that, and -inf masks the key.  It moves exponents:
        in float32 it costs no accuracy, whatever its range; float64 knows it to 1e-16 of its size.
    cu_seqlens : array_like of int, shape (sequences + 1,), optional
        Packed sequences: sequence i has the rows ``cu_seqlens[i]:cu_seqlens[i + 1]`` of `q`, `k`
        and `v`, and attends to itself only.  From 0 to L; a sequence may be empty.
    enable_gqa : bool, default False
        Grouped queries: axis -3 of `q` is a multiple of that of `k` and `v`, and query head h
        uses their head ``h // (heads of q / heads of k)``.
    decay : array_like of float, optional
        With `causal`: at every token the weights of all earlier keys are multiplied with it, so
        ``a_ij`` with ``decay**(i - j)``.  In (0, 1], broadcast to the leading axes of keys and
        values, such as one per head; or with one axis more, (..., L_k), one factor per token:
        forgetting that data decide.  Token j multiplies the weights of the keys before it, those in
        `state` included; for keys this is ``key_bias = -cumsum(log(decay))``.  A masked key counts
        as time all the same.
    window : int, optional
        With `causal`: query i sees the last `window` positions, i - window + 1 to i, only.  Costs
        two causal passes.
    state : AttentionState, optional
        What came before these keys; it is not changed.  With `causal` these queries and keys are
        the new part only.
    return_state : bool, default False
        Return the state after these keys as well.
    out : ndarray, optional
        Where to write the result; it may overlap an input.  On a CUDA device: an array of CuPy,
        Numba or PyTorch, as the others are, in C order, which overlaps none.
    precision : {"full", "bfloat16"}, default "full"
        "bfloat16": matrix products of numbers rounded to 8 bits, summed in float32; not for
        float64.  About twice as fast on processors with a matrix unit (AMX), 1.4 times on AMD's
        with AVX512_BF16; elsewhere everything is computed in float32 (`favor-np info` tells).  On
        CUDA devices by tensor cores, from compute capability 8.0 on.  It adds an error of about
        0.003 of the result.  Rounding is relative to each value: subtract a mean of `v` that is
        much larger than its spread, and add it to the result.
    num_threads : int, optional
        Default: see `thread_limit`.  The result is the same for any number.
    check_finite : bool, default False
        Refuse NaN and infinity instead of passing them on to the rows that may see them.
    device : {"cpu", "cuda"}, optional
        "cuda": copy NumPy arrays to a GPU and the result back.  Arrays that lie on a GPU (CuPy,
        Numba, PyTorch, JAX) are computed there anyway, on the caller's stream, in float32: the
        result is an array of their kind.  A `window` has no gradient there.

    Returns
    -------
    out : ndarray, shape (..., L_q, dv)
        float32, float64 or a 16-bit float as the inputs (computed in float32); integers and
        bool count as float64.  A row with no key is zero.
    state : AttentionState
        Only if `return_state`.

    Raises
    ------
    TypeError
        If an array is not real (complex, object, str, longdouble, numpy.matrix), has a mask set,
        or `out` or `state` has another dtype than the result is computed in.
    ValueError
        If shapes do not fit, `causal` or `cu_seqlens` is set with L_q != L_k, `decay` or `window`
        without `causal`, `window` with a state, `cu_seqlens` does not rise from 0 to L, `key_bias`
        is NaN, +inf or too large, `decay` is not in (0, 1] or not that of `state`, `precision` is
        "bfloat16" with float64 (integers included), an option is not for the device,
        the map is "trig" or of another dimension, `state` belongs to another map or packing, `out`
        is read-only, or `check_finite` is set and an array is not finite.

    See Also
    --------
    exact_attention : Softmax attention itself: faster on short sequences, and without error.
    AttentionState : What `return_state` returns: to go on token by token.
    WindowState : To go on token by token with a window.

    Notes
    -----
    Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv:2009.14794), sections
    2.2 to 2.4 and appendix B.1 for the prefix sums.  The stabiliser is one running power of two a
    feature: there is no epsilon anywhere.  Log2-features beyond 2**20 saturate.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> q = k = np.ones((3, 4))
    >>> v = np.array([[1.0], [0.0], [0.0]])
    >>> favor_np.favor_attention(q, k, v, fm, causal=True).ravel()
    array([1.        , 0.5       , 0.33333333])
    """
    if (
        (key_mask is None and key_bias is None and cu_seqlens is None and decay is None)
        and (window is None and state is None and out is None)
        and (num_threads is None and device is None and precision == "full")
        and (enable_gqa is False and return_state is False and check_finite is False)
    ):
        plain = processor().attend_plainly(q, k, v, feature_map, causal)
        if plain is not None:
            return plain
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
    result, target = call.engine.outputs(call, out)
    after = state_after(call, state) if return_state or state is not None else None
    attend(call, target, after)
    finished: Array = call.engine.finish(call, result, target, out)
    if return_state:
        assert after is not None
        return finished, after
    return finished


def check(
    q: Any,
    k: Any,
    v: Any,
    feature_map: object,
    *,
    cu_seqlens: object = None,
    decay: object = None,
    window: object = None,
    state: object = None,
    return_state: object = False,
    precision: object = "full",
    device: object = None,
    **options: Unpack[Options],
) -> Call:
    """Check the arguments of `favor_attention`."""
    engine = engine_for(device, q, k, v, options.get("key_mask"))
    decay = engine.to_host(decay)
    q, k, v, options["key_mask"] = engine.views(q, k, v, options.get("key_mask"))
    fm = checked(feature_map, ATTENTION_KINDS)
    before = None if state is None else _checked_state(state, fm, engine)
    call = engine.check(q, k, v, fm, before, **options)
    keeps = before is not None
    if return_state is not False:
        keeps |= validation.flag("return_state", return_state)
    if cu_seqlens is not None:
        cu_seqlens = engine.to_host(cu_seqlens)
        call.offsets = validation.sequence_offsets(cu_seqlens, call.keys, call.q.shape[-2])
    if before is not None and before.dtype != call.compute:
        raise TypeError(
            f"state has dtype {before.dtype}, but these arrays are computed in {call.compute}"
        )
    if decay is not None or before is not None:
        decays.set_decay(call, decay, before)
    if window is not None:
        call.window = validation.integer("window", window)
        if not call.causal:
            raise ValueError("window needs causal=True")
        if keeps:
            raise ValueError("window cannot be used with state or return_state: see WindowState")
    if precision != "full":
        call.bfloat16 = validation.is_bfloat16(precision, call.compute)
    return call


def _checked_state(state: object, feature_map: FeatureMap, engine: Engine) -> AttentionState:
    if not isinstance(state, AttentionState):
        raise TypeError(f"state must be an AttentionState, got {validation.got(state)}")
    state._check_map(feature_map)
    if state._engine.home != engine.home:
        raise TypeError(f"state lies {state._engine.home}, the arrays do not")
    return state


def state_after(call: Call, before: AttentionState | None) -> AttentionState:
    """Return the state that the keys are folded into: a copy of the one before, or an empty one."""
    if before is not None:
        after = before._guard.read(before._copy, call.engine)
        return after if call.keys else after._without_tail()
    sequences = None if call.offsets is None else len(call.offsets) - 1
    form = StateForm(call.map, call.compute, call.v.shape[-1])
    after = AttentionState._empty(call.engine, form, call.state_shape, sequences)
    if call.decay_rates is not None:
        after._rates = np.repeat(call.decay_rates, sequences or 1)
    return after


def windowed(call: Call) -> bool:
    """Whether there are keys that a window keeps from some queries."""
    return call.window is not None and call.window < call.keys


def attend(
    call: Call,
    target: Any,
    after: AttentionState | None = None,
    normalizers: tuple[Any, Any] | None = None,
) -> None:
    """Write the result to the C-ordered `target`; fold the keys into the state `after`.

    `normalizers`, zeros, receive the denominators of the rows.
    """
    if after is not None:
        decays.raise_by(call, after._start)
    if target.size == 0 and (after is None or call.keys == 0):
        pass
    elif call.keys == 0 and after is None and isinstance(target, np.ndarray):
        target[...] = 0
    else:
        if not windowed(call):
            call.window = None
        call.engine.attend(call, target, None if after is None else after._arrays, normalizers)
    if after is not None:
        after._count(call)
