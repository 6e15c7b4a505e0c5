"""What the user gets for every kind of input: one test or more for each row of the table."""

import numpy as np
import pytest
from support import child

import favor_np
from favor_np import (
    AttentionState,
    FeatureMap,
    exact_attention,
    favor_attention,
    feature_map,
    validation,
)

FM = FeatureMap.from_projection(np.random.default_rng(0).standard_normal((7, 4)))


def favor(q, k, v, **options):
    return favor_attention(q, k, v, FM, **options)


FUNCTIONS = [favor, exact_attention]
each_function = pytest.mark.parametrize("attention", FUNCTIONS)


def inputs(*lead, dtype=np.float64):
    rng = np.random.default_rng(1)
    shapes = (*lead, 6, 4), (*lead, 6, 4), (*lead, 6, 3)
    return tuple((rng.integers(-8, 9, shape) / 8).astype(dtype) for shape in shapes)


def namespace():
    """What the expressions of REFUSED may use."""
    q, k, v = inputs(2)
    return globals() | {"q": q, "k": k, "v": v, "z": np.zeros}


def new_state(batch=2):
    return AttentionState.zeros(FM, value_dim=3, batch_shape=(batch,), dtype=np.float64)


def window_state(batch):
    return favor_np.WindowState(FM, 3, 5, batch, dtype=np.float64)


# -- Refused: a builtin error that names the argument, what was got and what was expected --------

REFUSED = [
    # shapes
    ("favor(q, k[..., :3], v)", ValueError, r"k must have shape .*4.* got shape \(2, 6, 3\)"),
    ("favor(q[..., :3], k, v)", ValueError, r"q must have shape .*4.* got shape \(2, 6, 3\)"),
    (
        "exact_attention(q, k[..., :3], v)",
        ValueError,
        r"k must have shape .* got shape \(2, 6, 3\)",
    ),
    ("favor(q, k, v[:, :5])", ValueError, r"v .* got .*\(2, 5, 3\)"),
    ("exact_attention(q, k, v[:, :5])", ValueError, r"v .* got .*\(2, 5, 3\)"),
    ("favor(q[0, 0], k, v)", ValueError, r"q must have .* got shape \(4,\)"),
    ("exact_attention(q, k, 1.0)", ValueError, r"v must have .* got shape \(\)"),
    ("favor(z((3, 6, 4)), k, v)", ValueError, r"broadcast.*\(3,\).*\(2,\)"),
    ("exact_attention(q, z((3, 6, 4)), v)", ValueError, r"broadcast.*\(3,\).*\(2,\)"),
    ("favor(q, k, v, key_mask=z(5, bool))", ValueError, r"key_mask .* got shape \(5,\)"),
    ("favor(q, k, v, key_mask=z((3, 6), bool))", ValueError, r"key_mask|broadcast"),
    ("exact_attention(q, k, v, key_mask=z(5, bool))", ValueError, r"key_mask .* got shape \(5,\)"),
    ("favor(q, k, v, key_mask=z(6))", TypeError, "key_mask must be bool"),
    ("exact_attention(q, k, v, key_mask=z(6, int))", TypeError, "key_mask must be bool"),
    ("favor(q, k, v, out=z((2, 5, 3)))", ValueError, r"out must have shape \(2, 6, 3\), got"),
    ("favor(q, k, v, out=z((6, 3)))", ValueError, r"out must have shape \(2, 6, 3\), got"),
    ("favor(q, k, v, out=z((2, 6, 3), 'f4'))", TypeError, "out must have dtype float64, got"),
    ("favor(q, k, v, out=[[1.0]])", TypeError, "out must be a numpy.ndarray, got"),
    ("favor(q, k, v, out=read_only())", ValueError, "out must be writeable"),
    ("exact_attention(z((6, 0)), z((6, 0)), z((6, 3)))", ValueError, "q .*got"),
    ("favor(z((6, 0)), z((6, 0)), z((6, 3)))", ValueError, "q .*got"),
    # causal and grouped heads
    ("favor(q[:, :5], k, v, causal=True)", ValueError, "causal.*5.*6"),
    ("exact_attention(q[:, :5], k, v, causal=True)", ValueError, "causal.*5.*6"),
    ("favor(z((3, 6, 4)), k, v, enable_gqa=True)", ValueError, "heads.*3.*2"),
    ("exact_attention(z((3, 6, 4)), k, v, enable_gqa=True)", ValueError, "heads.*3.*2"),
    ("favor(q[0], k[0], v[0], enable_gqa=True)", ValueError, "enable_gqa|axes|heads"),
    ("favor_attention(q, k, v, per_head(3))", ValueError, "heads|broadcast"),
    # types of arrays
    *(
        (f"{f}({', '.join(a if x == name else x for x in 'qkv')})", TypeError, f"{name} must hold")
        for f in ("favor", "exact_attention")
        for name, a in [
            ("q", "q + 1j"),
            ("k", "k.astype(object)"),
            ("v", "v.astype(str)"),
            ("q", "q.astype('M8[s]')"),
            ("k", "k.astype('m8[s]')"),
            ("v", "v.astype(np.longdouble)"),
            ("q", "None"),
            ("k", "'text'"),
            ("v", "z((2, 6, 3), 'V2')"),
        ]
    ),
    ("favor(q[0].view(np.matrix), k, v)", TypeError, "q must be an array, got numpy.matrix"),
    ("exact_attention(q, k[0].view(np.matrix), v)", TypeError, "k must be an array, got numpy.mat"),
    ("favor(q, np.ma.masked_less(k, 0), v)", TypeError, "k is a masked array.*key_mask"),
    ("exact_attention(q, k, np.ma.masked_less(v, 0))", TypeError, "v is a masked array.*key_mask"),
    ("favor([[1.0], [1.0, 2.0]], k, v)", ValueError, "q is not a rectangular array"),
    ("exact_attention(q, [[1.0], [1.0, 2.0]], v)", ValueError, "k is not a rectangular array"),
    ("favor(Elsewhere(), k, v)", TypeError, "q does not lie in this machine's memory"),
    # not finite
    ("favor(q / 0, k, v, check_finite=True)", ValueError, "q must be finite"),
    ("favor(q, k * np.nan, v, check_finite=True)", ValueError, "k must be finite"),
    ("exact_attention(q, k, v * np.inf, check_finite=True)", ValueError, "v must be finite"),
    # scalars
    ("favor(q, k, v, num_threads=0)", ValueError, "num_threads must be at least 1, got 0"),
    ("favor(q, k, v, num_threads=1.0)", TypeError, "num_threads must be an integer, got 1.0"),
    ("exact_attention(q, k, v, num_threads=-1)", ValueError, "num_threads must be at least 1"),
    ("exact_attention(q, k, v, num_threads=True)", TypeError, "num_threads must be an integer"),
    ("exact_attention(q, k, v, scale=0)", ValueError, "scale must be finite and greater than 0"),
    ("exact_attention(q, k, v, scale=np.nan)", ValueError, "scale must be finite"),
    ("exact_attention(q, k, v, scale='1')", TypeError, "scale must be a real number, got '1'"),
    # masks, offsets and decays that NumPy would read without a word, or without their name
    (
        "favor(q, k, v, key_mask=masked_mask())",
        TypeError,
        "key_mask is a masked array with a mask set",
    ),
    ("exact_attention(q, k, v, key_mask=masked_mask())", TypeError, "key_mask is a masked array"),
    ("new_state().update(k, v, masked_mask())", TypeError, "key_mask is a masked array"),
    (
        "favor(q, k, v, key_mask=[[True], [True, False]])",
        ValueError,
        "key_mask is not a rectangular",
    ),
    ("favor(q, k, v, key_mask=Elsewhere())", TypeError, "key_mask does not lie in this machine"),
    (
        "favor(q, k, v, cu_seqlens=[[0], [3, 6]])",
        ValueError,
        "cu_seqlens is not a rectangular array",
    ),
    (
        "favor(q, k, v, cu_seqlens=np.ma.masked_equal([0, 3, 6], 3))",
        TypeError,
        "cu_seqlens is a masked array",
    ),
    (
        "favor(q, k, v, causal=True, decay=[[0.5], [0.5, 0.6]])",
        ValueError,
        "decay is not a rectangular array",
    ),
    (
        "favor(q, k, v, causal=True, decay=np.ma.masked_less([0.5, 0.9], 0.6))",
        TypeError,
        "decay is a masked array",
    ),
    # feature maps and states
    ("favor_attention(q, k, v, None)", TypeError, "feature_map must be a FeatureMap, got None"),
    ("favor_attention(q, k, v, z((7, 4)))", TypeError, "feature_map must be a FeatureMap, got"),
    ("favor_attention(q, k, v, feature_map('trig', 4, 8))", ValueError, "trig"),
    ("favor(q, k, v, state=z(3))", TypeError, "state must be an AttentionState, got"),
    (
        "favor_attention(q, k, v, other(), state=new_state())",
        ValueError,
        "state.*feature map",
    ),
    ("favor(q, k, z((2, 6, 5)), state=new_state())", ValueError, "state|value"),
    (
        "favor(z((3, 6, 4)), z((3, 6, 4)), z((3, 6, 3)), state=new_state())",
        ValueError,
        "state|broadcast",
    ),
    ("AttentionState.zeros(None, value_dim=3)", TypeError, "feature_map must be a FeatureMap"),
    ("AttentionState.zeros(FM, value_dim=-1)", ValueError, "value_dim must be at least"),
    ("AttentionState.zeros(FM, value_dim=2.0)", TypeError, "value_dim must be an integer"),
    ("AttentionState.zeros(FM, value_dim=2, batch_shape=(-1,))", ValueError, "batch_shape"),
    ("AttentionState.zeros(FM, value_dim=2, batch_shape='2')", TypeError, "batch_shape"),
    ("AttentionState.zeros(feature_map('trig', 4, 8), value_dim=2)", ValueError, "trig"),
    ("new_state().update(k, v[:, :5])", ValueError, r"v .* got .*\(2, 5, 3\)"),
    ("new_state().update(k[..., :3], v)", ValueError, r"k must have shape"),
    ("new_state().update(k, v[..., :2])", ValueError, r"v must have shape"),
    ("new_state().update(z((3, 6, 4)), v)", ValueError, "k|broadcast"),
    ("new_state().update(k, v, key_mask=z(5, bool))", ValueError, "key_mask"),
    ("new_state().update(k + 1j, v)", TypeError, "k must hold"),
    ("new_state().update(None, v)", TypeError, "k must be an array, got None"),
    ("new_state().update(k, None)", TypeError, "v must be an array, got None"),
    ("new_state().attend(None)", TypeError, "q must be an array, got None"),
    ("new_state().step(q[:, 0], None, v[:, 0])", TypeError, "k must hold real numbers"),
    ("new_state().update(k, v, check_finite=1)", TypeError, "check_finite must be True or False"),
    # more axes than the state has, or longer ones: kernels would write behind its arrays
    *(
        (f"new_state().{call}", ValueError, r"state has batch_shape \(2,\), but k and v need")
        for call in (
            "update(z((3, 2, 6, 4)), v)",
            "update(k, z((3, 2, 6, 3)))",
            "update(k, v, z((3, 2, 6), bool))",
            "update(z((3, 1, 6, 4)), z((3, 1, 6, 3)))",
        )
    ),
    *(
        (f"favor({arrays}, state=new_state())", ValueError, r"state has batch_shape \(2,\), but")
        for arrays in (
            "q, z((3, 2, 6, 4)), v",
            "q, k, z((3, 2, 6, 3))",
            "q, k, v, key_mask=z((3, 2, 6), bool)",
        )
    ),
    (
        "new_state(1).update(k, v)",
        ValueError,
        r"state has batch_shape \(1,\), but k and v need \(2,\)",
    ),
    (
        "window_state(1).update(k, v)",
        ValueError,
        r"state has batch_shape \(1,\), but k and v need \(2,\)",
    ),
    ("new_state().attend(q[..., :3])", ValueError, "q must have shape"),
    ("new_state().attend(q + 1j)", TypeError, "q must hold"),
    ("new_state().step(q[:, 0, :3], k[:, 0], v[:, 0])", ValueError, "q must have shape"),
    ("new_state().step(q[:, 0], k[:, 0], v[:, 0, :2])", ValueError, "v must have shape"),
    ("new_state().merge(None)", TypeError, "AttentionState, got None"),
    (
        "new_state().merge(AttentionState.zeros(other(), value_dim=3, batch_shape=(2,)))",
        ValueError,
        "map",
    ),
    (
        "new_state().merge(AttentionState.zeros(FM, value_dim=3, batch_shape=(3,), dtype=np.float64))",
        ValueError,
        "shape",
    ),
]


def read_only():
    out = np.zeros((2, 6, 3))
    out.setflags(write=False)
    return out


def masked_mask():
    return np.ma.array(np.ones(6, bool), mask=np.arange(6) == 2)


def per_head(heads):
    return FeatureMap.from_projection(np.ones((heads, 7, 4)))


def other():
    return feature_map("positive", dim=4, num_features=8)


class Elsewhere:
    """An array on a device that NumPy cannot read."""

    def __dlpack_device__(self):
        return (8, 0)  # Metal

    def __dlpack__(self, **options):
        raise BufferError("the array is on a Metal device")


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # q / 0 in the test's own arithmetic
def test_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        eval(call, namespace())
    assert caught.type is error


def test_refused_and_empty_calls_compile_nothing():
    """Every error above is raised, and every empty result made, without Numba being imported."""
    code = """
import sys, warnings
warnings.simplefilter("ignore")
for call, error, _ in REFUSED:
    try:
        eval(call, namespace())
    except error:
        pass
    assert "numba" not in sys.modules, call
for call, _ in EMPTY:
    eval(call, namespace())
    assert "numba" not in sys.modules, call
print("done")
"""
    assert child.python(child.names_of(__file__) + code) == "done\n"


# -- Empty ------------------------------------------------------------------------------------------

EMPTY = [
    *(
        (f"{f}(z({q}), z({k}), z({v}){more})", shape)
        for f in ("favor", "exact_attention")
        for q, k, v, more, shape in [
            ((0, 6, 4), (0, 6, 4), (0, 6, 3), "", (0, 6, 3)),
            ((2, 0, 6, 4), (2, 0, 6, 4), (2, 0, 6, 3), ", causal=True", (2, 0, 6, 3)),
            ((2, 0, 4), (2, 6, 4), (2, 6, 3), "", (2, 0, 3)),
            ((2, 0, 4), (2, 0, 4), (2, 0, 3), ", causal=True", (2, 0, 3)),
            ((2, 6, 4), (2, 0, 4), (2, 0, 3), "", (2, 6, 3)),
            ((2, 6, 4), (2, 6, 4), (2, 6, 0), "", (2, 6, 0)),
            ((0, 1, 6, 4), (3, 6, 4), (6, 3), "", (0, 3, 6, 3)),
            ((0, 4), (0, 4), (0, 0), "", (0, 0)),
        ]
    ),
]


@pytest.mark.parametrize(("call", "shape"), EMPTY, ids=[case[0] for case in EMPTY])
def test_empty(call, shape):
    out = eval(call, namespace())
    assert out.shape == shape
    assert out.dtype == np.float64
    assert not out.any()


@pytest.mark.parametrize("shape", [(2, 6, 0), (0, 6, 3), (2, 0, 3), (6, 3)])
def test_kernels_get_what_is_right_as_it_is_and_else_a_copy(shape):
    right = np.empty(shape)
    assert validation.contiguous(right, np.dtype(np.float64)) is right
    for other in (right.astype(">f8"), right.astype("f4"), np.asfortranarray(np.ones(shape))):
        found = validation.contiguous(other, np.dtype(np.float64))
        assert (found.shape, found.dtype) == (shape, np.float64)
        assert found.flags.c_contiguous


# -- Kinds of input that are accepted -----------------------------------------------------------------


@each_function
def test_dtypes(attention):
    q, k, v = inputs()
    f2, f4, f8 = np.float16, np.float32, np.float64
    for types, expected in [
        ((f4, f4, f4), f4),
        ((f8, f8, f8), f8),
        ((f4, f4, f8), f8),
        ((f8, f4, f4), f8),
        ((f2, f2, f2), f2),
        ((f2, f4, f2), f4),
        ((f2, f2, f8), f8),
        ((int, int, int), f8),
        ((f4, int, f4), f8),
        ((bool, bool, bool), f8),
        ((np.uint8, np.int16, np.uint64), f8),
    ]:
        arrays = [x.astype(t) for x, t in zip((q, k, v), types, strict=True)]
        out = attention(*arrays)
        assert out.dtype == expected, types
        wide = [x.astype(np.float32 if expected == f2 else expected) for x in arrays]
        assert np.array_equal(out, attention(*wide).astype(expected)), types


@each_function
def test_bfloat16(attention):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = inputs()
    out = attention(q.astype(bfloat16), k.astype(bfloat16), v.astype(bfloat16))
    assert out.dtype == bfloat16
    wide = attention(*(x.astype(np.float32) for x in (q, k, v)))
    assert np.array_equal(out, wide.astype(bfloat16))


class Protocol:
    """An object that gives its array in one way only."""

    def __init__(self, array, name):
        self.array = array
        if name == "__array_interface__":
            self.__array_interface__ = array.__array_interface__


class WithArray(Protocol):
    def __array__(self, dtype=None, copy=None):
        return self.array


class WithDLPack(Protocol):
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


WAYS = {
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(map(tuple, x)),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 3, axis=0)[::3],
    "negative": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "zero stride": lambda x: np.broadcast_to(x[:1], x.shape),
    "subclass": lambda x: x.view(type("Sub", (np.ndarray,), {})),
    "unmasked": np.ma.array,
    "__array__": lambda x: WithArray(x, None),
    "__array_interface__": lambda x: Protocol(x, "__array_interface__"),
    "dlpack": lambda x: WithDLPack(x, None),
}


@each_function
@pytest.mark.parametrize("way", WAYS)
def test_accepted(attention, way):
    q, k, v = inputs()
    if way == "zero stride":
        q, k, v = (np.array(WAYS[way](x)) for x in (q, k, v))
    before = [x.copy() for x in (q, k, v)]
    expected = attention(q, k, v)
    out = attention(*map(WAYS[way], (q, k, v)))
    assert type(out) is np.ndarray
    assert np.array_equal(out, expected)
    for x, y in zip((q, k, v), before, strict=True):
        assert np.array_equal(x, y)


@each_function
def test_memory_mapped(attention, tmp_path):
    arrays = inputs()
    mapped = []
    for i, x in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", x)
        mapped.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    out = attention(*mapped)
    assert type(out) is np.ndarray
    assert np.array_equal(out, attention(*arrays))


@each_function
def test_pandas(attention):
    pandas = pytest.importorskip("pandas")
    q, k, v = inputs()
    assert np.array_equal(attention(*map(pandas.DataFrame, (q, k, v))), attention(q, k, v))


@each_function
def test_scalars_of_numpy_are_scalars(attention):
    q, k, v = inputs(2)
    out = attention(q, k, v, causal=np.True_, num_threads=np.int64(1), key_mask=[True] * 6)
    assert np.array_equal(out, attention(q, k, v, causal=True))


@pytest.mark.filterwarnings("error")
@each_function
def test_too_many_elements_are_a_memory_error(attention):
    huge = np.broadcast_to(np.float32(1), (2**42, 4))
    with pytest.raises(MemoryError):
        attention(huge, huge, huge[..., :3])


# -- out= ----------------------------------------------------------------------------------------------


def test_out():
    q, k, v = inputs(2)
    expected = favor(q, k, v, causal=True)
    out = np.full((2, 6, 3), np.nan)
    assert favor(q, k, v, causal=True, out=out) is out
    assert np.array_equal(out, expected)
    wide = np.full((2, 12, 5), np.nan)
    favor(q, k, v, causal=True, out=wide[:, ::-2, 1:4])  # any strides
    assert np.array_equal(wide[:, ::-2, 1:4], expected)
    assert np.isnan(wide[:, ::2]).all()
    swapped = np.empty((2, 6, 3), ">f8")
    with pytest.raises(TypeError, match="out must have dtype float64"):
        favor(q, k, v, out=swapped)
    out, _ = favor(q, k, v, causal=True, out=out, return_state=True)
    assert np.array_equal(out, expected)
    half = np.empty((2, 6, 3), np.float16)
    favor(*(x.astype(np.float16) for x in (q, k, v)), causal=True, out=half)
    assert np.allclose(half, expected, atol=2e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_out_that_overlaps_an_input(causal, dtype):
    q, k, v = (np.repeat(x, 40, axis=-2)[..., :4] for x in inputs(2, dtype=dtype))
    v = np.concatenate([v, v], -1)[..., :4]
    expected = favor(q, k, v, causal=causal)
    for which in range(3):
        arrays = [x.copy() for x in (q, k, v)]
        favor(*arrays, causal=causal, out=arrays[which])
        assert np.array_equal(arrays[which], expected), "qkv"[which]
    memory = np.zeros((2, 241, 4), dtype)
    memory[:, 1:] = v
    favor(q, k, memory[:, 1:], causal=causal, out=memory[:, :-1])
    assert np.array_equal(memory[:, :-1], expected)
    memory[:, 1:] = v
    favor(q, k, memory[:, 1:], causal=causal, out=memory[:, ::-1][:, :-1])
    assert np.array_equal(memory[:, ::-1][:, :-1], expected)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_out_that_overlaps_the_mask(window, dtype):
    """Its bytes are those of the first rows of the result, or lie among them."""
    q, k, v = (np.repeat(x, 40, axis=-2)[..., :4] for x in inputs(dtype=dtype))
    mask = np.random.default_rng(0).random(240) < 0.5
    options = {"causal": window is not None, "window": window}
    expected = favor(q, k, v[..., :3], key_mask=mask, **options)
    for start in (0, 7, 1000):
        out = np.zeros((240, 3), dtype)
        inside = out.view(np.bool_).reshape(-1)[start : start + 240]
        inside[:] = mask
        favor(q, k, v[..., :3], key_mask=inside, out=out, **options)
        assert np.array_equal(out, expected)


def test_a_masked_array_without_a_mask_set_is_a_mask():
    q, k, v = inputs(2)
    mask = np.arange(6) != 2
    expected = favor(q, k, v, key_mask=mask)
    assert np.array_equal(favor(q, k, v, key_mask=np.ma.array(mask)), expected)
    assert np.array_equal(favor(q, k, v, key_mask=mask.tolist()), expected)


# -- Keys that a state refuses ---------------------------------------------------------------------


def states():
    options = {"batch_shape": (2,), "dtype": np.float32}
    plain = AttentionState.zeros(FM, 3, decay=[0.9, 1], **options)
    packed = AttentionState.zeros(FM, 3, sequences=2, **options)
    return plain, packed, favor_np.WindowState(FM, 3, 4, **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("which", range(3))
def test_a_state_refuses_what_is_not_finite_before_it_is_touched(which, bad):
    """1e200 is finite, but not in the dtype of the state."""
    state = states()[which]
    packed = {"cu_seqlens": [0, 2, 6]} if which == 1 else {}
    step = np.s_[:, :2] if which == 1 else np.s_[:, 0]
    q, k, v = inputs(2)
    state.update(k, v, **packed)
    before = state.copy()
    for name, array in {"q": q, "k": k, "v": v}.items():
        arrays = {"q": q, "k": k, "v": v, name: array.copy()}
        arrays[name][1, 1 if which == 1 else 0, 2] = bad
        token = {n: a[step] for n, a in arrays.items()}
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            state.step(**token, check_finite=True)
        if name != "q":
            del arrays["q"]
            with pytest.raises(ValueError, match=f"{name} must be finite"):
                state.update(**arrays, **packed, check_finite=True)
            with pytest.raises(ValueError, match=f"{name} must be finite"):  # a masked one as well
                state.update(**arrays, key_mask=np.zeros(6, bool), **packed, check_finite=True)
    expected = before.step(q[step], k[step], v[step])
    assert np.array_equal(state.step(q[step], k[step], v[step], check_finite=True), expected)
    assert np.isfinite(expected).all()
    state.update(k, v, **packed, check_finite=True)
    before.update(k, v, **packed)
    assert np.array_equal(state.attend(q, **packed), before.attend(q, **packed))


# -- Errors are never half a result -----------------------------------------------------------------------


def test_a_refused_update_leaves_the_state_alone():
    q, k, v = inputs(2)
    state = AttentionState.zeros(FM, value_dim=3, batch_shape=(2,), dtype=np.float64)
    state.update(k, v)
    before = state.attend(q)
    for call in ("state.update(k, v[:, :5])", "state.step(q[:, 0], k[:, 0], v[:, 0, :2])"):
        with pytest.raises(ValueError, match="v "):
            eval(call, {"state": state, "q": q, "k": k, "v": v})
    assert np.array_equal(state.attend(q), before)


def test_warnings_are_not_raised_by_extreme_numbers():
    """The suite turns warnings into errors: overflow, underflow and NaN must stay silent."""
    q, k, v = inputs()
    for attention in FUNCTIONS:
        for size in (0.0, 1e-300, 1e300, np.nan):
            attention(size * q, k, v)
            attention(q, size * k, v, causal=True)
    FM.key_features(1e200 * k)


def test_public_names():
    for name in ("AttentionState", "FeatureMap", "exact_attention", "favor_attention",
                 "feature_map", "sample_projection"):  # fmt: skip
        assert name in favor_np.__all__
        assert getattr(favor_np, name).__doc__
