"""Exact softmax attention: the baseline, and the better choice for short sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation

Array: TypeAlias = npt.NDArray[Any]

#: Beyond it a logit has an error of about a per cent: from float32 it is computed in float64, and from there
#: row by row.
LARGEST_LOGIT = {4: 2.0**19, 8: 2.0**47}


def exact_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: npt.ArrayLike | None = None,
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
    scale : float, optional
        Factor of the logits, default d ** -0.5.
    key_mask : array_like of bool, shape (..., L_k), optional
        True where a key takes part.  A masked key vanishes wholly, NaN in it included.
    enable_gqa : bool, default False
        Grouped queries: axis -3 of `q` is a multiple of that of `k` and `v`, and query head h
        uses their head ``h // (heads of q / heads of k)``.
    precision : {"full", "bfloat16"}, default "full"
        "bfloat16": matrix products of numbers rounded to 8 bits, summed in float32; not for
        float64.  Almost three times as fast on processors with a matrix unit (AMX), one and a half
        times on others with AVX512_BF16, slower elsewhere.
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
        positive, `precision` is "bfloat16" with float64 (integers included), or `check_finite`
        is set and an array is not finite.

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
    call, factor = _checked(q, k, v, key_mask, causal, scale, enable_gqa, num_threads, check_finite)
    return _attend(call, factor, words=validation.in_words(precision, call.compute))[0]


class AttentionGradients(NamedTuple):
    """What a pullback returns: one array for each input, of its shape and dtype."""

    q: Array
    k: Array
    v: Array


def exact_attention_vjp(
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
) -> tuple[Array, Callable[[npt.ArrayLike], AttentionGradients]]:
    """Softmax attention and its vector-Jacobian product, both in O(L) memory.

    Parameters
    ----------
    q, k, v : array_like
        As in `exact_attention`.
    causal, scale, key_mask, enable_gqa : optional
        As in `exact_attention`.
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
        `grads` has the fields q, k and v: the gradients of ``(out * grad_out).sum()``, each in the
        shape and dtype of its input, summed over what was broadcast and over grouped heads.

    Raises
    ------
    TypeError, ValueError
        As `exact_attention`; the pullback, if `grad_out` is not real or has another shape.

    Notes
    -----
    Probabilities are computed anew, tile by tile (Dao et al. 2022, arXiv:2205.14135), from the
    inputs, `out` and the denominators of its rows.  These arrays are not copied: leave them as they
    are until the last pullback.

    A masked key and a row with no key have zero gradient.  If `causal`, the gradients of k and v at
    position t do not depend on `grad_out` before t, to the bit; NaN in row i of `grad_out` or q
    spoils row i of the gradient of q and the keys that row i sees.  Where a logit passes 2**19 the
    whole gradient is computed in float64.

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
    call, factor = _checked(q, k, v, key_mask, causal, scale, enable_gqa, num_threads, check_finite)
    out, saved, weights, rows = _attend(call, factor, keep=True)

    def pullback(grad_out: npt.ArrayLike) -> AttentionGradients:
        g = validation.cotangent(grad_out, call.out_shape, check_finite=check_finite)
        inputs = call.q, call.k, call.v
        keys = (*call.state_shape, call.keys)
        leads = call.out_shape[:-1], keys, keys
        shapes = [(*lead, x.shape[-1]) for lead, x in zip(leads, inputs, strict=True)]

        def differentiate(v: Array, saved: Array, g: Array) -> list[Array]:
            from favor_np import launch

            assert weights is not None
            grads = [np.empty(shape, saved.dtype) for shape in shapes]
            queries, w = call.q, weights[0]
            if len(rows):  # the kernel sees no key of theirs
                queries = np.broadcast_to(call.q, shapes[0]).copy()
                queries[tuple(rows.T)] = 0
                w = w.copy()
                w[tuple(rows.T)] = 0
            launch.differentiate_exact(
                queries, call.k, v, call.mask, saved, (w, weights[1]), g, grads,
                dtype=saved.dtype, causal=call.causal, scale=factor, grouped=call.grouped,
                threads=call.threads,
            )  # fmt: skip
            _add_rows(dataclasses.replace(call, v=v), factor, rows, g, grads)
            return grads

        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            if weights is None:
                grads = [np.zeros(shape) for shape in shapes]
            else:
                grads = differentiate(call.v, saved, g)
                if not all(np.isfinite(grad).all() for grad in grads):
                    _fill_large(
                        grads, differentiate, *(x.astype(saved.dtype) for x in (call.v, saved, g))
                    )
            return AttentionGradients(*map(sum_to, grads, inputs))

    return out, pullback


def _fill_large(
    grads: list[Array], differentiate: Callable[..., list[Array]], v: Array, out: Array, g: Array
) -> None:
    """Put numbers where products of values and cotangents, or sums of them, have overflowed."""
    from favor_np import scaling

    powers = scaling.powers_of((v, out), (g,))
    if powers is None:
        return
    values, cotangents = powers
    small = differentiate(
        scaling.scaled(v, -values), scaling.scaled(out, -values), scaling.scaled(g, -cotangents)
    )
    both = values + cotangents
    for grad, other, power in zip(grads, small, (both, both, cotangents), strict=True):
        scaling.fill(grad, scaling.scaled(other, power))


def _checked(
    q: object, k: object, v: object, key_mask: object, causal: object, scale: object,
    enable_gqa: object, num_threads: object, check_finite: object,
) -> tuple[validation.AttentionCall, float]:  # fmt: skip
    """Return the checked arguments and the scale."""
    call = validation.attention_call(
        q, k, v, key_mask=key_mask, causal=causal, grouped=enable_gqa, check_finite=check_finite,
        num_threads=num_threads,
    )  # fmt: skip
    if scale is None:
        return call, float(call.q.shape[-1]) ** -0.5
    return call, validation.positive_float("scale", scale)


def _attend(
    call: validation.AttentionCall, scale: float, *, keep: bool = False, words: bool = False
) -> tuple[Array, Array, tuple[Array, Array] | None, Array]:
    """Return the result and, for a gradient, the same as computed and the rows' denominators.

    There are none where nothing was computed.  Last come the rows whose logits are beyond the kernels.
    """
    result, target = call.targets(None)
    saved, weights, rows = target, None, np.empty((0, len(call.out_shape) - 1), np.intp)
    if target.size and not call.keys:
        target[...] = 0
    elif target.size:
        from favor_np import launch

        def compute(to: Array) -> tuple[bool, tuple[Array, Array] | None]:
            weights = launch.new_weights(to) if keep else None
            fits = launch.attend_exact(
                call.q, call.k, call.v, call.mask, to,
                dtype=to.dtype, causal=call.causal, scale=scale, grouped=call.grouped,
                threads=call.threads, weights=weights, words=words and to.dtype == np.float32,
            )  # fmt: skip
            return fits, weights

        fits, weights = compute(target)
        if not fits and target.dtype == np.float32:
            saved = np.empty(target.shape)
            fits, weights = compute(saved)
            with np.errstate(all="ignore"):  # what is beyond the kernels is computed below
                large = _too_large(call, scale, 4)[..., None]
                np.copyto(target, saved, where=large, casting="same_kind")
        if not fits:
            rows = np.argwhere(_too_large(call, scale, 8))
            from favor_np import scaling

            for row in _each_row(call, scale, rows):
                target[row.at] = scaling.means(row.weights @ (row.v / 2), 1)
    if target is not result:
        result[...] = target
    return result, saved, weights, rows


class _Row(NamedTuple):
    """One row of queries, the keys and values it sees, and its softmax weights, all in float64."""

    at: tuple[int, ...]
    of: tuple[int, ...]
    seen: Array
    q: Array
    k: Array
    v: Array
    weights: Array


def _each_row(call: validation.AttentionCall, scale: float, rows: Array) -> Iterator[_Row]:
    """Go through some rows of the result, computed as the formula says."""
    lead, own = call.out_shape[:-2], call.state_shape
    queries = np.broadcast_to(call.q, (*lead, *call.q.shape[-2:]))
    keys, values = (np.broadcast_to(x, (*own, *x.shape[-2:])) for x in (call.k, call.v))
    mask = None if call.mask is None else np.broadcast_to(call.mask, (*own, call.keys))
    for at in map(tuple, rows.tolist()):
        *head, i = at
        if call.grouped:
            head[-1] //= lead[-1] // own[-1]
        of = tuple(
            n if count > 1 else 0
            for n, count in zip(head[len(lead) - len(own) :], own, strict=True)
        )
        seen = np.arange(i + 1 if call.causal else call.keys)
        if mask is not None:
            seen = seen[mask[of][seen]]
        q, k, v = (x.astype(np.float64) for x in (queries[at], keys[of][seen], values[of][seen]))
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            logits = k @ (q * scale)
            weights = np.exp(logits - logits.max())
        yield _Row(at, of, seen, q, k, v, weights / weights.sum())


def _add_rows(
    call: validation.AttentionCall, scale: float, rows: Array, g: Array, grads: list[Array]
) -> None:
    """Add what some rows have in the gradients: of all query heads, and of the keys' problems."""
    dq, dk, dv = grads
    for row in _each_row(call, scale, rows):
        cotangent = g[row.at].astype(np.float64)
        of_values = row.v @ cotangent
        of_logits = row.weights * (of_values - row.weights @ of_values) * scale
        dq[row.at] = of_logits @ row.k
        dk[row.of][row.seen] += np.outer(of_logits, row.q)
        dv[row.of][row.seen] += np.outer(row.weights, cotangent)


def sum_to(grad: Array, like: Array) -> Array:
    """Return the gradient of an array that was broadcast: summed to its shape, in its dtype."""
    shape = (1,) * (grad.ndim - like.ndim) + like.shape
    axes = tuple(i for i, n in enumerate(shape) if n != grad.shape[i])
    if axes:
        grad = grad.sum(axes, dtype=np.float64, keepdims=True)
    return grad.reshape(like.shape).astype(like.dtype.newbyteorder("="), copy=False)


def _too_large(call: validation.AttentionCall, scale: float, size: int) -> npt.NDArray[np.bool_]:
    """Return which rows see a logit that floats of so many bytes cannot resolve.

    Row by row: no later key decides how an earlier row is computed.
    """
    from favor_np import plan

    q, k = map(_norms, (call.q, call.k))
    k = np.where(np.isfinite(k), k, 0.0)
    if call.mask is not None:
        k = np.where(call.mask, k, 0.0)
    if call.grouped:
        k = np.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    longest = np.maximum.accumulate(k, axis=-1) if call.causal else k.max(-1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        limit = plan.longest_row(size, scale)
        rows = (q * longest > LARGEST_LOGIT[size] / scale) | (q >= limit) | (longest >= limit)
        rows &= np.isfinite(q)
    return np.broadcast_to(rows, call.out_shape[:-1])


def _norms(x: Array) -> Array:
    """Return the norms of rows, whose squares may be too large for float64; NaN if one is not finite."""
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore", under="ignore"):
        largest = abs(x).max(-1, keepdims=True)
        norms: Array = (
            np.sqrt(((x / np.where(largest > 0, largest, 1)) ** 2).sum(-1)) * largest[..., 0]
        )
    return norms
