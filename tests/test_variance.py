"""kernel_variance against simulation, and against the formulas of independent rows.

Fewer than 60 z-tests with |z| > 6, a two-sided false-alarm rate of 2e-9 each: below 1e-6 a run.
Sampled variances are trusted for |x + y|**2 <= 1.5 only.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
from support import estimates
from support.estimates import DIM, LIMIT, point, z_mean

from favor_np import FeatureMap, feature_map, kernel_variance
from favor_np.features import Calibration
from favor_np.variance import structure

ROWS = DIM + 3  # with a partial block
projections = functools.cache(estimates.projections)


def calibration(quadratic, change=False):
    """A calibration that leaves x + y about as long as it was."""
    rng = np.random.default_rng(3)
    V = np.eye(DIM) + 0.1 * rng.standard_normal((DIM, DIM))
    centers = 0.05 * rng.standard_normal((2, DIM))
    return Calibration(*centers, V if change else None, np.zeros(DIM) + quadratic)


MAPS = {
    "positive": ("positive", False, None),
    "antithetic": ("positive", True, None),
    "trig": ("trig", False, None),
    "oprf": ("positive", False, calibration(-0.06)),
    "oprf antithetic": ("positive", True, calibration(-0.06, True)),
    "sderf": ("positive", False, calibration(np.linspace(-0.1, 0.01, DIM), True)),
    "sderf antithetic": ("positive", True, calibration(np.linspace(-0.1, 0.01, DIM))),
}
BLOCKS = [name for name in MAPS if "sderf" not in name]
CASES = [
    *((name, "iid", "chi") for name in MAPS),
    *((name, kind, "chi") for name in BLOCKS for kind in ("orthogonal", "simplex")),
    *((name, kind, "sqrt") for name in BLOCKS for kind in ("iid", "orthogonal", "simplex")),
]


@pytest.mark.parametrize(("name", "projection", "norms"), CASES)
def test_simulation(name, projection, norms):
    kind, antithetic, parts = MAPS[name]
    x, y = point("random")
    W = projections(ROWS, projection, norms)
    fm = FeatureMap(W, kind, 1.0, antithetic, 1e-3, parts)
    sample = (fm.query_features(x[None]) * fm.key_features(y[None])).sum((-2, -1))
    one = FeatureMap(W[0], kind, 1.0, antithetic, 1e-3, parts)
    expected = kernel_variance(x[None], y[None], one).item()
    mean = np.exp(x @ y) if norms == "chi" else sample.mean()
    assert abs(z_mean((sample - mean) ** 2, expected)) < LIMIT
    assert abs(z_mean((sample - mean) ** 2, 1.5 * expected)) > LIMIT  # it can fail


def test_independent_rows():
    """Var = K**2 (exp(s) - 1) / m, and K**2 (exp(s) - 1)**2 exp(-s) / (2 m) for m pairs."""
    rng = np.random.default_rng(0)
    q, k, W = rng.standard_normal((5, 4)), rng.standard_normal((6, 4)), rng.standard_normal((7, 4))
    s = np.sum((q[:, None] + k) ** 2, -1) * 0.3
    K = np.exp(0.3 * q @ k.T)
    single, pairs = (FeatureMap.from_projection(W, scale=0.3, antithetic=a) for a in (False, True))
    np.testing.assert_allclose(kernel_variance(q, k, single), K**2 * np.expm1(s) / 7, rtol=1e-10)
    expected = np.expm1(s) ** 2 * np.exp(-s) / 14
    np.testing.assert_allclose(kernel_variance(q, k, pairs, relative=True), expected, rtol=1e-9)


def test_heads_and_leading_axes():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 5, 6)), rng.standard_normal((2, 3, 4, 6))
    for projection in ("iid", "orthogonal"):
        plain = feature_map("positive", 6, 24, projection=projection)
        method = "sderf" if projection == "iid" else "oprf"
        fm = plain.calibrate(q, k, method)
        got = kernel_variance(q, k, fm)
        assert got.shape == (2, 3, 5, 4)
        for h in range(3):
            parts = Calibration(*(None if p is None else p[h] for p in fm.calibration))
            alone = replace(plain, calibration=parts)
            expected = kernel_variance(q[:, h], k[:, h], alone)
            np.testing.assert_allclose(got[:, h], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("kind", "cosine"), [("iid", None), ("orthogonal", 0.0), ("simplex", -1 / 7)]
)
@pytest.mark.parametrize("norms", ["chi", "sqrt"])
def test_structure_is_recognised(kind, cosine, norms):
    fm = feature_map("positive", 8, 40, projection=kind, norms=norms)
    found, length = structure(fm.projection)
    assert found == cosine
    assert length == (None if norms == "chi" else pytest.approx(8**0.5))


def test_order():
    """simplex <= orthogonal <= iid for positive rows (arXiv:2301.13856, theorem 3.2)."""
    x, y = point("random")
    of = {
        kind: kernel_variance(
            x[None],
            y[None],
            feature_map("positive", DIM, DIM, projection=kind, antithetic=False, scale=1.0),
        )
        for kind in ("simplex", "orthogonal", "iid")
    }
    assert of["simplex"] < of["orthogonal"] < of["iid"]


def test_errors():
    q = np.ones((2, 8))
    with pytest.raises(TypeError, match="feature_map must be a FeatureMap, got 'positive'"):
        kernel_variance(q, q, "positive")
    with pytest.raises(ValueError, match="must be of kind 'positive' or 'trig', got 'relu'"):
        kernel_variance(q, q, feature_map("relu", 8, 8))
    with pytest.raises(ValueError, match=r"q must have shape \(..., L, 8\)"):
        kernel_variance(q[:, :3], q, feature_map("positive", 8, 8))
    sderf = feature_map("positive", 8, 16).calibrate(
        *np.random.default_rng(0).random((2, 9, 8)), "sderf"
    )
    with pytest.raises(ValueError, match="independent Gaussian rows"):
        kernel_variance(q, q, sderf)


def test_the_old_order_works_for_one_release():
    fm = feature_map("positive", 8, 8)
    q = np.full((2, 8), 0.3)
    with pytest.warns(DeprecationWarning, match="kernel_variance\\(q, k, feature_map\\)"):
        old = kernel_variance(fm, q, q)
    assert np.array_equal(old, kernel_variance(q, q, fm))
