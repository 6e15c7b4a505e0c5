"""Slow, obvious references in extended precision: what the fast code is tested against.

Everything is dense, one row after another, in log space, with no stabiliser and no epsilon.
`longdouble` has 64 bits of precision and exponents up to 16383 on x86 (elsewhere it may be
float64; the tests' inputs stay in its range).
"""

import numpy as np

REAL = np.longdouble


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


def weighted_mean(log_weights, v):
    """Mean of the rows of v (n, dv) with weights exp(log_weights) (n,); zeros if n is 0."""
    if len(v) == 0:
        return np.zeros(v.shape[-1], REAL)
    weights = np.exp(log_weights - log_weights.max())
    return weights @ v / weights.sum()


def visible_keys(i, num_keys, causal, key_mask, cu_seqlens=None, window=None):
    """Indices of the keys that query i attends to."""
    start, stop = 0, num_keys
    if cu_seqlens is not None:
        start = max(offset for offset in cu_seqlens if offset <= i)
        stop = min(offset for offset in cu_seqlens if offset > i)
    if causal:
        stop = i + 1
    if window is not None:
        start = max(start, i + 1 - window)
    return [j for j in range(start, stop) if key_mask[j]]


def one_head_favor(q, k, v, W, causal, key_mask, cu_seqlens=None, window=None, decay=1, **options):
    log_q, log_k = log_features(q, W, **options), log_features(k, W, **options)
    out = np.zeros((len(q), v.shape[-1]), REAL)
    for i in range(len(q)):
        keys = visible_keys(i, len(k), causal, key_mask, cu_seqlens, window)
        terms = log_q[i] + log_k[keys]  # (keys, M)
        top = np.max(terms, axis=-1, keepdims=True)
        log_kernel = np.log(np.exp(terms - top).sum(-1)) + top[:, 0]
        age = i - np.array(keys, REAL)
        out[i] = weighted_mean(log_kernel + age * np.log(REAL(decay)), v[keys])
    return out


def one_head_exact(q, k, v, scale, causal, key_mask):
    out = np.zeros((len(q), v.shape[-1]), REAL)
    for i in range(len(q)):
        keys = visible_keys(i, len(k), causal, key_mask)
        out[i] = weighted_mean(scale * (k[keys] @ q[i]), v[keys])
    return out


def one_head_exact_vjp(q, k, v, g, scale, causal, key_mask):
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for i in range(len(q)):
        keys = visible_keys(i, len(k), causal, key_mask)
        if keys:
            logits = scale * (k[keys] @ q[i])
            p = np.exp(logits - logits.max())
            p /= p.sum()
            ds = p * (v[keys] @ g[i] - p @ v[keys] @ g[i])
            dq[i] = scale * ds @ k[keys]
            dk[keys] += scale * np.outer(ds, q[i])
            dv[keys] += np.outer(p, g[i])
    return dq, dk, dv


def heads(q, k, v, key_mask, enable_gqa):
    """Broadcast the leading axes and yield (index, q, k, v, mask) of every head."""
    q, k, v = (np.asarray(x, REAL) for x in (q, k, v))
    if enable_gqa:  # query head h uses key head h // (H / Hkv)
        k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
        v = np.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)
    mask = np.ones(k.shape[-2], bool) if key_mask is None else np.asarray(key_mask, bool)
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], mask.shape[:-1])
    q, k, v = (np.broadcast_to(x, lead + x.shape[-2:]) for x in (q, k, v))
    mask = np.broadcast_to(mask, lead + mask.shape[-1:])
    return [(i, q[i], k[i], v[i], mask[i]) for i in np.ndindex(lead)], lead


def favor_attention(q, k, v, W, causal=False, key_mask=None, enable_gqa=False, decay=1, **options):
    """Dense FAVOR attention; W (m, d) or (heads, m, d), options as of one_head_favor."""
    items, lead = heads(q, k, v, key_mask, enable_gqa)
    out = np.zeros((*lead, np.shape(q)[-2], np.shape(v)[-1]), REAL)
    decay = np.broadcast_to(decay, lead)
    for i, q1, k1, v1, mask in items:
        W1 = W if np.ndim(W) == 2 else W[i[-1]]
        out[i] = one_head_favor(q1, k1, v1, W1, causal, mask, decay=decay[i], **options)
    return out


def exact_attention(q, k, v, causal=False, scale=None, key_mask=None, enable_gqa=False):
    """Dense softmax attention."""
    scale = REAL(np.shape(q)[-1]) ** REAL(-0.5) if scale is None else REAL(scale)
    items, lead = heads(q, k, v, key_mask, enable_gqa)
    out = np.zeros((*lead, np.shape(q)[-2], np.shape(v)[-1]), REAL)
    for i, q1, k1, v1, mask in items:
        out[i] = one_head_exact(q1, k1, v1, scale, causal, mask)
    return out


def exact_attention_vjp(q, k, v, g, causal=False, scale=None, key_mask=None, enable_gqa=False):
    """Gradients of (out * g).sum() by q, k and v."""
    scale = REAL(np.shape(q)[-1]) ** REAL(-0.5) if scale is None else REAL(scale)
    items, lead = heads(q, k, v, key_mask, enable_gqa)
    g = np.asarray(g, REAL)
    grads = [np.zeros((*lead, *np.shape(x)[-2:]), REAL) for x in (q, k, v)]
    for i, q1, k1, v1, mask in items:
        parts = one_head_exact_vjp(q1, k1, v1, g[i], scale, causal, mask)
        for grad, part in zip(grads, parts, strict=True):
            grad[i] = part
    return [unbroadcast(grad, np.shape(x)) for grad, x in zip(grads, (q, k, v), strict=True)]


def unbroadcast(grad, shape):
    """Sum over leading axes that were added or stretched, and over groups of heads (axis -3)."""
    grad = grad.sum(tuple(range(grad.ndim - len(shape))))
    for axis in range(len(shape) - 2):
        groups = *grad.shape[:axis], shape[axis], -1, *grad.shape[axis + 1 :]
        grad = grad.reshape(groups).sum(axis + 1)
    return grad


def one_head_favor_vjp(q, k, v, W, grad, log_weights, scale=None, **options):
    """Gradients (q, k, v, W) of one head; log_weights (Lq, Lk) are -inf where a query sees no key."""
    scale = REAL(q.shape[-1]) ** REAL(-0.5) if scale is None else REAL(scale)
    seen = np.isfinite(log_weights)
    k, v = (np.where(seen.any(0)[:, None], x, 0) for x in (k, v))
    W = np.asarray(W, REAL)
    slope_q, slope_k = (slopes(x, W, scale, **options) for x in (q, k))
    if options.get("antithetic"):
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
    if options.get("kind", "positive") == "positive":
        dk -= scale * k * e_k.sum(-1, keepdims=True)
    dW = np.sqrt(scale) * (
        (e_q * slope_q).T @ np.where(seen.any(1)[:, None], q, 0) + (e_k * slope_k).T @ k
    )
    if options.get("antithetic"):
        dW = dW[: len(W) // 2] - dW[len(W) // 2 :]
    return dq, dk, a.T @ grad, dW


def slopes(x, W, scale, kind="positive", antithetic=False, kernel_epsilon=1e-3):
    """Derivatives of the log-features in the projections y."""
    y = np.sqrt(scale) * np.asarray(x, REAL) @ W.T
    if kind == "relu":
        return (y > 0) / (np.maximum(y, 0) + REAL(kernel_epsilon))
    if kind == "elu":
        return 1 / (1 + np.maximum(y, 0))
    return np.ones((len(y), len(W) * (1 + antithetic)), REAL)


def log_weights(Lq, Lk, causal, key_mask, cu_seqlens=None, decay=1):
    """What the features of query i and key j are multiplied with, as a log: (Lq, Lk)."""
    weights = np.full((Lq, Lk), -np.inf, REAL)
    for i in range(Lq):
        for j in visible_keys(i, Lk, causal, key_mask, cu_seqlens):
            weights[i, j] = (i - j) * np.log(REAL(decay))
    return weights


def favor_attention_vjp(
    q, k, v, W, grad, causal=False, key_mask=None, enable_gqa=False, cu_seqlens=None, decay=1, **options
):  # fmt: skip
    """Dense gradients (q, k, v, W); decay is a number or one a head of keys."""
    group = np.shape(q)[-3] // np.shape(k)[-3] if enable_gqa else 1
    items, lead = heads(q, k, v, key_mask, enable_gqa)
    decay = np.broadcast_to(np.repeat(decay, group) if np.ndim(decay) else decay, lead)
    shapes = [(*lead, *np.shape(x)[-2:]) for x in (q, k, v)]
    *rows, dW = [np.zeros(shape, REAL) for shape in (*shapes, np.shape(W))]
    for i, q1, k1, v1, mask in items:
        head = i[-1] // group if dW.ndim == 3 else ...
        weights = log_weights(len(q1), len(k1), causal, mask, cu_seqlens, decay[i])
        *found, dW1 = one_head_favor_vjp(
            q1, k1, v1, np.asarray(W)[head], np.asarray(grad, REAL)[i], weights, **options
        )
        dW[head] += dW1
        for total, part in zip(rows, found, strict=True):
            total[i] = part
    return (*(unbroadcast(x, np.shape(y)) for x, y in zip(rows, (q, k, v), strict=True)), dW)


def fold(k, v, W, key_mask=None, **options):
    """The state (S, z) of one head: sums of phi(k) v^T and phi(k), without 1/sqrt(M)."""
    keep = slice(None) if key_mask is None else np.asarray(key_mask, bool)
    phi = np.exp(log_features(k, W, **options))[keep]
    return phi.T @ np.asarray(v, REAL)[keep], phi.sum(0)


def merge(a, b):
    return a[0] + b[0], a[1] + b[1]


def read(state, q, W, **options):
    phi = np.exp(log_features(q, W, **options))
    return phi @ state[0] / (phi @ state[1])[:, None]


def relative_error(got, expected):
    """max|got - expected| / max|expected|, the deviation that golden/README.md uses."""
    got, expected = np.asarray(got, REAL), np.asarray(expected, REAL)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if got.size == 0:
        return 0.0
    worst = np.abs(got - expected).max()  # NaN stays NaN and fails every comparison
    return float(worst / max(np.abs(expected).max(), np.finfo(np.float64).tiny))
