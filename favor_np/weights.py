"""The weights that FAVOR+ attention implies: rows of a matrix that attention never forms."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import by_groups
from favor_np.decay import set_decay
from favor_np.engine import processor
from favor_np.features import ATTENTION_KINDS, F64, FeatureMap, checked
from favor_np.numerics import LN2

Array: TypeAlias = npt.NDArray[Any]

BLOCK = 1024  # keys whose features are held at once


def attention_weights(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    positions: npt.ArrayLike | None = None,
    key_mask: npt.ArrayLike | None = None,
    key_bias: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: npt.ArrayLike | None = None,
) -> Array:
    """Compute rows of the attention matrix that a feature map implies.

    Row i is ``a_ij = phi_q(q_i) . phi_k(k_j)`` over its sum, so that ``attention_weights(q, k,
    feature_map) @ v`` is ``favor_attention(q, k, v, feature_map)``.  For pictures and studies of
    a few rows: time and memory are those of a dense matrix.

    Parameters
    ----------
    q : array_like, shape (..., rows, d)
        The queries whose weights are wanted.
    k : array_like, shape (..., L_k, d)
        All keys.  Leading axes broadcast as in NumPy.
    feature_map : FeatureMap
        Of dimension d; any kind but "trig".  A map with a projection a head is matched with
        axis -3.
    causal : bool, default False
        Query i sees keys up to i only: the same as positions 0, 1, 2, ...
    positions : array_like of int, shape (rows,), optional
        For causal attention with some of the queries: where in the sequence each stands.  Keys
        after it get 0.
    key_mask : array_like of bool, shape (..., L_k), optional
        True where a key takes part.
    key_bias, enable_gqa, decay : optional
        As for `favor_attention`; a decay with `causal` or `positions`.

    Returns
    -------
    ndarray, shape (..., rows, L_k)
        In the float type of the inputs; integers and bool count as float64.  Computed in
        float64.  A row sums to 1; one with no key is zero.

    Raises
    ------
    TypeError
        If an array is not real, `positions` are not integers or `key_mask` is not boolean.
    ValueError
        If shapes do not fit, a position is negative, `positions` come with `causal`, or the map is
        "trig" or of another dimension.

    See Also
    --------
    favor_attention : The product of these weights and the values, in linear time.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> k = np.eye(4)
    >>> favor_np.attention_weights(k[:2], k, fm, positions=[0, 1]).round(2)
    array([[1.  , 0.  , 0.  , 0.  ],
           [0.44, 0.56, 0.  , 0.  ]])
    """
    checked(feature_map, ATTENTION_KINDS)
    call = processor().check(
        q, k, k, feature_map, key_mask=key_mask, key_bias=key_bias, enable_gqa=enable_gqa
    )
    rows, keys = call.q.shape[-2], call.keys
    seen = np.full(rows, keys)  # how many keys, from the first one on, a row sees
    if validation.flag("causal", causal):
        if positions is not None:
            raise ValueError("positions cannot be used with causal=True, which says the same")
        positions = np.arange(rows)
    if positions is not None:
        seen = np.minimum(validation.row_positions("positions", positions, rows), keys - 1) + 1
        call.causal = True
    if decay is not None:
        set_decay(call, decay)
    out_shape = call.out_shape
    if call.grouped:  # the queries of a group are more rows of one head
        call = by_groups(call)
        seen = np.tile(seen, out_shape[-3] // call.out_shape[-3])
    # A block ends where the view of a row does: a row sees all of a block or nothing of it, so
    # that no key which it does not see decides how its own are scaled.
    ends = np.unique(np.concatenate([seen, np.arange(BLOCK, keys, BLOCK)]))
    logs = np.full((*call.out_shape[:-1], keys), -np.inf)
    with np.errstate(all="ignore"):  # exp(-inf) and log(0) are meant; NaN is passed on
        log_q = _log_query_features(feature_map, call.q.astype(np.float64))
        start = 0
        for end in ends[ends > 0]:
            block = slice(start, end)
            log_k = _log_key_features(feature_map, call.k[..., block, :].astype(np.float64))
            if call.mask is not None:
                log_k = np.where(call.mask[..., block, None], log_k, -np.inf)
            if call.log2_bias is not None:
                log_k = log_k + call.log2_bias[..., block, None] * LN2
            sees = seen >= end
            logs[..., sees, block] = _log_products(log_q[..., sees, :], log_k)
            start = end
        top = logs.max(-1, keepdims=True, initial=np.finfo(np.float64).min)
        weights = np.exp(logs - top, out=logs)
        total = weights.sum(-1, keepdims=True)
        np.divide(weights, total, out=weights, where=total != 0)
        result: Array = weights.reshape(*out_shape[:-1], keys).astype(call.result, copy=False)
        return result


def _log_products(log_q: F64, log_k: F64) -> F64:
    """``log sum_r exp(log_q_ir + log_k_jr)``, by one matrix product of numbers up to 1.

    Of each feature the largest key is 1, and of each query the largest feature after that, so
    every row has a product of at least 1: nothing can overflow, and what underflows is nothing
    beside it.
    """
    largest = log_k.max(-2, keepdims=True, initial=np.finfo(np.float64).min)
    log_q = log_q + largest
    top = log_q.max(-1, keepdims=True)
    products = np.exp(log_q - top) @ np.swapaxes(np.exp(log_k - largest), -1, -2)
    return np.asarray(np.log(products) + top)


def _log_query_features(feature_map: FeatureMap, q: F64) -> F64:
    """Logarithms of the features of q (..., L, d), without what all of a row's have in common."""
    return _log_features(feature_map, feature_map._projections(q)[0])


def _log_key_features(feature_map: FeatureMap, k: F64) -> F64:
    y, h = feature_map._projections(k, keys=True)
    bias = feature_map._of_head(feature_map.bias)
    signs = 2 if feature_map.antithetic else 1
    return np.asarray(_log_features(feature_map, y) + np.tile(bias, signs) - h)


def _log_features(feature_map: FeatureMap, y: F64) -> F64:
    if feature_map.kind == "relu":
        return np.asarray(np.log(np.maximum(y, 0.0) + feature_map.kernel_epsilon))
    if feature_map.kind == "elu":
        return np.where(y > 0, np.log1p(y), y)
    return np.concatenate([y, -y], axis=-1) if feature_map.antithetic else y
