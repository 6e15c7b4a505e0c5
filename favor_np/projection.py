"""Random projections: the rows w_r that random features are made of.

Reproducibility
---------------
The same seed gives the same projection, bit for bit, on every machine and with every
version of NumPy.  Three rules make it so:

* Only the raw 64-bit words of a bit generator are used.  They are all that NumPy promises
  to keep (NEP 19); the distributions of ``numpy.random.Generator`` may change.
* Everything after that is float64 arithmetic with ``+ - * / sqrt`` (and ``frexp``, which is
  exact), element by element and in a fixed order.  IEEE 754 leaves these operations no
  freedom; libm, BLAS, LAPACK and ``numpy.sum`` may differ in the last bit, so none is used.
* The result is rounded to float32, so float32 and float64 projections hold equal numbers.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.deprecation import renamed

KINDS = ("orthogonal", "iid", "simplex")
NORMS = ("chi", "sqrt")

F64: TypeAlias = npt.NDArray[np.float64]
RNG: TypeAlias = int | np.random.SeedSequence | np.random.BitGenerator | np.random.Generator | None


@renamed(num_features="num_rows")
def sample_projection(
    num_rows: int,
    dim: int,
    kind: str = "orthogonal",
    norms: str = "chi",
    *,
    rng: RNG = 0,
    dtype: npt.DTypeLike = np.float32,
) -> npt.NDArray[np.floating[Any]]:
    """Draw the projection of random features: rows with the law N(0, I), one a feature.

    Parameters
    ----------
    num_rows : int
        Number of rows m.
    dim : int
        Length d of queries and keys.
    kind : {"orthogonal", "iid", "simplex"}, default "orthogonal"
        "iid": independent rows.  "orthogonal": the rows of each block of d consecutive rows
        are orthogonal, their directions the rows of a Haar-distributed orthogonal matrix;
        blocks are independent, and the last one has fewer rows when d does not divide m.
        Each row alone has the same law as an iid row, so estimators stay unbiased, with a
        smaller variance.  "simplex": the same with directions that point to the corners of a
        regular simplex: inner products -1/(d-1) instead of 0 (needs d of at least 2).
    norms : {"chi", "sqrt"}, default "chi"
        Length of the rows.  "chi": as of a Gaussian vector (chi distribution, d degrees of
        freedom), which makes the row exactly N(0, I).  "sqrt": always sqrt(d), for either
        kind; with it positive features estimate the *regularised* softmax kernel, which
        differs from exp(q.k) by O(1/d).
    rng : int, SeedSequence, BitGenerator, Generator or None, default 0
        Source of randomness (SPEC 7).  An int or SeedSequence seeds PCG64, as
        ``numpy.random.default_rng`` does today; None takes fresh entropy.  A generator that
        is passed in is advanced.
    dtype : {float32, float64}, default float32
        Type of the result.  The numbers are the same: all are representable in float32.

    Returns
    -------
    ndarray, shape (num_rows, dim)
        The projection.  A given seed gives the same bits on every machine and NumPy version
        (see the head of this module for how).

    Raises
    ------
    TypeError
        If a count is not an integer, `rng` is not a seed or generator, or `dtype` is not
        float32 or float64.
    ValueError
        If a count is below 1, `kind` or `norms` is unknown, or a seed is negative.

    Notes
    -----
    Orthogonal rows: Choromanski et al. 2021, "Rethinking Attention with Performers"
    (arXiv:2009.14794), section 2.4 and theorem 2; "sqrt" norms give its kernel SMREG.
    Simplex rows: Reid et al. 2023 (arXiv:2301.13856).

    QR without fixing the signs of R's diagonal, found in most implementations, is *not* Haar:
    its first coordinates prefer one sign and positive features become biased.  Gram-Schmidt,
    used here, has a positive diagonal.  It also leaves the lengths of the Gaussian rows
    independent of the directions it makes, so these lengths serve as the chi norms.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import sample_projection
    >>> w = sample_projection(6, 4, rng=0)
    >>> w.shape, w.dtype
    ((6, 4), dtype('float32'))
    >>> gram = w[:4] @ w[:4].T
    >>> bool(np.allclose(gram, np.diag(np.diag(gram)), atol=1e-5))
    True
    """
    num_rows = validation.integer("num_rows", num_rows)
    dim = validation.integer("dim", dim)
    validation.choice("kind", kind, KINDS)
    validation.choice("norms", norms, NORMS)
    out_dtype = validation.float_dtype("dtype", dtype)

    if kind == "simplex" and dim < 2:
        raise ValueError(f"dim must be at least 2 for simplex rows, got {dim}")
    bits = _bit_generator(rng)
    rows = _standard_normal(bits, num_rows * dim).reshape(num_rows, dim)
    own_lengths = np.sqrt(_sum(rows.T * rows.T))[:, None]
    if kind == "iid":
        directions = rows / own_lengths
    else:
        directions = _orthogonal_blocks(rows, simplex=kind == "simplex")
    result = directions * (own_lengths if norms == "chi" else np.sqrt(float(dim)))
    rounded: npt.NDArray[np.floating[Any]] = result.astype(np.float32, order="C").astype(out_dtype)
    return rounded


def _bit_generator(rng: object) -> np.random.BitGenerator:
    """Return the bit generator behind `rng`, or a PCG64 that it seeds."""
    if isinstance(rng, (np.random.Generator, np.random.BitGenerator)):
        return np.random.default_rng(rng).bit_generator
    if isinstance(rng, (bool, np.bool_)):
        raise TypeError(f"rng must be an int, a SeedSequence or a generator, got {rng!r}")
    try:
        return np.random.PCG64(rng)  # type: ignore[arg-type]  # NumPy refuses what is no seed
    except (TypeError, ValueError) as error:
        raise type(error)(
            "rng must be a non-negative int, a SeedSequence, a BitGenerator, a Generator or "
            f"None, got {validation.got(rng)}"
        ) from None


def _words(bits: np.random.BitGenerator, count: int) -> npt.NDArray[np.uint64]:
    """Draw `count` raw 64-bit words; the Mersenne twister gives 32 bits at a time."""
    if isinstance(bits, np.random.MT19937):
        halves = bits.random_raw(2 * count)
        return halves[0::2] << np.uint64(32) | halves[1::2]
    return bits.random_raw(count)


def _standard_normal(bits: np.random.BitGenerator, count: int) -> F64:
    """Draw `count` independent N(0, 1) numbers by Marsaglia's polar method.

    The accepted points of the unit disc are used in the order in which they are drawn, and
    no word more than needed is drawn, so the first numbers do not depend on `count`.
    """
    points = np.empty((2, 0))
    while (missing := (count + 1) // 2 - points.shape[1]) > 0:
        words = _words(bits, 2 * missing).reshape(missing, 2).T
        # The top 52 bits, as an odd multiple of 2**-52 in (-1, 1): exact and never zero.
        square = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-51 - 1.0
        inside = square[0] * square[0] + square[1] * square[1] < 1.0
        points = np.concatenate([points, square[:, inside]], axis=1)
    s = points[0] * points[0] + points[1] * points[1]
    normals: F64 = points * np.sqrt(-2.0 * _log(s) / s)
    return normals.T.reshape(-1)[:count]


def _log(x: F64) -> F64:
    """Return log(x) for x in (0, 1), to about 1e-16, the same on every machine.

    With x = f 2**e and t = (f - 1)/(f + 1), log(f) = 2 (t + t**3/3 + t**5/5 + ...).
    """
    f, e = np.frexp(x)
    t = (f - 1.0) / (f + 1.0)  # in [-1/3, 0)
    t2 = t * t
    series = np.zeros_like(t)
    for odd in range(33, 0, -2):
        series = series * t2 + 1.0 / odd
    result: F64 = e * 0.6931471805599453 + 2.0 * t * series
    return result


def _sum(x: F64) -> F64:
    """Sum over the first axis, pairwise, in an order that is part of this definition."""
    while len(x) > 1:
        half = len(x) // 2
        odd = x[2 * half :]
        x = x[:half] + x[half : 2 * half]
        if len(odd):
            x[0] += odd[0]
    total: F64 = x[0]
    return total


def _orthogonal_blocks(rows: F64, simplex: bool = False) -> F64:
    """Orthonormalise each block of d rows of (m, d), and the rows left over as one more."""
    num, dim = rows.shape
    whole = num - num % dim
    blocks = [rows[:whole].reshape(-1, dim, dim), rows[whole:].reshape(1, -1, dim)]
    done = [_gram_schmidt(block) for block in blocks if block.size]
    if simplex:
        done = [_simplex(block) for block in done]
    return np.concatenate([block.reshape(-1, dim) for block in done])


def _simplex(blocks: F64) -> F64:
    """Turn r orthonormal rows (..., r, d) into unit vectors with inner products -1/(d-1).

    By the square root of the matrix of these products: ``a I`` minus a multiple of ``1 1'``.
    """
    count, dim = blocks.shape[-2:]
    a = np.sqrt(dim / (dim - 1.0))
    b = (np.sqrt((dim - count) / (dim - 1.0)) - a) / count
    total = _sum(np.moveaxis(blocks, -2, 0).copy())
    return np.asarray(a * blocks + b * total[:, None, :])


def _gram_schmidt(blocks: F64) -> F64:
    """Orthonormalise the rows of each (rows, d) matrix of a stack, rows <= d.

    Modified Gram-Schmidt.  Its second pass removes what rounding left in the first ("twice is
    enough"); it cannot turn a row round, so the implied R keeps its positive diagonal.
    """
    vectors = np.ascontiguousarray(np.moveaxis(blocks, -1, 0))  # (d, blocks, rows)
    for _ in range(2):
        for j in range(vectors.shape[2]):
            q = vectors[:, :, j : j + 1]
            q /= np.sqrt(_sum(q * q))
            rest = vectors[:, :, j + 1 :]
            if rest.size:
                rest -= q * _sum(q * rest)
    result: F64 = np.moveaxis(vectors, 0, -1)
    return result
