"""ONNX models in other runtimes than onnxruntime: nox -s onnx installs them, and old versions of it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import bridges, child
from support.tolerance import relative_rms

onnx = bridges.require("onnx")

import favor_np
from favor_np.interop.onnx import export_attention, to_onnx_state

HEADS, DIM, FEATURES = 2, 16, 64
EXAMPLE = Path(__file__).parents[2] / "docs/examples/attention.mjs"
#: A folder in which npm has installed onnxruntime-web.
NODE = os.environ.get("FAVOR_NP_TEST_NODE")


def flat(x):
    return x.swapaxes(0, 1).reshape(1, x.shape[1], -1)


def tokens(fm, length, std, **options):
    rng = np.random.default_rng(0)
    q, k, v = (s * rng.standard_normal((HEADS, length, DIM), np.float32) for s in (std, std, 1))
    exact = (x.astype(np.float64) for x in (q, k, v))
    out = favor_np.favor_attention(*exact, fm, **options)
    return {name: flat(x) for name, x in (("q", q), ("k", k), ("v", v), ("out", out))}


@pytest.mark.parametrize("options", [{}, {"decay": 0.99}, {"causal": False}], ids=str)
@pytest.mark.parametrize("kind", ["positive", "relu"])
def test_openvino(kind, options):
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    fm = favor_np.feature_map(kind, DIM, FEATURES)
    model = export_attention(fm, heads=HEADS, value_dim=DIM, **options)
    core = openvino.Core()
    read = core.read_model(model.SerializeToString(), b"")
    run = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    state = favor_np.AttentionState.zeros(fm, DIM, (1, HEADS), decay=options.get("decay"))
    for length, std in ((1, 1), (150, 1), (300, 8)):
        arrays = tokens(fm, length, std, **{"causal": True} | options)
        want = arrays.pop("out")
        out = run({**arrays, **to_onnx_state(state)})[run.output("out")]
        assert relative_rms(out, want) <= 3e-6


@pytest.mark.skipif(not NODE, reason="FAVOR_NP_TEST_NODE names no folder with onnxruntime-web")
@pytest.mark.parametrize("form", ["chunk", "gated"])
def test_the_example_in_javascript(form, tmp_path):
    fm = favor_np.feature_map("positive", DIM, FEATURES)
    model = export_attention(fm, heads=HEADS, value_dim=DIM, form=form)
    onnx.save(model, tmp_path / "attention.onnx")
    facts = {"heads": HEADS, "features": FEATURES, "valueDim": DIM, "length": 80, "prompt": 70}
    arrays = {name: x.ravel().tolist() for name, x in tokens(fm, 80, 1, causal=True).items()}
    (tmp_path / "tokens.json").write_text(json.dumps(facts | arrays))
    (tmp_path / "node_modules").symlink_to(Path(NODE, "node_modules").absolute())
    shutil.copy(EXAMPLE, tmp_path)
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": child.HANG}
    done = subprocess.run(["node", EXAMPLE.name], check=False, **options)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"favor_np (\S+)", done.stdout).group(1)) < 1e-5
