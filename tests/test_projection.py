"""sample_projection: reproducible to the bit, orthogonal, with the right norms."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from favor_np import projection, sample_projection

KINDS = ["orthogonal", "iid", "simplex"]


@pytest.mark.parametrize(
    ("kind", "norms", "digest"),
    [
        ("orthogonal", "chi", "0d1adda1f609734d"),
        ("orthogonal", "sqrt", "7caa6aa7af7652e8"),
        ("iid", "chi", "489d797af7a3e78d"),
        ("iid", "sqrt", "1f8ce557af1ee560"),
        ("simplex", "chi", "1e53a732626c6fd8"),
    ],
)
def test_a_seed_gives_these_bits_on_every_machine(kind, norms, digest):
    w = sample_projection(40, 16, kind, norms, rng=2024)  # two blocks and a half
    assert hashlib.sha256(w.astype("<f4").tobytes()).hexdigest()[:16] == digest


def test_a_seed_gives_these_numbers_on_every_machine():
    expected = [
        [0.8078330755233765, -1.3578535318374634],
        [1.4183900356292725, 0.8438483476638794],
        [0.07306938618421555, 0.7287216186523438],
    ]
    assert np.array_equal(sample_projection(3, 2, rng=0), np.array(expected, np.float32))
    normals = projection._standard_normal(np.random.PCG64(0), 3)  # before rounding to float32
    assert [x.hex() for x in normals] == [
        "0x1.9d9c4c4222728p-1",
        "-0x1.5b9c49c01f9e3p+0",
        "0x1.6413c0bf143e1p-1",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Philox", [-1.0391391515731812, -0.8127607107162476, -2.156080722808838]),
        ("SFC64", [-0.40114453434944153, 1.4987895488739014, 0.36680829524993896]),
        ("MT19937", [-0.9073827862739563, 0.8033127188682556, 2.6028172969818115]),
    ],
)
def test_every_bit_generator_is_pinned(name, expected):
    bits = getattr(np.random, name)(1)
    assert sample_projection(1, 3, "iid", rng=bits).tolist() == [expected]


def test_the_ways_to_give_a_seed():
    expected = sample_projection(5, 3, rng=7)
    for rng in (
        np.int64(7),
        np.random.SeedSequence(7),
        np.random.PCG64(7),
        np.random.default_rng(7),
    ):
        assert np.array_equal(sample_projection(5, 3, rng=rng), expected)
    assert not np.array_equal(sample_projection(5, 3, rng=8), expected)
    assert not np.array_equal(sample_projection(5, 3, rng=None), sample_projection(5, 3, rng=None))


def test_a_generator_is_advanced():
    rng = np.random.default_rng(7)
    first, second = (sample_projection(5, 3, rng=rng) for _ in range(2))
    assert np.array_equal(first, sample_projection(5, 3, rng=7))
    assert not np.array_equal(first, second)


def test_the_global_state_of_numpy_is_not_touched():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    sample_projection(5, 3, rng=None)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_float64_holds_the_same_numbers():
    w32, w64 = (sample_projection(20, 8, dtype=dtype) for dtype in (np.float32, "float64"))
    assert w32.dtype == np.float32
    assert w64.dtype == np.float64
    assert np.array_equal(w32, w64)


@pytest.mark.parametrize("norms", ["chi", "sqrt"])
@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 1), (3, 1), (1, 5), (3, 5), (5, 5), (13, 5), (80, 64)]
)
def test_rows_of_a_block_are_orthogonal(rows, dim, norms):
    w = sample_projection(rows, dim, "orthogonal", norms, dtype=np.float64)
    assert w.shape == (rows, dim)
    for start in range(0, rows, dim):
        block = w[start : start + dim]
        unit = block / np.linalg.norm(block, axis=-1, keepdims=True)
        assert np.abs(unit @ unit.T - np.eye(len(block))).max() < 2e-7  # rounded to float32
    if rows > dim > 1:
        assert abs(w[0] @ w[dim]) > 1e-3  # the next block is another draw


@pytest.mark.parametrize("norms", ["chi", "sqrt"])
@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 2), (5, 2), (1, 5), (3, 5), (5, 5), (13, 5), (80, 64)]
)
def test_rows_of_a_block_point_to_the_corners_of_a_simplex(rows, dim, norms):
    w = sample_projection(rows, dim, "simplex", norms, dtype=np.float64)
    for start in range(0, rows, dim):
        block = w[start : start + dim]
        unit = block / np.linalg.norm(block, axis=-1, keepdims=True)
        cosines = np.where(np.eye(len(block)), 1.0, -1 / (dim - 1))
        assert np.abs(unit @ unit.T - cosines).max() < 2e-7
    lengths = np.linalg.norm(w, axis=-1)
    orthogonal = np.linalg.norm(sample_projection(rows, dim, "orthogonal", norms), axis=-1)
    assert np.allclose(lengths, orthogonal, rtol=1e-6)


def test_orthogonalisation_is_exact_to_rounding_even_for_close_rows():
    rng = np.random.default_rng(0)
    near = rng.standard_normal(30) + 1e-7 * rng.standard_normal((2, 30, 30))
    q = projection._gram_schmidt(near)
    assert np.abs(q @ np.swapaxes(q, 1, 2) - np.eye(30)).max() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_norms(kind):
    w = sample_projection(600, 6, kind, "sqrt", dtype=np.float64)
    assert np.allclose((w * w).sum(-1), 6, rtol=2e-7)
    w = sample_projection(20_000, 6, kind, "chi", dtype=np.float64)
    assert stats.kstest(np.linalg.norm(w, axis=-1), "chi", args=(6,)).pvalue > 1e-6
    assert stats.kstest(w[:, 0], "norm").pvalue > 1e-6


def test_a_longer_iid_projection_begins_like_a_shorter_one():
    assert np.array_equal(
        sample_projection(100, 6, "iid", rng=3)[:7], sample_projection(7, 6, "iid", rng=3)
    )


def test_normal_numbers():
    x = projection._standard_normal(np.random.PCG64(1), 200_001)
    assert x.shape == (200_001,)
    assert stats.kstest(x, "norm").pvalue > 1e-6
    assert abs(np.mean(x[:-1:2] * x[1::2])) < 6 / np.sqrt(100_000)  # a pair from one point


def test_logarithm():
    x = np.concatenate([np.random.default_rng(0).random(10_000), 1 - 2.0 ** -np.arange(1, 53)])
    x = np.concatenate([x, 2.0 ** -np.arange(1.0, 104.0)])
    assert np.max(np.abs(projection._log(x) / np.log(x) - 1)) < 1e-15


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_rows": 0}, ValueError, "num_rows must be at least 1, got 0"),
        ({"num_rows": 2.0}, TypeError, "num_rows must be an integer, got 2.0"),
        ({"num_rows": True}, TypeError, "num_rows must be an integer, got True"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": "4"}, TypeError, "dim must be an integer, got '4'"),
        ({"dim": None}, TypeError, "dim must be an integer, got None"),
        ({"kind": "hadamard"}, ValueError, "kind must be one of .*'simplex', got 'hadamard'"),
        ({"kind": "haar"}, ValueError, "kind must be one of 'orthogonal', 'iid', .* got 'haar'"),
        ({"kind": 1}, TypeError, "kind must be one of 'orthogonal', 'iid', .* got 1"),
        (
            {"kind": "simplex", "dim": 1},
            ValueError,
            "dim must be at least 2 for simplex rows, got 1",
        ),
        ({"norms": "xi"}, ValueError, "norms must be one of 'chi', 'sqrt', got 'xi'"),
        ({"rng": -1}, ValueError, "rng must be a non-negative int.* got -1"),
        ({"rng": 1.5}, TypeError, "rng must be a non-negative int.* got 1.5"),
        ({"rng": True}, TypeError, "rng must be .* got True"),
        ({"rng": "seed"}, TypeError, "rng must be a non-negative int.* got 'seed'"),
        ({"rng": np.random.RandomState(0)}, TypeError, "rng must be a non-negative int"),
        ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64"),
        ({"dtype": "float99"}, TypeError, "dtype must be float32 or float64"),
        ({"dtype": None}, TypeError, "dtype must be float32 or float64"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        sample_projection(**({"num_rows": 4, "dim": 2} | change))


def test_the_old_name_of_rows_works_for_one_release():
    with pytest.warns(DeprecationWarning, match="num_features=.* is now num_rows="):
        old = sample_projection(num_features=4, dim=2)
    assert np.array_equal(old, sample_projection(4, 2))
