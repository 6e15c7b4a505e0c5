"""Slow, obvious references in extended precision: what the fast code is tested against.

Everything is dense, one row after another, in log space, with no stabiliser and no epsilon.
`longdouble` has 64 bits of precision and exponents up to 16383 on x86 (elsewhere it may be
float64; the tests' inputs stay in its range).

Attention and its gradients take the arguments and the options of the public functions of the same
names.  Of a feature map only its projection, kind, scale, antithetic and kernel_epsilon are read.
"""

import itertools

import numpy as np

REAL = np.longdouble


# -- Features -------------------------------------------------------------------------------------


def log_features(x, W, kind="positive", scale=None, antithetic=False, kernel_epsilon=1e-3):
    """Log of phi_r(x) for x (L, d) and W (m, d), without the factor 1/sqrt(M): (L, M)."""
    x, W = np.asarray(x, REAL), np.asarray(W, REAL)
    scale = REAL(x.shape[-1]) ** REAL(-0.5) if scale is None else REAL(scale)
    x = np.sqrt(scale) * x
    y = x @ W.T
    if kind == "positive":
        y = np.concatenate([y, -y], axis=-1) if antithetic else y
        return y - np.sum(x * x, axis=-1, keepdims=True) / 2
    if kind == "relu":
        return np.log(np.maximum(y, 0) + REAL(kernel_epsilon))
    if kind == "elu":  # elu(y) + 1 is exp(y) below zero and y + 1 above
        return np.where(y > 0, np.log1p(np.maximum(y, 0)), y)
    raise ValueError(kind)


def features(x, W, kind="positive", scale=None, antithetic=False, kernel_epsilon=1e-3):
    """phi(x) as in the papers, with the factor 1/sqrt(M): (L, M)."""
    if kind == "trig":
        x, W = np.asarray(x, REAL), np.asarray(W, REAL)
        x = np.sqrt(REAL(x.shape[-1]) ** REAL(-0.5) if scale is None else REAL(scale)) * x
        waves = np.concatenate([np.cos(x @ W.T), np.sin(x @ W.T)], axis=-1)
        return np.exp(np.sum(x * x, axis=-1, keepdims=True) / 2) * waves / np.sqrt(REAL(len(W)))
    log_phi = log_features(x, W, kind, scale, antithetic, kernel_epsilon)
    return np.exp(log_phi) / np.sqrt(REAL(log_phi.shape[-1]))


def slopes(x, W, scale, kind="positive", antithetic=False, kernel_epsilon=1e-3):
    """Derivatives of the log-features in the projections y."""
    y = np.sqrt(scale) * np.asarray(x, REAL) @ W.T
    if kind == "relu":
        return (y > 0) / (np.maximum(y, 0) + REAL(kernel_epsilon))
    if kind == "elu":
        return 1 / (1 + np.maximum(y, 0))
    return np.ones((len(y), len(W) * (1 + antithetic)), REAL)


def map_options(feature_map):
    """The options of `log_features` that a feature map has."""
    assert feature_map.calibration is None, "the oracle knows no calibration"
    names = "kind", "scale", "antithetic", "kernel_epsilon"
    return {name: getattr(feature_map, name) for name in names}


# -- Heads, masks, sequences ----------------------------------------------------------------------


def each_head(q, *arrays, enable_gqa=False):
    """Split arrays into heads: the leading shape, and for every head its index and its arrays.

    Each of the other arrays comes with the number of axes that it has in one head; those in front
    are broadcast.  With `enable_gqa` all but q have fewer heads, each shared by a group of queries.
    """
    q = np.asarray(q)
    arrays = [(np.asarray(array), axes) for array, axes in arrays]
    if enable_gqa:
        arrays = [(repeat_heads(array, -1 - axes, q.shape[-3]), axes) for array, axes in arrays]
    arrays = [(q, 2), *arrays]
    lead = np.broadcast_shapes(*(x.shape[: x.ndim - axes] for x, axes in arrays))
    whole = [np.broadcast_to(x, lead + x.shape[x.ndim - axes :]) for x, axes in arrays]
    whole = [x if x.dtype == bool else x.astype(REAL) for x in whole]
    return lead, [(i, *(x[i] for x in whole)) for i in np.ndindex(lead)]


def repeat_heads(array, axis, heads):
    """Query head h uses key head h // (heads of queries / heads of keys)."""
    if array.ndim < -axis or array.shape[axis] == 1:
        return array
    return np.repeat(array, heads // array.shape[axis], axis)


def every_key(k, key_mask):
    return np.ones(np.shape(k)[-2], bool) if key_mask is None else np.asarray(key_mask, bool)


def sequence_of(i, num_keys, cu_seqlens):
    """Which sequence row i belongs to, and where its keys start and stop."""
    if cu_seqlens is None:
        return 0, 0, num_keys
    n = int(np.searchsorted(cu_seqlens, i, side="right")) - 1
    return n, cu_seqlens[n], cu_seqlens[n + 1]


def visible_keys(i, key_mask, causal, cu_seqlens=None, window=None):
    """Indices of the keys that query i attends to; not causal, the window is (left, right)."""
    _, start, stop = sequence_of(i, len(key_mask), cu_seqlens)
    if causal:
        stop = i + 1
        window = (None if window is None else window - 1), 0
    left, right = (None, None) if window is None else window
    if left is not None:
        start = max(start, i - left)
    if right is not None:
        stop = min(stop, i + right + 1)
    return np.array([j for j in range(start, stop) if key_mask[j]], int)


def log_weights(
    num_queries, key_mask, causal, cu_seqlens=None, window=None, decay=1, key_bias=None, gates=None
):
    """What the kernel of query i and key j is multiplied by, as a log: (Lq, Lk).

    `gates` are factors of a token each, by which it multiplies the weights of all keys before it.
    """
    weights = np.full((num_queries, len(key_mask)), -np.inf, REAL)
    bias = np.zeros(len(key_mask), REAL) if key_bias is None else key_bias
    faded = np.zeros(len(key_mask), REAL) if gates is None else np.cumsum(np.log(gates))
    for i in range(num_queries):
        keys = visible_keys(i, key_mask, causal, cu_seqlens, window)
        weights[i, keys] = (i - keys) * np.log(REAL(decay)) + bias[keys]
        if gates is not None and causal:
            weights[i, keys] += faded[i] - faded[keys]
    return weights


def decay_parts(decay, lead, length):
    """A decay as `each_head` takes it: a constant a head, and factors a token if these are such."""
    if decay is not None and np.ndim(decay) == lead + 1:
        return (1, 0), (decay, 1)
    return (1 if decay is None else decay, 0), (np.ones(length), 1)


def unbroadcast(grad, shape):
    """Sum over leading axes that were added or stretched, and over groups of heads (axis -3)."""
    grad = grad.sum(tuple(range(grad.ndim - len(shape))))
    for axis in range(len(shape) - 2):
        groups = *grad.shape[:axis], shape[axis], -1, *grad.shape[axis + 1 :]
        grad = grad.reshape(groups).sum(axis + 1)
    return grad


def weighted_mean(log_weights, v):
    """Mean of the rows of v (n, dv) with weights exp(log_weights) (n,); zeros if n is 0."""
    if len(v) == 0:
        return np.zeros(v.shape[-1], REAL)
    weights = np.exp(log_weights - log_weights.max())
    return weights @ v / weights.sum()


# -- FAVOR attention ------------------------------------------------------------------------------


def content(state):
    """S and z of a state, without the power of two they are stored with."""
    return (
        np.ldexp(np.asarray(state.S, REAL), state.c[..., None]),
        np.ldexp(np.asarray(state.z, REAL), state.c),
    )


def favor_attention(
    q, k, v, feature_map, *, causal=False, key_mask=None, enable_gqa=False, cu_seqlens=None,
    window=None, decay=None, state=None, return_state=False, key_bias=None,
):  # fmt: skip
    """Dense FAVOR attention; the state that is returned is the pair (S, z) as of `content`."""
    packed, ends = cu_seqlens is not None, [0, np.shape(k)[-2]]
    ends = cu_seqlens if packed else ends
    if state is None:
        sums = np.zeros((len(ends) - 1, feature_map.num_features, np.shape(v)[-1] + 1), REAL)
    else:
        S, z = content(state)
        decay = state.decay if decay is None else decay
        sums = np.concatenate([S, z[..., None]], axis=-1)
        sums = sums if packed else sums[..., None, :, :]
    bias = np.zeros(np.shape(k)[-2]) if key_bias is None else key_bias
    mask = every_key(k, key_mask) & ~np.isneginf(bias)
    batch = max(np.ndim(k) - 2, np.ndim(v) - 2, np.ndim(mask) - 1)
    lead, heads = each_head(
        q, (k, 2), (v, 2), (feature_map.projection, 2), (mask, 1), (bias, 1),
        *decay_parts(decay, batch, np.shape(k)[-2]), (sums, 3), enable_gqa=enable_gqa,
    )  # fmt: skip
    out = np.zeros((*lead, np.shape(q)[-2], np.shape(v)[-1]), REAL)
    after = np.zeros((*lead, *sums.shape[-3:]), REAL)
    options = map_options(feature_map)
    for head, q1, k1, v1, W, mask, bias, rate, gates, before in heads:
        log_q, log_k = log_features(q1, W, **options), log_features(k1, W, **options)
        weights = log_weights(len(q1), mask, causal, cu_seqlens, window, rate, bias, gates)
        fades = np.r_[0, np.cumsum(np.log(gates))]
        for i in range(len(q1)):
            n, start, _ = sequence_of(i, len(k1), cu_seqlens)
            faded = (i - start) * np.log(rate)
            if causal:
                faded = faded + fades[i + 1] - fades[start]
            out[head][i] = favor_row(log_q[i], log_k, v1, weights[i], before[n], faded)
        for n, (start, stop) in enumerate(itertools.pairwise(ends)):
            keys = start + np.flatnonzero(mask[start:stop])
            later = (stop - keys) * np.log(rate) + bias[keys] + fades[stop] - fades[keys + 1]
            phi = np.exp(log_k[keys] + later[:, None])
            new = phi.T @ np.c_[v1[keys], np.ones(len(keys))]
            faded = (stop - start) * np.log(rate) + fades[stop] - fades[start]
            after[head][n] = np.exp(faded) * before[n] + new
    if not return_state:
        return out
    if enable_gqa:
        after = after[..., :: np.shape(q)[-3] // np.shape(k)[-3], :, :, :]
    after = after if packed else after[..., 0, :, :]
    return out, (after[..., :-1], after[..., -1])


def favor_row(log_q, log_k, v, log_weights, before, faded):
    """One row: a mean over its keys, and over the features of a state as if these were keys."""
    keys = np.isfinite(log_weights)
    terms = log_q + log_k[keys]  # (keys, M)
    top = np.max(terms, axis=-1, keepdims=True)
    log_kernel = np.log(np.exp(terms - top).sum(-1)) + top[:, 0]
    old = before[:, -1] > 0
    S, z = before[old, :-1], before[old, -1]
    return weighted_mean(
        np.concatenate([log_kernel + log_weights[keys], log_q[old] + np.log(z) + faded]),
        np.concatenate([v[keys], S / z[:, None]]),
    )


def favor_attention_vjp(
    q, k, v, feature_map, grad_out, *, causal=False, key_mask=None, enable_gqa=False,
    cu_seqlens=None, window=None, decay=None, key_bias=None,
):  # fmt: skip
    """Dense gradients of (out * grad_out).sum() by q, k, v, projection and, if given, key_bias."""
    bias = np.zeros(np.shape(k)[-2]) if key_bias is None else key_bias
    batch = max(np.ndim(k) - 2, np.ndim(v) - 2, np.ndim(bias) - 1)
    lead, heads = each_head(
        q, (k, 2), (v, 2), (feature_map.projection, 2), (every_key(k, key_mask), 1), (bias, 1),
        *decay_parts(decay, batch, np.shape(k)[-2]), enable_gqa=enable_gqa,
    )  # fmt: skip
    grad_out = np.broadcast_to(np.asarray(grad_out, REAL), (*lead, *np.shape(grad_out)[-2:]))
    shapes = [np.shape(x) for x in (q, k, v, feature_map.projection, bias[..., None])]
    grads = [np.zeros((*lead, *shape[-2:]), REAL) for shape in shapes]
    for head, q1, k1, v1, W, mask, bias1, rate, gates in heads:
        mask = mask & ~np.isneginf(bias1)
        weights = log_weights(len(q1), mask, causal, cu_seqlens, window, rate, bias1, gates)
        parts = favor_head_vjp(q1, k1, v1, W, grad_out[head], weights, **map_options(feature_map))
        for grad, part in zip(grads, parts, strict=True):
            grad[head] = part
    found = [unbroadcast(grad, shape) for grad, shape in zip(grads, shapes, strict=True)]
    return (*found[:4], found[4][..., 0]) if key_bias is not None else tuple(found[:4])


def favor_head_vjp(q, k, v, W, grad, log_weights, scale, **options):
    """Gradients (q, k, v, W, bias) of one head; log_weights (Lq, Lk) are -inf where a query sees no key."""
    seen = np.isfinite(log_weights)
    k, v = (np.where(seen.any(0)[:, None], x, 0) for x in (k, v))
    W = np.asarray(W, REAL)
    slope_q, slope_k = (slopes(x, W, scale, **options) for x in (q, k))
    if options["antithetic"]:
        W = np.concatenate([W, -W])
    log_q, log_k = (
        log_features(x, W, scale=scale, **options | {"antithetic": False}) for x in (q, k)
    )
    log_t = np.where(seen[:, :, None], log_q[:, None] + log_k + log_weights[:, :, None], -np.inf)
    top = np.max(log_t, axis=(1, 2), keepdims=True, initial=-np.inf)
    t = np.exp(log_t - np.where(np.isneginf(top), 0, top))
    t /= np.where(seen.any(1)[:, None, None], t.sum((1, 2), keepdims=True), 1)  # (Lq, Lk, M)
    a = t.sum(-1)
    g = np.where(seen, grad @ v.T - np.sum(grad * (a @ v), -1, keepdims=True), 0)
    e_q, e_k = np.einsum("ijr,ij->ir", t, g), np.einsum("ijr,ij->jr", t, g)
    dq, dk = (np.sqrt(scale) * (e * s) @ W for e, s in ((e_q, slope_q), (e_k, slope_k)))
    if options["kind"] == "positive":
        dk -= scale * k * e_k.sum(-1, keepdims=True)
    dW = np.sqrt(scale) * (
        (e_q * slope_q).T @ np.where(seen.any(1)[:, None], q, 0) + (e_k * slope_k).T @ k
    )
    if options["antithetic"]:
        dW = dW[: len(W) // 2] - dW[len(W) // 2 :]
    return dq, dk, a.T @ grad, dW, np.sum(a * g, 0)[:, None]


# -- Exact attention ------------------------------------------------------------------------------


def every_bias(k, key_bias, decay, cu_seqlens):
    """What is added to the logits of keys: as given, and by a decay (..., L) of tokens."""
    length = np.shape(k)[-2]
    bias = np.zeros(length, REAL) if key_bias is None else np.asarray(key_bias, REAL)
    if decay is None:
        return bias
    logs = np.log(np.broadcast_to(np.asarray(decay, REAL), (*np.shape(decay)[:-1], length)))
    ends = [0, length] if cu_seqlens is None else cu_seqlens
    sums = [logs[..., start:stop].cumsum(-1) for start, stop in itertools.pairwise(ends)]
    return bias - np.concatenate(sums, axis=-1)


def exact_attention(
    q, k, v, *, causal=False, scale=None, key_mask=None, enable_gqa=False, window=None,
    cu_seqlens=None, key_bias=None, decay=None,
):  # fmt: skip
    """Dense softmax attention; `decay` has a last axis, of one factor or one a token."""
    scale = REAL(np.shape(q)[-1]) ** REAL(-0.5) if scale is None else REAL(scale)
    bias = every_bias(k, key_bias, decay, cu_seqlens)
    lead, heads = each_head(
        q, (k, 2), (v, 2), (every_key(k, key_mask), 1), (bias, 1), enable_gqa=enable_gqa
    )
    out = np.zeros((*lead, np.shape(q)[-2], np.shape(v)[-1]), REAL)
    for head, q1, k1, v1, mask, b1 in heads:
        for i in range(len(q1)):
            keys = visible_keys(i, mask & (b1 > -np.inf), causal, cu_seqlens, window)
            out[head][i] = weighted_mean(scale * (k1[keys] @ q1[i]) + b1[keys], v1[keys])
    return out


def exact_attention_vjp(
    q, k, v, grad_out, *, causal=False, scale=None, key_mask=None, enable_gqa=False, window=None,
    cu_seqlens=None, key_bias=None, decay=None,
):  # fmt: skip
    """Dense gradients of (out * grad_out).sum() by q, k and v; with a bias or a decay by it, too."""
    scale = REAL(np.shape(q)[-1]) ** REAL(-0.5) if scale is None else REAL(scale)
    bias = every_bias(k, key_bias, decay, cu_seqlens)
    lead, heads = each_head(
        q, (k, 2), (v, 2), (every_key(k, key_mask), 1), (bias, 1), enable_gqa=enable_gqa
    )
    grad_out = np.asarray(grad_out, REAL)
    shapes = [np.shape(x) for x in (q, k, v)]
    grads = [np.zeros((*lead, *shape[-2:]), REAL) for shape in shapes]
    by_bias = np.zeros((*lead, np.shape(k)[-2]), REAL)
    for head, q1, k1, v1, mask, b1 in heads:
        seen = [
            visible_keys(i, mask & (b1 > -np.inf), causal, cu_seqlens, window)
            for i in range(len(q1))
        ]
        *parts, by_bias[head] = exact_head_vjp(q1, k1, v1, grad_out[head], scale, b1, seen)
        for grad, part in zip(grads, parts, strict=True):
            grad[head] = part
    found = [unbroadcast(grad, shape) for grad, shape in zip(grads, shapes, strict=True)]
    if key_bias is not None:
        found.append(unbroadcast(by_bias[..., None], (*np.shape(key_bias), 1))[..., 0])
    if decay is not None:
        by_log = np.zeros_like(by_bias)
        ends = [0, np.shape(k)[-2]] if cu_seqlens is None else cu_seqlens
        for start, stop in itertools.pairwise(ends):
            for t in range(start, stop):
                by_log[..., t] = -by_bias[..., t:stop].sum(-1)
        found.append(unbroadcast(by_log[..., None], (*np.shape(decay), 1))[..., 0] / decay)
    return found


def exact_head_vjp(q, k, v, g, scale, bias, seen):
    dq, dk, dv, db = (np.zeros_like(x) for x in (q, k, v, bias))
    for i, keys in enumerate(seen):
        if len(keys):
            logits = scale * (k[keys] @ q[i]) + bias[keys]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            ds = p * (v[keys] @ g[i] - p @ v[keys] @ g[i])
            dq[i] = scale * ds @ k[keys]
            dk[keys] += scale * np.outer(ds, q[i])
            dv[keys] += np.outer(p, g[i])
            db[keys] += ds
    return dq, dk, dv, db
