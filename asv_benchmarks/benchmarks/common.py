"""Inputs and warm-up, memoised (asv calls ``setup`` before every timed call), and the profile."""

import ctypes
import functools
import os
import statistics
import time

import numpy as np

import favor_np

#: FAVOR_NP_BENCH=full runs every parameter; without it the heavy ones are skipped.
FULL = os.environ.get("FAVOR_NP_BENCH") == "full"

#: Clock of ``time_`` benchmarks: of one thread the processor time, which others disturb less.
ONE_THREAD = os.environ.get("FAVOR_NP_NUM_THREADS") == "1"
TIMER = time.process_time if ONE_THREAD else time.perf_counter


def full_only(heavy):
    """Skip this parameter (n/a) outside the full profile."""
    if heavy and not FULL:
        raise NotImplementedError("in the full profile only: FAVOR_NP_BENCH=full")


@functools.lru_cache
def inputs(length, dim=64, heads=4, std=0.35, dtype="float32"):
    """Queries, keys and values (1, heads, length, dim), read-only."""
    rng = np.random.default_rng(0)
    arrays = []
    for scale in (std, std, 1.0):
        array = rng.standard_normal((1, heads, length, dim), dtype)
        array *= scale
        array.flags.writeable = False
        arrays.append(array)
    return tuple(arrays)


@functools.lru_cache
def feature_map(features=256, dim=64, kind="positive", projection="orthogonal", antithetic=True):
    return favor_np.feature_map(
        kind, dim=dim, num_features=features, projection=projection, antithetic=antithetic
    )


@functools.lru_cache
def sized(size):
    """Numbers of a size written as text, such as "L=1024 d=64 m=256"."""
    return {name: int(number) for name, number in (part.split("=") for part in size.split())}


def favor(size, dtype="float32", kind="plain", *, heads=4, causal=True, threads=None):
    """A call of `favor_attention` at a size."""
    n = sized(size)
    arrays = inputs(n["L"], n["d"], n.get("H", heads), dtype=dtype)
    fm = feature_map(n["m"], n["d"], antithetic=kind == "antithetic")
    return lambda: favor_np.favor_attention(*arrays, fm, causal=causal, num_threads=threads)


def operations(size, heads=4, *, causal=True):
    """Useful operations of a call: of a causal chunk 64 positions, whatever the library takes."""
    n = sized(size)
    token = 8 * n["d"] * n["m"] + (64 * (n["m"] + n["d"]) if causal else 0)
    return heads * n["L"] * token


_warm = set()


def warm(key, call):
    """Run ``call`` once in this process, so that nothing is compiled while the clock runs."""
    if key not in _warm:
        call()
        _warm.add(key)


def interleave(*calls, seconds=0.0, clock=time.process_time):
    """Seconds of each call, in turns: what disturbs the machine meets them all.

    Returns an array (turns, calls). In the full profile short calls are repeated for 20 ms a turn:
    alone after a matrix product, one finds the caches and the TLB full of that one's data.
    Processor time is the same as wall time for one thread, but for what other programs took.
    """
    seconds, least = seconds or (2.0 if FULL else 0.3), 0.02 if FULL else 0.004
    counts = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        counts.append(1 + int(least / (time.perf_counter() - start)))
    turns, stop = [], time.perf_counter() + seconds
    while len(turns) < 3 or time.perf_counter() < stop:
        turn = []
        for call, count in zip(calls, counts, strict=True):
            start = clock()
            for _ in range(count):
                call()
            turn.append((clock() - start) / count)
        turns.append(turn)
    return np.array(turns)


def ratio(first, second):
    """Median over the turns of how many times longer `first` took than `second`."""
    return float(statistics.median(first / second))


@functools.cache
def one_blas_thread():
    """Hold NumPy's OpenBLAS to one thread; asv may have loaded it before our environment counts."""
    library = ctypes.CDLL(np._core._multiarray_umath.__file__)
    for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads"):
        if hasattr(library, name):
            getattr(library, name)(1)
            return
    if os.environ.get("FAVOR_NP_BENCH_BLAS") != "1":
        raise NotImplementedError("another BLAS: hold it to one thread, set FAVOR_NP_BENCH_BLAS=1")


@functools.lru_cache
def gemm(dtype="float32", n=1024):
    """NumPy's matrix product of n x n x n: the limit that rates are compared with."""
    one_blas_thread()
    a, b = np.random.default_rng(0).standard_normal((2, n, n)).astype(dtype)
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out)
