"""Forward and backward: gradients of queries, keys and values, four heads."""

import time

import numpy as np

from favor_np import exact_attention_vjp, favor_attention_vjp

from .bench_figures import GEMM
from .common import TIMER, feature_map, full_only, gemm, inputs, interleave, ratio, sized, warm

SIZES = ["L=1024 d=64 m=256", "L=8192 d=64 m=256", "L=16384 d=64 m=64"]
KINDS = ["causal", "full"]


def gradient(size, dtype="float32", kind="antithetic", *, causal, threads=None):
    """A call that attends and pulls a cotangent back."""
    n = sized(size)
    q, k, v = inputs(n["L"], n["d"], dtype=dtype)
    fm = feature_map(n["m"], n["d"], antithetic=kind == "antithetic")
    grad = np.ones_like(v)
    return lambda: favor_attention_vjp(q, k, v, fm, causal=causal, num_threads=threads)[1](grad)


def operations(size, heads=4, *, causal):
    """Useful operations of the algorithm that recomputes features: see docs/mathematics.md."""
    n = sized(size)
    token = 30 * n["d"] * n["m"] + (256 * (n["m"] + n["d"]) if causal else 0)
    return heads * n["L"] * token


class Favor:
    """Time by length, dtype and map."""

    params = (KINDS, SIZES, ["float32", "float64"], ["antithetic", "plain"])
    param_names = ("kind", "size", "dtype", "map")
    timer = TIMER

    def setup(self, kind, size, dtype, features):
        full_only(size != SIZES[0] or dtype == "float64")
        self.call = gradient(size, dtype, features, causal=kind == "causal")
        warm((kind, size, dtype, features, "gradient"), self.call)

    def time_forward_and_backward(self, kind, size, dtype, features):
        self.call()


class Rate:
    """Time of a useful operation over that of one of NumPy's matrix product: plain features, one thread."""

    params = (KINDS, SIZES)
    param_names = ("kind", "size")

    def setup(self, kind, size):
        full_only(size != SIZES[0])

    def track_over_gemm(self, kind, size):
        causal = kind == "causal"
        call = gradient(size, kind="plain", causal=causal, threads=1)
        times = interleave(call, gemm())
        return ratio(*times.T) * GEMM / operations(size, causal=causal)

    track_over_gemm.unit = "times GEMM's"


class Threads:
    """Time of two threads over that of one, four heads."""

    def setup(self):
        full_only(True)

    def track_over_one(self):
        calls = (gradient(SIZES[1], causal=True, threads=n) for n in (2, 1))
        return ratio(*interleave(*calls, clock=time.perf_counter).T)

    track_over_one.unit = "times"


class Exact:
    """Softmax attention and the gradients by queries, keys and values."""

    params = ([1024, 8192], ["float32", "float64"], ["causal", "full"])
    timer = TIMER
    param_names = ("L", "dtype", "kind")

    def setup(self, length, dtype, kind):
        full_only(length > 1024)
        q, k, v = inputs(length, dtype=dtype)
        self.call = lambda: exact_attention_vjp(q, k, v, causal=kind == "causal")[1](v)
        warm(("exact gradient", length, dtype, kind), self.call)

    def time_forward_backward(self, length, dtype, kind):
        self.call()
