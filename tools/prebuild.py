"""Compile the kernels for every level of this platform, into shared libraries beside the package.

    python tools/prebuild.py [FOLDER] [--only LIBRARY ...]

It needs Numba and a C compiler that links, and takes some minutes.  A wheel gets the libraries by
``FAVOR_NP_PREBUILD=1 python -m build --wheel`` (or ``=here``: for this processor alone); in a checkout they lie in favor_np/cpu/libraries,
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
X86 = platform.machine().lower() in ("x86_64", "amd64")
SUFFIX = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
#: The libraries: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES of each.
LIBRARIES = {"aarch64": ("", "")}
if X86:
    LIBRARIES = {
        "x86-64-v3": ("x86-64-v3", ""),
        "x86-64-v4": ("x86-64-v4", ""),
        "x86-64-v4-dots": ("x86-64-v4", "+avx512bf16"),
    }
    if sys.platform == "linux":
        LIBRARIES["x86-64-v4-amx"] = ("x86-64-v4", "+avx512bf16,+amx-tile,+amx-bf16")

#: What asks a processor what it can do.
_PROCESSOR = """
#include <cpuid.h>
#include <stdint.h>

void favor_np_cpuid(int64_t leaf, int64_t subleaf, uint32_t *r) {
  __cpuid_count((uint32_t)leaf, (uint32_t)subleaf, r[0], r[1], r[2], r[3]);
}

int64_t favor_np_xgetbv(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}
"""


def compile_processor(folder: Path) -> list[str]:
    """Write the object code of what asks the processor; return its symbols."""
    source = folder / "processor.c"
    source.write_text(_PROCESSOR)
    options = ["-O1", "-c"] if sys.platform == "win32" else ["-O1", "-fPIC", "-c"]
    command = [*compiler(), *options, str(source), "-o", str(source.with_suffix(".o"))]
    subprocess.run(command, check=True)
    return ["favor_np_cpuid", "favor_np_xgetbv"]


def compiler() -> list[str]:
    """Return the command of the C compiler."""
    return os.environ.get("CC", "clang" if sys.platform == "win32" else "cc").split()


def compile_library(folder: Path, name: str) -> list[str]:
    """Write the object code of a library for the target of this process; return its symbols."""
    from favor_np.cpu.code import every_kernel

    kernels = [kernel for kernel in every_kernel() if kernel.library == name]
    for number, kernel in enumerate(kernels, 1):
        print(f"{name}: {number} of {len(kernels)}, {kernel.symbol}", flush=True)
        (folder / f"{kernel.symbol}.o").write_bytes(kernel.object_code())
    return [kernel.symbol for kernel in kernels]


def link(work: Path, symbols: list[str], target: Path) -> dict[str, str]:
    """Link a shared library that needs nothing but what every Python process has loaded.

    Return what the manifest says of it.
    """
    options = {
        "linux": ["-shared", "-nostdlib", "-s", "-Wl,--gc-sections", "-Wl,-z,noexecstack"],
        "darwin": ["-dynamiclib", "-Wl,-x"],
        "win32": ["-shared", *(f"-Wl,/EXPORT:{symbol}" for symbol in symbols)],
    }[sys.platform]
    objects = map(str, sorted(work.glob("*.o")))
    subprocess.run([*compiler(), *options, "-o", str(target), *objects], check=True)
    return {"file": target.name, "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}


def build(folder: Path, wanted: list[str]) -> dict[str, Any]:
    """Build libraries and their manifest in a folder; return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries: dict[str, Any] = {}
    names = [*(["processor"] if X86 else []), *wanted]
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            if name == "processor":
                symbols = compile_processor(Path(work))
            else:
                symbols = _in_a_process(name, Path(work))
            libraries[name] = link(Path(work), symbols, folder / f"{name}.{SUFFIX}")
    return write_manifest(folder, libraries)


def write_manifest(folder: Path, libraries: dict[str, Any]) -> dict[str, Any]:
    """Write and return what is said of these libraries."""
    from favor_np.cpu.sources import SOURCES

    manifest = {"sources": SOURCES, "libraries": libraries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _in_a_process(name: str, work: Path) -> list[str]:
    """Compile for another target, which a process has only one of."""
    cpu, features = LIBRARIES[name]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "FAVOR_NP_PREBUILT": "0", "PYTHONPATH": path}
    environ.pop("NUMBA_CPU_FEATURES", None)
    if cpu:
        environ |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, __file__, "--library", name, str(work)]
    subprocess.run(command, check=True, env=environ)
    return sorted(path.stem for path in work.glob("*.o"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=str(ROOT / "favor_np/cpu/libraries"))
    parser.add_argument("--only", nargs="+", choices=("here", *LIBRARIES),
                        help="these libraries alone; here: those for this processor")  # fmt: skip
    parser.add_argument("--library", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    if args.library:
        compile_library(Path(args.folder), args.library)
        return
    wanted = args.only or list(LIBRARIES)
    if "here" in wanted:
        from favor_np.cpu.code import useful_kernels

        wanted = sorted({kernel.library for kernel in useful_kernels()})
    manifest = build(Path(args.folder), wanted)
    sizes = {name: (Path(args.folder) / entry["file"]).stat().st_size
             for name, entry in manifest["libraries"].items()}  # fmt: skip
    for name, size in sizes.items():
        print(f"{name:16}{size / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()
