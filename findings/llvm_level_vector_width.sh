#!/usr/bin/env bash
# numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6 (on x86-64; no AVX-512 is needed, nothing is run)
#
# LLVM's loop vectoriser takes vectors of half the width for the level x86-64-v4 as for a Zen 4 processor, which is
# of that level: 256 bits, by default.  So a sum whose additions may be reordered (fastmath "reassoc") is made of
# other partial sums, and has other bits, once code is compiled for the level.  "-prefer-256-bit" undoes it.
#
# Seen (the widest registers in the assembly of a sum of float32):
#   znver4: zmm
#   x86-64-v4: ymm
#   x86-64-v4 -prefer-256-bit: zmm
set -euo pipefail

case $(uname -m) in x86_64 | amd64) ;; *) echo "for x86-64" >&2; exit 1 ;; esac
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6

cat >widest.py <<'PYTHON'
import numba
from numba import float32, types


def total(x):
    y = x.dtype.type(0)
    for i in range(x.size):
        y += x[i]
    return y


kind = types.Array(float32, 1, "C")
compiled = numba.njit(float32(kind), fastmath={"reassoc", "nsz"})(total)
assembly = compiled.inspect_asm(compiled.signatures[0])
print(next(name for name in ("zmm", "ymm", "xmm") if f"%{name}" in assembly))
PYTHON
see() {
  local found
  found=$(NUMBA_CPU_NAME=$1 NUMBA_CPU_FEATURES=$2 v/bin/python widest.py)
  echo "$1${2:+ $2}: $found"
  [ "$found" = "$3" ]
}
see znver4 "" zmm
see x86-64-v4 "" ymm
see x86-64-v4 -prefer-256-bit zmm
