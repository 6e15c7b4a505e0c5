"""favor_attention in JAX: eager, compiled, differentiated, vectorised."""

import functools

import numpy as np
import pytest
from support import bridges
from support.bridges import FM, assert_close, each_option, inputs

jax = bridges.require("jax")
import jax.numpy as jnp

import favor_np.interop.jax
from favor_np.interop.jax import favor_attention


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def loss(q, k, v, projection, g, **options):
    return (favor_attention(q, k, v, FM, projection=projection, **options) * g).sum()


gradients = jax.grad(loss, argnums=(0, 1, 2, 3))


@each_option
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(options, compiled):
    arrays = inputs(grouped="enable_gqa" in options)
    out, expected = bridges.expected(*arrays, **options)
    function = jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1, 2, 3))
    value, found = (jax.jit(function) if compiled else function)(*arrays)
    assert value == pytest.approx((out * arrays[4]).sum(), rel=1e-12)
    assert_close(found, expected, 1e-15)
    attend = functools.partial(favor_attention, feature_map=FM, **options)
    result = (jax.jit(attend) if compiled else attend)(*arrays[:3])
    assert isinstance(result, jax.Array)
    assert np.array_equal(result, out)


@pytest.mark.parametrize("causal", [False, True])
def test_jax_finds_the_same(causal):
    arrays = inputs()

    def dense(*arrays):
        out = bridges.dense(jnp, *arrays[:4], causal=causal, einsum=jnp.einsum)
        return (out * arrays[4]).sum()

    expected = jax.grad(dense, argnums=(0, 1, 2, 3))(*arrays)
    assert_close(gradients(*arrays, causal=causal), expected)


def test_masks_and_offsets_may_be_traced():
    *arrays, g = inputs()
    for name in ("key_mask", "cu_seqlens"):
        value = bridges.OPTIONS["masked" if name == "key_mask" else "packed"][name]
        function = jax.jit(lambda *a, name=name: gradients(*a[:5], **{name: a[5]}))
        expected = bridges.expected(*arrays, g, **{name: value})[1]
        assert_close(function(*arrays, g, value), expected, 1e-15)


# -- vmap -------------------------------------------------------------------------------------------


def stacked(n=3, **options):
    return [np.stack(x) for x in zip(*(inputs(seed=i, **options) for i in range(n)), strict=True)]


@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_is_one_call(compiled):
    q, k, v, _, g = stacked()
    expected = bridges.expected(q, k, v, FM.projection, g, causal=True)
    function = jax.vmap(lambda q, k, v: favor_attention(q, k, v, FM, causal=True))
    assert np.array_equal((jax.jit(function) if compiled else function)(q, k, v), expected[0])
    program = str(jax.make_jaxpr(function)(q, k, v))
    assert "callback" in program
    assert "scan" not in program
    grads = jax.vmap(
        jax.grad(lambda *a: (favor_attention(*a[:3], FM, causal=True) * a[3]).sum(), (0, 1, 2))
    )
    assert_close((jax.jit(grads) if compiled else grads)(q, k, v, g), expected[1][:3], 1e-15)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, None), (2, 1, 3)])
def test_vmap_of_some_arrays(axes):
    arrays = [
        jnp.moveaxis(jnp.asarray(x), 0, axis) if axis is not None else x[0]
        for x, axis in zip(stacked()[:3], axes, strict=True)
    ]

    def attend(q, k, v):
        return favor_attention(q, k, v, FM)

    each = [
        attend(*(x if a is None else jnp.take(x, i, a) for x, a in zip(arrays, axes, strict=True)))
        for i in range(3)
    ]
    assert_close([jax.vmap(attend, axes)(*arrays)], [np.stack(each)], 1e-15)

    def total(*arrays):
        return (jax.vmap(attend, axes)(*arrays) ** 2).sum()

    def in_turn(q, k, v):
        return sum(
            (attend(*(x if a is None else jnp.take(x, i, a)
                      for x, a in zip((q, k, v), axes, strict=True))) ** 2).sum()
            for i in range(3)
        )  # fmt: skip

    assert_close(jax.grad(total, (0, 1, 2))(*arrays), jax.grad(in_turn, (0, 1, 2))(*arrays))


def test_vmap_of_arrays_with_fewer_axes_and_of_heads():
    """Leading axes are matched from the right: those of vmap come before all others."""
    q, k, v, *_ = stacked()
    fm = favor_np.FeatureMap.from_projection(np.stack([FM.projection, 2 * FM.projection]))
    mask = np.arange(60).reshape(3, 20) % 3 > 0

    def attend(q, k, v, mask):
        return favor_attention(q, k, v, fm, key_mask=mask)

    found = jax.vmap(attend)(q, k[:, 0], v[:, 0], mask)
    each = [attend(q[i], k[i, 0], v[i, 0], mask[i]) for i in range(3)]
    assert_close([found], [np.stack(each)], 1e-15)
    twice = jax.vmap(jax.vmap(lambda *a: favor_attention(*a, FM)))(q, k, v)
    assert_close([twice], [favor_np.favor_attention(q, k, v, FM)], 1e-15)


def test_vmap_with_a_projection_or_offsets():
    q, k, v, projection, g = stacked()
    for one in (projection[0], projection * np.array([1, 2, 3])[:, None, None]):
        axes = (0, 0, 0, 0 if one.ndim == 3 else None, 0)
        found = jax.vmap(gradients, axes)(q, k, v, one, g)
        each = [
            bridges.expected(q[i], k[i], v[i], one if one.ndim == 2 else one[i], g[i])[1]
            for i in range(3)
        ]
        assert_close(found, map(np.stack, zip(*each, strict=True)), 1e-13)
    offsets = np.array([[0, 5, 20], [0, 20, 20], [0, 0, 20]])
    found = jax.vmap(lambda *a: favor_attention(*a[:3], FM, cu_seqlens=a[3]))(q, k, v, offsets)
    each = [favor_np.favor_attention(q[i], k[i], v[i], FM, cu_seqlens=offsets[i]) for i in range(3)]
    assert_close([found], [np.stack(each)], 1e-15)


# -- Types and errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtypes(dtype):
    arrays = [jnp.asarray(x, dtype) for x in inputs()]
    out = favor_attention(*arrays[:3], FM)
    found = gradients(*arrays)
    assert {x.dtype for x in (out, *found)} == {np.dtype(dtype)}
    expected = bridges.expected(*(np.asarray(x, float) for x in arrays))
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    assert_close([np.asarray(x, float) for x in (out, *found)], [expected[0], *expected[1]],
                 tolerance)  # fmt: skip


def test_float64_needs_x64():
    q, k, v, *_ = inputs()
    assert favor_attention(q, k, v, FM).dtype == np.float64
    integers = [np.round(x).astype(int) for x in (q, k, v)]
    assert favor_attention(*integers, FM).dtype == np.float64
    with jax.enable_x64(False):
        for arrays in ((q, k, v), integers):
            out = favor_attention(*arrays, FM)
            assert out.dtype == np.float32
            assert_close([out], [favor_np.favor_attention(*arrays, FM)], 1e-5)


def test_large_arrays_and_many_calls():
    """A callback that waits for JAX's own threads would hang."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 4, 4096, 32), np.float32)
    fm = favor_np.feature_map("positive", dim=32, num_features=32)

    @jax.jit
    def step(q):
        return q - 0.1 * jax.grad(lambda q: favor_attention(jnp.sin(q), k, v, fm).sum())(q)

    for _ in range(10):
        q = step(q)
    assert np.isfinite(q).all()


def test_a_second_derivative_is_refused():
    q, k, v, *_ = inputs()
    with pytest.raises(ValueError, match="Pure callbacks do not support JVP"):
        jax.grad(lambda q: jax.grad(lambda q: favor_attention(q, k, v, FM).sum())(q).sum())(q)


REFUSED = [
    ("f(q, k[..., 1:], v, FM)", ValueError, "k must have shape"),
    ("f(q, k, v[:, 1:], FM)", ValueError, "v must have one row"),
    ("f(q, k, v, FM, projection=np.ones((3, 5)))", ValueError, "q must have shape"),
    ("f(q, k, v, FM, key_mask=np.ones(20))", TypeError, "key_mask must be boolean"),
    ("f(q, k, v, FM, key_mask=np.ones(19, bool))", ValueError, "key_mask must have shape"),
    ("f(q, k, v, FM, cu_seqlens=[0, 19])", ValueError, "cu_seqlens must rise from 0 to the 20"),
    ("f(q, k, v, FM, causal=1)", TypeError, "causal must be True or False"),
    ("f(q, k, v, FM, decay=0.5)", ValueError, "decay needs causal=True"),
    ("f(q, k, v + 1j, FM)", TypeError, "v must hold real numbers"),
    ("f(q, k, v, None)", TypeError, "feature_map must be a FeatureMap, got None"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED])
@pytest.mark.parametrize("traced", [False, True])
def test_refused(call, error, message, traced):
    names = globals() | {"f": favor_attention}

    def run(q, k, v):
        return eval(call, names | {"q": q, "k": k, "v": v})

    with pytest.raises(error, match=message):
        (jax.jit(run) if traced else run)(*inputs()[:3])


def test_decay_is_a_constant():
    q, k, v, *_ = inputs()
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.grad(lambda d: favor_attention(q, k, v, FM, causal=True, decay=d).sum())(0.9)


def test_examples():
    with jax.enable_x64(False):
        bridges.assert_examples_are_right(favor_np.interop.jax)


def test_without_jax_the_error_names_the_extra():
    bridges.assert_error_names_the_extra("jax", "JAX")


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_of_bias_and_factors(alone):
    (*arrays, g), expected = bridges.weights_of_keys(alone)

    def loss(q, k, v, bias, gates):
        out = favor_attention(q, k, v, FM, causal=True, key_bias=bias, decay=gates)
        return (out * g).sum()

    found = jax.jit(jax.grad(loss, argnums=range(5)))(*arrays)
    bridges.assert_close(found, expected)
    several = jax.vmap(lambda bias: favor_attention(*arrays[:3], FM, key_bias=bias))
    biases = np.random.default_rng(0).normal(size=(3, 2, 20))
    for out, bias in zip(several(biases), biases, strict=True):
        assert np.array_equal(out, favor_np.favor_attention(*arrays[:3], FM, key_bias=bias))
