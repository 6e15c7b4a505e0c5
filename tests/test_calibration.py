"""FeatureMap.calibrate: unbiased still, exact where it has to be, and more accurate.

For the false-alarm rate of the z-tests see test_statistics.  What an implementation may forget is
rejected for every method with |z| of 28 or more.
"""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from support.estimates import LIMIT, projections, z_mean
from support.families import DRAWS, FAMILIES, FEATURES, draw_family
from support.inputs import anisotropic_inputs
from support.tolerance import relative_error

from favor_np import FeatureMap, attention_weights, calibration, feature_map
from favor_np.features import Calibration

UNBIASED = [method for method in calibration.METHODS if method != "spherical"]
METHODS = [*calibration.METHODS, "auto"]
each_method = pytest.mark.parametrize("method", METHODS)
each_sign = pytest.mark.parametrize("antithetic", [False, True])


def some_calibration(dim=8, seed=1):
    """Values that no data suggested."""
    rng = np.random.default_rng(seed)
    change = np.eye(dim) + 0.2 * rng.standard_normal((dim, dim))
    return Calibration(
        0.3 * rng.standard_normal(dim),
        0.3 * rng.standard_normal(dim),
        change,
        rng.uniform(-0.15, 0.02, dim),
    )


def exact_weights(q, k, scale):
    logits = scale * q @ np.swapaxes(k, -1, -2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def error(fm, q, k):
    """Root-mean-square error of the output for values of variance one."""
    difference = attention_weights(q, k, fm) - exact_weights(q, k, fm.scale)
    return np.sqrt(np.mean(np.sum(difference**2, axis=-1)))


# -- The affine form ------------------------------------------------------------------------------


@each_sign
@pytest.mark.parametrize("change", [None, "full"])
def test_features_are_unbiased_whatever_the_calibration(antithetic, change):
    """E[phi_q . phi_k] = exp(scale q.k): a wrong centre, weight, bias or norm would move it."""
    parts = some_calibration()
    parts = parts if change else parts._replace(change=None)
    q, k = 0.4 * np.random.default_rng(2).standard_normal((2, 1, 8))
    W = projections(8, "orthogonal")
    fm = FeatureMap(W, "positive", 0.7, antithetic, 1e-3, parts)
    sample = (fm.query_features(q) * fm.key_features(k)).sum((-2, -1))
    expected = np.exp(0.7 * (q @ k.T).item())
    assert abs(z_mean(sample, expected)) < LIMIT
    assert sample.std() / np.sqrt(len(sample)) < 0.02 * expected  # so a difference is seen


@each_sign
def test_the_affine_form_is_what_the_features_are(antithetic):
    """What kernels read gives the features of keys, and of queries but for a factor a row."""
    W = np.random.default_rng(0).standard_normal((5, 8))
    fm = FeatureMap(W, "positive", 0.7, antithetic, 1e-3, some_calibration())
    q, k = anisotropic_inputs()
    t, u = k - fm.key_center, q - fm.query_center
    y, x = t @ fm.key_weight[0].T, u @ fm.query_weight[0].T
    if antithetic:
        y, x = np.hstack([y, -y]), np.hstack([x, -x])
    bias = np.tile(fm.bias[0], 2 if antithetic else 1)
    h = np.sum((t @ fm.key_factor[0].T) ** 2, axis=-1) / 2 - t @ fm.key_linear[0]
    expected = np.exp(y + bias - h[:, None]) / np.sqrt(fm.num_features)
    assert relative_error(fm.key_features(k), expected) < 1e-13
    ratio = fm.query_features(q) / np.exp(x)
    assert np.ptp(ratio / ratio[:, :1]) < 1e-12


def test_a_calibration_of_nothing_changes_nothing():
    W = np.random.default_rng(0).standard_normal((5, 8))
    plain = FeatureMap.from_projection(W, antithetic=True)
    nothing = Calibration(np.zeros(8), np.zeros(8), np.eye(8), np.zeros(8))
    fm = replace(plain, calibration=nothing)
    q, k = anisotropic_inputs()
    assert relative_error(fm.key_features(k), plain.key_features(k)) < 1e-14
    assert relative_error(fm.query_features(q), plain.query_features(q)) < 1e-14
    assert fm != plain  # kernels compute them in another way
    assert plain.key_factor is None
    assert not plain.bias.any()


def test_far_centres_lose_no_accuracy():
    """Queries and keys around a mean of 100 have the weights of those around zero."""
    q, k = anisotropic_inputs(dim=4)
    fm = feature_map("positive", 4, 32)
    near = attention_weights(q, k, fm.calibrate(q, k, "oprf"))
    q100, k100 = q + 100, k + 100
    far = attention_weights(q100, k100, fm.calibrate(q100, k100, "oprf"))
    common = exact_weights(q100, k100, fm.scale) / exact_weights(q, k, fm.scale)
    far /= common
    assert relative_error(far / far.sum(-1, keepdims=True), near) < 1e-4


@pytest.mark.parametrize("heads", [None, 3])
def test_calibrated_maps_are_values(heads):
    q, k = anisotropic_inputs() if heads is None else anisotropic_inputs(2, heads)
    plain = feature_map("positive", 8, 32)
    fm = plain.calibrate(q, k, "aderf+sderf")
    twin = pickle.loads(pickle.dumps(fm))
    assert twin == fm
    assert hash(twin) == hash(fm)
    assert (fm.num_heads, fm.num_features) == (heads, 32)
    assert np.array_equal(twin.key_weight, fm.key_weight)
    assert "calibrated" in repr(fm)
    assert len({fm, plain, plain.calibrate(q, k, "oprf"), plain.calibrate(k, q, "oprf")}) == 4
    assert fm.calibrate(q, k, "oprf") == plain.calibrate(q, k, "oprf")
    for array in (*fm.calibration, fm.query_weight, fm.key_factor, fm.bias):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


# -- What calibration chooses ---------------------------------------------------------------------


@each_sign
@pytest.mark.parametrize("method", UNBIASED)
def test_calibrated_maps_are_unbiased(method, antithetic):
    q, k = anisotropic_inputs(seed=3)
    q, k = 0.5 * q, 0.5 * k
    W = projections(8, "orthogonal")
    parts = feature_map("positive", 8, 32, antithetic=antithetic).calibrate(q, k, method)
    fm = FeatureMap(W, "positive", parts.scale, antithetic, 1e-3, parts.calibration)
    sample = (fm.query_features(q[:1]) * fm.key_features(k[:1])).sum((-2, -1))
    assert abs(z_mean(sample, np.exp(fm.scale * q[0] @ k[0]))) < LIMIT


def untilted(fm, side):
    """The weights of queries or keys without the square root of 1 - 4A."""
    factor = getattr(fm, f"{side}_factor")
    return fm.projection @ (np.sqrt(fm.scale) * np.eye(fm.dim) if factor is None else factor)


#: What an implementation may forget, of queries and of keys, as what kernels then read of the map.
FAULTS = {
    "bias": lambda fm: ({}, {"bias": 0 * fm.bias}),
    "half the bias": lambda fm: ({}, {"bias": fm.bias / 2}),
    "centre of queries": lambda fm: ({"query_center": 0 * fm.query_center}, {}),
    "centre of keys": lambda fm: ({}, {"key_center": 0 * fm.key_center}),
    "log-norm of keys": lambda fm: ({}, {"key_linear": 0 * fm.key_linear}),
    "tilt": lambda fm: (
        {"query_weight": untilted(fm, "query")},
        {"key_weight": untilted(fm, "key")},
    ),
    "change of keys": lambda fm: ({}, {"key_weight": fm.query_weight}),
}


def with_fault(fm, values):
    wrong = replace(fm)
    for name, value in values.items():
        object.__setattr__(wrong, name, value)
    return wrong


@each_sign
@pytest.mark.parametrize("method", UNBIASED)
def test_a_fault_in_a_calibrated_map_is_rejected(method, antithetic):
    """The test above can fail: for every method, whatever is forgotten, at one of four pairs."""
    q, k = anisotropic_inputs(seed=3)
    parts = feature_map("positive", 8, 32, antithetic=antithetic).calibrate(q, k, method)
    W = projections(8, "orthogonal")
    fm = FeatureMap(W, "positive", parts.scale, antithetic, 1e-3, parts.calibration)
    for name, fault in FAULTS.items():
        if name == "change of keys" and method in ("oprf", "sderf"):
            continue  # no change, or a rotation, after which both weights are the same
        of_queries, of_keys = (with_fault(fm, values) for values in fault(fm))
        scores = []
        for x, y in zip(0.5 * q[:4], 0.5 * k[:4], strict=True):
            products = of_queries.query_features(x[None]) * of_keys.key_features(y[None])
            scores.append(abs(z_mean(products.sum((-2, -1)), np.exp(fm.scale * x @ y))))
        print(f"{method}, no {name}: |z| up to {max(scores):.0f}")
        assert max(scores) > LIMIT, name


@pytest.mark.parametrize("method", [*UNBIASED, "auto"])
@pytest.mark.parametrize("center", [True, False])
def test_every_method_converges_to_exact_attention(method, center):
    q, k = anisotropic_inputs(dim=4)
    few, many = (
        error(feature_map("positive", 4, m, rng=1).calibrate(q, k, method, center=center), q, k)
        for m in (64, 65536)
    )
    assert many < min(few / 8, 0.01)


def test_spherical_is_for_few_features():
    """It has a bias of order 1/d, so that "auto" leaves it where there are many."""
    q, k = anisotropic_inputs(dim=4)
    few, many = (feature_map("positive", 4, m, rng=1) for m in (64, 65536))
    assert error(many.calibrate(q, k, "spherical"), q, k) > 0.02
    assert many.calibrate(q, k) != many.calibrate(q, k, "spherical")
    lengths = np.linalg.norm(few.calibrate(q, k, "spherical").projection, axis=-1)
    assert np.allclose(lengths, 2.0)


@pytest.mark.parametrize("place", [0.0, 0.03, 1.2, 2.9, 3.0])
def test_golden_sections_find_the_minimum(place):
    found = calibration.minimum(lambda x: (x - place) ** 4 + abs(x - place), 0.0, 3.0)
    assert abs(found - place) < 0.025 * 3


def test_oprf_is_the_optimum_of_its_objective():
    """The closed form beats its neighbours, and the numerical one is the minimum for pairs."""
    for moment in (0.01, 0.3, 2.0):
        z = np.full((1, 1), np.sqrt(moment))
        best = calibration.tilt(np.array([moment]))

        def objective(a, z=z):
            return calibration.log_relative_variance(z, a, antithetic=False)[0]

        assert objective(best) < min(objective(1.02 * best), objective(0.98 * best))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 45, 6))
    a = calibration.tilt(np.full(6, 2.0))
    multiple = calibration.strength(x, y, a)
    z = x[:, None] + y

    def pairs(m):
        return calibration.log_relative_variance(z, m * a, antithetic=True).mean()

    assert pairs(multiple) < min(pairs(multiple + 0.05), pairs(multiple - 0.05), pairs(1.0))


def test_sderf_is_the_optimum_over_all_diagonals():
    moment = np.array([0.1, 0.5, 3.0])

    def objective(a):
        terms = np.log1p(-4 * a) - 0.5 * np.log1p(-8 * a) + moment * (1 - 4 * a) * 2 / (1 - 8 * a)
        return terms.sum()

    found = minimize(objective, np.full(3, -0.05), bounds=[(-5, 0.1)] * 3, tol=1e-14).x
    assert np.allclose(calibration.tilt(moment), found, rtol=1e-4)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_objective_is_the_variance(antithetic):
    """Against sampled variances of one row, where those can be trusted."""
    rng = np.random.default_rng(1)
    a, z = np.array([-0.05, -0.2, 0.01]), np.array([[0.5, 0.4, 0.6]])
    W = rng.standard_normal((400_000, 3))
    y = (W * np.sqrt(1 - 4 * a)) @ z[0]
    weight = np.exp(2 * W**2 @ a - z @ z.T / 2 + 0.5 * np.log(1 - 4 * a).sum())[0]
    sample = weight * (np.cosh(y) if antithetic else np.exp(y)) / np.exp(z @ z.T / 2)[0] ** 0
    expected = np.exp(calibration.log_relative_variance(z, a, antithetic)[0])
    assert abs(z_mean((sample - 1) ** 2, expected)) < LIMIT
    assert abs(z_mean(sample, 1.0)) < LIMIT


def test_balance():
    """saderf makes sizes equal coordinate by coordinate, aderf whole second moments."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 100_000, 5)) @ rng.standard_normal((2, 5, 5))
    for method in ("saderf", "aderf"):
        change = calibration.balance(method, x, y)
        u, v = x @ change.T, y @ np.linalg.inv(change)
        assert np.allclose(u @ v.T[:, :9], x @ y.T[:, :9])
        m1, m2 = u.T @ u / len(u), v.T @ v / len(v)
        if method == "saderf":
            m1, m2 = np.diag(m1), np.diag(m2)
        assert np.abs(m1 - m2).max() < 2e-3 * np.abs(m1).max()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "auto"])
def test_calibrated_weights_do_not_see_where_zero_is(method):
    """Constants added to all queries, or to all keys, are what centring takes away again."""
    q, k = anisotropic_inputs()
    fm = feature_map("positive", 8, 32, dtype=np.float64)
    one, other = fm.calibrate(q, k, method), fm.calibrate(q + 3, k - 2, method)
    shifted = attention_weights(q + 3, k - 2, other)
    ratio = exact_weights(q + 3, k - 2, fm.scale) / exact_weights(q, k, fm.scale)
    expected = attention_weights(q, k, one) * ratio
    expected /= expected.sum(-1, keepdims=True)
    assert relative_error(shifted, expected) < 1e-4  # centres are rounded to float32


@each_method
def test_heads_are_calibrated_one_by_one(method):
    q, k = anisotropic_inputs(2, 3)
    q[:, 1] *= 3
    fm = feature_map("positive", 8, 32)
    if method == "auto":
        together = fm.calibrate(q, k)
        assert together.num_heads == 3
        return
    together = fm.calibrate(q, k, method)
    for head in range(3):
        alone = fm.calibrate(q[:, head].reshape(-1, 8), k[:, head].reshape(-1, 8), method)
        got = attention_weights(q, k, together)[:, head]
        expected = attention_weights(q[:, head], k[:, head], alone)
        assert relative_error(got, expected) < 1e-9


def test_grouped_heads_share_a_calibration():
    q, k = anisotropic_inputs(4)
    fm = feature_map("positive", 8, 32)
    grouped = fm.calibrate(q, k[:2])
    assert grouped.num_heads == 2
    assert grouped == fm.calibrate(q.reshape(2, 120, 8), k[:2])
    own = feature_map("positive", 8, 32)
    own = FeatureMap(np.stack([own.projection] * 4), "positive", own.scale, True, 1e-3)
    assert own.calibrate(q, k).num_heads == 4
    assert own.calibrate(q[0], k[0]).num_heads == 4
    one = FeatureMap(own.projection[:1], "positive", own.scale, True, 1e-3)
    assert one.calibrate(q, k[:1]).num_heads == 1


@each_method
@pytest.mark.parametrize(
    "singular",
    ["one row", "few rows", "constant columns", "constant keys", "zeros", "tiny", "huge"],
)
def test_singular_moments(method, singular):
    """Nothing is not finite, and the estimate of a weight stays one."""
    q, k = anisotropic_inputs(length=3 if singular == "few rows" else 60)
    if singular == "one row":
        q, k = q[:1], k[:1]
    if singular == "constant columns":
        q[:, :3], k[:, 2:5] = 1.0, -2.0
    if singular == "constant keys":
        k[:] = k[0]
    if singular == "zeros":
        q, k = 0 * q, 0 * k
    if singular == "tiny":
        q, k = 1e-9 * q, 1e-9 * k
    if singular == "huge":
        q, k = 1e3 * q, 1e-3 * k
    fm = feature_map("positive", 8, 64).calibrate(q, k, method)
    for array in (*fm.calibration, fm.query_weight, fm.key_weight, fm.bias):
        assert array is None or np.isfinite(array).all()
    assert error(fm, q, k) < 0.2


# -- Does it help? --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_errors_on_synthetic_families(name):
    """The table of docs/calibration.md; the best published combination is "aderf+sderf"."""
    family, bound = FAMILIES[name]
    squares = {"plain": [], "aderf+sderf": [], "auto": [], "fresh": []}
    for seed in range(DRAWS):
        q, k, v = draw_family(*family, seed)
        q2, k2, v2 = draw_family(*family, seed, fresh=True)
        plain = feature_map("positive", q.shape[-1], FEATURES, antithetic=False, rng=seed)
        pairs = feature_map("positive", q.shape[-1], FEATURES, rng=seed)
        auto = pairs.calibrate(q, k)

        def square(fm, q, k, v):
            output = (attention_weights(q, k, fm) - exact_weights(q, k, fm.scale)) @ v
            return np.mean(output**2)

        squares["plain"].append(square(plain, q, k, v))
        squares["aderf+sderf"].append(square(pairs.calibrate(q, k, "aderf+sderf"), q, k, v))
        squares["auto"].append(square(auto, q, k, v))
        squares["fresh"].append(square(auto, q2, k2, v2))
    rms = {label: np.sqrt(np.mean(values)) for label, values in squares.items()}
    print(name, {label: round(float(value), 5) for label, value in rms.items()})
    assert rms["auto"] < bound
    assert rms["auto"] < 0.85 * rms["aderf+sderf"]
    assert rms["fresh"] < 0.65 * rms["plain"]


def test_a_prefix_calibrates_the_rest():
    q, k, _ = draw_family("means", 0.5, 0)
    fm = feature_map("positive", 32, 256)
    prefix = fm.calibrate(q[:64], k[:64])
    assert error(prefix, q[64:], k[64:]) < 0.3 * error(fm, q[64:], k[64:])


def test_auto_prefers_the_cheaper_of_equals():
    q, k = np.zeros((2, 9, 8))
    fm = feature_map("positive", 8, 16)
    assert fm.calibrate(q, k) == fm.calibrate(q, k, "oprf")


# -- Files and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"method": "best"}, ValueError, "method must be one of 'oprf', .* got 'best'"),
        ({"method": None}, TypeError, "method must be one of"),
        ({"center": 1}, TypeError, "center must be True or False, got 1"),
        (
            {"q": np.ones((3, 5))},
            ValueError,
            r"q must have shape \(..., L, 8\), got shape \(3, 5\)",
        ),
        ({"k": np.ones(8)}, ValueError, "k must have shape"),
        (
            {"k": np.ones((0, 8))},
            ValueError,
            r"at least one token, got shapes \(60, 8\) and \(0, 8\)",
        ),
        ({"q": np.full((3, 8), np.nan)}, ValueError, "q must be finite"),
        ({"k": np.full((3, 8), np.inf)}, ValueError, "k must be finite"),
        (
            {"q": np.ones((2, 9, 8)), "k": np.ones((3, 9, 8))},
            ValueError,
            "number of heads, got 2 and 3",
        ),
        ({"q": "text"}, TypeError, "q must hold real numbers"),
    ],
)
def test_bad_arguments(change, kind, message):
    q, k = anisotropic_inputs()
    with pytest.raises(kind, match=message):
        feature_map("positive", 8, 32).calibrate(**({"q": q, "k": k} | change))


def test_other_kinds_and_heads_are_refused():
    q, k = anisotropic_inputs(3)
    for kind in ("relu", "elu", "trig"):
        with pytest.raises(
            ValueError, match=f"calibrate needs a map of kind 'positive', got '{kind}'"
        ):
            feature_map(kind, 8, 32).calibrate(q, k)
    own = FeatureMap.from_projection(np.ones((2, 4, 8)))
    with pytest.raises(ValueError, match="got 3 and 3; feature_map has 2"):
        own.calibrate(q, k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quadratic": np.full(8, 0.125)}, "quadratic must be less than 1/8, got 0.125"),
        ({"quadratic": np.zeros(7)}, r"quadratic must have shape \(8,\)"),
        ({"change": np.zeros((8, 7))}, r"change must have shape \(8, 8\)"),
        ({"query_center": np.full(8, np.nan)}, "query_center must be finite"),
        ({"key_center": np.zeros((2, 8))}, "numbers of heads"),
    ],
)
def test_bad_calibrations(change, message):
    with pytest.raises(ValueError, match=message):
        FeatureMap(
            np.ones((4, 8)), "positive", 1.0, False, 1e-3, some_calibration()._replace(**change)
        )
    with pytest.raises(ValueError, match="calibration needs kind='positive', got kind='relu'"):
        FeatureMap(np.ones((4, 8)), "relu", 1.0, False, 1e-3, some_calibration())
