"""Digests of many calls of the public interface, to see whether a change changes any bit.

    python tools/digest.py > before.txt
    python tools/digest.py --check before.txt

One line a call: its name, two spaces, and the first 16 digits of the SHA-256 of the dtypes, shapes
and bytes of all that it returned.  With ``--check`` the lines are compared with those of an earlier
file instead; what changed, is missing or is new is printed, and the exit status is then 1.

Bits depend on the processor, its instruction set, and the versions of NumPy, SciPy and Numba: a file
is for comparing two commits on one machine, in one environment, which its first lines tell.  NaN
counts as NaN, whatever its bits are.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import ml_dtypes
import numba
import numpy as np
import scipy
from calls import attention, objects, prices
from threadpoolctl import threadpool_limits

FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
PARTS = {
    "favor": attention.favor,
    "exact": attention.exact,
    "maps": objects.maps,
    "states": objects.states,
    "studies": objects.studies,
    "forecast": prices.forecasts,
    "interop": prices.bridges,
}


def feed(sha: Any, value: Any) -> None:
    """Add a result, or a nest of results, to a digest."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (tuple, list)):
        sha.update(f"({len(value)}".encode())
        for part in value:
            feed(sha, part)
    elif isinstance(value, float):
        sha.update(value.hex().encode())
    elif value is None or isinstance(value, (int, str, bytes)):
        sha.update(repr(value).encode())
    else:
        array = np.array(value, order="C")
        if array.dtype in FLOATS:
            array[np.isnan(array)] = np.nan
        sha.update(f"{array.dtype.name}{array.shape}".encode() + array.tobytes())


def digests() -> Iterator[tuple[str, str]]:
    """Make all calls; one that fails has the name of the error for a digest."""
    every = ((part, *case) for part, cases in PARTS.items() for case in cases())
    # calibration multiplies by BLAS, whose sums depend on its threads
    with threadpool_limits(1, "blas"), np.errstate(all="ignore"):
        for part, name, call in every:
            name, sha = f"{part}: {name}", hashlib.sha256()
            try:
                feed(sha, call())
                yield name, sha.hexdigest()[:16]
            except Exception as error:  # noqa: BLE001  # what is refused has a line, too
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                yield name, f"raises {type(error).__name__}"


def machine() -> str:
    """Say in one line what bits depend on."""
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (np, scipy, numba))
    found = llvm.get_host_cpu_features()
    isa = [f for f in ("avx2", "avx512f", "avx512bf16", "amx-bf16", "neon") if found.get(f)]
    return f"# on {llvm.get_host_cpu_name()} with {' '.join(isa)}, {versions}"


def commit() -> str:
    """Return the commit that is checked out."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def check(path: Path) -> int:
    """Print what is not as in an earlier file; 1 if there is anything."""
    lines = path.read_text().splitlines()
    earlier = dict(line.rsplit("  ", 1) for line in lines if not line.startswith("#"))
    if machine() not in lines:
        print(f"{path} was written elsewhere: bits may differ.  Here: {machine()}", file=sys.stderr)
    found = dict(digests())
    differ = [name for name in earlier | found if earlier.get(name) != found.get(name)]
    for name in differ:
        what = "missing" if name not in found else "changed" if name in earlier else "new"
        print(f"{what}: {name}")
    print(f"{len(found)} calls, {len(differ)} differ from {path}")
    return bool(differ)


def main() -> int:
    """Write digests, or compare them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", metavar="FILE", type=Path, help="compare with this file instead")
    earlier = parser.parse_args().check
    if earlier is not None:
        return check(earlier)
    print(
        f"# Digests of favor_np at {commit()}, by tools/digest.py: for this machine alone\n{machine()}"
    )
    names = set()
    for name, digest in digests():
        assert name not in names, name
        names.add(name)
        print(f"{name}  {digest}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
