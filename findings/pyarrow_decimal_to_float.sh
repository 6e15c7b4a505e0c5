#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 2.4.6
#
# A cast from decimal128 to float64 does not always give the nearest double. A cast to string and from
# there to float64 does. Of all amounts with two digits from 0.00 to 999.99, about one in seven is off.
#
# Seen:
#   102.99: 102.99000000000001, by way of string 102.99
#   0.00 to 999.99: 13929 of 100000 differ from the nearest double, 0 by way of string
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6

v/bin/python - <<'PYTHON'
from decimal import Decimal

import numpy as np
import pyarrow as pa

values = [Decimal(cents) / 100 for cents in range(100_000)]
array = pa.array(values, pa.decimal128(10, 2))
nearest = np.array([float(value) for value in values])
direct = array.cast(pa.float64()).to_numpy()
by_string = array.cast(pa.string()).cast(pa.float64()).to_numpy()

print(f"{values[10299]}: {float(direct[10299])}, by way of string {float(by_string[10299])}")
wrong, wrong_by_string = int((direct != nearest).sum()), int((by_string != nearest).sum())
print(
    f"0.00 to 999.99: {wrong} of {len(values)} differ from the nearest double, "
    f"{wrong_by_string} by way of string"
)
assert direct[10299] == 102.99000000000001 and by_string[10299] == 102.99
assert wrong == 13929 and wrong_by_string == 0
PYTHON
