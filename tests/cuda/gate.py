"""What the compilers make of every kernel, for the types that the host's code launches it with.

    PYTHONPATH=tests:tools/cuda_on_cpu python tests/cuda/gate.py [pattern of names]

compiles all by NVVM and ptxas and writes gate.json, the figures that test_gate.py compares with; a
change of them is part of the change that brings it.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cases
import ml_dtypes
import numba
import numpy as np
import ptxrun
from ptxas import architecture, figures
from ptxdevice import PtxDevice

import favor_np
from favor_np.cuda import code

TABLE = Path(__file__).with_suffix(".json")
#: Where nothing may spill; the other architectures have only to compile.
STRICT = ((8, 0), (9, 0))

Signature = tuple[Any, ...]
Kernel = tuple[Callable[..., Any], Signature]


class Recorder(PtxDevice):
    """Notes each kernel that is launched, with the types of its arguments, and runs none."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Kernel] = {}

    def launch(
        self, kernel: Callable[..., Any], grid: tuple[int, ...], args: Any, stream: Any = None
    ) -> None:
        """Note a launch."""
        self.launches.append((kernel, grid, args))
        signature = tuple(map(numba.typeof, args))
        name = name_of(kernel)
        first = self.kernels.setdefault(name, (kernel, signature))[1]
        if first != signature:
            other = ", ".join(
                f"{parameter} {_short(kind)}"
                for parameter, kind, usual in zip(
                    inspect.signature(kernel).parameters, signature, first, strict=True
                )
                if kind != usual
            )
            self.kernels[f"{name}({other})"] = kernel, signature


def launched() -> dict[str, Kernel]:
    """Every kernel with the types that the calls of the case table launch it for, by name."""
    with Recorder().installed() as recorder:
        for case in cases.CASES.values():
            arrays, fm, options = case.arrays(), case.feature_map(), case.keywords()
            favor_np.favor_attention(*arrays, fm, device="cuda", **options)
        for case in cases.CASES.values():
            if case.length == 131 and not case.masked and case.kv_lead is None:
                every_way(case)
            if case.biased:
                arrays, fm, options = case.arrays(), case.feature_map(), case.keywords()
                out, pullback = favor_np.favor_attention_vjp(*arrays, fm, device="cuda", **options)
                found = pullback(out)
                if case.causal and case.kind == "antithetic":
                    found.projection  # noqa: B018 (it is computed when it is asked for)
        for dtype in (np.float16, ml_dtypes.bfloat16):
            in_16_bits(cases.CASES["causal-131"], dtype)
        for name in ("causal-131", "full-131"):
            case = cases.CASES[name]
            arrays, fm, options = case.arrays(), case.feature_map(), case.keywords()
            favor_np.favor_attention(*arrays, fm, device="cuda", precision="bfloat16", **options)
    return recorder.kernels


def in_16_bits(case: cases.Case, dtype: Any) -> None:
    """Launch what reads and writes 16 bits where registers are fewest.

    That is in causal calls, and in a gradient.
    """
    arrays = [x.astype(dtype) for x in case.arrays()]
    fm = case.feature_map()
    favor_np.favor_attention(*arrays, fm, causal=True, device="cuda")
    if dtype != np.float16:
        out, pullback = favor_np.favor_attention_vjp(*arrays, fm, causal=True, device="cuda")
        pullback(out)


def every_way(case: cases.Case) -> None:
    """Launch what calls other than `favor_attention` launch."""
    q, k, v = case.arrays()
    fm = case.feature_map()
    out, pullback = favor_np.favor_attention_vjp(q, k, v, fm, causal=case.causal, device="cuda")
    found = pullback(out)
    if case.kind == "antithetic" or (case.kind == "relu" and case.causal):
        found.projection  # noqa: B018 (it is computed when it is asked for)
    state = favor_np.AttentionState.zeros(fm, v.shape[-1], q.shape[:-2], device="cuda")
    state.update(k, v).attend(q)
    state.merge(state.copy()).step(q[..., 0, :], k[..., 0, :], v[..., 0, :])
    fading = favor_np.AttentionState(fm, v.shape[-1], q.shape[:-2], decay=0.9, device="cuda")
    fading.update(k, v).merge(fading.copy())
    if case.kind == "antithetic":
        affine = fm.calibrate(q, k, "saderf+sderf")
        favor_np.favor_attention(q, k, v, affine, causal=case.causal, device="cuda")
        shared = favor_np.favor_attention_vjp(q, k[0], v[0], fm, device="cuda")
        shared[1](shared[0])  # gradients of several heads are added


def name_of(kernel: Callable[..., Any]) -> str:
    """Name, and what its factory was asked for.

    >>> def make(kind):
    ...     def kernel(x):
    ...         x[0] = kind
    ...
    ...     return kernel
    >>> name_of(make(3))
    'kernel[kind=3]'
    """
    made_for = ", ".join(
        f"{name}={int(value)}"
        for name, value in inspect.getclosurevars(kernel).nonlocals.items()
        if isinstance(value, int)
    )
    return f"{kernel.__name__}[{made_for}]" if made_for else kernel.__name__


def _short(kind: Any) -> str:
    if isinstance(kind, numba.types.Array):
        readonly = "" if kind.mutable else " const"
        layout = "" if kind.layout == "C" else f" {kind.layout}"
        return f"{kind.ndim}d {_short(kind.dtype)}{layout}{readonly}"
    text = {"bool": "b1"}.get(str(kind), str(kind))
    return re.sub(r"^(u?)(int|float)(\d+)$", lambda m: f"{m[1] or m[2][0]}{int(m[3]) // 8}", text)


def compiled(kernel: Kernel, cc: tuple[int, int], bounds: Any = None) -> str:
    """The PTX, as a launch compiles it."""
    return ptxrun.compile_ptx(*kernel, cc, launch_bounds=bounds or code.bounds(kernel[0]))


def table(kernels: dict[str, Kernel]) -> dict[str, dict[str, Any]]:
    """Figures of all kernels on the architectures that are looked at closely."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # ptxas is a process of its own
        jobs = {
            name: {
                architecture(cc): pool.submit(figures, compiled(kernel, cc), cc) for cc in STRICT
            }
            for name, kernel in sorted(kernels.items())
        }
        return {
            name: {sm: asdict(job.result()) for sm, job in row.items()}
            for name, row in jobs.items()
        }


if __name__ == "__main__":
    pattern = "".join(sys.argv[1:])
    kernels = launched()
    found = table({name: kernel for name, kernel in kernels.items() if re.search(pattern, name)})
    if pattern:
        found = json.loads(TABLE.read_text()) | found
    found = {name: found[name] for name in sorted(kernels) if name in found}
    TABLE.write_text(json.dumps(found, indent=1) + "\n")
