"""Would a fast Walsh-Hadamard transform pay for "hadamard" rows?  Processor time, one thread.

    OPENBLAS_NUM_THREADS=1 python asv_benchmarks/hadamard.py

The products of 4096 tokens with m = 4d rows, by NumPy's matrix product and by H D1 H D2 H D3, in
the layout that suits the transform best (tokens contiguous, tiles of them, radix 4); beside them
the whole of attention with as many rows, of which these products are two.
"""

import time

import numba
import numpy as np

import favor_np

LENGTH, BLOCKS, TILES, TURNS = 4096, 4, (16, 32, 64, 128), 15


@numba.njit(fastmath={"contract", "reassoc", "nsz", "arcp", "afn"}, error_model="numpy")
def transform(x, signs, norms, tile, out):
    """Fill out (blocks * d, tokens) from x (d, tokens); d is a power of two."""
    dim, length = x.shape
    part = np.empty((dim, tile), np.float32)
    for start in range(0, length, tile):
        for block in range(len(signs)):
            for i in range(dim):
                for t in range(tile):
                    part[i, t] = signs[block, 0, i] * x[i, start + t]
            for turn in range(3):
                if turn:
                    for i in range(dim):
                        for t in range(tile):
                            part[i, t] *= signs[block, turn, i]
                half = 1
                while 4 * half <= dim:
                    for first in range(0, dim, 4 * half):
                        for i in range(first, first + half):
                            for t in range(tile):
                                a, b = part[i, t], part[i + half, t]
                                c, d = part[i + 2 * half, t], part[i + 3 * half, t]
                                part[i, t] = (a + b) + (c + d)
                                part[i + half, t] = (a - b) + (c - d)
                                part[i + 2 * half, t] = (a + b) - (c + d)
                                part[i + 3 * half, t] = (a - b) - (c - d)
                    half *= 4
                if half < dim:
                    for i in range(half):
                        for t in range(tile):
                            a, b = part[i, t], part[i + half, t]
                            part[i, t], part[i + half, t] = a + b, a - b
            for i in range(dim):
                for t in range(tile):
                    out[block * dim + i, start + t] = norms[block * dim + i] * part[i, t]


def seconds(call):
    call()
    times = []
    for _ in range(TURNS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def matrix(signs):
    """What a block of the transform multiplies with."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < signs.shape[-1]:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    first, second, third = (hadamard * row for row in signs)
    return third @ second @ first


def measure(dim):
    """Seconds of the matrix product, of the transform, and of attention, and a check of both."""
    rng, rows = np.random.default_rng(0), BLOCKS * dim
    x = rng.standard_normal((LENGTH, dim), np.float32)
    signs = np.sign(rng.standard_normal((BLOCKS, 3, dim), np.float32))
    weights = (np.concatenate([matrix(s) for s in signs]) / dim).T.astype(np.float32, order="C")
    one, other = np.empty((LENGTH, rows), np.float32), np.empty((rows, LENGTH), np.float32)
    gemm = seconds(lambda: np.matmul(x, weights, out=one))
    turned, norms = x.T.copy(), np.full(rows, dim**-1.0, np.float32)
    walsh = min(seconds(lambda t=t: transform(turned, signs, norms, t, other)) for t in TILES)
    assert np.allclose(one.T, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())
    fm = favor_np.feature_map("positive", dim, rows, antithetic=False)
    small = 0.3 * x
    whole = seconds(lambda: favor_np.favor_attention(small, small, small, fm, num_threads=1))
    return gemm, walsh, whole


def main():
    print(
        f"{'d':>4}{'m':>6}{'GEMM ms':>10}{'FWHT ms':>10}{'attention ms':>14}{'saved at most':>15}"
    )
    for dim in (64, 128, 256, 512):
        gemm, walsh, whole = measure(dim)
        times = f"{1e3 * gemm:>10.2f}{1e3 * walsh:>10.2f}{1e3 * whole:>14.1f}"
        print(f"{dim:>4}{BLOCKS * dim:>6}{times}{2 * (gemm - walsh) / whole:>15.0%}")


if __name__ == "__main__":
    main()
