"""What the tests of the bridges share: inputs, the gradients they must give, the examples."""

import doctest
import importlib
import os

import numpy as np
import pytest

import favor_np
from support import child
from support.inputs import random_inputs
from support.tolerance import relative_error

FM = favor_np.FeatureMap.from_projection(
    np.random.default_rng(9).standard_normal((7, 6)), antithetic=True
)
OPTIONS = {
    "bidirectional": {},
    "causal": {"causal": True},
    "masked": {"key_mask": np.arange(20) % 3 > 0},
    "packed": {"causal": True, "cu_seqlens": np.array([0, 5, 20])},
    "grouped": {"enable_gqa": True},
    "decay": {"causal": True, "decay": np.array([0.5, 0.9])},
    "bias": {"key_bias": np.linspace(-2, 3, 20)},
    "gates": {"causal": True, "decay": np.linspace(0.3, 1, 40).reshape(2, 20)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def require(name):
    """Import a framework; where there is none the tests are skipped, but not in CI."""
    if os.environ.get("FAVOR_NP_TEST_INTEROP") == "require":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"needs {name}, see noxfile.py")


def inputs(*, grouped=False, dtype=np.float64, seed=0):
    """q, k, v, a projection and a cotangent."""
    lead = (4,) if grouped else (2,)
    q, k, v, g = random_inputs(20, lead=lead, kv_lead=(2,), seed=seed, dtype=dtype, cotangent=True)
    return q, k, v, FM.projection.astype(dtype), g


def expected(q, k, v, projection, g, **options):
    """The result and the gradients of favor_attention_vjp."""
    fm = favor_np.FeatureMap.from_projection(projection, antithetic=True)
    out, pullback = favor_np.favor_attention_vjp(q, k, v, fm, **options)
    grads = pullback(g)
    return out, (grads.q, grads.k, grads.v, grads.projection)


def weights_of_keys(alone):
    """A bias and a factor for each token, and their gradients with those of q, k and v.

    If they are `alone`, they have a leading axis that k and v have not.
    """
    q, k, v, _, g = inputs()
    if alone:
        k, v = k[0], v[0]
    rng = np.random.default_rng(4)
    bias, gates = rng.normal(size=(1 + alone, 20)), rng.uniform(0.2, 1, (2, 20))
    _, pullback = favor_np.favor_attention_vjp(q, k, v, FM, causal=True, key_bias=bias, decay=gates)
    grads = pullback(g)
    return (q, k, v, bias, gates, g), (grads.q, grads.k, grads.v, grads.key_bias, grads.decay)


def dense(np, q, k, v, projection, *, causal, einsum, scale=6**-0.5):
    """FAVOR+ with antithetic features in any array library: what its own autodiff is given."""
    y_q, y_k = (einsum("...ld,md->...lm", x, projection) * scale**0.5 for x in (q, k))
    h = scale / 2 * (k**2).sum(-1)[..., None]
    weights = einsum("...im,...jm->...ij", np.exp(y_q), np.exp(y_k - h))
    weights = weights + einsum("...im,...jm->...ij", np.exp(-y_q), np.exp(-y_k - h))
    if causal:
        weights = np.tril(weights)
    return einsum("...ij,...jv->...iv", weights, v) / weights.sum(-1)[..., None]


def assert_close(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert relative_error(np.asarray(a), np.asarray(b)) < tolerance


def assert_examples_are_right(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, optionflags=flags)
    assert result.attempted
    assert not result.failed


def assert_error_names_the_extra(framework, name):
    """Without the framework; the package itself never imports it."""
    code = f"""
    import sys
    sys.modules["{framework}"] = None
    import favor_np.interop
    try:
        import favor_np.interop.{framework}
    except ImportError as error:
        print(error.name, error)
    """
    text = f"needs {name}: pip install 'favor_np[{framework}]'"
    assert child.python(code) == f"{framework} favor_np.interop.{framework} {text}\n"
