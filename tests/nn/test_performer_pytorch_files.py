"""Trained models of performer-pytorch (tests/golden/README.md), loaded from files without PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from favor_np import nn
from favor_np.interop import performer_pytorch

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("performer_pytorch_model_*.npz"))
each_file = pytest.mark.parametrize("path", FILES, ids=[path.stem[24:] for path in FILES])
each_eps = pytest.mark.parametrize("eps", ["original", 0])
TIED = GOLDEN / "performer_pytorch_model_d_causal_lm_learnedpos_tied.npz"


def load(path, eps):
    return performer_pytorch.load(path.with_suffix(".safetensors"), path.with_suffix(".json"), eps)


def parts(path):
    """Weights and config, to be changed."""
    config = json.loads(path.with_suffix(".json").read_text())
    return load_file(path.with_suffix(".safetensors")), config


@each_file
@each_eps
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits(path, eps, dtype):
    model, params = load(path, eps)
    data = np.load(path)
    expected = data["logits_f64" if eps == "original" else "logits_f64_eps0"]
    found = model.apply(nn.astype(params, dtype), data["tokens"])
    assert found.dtype == dtype
    assert abs(found - expected).max() < (3e-5 if dtype == np.float32 else 1e-5)
    assert abs(data["logits_f64"] - data["logits_f64_eps0"]).max() > 1


@each_file
@each_eps
def test_generation_is_the_most_likely_continuation(path, eps):
    model, params = load(path, eps)
    prompt = np.load(path)["tokens"][:, :20]
    found = model.generate(params, prompt, 12, temperature=0)
    text = np.concatenate([prompt, found], 1)
    for end in range(20, 32):
        expected = model.apply(params, text[:, :end])[:, -1].argmax(-1)
        np.testing.assert_array_equal(text[:, end], expected)


@each_file
def test_without_constants_it_is_a_plain_model(path, tmp_path):
    model, params = load(path, 0)
    assert type(model) is nn.PerformerLM
    nn.save(tmp_path / "model", model, params)
    checkpoint = nn.load(tmp_path / "model")
    assert checkpoint.model == model
    tokens = np.load(path)["tokens"]
    expected = model.apply(params, tokens)
    np.testing.assert_array_equal(checkpoint.model.apply(checkpoint.params, tokens), expected)


def test_checkpoint_of_an_original_model(tmp_path):
    model, params = load(TIED, "original")
    nn.save(tmp_path / "model", model, params)
    with pytest.raises(ValueError, match=r"its model is a .*\.OriginalPerformerLM"):
        nn.load(tmp_path / "model")
    checkpoint = nn.load(tmp_path / "model", model)
    for (_, one), (_, two) in zip(nn.leaves(params), nn.leaves(checkpoint.params), strict=True):
        np.testing.assert_array_equal(one, two)


def test_it_learns_on():
    model, params = load(TIED, "original")
    tokens = np.load(TIED)["tokens"]

    def batches(_):
        return tokens[:, :-1], tokens[:, 1:]

    with pytest.warns(RuntimeWarning, match="no longer approximate softmax attention"):
        history = nn.train(model, params, batches, steps=8, rate=1e-3)
    assert history.losses[-1] < history.losses[0]


def test_exact_attention():
    """The same weights: as accurate as features without constants, in the limit of many."""
    model, params = load(TIED, "original")
    tokens = np.load(TIED)["tokens"]
    plain, _ = load(TIED, 0)
    one, two = (m.replace(exact=True).apply(params, tokens) for m in (model, plain))
    np.testing.assert_array_equal(one, two)
    text = model.replace(exact=True).generate(params, tokens[:, :5], 3, temperature=0)
    assert text.shape == (2, 3)


def test_half_precision_is_computed_in_float32():
    weights, config = parts(TIED)
    half = {name: x.astype(np.float16) if x.dtype.kind == "f" else x for name, x in weights.items()}
    _, params = performer_pytorch.load(half, config)
    assert {x.dtype for _, x in nn.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reversible": True}, "reversible=True is not supported"),
        ({"cross_attend": True}, "cross_attend=True is not supported"),
        ({"no_projection": True}, "no_projection=True is not supported"),
        ({"local_attn_heads": 2}, "local_attn_heads=2 is not supported"),
        ({"local_attn_heads": [0, 2]}, r"local_attn_heads=\[0, 2\] is not supported"),
        ({"generalized_attention": True, "kernel_fn": "ELU"}, "kernel_fn=ELU is not supported"),
        ({"nb_feature": 3}, "must give arguments of PerformerLM, got nb_feature"),
        ({"dim_head": 11}, r"layers.0.0.fn.to_q.weight must have shape \(44, 48\)"),
        ({"nb_features": 31}, r"projection_matrix must have shape \(31, 12\), got \(32, 12\)"),
        ({"depth": 3}, r"must have performer.net.layers.2.0.norm.weight, of shape \(48,\)"),
        ({"depth": 1}, "that a model of this config has not: performer.net.layers.1.0"),
        ({"ff_glu": True}, r"w1.weight must have shape \(384, 48\)"),
        ({"qkv_bias": True}, "must have performer.net.layers.0.0.fn.to_q.bias"),
        ({"shift_tokens": True}, "must have performer.net.layers.0.0.fn.fn.to_q.weight"),
        ({"use_scalenorm": True}, "must have performer.net.layers.0.0.g"),
        ({"tie_embed": False}, "must have to_out.weight"),
        ({"max_seq_len": 64}, r"pos_emb.emb.weight must have shape \(64, 48\)"),
        ({"axial_position_emb": True}, "must have pos_emb.weights.0"),
        ({"rotary_position_emb": True}, "has not: pos_emb.emb.weight"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"ff_mult": 0}, "ff_mult must be at least 1, got 0"),
        ({"dim_head": None, "heads": 49}, "dim_head must be at least 1, got 0"),
        ({"rotary_position_emb": True, "dim": 47}, "dim must be even, got 47"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    weights, config = parts(TIED)
    config["kwargs"] |= options
    with pytest.raises(ValueError, match=message):
        performer_pytorch.load(weights, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": None}, "dim must be an integer, got None"),
        ({"ff_mult": 2.5}, "ff_mult must be an integer, got 2.5"),
        ({"max_seq_len": "32"}, "max_seq_len must be an integer, got '32'"),
        ({"causal": "false"}, "causal must be True or False, got 'false'"),
        ({"axial_position_emb": True, "axial_position_shape": 4}, "axial_position_shape must be"),
        ({"axial_position_emb": True, "axial_position_shape": [4, None]}, "axial_position_shape"),
    ],
    ids=str,
)
def test_options_of_other_types(options, message):
    weights, config = parts(TIED)
    config["kwargs"] |= options
    with pytest.raises(TypeError, match=message):
        performer_pytorch.load(weights, config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config must have class_name and kwargs"),
        ([], "config must have class_name and kwargs"),
        ({"class_name": "PerformerEncDec", "kwargs": {}}, "class_name must be one of Performer, "),
        ({"class_name": "Performer", "kwargs": {"dim": 8}}, "must give the argument depth of"),
        (["class_name", "kwargs"], "config must have class_name and kwargs"),
        (None, "config must have class_name and kwargs"),
        ({"class_name": ["Performer"], "kwargs": {}}, "class_name must be one of Performer, "),
        ({"class_name": "Performer", "kwargs": {"3": 8}}, "config must give arguments of .* got 3"),
    ],
    ids=str,
)
def test_wrong_configs(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for each in [tmp_path / "config.json", *([config] if isinstance(config, dict) else [])]:
        with pytest.raises(ValueError, match=message):
            performer_pytorch.load({}, each)


def test_configs_that_cannot_be_read(tmp_path):
    for data in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
            performer_pytorch.load({}, tmp_path / "config.json")
    for kwargs in (None, [1], "ab"):
        with pytest.raises(TypeError, match="kwargs must be a mapping"):
            performer_pytorch.load({}, {"class_name": "Performer", "kwargs": kwargs})
    weights, config = parts(TIED)
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8-sig")
    performer_pytorch.load(weights, tmp_path / "config.json")


def test_wrong_weights(tmp_path):
    weights, config = parts(TIED)
    name = "performer.net.layers.1.1.fn.fn.w2.weight"
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        performer_pytorch.load(weights | {name: weights[name] * np.nan}, config)
    for array in (weights[name] * 1j, weights[name].astype(int), weights[name] > 0, None):
        with pytest.raises(TypeError, match=f"{name} must hold "):
            performer_pytorch.load(weights | {name: array}, config)
    with pytest.raises(ValueError, match="arrays that a model of this config has not: 3"):
        performer_pytorch.load(weights | {3: weights[name]}, config)
    with pytest.raises(FileNotFoundError):
        performer_pytorch.load(tmp_path / "none.safetensors", config)
    with pytest.raises(FileNotFoundError):
        performer_pytorch.load(weights, tmp_path / "none.json")
    (tmp_path / "noise").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="noise cannot be read as safetensors"):
        performer_pytorch.load(tmp_path / "noise", config)
    for eps in (1e-4, False, None, "0"):
        with pytest.raises(ValueError, match="eps must be 'original' or 0"):
            performer_pytorch.load(weights, config, eps)
