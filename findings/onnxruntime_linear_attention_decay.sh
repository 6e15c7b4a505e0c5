#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6
#
# The operator LinearAttention of the domain com.microsoft ignores its input `decay` with
# update_rule="linear", without an error or a warning. That of the standard (opset 27) refuses the
# same graph, and onnx's checker, which does not know the other domain, accepts it.
#
# Seen (all queries, keys and values are 1; the log of the decay is 0, then -1):
#   com.microsoft gated: [1.0, 2.0, 3.0] [1.0, 1.3678793907165527, 1.503214716911316]
#   com.microsoft linear: [1.0, 2.0, 3.0] [1.0, 2.0, 3.0]
#   standard gated: [1.0, 2.0, 3.0] [1.0, 1.3678793907165527, 1.503214716911316]
#   standard linear: update_rule 'linear' forbids decay input
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

NAMES = ["q", "k", "v", "state", "decay"]


def run(rule, domain):
    options = {"q_num_heads": 1, "kv_num_heads": 1, "update_rule": rule, "scale": 1.0}
    node = helper.make_node("LinearAttention", NAMES, ["out", "after"], domain=domain, **options)
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * (4 if n in ("state", "after") else 3))
        for n in (*NAMES, "out", "after")
    ]
    opsets = [helper.make_opsetid("", 27)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([node], "graph", ends[:5], ends[5:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=13)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.shape_inference.InferenceError as error:
        return str(error).rpartition("] ")[2].strip()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    one = np.ones((1, 3, 1), np.float32)
    inputs = {"q": one, "k": one, "v": one, "state": np.zeros((1, 1, 1, 1), np.float32)}
    return [session.run(["out"], inputs | {"decay": g * one})[0].ravel().tolist() for g in (np.float32(0), np.float32(-1))]


seen = {}
for domain in ("com.microsoft", ""):
    for rule in ("gated", "linear"):
        result = seen[domain, rule] = run(rule, domain)
        print(f"{domain or 'standard'} {rule}:", result if isinstance(result, str) else f"{result[0]} {result[1]}")
assert seen["com.microsoft", "gated"][0] != seen["com.microsoft", "gated"][1]
assert seen["com.microsoft", "linear"][0] == seen["com.microsoft", "linear"][1]
assert "forbids decay" in seen["", "linear"]
PYTHON
