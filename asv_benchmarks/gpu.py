"""Time the GPU benchmarks without asv, beside what else is installed: python asv_benchmarks/gpu.py.

Prints a table: the median of each call, and the floor of docs/roofline.py; exact attention of PyTorch
and linear attention of fla are timed where they are there.  Fails where there is no GPU.
"""

import functools
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "docs")]
os.environ["FAVOR_NP_BENCH"] = "full"

from benchmarks import bench_cuda
from benchmarks.common import inputs, sized


def median(call, *args, seconds=1.0, **options):
    """Median of the time of a call, in seconds, over at least seven."""
    call = functools.partial(call, *args, **options)
    times = []
    begin = time.perf_counter()
    while len(times) < 7 or (time.perf_counter() - begin < seconds and len(times) < 1000):
        start = time.perf_counter()
        bench_cuda.finished(call)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours():
    """Every case of bench_cuda."""
    for kind in (bench_cuda.Forward, bench_cuda.Gradient, bench_cuda.RoundTrip, bench_cuda.Decode):
        (name,) = (name for name in dir(kind) if name.startswith("time_"))
        for values in itertools.product(*kind.params):
            benchmark = kind()
            benchmark.setup(*values)
            call = getattr(benchmark, name)
            yield f"{kind.__name__} {' '.join(map(str, values))}", median(call, *values)


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
    for size, causal in itertools.product(bench_cuda.SIZES[:2], (True, False)):
        n = sized(size)
        q, k, v = (torch.tensor(x, device="cuda") for x in inputs(n["L"], n["d"], n["H"]))
        for dtype in (torch.float32, torch.bfloat16):
            arrays = [x.to(dtype) for x in (q, k, v)]
            name = f"torch exact {str(dtype)[6:]} {'causal' if causal else 'full'} {size}"
            yield name, median(attend, *arrays, is_causal=causal)
        if causal:
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
        median(lambda: chunk_linear_attn(*turned)),
    )


def floors():
    """Seconds that the forward kernels need at least, by the roofline."""
    import roofline

    for kind, size in itertools.product(bench_cuda.KINDS, bench_cuda.SIZES):
        n = sized(size)
        costs = roofline.costs((1, n["H"]), n["L"], causal=kind == "causal")
        for name, gpu in roofline.GPUS.items():
            yield f"floor {name} {kind} {size}", sum(c.floor(gpu) for c in costs.values())


def main():
    """Print all."""
    bench_cuda.cuda()
    for name, seconds in itertools.chain(floors(), ours(), rivals()):
        print(f"{1e6 * seconds:12.1f} µs  {name}", flush=True)


if __name__ == "__main__":
    main()
