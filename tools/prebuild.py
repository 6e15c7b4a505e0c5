"""Compile the kernels for every level of this platform, into shared libraries beside the package.

    python tools/prebuild.py [FOLDER]

It needs Numba and a C compiler that links, and takes some minutes.  A wheel gets the libraries by
``FAVOR_NP_PREBUILD=1 python -m build --wheel``; in a checkout they lie in favor_np/cpu/libraries,
which git ignores, and serve until a source that kernels depend on is changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_SUFFIX = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
#: The libraries: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES of each.
LIBRARIES = {"aarch64": ("", "")}
if _X86:
    LIBRARIES = {
        "x86-64-v3": ("x86-64-v3", ""),
        "x86-64-v4": ("x86-64-v4", ""),
        "x86-64-v4-dots": ("x86-64-v4", "+avx512bf16"),
    }
    if sys.platform == "linux":
        LIBRARIES["x86-64-v4-amx"] = ("x86-64-v4", "+avx512bf16,+amx-tile,+amx-bf16")

#: What asks a processor what it can do: in C's words
#: ``void favor_np_cpuid(int64_t leaf, int64_t subleaf, uint32_t *registers)`` and
#: ``int64_t favor_np_xgetbv(void)``.
_PROCESSOR = """
target triple = "{triple}"
define void @favor_np_cpuid(i64 %leaf, i64 %subleaf, ptr %out) {{
  %a = trunc i64 %leaf to i32
  %c = trunc i64 %subleaf to i32
  %found = call {{ i32, i32, i32, i32 }} asm sideeffect "cpuid",
    "={{ax}},={{bx}},={{cx}},={{dx}},0,2"(i32 %a, i32 %c)
  %r0 = extractvalue {{ i32, i32, i32, i32 }} %found, 0
  %r1 = extractvalue {{ i32, i32, i32, i32 }} %found, 1
  %r2 = extractvalue {{ i32, i32, i32, i32 }} %found, 2
  %r3 = extractvalue {{ i32, i32, i32, i32 }} %found, 3
  %p1 = getelementptr i32, ptr %out, i64 1
  %p2 = getelementptr i32, ptr %out, i64 2
  %p3 = getelementptr i32, ptr %out, i64 3
  store i32 %r0, ptr %out
  store i32 %r1, ptr %p1
  store i32 %r2, ptr %p2
  store i32 %r3, ptr %p3
  ret void
}}
define i64 @favor_np_xgetbv() {{
  %found = call {{ i32, i32 }} asm sideeffect "xgetbv", "={{ax}},={{dx}},{{cx}}"(i32 0)
  %low = extractvalue {{ i32, i32 }} %found, 0
  %mask = zext i32 %low to i64
  ret i64 %mask
}}
"""


def compile_processor(folder: Path) -> list[str]:
    """Write the object code of what asks the processor; return its symbols."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_PROCESSOR.format(triple=llvm.get_process_triple()))
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(cpu="x86-64", reloc="pic", codemodel="default")
    (folder / "processor.o").write_bytes(machine.emit_object(module))
    return ["favor_np_cpuid", "favor_np_xgetbv"]


def compile_library(folder: Path, name: str) -> list[str]:
    """Write the object code of a library for the target of this process; return its symbols."""
    from favor_np.cpu.code import every_kernel

    kernels = [kernel for kernel in every_kernel() if kernel.library == name]
    for number, kernel in enumerate(kernels, 1):
        print(f"{name}: {number} of {len(kernels)}, {kernel.symbol}", flush=True)
        (folder / f"{kernel.symbol}.o").write_bytes(kernel.compile())
    return [kernel.symbol for kernel in kernels]


def link(objects: list[Path], symbols: list[str], target: Path) -> None:
    """Link a shared library that needs nothing but what every Python process has loaded."""
    compiler = os.environ.get("CC", "clang" if sys.platform == "win32" else "cc").split()
    options = {
        "linux": ["-shared", "-nostdlib", "-s", "-Wl,--gc-sections", "-Wl,-z,noexecstack"],
        "darwin": ["-dynamiclib", "-Wl,-x"],
        "win32": ["-shared", *(f"-Wl,/EXPORT:{symbol}" for symbol in symbols)],
    }[sys.platform]
    subprocess.run([*compiler, *options, "-o", str(target), *map(str, objects)], check=True)


def build(folder: Path) -> dict[str, Any]:
    """Build all libraries and their manifest in a folder; return the manifest."""
    from favor_np.cpu.sources import SOURCES

    folder.mkdir(parents=True, exist_ok=True)
    libraries: dict[str, Any] = {}
    names = [*(["processor"] if _X86 else []), *LIBRARIES]
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            if name == "processor":
                symbols = compile_processor(Path(work))
            else:
                symbols = _in_a_process(name, Path(work))
            target = folder / f"{name}.{_SUFFIX}"
            link(sorted(Path(work).glob("*.o")), symbols, target)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        libraries[name] = {"file": target.name, "sha256": digest}
    manifest = {"sources": SOURCES, "libraries": libraries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _in_a_process(name: str, work: Path) -> list[str]:
    """Compile for another target, which a process has only one of."""
    cpu, features = LIBRARIES[name]
    environ = {**os.environ, "FAVOR_NP_PREBUILT": "0", "PYTHONPATH": str(ROOT)}
    environ.pop("NUMBA_CPU_FEATURES", None)
    if cpu:
        environ |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, __file__, "--library", name, str(work)]
    subprocess.run(command, check=True, env=environ)
    return sorted(path.stem for path in work.glob("*.o"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=str(ROOT / "favor_np/cpu/libraries"))
    parser.add_argument("--library", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.library:
        compile_library(Path(args.folder), args.library)
        return
    manifest = build(Path(args.folder))
    sizes = {name: (Path(args.folder) / entry["file"]).stat().st_size
             for name, entry in manifest["libraries"].items()}  # fmt: skip
    for name, size in sizes.items():
        print(f"{name:16}{size / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()
