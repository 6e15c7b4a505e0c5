"""Exact softmax attention: the baseline, and the better choice for short sequences."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation

Array: TypeAlias = npt.NDArray[Any]

#: Beyond it a logit in float32 has an error of several per cent, and is computed in float64.
LARGEST_LOGIT = 2.0**19


def exact_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    num_threads: int | None = None,
    check_finite: bool = False,
) -> Array:
    """Softmax attention, ``softmax(scale * q k^T) v``, in O(L) memory.

    Parameters
    ----------
    q : array_like, shape (..., L_q, d)
        Queries.
    k : array_like, shape (..., L_k, d)
        Keys.  Leading axes of all arrays broadcast as in NumPy.
    v : array_like, shape (..., L_k, dv)
        Values.
    causal : bool, default False
        Query i sees keys up to i only, to the bit.
    scale : float, optional
        Factor of the logits, default d ** -0.5.
    key_mask : array_like of bool, shape (..., L_k), optional
        True where a key takes part.  A masked key vanishes wholly, NaN in it included.
    enable_gqa : bool, default False
        Grouped queries: axis -3 of `q` is a multiple of that of `k` and `v`, and query head h
        uses their head ``h // (heads of q / heads of k)``.
    num_threads : int, optional
        Default: see `thread_limit`.  The result is the same for any number.
    check_finite : bool, default False
        Refuse NaN and infinity instead of passing them on to the rows that may see them.

    Returns
    -------
    ndarray, shape (..., L_q, dv)
        float32, float64 or a 16-bit float as the inputs (computed in float32); integers and
        bool count as float64.  A row with no key is zero.

    Raises
    ------
    TypeError
        If an array is not real (complex, object, str, longdouble, numpy.matrix) or has a mask set.
    ValueError
        If shapes do not fit, `causal` is set with L_q != L_k, `scale` is not finite and
        positive, or `check_finite` is set and an array is not finite.

    Notes
    -----
    Tiles of keys pass under tiles of queries with a running maximum (Milakov and Gimelshein 2018,
    arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135): the keys of a tile act as its features,
    so the kernel is the one that reads a FAVOR+ state.  Rows with
    logits beyond 2**19 are computed in float64 whatever the dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> q, k = np.array([[0.0, 1.0]]), np.array([[0.0, 0.0], [0.0, 1.0]])
    >>> favor_np.exact_attention(q, k, np.eye(2), scale=1.0).round(4)
    array([[0.2689, 0.7311]])
    """
    call = validation.attention_call(
        q, k, v, key_mask=key_mask, causal=causal, grouped=enable_gqa, check_finite=check_finite,
        num_threads=num_threads,
    )  # fmt: skip
    if scale is None:
        scale = float(call.q.shape[-1]) ** -0.5
    else:
        scale = validation.positive_float("scale", scale)
    result, target = call.targets(None)
    if target.size and not call.keys:
        target[...] = 0
    elif target.size:
        from favor_np import launch

        def compute(to: Array) -> bool:
            return launch.attend_exact(
                call.q, call.k, call.v, call.mask, to,
                dtype=to.dtype, causal=call.causal, scale=scale, grouped=call.grouped,
                threads=call.threads,
            )  # fmt: skip

        if not compute(target) and target.dtype == np.float32:
            wide = np.empty(target.shape)
            compute(wide)
            np.copyto(target, wide, where=_too_large(call, scale)[..., None], casting="same_kind")
    if target is not result:
        result[...] = target
    return result


def _too_large(call: validation.AttentionCall, scale: float) -> npt.NDArray[np.bool_]:
    """Return which rows see a logit that float32 cannot resolve.

    Row by row: no later key decides how an earlier row is computed.
    """
    q, k = (np.sqrt((x.astype(np.float64) ** 2).sum(-1)) for x in (call.q, call.k))
    k = np.where(np.isfinite(k), k, 0.0)
    if call.mask is not None:
        k = np.where(call.mask, k, 0.0)
    if call.grouped:
        k = np.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    longest = np.maximum.accumulate(k, axis=-1) if call.causal else k.max(-1, keepdims=True)
    rows = q * longest > LARGEST_LOGIT / scale
    return np.broadcast_to(rows, call.out_shape[:-1])
