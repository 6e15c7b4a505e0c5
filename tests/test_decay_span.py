"""Decay over any length: float32 is what float64 is, with masked keys between, or the call is refused."""

import numpy as np
import pytest
from support.inputs import random_inputs

from favor_np import AttentionState, WindowState, favor_attention, favor_attention_vjp, feature_map

FM = feature_map("positive", dim=4, num_features=8)
#: -log2(decay) * LENGTH is between 2 and 200 million.
CASES = [(0.5, 2_000_000), (1e-3, 1_000_000), (1e-300, 200_000)]


def inputs(length, masked):
    """q, k, v, and a mask that hides all but the ends."""
    q, k, v = random_inputs(length, 4, 4, dtype=np.float32)
    mask = None
    if masked:
        mask = np.ones(length, bool)
        mask[1000:-1000] = False
    return q, k, v, mask


def wide(*arrays):
    return (x.astype(np.float64) for x in arrays)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("decay", "length"), CASES)
def test_calls(decay, length, masked):
    q, k, v, mask = inputs(length, masked)
    options = {"causal": True, "decay": decay, "key_mask": mask}
    want = favor_attention(*wide(q, k, v), FM, **options)
    for threads in (1, 2):
        found = favor_attention(q, k, v, FM, **options, num_threads=threads)
        assert abs(found - want).max() < 1e-5
        assert abs(want).max() > 1
    found, want = (
        favor_attention(*x, FM, **options, window=5000) for x in ((q, k, v), wide(q, k, v))
    )
    assert abs(found - want).max() < 1e-5


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked):
    q, k, v, mask = inputs(300_000, masked)
    g = np.random.default_rng(1).standard_normal(v.shape, np.float32)
    found, want = (
        favor_attention_vjp(*x, FM, causal=True, decay=2.0**-100, key_mask=mask)[1](y)
        for x, y in (((q, k, v), g), (wide(q, k, v), g.astype(np.float64)))
    )
    assert abs(found.v - want.v).max() < 1e-4 * abs(want.v).max()
    assert abs(want.v[-1000:]).max() > 0.1
    found, want = (
        favor_attention_vjp(*x, FM, causal=True, decay=0.25, key_mask=mask)[1](y)
        for x, y in (((q, k, v), g), (wide(q, k, v), g.astype(np.float64)))
    )
    for name in ("q", "k", "v"):
        a, b = getattr(found, name), getattr(want, name)
        assert abs(a - b).max() < 1e-4 * abs(b).max()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("decay", "length"), CASES)
def test_states(decay, length, masked):
    """The keys that are left are averaged, however long ago they were; then new ones take over."""
    q, k, v, mask = inputs(length, masked)
    results = []
    for kind in (np.float32, np.float64):
        state = AttentionState.zeros(FM, value_dim=4, decay=decay, dtype=kind)
        rows = []
        for _ in range(3):  # more than one call may span
            state.update(k[:-1000], v[:-1000], None if mask is None else mask[:-1000])
            rows.append(state.attend(q[:20]))
        rows += [state.step(q[i], k[i], v[i])[None] for i in range(20)]
        results.append(np.concatenate(rows))
    assert abs(results[0] - results[1]).max() < 1e-5
    assert abs(results[1]).max() > 0.5


def test_windows_of_a_state():
    q, k, v, _ = inputs(3000, masked=False)
    results = []
    for kind in (np.float32, np.float64):
        state = WindowState(FM, value_dim=4, window=1000, decay=2.0**-900, dtype=kind)
        results.append(np.stack([state.step(q[i], k[i], v[i]) for i in range(2500)]))
    assert abs(results[0] - results[1]).max() < 1e-5


def test_longer_ones_are_refused():
    _, k, v, _ = inputs(300_000, masked=False)
    with pytest.raises(ValueError, match="decay must be larger for 300000 positions in one call"):
        favor_attention(k, k, v, FM, causal=True, decay=1e-300)
    state = AttentionState.zeros(FM, value_dim=4, decay=1e-300)
    with pytest.raises(ValueError, match="decay must be larger"):
        state.update(k, v)
    assert not state.lengths.any()
