"""AttentionState on a device: what is folded in pieces is what is folded at once."""

import pickle

import numpy as np
import ptxrun
import pytest
from support import oracle
from support.tolerance import relative_error
from support.tuning import tuned

ptxrun.require()

from cases import Case

from favor_np import AttentionState, favor_attention

CASE = Case(length=75, value_dim=5, rows=20)


def test_folded_in_pieces(gpu):
    q, k, v = CASE.arrays()
    fm = CASE.feature_map()
    mask = np.random.default_rng(0).random(75) < 0.7
    expected = oracle.favor_attention(q, k, v, fm, key_mask=mask)
    state = AttentionState.zeros(fm, 5, 2, device="cuda")
    assert not state.attend(q).any()
    for start, stop in ((0, 1), (1, 66), (66, 75)):
        state.update(k[:, start:stop], v[:, start:stop], mask[start:stop])
    assert relative_error(state.attend(q), expected) < CASE.tolerance()
    assert state.lengths.tolist() == [75, 75]
    here = AttentionState.zeros(fm, 5, 2, dtype=np.float32).update(k, v, mask)
    for name in ("S", "z"):
        found, wanted = (
            np.ldexp(getattr(x, name), x.c[..., None] if name == "S" else x.c)
            for x in (state, here)
        )
        assert relative_error(found, wanted) < 1e-5


def test_step_by_step(gpu):
    case = Case(length=5, value_dim=5, rows=20, causal=True)
    q, k, v = case.arrays()
    fm = case.feature_map()
    expected = case.expected()
    out, state = favor_attention(
        q[:, :2], k[:, :2], v[:, :2], fm, causal=True, return_state=True, device="cuda"
    )
    assert relative_error(out, expected[:, :2]) < case.tolerance()
    copy = state.copy()
    row = state.step(q[:, 2], k[:, 2], v[:, 2])
    assert row.shape == (2, 5)
    assert relative_error(row, expected[:, 2]) < case.tolerance()
    row = state.step(q[:, 3:4], k[:, 3:4], v[:, 3:4])
    assert relative_error(row, expected[:, 3:4]) < case.tolerance()
    rest, last = favor_attention(
        q[:, 2:], k[:, 2:], v[:, 2:], fm, causal=True, state=copy, return_state=True, device="cuda"
    )
    assert relative_error(rest, expected[:, 2:]) < case.tolerance()
    assert copy.lengths.tolist() == [2, 2]
    assert last.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("kind", ["antithetic", "relu"])
def test_a_step_is_one_launch(kind, gpu):
    """For any batch, and for queries that share a state: as the next tokens of `favor_attention`."""
    case = Case(length=3, dim=70, value_dim=70, rows=70, lead=(2, 4), kv_lead=(2, 2), kind=kind)
    q, k, v = case.arrays()
    fm, options = case.feature_map(), {"causal": True, "enable_gqa": True, "return_state": True}
    state = AttentionState.zeros(fm, 70, (2, 2), device="cuda")
    here = AttentionState.zeros(fm, 70, (2, 2), dtype=np.float64)
    k[1, 1, 1] *= 30  # far above what came before
    v[0, 1, 2], k[1, 0, 2, 3] = np.inf, np.nan
    for i in range(3):
        token = [x[..., i : i + 1, :] for x in (q, k, v)]
        gpu.launches.clear()
        row, state = favor_attention(*token, fm, state=state, device="cuda", **options)
        assert [kernel.__name__ for kernel, *_ in gpu.launches] == ["step"]
        whole = (x.astype(float) for x in token)
        wanted, here = favor_attention(*whole, fm, state=here, **options)
        assert np.array_equal(np.isfinite(row), np.isfinite(wanted))
        if i < 2:
            assert relative_error(row, wanted) < 1e-5
    assert not np.isfinite(row).all()


def test_a_step_beyond_what_its_kernel_holds(gpu):
    """A map of more features than shared memory has room for takes the way of long calls."""
    (q, k, v), fm = CASE.arrays(), CASE.feature_map()
    states = [AttentionState.zeros(fm, 5, 2, device="cuda") for _ in range(2)]
    token = [x[:, 0] for x in (q, k, v)]
    row = states[0].step(*token)
    with tuned(FEATURES=32):
        assert relative_error(states[1].step(*token), row) < 1e-6
    assert len({kernel.__name__ for kernel, *_ in gpu.launches}) > 2


def test_merge(gpu):
    q, k, v = CASE.arrays()
    fm = CASE.feature_map()
    a, b = (AttentionState.zeros(fm, 5, 2, device="cuda") for _ in range(2))
    a.update(k[:, :70], v[:, :70])
    b.update(k[:, 70:], v[:, 70:])
    there = b.attend(q)
    a.merge(b)
    expected = oracle.favor_attention(q, k, v, fm)
    assert relative_error(a.attend(q), expected) < CASE.tolerance()
    assert np.array_equal(b.attend(q), there)
    with pytest.raises(TypeError, match=r"^other must lie where the state does"):
        a.merge(AttentionState.zeros(fm, 5, 2, dtype=np.float32))


def test_packed_sequences(gpu):
    q, k, v = (x[0] for x in CASE.arrays())
    fm, offsets = CASE.feature_map(), np.array([0, 4, 4, 75])
    state = AttentionState.zeros(fm, 5, sequences=3, device="cuda")
    state.update(k, v, cu_seqlens=offsets)
    out = state.attend(q, cu_seqlens=offsets)
    expected = oracle.favor_attention(q, k, v, fm, cu_seqlens=offsets)
    assert relative_error(out, expected) < CASE.tolerance()
    rows = state.step(q[:3], k[:3], v[:3])
    assert rows.shape == (3, 5)
    assert relative_error(rows[1], v[1]) < 1e-6  # the only key of its sequence


def test_a_pickle_is_a_state_in_main_memory(gpu):
    q, k, v = CASE.arrays()
    state = AttentionState.zeros(CASE.feature_map(), 5, 2, device="cuda").update(k, v)
    loaded = pickle.loads(pickle.dumps(state))
    assert loaded._engine.home == "in main memory"
    assert relative_error(loaded.attend(q), state.attend(q)) < 1e-5


def test_bad_arguments_are_named(gpu):
    fm = CASE.feature_map()
    with pytest.raises(TypeError, match=r"^dtype must be float32"):
        AttentionState.zeros(fm, 5, dtype=np.float64, device="cuda")
    state = AttentionState.zeros(fm, 5, device="cuda")
    with pytest.raises(ValueError, match=r"^k must have shape"):
        state.update(np.ones((3, 2), np.float32), np.ones((3, 5), np.float32))
