#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6
#
# A valid model of opset 12 to 15 whose Scan's body has the operator LessOrEqual loads, and fails when it
# runs, as the shape of what the body returns is not known. With Not(Greater), which is the same, or with
# opset 16, it runs.
#
# Seen:
#   opset 15 Not(Greater): [1.0, 0.0, 1.0]
#   opset 15 LessOrEqual: Subgraph must have the shape set for all outputs but y did not.
#   opset 16 LessOrEqual: [1.0, 0.0, 1.0]
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
from onnx import TensorProto, helper, numpy_helper

ort.set_default_logger_severity(4)
NODES = {
    "Not(Greater)": [("Greater", ["x", "zero"], "g"), ("Not", ["g"], "b")],
    "LessOrEqual": [("LessOrEqual", ["x", "zero"], "b")],
}


def end(name, shape=None):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def run(opset, operators):
    nodes = [helper.make_node(name, ins, [out]) for name, ins, out in NODES[operators]]
    nodes.append(helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT))
    zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")
    body = helper.make_graph(nodes, "body", [end("x")], [end("y")], [zero])
    scan = helper.make_node("Scan", ["rows"], ["out"], body=body, num_scan_inputs=1)
    graph = helper.make_graph([scan], "graph", [end("rows", ["n", 1])], [end("out", ["n", 1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = np.array([[-1], [1], [0]], np.float32)
    try:
        return session.run(None, {"rows": rows})[0].ravel().tolist()
    except Exception as error:
        return str(error).rpartition("Message: ")[2].strip()


seen = {}
for case in ((15, "Not(Greater)"), (15, "LessOrEqual"), (16, "LessOrEqual")):
    seen[case] = run(*case)
    print(f"opset {case[0]} {case[1]}:", seen[case])
assert seen[15, "Not(Greater)"] == seen[16, "LessOrEqual"] == [1, 0, 1]
assert "must have the shape set" in seen[15, "LessOrEqual"]
PYTHON
