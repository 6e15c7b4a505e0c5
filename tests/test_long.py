"""Sums in float32 over many tokens: what an addition rounds off is not lost."""

import pickle

import numpy as np
import pytest

from favor_np import (
    AttentionState,
    WindowState,
    favor_attention,
    favor_attention_vjp,
    feature_map,
    thread_limit,
)

FM = feature_map("positive", dim=4, num_features=8)
KEY = np.array([0.3, -0.2, 0.1, 0.25], np.float32)
PROMISE = 3e-6


def tokens(count, equal, seed=0):
    """Keys, all equal or none, and values between 0 and 1 whose mean moves."""
    rng = np.random.default_rng(seed)
    late = (np.arange(count) >= count // 2).astype(np.float32)[:, None]
    if equal:
        return np.broadcast_to(KEY, (count, 4)), late
    k = 0.7 * rng.standard_normal((count, 4), np.float32)
    return k, (late + rng.random((count, 1), np.float32)) / 2


def last_row(k, v, decay=1.0, window=None):
    """Attention of the last key, as a query, to all: in float64, of the map's own features."""
    k, v = (x[-(window or len(x)) :].astype(np.float64) for x in (k, v))
    weights = FM.key_features(k) @ FM.query_features(k[-1:])[0]
    weights *= decay ** np.arange(len(k) - 1, -1, -1)
    return weights @ v / weights.sum()


def close(got, want):
    return abs(got - want).max() <= PROMISE * abs(want).max()


@pytest.mark.parametrize("decay", [None, 0.999999], ids=["", "decay"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
def test_steps(equal, decay):
    """One by one: without what was rounded off 200,000 equal keys are off by 4e-4, a million by 3e-3."""
    k, v = tokens(60_000, equal)
    state = AttentionState.zeros(FM, value_dim=1, decay=decay)
    for i in range(len(k)):
        out = state.step(k[i], k[i], v[i])
    assert close(out, last_row(k, v, decay or 1.0))
    assert close(state.copy().attend(k[-1:])[0], last_row(k, v, decay or 1.0))


@pytest.mark.parametrize("decay", [None, 0.999999], ids=["", "decay"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
def test_calls(equal, causal, threads, decay):
    k, v = tokens(1_500_000, equal)
    with thread_limit(threads):
        out = favor_attention(k if causal else k[-1:], k, v, FM, causal=causal) if decay is None else (
            favor_attention(k, k, v, FM, causal=True, decay=decay))  # fmt: skip
    assert close(out[-1], last_row(k, v, decay or 1.0))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
def test_a_state_that_goes_on(equal):
    """Sums that are large already get small ones: a million calls would show the same."""
    k, v = tokens(1_000_000, equal)
    state = AttentionState.zeros(FM, value_dim=1)
    state.update(k[:-20_000], v[:-20_000])
    for start in range(len(k) - 20_000, len(k), 20):
        state.update(k[start : start + 20], v[start : start + 20])
    assert close(state.attend(k[-1:])[0], last_row(k, v))


@pytest.mark.parametrize("decay", [None, 0.99999], ids=["", "decay"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
def test_merges(equal, decay):
    k, v = tokens(20_000, equal)
    state = AttentionState.zeros(FM, value_dim=1, decay=decay)
    for start in range(0, len(k), 4):
        part = AttentionState.zeros(FM, value_dim=1, decay=decay)
        state.merge(part.update(k[start : start + 4], v[start : start + 4]))
    assert close(state.attend(k[-1:])[0], last_row(k, v, decay or 1.0))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
def test_windows(equal):
    k, v = tokens(1_500_000, equal)
    out = favor_attention(k, k, v, FM, causal=True, window=1_000_000)
    assert close(out[-1], last_row(k, v, window=1_000_000))
    state = WindowState(FM, value_dim=1, window=100_000)
    state.update(k[:-2_000], v[:-2_000])
    for i in range(len(k) - 2_000, len(k)):
        out = state.step(k[i], k[i], v[i])
    assert close(out, last_row(k, v, window=100_000))


def test_the_gradient():
    """Values without a mean: where one is subtracted, what is left is less exact at any length."""
    k, _ = tokens(300_000, equal=False)
    v, grad = np.random.default_rng(1).standard_normal((2, len(k), 1), np.float32)
    found, want = (
        favor_attention_vjp(*(x.astype(kind) for x in (k, k, v)), FM, causal=True)[1](
            grad.astype(kind)
        )
        for kind in (np.float32, np.float64)
    )
    for name in ("q", "k", "v", "projection"):
        assert close(getattr(found, name), getattr(want, name))
    assert found.projection.dtype == np.float32


@pytest.mark.parametrize("count", [1, 7, 16, 17, 40])
@pytest.mark.parametrize("decay", [None, 0.9], ids=["", "decay"])
def test_single_tokens_wait_in_the_state(count, decay, tmp_path):
    """At any time: read, copied, saved, merged, continued, it is the state of all its tokens."""
    rng = np.random.default_rng(count)
    q, k, v = rng.standard_normal((3, 2, 60, 4), np.float32)
    state, whole = (AttentionState.zeros(FM, 4, (2,), decay=decay) for _ in range(2))
    for i in range(count):
        state.step(q[:, i], k[:, i], v[:, i])
    whole.update(k[:, :count], v[:, :count])
    want = whole.attend(q[:, :5])

    def right(rows):
        assert np.allclose(rows, want, rtol=2e-5, atol=2e-6)

    state.save(tmp_path / "state")
    twins = [
        state.copy(),
        pickle.loads(pickle.dumps(state)),
        AttentionState.load(tmp_path / "state"),
    ]
    nothing = np.zeros((2, 0, 4), np.float32)
    if decay is None:
        right(favor_attention(q[:, :5], nothing, nothing, FM, state=state))
    assert np.allclose(np.ldexp(state.S, state.c[..., None]), np.ldexp(whole.S, whole.c[..., None]),
                       rtol=1e-4, atol=1e-5)  # fmt: skip
    ends = []
    for twin in (state, *twins):
        rows = twin.step(q[:, 50], k[:, 50], v[:, 50])
        ends.append(rows)
        assert twin.lengths.tolist() == [count + 1] * 2
    assert all(np.array_equal(rows, ends[0]) for rows in ends)
    for twin in twins:
        merged = AttentionState.zeros(FM, 4, (2,), decay=decay).merge(twin)
        assert np.allclose(merged.attend(q[:, :5]), twin.attend(q[:, :5]), rtol=2e-5, atol=2e-6)
    whole.update(k[:, 50:51], v[:, 50:51])
    want = whole.attend(q[:, :5])
    right(state.attend(q[:, :5]))
    right(state.attend(q[:, :5]))  # reading has changed nothing
