"""Attention as ONNX models: what onnxruntime and onnx's own evaluator make of them."""

import functools

import numpy as np
import pytest
from support import bridges
from support.tolerance import relative_rms

onnx = bridges.require("onnx")
onnxruntime = bridges.require("onnxruntime")

from favor_np import AttentionState, FeatureMap, favor_attention, feature_map
from favor_np.interop.onnx import export_attention, to_onnx_state

DIM, VALUE_DIM, FEATURES = 8, 5, 32
PROMISE = {"float32": 3e-6, "float64": 2e-15}


def data(length, *, batch=2, heads=4, kv_heads=4, std=1.0, seed=0, dtype=np.float32):
    """Queries, keys and values, (batch, heads, length, ...)."""
    rng = np.random.default_rng(seed)
    shapes = (heads, DIM), (kv_heads, DIM), (kv_heads, VALUE_DIM)
    q, k, v = (rng.standard_normal((batch, h, length, n)) for h, n in shapes)
    return tuple((x * s).astype(dtype) for x, s in ((q, std), (k, std), (v, 1)))


def calibrated(method, heads):
    q, k, _ = data(200, heads=4, kv_heads=4, dtype=np.float64, seed=5)
    shift = np.linspace(-1, 1, DIM) * np.arange(1, 5)[:, None, None]
    q, k = q[0] + shift, 0.5 * k[0] - shift
    if not heads:
        q, k = q.reshape(-1, DIM), k.reshape(-1, DIM)
    return feature_map("positive", DIM, FEATURES).calibrate(q, k, method)


@functools.cache
def maps():
    rows = np.random.default_rng(7).standard_normal((4, FEATURES, DIM))
    return {
        "positive": feature_map("positive", DIM, FEATURES, antithetic=False),
        "antithetic": feature_map("positive", DIM, FEATURES),
        "relu": feature_map("relu", DIM, FEATURES),
        "elu": feature_map("elu", DIM, FEATURES),
        "own": FeatureMap.from_projection(rows.astype(np.float32)),
        "own relu": FeatureMap.from_projection(rows.astype(np.float32), "relu"),
        "oprf": calibrated("oprf", False),
        "aderf+sderf": calibrated("aderf+sderf", False),
        "own aderf+sderf": calibrated("aderf+sderf", True),
        "spherical": calibrated("spherical", False),
    }


MAPS = (
    *("positive", "antithetic", "relu", "elu", "own", "own relu"),
    *("oprf", "aderf+sderf", "own aderf+sderf", "spherical"),
)
OPTIONS = {
    "plain": {},
    "mask": {"key_mask": True},
    "decay": {"decay": [1.0, 0.99999, 0.9, 0.5]},
    "all": {"decay": [1.0, 0.99999, 0.9, 0.5], "key_mask": True},
}
every_map = pytest.mark.parametrize("kind", MAPS)
every_form = pytest.mark.parametrize("form", ["chunk", "gated", "whole"])
causal_forms = pytest.mark.parametrize("form", ["chunk", "gated"])


def runner(model):
    """Return a function from inputs to outputs, by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return named(session.run, [x.name for x in model.graph.output])


def evaluator(model):
    from onnx.reference import ReferenceEvaluator

    return named(ReferenceEvaluator(model).run, [x.name for x in model.graph.output])


def named(run, names):
    return lambda inputs: dict(zip(names, run(None, inputs), strict=True))


def export(fm, form="chunk", *, heads=4, **options):
    options = {"value_dim": VALUE_DIM, "form": form, "causal": form != "whole"} | options
    return export_attention(fm, heads=heads, **options)


def flat(x):
    """(batch, heads, length, n) as a model takes it."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def empty(fm, batch, kv_heads=4, decay=None, dtype=np.float32):
    shape = batch, kv_heads
    return to_onnx_state(AttentionState.zeros(fm, VALUE_DIM, shape, decay=decay, dtype=dtype))


def inputs(q, k, v, state, mask=None):
    named = {"q": flat(q), "k": flat(k), "v": flat(v), **state}
    return named if mask is None else {**named, "key_mask": mask}


def expected(q, k, v, fm, mask=None, *, causal=True, decay=None):
    """The result in float64, as a model gives it."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    grouped = q.shape[1] != k.shape[1]
    options = {"causal": causal, "decay": decay, "enable_gqa": grouped}
    return flat(favor_attention(q, k, v, fm, key_mask=mask, **options))


def past(outputs):
    """What a model gave back, as it takes it."""
    return {f"past_{n[8:]}": x for n, x in outputs.items() if n.startswith("present_")}


def some_mask(batch, length, seed=1):
    mask = np.random.default_rng(seed).random((batch, length)) < 0.7
    mask[:, : length // 8] = False  # rows without a key
    return mask


@every_form
@every_map
@pytest.mark.parametrize("name", OPTIONS)
def test_every_map_and_option(name, kind, form):
    options, fm = dict(OPTIONS[name]), maps()[kind]
    if form == "whole" and options.pop("decay", None):
        pytest.skip("decay is causal")
    run = runner(export(fm, form, **options))
    masked, decay = options.get("key_mask"), options.get("decay")
    for batch, length, std in ((1, 1, 1), (3, 2, 4), (2, 63, 1), (1, 65, 0.3), (2, 300, 2)):
        q, k, v = data(length, batch=batch, std=std)
        mask = some_mask(batch, length) if masked else None
        out = run(inputs(q, k, v, empty(fm, batch, decay=decay), mask))["out"]
        want = expected(q, k, v, fm, mask, causal=form != "whole", decay=decay)
        assert out.dtype == np.float32
        assert relative_rms(out, want) <= PROMISE["float32"]
        if masked:
            assert np.array_equal(out == 0, want == 0)
