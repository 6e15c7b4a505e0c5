"""Exact softmax attention: the baseline, and the better choice for short sequences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from favor_np import decay as decays
from favor_np import numerics, validation
from favor_np.call import Call, Forward, Options, sum_to
from favor_np.engine import processor

Array: TypeAlias = npt.NDArray[Any]

#: Beyond it a logit has an error of about a per cent: from float32 it is computed in float64, and
#: from there row by row.
LARGEST_LOGIT = {4: 2.0**19, 8: 2.0**47}


def exact_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    key_mask: npt.ArrayLike | None = None,
    key_bias: npt.ArrayLike | None = None,
    decay: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    precision: Literal["full", "bfloat16"] = "full",
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
    window : int or (int, int), optional
        With `causal`: query i sees the last `window` positions, i - window + 1 to i, only.
        Otherwise a pair (left, right): it sees the keys i - left to i + right, None being all on
        that side.  Time is O(L (left + right)).
    scale : float, optional
        Factor of the logits, default d ** -0.5.
    key_mask : array_like of bool, shape (..., L_k), optional
        True where a key takes part.  A masked key vanishes wholly, NaN in it included.
    key_bias : array_like of float, shape (..., L_k), optional
        What is added to the logits of a key: its weight is multiplied with ``exp(key_bias)``.  At
        most 2.3e7; below -2.3e7 it counts as that, and -inf masks the key.  It moves exponents: in
        float32 it costs no accuracy, whatever its range; float64 knows it to 1e-16 of its size.
    decay : array_like of float, optional
        With `causal`: the weight of key j for query i is multiplied with ``decay**(i - j)``.  In
        (0, 1], broadcast to the leading axes of keys and values, such as one per head; or with one
        axis more, (..., L_k), one factor per token: the weight is multiplied with those of the
        tokens j + 1 to i, as with ``key_bias = -cumsum(log(decay))``.  A masked key counts as time
        all the same.
    cu_seqlens : array_like of int, shape (sequences + 1,), optional
        Packed sequences: sequence i has the rows ``cu_seqlens[i]:cu_seqlens[i + 1]`` of `q`, `k`
        and `v`, and attends to itself only.  From 0 to L; a sequence may be empty.
    enable_gqa : bool, default False
        Grouped queries: axis -3 of `q` is a multiple of that of `k` and `v`, and query head h
        uses their head ``h // (heads of q / heads of k)``.
    precision : {"full", "bfloat16"}, default "full"
        "bfloat16": matrix products of numbers rounded to 8 bits, summed in float32; not for
        float64.  Almost three times as fast on processors with a matrix unit (AMX), one and a half
        times on AMD's with AVX512_BF16; elsewhere everything is computed in float32.
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
        If shapes do not fit, `causal` or `cu_seqlens` is set with L_q != L_k, `window` is no pair
        without `causal`, `decay` is not in (0, 1] or given without `causal`, `key_bias` holds NaN,
        +inf or what is too large, `cu_seqlens` does not rise from 0 to L, `scale` is not finite and
        positive, `precision` is "bfloat16" with float64 (integers included), or `check_finite` is
        set and an array is not finite.

    See Also
    --------
    favor_attention : The estimate in linear time: faster on long sequences without a window.

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

    A window, and forgetting half at each token:

    >>> x, v = np.zeros((4, 1)), np.arange(4.0)[:, None]
    >>> favor_np.exact_attention(x, x, v, causal=True, window=2).ravel()
    array([0. , 0.5, 1.5, 2.5])
    >>> favor_np.exact_attention(x, x, v, causal=True, window=2, decay=0.5).ravel().round(4)
    array([0.    , 0.6667, 1.6667, 2.6667])
    """
    call = _check(
        q,
        k,
        v,
        scale,
        window,
        cu_seqlens,
        decay,
        causal=causal,
        key_mask=key_mask,
        key_bias=key_bias,
        enable_gqa=enable_gqa,
        num_threads=num_threads,
        check_finite=check_finite,
    )
    call.bfloat16 = validation.is_bfloat16(precision, call.compute)
    return _attend(call)[0]


class _Gradients(NamedTuple):
    q: Array
    k: Array
    v: Array


class AttentionGradients(_Gradients):
    """What a pullback returns: a tuple with one array for each input, of its shape and dtype.

    Attributes
    ----------
    q, k, v : ndarray
        The three of the tuple.
    key_bias : ndarray or None
        That of `key_bias`, if there was one.
    decay : ndarray or None
        That of `decay`, if this had a factor for each token; 0 where the factor is so small that
        the gradient is lost in rounding.
    """

    key_bias: Array | None = None
    decay: Array | None = None


def exact_attention_vjp(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    key_mask: npt.ArrayLike | None = None,
    key_bias: npt.ArrayLike | None = None,
    decay: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    precision: Literal["full", "bfloat16"] = "full",
    num_threads: int | None = None,
    check_finite: bool = False,
) -> tuple[Array, Callable[[npt.ArrayLike], AttentionGradients]]:
    """Softmax attention and its vector-Jacobian product, both in O(L) memory.

    Parameters
    ----------
    q, k, v : array_like
        As in `exact_attention`.
    causal, window, scale, key_mask, key_bias, decay, cu_seqlens, enable_gqa, precision : optional
        As in `exact_attention`.  With ``precision="bfloat16"`` the pullback computes in float32.
    num_threads : int, optional
        Of this call and of the pullback.  Both results are the same for any number.
    check_finite : bool, default False
        Refuse NaN and infinity in the inputs and in `grad_out`.

    Returns
    -------
    out : ndarray, shape (..., L_q, dv)
        What `exact_attention` returns.
    pullback : callable
        ``grads = pullback(grad_out)``, for `grad_out` of the shape of `out`, any number of times.
        `grads` has the fields q, k, v, key_bias and decay (see `AttentionGradients`): the gradients
        of ``(out * grad_out).sum()``, each in the shape and dtype of its input, summed over what
        was broadcast and over grouped heads.

    Raises
    ------
    TypeError, ValueError
        As `exact_attention`; the pullback, if `grad_out` is not real or has another shape.

    Notes
    -----
    Probabilities are computed anew, tile by tile (Dao et al. 2022, arXiv:2205.14135), from the
    inputs, `out` and the denominators of its rows.  These arrays are not copied: leave them as they
    are until the last pullback.

    A masked key and a row with no key have zero gradient.  If `causal`, the gradients of k, v,
    `key_bias` and `decay` at position t do not depend on `grad_out` before t, to the bit; NaN in
    row i of `grad_out` or q spoils row i of the gradient of q and the keys that row i sees.  Where
    a logit passes 2**19 the whole gradient is computed in float64.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> q, k = np.array([[0.0, 1.0]]), np.array([[0.0, 0.0], [0.0, 1.0]])
    >>> out, pullback = favor_np.exact_attention_vjp(q, k, np.eye(2), scale=1.0)
    >>> grads = pullback(np.array([[0.0, 1.0]]))
    >>> grads.q.round(4)
    array([[0.    , 0.1966]])
    >>> grads.v.round(4)
    array([[0.    , 0.2689],
           [0.    , 0.7311]])
    """
    call = _check(
        q,
        k,
        v,
        scale,
        window,
        cu_seqlens,
        decay,
        causal=causal,
        key_mask=key_mask,
        key_bias=key_bias,
        enable_gqa=enable_gqa,
        num_threads=num_threads,
        check_finite=check_finite,
    )
    call.bfloat16 = validation.is_bfloat16(precision, call.compute)
    out, forward, rows = _attend(call, keep=True)

    def pullback(grad_out: npt.ArrayLike) -> AttentionGradients:
        g = processor().cotangent(call, grad_out)
        inputs = call.q, call.k, call.v
        keys = (*call.state_shape, call.keys)
        leads = call.out_shape[:-1], keys, keys
        shapes = [(*lead, x.shape[-1]) for lead, x in zip(leads, inputs, strict=True)]
        kinds = [np.dtype(np.float64) if forward is None else forward.out.dtype] * 3
        if call.log2_bias is not None:
            shapes, kinds = [*shapes, keys], [*kinds, np.dtype(np.float64)]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            if forward is None:
                grads = list(map(np.zeros, shapes))
            else:
                grads = list(map(np.empty, shapes, kinds))
                seen, (w, tops) = call, forward.normalizers
                if len(rows):  # the kernel sees no key of theirs
                    queries, w = np.broadcast_to(call.q, shapes[0]).copy(), w.copy()
                    queries[tuple(rows.T)], w[tuple(rows.T)] = 0, 0
                    seen = replace(call, q=queries)
                processor().exact_vjp(seen, Forward(forward.out, (w, tops)), g, grads)
                _add_rows(call, rows, g, grads)
            found = AttentionGradients(*map(sum_to, grads[:3], inputs))
            if call.key_bias is not None:
                found.key_bias = sum_to(grads[3], call.key_bias)
            if call.gates is not None:
                found.decay = sum_to(decays.gradient_of(call, grads[3]), call.gates)
            return found

    return out, pullback


def _check(
    q: object,
    k: object,
    v: object,
    scale: object,
    window: object,
    cu_seqlens: object,
    decay: object,
    **options: Unpack[Options],
) -> Call:
    """Check the arguments of exact attention."""
    call = processor().check(q, k, v, **options)
    call.scale = float(call.q.shape[-1]) ** -0.5
    if scale is not None:
        call.scale = validation.positive_float("scale", scale)
    call.band = validation.band(window, causal=call.causal)
    if cu_seqlens is not None:
        call.offsets = validation.sequence_offsets(cu_seqlens, call.keys, call.q.shape[-2])
    if decay is not None:
        decays.set_decay(call, decay)
    return call


def _attend(call: Call, *, keep: bool = False) -> tuple[Array, Forward | None, Array]:
    """Return the result and, to `keep` for a gradient, what it left; None if nothing was computed.

    Last come the rows whose logits are beyond the kernels.
    """
    engine = processor()
    result, target = engine.outputs(call)
    saved, rows = target, np.empty((0, len(call.out_shape) - 1), np.intp)
    normalizers: Any = None
    if target.size and not call.keys:
        target[...] = 0
    elif target.size:

        def compute(to: Array) -> bool:
            nonlocal normalizers
            normalizers = engine.normalizers(to) if keep else None
            return engine.attend_exact(call, to, normalizers)

        fits = compute(target)
        if not fits and target.dtype == np.float32:
            saved = np.empty(target.shape)
            fits = compute(saved)
            with np.errstate(all="ignore"):  # what is beyond the kernels is computed below
                large = _too_large(call, 4)[..., None]
                np.copyto(target, saved, where=large, casting="same_kind")
        if not fits:
            from favor_np.cpu.scaling import means

            rows = np.argwhere(_too_large(call, 8))
            for row in _each_row(call, rows):
                target[row.at] = means(row.weights @ (row.v / 2), 1)
    forward = None if normalizers is None else Forward(saved, normalizers)
    return engine.finish(call, result, target), forward, rows


class _Row(NamedTuple):
    """One row of queries, the keys and values it sees, and its softmax weights, all in float64."""

    at: tuple[int, ...]
    of: tuple[int, ...]
    seen: Array
    q: Array
    k: Array
    v: Array
    weights: Array


def _each_row(call: Call, rows: Array) -> Iterator[_Row]:
    """Go through some rows of the result, computed as the formula says."""
    lead, own = call.out_shape[:-2], call.state_shape
    queries = np.broadcast_to(call.q, (*lead, *call.q.shape[-2:]))
    keys, values = (np.broadcast_to(x, (*own, *x.shape[-2:])) for x in (call.k, call.v))
    mask, log2_bias = (
        None if x is None else np.broadcast_to(x, (*own, call.keys))
        for x in (call.mask, call.log2_bias)
    )
    left, right = call.band
    for at in map(tuple, rows.tolist()):
        *head, i = at
        if call.grouped:
            head[-1] //= lead[-1] // own[-1]
        of = tuple(
            n if count > 1 else 0
            for n, count in zip(head[len(lead) - len(own) :], own, strict=True)
        )
        first, last = 0, call.keys
        if call.offsets is not None:
            sequence = np.searchsorted(call.offsets, i, "right")
            first, last = call.offsets[sequence - 1 : sequence + 1]
        seen = np.arange(max(first, i - left), min(last, i + right + 1))
        if mask is not None:
            seen = seen[mask[of][seen]]
        q, k, v = (x.astype(np.float64) for x in (queries[at], keys[of][seen], values[of][seen]))
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            logits = k @ (q * call.scale)
            if log2_bias is not None:
                logits += log2_bias[of][seen] * numerics.LN2
            weights = np.exp(logits - logits.max(initial=-np.inf))
        yield _Row(at, of, seen, q, k, v, weights / weights.sum())


def _add_rows(call: Call, rows: Array, g: Array, grads: list[Array]) -> None:
    """Add what some rows have in the gradients: of all query heads, and of the keys' problems."""
    dq, dk, dv, *d_bias = grads
    for row in _each_row(call, rows):
        (v, by), (cotangent, more) = _small(row.v), _small(g[row.at].astype(np.float64))
        of_values = v @ cotangent
        of_biases = row.weights * (of_values - row.weights @ of_values)
        of_logits = of_biases * call.scale
        dq[row.at] = np.ldexp(of_logits @ row.k, by + more)
        dk[row.of][row.seen] += np.ldexp(np.outer(of_logits, row.q), by + more)
        dv[row.of][row.seen] += np.ldexp(np.outer(row.weights, cotangent), more)
        for grad in d_bias:
            grad[row.of][row.seen] += np.ldexp(of_biases, by + more)


def _small(x: Array) -> tuple[Array, int]:
    """Return numbers of at most one, and the power of two by which they are smaller than these."""
    power = max(0, int(np.frexp(np.abs(x[np.isfinite(x)]).max(initial=0))[1]))
    return np.ldexp(x, -power), power


def _too_large(call: Call, size: int) -> npt.NDArray[np.bool_]:
    """Return which rows see a logit that floats of so many bytes cannot resolve.

    Row by row: no later key decides how an earlier row is computed.
    """
    q, k = map(_norms, (call.q, call.k))
    k = np.where(np.isfinite(k), k, 0.0)
    if call.mask is not None:
        k = np.where(call.mask, k, 0.0)
    if call.grouped:
        k = np.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    longest = _longest_seen(call, k)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        limit = numerics.longest_row(size, call.scale)
        rows = (q * longest > LARGEST_LOGIT[size] / call.scale) | (q >= limit) | (longest >= limit)
        rows &= np.isfinite(q)
    return np.broadcast_to(rows, call.out_shape[:-1])


def _longest_seen(call: Call, norms: Array) -> Array:
    """Return the largest norm of a key that each query sees, or one for all."""
    left, right = call.band
    if call.offsets is None and min(left, right) >= call.keys:
        whole: Array = norms.max(-1, keepdims=True)
        return whole
    queries = call.q.shape[-2]
    longest = np.zeros((*norms.shape[:-1], queries))
    offsets = [0, max(queries, call.keys)] if call.offsets is None else call.offsets.tolist()
    for start, stop in itertools.pairwise(offsets):
        end = min(stop, queries)
        longest[..., start:end] = _running_maxima(norms[..., start:stop], left, right, end - start)
    return longest


def _running_maxima(x: Array, left: int, right: int, count: int) -> Array:
    """Return for each i < count the largest of x[i - left] to x[i + right], all of them positive.

    Within blocks as long as the window these are two running maxima (van Herk 1992).
    """
    size = x.shape[-1]
    left, right = min(left, max(size, count)), min(right, size)
    width = left + right + 1
    padded = np.zeros((*x.shape[:-1], -(-(left + max(size, count) + right) // width) * width))
    padded[..., left : left + size] = x
    blocks = padded.reshape(*x.shape[:-1], -1, width)
    ahead = np.maximum.accumulate(blocks, axis=-1).reshape(padded.shape)
    back = np.maximum.accumulate(blocks[..., ::-1], axis=-1)[..., ::-1].reshape(padded.shape)
    return np.maximum(back[..., :count], ahead[..., width - 1 :][..., :count])


def _norms(x: Array) -> Array:
    """Return the norms of rows, without overflow; NaN where one is not finite."""
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore", under="ignore"):
        largest = abs(x).max(-1, keepdims=True)
        norms: Array = (
            np.sqrt(((x / np.where(largest > 0, largest, 1)) ** 2).sum(-1)) * largest[..., 0]
        )
    return norms
