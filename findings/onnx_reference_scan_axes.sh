#!/usr/bin/env bash
# onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6
#
# onnx's ReferenceEvaluator refuses a Scan over another axis than the first, which the standard
# allows and onnx's checker accepts. onnxruntime runs the same model.
#
# Seen (a running sum over the second axis of [[1, 2, 3]]):
#   onnxruntime: [[1.0, 3.0, 6.0]]
#   ReferenceEvaluator: RuntimeError Scan is not implemented for other input axes than 0.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

v/bin/python - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


body = helper.make_graph(
    [
        helper.make_node("Add", ["sum", "item"], ["after"]),
        helper.make_node("Identity", ["after"], ["shown"]),
    ],
    "body",
    [value("sum", 1), value("item", 1)],
    [value("after", 1), value("shown", 1)],
)
axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
scan = helper.make_node("Scan", ["zero", "x"], ["total", "sums"], body=body, num_scan_inputs=1, **axes)
graph = helper.make_graph([scan], "graph", [value("zero", 1), value("x", 1, 3)], [value("sums", 1, 3)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
inputs = {"zero": np.zeros(1, np.float32), "x": np.array([[1, 2, 3]], np.float32)}

session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
result = session.run(None, inputs)[0].tolist()
print("onnxruntime:", result)
assert result == [[1.0, 3.0, 6.0]]
try:
    result = ReferenceEvaluator(model).run(None, inputs)
except RuntimeError as error:
    print("ReferenceEvaluator: RuntimeError", error)
else:
    raise AssertionError(f"it runs: {result}")
PYTHON
