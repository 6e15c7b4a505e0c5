"""Numbers at the edges of float32: tiny values count, and the caller's floating-point mode is left alone."""

import numpy as np
import pytest
from support.inputs import random_inputs

from favor_np import (
    AttentionState,
    exact_attention,
    exact_attention_vjp,
    favor_attention,
    favor_attention_vjp,
    feature_map,
)

FM = feature_map("positive", dim=8, num_features=32)


def inputs(length, std=0.5, seed=0):
    return random_inputs(length, 8, 8, (2,), std=std, seed=seed, dtype=np.float32)


def attend(q, k, v, name, threads=None):
    if name == "steps":
        state = AttentionState.zeros(FM, value_dim=8, batch_shape=(2,), dtype=q.dtype)
        rows = [state.step(q[:, i], k[:, i], v[:, i]) for i in range(q.shape[1])]
        return np.stack(rows, axis=1)
    if name == "a state":
        state = AttentionState.zeros(FM, value_dim=8, batch_shape=(2,), dtype=q.dtype)
        return state.update(k, v).attend(q)
    function, causal = name.split()
    options = {"causal": causal == "causal", "num_threads": threads}
    if function == "exact":
        return exact_attention(q, k, v, **options)
    return favor_attention(q, k, v, FM, **options)


WAYS = ["favor causal", "favor full", "exact causal", "exact full", "steps", "a state"]


@pytest.mark.parametrize("size", [1e-36, 1e-39, 1e-42])
@pytest.mark.parametrize("way", WAYS)
def test_tiny_values_are_not_flushed(way, size):
    q, k, v = inputs(150)
    v = (v * size).astype(np.float32)
    v[:, 100:130] = 0
    found, want = (attend(*(x.astype(t) for x in (q, k, v)), way) for t in (np.float32, np.float64))
    assert abs(found - want).max() <= 2e-6 * size + 3e-45 * 40


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("vjp", ["favor", "exact"])
def test_tiny_cotangents_are_not_flushed(vjp, causal):
    q, k, v = inputs(150)
    grad = (v[:, ::-1] * 1e-36).astype(np.float32)

    def gradients(kind):
        of = [x.astype(kind) for x in (q, k, v)]
        if vjp == "exact":
            return exact_attention_vjp(*of, causal=causal)[1](grad.astype(kind))
        return favor_attention_vjp(*of, FM, causal=causal)[1](grad.astype(kind))

    found, want = gradients(np.float32), gradients(np.float64)
    for name in ("q", "k", "v"):
        of, right = getattr(found, name), getattr(want, name)
        assert abs(of - right).max() <= 1e-5 * abs(right).max()


@pytest.mark.parametrize("std", [0.5, 4, 12])
@pytest.mark.parametrize("way", WAYS)
def test_the_mode_of_the_caller_is_as_it_was(way, std):
    smallest = np.float32(1.2e-38)
    q, k, v = inputs(3000 if way != "steps" else 20, std)
    attend(q, k, v, way, threads=2)
    assert 0 < smallest * np.float32(0.25) < smallest  # gradual underflow


@pytest.mark.parametrize("std", [4, 8, 30])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_far_apart_are_right(causal, std):
    """What is flushed is nothing beside what is left, also where keys do not fit into one chunk."""
    q, k, v = inputs(500, std)
    fm = FM
    found = favor_attention(q, k, v, fm, causal=causal)
    want = favor_attention(*(x.astype(np.float64) for x in (q, k, v)), fm, causal=causal)
    # an exponent of size std**2 rounds to 2**-24 of itself
    assert np.sqrt(np.mean((found - want) ** 2)) <= 1e-6 * std**2 * np.std(want)


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("std", [0.5, 6])
def test_bits_do_not_depend_on_threads_whatever_the_size(std, decay):
    """Chunks of tiny, ordinary and no values: each is computed in its own mode, on any thread."""
    rng = np.random.default_rng(3)
    q, k, v = (s * rng.standard_normal((1, 6000, 8), np.float32) for s in (std, std, 1))
    size = 10.0 ** rng.integers(-44, 1, 6000 // 50).repeat(50)
    v = (v * size[:, None] * (rng.random(6000) < 0.9)[:, None]).astype(np.float32)
    one, two, five = (
        favor_attention(q, k, v, FM, causal=True, decay=decay, num_threads=n) for n in (1, 2, 5)
    )
    assert np.array_equal(one, two)
    assert np.array_equal(one, five)
