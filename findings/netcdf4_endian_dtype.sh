#!/usr/bin/env bash
# netCDF4 1.7.5.1.post1, numpy 2.4.6 (on a little-endian machine)
#
# In the session that creates a variable, its dtype is the one that was asked for, not the one that is
# stored. The argument endian= alone decides what is stored; a UserWarning says that the two differ. Only
# after the file is opened again does .dtype tell the byte order. The values are right throughout.
#
# Seen:
#   dtype='f4', endian='big': .dtype <f4, after opening again >f4
#   dtype='>f4', endian='big': .dtype >f4, after opening again >f4
#   dtype='>f4', endian='native': .dtype >f4, after opening again <f4
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check netCDF4==1.7.5.1.post1 numpy==2.4.6

v/bin/python - <<'PYTHON'
import sys
import warnings

import netCDF4

assert sys.byteorder == "little"
warnings.simplefilter("ignore", UserWarning)
CASES = [("f4", "big", "<f4", ">f4"), (">f4", "big", ">f4", ">f4"), (">f4", "native", ">f4", "<f4")]
for number, (dtype, endian, first, then) in enumerate(CASES):
    name = f"{number}.nc"
    with netCDF4.Dataset(name, "w") as file:
        file.createDimension("x", 3)
        variable = file.createVariable("v", dtype, ("x",), endian=endian)
        variable[:] = [1, 2, 3]
        created = variable.dtype.str
    with netCDF4.Dataset(name) as file:
        opened = file["v"].dtype.str
        assert file["v"][:].tolist() == [1, 2, 3]
    print(f"dtype={dtype!r}, endian={endian!r}: .dtype {created}, after opening again {opened}")
    assert (created, opened) == (first, then)
PYTHON
