"""Arrays that are handed out lie in memory as others expect them: in C order, byte after byte.

Writers that take an array's buffer without its strides store it scrambled, without a word.
"""

import copy
import pickle

import numpy as np
import pytest

import favor_np

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((4, 9, n)).astype(np.float32) for n in (16, 16, 6))
MASK = np.arange(9) % 4 > 0
PACKED = np.array([0, 4, 9])


def lies_oddly(array):
    """The same numbers, sorted in memory by the last axis: what numpy.copy and ufuncs keep."""
    return np.asfortranarray(array)


def plain():
    return favor_np.feature_map("positive", 16, 64)


def calibrated(method):
    return lambda: plain().calibrate(lies_oddly(Q), lies_oddly(K), method=method)


MAPS = {
    "plain": plain,
    "relu": lambda: favor_np.feature_map("relu", 16, 64, antithetic=False, dtype=np.float64),
    "given": lambda: favor_np.FeatureMap.from_projection(lies_oddly(plain().projection)),
    **{method: calibrated(method) for method in ("sderf", "aderf", "saderf+sderf")},
}


def states(fm):
    for options in ({}, {"decay": [0.5, 0.9, 1.0, 0.99]}):
        state = favor_np.AttentionState.zeros(fm, 6, 4, **options)
        yield state
        yield state.copy().update(lies_oddly(K), lies_oddly(V))
        yield state.copy().update(K, V).merge(state)
    yield favor_np.AttentionState.zeros(fm, 6, 4, sequences=2).update(K, V, cu_seqlens=PACKED)
    yield favor_np.favor_attention(Q, K, V, fm, causal=True, return_state=True)[1]


def handed_out(fm):
    """Everything with arrays that the package gives away, by name."""
    q, k, v = map(lies_oddly, (Q, K, V))
    yield "map", fm
    yield "query_features", fm.query_features(q)
    yield "key_features", fm.key_features(k)
    yield "weights", favor_np.attention_weights(q, k, fm)
    for i, state in enumerate(states(fm)):
        yield f"state {i}", state
        yield f"pickled {i}", pickle.loads(pickle.dumps(state))
        yield f"copied {i}", copy.deepcopy(state)
    state = favor_np.AttentionState.zeros(fm, 6, 4, dtype=np.float32)
    yield "attend", state.attend(q)
    yield "step", state.step(q[:, 0], k[:, 0], v[:, 0])
    window = favor_np.WindowState(fm, 6, 5, 4)
    yield "window", window
    yield "window.attend", window.update(k, v).attend(q)
    yield "window.step", window.step(q[:, :1], k[:, :1], v[:, :1])
    for options in (
        {},
        {"causal": True, "decay": 0.9},
        {"key_mask": MASK},
        {"causal": True, "cu_seqlens": PACKED},
        {"causal": True, "window": 3},
    ):
        yield f"attention {options}", favor_np.favor_attention(q, k, v, fm, **options)
    for options in ({}, {"causal": True, "decay": 0.9}, {"causal": True, "return_state": True}):
        out, pullback = favor_np.favor_attention_vjp(q, k, v, fm, **options)
        yield f"vjp {options}", out
        whole = out[0] if "return_state" in options else out
        yield f"gradient {options}", pullback(lies_oddly(whole))
    out, pullback = favor_np.favor_attention_vjp(q, k, v, fm, state=state, causal=True)
    yield "gradient of a state", pullback(out)
    out, pullback = favor_np.favor_attention_vjp(q, k[0], v[:1], fm)
    yield "gradient of what was broadcast", pullback(out)


def apart(name, value):
    """Yield every array in a value, with a name."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from apart(f"{name}[{key}]", part)
    elif isinstance(value, tuple) and not hasattr(value, "_fields"):
        for number, part in enumerate(value):
            yield from apart(f"{name}[{number}]", part)
    elif type(value).__module__.startswith("favor_np."):
        for key in (key for key in dir(value) if not key.startswith("_")):
            if not callable(getattr(value, key)):
                yield from apart(f"{name}.{key}", getattr(value, key))


def scrambled(name, value):
    """The names of the arrays in a value that are not in C order."""
    arrays = dict(apart(name, value))
    assert arrays, name
    return [part for part, array in arrays.items() if not array.flags.c_contiguous]


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
def test_what_attention_hands_out(make):
    for name, value in handed_out(make()):
        assert not scrambled(name, value)


@pytest.mark.parametrize("kind", ["orthogonal", "iid", "simplex"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_projections(kind, dtype):
    for rows in (8, 16, 40):
        w = favor_np.sample_projection(rows, 16, kind, dtype=dtype)
        assert not scrambled("projection", w)


def test_exact_attention():
    q, k, v = map(lies_oddly, (Q, K, V))
    out, pullback = favor_np.exact_attention_vjp(q, k, v, causal=True)
    assert not scrambled("exact", (out, favor_np.exact_attention(q, k, v), tuple(pullback(out))))


def test_diagnose():
    q, k, v = map(lies_oddly, (Q, K, V))
    assert not scrambled("diagnosis", favor_np.diagnose(q, k, v, plain()))


def test_the_walk_finds_arrays():
    """In attributes, entries and fields: or the tests above would see nothing."""
    found = [name for name, _ in apart("x", ({"maps": (plain(),)}, np.ones(3)))]
    assert {"x[0][maps][0].projection", "x[0][maps][0].key_weight", "x[1]"} <= set(found)


def test_a_state_survives_safetensors(tmp_path):
    """It writes buffers as they lie, and gives them back in C order."""
    numpy = pytest.importorskip("safetensors.numpy")
    fm = plain()
    state = favor_np.AttentionState.zeros(fm, 6, 4).update(K, V)
    arrays = {"c": state.c, "S": state.S, "z": state.z}
    arrays["projection"] = favor_np.sample_projection(64, 16)
    numpy.save_file(arrays, tmp_path / "state.safetensors")
    loaded = numpy.load_file(tmp_path / "state.safetensors")
    for name, array in arrays.items():
        assert np.array_equal(loaded[name], array), name
