"""feature_map and FeatureMap: the definition, and the manners of a value object."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from support import oracle
from support.inputs import draw
from support.tolerance import relative_error

from favor_np import FeatureMap, feature_map, sample_projection

KINDS = ["positive", "relu", "elu", "trig"]
MAPS = [*((kind, False) for kind in KINDS), ("positive", True)]
each_map = pytest.mark.parametrize(("kind", "antithetic"), MAPS)


def mean_error(got, expected):
    return relative_error(got, np.asarray(expected, np.float64))


@each_map
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_definition(kind, antithetic, scale):
    W, x = draw(7, 5), 1.5 * draw(11, 5, seed=1)
    fm = FeatureMap.from_projection(
        W, kind, scale=scale, antithetic=antithetic, kernel_epsilon=0.01
    )
    expected = oracle.features(x, W, kind, scale, antithetic, kernel_epsilon=0.01)
    assert fm.num_features == expected.shape[-1]
    for phi in (fm.query_features(x), fm.key_features(x)):
        assert phi.dtype == np.float64
        assert relative_error(phi, expected) < 1e-14


@each_map
def test_leading_axes_and_heads(kind, antithetic):
    W, x = draw(3, 6, 4), draw(2, 3, 9, 4, seed=1)
    fm = FeatureMap.from_projection(W, kind, antithetic=antithetic)
    phi = fm.key_features(x)
    assert phi.shape == (2, 3, 9, fm.num_features)
    for head in range(3):
        alone = FeatureMap.from_projection(W[head], kind, antithetic=antithetic)
        assert relative_error(phi[:, head], alone.key_features(x[:, head])) < 1e-15
    assert alone.key_features(x).shape == (2, 3, 9, fm.num_features)
    assert alone.key_features(x[:, :, :0]).shape == (2, 3, 0, fm.num_features)
    assert fm.query_features(x[0, 0]).shape == (3, 9, fm.num_features)  # broadcast over heads


@each_map
def test_the_attributes_that_kernels_read(kind, antithetic):
    """log phi = weight.x + bias - key_norm |x|**2, with the partner -weight.x."""
    fm = FeatureMap.from_projection(draw(6, 4), kind, scale=0.7, antithetic=antithetic)
    assert (fm.dim, fm.num_heads, fm.scale, fm.kernel_epsilon) == (4, None, 0.7, 1e-3)
    assert fm.key_weight.shape == (1, 6, 4)
    assert fm.bias.shape == (1, 6)
    assert fm.key_weight.dtype == fm.bias.dtype == np.float64
    assert np.array_equal(fm.key_weight[0], np.sqrt(0.7) * fm.projection)
    assert fm.key_norm == {"positive": 0.35, "trig": -0.35}.get(kind, 0.0)
    if kind == "positive":
        x = draw(9, 4, seed=1)
        y = x @ fm.key_weight[0].T + fm.bias
        y = np.concatenate([y, -y], -1) if antithetic else y
        log_phi = y - fm.key_norm * np.sum(x * x, -1, keepdims=True)
        phi = np.exp(log_phi) / np.sqrt(fm.num_features)
        assert relative_error(fm.key_features(x), phi) < 1e-14
    per_head = FeatureMap.from_projection(draw(3, 6, 4))
    assert (per_head.num_heads, per_head.key_weight.shape) == (3, (3, 6, 4))


def test_num_features_counts_all_features():
    shapes = {kind: feature_map(kind, dim=4, num_features=10).projection.shape for kind in KINDS}
    assert shapes == {"positive": (5, 4), "relu": (10, 4), "elu": (10, 4), "trig": (5, 4)}
    assert feature_map("positive", 4, 10, antithetic=False).projection.shape == (10, 4)
    for kind in KINDS:
        fm = feature_map(kind, dim=4, num_features=10)
        assert fm.num_features == 10
        assert fm.key_features(draw(3, 4)).shape == (3, 10)
        assert fm.antithetic == (kind == "positive")


def test_feature_map_samples_the_projection_it_says():
    fm = feature_map("relu", 6, 9, projection="iid", norms="sqrt", rng=5, dtype=np.float64)
    assert fm.projection.dtype == np.float64
    assert np.array_equal(fm.projection, sample_projection(9, 6, "iid", "sqrt", rng=5))
    assert fm.scale == 6**-0.5
    assert feature_map("relu", 6, 9).projection.dtype == np.float32


def test_expectation():
    """E[phi_q.phi_k] = exp(scale q.k), with the scale and the norm in the right places."""
    q, k = 0.6 * draw(2, 1, 5)
    for kind in ("positive", "trig"):
        fm = feature_map(kind, dim=5, num_features=100_000, scale=0.8, projection="iid")
        estimate = float((fm.query_features(q) * fm.key_features(k)).sum())
        assert abs(estimate / np.exp(0.8 * (q @ k.T).item()) - 1) < 0.05


def test_frozen():
    W = draw(6, 4)
    fm = FeatureMap.from_projection(W)
    W[:] = 0
    assert fm.projection.any()
    for name in ("projection", "kind", "scale", "weight", "bias", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(fm, name, None)
    for array in (fm.projection, fm.key_weight, fm.bias):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_equal_and_frozen(duplicate):
    fm = FeatureMap.from_projection(draw(3, 6, 4), scale=0.3, antithetic=True)
    twin = duplicate(fm)
    assert twin == fm
    assert hash(twin) == hash(fm)
    assert twin.fingerprint == fm.fingerprint
    assert repr(twin) == repr(fm)
    assert not twin.projection.flags.writeable
    assert not twin.key_weight.flags.writeable


def test_equality_is_by_content():
    W = draw(6, 4).astype(np.float32)
    fm = FeatureMap.from_projection(W)
    same = FeatureMap.from_projection(W.astype(np.float64)[::-1][::-1])  # dtype is no content
    other = W.copy()
    other[0, 0] += 1
    different = [
        FeatureMap.from_projection(other),
        FeatureMap.from_projection(W, "relu"),
        FeatureMap.from_projection(W, "relu", kernel_epsilon=0.1),
        FeatureMap.from_projection(W, scale=0.4),
        FeatureMap.from_projection(W, antithetic=True),
        FeatureMap.from_projection(W[None]),
        FeatureMap.from_projection(W.reshape(4, 6)),
    ]
    assert fm == same
    assert len({fm, same, *different}) == 1 + len(different)
    assert FeatureMap.from_projection(W, kernel_epsilon=0.1) == fm  # used by relu alone
    assert FeatureMap.from_projection(0 * W) == FeatureMap.from_projection(-0.0 * W)
    assert fm != "fm"


def test_kind_is_a_plain_string():
    """So that states are named alike, whatever kind of string it was given as."""
    one, two = (feature_map(kind, 4, 8, rng=0) for kind in ("relu", np.str_("relu")))
    assert one == two
    assert type(two.kind) is str


def test_fingerprint_is_pinned():
    """States on disk name the map they belong to: the fingerprint is a file format."""
    fm = feature_map("positive", dim=4, num_features=8)
    assert fm.fingerprint[:16] == "4bd8b04f688f2c12"


def test_repr_is_one_line():
    fm = feature_map("positive", dim=16, num_features=64)
    digest = fm.fingerprint[:8]
    assert repr(fm) == (
        f"<FeatureMap 'positive', antithetic, dim=16, num_features=64, scale=0.25, float32, {digest}>"
    )
    assert "num_heads=3" in repr(FeatureMap.from_projection(draw(3, 6, 4)))


def test_kinds_of_input():
    fm = FeatureMap.from_projection(draw(6, 4))
    x = np.arange(12.0).reshape(3, 4) / 8
    expected = fm.key_features(x)
    for same in (x.tolist(), x.astype(">f8"), np.asfortranarray(x), x.astype(np.float16)):
        assert np.array_equal(fm.key_features(same), expected)
    assert np.array_equal(fm.key_features((8 * x).astype(int)), fm.key_features(8 * x))
    W = draw(6, 4)
    assert FeatureMap.from_projection(W.tolist()) == FeatureMap.from_projection(W.astype(">f8"))
    assert FeatureMap.from_projection(np.eye(3, dtype=int)).projection.dtype == np.float64
    assert FeatureMap.from_projection(W.astype(np.float16)).projection.dtype == np.float32


@each_map
def test_not_finite_input_stays_in_its_row(kind, antithetic):
    fm = FeatureMap.from_projection(draw(6, 4), kind, antithetic=antithetic)
    x = draw(5, 4)
    expected = fm.key_features(x)
    x[1], x[3] = np.nan, np.inf
    phi = fm.key_features(x)
    assert np.isnan(phi[1]).all()
    assert np.array_equal(phi[::2], expected[::2])


def test_bfloat16():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    fm = FeatureMap.from_projection(draw(6, 4))
    x = np.arange(12.0).reshape(3, 4) / 8
    assert np.array_equal(fm.key_features(x.astype(bfloat16)), fm.key_features(x))


class Duck:
    def __array__(self, dtype=None, copy=None):
        return np.ones((2, 4))


def test_array_protocol():
    assert FeatureMap.from_projection(Duck()).key_features(Duck()).shape == (2, 2)


GOOD = {"kind": "positive", "dim": 4, "num_features": 8}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "softmax"}, ValueError, "kind must be one of 'positive', .* got 'softmax'"),
        ({"kind": None}, TypeError, "kind must be one of .* got None"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": -1}, ValueError, "dim must be at least 1, got -1"),
        ({"dim": 4.0}, TypeError, "dim must be an integer, got 4.0"),
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"num_features": True}, TypeError, "num_features must be an integer, got True"),
        ({"num_features": 7}, ValueError, "num_features must be even with antithetic=True, got 7"),
        ({"num_features": 7, "kind": "trig"}, ValueError, "must be even for kind='trig', got 7"),
        ({"projection": "haar"}, ValueError, "projection must be one of .* got 'haar'"),
        ({"norms": "none"}, ValueError, "norms must be one of"),
        ({"antithetic": 1}, TypeError, "antithetic must be True or False, got 1"),
        ({"scale": 0}, ValueError, "scale must be finite and greater than 0, got 0"),
        ({"scale": -1.0}, ValueError, "scale must be finite and greater than 0, got -1"),
        ({"scale": np.nan}, ValueError, "scale must be finite and greater than 0, got nan"),
        ({"scale": np.inf}, ValueError, "scale must be finite and greater than 0, got inf"),
        ({"scale": "1"}, TypeError, "scale must be a real number, got '1'"),
        ({"scale": 1j}, TypeError, "scale must be a real number, got 1j"),
        ({"scale": True}, TypeError, "scale must be a real number, got True"),
        ({"rng": -1}, ValueError, "rng must be"),
        ({"rng": "x"}, TypeError, "rng must be"),
        ({"dtype": int}, TypeError, "dtype must be float32 or float64"),
        ({"kernel_epsilon": 0}, ValueError, "kernel_epsilon must be finite and greater than 0"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        feature_map(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"projection": np.ones(3)}, ValueError, r"projection must have shape .* got shape \(3,\)"),
        ({"projection": 1.0}, ValueError, r"projection must have shape .* got shape \(\)"),
        ({"projection": np.ones((3, 0))}, ValueError, r"no axis empty, got shape \(3, 0\)"),
        ({"projection": np.ones((0, 3))}, ValueError, r"no axis empty, got shape \(0, 3\)"),
        ({"projection": np.ones((1, 1, 2, 3))}, ValueError, "projection must have shape"),
        ({"projection": [[1.0, np.nan]]}, ValueError, "projection must be finite"),
        ({"projection": [[1.0, -np.inf]]}, ValueError, "projection must be finite"),
        ({"projection": [[1.0], [1.0, 2.0]]}, ValueError, "projection is not a rectangular array"),
        (
            {"projection": [[1j]]},
            TypeError,
            "projection must hold real numbers.* got dtype complex",
        ),
        ({"projection": "text"}, TypeError, "projection must hold real numbers"),
        ({"projection": None}, TypeError, "projection must hold real numbers"),
        ({"projection": np.ones((2, 2), np.longdouble)}, TypeError, "projection must hold real"),
        ({"kind": "Positive"}, ValueError, "kind must be one of"),
        ({"kind": "relu", "antithetic": True}, ValueError, "antithetic=True needs kind='positive'"),
        ({"antithetic": None}, TypeError, "antithetic must be True or False, got None"),
        ({"scale": np.zeros(())}, ValueError, "scale must be finite and greater than 0"),
        ({"scale": np.ones(2)}, TypeError, "scale must be a real number, got an array"),
        ({"kernel_epsilon": -1e-3}, ValueError, "kernel_epsilon must be finite and greater than 0"),
        ({"kernel_epsilon": None}, TypeError, "kernel_epsilon must be a real number, got None"),
    ],
)
def test_bad_arguments_of_from_projection(change, error, message):
    with pytest.raises(error, match=message):
        FeatureMap.from_projection(**({"projection": np.ones((2, 3))} | change))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((3, 5)), ValueError, r"x must have shape \(..., L, 4\), got shape \(3, 5\)"),
        (np.ones(4), ValueError, r"x must have shape \(..., L, 4\), got shape \(4,\)"),
        (np.ones((3, 4), complex), TypeError, "x must hold real numbers .* got dtype complex128"),
        (np.ones((3, 4), object), TypeError, "x must hold real numbers"),
        (np.ones((3, 4), "V2"), TypeError, "x must hold real numbers"),
        (np.ones((3, 4), "M8[s]"), TypeError, "x must hold real numbers"),
        (np.ma.masked_less(np.arange(4.0)[None], 1), TypeError, "x is a masked array"),
        (np.ones((2, 4)).view(np.matrix), TypeError, "x must be an array, got numpy.matrix"),
        ([[1.0], [1.0, 2.0]], ValueError, "x is not a rectangular array"),
    ],
    ids=["length", "axes", "complex", "object", "void", "datetime", "masked", "matrix", "ragged"],
)
def test_bad_input_of_features(x, error, message):
    fm = feature_map(**GOOD)
    for function in (fm.query_features, fm.key_features):
        with pytest.raises(error, match=message):
            function(x)
