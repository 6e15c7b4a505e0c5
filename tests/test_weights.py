"""Attention weights: against dense references, and against the attention they imply."""

import numpy as np
import pytest
from support import oracle
from support.inputs import MAPS, random_inputs
from support.tolerance import relative_error
from support.tuning import tuned

import favor_np
from favor_np import attention_weights
from favor_np.features import FeatureMap

RNG = np.random.default_rng(5)


def inputs(rows, keys, dim=8, std=1.0, lead=(), dtype=np.float64):
    return random_inputs(rows, dim, lead=lead, Lk=keys, std=std, dtype=dtype)[:2]


def reference(q, k, fm, **options):
    """The weights, as dense attention to the rows of the identity matrix."""
    return oracle.favor_attention(q, k, np.eye(k.shape[-2]), fm, **options)


def maps(name, dim=8, m=20, heads=None):
    shape = (m, dim) if heads is None else (heads, m, dim)
    return FeatureMap.from_projection(RNG.standard_normal(shape), **MAPS[name])


@pytest.fixture(params=[5, 1024], ids=["blocks of 5", "one block"])
def block(request):
    with tuned(BLOCK=request.param):
        yield


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_those_of_the_definition(name, causal):
    fm = maps(name)
    q, k = inputs(13, 13, lead=(2,))
    mask = RNG.random((2, 13)) < 0.7
    mask[0, 0] = False  # with causal attention, a row without a key
    positions = np.arange(13) if causal else None
    got = attention_weights(q, k, fm, positions=positions, key_mask=mask)
    expected = reference(q, k, fm, causal=causal, key_mask=mask)
    assert relative_error(got, expected) < 1e-13
    assert (got[~np.broadcast_to(mask[:, None, :], got.shape)] == 0).all()
    assert (got[0, 0] == 0).all() == causal
    sums = got.sum(-1)
    np.testing.assert_allclose(sums[sums != 0], 1, rtol=1e-13)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("heads", [None, 2])
def test_biases_decay_and_groups(heads):
    fm = maps("antithetic" if "antithetic" in MAPS else next(iter(MAPS)), heads=heads)
    q, k, v = random_inputs(13, 8, lead=(3, 4), kv_lead=(3, 2))
    bias, gates = RNG.normal(size=(2, 13)), RNG.uniform(0.01, 1, (3, 2, 13))
    bias[0, 3] = -np.inf
    for decay in (None, 0.8, gates):
        options = {"key_bias": bias, "enable_gqa": True, "decay": decay}
        chosen = [{"causal": True}] if decay is not None else [{"causal": True}, {}]
        for more in chosen:
            got = attention_weights(q, k, fm, **options, **more)
            expected = favor_np.favor_attention(q, k, v, fm, **options, **more)
            shared = np.repeat(v, 2, axis=1)
            assert relative_error(got @ shared, expected) < 1e-13
    some = attention_weights(q[..., 5:9, :], k, fm, positions=range(5, 9), **options)
    assert relative_error(some, got[..., 5:9, :]) < 1e-13
    with pytest.raises(ValueError, match="needs causal"):
        attention_weights(q, k, fm, decay=0.9, enable_gqa=True)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    ("dtype", "std", "rounding"),
    [
        (np.float32, 0.3, 2e-6),
        (np.float32, 2.0, 2e-6),
        (np.float32, 30.0, 1e-4),
        (np.float64, 0.3, 1e-13),
        (np.float64, 30.0, 1e-12),
        (np.float64, 1000.0, 1e-12),  # far beyond the range of exp
    ],
)
def test_times_the_values_they_are_attention(name, dtype, std, rounding):
    fm = maps(name)
    q, k = inputs(17, 17, std=std, dtype=dtype)
    v = RNG.standard_normal((17, 3)).astype(dtype)
    for causal in (False, True):
        got = attention_weights(q, k, fm, positions=np.arange(17) if causal else None)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
        out = favor_np.favor_attention(q, k, v, fm, causal=causal)
        assert relative_error(got @ v, out) < rounding


def test_a_projection_a_head_and_leading_axes():
    fm = maps("antithetic", heads=3)
    q, k = inputs(4, 9, lead=(2, 3))
    got = attention_weights(q, k[0], fm)
    assert got.shape == (2, 3, 4, 9)
    assert relative_error(got, reference(q, k[0], fm)) < 1e-13
    shared = attention_weights(q[0, 0], k[0, 0], fm)  # one q and k, read by three heads
    assert shared.shape == (3, 4, 9)
    np.testing.assert_allclose(shared[0], got[0, 0], rtol=1e-12)


def test_rows_of_a_long_sequence():
    fm = maps("positive")
    q, k = inputs(40, 40)
    everything = attention_weights(q, k, fm, positions=np.arange(40))
    rows = [31, 7, 7, 0, 39]  # in any order
    np.testing.assert_array_equal(everything, attention_weights(q, k, fm, causal=True))
    got = attention_weights(q[rows], k, fm, positions=rows)
    np.testing.assert_allclose(got, everything[rows], rtol=1e-12)
    assert (got[1, 8:] == 0).all()
    past_the_end = attention_weights(q[rows], k, fm, positions=[50] * 5)
    np.testing.assert_allclose(past_the_end, attention_weights(q[rows], k, fm), rtol=1e-12)


def test_an_unseen_key_moves_nothing():
    fm = maps("positive")
    q, k = inputs(12, 12)
    changed, mask = k.copy(), np.ones(12, bool)
    changed[6:], mask[9:] = 1e4, False
    causal = [attention_weights(q, x, fm, positions=np.arange(12)) for x in (k, changed)]
    np.testing.assert_array_equal(causal[0][:6], causal[1][:6])
    changed = k.copy()
    changed[9:] = np.nan
    masked = [attention_weights(q, x, fm, key_mask=mask) for x in (k, changed)]
    np.testing.assert_array_equal(*masked)


def test_keys_of_very_different_size():
    fm = maps("positive")
    q, k = inputs(6, 6)
    k *= 10.0 ** np.arange(3, -3, -1)[:, None]  # the first row sees the least likely key alone
    got = attention_weights(q, k, fm, positions=np.arange(6))
    assert relative_error(got, reference(q, k, fm, causal=True)) < 1e-9
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-12)


def test_nan_reaches_the_rows_that_see_it():
    fm = maps("positive")
    q, k = inputs(5, 5)
    q[1] = np.nan
    k[3] = np.nan
    got = attention_weights(q, k, fm, positions=np.arange(5))
    np.testing.assert_array_equal(np.isnan(got).any(-1), [False, True, False, True, True])


@pytest.mark.parametrize("name", ["positive", "antithetic"])
def test_bias_is_that_of_the_keys(name):
    fm = maps(name)
    bias = RNG.standard_normal(fm.bias.shape)
    object.__setattr__(fm, "bias", bias)
    q, k = inputs(3, 7)
    products = fm.query_features(q) @ fm.key_features(k).T
    expected = products / products.sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_weights(q, k, fm), expected, rtol=1e-12)


def test_types_and_emptiness():
    fm = maps("positive")
    q, k = inputs(3, 4)
    assert attention_weights(q.astype(np.float16), k.astype(np.float16), fm).dtype == np.float16
    assert attention_weights(np.ones((3, 8), int), np.ones((4, 8), int), fm).dtype == np.float64
    assert attention_weights(q, k[:0], fm).shape == (3, 0)
    assert attention_weights(q[:0], k, fm, positions=[]).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": np.ones((3, 7))}, ValueError, "q must have shape"),
        ({"k": np.ones((4, 7))}, ValueError, "k must have shape"),
        ({"k": np.ones((4, 8), complex)}, TypeError, "k must hold real"),
        ({"feature_map": "positive"}, TypeError, "feature_map must be"),
        ({"feature_map": favor_np.feature_map("trig", 8, 4)}, ValueError, "trig"),
        (
            {"positions": [0, 1, 2], "causal": True},
            ValueError,
            "positions cannot be used with causal",
        ),
        ({"positions": [0, 1]}, ValueError, r"positions must have shape \(3,\)"),
        ({"positions": [0, 1, 1.5]}, TypeError, "positions must be integers"),
        ({"positions": [0, -1, 2]}, ValueError, "positions must be at least 0, got -1"),
        ({"key_mask": [1, 0, 1, 1]}, TypeError, "key_mask"),
        ({"key_mask": [True]}, ValueError, "key_mask"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    q, k = inputs(3, 4)
    with pytest.raises(error, match=message):
        attention_weights(**({"q": q, "k": k, "feature_map": maps("positive")} | change))
