"""``favor-np warmup``: compile every kernel once, so that later first calls find it cached."""

from __future__ import annotations

import argparse
import time

import numpy as np

from favor_np.features import FeatureMap, feature_map
from favor_np.progress import reporting

from ._options import CommandError, compilation_told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Compile the kernels that neither came with the package nor lie in the cache, so that the "
        "first call of any later process is quick."
    )
    parser.add_argument("--float64", action="store_true", help="the kernels of float64 as well")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: those of float32 for the GPU that is here",
    )


def run(args: argparse.Namespace) -> int:
    """Load or compile every kernel that may be called here; return the exit status."""
    if args.device == "cuda":
        return _warm_gpu(float64=args.float64)
    from favor_np.cpu.code import useful_kernels

    start = time.perf_counter()
    kernels = [k for k in useful_kernels() if args.float64 or k.dtype.itemsize == 4]
    with compilation_told(), reporting(None) as report:
        for done, kernel in enumerate(kernels, 1):
            kernel.load()
            report("kernels", done, len(kernels))
    _say(len(kernels), sum(kernel.origin == "compiled" for kernel in kernels), start)
    return 0


def _warm_gpu(*, float64: bool) -> int:
    """Call what the kernels of a GPU are for: their arguments decide what is compiled."""
    from favor_np.cuda import code, device

    if float64:
        raise CommandError("--float64: a GPU computes in float32")
    if problem := device.problem():
        raise CommandError(problem)
    start = time.perf_counter()
    calls = [(fm, causal) for fm in _maps() for causal in (True, False)]
    with compilation_told(), reporting(None) as report:
        for done, (fm, causal) in enumerate(calls, 1):
            _call_on_gpu(fm, causal=causal)
            report("calls", done, len(calls))
    _say(sum(code.counts.values()), code.counts["compiled"], start)
    return 0


def _maps() -> list[FeatureMap]:
    """Return a map of each kind that kernels differ for, and a calibrated one."""
    plain, paired = (
        feature_map("positive", 8, 16, antithetic=antithetic) for antithetic in (False, True)
    )
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    others = [feature_map(kind, 8, 16) for kind in ("relu", "elu")]
    return [paired, plain, *others, paired.calibrate(x, x, "saderf+sderf")]


def _call_on_gpu(fm: FeatureMap, *, causal: bool) -> None:
    """Attend, differentiate, and fold into a state, on a GPU."""
    import favor_np

    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2, 8)).astype(np.float32)
    for keys, bias in ((k, None), (k[:1], None), (k, [0.0, 0.0])):  # for one, heads are added
        _, pullback = favor_np.favor_attention_vjp(
            q, keys, v[: len(keys)], fm, causal=causal, key_bias=bias, device="cuda"
        )
        pullback(v).projection  # noqa: B018 (it is computed when it is asked for)
    if causal:
        favor_np.favor_attention(q, k, v, fm, causal=True, window=1, device="cuda")
    state = favor_np.AttentionState(fm, 8, 2, decay=0.5, device="cuda")
    state.update(k, v).merge(state.copy()).step(q[:, 0], k[:, 0], v[:, 0])


def _say(ready: int, compiled: int, start: float) -> None:
    seconds = time.perf_counter() - start
    print(f"{ready} kernels ready in {seconds:.1f} s, {compiled} of them compiled now")
