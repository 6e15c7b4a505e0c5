#!/usr/bin/env bash
# numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6 (on a little-endian machine)
#
# A compiled function refuses a big-endian array of numbers, but takes one of timedelta64 or datetime64 and
# reads its bytes as native: other values, without an error.
#
# Seen (the first value of the array is 1):
#   >f8: TypingError
#   >i8: TypingError
#   >m8[s]: 72057594037927936, NumPy 1
#   >M8[s]: 72057594037927936, NumPy 1
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6

v/bin/python - <<'PYTHON'
import sys

import numba
import numpy as np

assert sys.byteorder == "little"


@numba.njit
def first(array):
    return array[0]


for dtype in (">f8", ">i8"):
    try:
        result = first(np.array([1, 2], dtype=dtype))
    except numba.TypingError as error:
        assert "Unsupported array dtype: " + dtype in str(error)
        print(f"{dtype}: TypingError")
    else:
        raise AssertionError(f"{dtype} gives {result}")
for dtype in (">m8[s]", ">M8[s]"):
    array = np.array([1, 2], dtype="i8").astype(dtype)
    compiled, by_numpy = int(first(array).astype("i8")), int(array[0].astype("i8"))
    print(f"{dtype}: {compiled}, NumPy {by_numpy}")
    assert (compiled, by_numpy) == (1 << 56, 1)
PYTHON
