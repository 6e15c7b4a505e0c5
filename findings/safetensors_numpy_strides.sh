#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4.6
#
# safetensors.numpy.save and save_file take an array that is not C-contiguous without a word and store
# the bytes as they lie in memory under the array's shape: what is loaded has the right shape and dtype
# and other values. np.ascontiguousarray before saving is what works. (A big-endian array comes back
# right.)
#
# Seen (values, then what is loaded):
#   transposed: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] -> [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   every other value: [0.0, 2.0, 4.0] -> [0.0, 1.0, 2.0]
#   transposed, made contiguous: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] -> [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#   big-endian: [0.0, 1.0, 2.0] -> [0.0, 1.0, 2.0]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

v/bin/python - <<'PYTHON'
import warnings

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

warnings.simplefilter("error")
transposed = np.arange(6.0).reshape(2, 3).T
for text, array, expected in (
    ("transposed", transposed, [[0, 1], [2, 3], [4, 5]]),
    ("every other value", np.arange(6.0)[::2], [0, 1, 2]),
    ("transposed, made contiguous", np.ascontiguousarray(transposed), transposed.tolist()),
    ("big-endian", np.arange(3, dtype=">f4"), [0, 1, 2]),
):
    loaded = load(save({"x": array}))["x"]
    save_file({"x": array}, "x.safetensors")
    assert load_file("x.safetensors")["x"].tolist() == loaded.tolist()
    print(f"{text}: {array.tolist()} -> {loaded.tolist()}")
    assert loaded.shape == array.shape and loaded.tolist() == expected
PYTHON
