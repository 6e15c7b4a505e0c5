"""Models of favor_np.nn as ONNX models: what onnxruntime and onnx's own evaluator make of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support import bridges
from support.tolerance import relative_rms

onnx = bridges.require("onnx")
onnxruntime = bridges.require("onnxruntime")

from favor_np import nn
from favor_np.cli import main
from favor_np.interop import performer_pytorch
from favor_np.interop.onnx import empty_state, export_model, layers, models

PROMISE = 3e-6
#: What performer-pytorch trained: see tests/golden/README.md.
TRAINED = sorted(Path(__file__).parents[1].glob("golden/performer_pytorch_model_*.npz"))
VOCAB, DIM = 50, 12
LENGTH, PROMPT = 150, 130


def language_model(**options):
    sizes = {"vocab": VOCAB, "dim": DIM, "depth": 2, "heads": 2, "num_features": 16}
    return nn.PerformerLM(**sizes | options)


def encoder(**options):
    sizes = {"dim": DIM, "depth": 2, "heads": 2, "num_features": 16}
    return nn.Performer(**sizes | options)


LANGUAGE_MODELS = {
    "default": {},
    "grouped": {"heads": 4, "dim_head": 6, "kv_heads": 2, "decay": (0.9, 0.99999)},
    "one decay": {"decay": 0.5, "rotary": None, "qk": None, "antithetic": False},
    "halves": {"rotary": "halves", "norm": "layer", "activation": "swiglu", "qkv_bias": True},
    "untied": {"tied": False, "bias": True, "gate": True, "final_norm": "scale"},
    "sinusoidal": {"positions": "sinusoidal", "rotary": None, "norm": "scale", "hidden": 7},
    "learned": {"positions": "learned", "length": LENGTH, "norm": None, "shift": False},
    "relu": {"kind": "relu", "activation": "gelu_tanh", "final_norm": False},
    "elu": {"kind": "elu", "qk": None, "activation": "geglu", "dropout": 0.1},
    "odd": {"dim": 11, "dim_head": 4, "activation": "relu2"},
    "exact": {"exact": True, "activation": "relu", "embedding_dropout": 0.1},
    "some exact": {"layers": "FE", "heads": 4, "dim_head": 4, "kv_heads": 2, "decay": 0.9},
    "exact with decay": {"exact": True, "decay": (0.9, 0.999)},
    "some near": {"local_heads": 1, "window": 30, "decay": 0.9},
    "some near of groups": {
        "heads": 6,
        "dim_head": 4,
        "kv_heads": 3,
        "local_heads": 2,
        "window": 300,
        "exact": True,
    },
    "the last alone": {"heads": 2, "local_heads": 1, "window": 1, "qk": None},
}
ENCODERS = {
    "default": {},
    "all": {"rotary": "adjacent", "shift": True, "norm": "layer", "activation": "swiglu"},
    "exact": {"exact": True, "kv_heads": 1},
    "some exact": {"layers": "EF", "shift": True, "kind": "relu", "bias": True},
    "thirds": {"dim": 11, "dim_head": 4, "shift": True},
    "no third, no norm": {"dim": 2, "dim_head": 4, "shift": True, "norm": None},
    "some near": {"local_heads": 1, "window": 20, "rotary": "halves"},
    "some near of groups": {"heads": 4, "kv_heads": 2, "local_heads": 2, "window": 500},
}
every_language_model = pytest.mark.parametrize("name", LANGUAGE_MODELS)
causal_forms = pytest.mark.parametrize("form", ["chunk", "gated"])


def parameters(model, dtype=np.float32):
    """Parameters that are not those that training begins with: blocks begin as nothing."""
    rng = np.random.default_rng(3)
    params = nn.astype(model.init(rng), dtype)
    for name, array in nn.leaves(params):
        if not name.endswith("projection"):
            array += 0.2 * rng.standard_normal(array.shape).astype(dtype)
    return params


def tokens(length=LENGTH, batch=2):
    return np.random.default_rng(length).integers(0, VOCAB, (batch, length))


def rows(length=LENGTH, batch=2, dim=DIM, dtype=np.float32):
    return np.random.default_rng(length).standard_normal((batch, length, dim)).astype(dtype)


def expected(model, params, x, **options):
    x = x.astype(np.float64) if x.dtype.kind == "f" else x
    return model.apply(nn.astype(params, np.float64), x, **options)


class Session:
    """An exported model, run by onnxruntime or by onnx's evaluator."""

    def __init__(self, model, params, evaluate=False, **options):
        self.model = export_model(model, params, **options)
        self._names = [x.name for x in self.model.graph.output]
        if evaluate:
            from onnx.reference import ReferenceEvaluator

            self._session = ReferenceEvaluator(self.model)
        else:
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = settings.inter_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(
                self.model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )

    def __call__(self, x, state=None, mask=None):
        """The result for rows or tokens, and the state after them."""
        state = empty_state(self.model, len(x)) if state is None else state
        named = {"x" if x.ndim == 3 else "tokens": x, **state}
        if mask is not None:
            named["key_mask"] = mask
        outputs = self._session.run(None, named)
        after = zip(self._names[1:], outputs[1:], strict=True)
        return outputs[0], {name.replace("present", "past"): array for name, array in after}

    def by_token(self, x, mask=None):
        """The result of a prompt, and of single tokens after it."""
        parts = [slice(0, PROMPT), *(slice(i, i + 1) for i in range(PROMPT, x.shape[1]))]
        outs, state = [], None
        for part in parts:
            out, state = self(x[:, part], state, None if mask is None else mask[:, part])
            outs.append(out)
        return np.concatenate(outs, axis=1)


@causal_forms
@every_language_model
def test_language_models(name, form):
    model = language_model(**LANGUAGE_MODELS[name])
    params = parameters(model)
    session = Session(model, params, form=form)
    want = expected(model, params, tokens())
    out, _ = session(tokens())
    assert out.dtype == np.float32
    assert relative_rms(out, want) <= PROMISE
    assert relative_rms(session.by_token(tokens()), want) <= PROMISE


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, masked):
    model = encoder(**ENCODERS[name])
    params = parameters(model)
    session = Session(model, params, key_mask=masked)
    assert empty_state(session.model) == {}
    for length in (0, 1, 70, 300):
        x, mask = rows(length, dim=model.dim), None
        options = {}
        if masked:
            mask = np.arange(length) % 3 > 0
            mask = np.stack([mask, mask[::-1]])
            options["mask"] = mask
        found = session(x, mask=mask)[0]
        if not length:
            assert found.shape == x.shape
            continue
        assert relative_rms(found, expected(model, params, x, **options)) <= PROMISE


@every_language_model
def test_masks(name):
    model = language_model(**LANGUAGE_MODELS[name])
    params, x = parameters(model), tokens()
    mask = np.random.default_rng(1).random(x.shape) < 0.7
    mask[:, :20] = False  # the first rows see nothing
    session = Session(model, params, key_mask=True)
    want = expected(model, params, x, mask=mask)
    assert relative_rms(session(x, mask=mask)[0], want) <= PROMISE
    assert relative_rms(session.by_token(x, mask), want) <= PROMISE


def test_causal_encoders_and_masked_language_models():
    model = encoder(causal=True, rotary="halves")
    params = parameters(model)
    session = Session(model, params)
    assert relative_rms(session.by_token(rows()), expected(model, params, rows())) <= PROMISE
    model = language_model(causal=False)
    params = parameters(model)
    session = Session(model, params)
    assert empty_state(session.model) == {}
    assert relative_rms(session(tokens())[0], expected(model, params, tokens())) <= PROMISE


CHAINS = {
    "two directions": (encoder(causal=True, shift=True), nn.Linear(DIM, 3), encoder(dim=3, heads=1)),
    "decay in one": (encoder(causal=True, decay=0.9, rotary="halves"), encoder()),
    "positions": (nn.Rotary(DIM), nn.SinusoidalPositions(DIM), nn.LearnedPositions(LENGTH, DIM)),
    "rows": (nn.LayerNorm(DIM, bias=False), nn.FeedForward(DIM), nn.Dropout(0.5), nn.Linear(DIM, 1)),
    "sum": (nn.Sum((encoder(causal=True, shift=True), nn.Linear(DIM, DIM), nn.Rotary(DIM))),),
    "tokens": (nn.Embedding(VOCAB, DIM), nn.Block(encoder()._block("F").attention, nn.FeedForward(DIM))),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    model = nn.Chain(CHAINS[name])
    params = parameters(model)
    x = tokens() if name == "tokens" else rows()
    session = Session(model, params)
    want = expected(model, params, x)
    assert relative_rms(session(x)[0], want) <= PROMISE
    if name in ("positions", "sum"):
        assert relative_rms(session.by_token(x), want) <= PROMISE


@pytest.mark.parametrize("evaluate", [False, True], ids=["onnxruntime", "onnx"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["halves", "some exact", "one decay", "some near"])
def test_evaluators_and_float64(name, dtype, evaluate):
    model = language_model(**LANGUAGE_MODELS[name] | {"activation": "swiglu"})
    params = parameters(model, dtype)
    session = Session(model, params, evaluate)
    out, state = session(tokens(70))
    want = expected(model, params, tokens(70))
    assert relative_rms(out, want) <= (PROMISE if dtype == np.float32 else 5e-15)
    again, _ = session(tokens(70)[:, :3], state)
    every = np.concatenate([tokens(70), tokens(70)[:, :3]], axis=1)
    want = expected(model, params, every)[:, 70:]
    assert relative_rms(again, want) <= (PROMISE if dtype == np.float32 else 5e-15)


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_gelu_in_float64(activation):
    """By an error function of our own: of numbers of every size, and of 0."""
    model = nn.Chain((nn.FeedForward(DIM, activation=activation),))
    params = parameters(model, np.float64)
    session = Session(model, params)
    for scale in (0, 1e-8, 1, 30):
        x = scale * rows(dtype=np.float64)
        want = expected(model, params, x)
        assert np.allclose(session(x)[0], want, rtol=0, atol=5e-15 * abs(want).max(initial=1))


def test_parameters_of_one_dtype_and_a_model_of_another():
    model = language_model()
    params = parameters(model)
    out, _ = Session(model, params, dtype=np.float64)(tokens())
    assert out.dtype == np.float64
    assert relative_rms(out, expected(model, params, tokens())) <= 5e-15


def test_every_length():
    model = language_model(layers="FE", local_heads=1)
    params = parameters(model)
    session = Session(model, params)
    want = expected(model, params, tokens(300, batch=1))
    for length in (1, 2, 63, 64, 65, 255, 256, 257, 300):
        out, _ = session(tokens(300, batch=1)[:, :length])
        assert relative_rms(out, want[:, :length]) <= PROMISE


@causal_forms
def test_no_positions(form):
    model = language_model(layers="FE", decay=0.9, local_heads=1)
    session = Session(model, parameters(model), form=form)
    for before in (empty_state(session.model, 2), session(tokens())[1]):
        out, after = session(tokens()[:, :0], before)
        assert out.shape == (2, 0, VOCAB)
        for name, array in after.items():
            assert np.array_equal(array, before[name])


def test_what_one_form_began_another_goes_on_with():
    model = language_model(decay=0.99)
    params = parameters(model)
    chunk, gated = (Session(model, params, form=form) for form in ("chunk", "gated"))
    _, state = chunk(tokens()[:, :PROMPT])
    out, _ = gated(tokens()[:, PROMPT:], state)
    assert relative_rms(out, expected(model, params, tokens())[:, PROMPT:]) <= PROMISE


def test_texts_of_different_lengths_go_on_together():
    """Each has its own positions: of rotations, of decay and of what is added to embeddings."""
    model = language_model(decay=0.9, positions="sinusoidal")
    params = parameters(model)
    session = Session(model, params)
    texts = [tokens(length, batch=1) for length in (40, 70)]
    states = [session(text[:, :-5])[1] for text in texts]
    state = {name: np.concatenate([x[name] for x in states]) for name in states[0]}
    out, _ = session(np.concatenate([text[:, -5:] for text in texts]), state)
    want = [expected(model, params, text)[:, -5:] for text in texts]
    assert relative_rms(out, np.concatenate(want)) <= PROMISE


def test_a_far_position():
    """Angles are right where float32 would lose their sines."""
    model = language_model(depth=1)
    params = parameters(model)
    session = Session(model, params)
    state = {}
    model.extend(params, state, tokens(1))
    _, past = session(tokens(1))
    state["blocks"]["0"]["attention"]["branch"]["length"] = 30_000
    past["past_length"][:] = 30_000
    want = model.extend(params, state, tokens(3))
    assert relative_rms(session(tokens(3), past)[0], want) <= PROMISE


def test_greedy_text_is_that_of_generate():
    model = language_model(vocab=256)
    params = parameters(model)
    session = Session(model, params)
    new, state = np.array([list(b"to be or not to be")]), None
    found = []
    for _ in range(20):
        logits, state = session(new, state)
        new = logits[:, -1:].argmax(-1)
        found.append(int(new[0, 0]))
    assert bytes(found) == bytes(model.generate(params, b"to be or not to be", 20, temperature=0))


@pytest.mark.parametrize("path", TRAINED, ids=[path.stem[24:] for path in TRAINED])
@causal_forms
def test_models_that_pytorch_trained(path, form):
    """Without its constants; the logits were computed in float64, without favor_np."""
    files = path.with_suffix(".safetensors"), path.with_suffix(".json")
    model, params = performer_pytorch.load(*files, eps=0)
    data = np.load(path)
    x, want = data["tokens"], data["logits_f64_eps0"]
    if not model.causal and form == "gated":
        with pytest.raises(ValueError, match="causal"):
            export_model(model, params, form=form)
        return
    session = Session(model, params, form=form if model.causal else "auto")
    out, _ = session(x.astype(np.int64))
    assert abs(out - want).max() < 3e-5
    with pytest.raises(ValueError, match="OriginalPerformerLM cannot be exported"):
        export_model(*performer_pytorch.load(*files))


@pytest.mark.parametrize("opset", [14, 17, 18, 22, 27])
@causal_forms
def test_every_opset(form, opset):
    model = language_model(layers="FE", positions="learned", local_heads=1)
    params = parameters(model)
    session = Session(model, params, form=form, opset=opset)
    domains = {x.domain: x.version for x in session.model.opset_import}
    assert domains.pop("") == opset
    assert domains == ({"com.microsoft": 1} if form == "gated" and opset < 27 else {})
    assert relative_rms(session(tokens())[0], expected(model, params, tokens())) <= PROMISE


def test_a_model_says_what_it_is():
    model = language_model(layers="FE")
    params = parameters(model)
    exported = export_model(model, params)
    onnx.checker.check_model(exported, full_check=True)
    facts = {x.key: x.value for x in exported.metadata_props}
    assert facts["favor_np.form"] == "chunk"
    assert facts["favor_np.model"] == repr(model)
    layer = model.parts["blocks"].layers[0].attention
    fm = layer.feature_map(params["blocks"]["0"]["attention"]["branch"])
    assert json.loads(facts["favor_np.fingerprints"]) == [fm.fingerprint]
    names = {x.name for x in exported.graph.input}
    assert names == {
        *("tokens", "past_length", "past_state_0", "past_max_0", "past_keys_1", "past_values_1"),
        *(f"past_row_{i}" for i in range(4)),
    }
    assert {x.name.replace("present", "past") for x in exported.graph.output} == (
        names - {"tokens"} | {"logits"}
    )


# --- what is refused -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Own(nn.Linear):
    """A layer that nobody knows."""


def test_unknown_layers():
    model = nn.Chain((nn.Linear(2, 2), Own(2, 2)))
    with pytest.raises(ValueError, match=r"^1\.Own cannot be exported"):
        export_model(model, model.init(np.random.default_rng(0)))


def test_unknown_options(monkeypatch):
    monkeypatch.setitem(layers.WRITERS, nn.RMSNorm, (layers.rms_norm, "dim"))
    params = parameters(language_model())
    export_model(language_model(), params)
    model = nn.Chain((nn.RMSNorm(2, eps=0.5),))
    with pytest.raises(ValueError, match=r"^0\.eps=0\.5 cannot be exported"):
        export_model(model, model.init(np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "whole"}, "causal"),
        ({"form": "loop"}, "form"),
        ({"opset": 13}, "opset"),
        ({"key_mask": 1}, "key_mask"),
    ],
    ids=str,
)
def test_wrong_options(options, words):
    model = language_model()
    with pytest.raises((TypeError, ValueError), match=words):
        export_model(model, parameters(model), **options)


def test_wrong_models_and_parameters():
    model = encoder()
    params = parameters(model)
    with pytest.raises(TypeError, match="layer"):
        export_model("model", params)
    with pytest.raises(ValueError, match="causal"):
        export_model(model, params, form="gated")
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.norm\.weight"):
        export_model(model, {})
    mixed = params | {"norm": nn.astype(params["norm"], np.float64)}
    with pytest.raises(TypeError, match="float32, float64"):
        export_model(model, mixed)
    params["norm"]["weight"] = params["norm"]["weight"][1:]
    with pytest.raises(ValueError, match=r"norm\.weight must have shape"):
        export_model(model, params)
    with pytest.raises(ValueError, match=r"key_mask.*Chain"):
        export_model(nn.Chain((model,)), {"0": params}, key_mask=True)
    with pytest.raises(ValueError, match="Dropout"):
        export_model(nn.Dropout(0.5), {})
    uneven = nn.Sum((nn.Linear(DIM, 2), nn.Linear(DIM, 1)))
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        export_model(uneven, parameters(uneven))
    with pytest.raises(ValueError, match="UnitScale"):
        export_model(nn.UnitScale(2), nn.UnitScale(2).init(np.random.default_rng(0)))
    with pytest.raises(TypeError, match="ModelProto"):
        empty_state(params)
    with pytest.raises(ValueError, match="batch"):
        empty_state(export_model(encoder(), parameters(encoder())), 0)


# --- the program ---------------------------------------------------------------------------------


def saved(path, model, **options):
    nn.save(path, model, parameters(model), **options)
    return str(path)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (language_model(vocab=256), ()),
        (language_model(vocab=256, layers="FE", decay=0.9), ("--form", "gated", "--key-mask")),
        (language_model(positions="learned", length=40), ("--opset", "18")),
        (encoder(), ("--key-mask",)),
    ],
    ids=["default", "gated", "learned", "encoder"],
)
def test_export(model, options, tmp_path, capsys):
    checkpoint, path = saved(tmp_path / "model.safetensors", model, step=7), tmp_path / "model.onnx"
    assert main(["export", checkpoint, str(path), *options]) == 0
    text = capsys.readouterr().out
    assert main(["export", *options, "--json", checkpoint, str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"{report['difference']:.1e}" in text
    assert 0 < report["difference"] < 1e-5
    assert (report["step"], report["model"]) == (7, repr(model))
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    assert path.stat().st_size == report["bytes"]
    assert list(report["inputs"]) == [x.name for x in exported.graph.input]
    assert list(report["outputs"]) == [x.name for x in exported.graph.output]


def test_export_of_what_training_saved(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} is a number, and {i + 1} is the next." for i in range(200)))
    checkpoint, path = str(tmp_path / "run.safetensors"), tmp_path / "run.onnx"
    size = ("--steps", "2", "--dim", "16", "--depth", "1", "--heads", "2", "--features", "16")
    rest = ("--length", "32", "--batch", "2", "--no-baselines")
    assert main(["train", str(text), "--out", checkpoint, *size, *rest]) == 0
    assert main(["export", checkpoint, str(path)]) == 0
    assert "differs from favor_np by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run.safetensors",), "CHECKPOINT and OUT.onnx"),
        (("--attention", "run.safetensors", "out.onnx"), "wants OUT.onnx"),
        (("run.safetensors", "out.onnx", "--dim", "8"), "--dim is for --attention"),
        (("run.safetensors", "run.safetensors"), "overwrite"),
        (("missing", "out.onnx"), "missing"),
        (("text", "out.onnx"), "cannot be read as a checkpoint"),
        (("run.safetensors", "out.onnx", "--form", "whole"), "causal"),
    ],
    ids=str,
)
def test_export_of_what_cannot_be(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved("run.safetensors", language_model())
    before = Path("run.safetensors").read_bytes()
    Path("text").write_text("nothing")
    assert main(["export", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not Path("out.onnx").exists()
    assert Path("run.safetensors").read_bytes() == before


def test_examples():
    bridges.assert_examples_are_right(models)
