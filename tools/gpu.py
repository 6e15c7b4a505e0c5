"""Time the GPU benchmarks without asv, beside what else is installed: python tools/gpu.py [bfloat16].

Prints a table: the time of each call, and the floor by roofline.py; exact attention of PyTorch and
linear attention of fla are timed where they are there.  Fails where there is no GPU.
"""

import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "asv_benchmarks"), str(ROOT)]
os.environ["FAVOR_NP_BENCH"] = "full"

from benchmarks import bench_cuda
from benchmarks.common import feature_map, inputs, sized

import favor_np

#: Calls that follow each other.
ROW = 10


class Times(NamedTuple):
    """Seconds of a call: alone, until the GPU has done it; and of each of many that follow each other."""

    alone: float
    in_a_row: float


def times(call, *, seconds=0.5):
    """Medians, over at least seven calls alone and five rows."""
    bench_cuda.finished(call)
    return Times(
        _median(lambda: bench_cuda.finished(call), 7, seconds),
        _median(lambda: bench_cuda.finished(lambda: [call() for _ in range(ROW)]), 5, seconds)
        / ROW,
    )


def _median(call, least, seconds):
    found = []
    begin = time.perf_counter()
    while len(found) < least or (time.perf_counter() - begin < seconds and len(found) < 1000):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def ours():
    """Every case of bench_cuda, forwards with `out` as well."""
    for kind in (bench_cuda.Forward, bench_cuda.Gradient, bench_cuda.RoundTrip, bench_cuda.Decode):
        (name,) = (name for name in dir(kind) if name.startswith("time_"))
        for values in itertools.product(*kind.params):
            benchmark = kind()
            benchmark.setup(*values)
            call = functools.partial(getattr(benchmark, name), *values)
            if kind is not bench_cuda.RoundTrip:
                call = getattr(benchmark, "call", None) or benchmark.step  # which do not wait
            yield f"{kind.__name__} {' '.join(map(str, values))}", times(call)
            if kind is bench_cuda.Forward:
                room = bench_cuda.cuda().device_array_like(bench_cuda.on_device(values[1])[2])
                call = bench_cuda.forward(*values, out=room)
                yield f"Forward {' '.join(values)} out=", times(call)


FIRST = """
import time
import numpy as np
import favor_np
from favor_np.cuda import device
device.current()
fm = favor_np.feature_map("positive", 64, 256)
x = np.ones((3, 4, 200, 64), np.float32)
start = time.perf_counter()
favor_np.favor_attention(*x, fm, causal=True, device="cuda")
print(time.perf_counter() - start)
"""


def in_bfloat16():
    """Forwards in float32, and with products of bfloat16."""
    for kind, size in itertools.product(bench_cuda.KINDS, bench_cuda.SIZES):
        for precision in ("full", "bfloat16"):
            call = bench_cuda.forward(kind, size, precision=precision)
            yield f"Forward {kind} {size} {precision}", times(call)


def first_calls():
    """The first call of a process, which compiles, or finds what was kept."""
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {"NUMBA_CACHE_DIR": folder, "FAVOR_NP_CACHE": "1"}
        environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        )
        for name in ("compiles", "finds kernels"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST],
                env=environ,
                capture_output=True,
                text=True,
                check=True,
            )
            seconds = float(done.stdout)
            yield f"first call of a process that {name}", Times(seconds, seconds)


def rivals():
    """Exact attention of PyTorch, and fla's linear attention, of the same sizes."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: no rivals")
        return
    if not torch.cuda.is_available():
        print("this PyTorch has no CUDA: no rivals")
        return
    attend = torch.nn.functional.scaled_dot_product_attention
    for size, causal in itertools.product(bench_cuda.SIZES, (True, False)):
        n = sized(size)
        q, k, v = (torch.tensor(x, device="cuda") for x in inputs(n["L"], n["d"], n["H"]))
        for dtype in (torch.float32, torch.bfloat16):
            arrays = [x.to(dtype) for x in (q, k, v)]
            name = f"torch exact {str(dtype)[6:]} {'causal' if causal else 'full'} {size}"
            yield name, times(functools.partial(attend, *arrays, is_causal=causal))
        if causal:
            fm = feature_map(n["m"], n["d"])
            for dtype in (torch.float32, torch.bfloat16):
                arrays = [x.to(dtype) for x in (q, k, v)]
                call = functools.partial(favor_np.favor_attention, *arrays, fm, causal=True)
                yield f"favor_np of torch {str(dtype)[6:]} causal {size}", times(call)
            yield from _fla(size, q, k, v)


def _fla(size, q, k, v):
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        print("fla is not installed")
        return
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    yield (
        f"fla chunk_linear_attn {size} (its keys are its features)",
        times(lambda: chunk_linear_attn(*turned)),
    )


def floors():
    """Seconds that the forward kernels need at least, by the roofline."""
    import roofline

    for kind, size in itertools.product(bench_cuda.KINDS, bench_cuda.SIZES):
        n = sized(size)
        costs = roofline.costs((1, n["H"]), n["L"], causal=kind == "causal")
        for name, gpu in roofline.GPUS.items():
            floor = sum(c.floor(gpu) for c in costs.values())
            yield f"floor {name} {kind} {size}", Times(floor, floor)


def main(part=None):
    """Print all, or only what compares the two precisions."""
    bench_cuda.cuda()
    print("   µs: alone    in a row")
    parts = [in_bfloat16()] if part else [floors(), first_calls(), ours(), rivals()]
    for name, found in itertools.chain(*parts):
        print(f"{1e6 * found.alone:12.1f}{1e6 * found.in_a_row:12.1f}  {name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
