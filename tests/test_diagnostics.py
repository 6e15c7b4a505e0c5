"""diagnose: are 95% of the errors where it says, and does it say when it does not know?"""

import numpy as np
import pytest
from scipy.special import stdtrit
from support.families import draw_family
from support.tolerance import relative_error

import favor_np
from favor_np import FeatureMap, diagnose, favor_attention, feature_map
from favor_np.diagnostics import t_quantile


def coverage(family, num_features, *, method=None, causal=False, columns=32, draws=25, **options):
    """The part of errors within 1.96 standard errors where ESS >= 80, and predicted over true."""
    inside, true, predicted = [], [], []
    for seed in range(draws):
        q, k, v = draw_family(*family, seed)
        v = v[:, :columns]
        fm = feature_map("positive", q.shape[-1], num_features, rng=seed, **options)
        fm = fm.calibrate(q, k, method) if method else fm
        found = diagnose(q, k, v, fm, causal=causal)
        error = found.output - favor_np.exact_attention(q, k, v, causal=causal)
        rows = found.effective_sample_size >= 80
        inside.append((np.abs(error) < 1.96 * found.standard_error)[rows].ravel())
        true.append((error[rows] ** 2).ravel())
        predicted.append((found.standard_error[rows] ** 2).ravel())
    true, predicted = (np.mean(np.concatenate(x)) for x in (true, predicted))
    return np.mean(np.concatenate(inside)), np.sqrt(predicted / true)


@pytest.mark.parametrize("projection", ["iid", "orthogonal"])
@pytest.mark.parametrize("method", [None, "aderf+sderf"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", [("isotropic", 0.5), ("anisotropic", 0.5)])
def test_coverage(family, projection, method, causal):
    found, ratio = coverage(family, 256, method=method, causal=causal, projection=projection)
    assert 0.90 <= found <= 0.97
    assert 0.85 < ratio < 1.15


@pytest.mark.parametrize(
    "options",
    [
        {"antithetic": False},
        {"antithetic": False, "projection": "simplex"},
        {"columns": 1},
        {"columns": 1, "projection": "iid"},
        {"num_features": 1024},
        {"num_features": 128},
    ],
    ids=str,
)
def test_coverage_of_other_maps(options):
    found, _ = coverage(("anisotropic", 0.5), **({"num_features": 256} | options))
    assert 0.88 <= found <= 0.985


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", [("isotropic", 0.5), ("anisotropic", 0.5)])
def test_coverage_where_there_is_a_bias(family, causal):
    """All features share it, so it is in none of their differences: it has to be measured."""
    found, _ = coverage(family, 256, method="spherical", causal=causal)
    assert 0.90 <= found <= 0.98


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
def test_output_and_sample_size_are_those_of_the_definition(causal, antithetic):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 300, 6))
    mask = rng.random((2, 300)) < 0.7
    mask[0, :5] = False
    fm = feature_map("positive", 6, 36, antithetic=antithetic).calibrate(q, k, "aderf")
    found = diagnose(q, k, v, fm, causal=causal, key_mask=mask)
    expected = favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    assert relative_error(found.output, expected) < 1e-12
    for h, i in ((0, 0), (0, 250), (1, 3), (1, 299)):
        sees = mask[h] & ((np.arange(300) <= i) | (not causal))
        if not sees.any():
            assert found.effective_sample_size[h, i] == 0
            assert (found.standard_error[h, i] == 0).all()
            continue
        shares = fm.query_features(q)[h, i] * fm.key_features(k)[h][sees].sum(0)
        size = shares.sum() ** 2 / np.sum(shares**2)
        assert found.effective_sample_size[h, i] == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"key_bias": "bias"},
        {"causal": True, "decay": "gates"},
        {"causal": True, "decay": 0.97, "cu_seqlens": [0, 120, 300]},
        {"enable_gqa": True, "key_bias": "bias"},
    ],
)
@pytest.mark.parametrize("method", ["independent", "spherical"])
def test_error_bars_of_other_options(options, method):
    """Of single heads, made by hand, they are the same; the ones of a bias are measured as well."""
    rng = np.random.default_rng(0)
    q, k, v = 0.4 * rng.standard_normal((3, 4, 300, 8))
    numbers = {"bias": rng.normal(size=(2, 300)), "gates": rng.uniform(0.9, 1, (2, 300))}
    if "enable_gqa" not in options:
        q = q[:2]
    k, v = k[:2], v[:2]
    more = {n: numbers.get(x, x) if isinstance(x, str) else x for n, x in options.items()}
    norms = {"norms": "sqrt"} if method == "spherical" else {}
    fm = feature_map("positive", 8, 128, **norms)
    found = diagnose(q, k, v, fm, **more)
    assert relative_error(found.output, favor_attention(q, k, v, fm, **more)) < 1e-12
    exact = favor_np.exact_attention(q, k, v, **more)
    errors = np.abs(found.output - exact)[:, 30:]
    inside = (errors < 1.96 * found.standard_error[:, 30:]).mean()
    assert 0.75 < inside < 0.999
    if "enable_gqa" in options:
        del more["enable_gqa"]
        again = [diagnose(q[h::2], k, v, fm, **more) for h in range(2)]
        for h, alone in enumerate(again):
            assert relative_error(found.output[h::2], alone.output) < 1e-12
            ratio = found.standard_error[h::2] / alone.standard_error
            np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-6)


def test_quantiles_of_student_are_those_of_scipy():
    for freedom in (*range(1, 30), 199, 200, 201, 1000, 10**6):
        assert t_quantile(freedom) == pytest.approx(stdtrit(freedom, 0.975), rel=1e-9)


def _by_groups(q, k, v, fm, group, causal):
    """Outputs, their errors, degrees of freedom and sample sizes by definition, for groups of rows."""
    phi_q, phi_k = fm.query_features(q), fm.key_features(k)
    rows = fm.projection.shape[-2]
    owner = np.arange(fm.num_features) % rows // group
    count = owner.max() + 1
    sees = np.tril(np.ones((len(q), len(k)))) if causal else np.ones((len(q), len(k)))
    num, den = [], []
    for g in range(count):
        weights = sees * (phi_q[:, owner == g] @ phi_k[:, owner == g].T)
        num.append(weights @ v)
        den.append(weights.sum(1, keepdims=True))
    out = sum(num) / sum(den)
    parts = [(n - d * out) / sum(den) for n, d in zip(num, den, strict=True)]
    error = np.sqrt(count / (count - 1) * sum(p**2 for p in parts))
    shares = phi_q * (sees @ phi_k)
    return out, error, count - 1, shares.sum(-1) ** 2 / (shares**2).sum(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "rows"), [(64, 128), (100, 300), (20, 90), (5, 64), (130, 390)])
def test_blocks_of_any_size_are_the_groups(dim, rows, causal):
    """A group is one block of the kernel, or several: d = 20 and 100 leave padding in each."""
    rng = np.random.default_rng(dim)
    q, k, v = rng.standard_normal((3, 150, dim)) * (1.5 / dim**0.25)
    v = v[:, :3]
    fm = feature_map("positive", dim, 2 * rows, rng=0)
    found = diagnose(q, k, v, fm, causal=causal)
    group = dim if dim > 16 else 3 * dim
    out, error, freedom, sizes = _by_groups(q, k, v, fm, group, causal)
    variances = v.var(0)
    common = variances * np.mean(error**2 / variances, axis=-1, keepdims=True)
    mixed = (freedom * error**2 + 8 * common) / (freedom + 8)
    wider = stdtrit(3 * freedom, 0.975) / stdtrit(np.inf, 0.975)
    assert relative_error(found.output, out) < 1e-12
    assert relative_error(found.effective_sample_size, sizes) < 1e-9
    assert np.allclose(found.standard_error, wider * np.sqrt(mixed), rtol=1e-9, atol=1e-14)
    single = diagnose(*(x.astype(np.float32) for x in (q, k, v)), fm, causal=causal)
    assert relative_error(single.standard_error, found.standard_error) < 1e-4
    assert relative_error(single.effective_sample_size, found.effective_sample_size) < 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_on_any_number_of_threads(causal):
    """More positions than are folded as one job; values shared by heads, queries by none."""
    rng = np.random.default_rng(1)
    q, k = (0.3 * rng.standard_normal((2, 9000, 8)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((9000, 4)).astype(np.float32)
    v *= np.array([1, 10, 0.1, 1], np.float32)
    fm = feature_map("positive", 8, 64, rng=0)
    found = []
    for threads in (1, 2):
        with favor_np.thread_limit(threads):
            found.append(diagnose(q, k, v, fm, causal=causal))
    assert np.array_equal(found[0].output, found[1].output)
    assert np.array_equal(found[0].standard_error, found[1].standard_error)
    expected = favor_attention(q, k, v, fm, causal=causal)
    assert relative_error(found[0].output, expected) < 1e-6
    last = diagnose(*(x.astype(np.float64)[..., -50:, :] for x in (q,)), k, v, fm)
    if not causal:
        assert relative_error(found[0].standard_error[:, -50:], last.standard_error) < 1e-4


def test_a_single_row_tells_nothing_of_its_error():
    q, k, v = np.random.default_rng(0).standard_normal((3, 5, 2))
    found = diagnose(q, k, v, FeatureMap.from_projection([[0.3, 1.0]]))
    assert (found.standard_error == np.inf).all()


def test_the_error_of_independent_rows_is_that_of_their_groups():
    """Two groups of one row each, by hand."""
    W = np.array([[0.3, 1.0], [0.8, -0.5]])
    fm = FeatureMap.from_projection(W)
    q, k, v = np.random.default_rng(0).standard_normal((3, 5, 2))
    v = v[:, :1]
    found = diagnose(q, k, v, fm)
    phi_q, phi_k = fm.query_features(q), fm.key_features(k)
    num = phi_q[:, :, None] * (phi_k.T @ v)
    den = phi_q * phi_k.sum(0)
    out = num.sum(1) / den.sum(1)[:, None]
    parts = (num - den[..., None] * out[:, None]) / den.sum(1)[:, None, None]
    expected = np.sqrt(2 * np.sum(parts**2, axis=1))
    assert np.allclose(found.standard_error, expected * 12.7062047 / 1.95996398)


def test_a_long_drift_and_values_of_any_size():
    """Log-features hundreds of nats apart, and constant values, whose error is zero."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 400, 8))
    k = k + np.linspace(-40, 40, 400)[:, None]
    fm = feature_map("positive", 8, 64)
    for causal in (False, True):
        found = diagnose(q, k, v, fm, causal=causal)
        assert np.isfinite(found.output).all()
        assert np.isfinite(found.standard_error).all()
        constant = diagnose(q, k, np.ones_like(v), fm, causal=causal)
        assert np.abs(constant.standard_error).max() < 1e-12


def test_words():
    q, k, v = draw_family("isotropic", 0.5, 0)
    trusted = diagnose(0.3 * q, 0.3 * k, v, feature_map("positive", 32, 1024))
    assert trusted.warnings == ()
    assert "can be trusted" in str(trusted)
    hopeless = diagnose(4 * q, 4 * k, v, feature_map("positive", 32, 64))
    assert "below 30" in str(hopeless)
    for advice in ("calibrate", "more features", "exact_attention"):
        assert advice in str(hopeless)
    assert "no row that sees a key" in str(
        diagnose(q[:3], k[:0], v[:0], feature_map("positive", 32, 64))
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feature_map": 3}, TypeError, "feature_map must be a FeatureMap, got 3"),
        ({"feature_map": feature_map("relu", 32, 8)}, ValueError, "kind 'positive', got 'relu'"),
        ({"q": np.ones((2, 3))}, ValueError, "q must have shape"),
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"key_mask": [1]}, TypeError, "key_mask"),
    ],
)
def test_errors(change, error, message):
    q, k, v = draw_family("isotropic", 0.5, 0)
    good = {"q": q, "k": k, "v": v, "feature_map": feature_map("positive", 32, 64)}
    with pytest.raises(error, match=message):
        diagnose(**(good | change))
