"""Are the estimators unbiased, and is their variance the one that theory gives?

Each check is a z-test against closed forms (docs: the mathematics page).  With test_calibration
and test_variance they compare about 650 numbers, each with a two-sided false-alarm rate of 8e-11
(|z| > 6.5): below 1e-7 a run, were the seeds drawn afresh.  They are fixed, so a run is deterministic.  Sample variances of these
heavy-tailed estimators can be trusted only for |x + y|**2 <= 1.5.
"""

import numpy as np
import pytest
from scipy.special import hyp0f1, hyp1f1
from support.estimates import DIM, LIMIT, RUNS, point, projections, z_mean, z_variance

from favor_np import FeatureMap

MAPS = [
    ("positive", False, "iid"),
    ("positive", False, "orthogonal"),
    ("positive", True, "iid"),
    ("positive", True, "orthogonal"),
    ("trig", False, "iid"),
]


def estimates(W, x, y, kind="positive", antithetic=False, **options):
    """phi(x).phi(y) of every projection of W (runs, rows, DIM)."""
    fm = FeatureMap.from_projection(W, kind, scale=1.0, antithetic=antithetic, **options)
    return (fm.query_features(x[None, :]) * fm.key_features(y[None, :])).sum(axis=(-2, -1))


def variance(kind, antithetic, projection, rows, x, y):
    """The closed form of the variance of one estimate."""
    s, n, t = np.sum((x + y) ** 2), np.sum(x * x) + np.sum(y * y), np.sum((x - y) ** 2)
    if kind == "trig":
        assert projection == "iid"
        return np.exp(n) * (1 - np.exp(-t)) ** 2 / (2 * rows)
    second_moment = (np.exp(2 * s) + 1) / 2 if antithetic else np.exp(2 * s)
    total = rows * (second_moment - np.exp(s))
    if projection == "orthogonal":
        blocks, rest = divmod(rows, DIM)
        pairs = blocks * DIM * (DIM - 1) + rest * (rest - 1)  # ordered, within a block
        total += pairs * (hyp1f1(DIM, DIM / 2, s / 2) - np.exp(s))
    return np.exp(-n) * total / rows**2


@pytest.mark.parametrize("where", ["ones", "random"])
@pytest.mark.parametrize(
    ("kind", "antithetic", "projection"), MAPS, ids=lambda value: str(value).lower()
)
def test_mean_and_variance(kind, antithetic, projection, where):
    x, y = point(where)
    rows = 2 * DIM
    sample = estimates(projections(rows, projection), x, y, kind, antithetic)
    expected = variance(kind, antithetic, projection, rows, x, y)
    assert abs(z_mean(sample, np.exp(x @ y), expected)) < LIMIT
    assert abs(z_variance(sample, np.exp(x @ y), expected)) < LIMIT


@pytest.mark.parametrize("where", ["ones", "random"])
def test_simplex_blocks_are_unbiased(where):
    x, y = point(where)
    sample = estimates(projections(2 * DIM, "simplex"), x, y)
    assert abs(sample.mean() / np.exp(x @ y) - 1) < 0.01
    assert abs(z_mean(sample, np.exp(x @ y))) < LIMIT


def test_partial_last_block():
    x, y = point("random")
    rows = DIM + 3
    sample = estimates(projections(rows, "orthogonal"), x, y)
    expected = variance("positive", False, "orthogonal", rows, x, y)
    assert abs(z_mean(sample, np.exp(x @ y), expected)) < LIMIT
    assert abs(z_variance(sample, np.exp(x @ y), expected)) < LIMIT


def test_the_order_of_variances():
    """Orthogonal below iid, antithetic below both, at an equal number of all features."""
    x, y = point("random")

    def of(antithetic, projection):
        return variance("positive", antithetic, projection, 8 * (1 if antithetic else 2), x, y)

    assert of(True, "orthogonal") < of(True, "iid") < of(False, "orthogonal") < of(False, "iid")


@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
def test_sqrt_norms_estimate_the_regularised_kernel(kind):
    """With |w| = sqrt(d), E exp(w.z) is a Bessel function, about exp(s/2 - s**2/(4 d))."""
    x, y = point("random")
    s = np.sum((x + y) ** 2)
    regularised = hyp0f1(DIM / 2, DIM * s / 4) * np.exp(x @ y - s / 2)
    sample = estimates(projections(DIM, kind, norms="sqrt"), x, y)
    assert abs(z_mean(sample, regularised)) < LIMIT
    assert abs(z_mean(sample, np.exp(x @ y))) > LIMIT  # the difference is seen


@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
def test_trig_and_relu_have_their_kernels(kind):
    x, y = point("random")
    W = projections(DIM, kind)
    assert abs(z_mean(estimates(W, x, y, "trig"), np.exp(x @ y))) < LIMIT
    # The arc-cosine kernel of order one, and what the constant adds to it.
    a, b = np.linalg.norm(x), np.linalg.norm(y)
    theta, eps = np.arccos(x @ y / (a * b)), 0.1
    relu = a * b * (np.sin(theta) + (np.pi - theta) * np.cos(theta)) / (2 * np.pi)
    relu += eps * (a + b) / np.sqrt(2 * np.pi) + eps**2
    assert abs(z_mean(estimates(W, x, y, "relu", kernel_epsilon=eps), relu)) < LIMIT


@pytest.mark.parametrize("kind", ["orthogonal", "simplex"])
def test_rows_are_standard_normal(kind):
    """Mean 0 and covariance I, entry by entry, and |w|**2 has the moments of chi-squared."""
    W = projections(DIM, kind, seed=1)
    assert np.abs(W.mean(0) * np.sqrt(RUNS)).max() < LIMIT
    assert np.abs((W**2).mean(0) - 1).max() < LIMIT * np.sqrt(2 / RUNS)
    products = W[:, :, :-1] * W[:, :, 1:]
    assert np.abs(products.mean(0) * np.sqrt(RUNS)).max() < LIMIT
    squares = np.sum(W**2, axis=-1).ravel()
    assert abs(z_mean(squares, DIM, 2 * DIM)) < LIMIT
    assert abs(z_variance(squares, DIM, 2 * DIM)) < LIMIT


# -- The tests above can fail: each of these faults, found in public code, is rejected. --------


def gaussian_blocks():
    return np.random.default_rng(3).standard_normal((RUNS, DIM, DIM))


def chi(shape):
    return np.linalg.norm(np.random.default_rng(4).standard_normal((*shape, DIM)), axis=-1)


@pytest.mark.parametrize("sign_fix", [False, True])
def test_qr_without_the_sign_fix_is_rejected(sign_fix):
    x, y = point("ones")
    q, r = np.linalg.qr(gaussian_blocks())
    if sign_fix:
        q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    W = np.swapaxes(q, 1, 2) * chi((RUNS, DIM))[..., None]
    z = z_mean(estimates(W, x, y), np.exp(x @ y))
    assert (abs(z) < LIMIT) == sign_fix


def test_wrong_norms_are_rejected():
    x, y = point("random")
    W = projections(DIM, "orthogonal")
    wrong = W / np.linalg.norm(W, axis=-1, keepdims=True) * np.sqrt(DIM - 1)
    assert abs(z_mean(estimates(wrong, x, y), np.exp(x @ y))) > LIMIT


def test_a_dropped_half_is_rejected():
    x, y = point("random")
    sample = estimates(projections(DIM, "iid"), x, y) * np.exp(-(x @ x + y @ y) / 2)
    assert abs(z_mean(sample, np.exp(x @ y))) > LIMIT


def test_orthogonal_is_not_mistaken_for_iid():
    x, y = point("random")
    expected = variance("positive", False, "orthogonal", DIM, x, y)
    sample = estimates(projections(DIM, "iid"), x, y)
    assert abs(z_variance(sample, np.exp(x @ y), expected)) > LIMIT
