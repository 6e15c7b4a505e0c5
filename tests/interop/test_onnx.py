"""Attention as ONNX models: what onnxruntime and onnx's own evaluator make of them."""

import functools
import json

import numpy as np
import pytest
from support import bridges, oracle
from support.tolerance import relative_error, relative_rms

onnx = bridges.require("onnx")
onnxruntime = bridges.require("onnxruntime")

import favor_np.interop.onnx
from favor_np import AttentionState, FeatureMap, favor_attention, feature_map
from favor_np.cli import main
from favor_np.interop.onnx import empty_state, export_attention, from_onnx_state, to_onnx_state

DIM, VALUE_DIM, FEATURES = 8, 5, 32
DECAY = [1.0, 0.99999, 0.9, 0.5]
PROMISE = 3e-6


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
    "decay": {"decay": DECAY},
    "all": {"decay": DECAY, "key_mask": True},
}
every_map = pytest.mark.parametrize("kind", MAPS)
every_form = pytest.mark.parametrize("form", ["chunk", "gated", "whole"])
causal_forms = pytest.mark.parametrize("form", ["chunk", "gated"])


def runner(model, **entries):
    """Return a function from inputs to outputs, by name."""
    options = onnxruntime.SessionOptions()
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
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


def run_all(run, q, k, v, state, mask=None, size=None):
    """The result of calls for `size` positions each, and the state in the end."""
    size, outs = size or q.shape[2], []
    for i in range(0, q.shape[2], size):
        parts = (x[:, :, i : i + size] for x in (q, k, v))
        outputs = run(inputs(*parts, state, None if mask is None else mask[:, i : i + size]))
        outs.append(outputs["out"])
        state = past(outputs)
    return np.concatenate(outs, axis=1), state


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
        assert relative_rms(out, want) <= PROMISE
        if masked:
            assert np.array_equal(out == 0, want == 0)


@every_form
@every_map
def test_every_norm(kind, form):
    """From hardly any difference between keys to one that takes all, at every length."""
    fm = maps()[kind]
    run = runner(export(fm, form))
    for seed, (length, std) in enumerate([(4, 0.1), (17, 4), (64, 8), (128, 12), (300, 12)]):
        q, k, v = data(length, std=std, seed=seed)
        out = run(inputs(q, k, v, empty(fm, 2)))["out"]
        assert relative_rms(out, expected(q, k, v, fm, causal=form != "whole")) <= PROMISE


@every_form
def test_subnormal_numbers_are_not_needed(form):
    fm = maps()["antithetic"]
    run = runner(export(fm, form), set_denormal_as_zero="1")
    for std in (1, 8, 12):
        q, k, v = data(200, std=std)
        out = run(inputs(q, k, v, empty(fm, 2)))["out"]
        assert relative_rms(out, expected(q, k, v, fm, causal=form != "whole")) <= PROMISE


@every_form
def test_every_length(form):
    fm = maps()["antithetic"]
    run = runner(export(fm, form))
    arrays = data(300, batch=3)
    for length in range(1, 301):
        batch = 1 + length % 3
        part = [x[:batch, :, :length] for x in arrays]
        out = run(inputs(*part, empty(fm, batch)))["out"]
        assert relative_rms(out, expected(*part, fm, causal=form != "whole")) <= PROMISE


@every_form
def test_no_positions(form):
    fm = maps()["antithetic"]
    q, k, v = data(10)
    run = runner(export(fm, form))
    before = past(run(inputs(q, k, v, empty(fm, 2))))
    outputs = run(inputs(q[:, :, :0], k[:, :, :0], v[:, :, :0], before))
    assert outputs["out"].shape == (2, 0, 4 * VALUE_DIM)
    for name, array in past(outputs).items():
        assert np.array_equal(array, before[name])


def test_more_queries_than_keys():
    fm = maps()["antithetic"]
    (q, _, _), (_, k, v) = data(300), data(70, seed=1)
    out = runner(export(fm, "whole"))(inputs(q, k, v, empty(fm, 2)))["out"]
    assert relative_rms(out, expected(q, k, v, fm, causal=False)) <= PROMISE


@every_form
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", ["antithetic", "relu", "calibrated"])
def test_grouped_heads(kind, kv_heads, form):
    if kind == "calibrated":
        shift = np.arange(kv_heads)[:, None, None]
        q, k, _ = data(100, batch=1, heads=kv_heads, kv_heads=kv_heads)
        fm = feature_map("positive", DIM, FEATURES).calibrate(q[0] + shift, k[0] - shift)
    else:
        fm = maps()[kind]
    options = {} if form == "whole" else {"decay": 0.9}
    run = runner(export(fm, form, kv_heads=kv_heads, key_mask=True, **options))
    q, k, v = data(150, kv_heads=kv_heads, std=3)
    mask = some_mask(2, 150)
    out = run(inputs(q, k, v, empty(fm, 2, kv_heads, **options), mask))["out"]
    want = expected(q, k, v, fm, mask, causal=form != "whole", **options)
    assert relative_rms(out, want) <= PROMISE


@pytest.mark.parametrize("name", OPTIONS)
@causal_forms
@pytest.mark.parametrize("kind", ["antithetic", "relu", "own aderf+sderf"])
def test_a_token_at_a_time(kind, form, name):
    options, fm = OPTIONS[name], maps()[kind]
    run, decay = runner(export(fm, form, **options)), options.get("decay")
    q, k, v = data(150, std=2)
    mask = some_mask(2, 150) if "key_mask" in options else None
    whole, end = run_all(run, q, k, v, empty(fm, 2, decay=decay), mask)
    steps, last = run_all(run, q, k, v, empty(fm, 2, decay=decay), mask, 1)
    assert relative_rms(steps, expected(q, k, v, fm, mask, decay=decay)) <= PROMISE
    assert relative_rms(whole, steps) <= PROMISE
    if form == "gated":
        assert np.array_equal(steps, whole)
        for state in end:
            assert np.array_equal(last[state], end[state])


@every_form
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("kind", ["antithetic", "relu", "elu", "oprf"])
def test_biases(kind, kv_heads, form):
    """Of any size, and beside everything else; -inf masks a key, NaN in it included."""
    fm, rng = maps()[kind], np.random.default_rng(3)
    options = {} if form == "whole" else {"decay": 0.9}
    run = runner(export(fm, form, kv_heads=kv_heads, key_mask=True, key_bias=True, **options))
    for length, size in ((1, 1), (90, 3), (150, 1000), (200, 1e6)):
        q, k, v = data(length, kv_heads=kv_heads, std=2)
        bias = (size * rng.standard_normal((2, length, kv_heads))).astype(np.float32)
        bias[rng.random(bias.shape) < 0.2] = -np.inf
        mask = some_mask(2, length)
        k[np.isneginf(bias.swapaxes(1, 2))] = np.nan
        arrays = [x.astype(np.float64) for x in (q, np.nan_to_num(k), v)]
        want = favor_attention(
            *arrays, fm, causal=form != "whole", enable_gqa=True, key_mask=mask[:, None],
            key_bias=bias.swapaxes(1, 2).astype(np.float64), **options,
        )  # fmt: skip
        given = inputs(q, k, v, empty(fm, 2, kv_heads, **options), mask) | {"key_bias": bias}
        out = run(given)["out"]
        assert relative_rms(out, flat(want)) <= PROMISE


@causal_forms
def test_biases_a_token_at_a_time(form):
    fm = maps()["antithetic"]
    run = runner(export(fm, form, key_bias=True))
    q, k, v = data(100)
    bias = (30 * np.random.default_rng(0).standard_normal((2, 100, 4))).astype(np.float32)
    outs, state = [], empty(fm, 2)
    for i in range(100):
        part = [x[:, :, i : i + 1] for x in (q, k, v)]
        outputs = run(inputs(*part, state) | {"key_bias": bias[:, i : i + 1]})
        outs.append(outputs["out"])
        state = past(outputs)
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    want = favor_attention(*arrays, fm, causal=True, key_bias=bias.swapaxes(1, 2))
    assert relative_rms(np.concatenate(outs, axis=1), flat(want)) <= PROMISE


def factors(length, heads=4, *, batch=2, seed=0):
    """Factors a token: of all sizes, and one where nothing is forgotten."""
    rng = np.random.default_rng(seed)
    factors = rng.choice([1, 0.99999, 0.9, 0.1, 1e-20], (batch, length, heads), p=[0.2] * 5)
    return (factors * rng.uniform(0.5, 1, factors.shape)).astype(np.float32)


def gated(run, q, k, v, decay, state, size, mask=None):
    """The result of calls for `size` positions each, and the state in the end."""
    outs = []
    for i in range(0, q.shape[2], size):
        at = slice(i, i + size)
        named = inputs(
            *(x[:, :, at] for x in (q, k, v)), state, None if mask is None else mask[:, at]
        )
        outputs = run(named | {"decay": decay[:, at]})
        outs.append(outputs["out"])
        state = past(outputs)
    return np.concatenate(outs, axis=1), state


def expected_gated(q, k, v, fm, decay, mask=None):
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    mask = None if mask is None else mask[:, None]
    decay = decay.swapaxes(1, 2).astype(np.float64)
    return flat(
        favor_attention(*arrays, fm, causal=True, enable_gqa=True, decay=decay, key_mask=mask)
    )


@causal_forms
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("kind", ["antithetic", "relu", "oprf"])
def test_factors_a_token(kind, kv_heads, form):
    fm = maps()[kind]
    model = export(fm, form, kv_heads=kv_heads, decay="input", key_mask=True)
    run, start = runner(model), empty_state(model, 2)
    for length, std in ((1, 1), (70, 1), (200, 4)):
        q, k, v = data(length, kv_heads=kv_heads, std=std)
        decay, mask = factors(length, kv_heads), some_mask(2, length)
        want = expected_gated(q, k, v, fm, decay, mask)
        for size in (length, 37):
            out, _ = gated(run, q, k, v, decay, start, size, mask)
            assert relative_rms(out, want) <= PROMISE
    out, _ = gated(run, q, k, v, decay, start, 1, mask)
    assert relative_rms(out, want) <= PROMISE


@causal_forms
def test_factors_near_one(form):
    fm = maps()["antithetic"]
    model = export(fm, form, heads=1, decay="input")
    q, k, v = data(20_000, batch=1, heads=1, kv_heads=1, std=0.7)
    decay = np.full((1, 20_000, 1), 0.99999, np.float32)
    out, _ = gated(runner(model), q, k, abs(v), decay, empty_state(model), 5000)
    assert relative_rms(out, expected_gated(q, k, abs(v), fm, decay)) <= PROMISE


@causal_forms
def test_states_that_factors_have_faded_go_both_ways(form):
    fm = maps()["antithetic"]
    model = export(fm, form, decay="input")
    (q, k, v), decay = data(100, std=2), factors(100)
    want = expected_gated(q, k, v, fm, decay)
    first, second = ([x[:, :, at] for x in (q, k, v)] for at in (slice(0, 60), slice(60, 100)))
    of_head = decay.swapaxes(1, 2)

    state = AttentionState.zeros(fm, VALUE_DIM, (2, 4))
    state.update(*first[1:], decay=of_head[..., :60])
    out, _ = gated(runner(model), *second, decay[:, 60:], to_onnx_state(state), 40)
    assert relative_rms(out, want[:, 60:]) <= PROMISE

    _, after = gated(runner(model), *first, decay[:, :60], empty_state(model, 2), 30)
    back = from_onnx_state(fm, after)
    out = favor_attention(*second, fm, causal=True, state=back, decay=of_head[..., 60:])
    assert relative_rms(flat(out), want[:, 60:]) <= PROMISE


@causal_forms
def test_factors_that_are_none(form):
    """Zero and more than one count as what is next to them, and give no NaN."""
    model = export(maps()["antithetic"], form, decay="input")
    q, k, v = data(70)
    decay = np.random.default_rng(0).choice([0, 2, -1], (2, 70, 4)).astype(np.float32)
    for array in runner(model)(inputs(q, k, v, empty_state(model, 2)) | {"decay": decay}).values():
        assert np.isfinite(array).all()


@causal_forms
@pytest.mark.parametrize("decay", [0.99999, 0.999])
def test_decay_near_one(form, decay):
    """A factor so near to 1 would be rounded, each time alike, if it were one of float32."""
    fm = maps()["antithetic"]
    q, k, v = data(20_000, batch=1, heads=1, kv_heads=1, std=0.7)
    v = abs(v)
    run, empty_state = runner(export(fm, form, heads=1, decay=decay)), empty(fm, 1, 1, decay)
    want = expected(q, k, v, fm, decay=decay)
    out, _ = run_all(run, q, k, v, empty_state)
    assert relative_error(out, want) <= PROMISE
    out, _ = run_all(run, q, k, v, empty_state, size=1)
    assert relative_error(out, want) <= PROMISE


@causal_forms
def test_decay_that_leaves_only_the_newest_key(form):
    fm = maps()["antithetic"]
    q, k, v = data(200)
    run = runner(export(fm, form, decay=1e-300))
    out, _ = run_all(run, q, k, v, empty(fm, 2, decay=1e-300), size=70)
    assert relative_rms(out, flat(v)) <= PROMISE


@causal_forms
@pytest.mark.parametrize("rising", [1, -1])
@pytest.mark.parametrize("kind", ["positive", "relu", "own aderf+sderf"])
def test_keys_that_rise(kind, rising, form):
    """Early keys of a chunk are nothing beside its last, and their queries see only them."""
    fm = maps()[kind]
    q, k, v = data(200)
    size = np.linspace(0.1, 12, 200)[::rising, None].astype(np.float32)
    run = runner(export(fm, form))
    for keys in (k * size, k / size[::-1] * 2):
        out = run(inputs(q, keys, v, empty(fm, 2)))["out"]
        assert relative_rms(out, expected(q, keys, v, fm)) <= PROMISE


@every_form
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["antithetic", "relu", "elu", "own aderf+sderf"])
def test_no_finite_input_gives_nan(kind, dtype, form):
    if (form, dtype) == ("gated", "float64"):
        pytest.skip("the operator does not compute in float64")
    fm, state = maps()[kind], np.float64 if dtype == "float64" else np.float32
    run = runner(export(fm, form, dtype=dtype))
    largest = float(np.finfo(dtype).max)
    q, k, v = data(70, dtype=dtype)
    for size in (1e3, 1e6, 1e20, largest):
        far = [(np.sign(x) * min(size, largest)).astype(dtype) for x in (q, k, v)]
        some = np.where(np.arange(70)[:, None] % 7 == 3, far[1], k)
        for arrays in ((far[0], k, v), (q, far[1], v), (q, k, far[2]), far, (q, some, v)):
            for array in run(inputs(*arrays, empty(fm, 2, dtype=state))).values():
                assert np.isfinite(array).all()


@every_form
def test_masked_keys_may_be_nan(form):
    fm, (q, k, v), mask = maps()["antithetic"], data(100), some_mask(2, 100)
    hidden = [np.where(mask[:, None, :, None], x, np.float32(np.nan)) for x in (k, v)]
    run = runner(export(fm, form, key_mask=True))
    out = run(inputs(q, *hidden, empty(fm, 2), mask))["out"]
    assert np.array_equal(out, run(inputs(q, k, v, empty(fm, 2), mask))["out"])


@pytest.mark.parametrize("form", ["chunk", "whole"])
@pytest.mark.parametrize("run_with", [runner, evaluator], ids=["onnxruntime", "onnx"])
@pytest.mark.parametrize("kind", ["positive", "antithetic", "relu", "elu", "own"])
def test_float64(kind, run_with, form):
    fm = maps()[kind]
    run = run_with(export(fm, form, dtype="float64"))
    for length, std in ((1, 1), (70, 1), (130, 4), (100, 12)):
        q, k, v = data(length, batch=1, std=std, dtype=np.float64)
        out = run(inputs(q, k, v, empty(fm, 1, dtype=np.float64)))["out"]
        assert out.dtype == np.float64
        want = oracle.favor_attention(q, k, v, fm, causal=form != "whole")
        assert relative_rms(out, flat(want)) <= 2e-15


@pytest.mark.parametrize("form", ["chunk", "whole"])
@pytest.mark.parametrize("kind", ["oprf", "aderf+sderf", "own aderf+sderf", "spherical"])
def test_float64_of_calibrated_maps(kind, form):
    """Beside favor_np, whose own rounding is a part of the difference."""
    fm = maps()[kind]
    run = runner(export(fm, form, dtype="float64"))
    for length, std in ((1, 1), (130, 1), (100, 4)):
        q, k, v = data(length, batch=1, std=std, dtype=np.float64)
        out = run(inputs(q, k, v, empty(fm, 1, dtype=np.float64)))["out"]
        assert relative_rms(out, expected(q, k, v, fm, causal=form != "whole")) <= 5e-15


@pytest.mark.parametrize("form", ["chunk", "whole"])
@pytest.mark.parametrize("kind", ["antithetic", "relu", "own aderf+sderf"])
def test_the_evaluator_of_onnx(kind, form):
    fm, options = maps()[kind], {"key_mask": True}
    if form == "chunk":
        options["decay"] = DECAY
    run = evaluator(export(fm, form, **options))
    for length, std in ((1, 1), (70, 1), (300, 12)):
        q, k, v = data(length, std=std)
        mask = some_mask(2, length)
        out = run(inputs(q, k, v, empty(fm, 2, decay=options.get("decay")), mask))["out"]
        want = expected(q, k, v, fm, mask, causal=form != "whole", decay=options.get("decay"))
        assert relative_rms(out, want) <= PROMISE


@every_form
@pytest.mark.parametrize("kind", ["antithetic", "relu"])
def test_float16(kind, form):
    """Computed in float32: rounded once."""
    fm = maps()[kind]
    q, k, v = data(100, std=2, dtype=np.float16)
    outputs = runner(export(fm, form, dtype=np.float16))(inputs(q, k, v, empty(fm, 2)))
    assert outputs["out"].dtype == np.float16
    assert outputs["present_state"].dtype == np.float32
    want = expected(q, k, v, fm, causal=form != "whole")
    assert relative_rms(outputs["out"], want) <= 2.0**-11


@pytest.mark.parametrize("opset", [14, 15, 16, 17, 18, 20, 22, 24, 27])
@every_form
def test_every_opset(form, opset):
    fm = maps()["antithetic"]
    model = export(fm, form, opset=opset, key_mask=True)
    domains = {x.domain: x.version for x in model.opset_import}
    assert domains.pop("") == opset
    assert domains == ({"com.microsoft": 1} if form == "gated" and opset < 27 else {})
    q, k, v = data(80)
    mask = some_mask(2, 80)
    out = runner(model)(inputs(q, k, v, empty(fm, 2), mask))["out"]
    assert relative_rms(out, expected(q, k, v, fm, mask, causal=form != "whole")) <= PROMISE


@pytest.mark.parametrize("name", ["plain", "decay"])
@pytest.mark.parametrize("kind", ["antithetic", "relu", "own aderf+sderf"])
@every_form
def test_states_go_both_ways(form, kind, name):
    """What favor_np began goes on in a model, and the other way round, by any form."""
    options, fm = dict(OPTIONS[name]), maps()[kind]
    if form == "whole" and options.pop("decay", None):
        pytest.skip("decay is causal")
    decay = options.get("decay")
    q, k, v = data(220, std=2)
    q[:], k[:, :, 150:] = q[:, :, :1], 2 * k[:, :, 150:]
    parts = [tuple(x[:, :, rows] for x in (q, k, v)) for rows in (slice(0, 90), slice(90, 220))]
    want = expected(q, k, v, fm, causal=form != "whole", decay=decay)
    run = runner(export(fm, form, **options))

    state = AttentionState.zeros(fm, VALUE_DIM, (2, 4), decay=decay)
    state.update(*parts[0][1:])
    outputs = run(inputs(*parts[1], to_onnx_state(state)))
    assert relative_rms(outputs["out"], want[:, 90:]) <= PROMISE
    back = from_onnx_state(fm, outputs, decay=decay)
    state.update(*parts[1][1:])
    assert relative_rms(back.attend(q[:, :, :9]), state.attend(q[:, :, :9])) <= PROMISE
    assert back.lengths.tolist() == (state.lengths if decay else 0 * state.lengths).tolist()

    outputs = run(inputs(*parts[0], empty(fm, 2, decay=decay)))
    state = from_onnx_state(fm, outputs, decay=decay)
    out = favor_attention(*parts[1], fm, causal=form != "whole", state=state)
    assert relative_rms(flat(out), want[:, 90:]) <= PROMISE


@pytest.mark.parametrize("decay", [None, DECAY], ids=["", "decay"])
def test_states_come_back(decay):
    """Equal within rounding, in float64, with equal exponents where nothing was folded."""
    fm = maps()["own"]
    state = AttentionState.zeros(fm, VALUE_DIM, (2, 4), decay=decay, dtype=np.float64)
    back = from_onnx_state(fm, to_onnx_state(state), decay=decay)
    assert np.array_equal(back.c, state.c)
    for _ in range(3):
        _, k, v = data(37, std=5, dtype=np.float64)
        state.update(k, v)
        back = from_onnx_state(fm, to_onnx_state(state), decay=decay)
        for got, want in zip(oracle.content(back), oracle.content(state), strict=True):
            assert (abs(got - want) <= 1e-13 * abs(want).max(-1, keepdims=True)).all()


def test_states_with_fewer_axes():
    fm = maps()["antithetic"]
    _, k, v = data(20)
    flat_state = AttentionState.zeros(fm, VALUE_DIM).update(k[0, 0], v[0, 0])
    heads = AttentionState.zeros(fm, VALUE_DIM, 4).update(k[0], v[0])
    assert to_onnx_state(flat_state)["past_state"].shape == (1, 1, FEATURES, VALUE_DIM + 1)
    for name, array in to_onnx_state(heads).items():
        assert np.array_equal(array[:, :1], to_onnx_state(flat_state)[name])


@every_form
def test_a_model_says_what_it_is(form):
    fm = maps()["antithetic"]
    options = {} if form == "whole" else {"decay": 0.5}
    model = export(fm, form, kv_heads=2, **options)
    onnx.checker.check_model(model, full_check=True)
    facts = {x.key: x.value for x in model.metadata_props}
    assert facts["favor_np.fingerprint"] == fm.fingerprint
    assert facts["favor_np.form"] == form
    assert json.loads(facts["favor_np.heads"]) == 4
    assert json.loads(facts["favor_np.kv_heads"]) == 2
    assert json.loads(facts["favor_np.causal"]) == (form != "whole")
    assert json.loads(facts["favor_np.decay"]) == (None if form == "whole" else [0.5, 0.5])
    assert model.producer_version == favor_np.__version__


def test_auto():
    def form(**options):
        model = export_attention(maps()["elu"], heads=1, value_dim=1, **options)
        return next(x.value for x in model.metadata_props if x.key == "favor_np.form")

    assert form() == "chunk"
    assert form(causal=False) == "whole"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"heads": 0}, ValueError, "heads"),
        ({"heads": 3, "kv_heads": 2}, ValueError, "multiple of kv_heads"),
        ({"value_dim": 2.5}, TypeError, "value_dim"),
        ({"causal": 1}, TypeError, "causal"),
        ({"key_mask": None}, TypeError, "key_mask"),
        ({"key_bias": [1.0]}, TypeError, "key_bias"),
        ({"form": "loop"}, ValueError, "form"),
        ({"form": "whole"}, ValueError, "causal"),
        ({"form": "gated", "causal": False}, ValueError, "causal"),
        ({"form": "gated", "dtype": "float64"}, ValueError, "float64"),
        ({"causal": False, "decay": 0.9}, ValueError, "decay needs causal"),
        ({"causal": False, "decay": "input"}, ValueError, "decay needs causal"),
        ({"decay": "output"}, ValueError, "decay"),
        ({"decay": 0.0}, ValueError, "decay"),
        ({"decay": [0.9, 0.8]}, ValueError, "decay"),
        ({"opset": 13}, ValueError, "opset"),
        ({"opset": 28}, ValueError, "opset"),
        ({"dtype": "int8"}, TypeError, "dtype"),
        ({"dtype": "nothing"}, TypeError, "dtype"),
    ],
    ids=str,
)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        export_attention(maps()["antithetic"], **{"heads": 4, "value_dim": 2} | options)


def test_wrong_maps():
    with pytest.raises(ValueError, match="'trig'"):
        export_attention(feature_map("trig", 4, 8), heads=1, value_dim=1)
    with pytest.raises(TypeError, match="FeatureMap"):
        export_attention("positive", heads=1, value_dim=1)
    with pytest.raises(ValueError, match="4 heads"):
        export_attention(maps()["own"], heads=2, value_dim=1)


def test_wrong_states():
    fm = maps()["antithetic"]
    arrays = empty(fm, 1)
    with pytest.raises(ValueError, match="decay"):
        from_onnx_state(fm, arrays | {"past_decay": np.zeros((2, 4))})
    for state, error in (
        ("state", TypeError),
        (AttentionState.zeros(fm, 2, (1, 1, 1)), ValueError),
        (AttentionState.zeros(fm, 2, sequences=2), ValueError),
    ):
        with pytest.raises(error):
            to_onnx_state(state)
    for changed, error in (
        ({"past_state": arrays["past_state"][0]}, ValueError),
        ({"past_state": arrays["past_state"][:, :, :5]}, ValueError),
        ({"past_max": arrays["past_max"][:, :2]}, ValueError),
        ({"past_max": arrays["past_max"].astype(complex)}, TypeError),
    ):
        with pytest.raises(error):
            from_onnx_state(fm, arrays | changed)
    with pytest.raises(ValueError, match="present_max"):
        from_onnx_state(fm, {"past_state": arrays["past_state"]})
    for length, error in (
        (None, ValueError),
        ([1.5], TypeError),
        ([-1], ValueError),
        (3, ValueError),
    ):
        given = arrays if length is None else arrays | {"past_length": length}
        with pytest.raises(error):
            from_onnx_state(fm, given, decay=0.5)


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--form", "gated", "--kv-heads", "1", "--decay", "0.9", "--key-mask", "--key-bias"),
        ("--bidirectional", "--map", "elu", "--dtype", "float64"),
    ],
    ids=str,
)
def test_export(options, tmp_path, capsys):
    path = tmp_path / "attention.onnx"
    size = ("--dim", "8", "--features", "16", "--heads", "2")
    assert main(["export", "--attention", str(path), *size, *options]) == 0
    text = capsys.readouterr().out
    assert main(["export", "--attention", str(path), *size, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"{report['difference']:.1e}" in text
    assert 0 < report["difference"] < 1e-5
    model = onnx.load(path)
    assert path.stat().st_size == report["bytes"]
    assert list(report["inputs"]) == [x.name for x in model.graph.input]
    assert report["fingerprint"] in {x.value for x in model.metadata_props}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--heads", "3", "--kv-heads", "2"), "multiple"),
        (("--features", "3"), "even"),
        (("--form", "gated", "--dtype", "float64"), "float64"),
        (("--decay", "2"), "decay"),
    ],
    ids=str,
)
def test_export_of_what_cannot_be(options, words, tmp_path, capsys):
    path = tmp_path / "attention.onnx"
    assert main(["export", "--attention", str(path), *options]) == 2
    assert words in capsys.readouterr().err
    assert not path.exists()


# --- the module ----------------------------------------------------------------------------------


def test_examples():
    bridges.assert_examples_are_right(favor_np.interop.onnx)


def test_without_onnx():
    bridges.assert_error_names_the_extra("onnx", "onnx")
