#!/usr/bin/env bash
# OpenVINO 2026.4.1, onnx 1.23.2, numpy 2.4.6
#
# A model of float64 takes and gives float64, and is computed in float32: the result has the type
# float64 and seven digits.  The hint INFERENCE_PRECISION_HINT cannot ask for more: f64 is refused.
#
# Seen (a cumulative sum of 1, 2**-30 and zeros, from which 1 is taken):
#   OpenVINO: float64 0.0
#   NumPy: float64 9.313225746154785e-10
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6

v/bin/python - <<'PYTHON'
import numpy as np
import openvino
from onnx import TensorProto, helper, numpy_helper

x = np.array([1, 2.0**-30, 0, 0])
ends = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, [4]) for name in "xy"]
constants = [numpy_helper.from_array(np.array(0, np.int64), "axis")]
constants += [numpy_helper.from_array(np.array(1.0), "one")]
nodes = [helper.make_node("CumSum", ["x", "axis"], ["sums"])]
nodes += [helper.make_node("Sub", ["sums", "one"], ["y"])]
graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
core = openvino.Core()
read = core.read_model(model.SerializeToString(), b"")
found = core.compile_model(read, "CPU")({"x": x})[0]
exact = np.cumsum(x) - 1
print("OpenVINO:", found.dtype, found[-1])
print("NumPy:", exact.dtype, exact[-1])
assert found.dtype == np.float64
assert found[-1] == 0
assert exact[-1] == 2.0**-30
PYTHON
