"""Every layer and model: its gradients are those of finite differences, in every parameter."""

import re

import numpy as np
import pytest
from support.gradients import check, double

from favor_np import nn

RNG = np.random.default_rng(3)
ROWS = RNG.standard_normal((2, 9, 8))
WIDE = RNG.standard_normal((2, 70, 32))  # whole vectors, and more rows than a block has
HEADS = RNG.standard_normal((2, 4, 9, 6))
TOKENS = RNG.integers(0, 11, (2, 9))
SMALL = {"num_features": 12}

LAYERS = {
    "linear": (nn.Linear(8, 5), ROWS),
    "linear without bias": (nn.Linear(8, 5, bias=False), ROWS),
    "embedding": (nn.Embedding(11, 5), TOKENS),
    "layer norm": (nn.LayerNorm(8), ROWS),
    "layer norm without bias": (nn.LayerNorm(8, bias=False), ROWS),
    "rms norm": (nn.RMSNorm(8), ROWS),
    "scale norm": (nn.ScaleNorm(8), ROWS),
    "unit scale": (nn.UnitScale(4), HEADS),
    "unit scale, shared": (nn.UnitScale(2), HEADS),
    "unit scale, two bounds": (nn.UnitScale(2, (2.0, 16.0)), HEADS),
    "rotary adjacent": (nn.Rotary(6), HEADS),
    "rotary halves": (nn.Rotary(6, "halves"), HEADS),
    "learned positions": (nn.LearnedPositions(12, 8), ROWS),
    "sinusoidal positions": (nn.SinusoidalPositions(8), ROWS),
    "layer norm of vectors": (nn.LayerNorm(32), WIDE),
    "layer norm of vectors, shifted": (
        nn.Residual(nn.Linear(32, 32), nn.LayerNorm(32), nn.ShiftTokens()),
        WIDE,
    ),
    "layer norm, shifted": (nn.Residual(nn.Linear(8, 8), nn.LayerNorm(8), nn.ShiftTokens()), ROWS),
    "rms norm of vectors, shifted": (
        nn.Residual(nn.Linear(32, 32), nn.RMSNorm(32), nn.ShiftTokens()),
        WIDE,
    ),
    "shift": (nn.ShiftTokens(), ROWS),
    "shift both ways": (nn.ShiftTokens(causal=False), ROWS),
    "sum": (nn.Sum((nn.Linear(8, 3), nn.Chain((nn.Linear(8, 4), nn.Linear(4, 3))))), ROWS),
    "chain": (nn.Chain((nn.Linear(8, 4), nn.RMSNorm(4), nn.Linear(4, 3))), ROWS),
    "residual": (nn.Residual(nn.Linear(8, 8), nn.RMSNorm(8), nn.ShiftTokens(), gate=True), ROWS),
    **{
        f"feed-forward {name}": (nn.FeedForward(8, 10, name), ROWS)
        for name in ("gelu", "gelu_tanh", "relu", "relu2", "geglu", "swiglu")
    },
}
ATTENTION = {
    "causal": {},
    "both ways": {"causal": False},
    "free": {"qk": None},
    "rotary": {"rotary": "adjacent"},
    "grouped": {"kv_heads": 2, "rotary": "halves"},
    "wide heads": {"dim_head": 6, "bias": True},
    "decay": {"decay": (0.9, 0.99, 1.0, 0.5)},
    "one decay": {"decay": 0.9},
    "relu": {"kind": "relu", "qk": None},
    "elu": {"kind": "elu", "qk": None},
    "plain": {"antithetic": False, "num_features": 7},
    "exact": {"exact": True},
    "exact with decay": {"exact": True, "decay": (0.9, 0.5), "kv_heads": 2},
    "local": {"local_heads": 1, "window": 3, "decay": (0.9, 0.99, 1.0), "rotary": "adjacent"},
    "local both ways": {"local_heads": 2, "kv_heads": 2, "window": 2, "causal": False},
    "local, free": {"local_heads": 3, "window": 1, "qk": None, "exact": True},
    "exact both ways": {"exact": True, "causal": False, "kv_heads": 2, "qk": None},
}
MODELS = {
    "encoder": nn.Performer(dim=8, depth=2, heads=2, num_features=12),
    "rezero": nn.Performer(dim=8, depth=2, heads=2, num_features=12, norm=None, gate=True),
    "shifted": nn.Performer(
        dim=8, depth=1, heads=2, num_features=12, norm="layer", shift=True, qkv_bias=True, bias=True
    ),
    "no last norm": nn.Performer(
        dim=8, depth=1, heads=2, num_features=12, norm="scale", final_norm=False, activation="geglu"
    ),
}
LANGUAGE = {
    "usual": {},
    "mixed": {"layers": "FE", "depth": 2},
    "exact": {"exact": True},
    "untied": {"tied": False, "positions": "learned", "rotary": None, "length": 9, "bias": True},
    "sinusoidal": {
        "positions": "sinusoidal",
        "norm": "scale",
        "final_norm": "layer",
        "activation": "swiglu",
    },
}


@pytest.mark.parametrize(("layer", "x"), LAYERS.values(), ids=LAYERS)
def test_layers(layer, x):
    check(layer, x)


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention(options):
    check(nn.FavorSelfAttention(8, 4, **SMALL | options), ROWS)


@pytest.mark.parametrize("rotary", [None, "adjacent", "halves"])
def test_attention_of_whole_vectors(rotary):
    check(nn.FavorSelfAttention(32, 2, 16, kv_heads=1, rotary=rotary), WIDE)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"causal": True}])
def test_attention_with_a_mask(options):
    mask = np.ones((2, 9), bool)
    mask[0, 6:] = mask[1, 2] = False
    check(nn.FavorSelfAttention(8, 4, **{"causal": False, **SMALL} | options), ROWS, mask=mask)


@pytest.mark.parametrize("model", [MODELS["encoder"], nn.PerformerLM(
    vocab=11, dim=8, depth=1, heads=2, num_features=12, causal=False)])  # fmt: skip
def test_models_with_a_mask(model):
    """What is masked changes nothing elsewhere."""
    x = TOKENS if isinstance(model, nn.PerformerLM) else ROWS
    mask = np.ones((2, 9), bool)
    mask[:, 7:] = False
    check(model, x, mask=mask)
    other, params = x.copy(), double(model)
    other[:, 7:] = 0
    model = model.replace(shift=False)
    one, two = (model.apply(params, each, mask=mask)[:, :7] for each in (x, other))
    np.testing.assert_allclose(one, two, rtol=1e-12)


DEFAULTS = {
    "linear": (nn.Linear(4, 3), {"weight": (3, 4), "bias": (3,)}),
    "feed-forward": (
        nn.FeedForward(2),
        {"up.weight": (8, 2), "up.bias": (8,), "down.weight": (2, 8), "down.bias": (2,)},
    ),
    "layer norm": (nn.LayerNorm(2), {"weight": (2,), "bias": (2,)}),
}


@pytest.mark.parametrize(("layer", "expected"), DEFAULTS.values(), ids=DEFAULTS)
def test_parameters_without_options(layer, expected):
    params = layer.init(np.random.default_rng(0))
    assert {name: array.shape for name, array in nn.leaves(params)} == expected


def test_a_learned_projection():
    layer = nn.FavorSelfAttention(8, 2, 12, learn_projection=True)
    check(layer, ROWS, fixed=())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_encoders(model):
    check(model, ROWS)


@pytest.mark.parametrize("options", LANGUAGE.values(), ids=LANGUAGE)
def test_language_models(options):
    model = nn.PerformerLM(**{"vocab": 11, "dim": 8, "depth": 1, "heads": 2, **SMALL} | options)
    check(model, TOKENS)


def test_dropout_has_the_gradient_of_its_mask():
    model = nn.PerformerLM(
        vocab=11, dim=8, depth=1, heads=2, num_features=12, dropout=0.3, embedding_dropout=0.2
    )
    check(model, TOKENS, key=(0, 1))


def test_pullbacks_add():
    layer = nn.Block(nn.FavorSelfAttention(8, 2, 12), nn.FeedForward(8, 10), shift=True)
    params = double(layer)
    once, twice = nn.zeros_like(params), nn.zeros_like(params)
    _, pullback = layer.vjp(params, ROWS)
    pullback(ROWS, once)
    for _ in range(2):
        pullback(ROWS, twice)
    for (name, a), (_, b) in zip(nn.leaves(once), nn.leaves(twice), strict=True):
        np.testing.assert_allclose(b, 2 * a, rtol=1e-12, atol=1e-15, err_msg=name)


LOSSES = {
    "cross entropy": (nn.cross_entropy, (2, 3, 5), RNG.integers(0, 5, (2, 3)), {}),
    "cross entropy, some ignored": (nn.cross_entropy, (4, 5), np.array([1, -1, 2, -1]),
                                    {"ignore": -1}),
    "mean squared": (nn.mean_squared, (2, 3), RNG.standard_normal((2, 3)), {}),
    "gaussian": (nn.gaussian, (4, 2), RNG.standard_normal(4), {}),
    "quantile": (nn.quantile, (4, 3), RNG.standard_normal(4), {"levels": [0.1, 0.5, 0.9]}),
    "qlike": (nn.qlike, (2, 3), RNG.standard_normal((2, 3)) ** 2, {}),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "shape", "targets", "options"), LOSSES.values(), ids=LOSSES)
def test_losses(loss, shape, targets, options):
    output = RNG.standard_normal(shape)
    _, grad = loss(output, targets, **options)
    for at in np.ndindex(*shape):
        step = np.zeros(shape)
        step[at] = 1e-6
        ends = [loss(output + sign * step, targets, **options)[0] for sign in (1, -1)]
        assert grad[at] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", [name for name, (layer, _) in LAYERS.items() if layer.init(RNG)])
def test_a_gradient_has_the_shape_of_the_output(name):
    """One that would be broadcast, or has as many numbers, is refused before anything is added."""
    layer, x = LAYERS[name]
    for each in (layer, nn.Chain((layer,))):
        params = each.init(np.random.default_rng(0))
        y, pullback = each.vjp(params, x)
        grads = nn.zeros_like(params)
        for shape in (y.shape[1:], (1, *y.shape), (1, *y.shape[1:]), (y[..., 0].size, y.shape[-1])):
            message = f"grad_y must have shape {y.shape}, got {shape}"
            with pytest.raises(ValueError, match=re.escape(message)):
                pullback(np.ones(shape, y.dtype), grads)
        assert not any(array.any() for _, array in nn.leaves(grads))
