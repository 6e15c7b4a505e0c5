#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6 (on a little-endian machine)
#
# InferenceSession.run and OrtValue.ortvalue_from_numpy take a big-endian array as if its bytes were
# native: other values, without an error. A float64 array for a float input is refused, and an array
# that is not contiguous is read right.
#
# Seen (the input is [0, 1, 2], the model gives its input back):
#   native: [0.0, 1.0, 2.0]
#   not contiguous: [0.0, 1.0, 2.0]
#   big-endian: [0.0, 4.600602988224807e-41, 8.96831017167883e-44]
#   big-endian OrtValue: [0.0, 4.600602988224807e-41, 8.96831017167883e-44]
#   float64: InvalidArgument
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

v/bin/python - <<'PYTHON'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

assert sys.byteorder == "little"
graph = helper.make_graph(
    [helper.make_node("Identity", ["x"], ["y"])],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
ort.set_default_logger_severity(4)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def show(text, array):
    print(f"{text}: {array.tolist()}")
    return array


native = np.array([0, 1, 2], dtype="<f4")
big = native.astype(">f4")
misread = big.view("<f4")
strided = np.array([0, 9, 1, 9, 2, 9], dtype="<f4")[::2]
assert np.array_equal(show("native", session.run(None, {"x": native})[0]), native)
assert np.array_equal(show("not contiguous", session.run(None, {"x": strided})[0]), native)
assert np.array_equal(show("big-endian", session.run(None, {"x": big})[0]), misread)
value = ort.OrtValue.ortvalue_from_numpy(big).numpy()
assert np.array_equal(show("big-endian OrtValue", value), misread)
try:
    session.run(None, {"x": native.astype("f8")})
except Exception as error:
    print("float64:", type(error).__name__)
    assert type(error).__name__ == "InvalidArgument"
else:
    raise AssertionError("a float64 array is taken")
PYTHON
