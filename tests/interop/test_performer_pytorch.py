"""Models of performer-pytorch, loaded: the same numbers, with its constants and without them."""

import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import bridges

from favor_np import nn
from favor_np.interop import performer_pytorch as loader

torch = bridges.require("torch")
with warnings.catch_warnings():  # it uses what Python and PyTorch have deprecated
    warnings.simplefilter("ignore")
    package = bridges.require("performer_pytorch")
    module = bridges.require("performer_pytorch.performer_pytorch")
    wrapper = bridges.require("performer_pytorch.autoregressive_wrapper")

SMALL = {"dim": 24, "depth": 2, "heads": 3, "dim_head": 10, "nb_features": 13}
LM = SMALL | {"num_tokens": 17, "max_seq_len": 40}
#: What differs from the defaults: each option alone, and then some of them together.
OPTIONS = [
    {},
    {"ff_glu": True},
    {"ff_mult": 2, "ff_chunks": 3},
    {"use_scalenorm": True},
    {"use_rezero": True},
    {"use_scalenorm": True, "use_rezero": True},
    {"generalized_attention": True},
    {"shift_tokens": True},
    {"qkv_bias": True},
    {"attn_out_bias": True},
    {"nb_features": None},
    {"dim_head": 8, "heads": 4, "nb_features": 6},
    {"shift_tokens": True, "use_rezero": True, "ff_glu": True, "qkv_bias": True},
    {"shift_tokens": True, "use_scalenorm": True, "generalized_attention": True},
]
LM_OPTIONS = [
    {"rotary_position_emb": False},
    {"rotary_position_emb": False, "axial_position_emb": True},
    {
        "rotary_position_emb": False,
        "axial_position_emb": True,
        "axial_position_shape": (5, 4, 2),
    },
    {"axial_position_emb": True},
    {"tie_embed": True},
    {"emb_dropout": 0.1, "ff_dropout": 0.2, "attn_dropout": 0.3},
]


def chosen_at_random(seed):
    """Some value for every option."""
    rng = np.random.default_rng(seed)

    def flag():
        return bool(rng.integers(2))

    names = (
        "causal", "ff_glu", "use_scalenorm", "use_rezero", "generalized_attention",
        "shift_tokens", "qkv_bias", "attn_out_bias", "tie_embed", "rotary_position_emb",
        "axial_position_emb",
    )  # fmt: skip
    heads = int(rng.integers(1, 5))
    return {name: flag() for name in names} | {
        "dim": heads * int(rng.integers(3, 9)) * 2,
        "heads": heads,
        "depth": int(rng.integers(1, 4)),
        "dim_head": 2 * int(rng.integers(1, 12)),
        "nb_features": int(rng.integers(1, 40)),
        "ff_mult": int(rng.integers(1, 5)),
    }


def original(name, kwargs, seed=0):
    """A model of the package, with parameters far from those that it begins with."""
    torch.manual_seed(seed)
    model = getattr(package, name)(**kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def without_constants(model, monkeypatch):
    monkeypatch.setattr(module, "softmax_kernel", partial(module.softmax_kernel, eps=0))
    for part in model.modules():
        if isinstance(part, module.FastAttention) and part.causal:
            part.causal_linear_fn = partial(part.causal_linear_fn, eps=0)


def check(name, kwargs, eps, monkeypatch, dtype=np.float64):
    model = original(name, kwargs)
    config = {"class_name": name, "kwargs": kwargs}
    state = {key: x.numpy() for key, x in model.state_dict().items()}
    floats = {key: x.astype(dtype) if x.dtype.kind == "f" else x for key, x in state.items()}
    ours, params = loader.load(floats, config, eps)
    if eps == 0:
        without_constants(model, monkeypatch)
    rng = np.random.default_rng(1)
    if name == "PerformerLM":
        x = rng.integers(0, kwargs["num_tokens"], (2, kwargs["max_seq_len"]))
    else:
        x = rng.standard_normal((2, 31, kwargs["dim"]))
    with torch.no_grad():
        expected = model(torch.tensor(x)).numpy()
    out = ours.apply(params, x)
    assert out.dtype == dtype
    error = abs(out - expected).max()
    assert error < (2e-5 if dtype == np.float64 else 1e-4) * max(1, abs(expected).max())
    return error


each_eps = pytest.mark.parametrize("eps", ["original", 0])


@each_eps
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_performer(options, causal, eps, monkeypatch):
    kwargs = SMALL | {"causal": causal} | options
    assert check("Performer", kwargs, eps, monkeypatch) < 1e-9  # no positions, so no float32


@each_eps
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS + LM_OPTIONS, ids=str)
def test_language_model(options, causal, eps, monkeypatch):
    check("PerformerLM", LM | {"causal": causal} | options, eps, monkeypatch)


@each_eps
@pytest.mark.parametrize("seed", range(12))
def test_all_options_at_random(seed, eps, monkeypatch):
    kwargs = chosen_at_random(seed) | {"num_tokens": 17, "max_seq_len": 70}
    check("PerformerLM", kwargs, eps, monkeypatch)


@each_eps
def test_float32(eps, monkeypatch):
    check("PerformerLM", LM | {"causal": True}, eps, monkeypatch, np.float32)


@each_eps
def test_far_positions(eps, monkeypatch):
    """There the package's tables of sines, computed in float32, are worse than ours."""
    kwargs = LM | {"causal": True, "max_seq_len": 1000}
    check("PerformerLM", kwargs, eps, monkeypatch, np.float32)


def language_model(**options):
    kwargs = LM | {"rotary_position_emb": False} | options
    model = original("PerformerLM", kwargs)
    return model, *load(model.state_dict(), kwargs)


def load(state, kwargs, eps="original", name="PerformerLM"):
    return loader.load(state, {"class_name": name, "kwargs": kwargs}, eps)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"generalized_attention": True}, {"ff_glu": True}], ids=str
)
def test_gradients(options, causal):
    """Of tensors, which a state dict of PyTorch has."""
    theirs, model, params = language_model(causal=causal, **options)
    rng = np.random.default_rng(2)
    tokens, weight = rng.integers(0, 17, (2, 30)), rng.standard_normal((2, 30, 17))
    (theirs(torch.tensor(tokens)) * torch.tensor(weight)).sum().backward()
    _, pullback = model.vjp(params, tokens, key=(0, 0))
    grads = nn.zeros_like(params)
    pullback(weight, grads)
    found = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    block = grads["blocks"]["1"]
    at = "performer.net.layers.1."
    qkv = np.concatenate([found[f"{at}0.fn.to_{n}.weight"] for n in "qkv"])
    for ours, expected in [
        (grads["embedding"]["weight"], found["token_emb.weight"]),
        (grads["positions"]["weight"], found["pos_emb.emb.weight"]),
        (grads["head"]["bias"], found["to_out.bias"]),
        (block["attention"]["branch"]["qkv"]["weight"], qkv),
        (block["attention"]["norm"]["weight"], found[at + "0.norm.weight"]),
        (block["feedforward"]["branch"]["up"]["weight"], found[at + "1.fn.fn.w1.weight"]),
    ]:
        np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-10 * abs(expected).max())


def test_wrapper():
    """Its state dict, its loss, which ignores token 0, and the most likely tokens."""
    theirs, *_ = language_model(causal=True)
    whole = wrapper.AutoregressiveWrapper(theirs)
    model, params = load(whole.state_dict(), LM | {"causal": True, "rotary_position_emb": False})
    tokens = np.random.default_rng(3).integers(0, 17, (2, 40))
    assert (tokens[:, 1:] == 0).any()
    loss, _ = nn.cross_entropy(model.apply(params, tokens[:, :-1]), tokens[:, 1:], ignore=0)
    assert loss == pytest.approx(whole(torch.tensor(tokens)).item(), rel=1e-10)
    prompt = tokens[:, :7]
    expected = whole.generate(torch.tensor(prompt), 20, filter_thres=0.93)  # one of 17 is kept
    found = model.generate(params, prompt, 20, temperature=0)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_mask(causal, shift):
    """It sets values to zero, and what comes from masked rows, as in the package."""
    theirs, model, params = language_model(causal=causal, shift_tokens=shift)
    tokens, mask = (
        np.random.default_rng(4).integers(0, 17, (2, 20)),
        np.arange(40).reshape(2, 20) % 3 > 0,
    )
    expected = theirs(torch.tensor(tokens), mask=torch.tensor(mask))
    found, pullback = model.vjp(params, tokens, mask=mask, key=(0, 0))
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-10)
    weight = np.random.default_rng(5).standard_normal(found.shape)
    (expected * torch.tensor(weight)).sum().backward()
    grads = nn.zeros_like(params)
    pullback(weight, grads)
    expected = theirs.token_emb.weight.grad.numpy()
    np.testing.assert_allclose(grads["embedding"]["weight"], expected, rtol=1e-8, atol=1e-10)


def test_a_grid_of_positions_is_cut_to_the_length_of_the_model():
    kwargs = {"causal": True, "axial_position_emb": True, "axial_position_shape": (7, 6)}
    _, model, params = language_model(**kwargs)
    assert model.length == LM["max_seq_len"] == len(params["positions"]["weight"])
    with pytest.raises(ValueError, match="at most 40 positions, got 41"):
        model.apply(params, np.zeros((1, 41), int))


def test_kernel_functions():
    kwargs = LM | {"generalized_attention": True}
    state = original("PerformerLM", kwargs).state_dict()
    functions = torch.relu, torch.nn.functional.relu
    texts = "ReLU", "nn.ReLU()", "torch.nn.ReLU(inplace=True)"
    for relu in (torch.nn.ReLU(), torch.nn.ReLU, *functions, *texts):
        load(state, kwargs | {"kernel_fn": relu})
    for other in (torch.nn.ELU(), torch.nn.GELU, "ELU", "nn.LeakyReLU(0.1)"):
        with pytest.raises(ValueError, match=r"kernel_fn=.*E?LU is not supported"):
            load(state, kwargs | {"kernel_fn": other})


@pytest.mark.parametrize(
    "options",
    [{"local_attn_heads": (1, 0)}, {"reversible": True}, {"no_projection": True}],
    ids=str,
)
def test_what_is_not_supported_is_named(options):
    kwargs = SMALL | options
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is not supported"):
        load(original("Performer", kwargs).state_dict(), kwargs, name="Performer")


def test_the_example_of_the_page(tmp_path, monkeypatch):
    """docs/performer-pytorch.md: the two pieces of code, one after the other."""
    page = Path(__file__).parents[2] / "docs" / "performer-pytorch.md"
    writing, reading = re.findall("```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    wrote, read = {}, {}
    exec(writing, wrote)
    exec(reading, read)
    tokens = torch.from_numpy(read["tokens"].astype(np.int64))[None]
    right = wrote["model"].eval()(tokens)[0].detach().numpy()
    original_model, params = loader.load("model.safetensors", "model.json")
    np.testing.assert_allclose(original_model.apply(params, read["tokens"]), right, atol=1e-4)
    assert read["logits"].shape == right.shape
    assert len(read["text"]) == 200
