"""WindowState: its file, and what follows on."""

import pickle
import zipfile

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from support.inputs import random_inputs

from favor_np import AttentionState, WindowState, favor_attention, feature_map

FM = feature_map("positive", 6, 24)


def numbers(length, lead=(2,), seed=0):
    rng = np.random.default_rng(seed)
    gates = rng.uniform(0.3, 1, (*lead, length))
    return random_inputs(length, 6, 5, lead), rng.normal(size=(*lead, length)), gates


def state_of(window, **options):
    return WindowState(FM, 5, window, (2,), dtype=np.float64, **options)


def add(state, at, *, decay, bias, q, k, v, gates):
    more = {"key_bias": bias[:, at]} if bias is not None else {}
    if decay == "gates":
        more["decay"] = gates[:, at]
    state.update(k[:, at], v[:, at], **more)


@pytest.mark.parametrize("decay", [None, 0.9, "gates"])
@pytest.mark.parametrize("biased", [False, True])
@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 60))
def test_merged_states_are_those_of_all_tokens(decay, biased, window, first, second):
    length = first + second + 30
    (q, k, v), bias, gates = numbers(length)
    options = {} if decay in (None, "gates") else {"decay": decay}
    parts = {"decay": decay, "bias": bias if biased else None, "q": q, "k": k, "v": v,
             "gates": gates}  # fmt: skip
    a, b, whole = (state_of(window, **options) for _ in range(3))
    add(a, slice(first), **parts)
    add(b, slice(first, first + second), **parts)
    add(whole, slice(first + second), **parts)
    before = pickle.dumps(b)
    assert a.merge(b) is a
    assert pickle.dumps(b) == before
    assert a.length == whole.length == first + second
    for i in range(first + second, length):
        more = {"key_bias": bias[:, i]} if biased else {}
        if decay == "gates":
            more["decay"] = gates[:, i]
        found, expected = (s.step(q[:, i], k[:, i], v[:, i], **more) for s in (a, whole))
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("decay", [None, 0.9, "gates"])
def test_a_single_head_needs_no_batch_axis(decay):
    (q, k, v), bias, gates = numbers(20, (1,))
    rates = {"decay": decay} if decay == 0.9 else {}
    one = WindowState(FM, 5, 3, (), dtype=np.float64, **rates)
    same = WindowState(FM, 5, 3, (1,), dtype=np.float64, **rates)
    for i in range(20):
        step = {"key_bias": bias[:, i]} | ({"decay": gates[:, i]} if decay == "gates" else {})
        expected = same.step(q[:, i], k[:, i], v[:, i], **step)
        step = {name: x[0] for name, x in step.items()}
        np.testing.assert_array_equal(one.step(q[0, i], k[0, i], v[0, i], **step), expected[0])
    one.merge(one.copy())
    same.merge(same.copy())
    np.testing.assert_array_equal(one.attend(q[0]), same.attend(q)[0])


@pytest.mark.parametrize("decay", [None, 0.9, "gates"])
@pytest.mark.parametrize("length", [0, 1, 30, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_state_goes_on_with_the_same_bits(tmp_path, decay, length, dtype):
    (q, k, v), bias, gates = numbers(length + 80)
    options = {} if decay in (None, "gates") else {"decay": decay}
    state = WindowState(FM, 5, 33, (2,), dtype=dtype, **options)
    for i in range(length):
        more = {"decay": gates[:, i], "key_bias": bias[:, i]} if decay == "gates" else {}
        state.step(q[:, i], k[:, i], v[:, i], **more)
    state.save(tmp_path / "window.state")
    loaded = WindowState.load(tmp_path / "window.state")
    assert repr(loaded) == repr(state)
    assert loaded.length == length
    for i in range(length, length + 80):
        more = {"decay": gates[:, i], "key_bias": bias[:, i]} if decay == "gates" else {}
        found, expected = (s.step(q[:, i], k[:, i], v[:, i], **more) for s in (loaded, state))
        assert np.array_equal(found, expected)


def test_files_of_the_other_kind_are_refused(tmp_path):
    (_, k, v), *_ = numbers(9)
    state_of(4).update(k, v).save(tmp_path / "window")
    AttentionState(FM, 5, (2,), dtype=np.float64).update(k, v).save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"cannot be read as an AttentionState.*format"):
        AttentionState.load(tmp_path / "window")
    with pytest.raises(ValueError, match=r"cannot be read as a WindowState.*format"):
        WindowState.load(tmp_path / "state")


def test_damaged_files_are_refused(tmp_path):
    (_, k, v), _, gates = numbers(9)
    path = tmp_path / "window"
    state_of(4).update(k, v, decay=gates).save(path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    for name in entries:
        with zipfile.ZipFile(path, "w") as file:
            for other, content in entries.items():
                if other != name:
                    file.writestr(other, content)
        with pytest.raises(ValueError, match="cannot be read as a WindowState"):
            WindowState.load(path)
    for cut in range(0, len(data), len(data) // 7):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cannot be read as a WindowState"):
            WindowState.load(path)


@pytest.mark.parametrize("decay", [0.9, np.full(9, 0.9), np.full((1, 2, 9), 0.9)])
def test_factors_that_are_not_one_a_token(decay):
    (_, k, v), *_ = numbers(9)
    with pytest.raises(ValueError, match=r"^decay must"):
        state_of(4).update(k, v, decay=decay)


def test_a_decay_that_passes_the_exponents_is_refused():
    fm = feature_map("positive", 2, 4)
    state = WindowState(fm, 1, 2**21, (), dtype=np.float32)
    k, v, decay = np.zeros((2**17, 2)), np.zeros((2**17, 1)), np.full(2**17, 5e-324)
    for _ in range(3):
        state.update(k, v, decay=decay)
    with pytest.raises(ValueError, match="decay must be larger for a window of 2097152 positions"):
        state.update(k, v, decay=decay)
    assert state.length == 3 * 2**17
    assert state.step([0.0, 0.0], [0.0, 0.0], [42.0], decay=5e-324) == 42


def test_states_that_cannot_be_merged():
    state = state_of(4)
    with pytest.raises(TypeError, match="other must be a WindowState"):
        state.merge(AttentionState(FM, 5, (2,), dtype=np.float64))
    others = {
        "window": state_of(5),
        "dtype": WindowState(FM, 5, 4, (2,), dtype=np.float32),
        "value_dim": WindowState(FM, 6, 4, (2,), dtype=np.float64),
        "batch_shape": WindowState(FM, 5, 4, (3,), dtype=np.float64),
        "decay": state_of(4, decay=0.9),
        "feature map": WindowState(feature_map("positive", 6, 24, rng=1), 5, 4, (2,)),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=name):
            state.merge(other)


def test_a_window_over_all_is_that_of_attention():
    (q, k, v), *_ = numbers(50)
    state = state_of(64).update(k[:, :30], v[:, :30])
    state.merge(state_of(64).update(k[:, 30:49], v[:, 30:49]))
    expected = favor_attention(q, k, v, FM, causal=True)
    found = state.step(q[:, 49], k[:, 49], v[:, 49])
    np.testing.assert_allclose(found, expected[:, 49], atol=1e-12)


def held(state):
    """Bytes of all states and tokens that a WindowState holds."""
    arrays = (a for s in (state._own, *(state._wholes or ()), *(state._parts or ())) for a in s)
    return sum(a.nbytes for a in (state._k, state._v, state._mask, *arrays))


@pytest.mark.parametrize("window", [1, 2, 3, 8, 64, 80])
def test_the_memory_of_a_window_state_is_what_it_says(window):
    q, k, v = random_inputs(300, lead=(2,), dtype=np.float32)
    state, sizes = WindowState(FM, 5, window, 2, dtype=np.float32), []
    for t in range(300):
        state.step(q[:, t], k[:, t], v[:, t])
        sizes.append(held(state))
    tokens = sum(a.nbytes for a in (state._k, state._v, state._mask))
    one = sum(a.nbytes for a in state._own)
    assert tokens == 2 * window * (4 * (6 + 5) + 1)
    assert max(sizes) <= tokens + (2 + 2 * window**0.5) * one
    assert max(sizes[200:]) <= max(sizes[:200])
