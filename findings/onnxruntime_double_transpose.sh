#!/usr/bin/env bash
# onnxruntime 1.25.1, onnx 1.23.2, numpy 2.4.6
#
# A valid model in float64 whose MatMul has a transposed operand cannot be loaded: an optimization
# makes one operator of the two, which exists in float32 only. Without that optimization the model
# runs. onnxruntime 1.26.0 and later load it.
#
# Seen:
#   FLOAT: runs
#   DOUBLE: NotImplemented ... Failed to find kernel for com.microsoft.FusedMatMul(1) ...
#   DOUBLE without MatmulTransposeFusion: runs
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check onnxruntime==1.25.1 onnx==1.23.2 numpy==2.4.6

v/bin/python - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

ort.set_default_logger_severity(4)


def load(kind, **options):
    nodes = [
        helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "y"], ["z"]),
    ]
    ends = [helper.make_tensor_value_info(name, kind, [None, None]) for name in "xz"]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), providers=providers, **options)
    x = np.arange(6.0).reshape(2, 3).astype("f8" if kind == TensorProto.DOUBLE else "f4")
    assert np.array_equal(session.run(None, {"x": x})[0], x @ x.T)
    return "runs"


print("FLOAT:", load(TensorProto.FLOAT))
try:
    load(TensorProto.DOUBLE)
except Exception as error:
    print("DOUBLE:", type(error).__name__, error)
    assert "FusedMatMul" in str(error)
else:
    raise AssertionError("the model is loaded")
without = {"disabled_optimizers": ["MatmulTransposeFusion"]}
print("DOUBLE without MatmulTransposeFusion:", load(TensorProto.DOUBLE, **without))
PYTHON
