#!/usr/bin/env bash
# ml_dtypes 0.6.0, numpy 2.4.6
#
# Code that takes the "small floats" of ml_dtypes by their kind, or by np.can_cast to float32, takes its
# integers too: int4 and uint4 look like bfloat16 and are no np.integer. ml_dtypes.finfo tells them apart.
#
# Seen (kind, can be cast to float32, is an np.integer, finfo):
#   bfloat16: V True False 16 bits
#   float8_e4m3fn: V True False 8 bits
#   int4: V True False ValueError
#   uint4: V True False ValueError
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6

v/bin/python - <<'PYTHON'
import ml_dtypes
import numpy as np

for name, expected in (
    ("bfloat16", "16 bits"),
    ("float8_e4m3fn", "8 bits"),
    ("int4", "ValueError"),
    ("uint4", "ValueError"),
):
    dtype = np.dtype(getattr(ml_dtypes, name))
    try:
        finfo = f"{ml_dtypes.finfo(dtype).bits} bits"
    except ValueError:
        finfo = "ValueError"
    seen = [dtype.kind, np.can_cast(dtype, np.float32), np.issubdtype(dtype, np.integer), finfo]
    print(f"{name}:", *seen)
    assert seen == ["V", True, False, expected]
PYTHON
