#!/usr/bin/env bash
# ml_dtypes 0.7.0, numpy 2.4.6
#
# A float32 that is too large for bfloat16 becomes infinity, and one that is too large for float8_e4m3fn
# becomes NaN, without a warning, whatever np.errstate says. Only float64 beyond float32 is noticed. float16,
# NumPy's own, always is; and float to int4 is since 0.7.0, where 0.6.0 kept the last four bits.
#
# Seen under np.errstate(all="raise"):
#   float32 3.4e+38 to bfloat16: inf
#   float64 3.4e+38 to bfloat16: inf
#   float64 1e+39 to bfloat16: overflow encountered in cast
#   float32 1e+06 to float8_e4m3fn: nan
#   float32 1e+06 to float16: overflow encountered in cast
#   float32 17 to int4: invalid value encountered in cast
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check ml_dtypes==0.7.0 numpy==2.4.6

v/bin/python - <<'PYTHON'
import ml_dtypes
import numpy as np

OVERFLOW, INVALID = (f"{what} encountered in cast" for what in ("overflow", "invalid value"))
for value, dtype, expected in (
    (np.float32(3.4e38), ml_dtypes.bfloat16, "inf"),
    (np.float64(3.4e38), ml_dtypes.bfloat16, "inf"),
    (np.float64(1e39), ml_dtypes.bfloat16, OVERFLOW),
    (np.float32(1e6), ml_dtypes.float8_e4m3fn, "nan"),
    (np.float32(1e6), np.float16, OVERFLOW),
    (np.float32(17), ml_dtypes.int4, INVALID),
):
    try:
        with np.errstate(all="raise"):
            seen = str(np.array([value]).astype(dtype)[0])
    except FloatingPointError as error:
        seen = str(error)
    print(f"{value.dtype} {value:g} to {np.dtype(dtype)}: {seen}")
    assert seen == expected
PYTHON
