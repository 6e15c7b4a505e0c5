#!/usr/bin/env bash
# tensorstore 0.1.86, numpy 2.4.6, ml_dtypes 0.6.0
#
# The dtype of a store is not a NumPy dtype and NumPy cannot make one of it, though the two compare
# equal. store.dtype.numpy_dtype is the NumPy dtype.
#
# Seen:
#   store.dtype == np.float32: True
#   np.dtype(store.dtype): TypeError: Cannot interpret 'dtype("float32")' as a data type
#   np.issubdtype(store.dtype, np.floating): TypeError: Cannot interpret 'dtype("float32")' as a data type
#   store.dtype.numpy_dtype: float32
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check tensorstore==0.1.86 numpy==2.4.6 ml_dtypes==0.6.0

v/bin/python - <<'PYTHON'
import numpy as np
import tensorstore as ts

spec = {"driver": "zarr", "kvstore": {"driver": "memory"}}
store = ts.open(spec, dtype=ts.float32, shape=[3], create=True).result()


def fails(text, call):
    try:
        result = call()
    except TypeError as error:
        print(f"{text}: TypeError: {error}")
    else:
        raise AssertionError(f"{text} gives {result!r}")


print("store.dtype == np.float32:", store.dtype == np.float32)
assert store.dtype == np.float32
fails("np.dtype(store.dtype)", lambda: np.dtype(store.dtype))
fails("np.issubdtype(store.dtype, np.floating)", lambda: np.issubdtype(store.dtype, np.floating))
print("store.dtype.numpy_dtype:", store.dtype.numpy_dtype)
assert store.dtype.numpy_dtype == np.dtype("float32")
PYTHON
