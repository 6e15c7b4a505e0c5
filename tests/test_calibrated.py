"""Attention, states and gradients with calibrated maps: the kernels against the definition."""

import numpy as np
import pytest
from support.inputs import draw
from support.parameters import each_causal
from support.tolerance import relative_error

from favor_np import (
    AttentionState,
    FeatureMap,
    attention_weights,
    favor_attention,
    favor_attention_vjp,
    feature_map,
)
from favor_np.features import Calibration

METHODS = ["oprf", "sderf", "aderf+sderf", "spherical"]
each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("antithetic", [False, True], ids=["plain", "antithetic"])
each_head = pytest.mark.parametrize("own", [False, True], ids=["shared", "of heads"])


def data(L=150, heads=3, d=10, dv=5, seed=0, mean=0.5):
    """Anisotropic queries and keys with means, values and cotangents."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((heads, L, d)) @ rng.standard_normal((d, d)) for _ in range(2))
    v, g = rng.standard_normal((2, heads, L, dv))
    return 0.2 * q + mean, 0.2 * k - 0.6 * mean, v, g


def calibrated(q, k, method, antithetic, own, features=48):
    fm = feature_map("positive", q.shape[-1], features, antithetic=antithetic, dtype=float)
    flat = [x if own else x.reshape(-1, x.shape[-1]) for x in (q, k)]
    return fm.calibrate(*flat, method=method)


def dense(q, k, v, fm, causal):
    weights = fm.query_features(q) @ np.swapaxes(fm.key_features(k), -1, -2)
    weights = np.tril(weights) if causal else weights
    return weights @ v / weights.sum(-1, keepdims=True)


@each_method
@each_kind
@each_head
@each_causal
def test_attention_is_the_definition(method, antithetic, own, causal):
    q, k, v, _ = data()
    fm = calibrated(q, k, method, antithetic, own)
    expected = dense(q, k, v, fm, causal)
    assert relative_error(favor_attention(q, k, v, fm, causal=causal), expected) < 1e-13
    single = favor_attention(*(x.astype(np.float32) for x in (q, k, v)), fm, causal=causal)
    assert single.dtype == np.float32
    assert relative_error(single, expected) < 5e-6
    if not causal:
        assert relative_error(attention_weights(q, k, fm) @ v, expected) < 1e-13


@each_method
@each_kind
@each_head
def test_states(method, antithetic, own):
    q, k, v, _ = data(L=90)
    fm = calibrated(q, k, method, antithetic, own)
    expected = dense(q, k, v, fm, True)
    state = AttentionState.zeros(fm, v.shape[-1], (len(q),), dtype=float)
    state.update(k[:, :70], v[:, :70])
    rows = [state.step(q[:, t], k[:, t], v[:, t]) for t in range(70, 90)]
    assert relative_error(np.stack(rows, axis=1), expected[:, 70:]) < 1e-13


@each_kind
def test_far_means_cost_no_accuracy(antithetic):
    """Centres are subtracted first: not from projections in which they are everything."""
    q, k, v, _ = data(mean=40.0)
    q, k, v = (x.astype(np.float32).astype(float) for x in (q, k, v))
    fm = calibrated(q, k, "aderf+sderf", antithetic, own=True)
    single = favor_attention(*(x.astype(np.float32) for x in (q, k, v)), fm, causal=True)
    assert relative_error(single, favor_attention(q, k, v, fm, causal=True)) < 2e-5


def test_one_long_head_on_two_threads():
    q, k, v, _ = data(L=2500, heads=1)
    fm = calibrated(q, k, "aderf+sderf", False, own=True, features=128)
    one, two = (favor_attention(q, k, v, fm, causal=True, num_threads=n) for n in (1, 2))
    assert np.array_equal(one, two)
    assert relative_error(one, dense(q, k, v, fm, True)) < 1e-12


@each_method
@each_kind
@each_head
@each_causal
def test_gradients_are_slopes(method, antithetic, own, causal):
    """Along a random direction in each argument, the projection included."""
    q, k, v, g = data(L=70)
    fm = calibrated(q, k, method, antithetic, own)
    _, pullback = favor_attention_vjp(q, k, v, fm, causal=causal)
    grads = pullback(g)
    found = [grads.q, grads.k, grads.v, grads.projection]
    rng, step = np.random.default_rng(1), 1e-6
    for n, gradient in enumerate(found):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            args = [q, k, v, np.asarray(fm.projection, float)]
            args[n] = args[n] + sign * step * direction
            moved = FeatureMap(
                args[3], fm.kind, fm.scale, fm.antithetic, fm.kernel_epsilon, fm.calibration
            )
            ends.append((favor_attention(*args[:3], moved, causal=causal) * g).sum())
        slope, expected = (ends[0] - ends[1]) / (2 * step), (gradient * direction).sum()
        assert abs(slope - expected) < 1e-7 * np.linalg.norm(gradient) * np.linalg.norm(direction)


def test_earlier_rows_keep_their_bits():
    q, k, v, _ = data()
    fm = calibrated(q, k, "aderf+sderf", True, own=True)
    before = favor_attention(q, k, v, fm, causal=True)
    k[:, 100:], v[:, 100:] = np.nan, np.inf
    after = favor_attention(q, k, v, fm, causal=True)
    assert np.array_equal(before[:, :100], after[:, :100])
    assert np.isnan(after[:, 100:]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("change", [None, 1.2 * np.eye(4)], ids=["plain", "changed"])
@pytest.mark.parametrize(
    ("center", "size", "wins"), [(1e6, 5e3, 0), (-1e6, 5e3, 1), (0.0, 1e9, 2), (0.0, -1e9, 2)]
)
def test_keys_out_of_reach(dtype, change, center, size, wins):
    """Their log-norms are far below or above what exponents can hold: they win, or lose, and no more."""
    calibration = Calibration(np.full(4, center), np.zeros(4), change, np.full(4, 0.05))
    fm = FeatureMap(draw(8, 4), "positive", 1.0, False, 1.0, calibration)
    k = np.array([[size], [-size], [0.1]], dtype).repeat(4, axis=1)
    v, q = np.array([[1.0], [2], [4]], dtype), np.zeros((3, 4), dtype)
    state = AttentionState.zeros(fm, 1, dtype=dtype)
    for i in range(3):
        alone = favor_attention(q, k[i : i + 1], v[i : i + 1], fm)
        assert np.allclose(alone, v[i], rtol=1e-5)
        state.update(k[i : i + 1], v[i : i + 1])
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        whole = favor_attention(q, k[order], v[order], fm)
        assert np.allclose(whole, v[wins], rtol=1e-5)
    assert np.allclose(state.attend(q), v[wins], rtol=1e-5)
