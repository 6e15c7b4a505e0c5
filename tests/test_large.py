"""Exact attention of rows of any length: never shortened, recomputed or refused."""

import numpy as np
import pytest

from favor_np import exact_attention, exact_attention_vjp

KINDS = [np.float32, np.float64]


def naive(q, k, v, scale, seen):
    logits = np.where(seen, q @ k.T * scale, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights, weights @ v


@pytest.mark.parametrize(
    ("kind", "q", "k"),
    [
        (np.float64, 1e-7, 1e7),
        (np.float64, 1e-200, 1e200),
        (np.float64, 1e200, 1e-200),
        (np.float64, 1e-300, 1e300),
        (np.float32, 1e-7, 1e7),
        (np.float32, 1e-37, 1e37),
        (np.float32, 1.5e38, 5e-39),
    ],
)
def test_long_rows_with_ordinary_logits(kind, q, k):
    q, k, v = np.array([[q]], kind), np.array([[k], [2 * k]], kind), np.array([[0], [1]], kind)
    logits = q.astype(float) * k.astype(float)
    want = 1 / (1 + np.exp(logits[0] - logits[1]))
    assert np.allclose(exact_attention(q, k, v, scale=1.0), want, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", [1e8, 1e30, 1e155])
def test_keys_of_any_norm(norm, causal):
    """Logits of at most 4, as in a report: rows of float64 were once shortened, and errors were .58."""
    rng = np.random.default_rng(0)
    q, k, v, g = rng.standard_normal((4, 150, 64))
    q, k = q / norm * 0.4, k * norm
    seen = np.tri(150, dtype=bool) if causal else np.ones((150, 150), bool)
    weights, want = naive(q, k, v, 0.125, seen)
    assert np.allclose(exact_attention(q, k, v, causal=causal), want, rtol=1e-9, atol=1e-12)
    out, pullback = exact_attention_vjp(q, k, v, causal=causal)
    grads = pullback(g)
    ds = weights * (g @ v.T - (g * out).sum(-1, keepdims=True)) * 0.125
    assert np.allclose(grads.q, ds @ k, rtol=1e-9, atol=1e-10 * norm)
    assert np.allclose(grads.k, ds.T @ q, rtol=1e-9, atol=1e-10 / norm)
    assert np.allclose(grads.v, weights.T @ g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_logits_beyond_all_bounds(kind, grouped):
    """Where one key has all the weight it gets it; other rows keep their bits."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((4, 90, 8)).astype(kind)
    k, v = rng.standard_normal((2, 2 if grouped else 4, 90, 8)).astype(kind)
    want = exact_attention(q, k, v, causal=True, enable_gqa=grouped)
    q, k = q.copy(), k.copy()
    q[1, 40], k[0 if grouped else 1, 30] = 1e18, 1e18
    out = exact_attention(q, k, v, causal=True, enable_gqa=grouped)
    assert np.array_equal(out[1, 40], v[0 if grouped else 1, 30])
    assert np.array_equal(out[3], want[3])
    assert np.array_equal(out[1, :30], want[1, :30])
    assert np.isfinite(out).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_of_logits_beyond_all_bounds(grouped):
    """Beside a row that is computed apart the others are what they are without it."""
    rng = np.random.default_rng(1)
    q, g = rng.standard_normal((2, 4, 90, 8))
    k, v = rng.standard_normal((2, 2, 90, 8)) if grouped else rng.standard_normal((2, 90, 8))
    q[1, 40] = 1e18
    found = exact_attention_vjp(q, k, v, causal=True, enable_gqa=grouped)[1](g)
    parts = []
    for h in range(4):
        keys, values = (k[h // 2], v[h // 2]) if grouped else (k, v)
        weights, out = naive(q[h], keys, values, 8**-0.5, np.tri(90, dtype=bool))
        ds = weights * (g[h] @ values.T - (g[h] * out).sum(-1, keepdims=True)) * 8**-0.5
        if h == 1:
            ds[40] = 0  # one key has all the weight; times 1e18 rounding would say otherwise
        parts.append((ds @ keys, ds.T @ q[h], weights.T @ g[h]))
    dq, dk, dv = (np.stack(x) for x in zip(*parts, strict=True))
    dk, dv = (x.reshape(2, 2, 90, 8).sum(1) if grouped else x.sum(0) for x in (dk, dv))
    assert np.allclose(found.v, dv, rtol=1e-9, atol=1e-12)
    assert np.allclose(found.q, dq, rtol=1e-9, atol=1e-9 * abs(dq).max())
    assert np.allclose(found.k, dk, rtol=1e-9, atol=1e-9 * abs(dk).max())


@pytest.mark.parametrize("size", [1e6, 1e9, 1e20, 1e38])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_keys_may_be_of_any_size(kind, size):
    """A masked key of 1e9 once changed the rows beside it."""
    q, k, v = np.random.default_rng(2).standard_normal((3, 70, 8)).astype(kind)
    mask = np.ones(70, bool)
    mask[[3, 65]] = False
    want = exact_attention(q, k, v, key_mask=mask)
    k[~mask] = size
    assert np.array_equal(exact_attention(q, k, v, key_mask=mask), want)
