"""FAVOR+ attention: fold keys and values into a state, read it with queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.features import FeatureMap
from favor_np.state import AttentionState, launcher

if TYPE_CHECKING:
    from favor_np.cuda.arrays import Place

Array: TypeAlias = npt.NDArray[Any]


@overload
def favor_attention(
    q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike, feature_map: FeatureMap, *,
    causal: bool = ..., key_mask: npt.ArrayLike | None = ...,
    cu_seqlens: npt.ArrayLike | None = ..., enable_gqa: bool = ...,
    decay: npt.ArrayLike | None = ..., window: int | None = ...,
    state: AttentionState | None = ..., return_state: Literal[False] = ...,
    out: Array | None = ..., precision: Literal["full", "bfloat16"] = ...,
    num_threads: int | None = ..., check_finite: bool = ...,
    device: Literal["cpu", "cuda"] | None = ...,
) -> Array: ...  # fmt: skip
@overload
def favor_attention(
    q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike, feature_map: FeatureMap, *,
    causal: bool = ..., key_mask: npt.ArrayLike | None = ...,
    cu_seqlens: npt.ArrayLike | None = ..., enable_gqa: bool = ...,
    decay: npt.ArrayLike | None = ..., window: int | None = ...,
    state: AttentionState | None = ..., return_state: Literal[True],
    out: Array | None = ..., precision: Literal["full", "bfloat16"] = ...,
    num_threads: int | None = ..., check_finite: bool = ...,
    device: Literal["cpu", "cuda"] | None = ...,
) -> tuple[Array, AttentionState]: ...  # fmt: skip
def favor_attention(
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
    cu_seqlens : array_like of int, shape (sequences + 1,), optional
        Packed sequences: sequence i has the rows ``cu_seqlens[i]:cu_seqlens[i + 1]`` of `q`, `k`
        and `v`, and attends to itself only.  From 0 to L; a sequence may be empty.
    enable_gqa : bool, default False
        Grouped queries: axis -3 of `q` is a multiple of that of `k` and `v`, and query head h
        uses their head ``h // (heads of q / heads of k)``.
    decay : array_like of float, optional
        With `causal`: the weight ``a_ij`` is multiplied with ``decay**(i - j)``.  In (0, 1],
        broadcast to the leading axes of keys and values, such as one a head.  A masked key counts
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
        "bfloat16", on the CPU only: matrix products of numbers rounded to 8 bits, summed in
        float32; not for float64.  About twice as fast on processors with a matrix unit (AMX), 1.4
        times on others with AVX512_BF16, slower elsewhere (`favor-np info` tells); it adds an error
        of about 0.003 of the result.  Values count as they are: take off a mean that is much larger
        than their spread, and add it to the result.
    num_threads : int, optional
        Default: see `thread_limit`.  The result is the same for any number.
    check_finite : bool, default False
        Refuse NaN and infinity instead of passing them on to the rows that may see them.
    device : {"cpu", "cuda"}, optional
        "cuda": copy NumPy arrays to a GPU and the result back.  Arrays that lie on a GPU (CuPy,
        Numba, PyTorch, JAX) are computed there anyway, on the caller's stream, in float32: the
        result is an array of their kind.  `decay`, `window` and `check_finite` are for the CPU
        only.

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
        without `causal`, `window` with a state, `cu_seqlens` does not rise from 0 to L, `decay` is
        not in (0, 1] or not that of `state`, `precision` is "bfloat16" with float64 (integers
        included), `window` or a CUDA device, the map is "trig" or of another dimension, `state`
        belongs to another map or packing, `out` is read-only, or `check_finite` is set and an array
        is not finite.

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
    call = prepare(
        q, k, v, feature_map, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens,
        enable_gqa=enable_gqa, decay=decay, window=window, state=state, return_state=return_state,
        precision=precision, num_threads=num_threads, check_finite=check_finite, device=device,
    )  # fmt: skip
    room, target = call.targets(out)
    following = call.run(target)
    result: Array = call.finished(room, target, out)
    if return_state:
        assert following is not None
        return result, following
    return result


@dataclass(slots=True, eq=False)
class Prepared:
    """The checked arguments of `favor_attention`."""

    feature_map: FeatureMap
    arrays: validation.AttentionCall
    offsets: Array | None
    rates: Array | None
    window: int | None
    state: AttentionState | None
    keeps: bool
    #: Whether products are of bfloat16.
    fast: bool
    place: Place | None

    def targets(self, out: object = None, *, whole: bool = False) -> tuple[Any, Any]:
        """Return the array of the result, and the one that kernels write to: `whole`, in 32 bits."""
        if self.place is None:
            return self.arrays.targets(out)
        result = self.place.room(self.arrays, out)
        if whole and result.dtype != np.float32:
            return result, self.place.launch.empty(self.arrays.out_shape)
        return result, result

    def finished(self, result: Any, target: Any, out: Any = None) -> Any:
        """Return the result as the caller gets it: `out` if it was given."""
        if target is not result:
            if self.place is None:
                result[...] = target
            else:
                self.launch.convert(target, result)
        if out is not None:
            return out
        return result if self.place is None else self.place.give(result, self.arrays.result)

    def run(
        self, target: Array, weights: tuple[Array, Array] | None = None
    ) -> AttentionState | None:
        """Write the result to the C-ordered `target`; the state after it, if one is kept.

        `weights`, zeros, receive the denominators of the rows.
        """
        call = self.arrays
        following = self._following() if self.keeps else None
        clock = self.clock if following is None or self.state is None else following._clock
        if target.size == 0 and (following is None or call.keys == 0):
            pass
        elif call.keys == 0 and self.state is None and self.place is None:
            target[...] = 0
        elif self.window is not None and self.window < call.keys:
            from favor_np import window as windows

            windows.attend(self.feature_map, call, target, self.window, self.offsets, self.rates)
        else:
            self.launch.attend(
                self.feature_map, call.q, call.k, call.v, call.mask, target,
                dtype=call.compute, causal=call.causal, grouped=call.grouped,
                state=None if following is None else following.arrays,
                state_shape=None if following is None else following.batch_shape,
                threads=call.threads, offsets=self.offsets, clock=clock, weights=weights,
                fast=self.fast,
            )  # fmt: skip
        if following is not None:
            following._count(call.keys, self.offsets)
        return following

    @property
    def launch(self) -> Any:
        """The module that launches kernels where the arrays are."""
        return launcher(self.place)

    @property
    def clock(self) -> Any:
        """How keys are raised, so that earlier ones decay."""
        if self.state is not None:
            return self.state._clock
        if self.rates is None:
            return None
        return self.launch.clock(self.rates, self.offsets)

    def _following(self) -> AttentionState:
        """Return the state that the keys are folded into."""
        if self.state is not None:
            following = self.state.copy()
            return following if self.arrays.keys else following._without_tail()
        call = self.arrays
        sequences = None if self.offsets is None else len(self.offsets) - 1
        following = AttentionState._zeros(
            self.feature_map,
            call.v.shape[-1],
            call.state_shape,
            sequences,
            None,
            call.compute,
            self.place,
        )
        if self.rates is not None:
            following.rates = np.repeat(self.rates, following.sequences or 1)
        return following


def prepare(
    q: object,
    k: object,
    v: object,
    feature_map: object,
    *,
    causal: object = False,
    key_mask: object = None,
    cu_seqlens: object = None,
    enable_gqa: object = False,
    decay: object = None,
    window: object = None,
    state: object = None,
    return_state: object = False,
    precision: object = "full",
    num_threads: object = None,
    check_finite: object = False,
    device: object = None,
) -> Prepared:
    """Check the arguments of `favor_attention`."""
    where = None
    if device is not None or not (type(q) is type(k) is type(v) is np.ndarray):
        where = _place(device, q=q, k=k, v=v, key_mask=key_mask)
    if where is not None:
        where.refuse(decay=decay, window=window, check_finite=check_finite)
        q, k, v, key_mask = where.views(q=q, k=k, v=v, key_mask=key_mask)
        cu_seqlens = where.host(cu_seqlens)
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"feature_map must be a FeatureMap, got {validation.got(feature_map)}")
    if feature_map.kind == "trig":
        raise ValueError(
            "feature_map must not be of kind 'trig': its estimates can be negative, so a "
            "denominator can vanish; it serves studies of the kernel only"
        )
    before = None if state is None else _state(state, feature_map, where)
    check = validation.attention_call if where is None else where.attention_call
    call = check(
        q, k, v, key_mask=key_mask, causal=causal, grouped=enable_gqa, check_finite=check_finite,
        num_threads=num_threads, dim=feature_map.dim, heads=feature_map.num_heads,
        state_shape=None if before is None else before.batch_shape,
        value_dim=None if before is None else before.value_dim,
    )  # fmt: skip
    keeps = validation.flag("return_state", return_state) or before is not None
    offsets = None
    if cu_seqlens is not None:
        offsets = validation.sequence_offsets(cu_seqlens, call.keys, call.q.shape[-2])
    rates = validation.decay_rates(decay, call.state_shape, causal=call.causal)
    if before is not None:
        if before.dtype != call.compute:
            raise TypeError(
                f"state has dtype {before.dtype}, but these arrays are computed in {call.compute}"
            )
        before._fits(offsets, decay, causal=call.causal)
    decays = rates if before is None else before.rates
    if decays is not None:
        validation.decay_span(decays, call.keys)
    if window is not None:
        window = validation.integer("window", window)
        if not call.causal:
            raise ValueError("window needs causal=True")
        if keeps:
            raise ValueError("window cannot be used with state or return_state: see WindowState")
    fast = validation.in_words(precision, call.compute)
    if fast and where is not None:
        raise ValueError("precision='bfloat16' cannot be used on a CUDA device")
    if fast and window is not None:
        raise ValueError("precision='bfloat16' cannot be used with window")
    return Prepared(feature_map, call, offsets, rates, window, before, keeps, fast, where)


def _place(where: object, **arrays: Any) -> Place | None:
    """Return the device where a call is computed, or None: see `favor_np.cuda.arrays`."""
    from favor_np.cuda.arrays import place

    return place(where, **arrays)


def _state(state: object, feature_map: FeatureMap, where: Place | None) -> AttentionState:
    if not isinstance(state, AttentionState):
        raise TypeError(f"state must be an AttentionState, got {validation.got(state)}")
    state.same_map(feature_map)
    if (state.place is None) != (where is None):
        raise TypeError(
            f"state lies {'in main memory' if state.place is None else 'on a CUDA device'}, the arrays do not"
        )
    return state
