"""What ptxas and nvdisasm make of a kernel: registers, memory, spills, loops of products."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ptxrun
import sass

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
