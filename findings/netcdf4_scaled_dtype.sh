#!/usr/bin/env bash
# netCDF4 1.7.5.1.post1, numpy 2.4.6
#
# A variable's .dtype is the dtype in the file, not that of the array that reading gives. With a
# scale_factor, the type of the attribute decides: np.float32 gives float32, a Python float float64.
#
# Seen (.dtype, what v[:] gives, what v[:] gives after set_auto_scale(False)):
#   scale_factor float32: int16 float32 int16
#   scale_factor float: int16 float64 int16
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check netCDF4==1.7.5.1.post1 numpy==2.4.6

v/bin/python - <<'PYTHON'
import netCDF4
import numpy as np

with netCDF4.Dataset("a.nc", "w") as file:
    file.createDimension("x", 3)
    for factor, expected in ((np.float32(0.5), "float32"), (0.5, "float64")):
        kind = type(factor).__name__
        variable = file.createVariable("v_" + kind, "i2", ("x",))
        variable.scale_factor = factor
        variable[:] = [1, 2, 3]
        scaled = variable[:]
        variable.set_auto_scale(False)
        seen = [str(variable.dtype), str(scaled.dtype), str(variable[:].dtype)]
        print(f"scale_factor {kind}:", *seen)
        assert scaled.tolist() == [1, 2, 3] and seen == ["int16", expected, "int16"]
PYTHON
