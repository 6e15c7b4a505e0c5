"""favor_attention as a primitive of HIPS autograd."""

import numpy as np
import pytest
from support import bridges
from support.bridges import FM, assert_close, each_option, inputs

autograd = bridges.require("autograd")
import autograd.numpy as anp

from favor_np.interop.autograd import favor_attention


def gradients(loss, *arrays):
    return autograd.grad(lambda arrays: loss(*arrays))(arrays)


@each_option
def test_gradients(options):
    *arrays, g = inputs(grouped="enable_gqa" in options)

    def loss(q, k, v, projection):
        return (favor_attention(q, k, v, FM, projection=projection, **options) * g).sum()

    out, expected = bridges.expected(*arrays, g, **options)
    assert np.array_equal(favor_attention(*arrays[:3], FM, **options), out)
    assert_close(gradients(loss, *arrays), expected, 1e-15)
    without = gradients(lambda q, k, v: (favor_attention(q, k, v, FM, **options) * g).sum(),
                        *arrays[:3])  # fmt: skip
    assert_close(without, expected[:3], 1e-15)


@pytest.mark.parametrize("causal", [False, True])
def test_autograd_finds_the_same(causal):
    *arrays, g = inputs()

    def einsum(path, a, b):  # autograd's has no ellipsis for all of its gradients
        return anp.matmul(a, anp.swapaxes(b, -1, -2)) if path[-1] in "jm" else anp.matmul(a, b)

    def dense(*arrays):
        return (bridges.dense(anp, *arrays, causal=causal, einsum=einsum) * g).sum()

    def ours(q, k, v, projection):
        return (favor_attention(q, k, v, FM, projection=projection, causal=causal) * g).sum()

    assert_close(gradients(ours, *arrays), gradients(dense, *arrays))


def test_inside_a_larger_function():
    """One array in three places, and a jacobian: many pullbacks of one call."""
    x = inputs()[0]
    out = favor_attention(x, x, x, FM)
    jacobian = autograd.jacobian(lambda x: favor_attention(x, x, x, FM))(x)
    assert jacobian.shape == out.shape + x.shape
    step = 1e-6 * np.cos(np.arange(x.size)).reshape(x.shape)
    moved = (favor_attention(*[x + sign * step] * 3, FM) for sign in (1, -1))
    assert_close([np.tensordot(jacobian, 2 * step, 3)], [np.subtract(*moved)], 1e-6)


def test_a_second_derivative_is_refused():
    q, k, v, *_ = inputs()
    for loss in (lambda q: favor_attention(q, k, v, FM).sum(),
                 lambda q: (favor_attention(q, k, v, FM) ** 2).sum()):  # fmt: skip
        with pytest.raises(NotImplementedError, match="no second derivative"):
            autograd.grad(lambda q, loss=loss: autograd.grad(loss)(q).sum())(q)


def test_refused():
    q, k, v, *_ = inputs()
    with pytest.raises(TypeError, match="feature_map must be a FeatureMap, got None"):
        favor_attention(q, k, v, None)
    with pytest.raises(ValueError, match="k must have shape"):
        favor_attention(q, k[..., 1:], v, FM)
    with pytest.raises(TypeError, match="decay must be a real number"):
        autograd.grad(lambda d: favor_attention(q, k, v, FM, causal=True, decay=d).sum())(0.9)


def test_without_autograd_the_error_names_the_extra():
    bridges.assert_error_names_the_extra("autograd", "autograd")


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_of_bias_and_factors(alone):
    (*arrays, g), expected = bridges.weights_of_keys(alone)

    def loss(q, k, v, bias, gates):
        out = favor_attention(q, k, v, FM, causal=True, key_bias=bias, decay=gates)
        return (out * g).sum()

    found = [autograd.grad(loss, i)(*arrays) for i in range(5)]
    bridges.assert_close(found, expected)
