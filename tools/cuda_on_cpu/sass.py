"""Machine code: where a kernel spends its time, by the loops of its disassembly."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*);")


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, one pass over its body."""

    instructions: int
    ffma: int
    wide_loads: int


def disassemble(nvdisasm: str, cubin: Path) -> str:
    """What nvdisasm makes of a file of machine code."""
    command = [nvdisasm, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def product_loops(text: str) -> list[Loop]:
    """The innermost loops with at least 16 multiply-adds: those with the most first."""
    loops = [loop for loop in _innermost(text) if loop.ffma >= 16]
    return sorted(loops, key=lambda loop: (-loop.ffma, loop.instructions, loop.wide_loads))


def _innermost(text: str) -> list[Loop]:
    code: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if found := _LABEL.match(line):
            waiting.append(found[1])
        elif found := _INSTRUCTION.match(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            code.append((address, found[2], found[3]))
    jumps = [(labels[target[1]], address) for address, name, rest in code
             if name.startswith("BRA") and (target := re.search(r"\((\.L_x_\d+)\)", rest))
             and target[1] in labels]  # fmt: skip
    # a jump to itself is the padding behind the end
    loops = {(first, last) for first, last in jumps if first < last}
    inner = [loop for loop in loops if not any(_within(other, loop) for other in loops)]
    return [_counted([name for at, name, _ in code if first <= at <= last])
            for first, last in inner]  # fmt: skip


def _within(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and other[0] <= one[0] and one[1] <= other[1]


def _counted(names: list[str]) -> Loop:
    return Loop(
        instructions=len(names),
        ffma=sum(name.startswith("FFMA") for name in names),
        wide_loads=sum(name == "LDS.128" for name in names),
    )
