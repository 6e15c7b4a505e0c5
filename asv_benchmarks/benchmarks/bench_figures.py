"""What the documentation states, as ratios measured in turns within one process.

asv takes the lower of two figures for the better one, whatever they are: so a figure is time over time,
never a rate or a speed-up.

Of one thread the processor time counts, which other programs disturb less than wall time.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import favor_np
from favor_np.compare import crossing
from favor_np.cpu import tuning

from .common import (
    FULL,
    favor,
    feature_map,
    full_only,
    gemm,
    inputs,
    interleave,
    operations,
    ratio,
    sized,
)

GEMM = 2 * 1024**3
KINDS = ["causal", "full"]


class Rate:
    """Time of a useful operation over that of one of NumPy's matrix product: plain features, one thread.

    Four heads.  Antithetic features do less work for the same figure: see `Antithetic`.
    """

    params = (
        KINDS,
        [
            "L=1024 d=64 m=256 float32",
            "L=8192 d=64 m=256 float32",
            "L=16384 d=64 m=64 float32",
            "L=8192 d=64 m=256 float64",
        ],
    )
    param_names = ("kind", "size")

    def track_over_gemm(self, kind, size):
        size, dtype = size.rsplit(" ", 1)
        causal = kind == "causal"
        times = interleave(favor(size, dtype, causal=causal, threads=1), gemm(dtype))
        return ratio(*times.T) * GEMM / operations(size, causal=causal)

    track_over_gemm.unit = "times GEMM's"


def work(what, number):
    """Processor time of a call over that of a matrix product, with arrays and a map of its own."""
    arrays = inputs(2048 if what == "exact" else 4096)
    fm = favor_np.feature_map("positive", dim=64, num_features=256, antithetic=False, rng=number)

    def call():
        if what == "exact":
            favor_np.exact_attention(*arrays, causal=True)
        elif what == "gradient":
            favor_np.favor_attention_vjp(*arrays, fm, causal=True)[1](arrays[2])
        else:
            favor_np.favor_attention(*arrays, fm, causal=what == "causal")

    return ratio(*interleave(call, gemm()).T)


class Work:
    """Processor time of a call over that of a matrix product: what to compare two commits by.

    On as many threads as the environment says.  Taken in turns, the two are slowed down alike by other
    programs.  Where in memory a process has its arrays counts up to 7 %, so this is the median over
    several processes.
    """

    params = (["causal", "full", "gradient", "exact"],)
    param_names = ("what",)

    def track_over_gemm(self, what):
        if not FULL:
            return work(what, 0)
        code = f"from benchmarks.bench_figures import work; print(work({what!r}, {{}}))"
        return statistics.median(
            float(
                subprocess.check_output(
                    [sys.executable, "-c", code.format(number)], cwd=Path(__file__).parents[1]
                )
            )
            for number in range(7)
        )

    track_over_gemm.unit = "times"


class Gemm:
    """NumPy's matrix product 1024 x 1024 x 1024, one thread: the limit on this machine."""

    params = (["float32", "float64"],)
    param_names = ("dtype",)

    def track_picoseconds(self, dtype):
        return 1e12 * float(np.median(interleave(gemm(dtype)))) / GEMM

    track_picoseconds.unit = "ps an operation"


class Antithetic:
    """Time of antithetic features over that of plain ones, at equal m."""

    params = (KINDS, ["L=8192 d=64 m=256"])
    param_names = ("kind", "size")

    def track_over_plain(self, kind, size):
        plain, pairs = (
            favor(size, kind=signs, causal=kind == "causal", threads=1)
            for signs in ("plain", "antithetic")
        )
        return ratio(*interleave(pairs, plain).T)

    track_over_plain.unit = "times"


class Bfloat16:
    """Time with products in bfloat16 over that with float32, one thread, and the error that they add.

    The error is relative to the estimate's own, both root mean square, with queries and keys of
    standard deviation 1.
    """

    params = (KINDS, ["plain", "antithetic"])
    param_names = ("kind", "map")

    def call(self, kind, signs, precision, std=0.35, length=8192):
        arrays, fm = inputs(length, std=std), feature_map(antithetic=signs == "antithetic")
        return lambda: favor_np.favor_attention(
            *arrays, fm, causal=kind == "causal", precision=precision, num_threads=1
        )

    def track_over_float32(self, kind, signs):
        calls = (self.call(kind, signs, precision) for precision in ("bfloat16", "full"))
        return ratio(*interleave(*calls).T)

    def track_added_error(self, kind, signs):
        full, half = (
            self.call(kind, signs, precision, 1.0, 1024)() for precision in ("full", "bfloat16")
        )
        exact = favor_np.exact_attention(*inputs(1024, std=1.0), causal=kind == "causal")
        return float(np.std(half - full) / np.std(full - exact))

    track_over_float32.unit = "times"
    track_added_error.unit = "of the estimate's"


class ExactBfloat16:
    """Time of exact attention with products in bfloat16 over that with float32, one thread."""

    params = (KINDS, [1024, 8192])
    param_names = ("kind", "L")

    def setup(self, kind, length):
        full_only(length > 1024)

    def track_over_float32(self, kind, length):
        calls = (
            lambda precision=precision: favor_np.exact_attention(
                *inputs(length), causal=kind == "causal", precision=precision, num_threads=1
            )
            for precision in ("bfloat16", "full")
        )
        return ratio(*interleave(*calls).T)

    track_over_float32.unit = "times"


def without_planes(call):
    """A call whose products are all of vectors; of its feature map nothing may be laid out yet."""

    def run():
        tuning.USE_BF16X3 = (
            False  # by hand: `tuned` forgets layouts, which would be made anew each time
        )
        try:
            return call()
        finally:
            tuning.USE_BF16X3 = None

    return run


class MatrixUnit:
    """Time of float32 where the matrix unit may help over that without, one thread; 1 if there is none."""

    params = (KINDS, ["plain", "antithetic", "gradient", "exact"])
    param_names = ("kind", "what")

    def call(self, kind, what, rng):
        arrays, causal = inputs(4096), kind == "causal"
        fm = favor_np.feature_map(
            "positive", dim=64, num_features=256, antithetic=what == "antithetic", rng=rng
        )
        if what == "exact":
            return lambda: favor_np.exact_attention(*arrays, causal=causal, num_threads=1)
        if what == "gradient":
            pull = favor_np.favor_attention_vjp
            return lambda: pull(*arrays, fm, causal=causal, num_threads=1)[1](arrays[2])
        return lambda: favor_np.favor_attention(*arrays, fm, causal=causal, num_threads=1)

    def track_over_vectors(self, kind, what):
        calls = self.call(kind, what, 0), without_planes(self.call(kind, what, 1))
        return ratio(*interleave(*calls).T)

    track_over_vectors.unit = "times"


class ErrorBars:
    """What `diagnose` takes, attention itself included, over attention: antithetic, one thread."""

    params = (KINDS, ["L=1024 d=64 m=256", "L=8192 d=64 m=256"])
    param_names = ("kind", "size")

    def track_ratio(self, kind, size):
        n, causal = sized(size), kind == "causal"
        arrays, fm = inputs(n["L"]), feature_map()

        def diagnose():
            with favor_np.thread_limit(1):
                favor_np.diagnose(*arrays, fm, causal=causal)

        plain = favor(size, kind="antithetic", causal=causal, threads=1)
        return ratio(*interleave(diagnose, plain).T)

    track_ratio.unit = "times"


class ExactRate:
    """The same for exact attention: 4 L d operations a token, causal half of them."""

    params = ([1024, 8192], KINDS)
    param_names = ("L", "kind")

    def setup(self, length, kind):
        full_only(length > 1024)

    def track_over_gemm(self, length, kind):
        arrays = inputs(length)
        causal = kind == "causal"
        times = interleave(
            lambda: favor_np.exact_attention(*arrays, causal=causal, num_threads=1), gemm()
        )
        count = 4 * 4 * length * length * 64 // (2 if causal else 1)
        return ratio(*times.T) * GEMM / count

    track_over_gemm.unit = "times GEMM's"


class Crossing:
    """The length from which FAVOR+ is the faster one: one head, antithetic, one thread."""

    params = (KINDS, [64, 128, 256])
    param_names = ("kind", "m")
    lengths = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)

    def setup(self, kind, m):
        full_only(m < 256)

    def track_length(self, kind, m):
        fm, causal, gains = feature_map(m), kind == "causal", []
        for length in self.lengths:
            arrays = inputs(length, heads=1)
            times = interleave(
                lambda a=arrays: favor_np.exact_attention(*a, causal=causal, num_threads=1),
                lambda a=arrays: favor_np.favor_attention(*a, fm, causal=causal, num_threads=1),
                seconds=0.5 if FULL else 0.05,
            )
            gains.append(ratio(*times.T))
        return crossing(self.lengths, gains) or float("nan")

    track_length.unit = "tokens"


class Threads:
    """Time of two threads over that of one, and wall time over processor time of the two."""

    params = (KINDS, ["H=4 L=8192 d=64 m=256", "H=1 L=65536 d=64 m=256"])
    param_names = ("kind", "size")

    def setup(self, kind, size):
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if cpus < 2:
            raise NotImplementedError("one processor")
        self.one, self.two = (
            favor(size, causal=kind == "causal", threads=threads) for threads in (1, 2)
        )

    def track_over_one(self, kind, size):
        return ratio(*interleave(self.two, self.one, clock=time.perf_counter).T)

    def track_wall_over_cpu(self, kind, size):
        self.two()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(20 if FULL else 5):
            self.two()
        return (time.perf_counter() - wall) / (time.process_time() - cpu)

    track_over_one.unit = track_wall_over_cpu.unit = "times"


class Long:
    """Calls of growing length."""

    def calls(self, kind, longest):
        """The lengths, and a call for each (contiguous: there is one head)."""
        arrays, fm = inputs(longest, heads=1), feature_map(antithetic=False)
        arrays = (*arrays, np.empty_like(arrays[2]))
        lengths = [1024 * 4**i for i in range(6) if 1024 * 4**i <= longest]
        if longest not in lengths:
            lengths.append(longest)
        return lengths, [
            lambda a=tuple(x[:, :, :n] for x in arrays): favor_np.favor_attention(
                *a[:3], fm, causal=kind == "causal", num_threads=1, out=a[3]
            )
            for n in lengths
        ]


class Growth(Long):
    """Greatest over least time a token, over lengths from 1k up: one head, one thread.

    With `out`: the first touch of new memory is the system's time, up to a fifth at 256 MB.
    """

    params = (KINDS, [131072, 1048576])
    param_names = ("kind", "longest")

    def setup(self, kind, longest):
        full_only(longest > 131072)

    def track_ratio(self, kind, longest):
        lengths, calls = self.calls(kind, longest)
        tokens = np.median(interleave(*calls), axis=0) / lengths
        return float(tokens.max() / tokens.min())

    track_ratio.unit = "times"


class Token(Long):
    """Time a token by length, one head, one thread: what `Growth` is a ratio of."""

    params = (KINDS, [1024, 4096, 16384, 65536, 262144, 1048576])
    param_names = ("kind", "L")

    def setup(self, kind, length):
        full_only(True)

    def track_nanoseconds(self, kind, length):
        call = self.calls(kind, length)[1][-1]
        return 1e9 * float(np.median(interleave(call))) / length

    track_nanoseconds.unit = "ns"
