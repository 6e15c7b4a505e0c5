"""Calibration: the change of variables, and the tilt, that suit the data.

Queries and keys come here times sqrt(scale) and less their centres, as x and y: float64, head
by head.  A solution is (V, A): the map acts on V x and V**-T y, and its rows w are importance
samples with the weights exp(2 w'Aw), A diagonal.  With Gaussian rows any solution leaves the
estimator of exp(x.y) unbiased; what changes is its variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]
Solution: TypeAlias = tuple[F64, F64]


class Sample(NamedTuple):
    """Some queries and keys (L, d) of a head, what is added to each key's logits, and weights."""

    x: F64
    y: F64
    height: F64
    exact: F32


#: The methods, the cheaper before the dearer ones.
METHODS = ("oprf", "sderf", "saderf", "aderf", "saderf+sderf", "aderf+sderf", "spherical")
#: Those that "auto" chooses from: the others are special cases of the first, or err more.
CANDIDATES = ("aderf+sderf", "spherical")
#: What part of the error a dearer method has to save to be chosen by "auto".
GAIN = 0.02
#: Queries, keys, and pairs of them at which errors and objectives are evaluated, at most.
SAMPLE, PAIRS = 64, 2048
#: Directions with less than this part of the mean second moment count as having that much.
FLOOR = 1e-4
#: Products of different coordinates are shrunk by L / (L + SHRINK d): few rows know them badly.
SHRINK = 2.0
#: Lengths, over sqrt(d), among which "spherical" looks for that of its rows.
SHORTEST, LONGEST = 0.72, 1.05
#: Largest entry of A: from 1/8 on the variance of Gaussian rows is infinite.
LARGEST = 0.12


def spherical(rows: F64) -> F64:
    """Return rows (..., m, d) of the same directions, all of length sqrt(d)."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / lengths * math.sqrt(rows.shape[-1]))


def calibrate(
    method: str, x: F64, y: F64, height: F64, rows: F64, antithetic: bool
) -> tuple[str, list[Solution]]:
    """Return the method, chosen if it is "auto", and its solution for every head.

    Parameters
    ----------
    method : str
        One of METHODS, or "auto".
    x, y : ndarray, shape (heads, L, d)
        Centred queries and keys.
    height : ndarray, shape (heads, L_k)
        What is added to the logarithm of the kernel of each key: ``a . y``.
    rows : ndarray, shape (heads or 1, m, d)
        The projection.
    antithetic : bool
        Whether its negative is used as well.
    """
    rows = np.broadcast_to(rows, (len(x), *rows.shape[1:]))
    samples = [sampled(*parts) for parts in zip(x, y, height, strict=True)]
    options = CANDIDATES if method == "auto" else (method,)
    best = math.inf
    chosen: tuple[str, list[Solution]] = method, []
    for option in options:
        used = spherical(rows) if option == "spherical" else rows
        solutions = [
            solve(option, x[h], y[h], samples[h], used[h], antithetic) for h in range(len(x))
        ]
        if len(options) == 1:
            return option, solutions
        parts = zip(samples, used, solutions, strict=True)
        total = sum(error(sample, w, antithetic, *solution) for sample, w, solution in parts)
        if total < (1 - GAIN) * best:
            best, chosen = total, (option, solutions)
    return chosen


def sampled(x: F64, y: F64, height: F64) -> Sample:
    """Return some rows of each, evenly spread, and their attention matrix."""
    x, y, height = (part[:: -(-len(part) // SAMPLE)] for part in (x, y, height))
    logits = x @ y.T + height
    exact = np.exp(logits - logits.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    return Sample(x, y, height, exact.astype(np.float32))


def solve(method: str, x: F64, y: F64, sample: Sample, rows: F64, antithetic: bool) -> Solution:
    """Return the solution of one head."""
    first, _, second = method.rpartition("+") if "+" in method else (method, "", "")
    if method == "sderf":
        first, second = "", "sderf"
    elif method == "spherical":
        first, second = "aderf", "sderf"
    change = balance(first, x, y)
    u, v = x @ change.T, y @ np.linalg.inv(change)
    moment = u.T @ u / len(u) + v.T @ v / len(v)
    cross = np.outer(u.mean(0), v.mean(0))  # zero where both are centred
    moment += cross + cross.T
    if second == "sderf":
        eigenvalues, basis = np.linalg.eigh(moment)
        change, u, v = basis.T @ change, u @ basis, v @ basis
    else:
        eigenvalues = np.full(len(moment), np.trace(moment) / len(moment))
    a = tilt(np.maximum(eigenvalues, 0.0))
    if method == "spherical":
        return change, radius(sample, rows, antithetic, change, a - a.mean())
    return change, a * strength(u, v, a) if antithetic else a


def balance(method: str, x: F64, y: F64) -> F64:
    """Return the change of variables after which queries and keys are equally large.

    "saderf": in every coordinate.  "aderf": in every direction, G**(1/2) for the G with
    G M1 G = M2 (arXiv:2302.00787, sections 3.3 and 3.4).  Otherwise none.
    """
    if method == "saderf":
        queries, keys = np.diag(second_moment(x)), np.diag(second_moment(y))
        return np.diag((keys / queries) ** 0.25)
    if method == "aderf":
        root = power(second_moment(x), 0.5)
        inverse = np.linalg.inv(root)
        return power(inverse @ power(root @ second_moment(y) @ root, 0.5) @ inverse, 0.5)
    return np.eye(x.shape[-1])


def second_moment(x: F64) -> F64:
    """Estimate the mean of x x', positive definite: for few rows and constant columns, too."""
    count, dim = x.shape
    moment = x.T @ x / count
    diagonal = np.diag(moment)
    known = count / (count + SHRINK * dim)
    floor = FLOOR * diagonal.mean() if diagonal.any() else 1.0
    return np.asarray(known * moment + np.diag((1 - known) * diagonal + floor))


def power(matrix: F64, exponent: float) -> F64:
    """Return a power of a symmetric matrix that is positive definite, but for rounding."""
    eigenvalues, basis = np.linalg.eigh(matrix)
    floor = np.finfo(np.float64).eps * eigenvalues[-1]
    return np.asarray(basis * np.maximum(eigenvalues, floor) ** exponent @ basis.T)


def tilt(moment: F64) -> F64:
    """Return the diagonal of A that is optimal for single features and Gaussian data.

    `moment` has the mean squares of x + y, direction by direction (SDERF, arXiv:2302.00787,
    section 3.2; all equal, they give FAVOR++, arXiv:2205.15317, theorem 3.3).
    """
    root = np.sqrt((2 * moment + 1) ** 2 + 8 * moment)
    return np.asarray((1 - 2 * moment - root) / 16)


def log_relative_variance(z: F64, a: F64, antithetic: bool) -> F64:
    """Return log(Var / K**2) of one feature, or of the mean of a pair, at z = x + y (..., d)."""
    squares = z * z
    constant = np.sum(np.log1p(-4 * a) - 0.5 * np.log1p(-8 * a))
    moment = constant + squares @ (1 / (1 - 8 * a))
    if antithetic:  # half of it, and half of the product of the partners, in which z cancels
        moment = np.logaddexp(moment, constant - squares.sum(-1)) - math.log(2)
    moment = np.maximum(moment, 1e-300)
    return np.asarray(moment + np.log(-np.expm1(-moment)))


def strength(x: F64, y: F64, a: F64) -> float:
    """Return the multiple of `a` that suits antithetic pairs: no closed form is known.

    It minimises the mean logarithm of the relative variance, which no outlier can spoil.
    """
    count = math.isqrt(PAIRS)
    x, y = x[:: -(-len(x) // count)], y[:: -(-len(y) // count)]
    z = (x[:, None] + y).reshape(-1, x.shape[-1])

    def objective(multiple: float) -> float:
        return float(log_relative_variance(z, multiple * a, antithetic=True).mean())

    return minimum(objective, 0.0, 3.0)


def radius(sample: Sample, rows: F64, antithetic: bool, change: F64, a: F64) -> F64:
    """Return A for rows of length sqrt(d), so that the features have the length that errs least.

    The mean of A only stretches rows of one length.  Shorter ones trade a little bias for a
    smaller variance; which length is best depends on the data and the number of features, and
    is measured.
    """

    def stretched(length: float) -> F64:
        return np.minimum(a + (1 - length**2) / 4, LARGEST)

    def objective(length: float) -> float:
        return error(sample, rows, antithetic, change, stretched(length))

    return stretched(minimum(objective, SHORTEST, LONGEST))


def minimum(objective: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function has its one minimum, to some 2% of the interval: golden sections."""
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = objective(left), objective(right)
    tolerance = 0.02 * (high - low)
    while right - left > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = objective(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = objective(right)
    return left if at_left < at_right else right


def error(sample: Sample, rows: F64, antithetic: bool, change: F64, a: F64) -> float:
    """Return the mean squared error of the rows of the attention matrix of x and y."""
    u, v = sample.x @ change.T, sample.y @ np.linalg.inv(change)
    tilted = (rows * np.sqrt(1 - 4 * a)).astype(np.float32)
    log_q, log_k = logarithms(u, tilted, antithetic), logarithms(v, tilted, antithetic)
    bias = (2 * (rows * rows) @ a).astype(np.float32)
    log_k += np.concatenate([bias, bias]) if antithetic else bias
    log_k += (sample.height - 0.5 * np.sum(v * v, axis=-1)).astype(np.float32)[:, None]
    top = log_k.max(0)
    log_k -= top
    log_q += top
    log_q -= log_q.max(-1, keepdims=True)
    products = np.exp(log_q, out=log_q) @ np.exp(log_k, out=log_k).T
    products /= products.sum(-1, keepdims=True)
    products -= sample.exact
    return float(np.vdot(products, products)) / len(products)


def logarithms(x: F64, tilted: F32, antithetic: bool) -> F32:
    """Return the products of x and the tilted rows, and of x and their negatives."""
    products = np.empty((len(x), len(tilted) * (1 + antithetic)), np.float32)
    np.matmul(x.astype(np.float32), tilted.T, out=products[:, : len(tilted)])
    if antithetic:
        np.negative(products[:, : len(tilted)], out=products[:, len(tilted) :])
    return products
