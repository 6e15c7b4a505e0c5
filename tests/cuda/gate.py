"""What the compilers make of every kernel, for the types that the host's code launches it with.

``PYTHONPATH=tests python tests/cuda/gate.py`` compiles all by NVVM and ptxas and writes gate.json,
the figures that test_gate.py compares with; a change of them is part of the change that brings it.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cases
import ml_dtypes
import numba
import numpy as np
import ptxrun
import sass
from ptxdevice import PtxDevice

import favor_np
from favor_np.cuda import runtime

TABLE = Path(__file__).with_suffix(".json")
#: Where nothing may spill; the other architectures have only to compile.
STRICT = ((8, 0), (9, 0))
REGISTERS = 65536  # of a multiprocessor
SHARED = 49152  # bytes that a block may have


@dataclass(frozen=True)
class Figures:
    """Of one kernel on one architecture; bytes."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    float64: int
    local_depot: bool
    wide_shared_loads: int
    #: Of each innermost loop of products: FFMA, instructions, LDS.128.
    loops: list[list[int]]

    def faults(self, threads: int) -> list[str]:
        """What must not be."""
        checks = {
            f"{self.stack} bytes of stack": self.stack,
            f"{self.spill_stores} + {self.spill_loads} bytes spilled": self.spill_stores
            + self.spill_loads,
            f"{self.float64} instructions of float64": self.float64,
            "an array in local memory": self.local_depot,
            f"{self.shared} bytes of shared memory": self.shared > SHARED,
            f"{self.registers} registers of {threads} threads": self.registers * threads
            > REGISTERS,
        }
        return [text for text, fault in checks.items() if fault]


@functools.cache
def tool(name: str) -> str:
    """Path of ptxas or nvdisasm: of the environment's packages, or the machine's."""
    for folder in map(Path, sys.path):
        for found in folder.glob(f"nvidia/cu*/bin/{name}"):
            return str(found)
    on_path = shutil.which(name)
    if on_path is None:
        raise FileNotFoundError(f"{name}: pip install --group cuda")
    return on_path


def architecture(cc: tuple[int, int]) -> str:
    """sm_90 of (9, 0)."""
    return f"sm_{cc[0]}{cc[1]}"


def assemble(ptx: str, cc: tuple[int, int], into: Path) -> str:
    """Assemble PTX to a file of machine code; what ptxas says about it."""
    source = into.with_suffix(".ptx")
    source.write_text(ptx)
    command = [tool("ptxas"), "-v", f"-arch={architecture(cc)}", source, "-o", into]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses the kernel\n{done.stderr[:2000]}")
    return done.stderr


def figures(ptx: str, cc: tuple[int, int]) -> Figures:
    """Compile PTX for an architecture and count."""
    with tempfile.TemporaryDirectory(prefix="gate") as folder:
        cubin = Path(folder, "kernel.cubin")
        said = assemble(ptx, cc, cubin)
        loops = sass.product_loops(sass.disassemble(tool("nvdisasm"), cubin))

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    return Figures(
        registers=number(r"Used (\d+) registers"),
        shared=number(r"(\d+) bytes smem"),
        stack=number(r"(\d+) bytes stack frame"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        float64=len(ptxrun.float64_instructions(ptx)),
        local_depot="__local_depot" in ptx,
        wide_shared_loads=len(re.findall(r"ld\.shared\.v4", ptx)),
        loops=[[loop.ffma, loop.instructions, loop.wide_loads] for loop in loops],
    )


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
        for dtype in (np.float16, ml_dtypes.bfloat16):
            in_16_bits(cases.CASES["causal-131"], dtype)
    return recorder.kernels


def in_16_bits(case: cases.Case, dtype: Any) -> None:
    """Launch what reads and writes 16 bits where registers are fewest: in causal calls, and a gradient."""
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
    pullback(out)
    state = favor_np.AttentionState.zeros(fm, v.shape[-1], q.shape[:-2], device="cuda")
    state.update(k, v).attend(q)
    state.merge(state.copy()).step(q[..., 0, :], k[..., 0, :], v[..., 0, :])
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
    return ptxrun.compile_ptx(*kernel, cc, launch_bounds=bounds or runtime.bounds(kernel[0]))


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
    TABLE.write_text(json.dumps(table(launched()), indent=1) + "\n")
