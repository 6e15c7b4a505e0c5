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
from favor_np import nn
from favor_np.forecast import PerformerForecaster
from favor_np.interop.onnx import empty_state, export_attention, export_model, to_onnx_state

HEADS, DIM, FEATURES = 2, 16, 64
EXAMPLES = Path(__file__).parents[2] / "docs/examples"
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


def language_model(**options):
    """A language model of bytes, with parameters that say something."""
    sizes = {"vocab": 256, "dim": 16, "depth": 2, "heads": 2, "num_features": 32}
    model = nn.PerformerLM(**sizes | options)
    rng = np.random.default_rng(0)
    params = model.init(rng)
    for name, array in nn.leaves(params):
        if not name.endswith("projection"):
            array += 0.3 * rng.standard_normal(array.shape).astype(np.float32)
    return model, params


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "FE", "decay": 0.99, "local_heads": 1},
        {"norm": "layer", "activation": "swiglu", "kv_heads": 1},
    ],
    ids=str,
)
def test_openvino_runs_language_models(options):
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    model, params = language_model(**options)
    exported = export_model(model, params)
    core = openvino.Core()
    read = core.read_model(exported.SerializeToString(), b"")
    run = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    text = np.random.default_rng(1).integers(0, 256, (1, 80))
    want = model.apply(nn.astype(params, np.float64), text)
    names = [x.name for x in exported.graph.output]
    outs, state = [], empty_state(exported)
    for part in (slice(0, 70), *(slice(i, i + 1) for i in range(70, 80))):
        found = run({"tokens": text[:, part], **state})
        outs.append(found[run.output("logits")])
        state = {n.replace("present", "past"): found[run.output(n)].copy() for n in names[1:]}
    assert relative_rms(np.concatenate(outs, 1), want) <= 3e-6


def forecaster():
    """A forecaster whose Performers say something, and rows to forecast from."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((600, 2)) * np.exp(np.sin(np.arange(600) / 60))[:, None]
    made = PerformerForecaster(epochs=1, members=1).fit(rows)
    for name, array in nn.leaves(made.params_):
        if not name.endswith("projection"):
            array += 0.1 * rng.standard_normal(array.shape).astype(np.float32)
    return made, rows


def test_openvino_runs_forecasters():
    """In float32, whatever the graph says."""
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    made, rows = forecaster()
    core = openvino.Core()
    read = core.read_model(export_model(made).SerializeToString(), b"")
    run = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = run({"x": rows[None].astype(np.float32)})[run.output("variance")][0, :, 0]
    assert relative_rms(found, made.predict(rows)) <= 3e-6


def node(example, folder, *arguments):
    """What an example prints, in a folder that has its files."""
    (folder / "node_modules").symlink_to(Path(NODE, "node_modules").absolute())
    shutil.copy(EXAMPLES / example, folder)
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": child.HANG}
    done = subprocess.run(["node", example, *arguments], check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_node = pytest.mark.skipif(
    not NODE, reason="FAVOR_NP_TEST_NODE names no folder with onnxruntime-web"
)


@needs_node
@pytest.mark.parametrize("form", ["chunk", "gated"])
def test_attention_in_javascript(form, tmp_path):
    fm = favor_np.feature_map("positive", DIM, FEATURES)
    model = export_attention(fm, heads=HEADS, value_dim=DIM, form=form)
    onnx.save(model, tmp_path / "attention.onnx")
    facts = {"heads": HEADS, "features": FEATURES, "valueDim": DIM, "length": 80, "prompt": 70}
    arrays = {name: x.ravel().tolist() for name, x in tokens(fm, 80, 1, causal=True).items()}
    (tmp_path / "tokens.json").write_text(json.dumps(facts | arrays))
    said = node("attention.mjs", tmp_path)
    assert float(re.search(r"favor_np (\S+)", said).group(1)) < 1e-5


@needs_node
@pytest.mark.parametrize("form", ["chunk", "gated"])
def test_a_forecaster_in_javascript(form, tmp_path):
    made, rows = forecaster()
    onnx.save(export_model(made, form=form), tmp_path / "forecaster.onnx")
    (tmp_path / "rows.json").write_text(json.dumps(rows.tolist()))
    said = re.findall(r"-?\d+\.\d+", node("forecast.mjs", tmp_path))
    wanted = [np.sqrt(made.predict(rows)[-1]), *made.predict_interval(rows)[-1]]
    assert np.allclose(np.array(said, float), wanted, rtol=1e-5)


@needs_node
@pytest.mark.parametrize("options", [{}, {"layers": "FE", "local_heads": 1}], ids=str)
@pytest.mark.parametrize("form", ["chunk", "gated"])
def test_a_language_model_in_javascript(form, options, tmp_path):
    """The bytes are those that favor_np generates."""
    model, params = language_model(**options)
    onnx.save(export_model(model, params, form=form), tmp_path / "model.onnx")
    said = node("generate.mjs", tmp_path, "to be or not")
    new = bytes(model.generate(params, b"to be or not", 40, temperature=0))
    assert said == (b"to be or not" + new).decode(errors="replace") + "\n"
