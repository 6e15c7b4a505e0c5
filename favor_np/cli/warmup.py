"""``favor-np warmup``: compile every kernel once, so that later first calls find it cached."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Compile the kernels and store them in the cache, so that the first call of any later "
        "process is quick."
    )
    parser.add_argument("--float64", action="store_true", help="the kernels of float64 as well")


def run(args: argparse.Namespace) -> int:
    """Call everything once on tiny inputs; return the exit status."""
    import numpy as np

    start = time.perf_counter()
    types = [np.float32, np.float64] if args.float64 else [np.float32]
    calls = [call for dtype in types for call in _calls(np.dtype(dtype))]
    for done, (name, call) in enumerate(calls, 1):
        if sys.stderr.isatty():
            print(f"\r{done}/{len(calls)} {name:<40}", end="", file=sys.stderr, flush=True)
        call()
    if sys.stderr.isatty():
        print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
    print(f"{len(calls)} kernel calls ready in {time.perf_counter() - start:.1f} s")
    return 0


def _calls(dtype: np.dtype[Any]) -> list[tuple[str, Callable[[], object]]]:
    """One small call for each way into the kernels."""
    import numpy as np

    from favor_np import (
        AttentionState,
        diagnose,
        exact_attention,
        exact_attention_vjp,
        favor_attention,
        favor_attention_vjp,
        feature_map,
        thread_limit,
    )
    from favor_np.cpu.kernels import bfloat16

    x, long = np.zeros((2, 8), dtype), np.zeros((2, 64), dtype)
    fm = feature_map("positive", dim=8, num_features=16, dtype=dtype)
    large = feature_map("positive", dim=64, num_features=128, dtype=dtype)
    state = AttentionState.zeros(fm, value_dim=8)
    series, wide = np.zeros((8192, 8), dtype), np.zeros((1024, 64), dtype)
    middle = feature_map("positive", dim=8, num_features=64, dtype=dtype)

    def shared(call: Callable[..., object], *args: object, **options: object) -> object:
        """Call for one long causal head, which threads share."""
        with thread_limit(2):
            return call(*args, causal=True, **options)

    calls: list[tuple[str, Callable[[], object]]] = [
        ("bidirectional", lambda: favor_attention(x, x, x, fm)),
        ("causal", lambda: favor_attention(x, x, x, fm, causal=True)),
        ("streaming", lambda: state.step(x[0], x[0], x[0])),
        ("gradient", lambda: favor_attention_vjp(x, x, x, fm)[1](x)),
        ("one long head", lambda: shared(favor_attention, series, series, series, middle)),
        ("error bars", lambda: diagnose(x, x, x, fm)),
        ("error bars, one long head", lambda: shared(diagnose, series, series, series, middle)),
        ("merge", lambda: state.merge(state.copy())),
        ("exact", lambda: exact_attention(x, x, x)),
        ("exact causal", lambda: exact_attention(x, x, x, causal=True)),
        ("exact gradient", lambda: exact_attention_vjp(x, x, x)[1](x)),
    ]
    bf16x3 = not bfloat16.amx_unavailable()
    if dtype == np.float32 and bf16x3:  # longer rows have kernels of their own
        calls += [
            ("long rows", lambda: favor_attention(long, long, long, large)),
            ("long rows, one long head", lambda: shared(favor_attention, wide, wide, wide, large)),
            ("gradient, long rows", lambda: favor_attention_vjp(long, long, long, large)[1](long)),
            ("exact, long rows", lambda: exact_attention(long, long, long)),
        ]
    if dtype == np.float32 and (bf16x3 or bfloat16.DOTS):
        calls += [
            ("bfloat16", lambda: favor_attention(x, x, x, fm, precision="bfloat16")),
            (
                "bfloat16, one long head",
                lambda: shared(favor_attention, wide, wide, wide, large, precision="bfloat16"),
            ),
            ("exact, bfloat16", lambda: exact_attention(x, x, x, precision="bfloat16")),
        ]
    return [(f"{name}, {dtype}", call) for name, call in calls]
