"""Estimates of the kernel by many independent projections, and their z-tests."""

import numpy as np

from favor_np import sample_projection

LIMIT = 6.5
DIM = 8
RUNS = 20_000


def point(kind):
    """Vectors x, y with |x + y|**2 = 1; "ones" is where signs that are not fixed show."""
    if kind == "ones":
        x, y = np.full(DIM, 0.65), np.full(DIM, 0.35)
    else:
        rng = np.random.default_rng(5)
        x, y = rng.standard_normal((2, DIM))
        y *= 0.4
    return x / np.linalg.norm(x + y), y / np.linalg.norm(x + y)


def projections(rows, kind, norms="chi", seed=0):
    """RUNS independent projections, (RUNS, rows, DIM)."""
    if rows % DIM == 0:  # the blocks of one long projection are independent
        long = sample_projection(RUNS * rows, DIM, kind, norms, rng=seed, dtype=np.float64)
        return long.reshape(RUNS, rows, DIM)
    rng = np.random.default_rng(seed)
    return np.array([sample_projection(rows, DIM, kind, norms, rng=rng) for _ in range(RUNS // 4)])


def z_mean(sample, mean, variance=None):
    variance = sample.var(ddof=1) if variance is None else variance
    return (sample.mean() - mean) / np.sqrt(variance / len(sample))


def z_variance(sample, mean, variance):
    squares = (sample - mean) ** 2
    return z_mean(squares, variance)
