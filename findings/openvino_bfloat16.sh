#!/usr/bin/env bash
# OpenVINO 2026.4.1, onnx 1.23.2, numpy 2.4.6; on an x86-64 processor with AVX512_BF16 or AMX
#
# A model of float32 is computed in bfloat16 unless the hint INFERENCE_PRECISION_HINT says f32: the
# results have the type float32 and three digits.
#
# Seen (a product of two 64 x 64 matrices; the largest error, relative to the largest number):
#   as it comes: 2.4e-03
#   with the hint: 2.5e-07
set -euo pipefail

grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo || { echo "this processor has no bfloat16"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6

v/bin/python - <<'PYTHON'
import numpy as np
import openvino
from onnx import TensorProto, helper, numpy_helper

x, w = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 64]) for name in "xy"]
weights = [numpy_helper.from_array(w, "w")]
node = helper.make_node("MatMul", ["x", "w"], ["y"])
graph = helper.make_graph([node], "graph", ends[:1], ends[1:], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
core = openvino.Core()
read = core.read_model(model.SerializeToString(), b"")
exact = x.astype(np.float64) @ w


def error(**hints):
    result = core.compile_model(read, "CPU", hints)({"x": x})[0]
    assert result.dtype == np.float32
    return abs(result - exact).max() / abs(exact).max()


without, told = error(), error(INFERENCE_PRECISION_HINT="f32")
print(f"as it comes: {without:.1e}")
print(f"with the hint: {told:.1e}")
assert without > 1e-4
assert told < 1e-6
PYTHON
