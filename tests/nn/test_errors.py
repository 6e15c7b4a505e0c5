"""Bad input: an error that names layer and parameter, before anything is computed."""

import numpy as np
import pytest
from support.gradients import at

from favor_np import nn

MODEL = nn.PerformerLM(vocab=11, dim=8, depth=2, heads=2, num_features=12)
TOKENS = np.arange(10)


def params():
    return MODEL.init(np.random.default_rng(0))


def spoiled(name, value):
    tree = params()
    path, _, last = name.rpartition(".")
    node = at(tree, path)
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


PARAMETERS = {
    "missing": ("blocks.1.attention.branch.qkv.weight", None,
                r"^blocks\.1\.attention\.branch\.qkv\.weight must be an array of shape \(24, 8\)"),
    "shape": ("blocks.0.feedforward.branch.up.weight", np.ones((3, 8)),
              r"^blocks\.0\.feedforward\.branch\.up\.weight must have shape \(32, 8\), got \(3, 8\)"),
    "dtype": ("norm.weight", np.ones(8, np.int64),
              r"^norm\.weight must hold float32 or float64, got an array .* int64"),
    "list": ("norm.weight", [1.0] * 8, r"^norm\.weight must hold float32 or float64, got \[1"),
    "projection": ("blocks.0.attention.branch.projection", None,
                   r"^blocks\.0\.attention\.branch\.projection must be an array of shape \(6, 4\)"),
    "embedding": ("embedding.weight", np.ones((12, 8)),
                  r"^embedding\.weight must have shape \(11, 8\), got \(12, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters(name, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MODEL.vjp(spoiled(name, value), TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 11], r"^embedding\.tokens must be from 0 to 10, got 11"),
        ([-1, 3], r"^embedding\.tokens must be from 0 to 10, got -1"),
        ([0.5, 1], r"^embedding\.tokens must hold integers"),
        (np.zeros((3, 0), int), r"^embedding\.tokens must not be empty, got shape \(3, 0\)"),
    ],
)
def test_tokens(tokens, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MODEL.vjp(params(), tokens)


def test_rows():
    model = nn.Performer(dim=8, depth=1, heads=2, num_features=12)
    tree = model.init(np.random.default_rng(0))
    with pytest.raises(
        ValueError, match=r"^blocks\.0\.attention\.norm\.x must have shape \(\.\.\., 8\)"
    ):
        model.vjp(tree, np.ones((5, 7)))
    with pytest.raises(
        ValueError, match=r"^blocks\.0\.attention\.branch\.x must have shape .*L > 0"
    ):
        model.vjp(tree, np.ones((0, 8)))
    _, pullback = model.vjp(tree, np.ones((5, 8)))
    with pytest.raises(ValueError, match=r"grad_y must have shape \(5, 8\), got \(5, 7\)"):
        pullback(np.ones((5, 7)), nn.zeros_like(tree))


OPTIONS = {
    "heads": (lambda: nn.PerformerLM(vocab=5, dim=8, depth=1, heads=3), "multiple of heads"),
    "kv_heads": (lambda: nn.FavorSelfAttention(8, 4, kv_heads=3), "multiple of kv_heads"),
    "depth": (lambda: nn.Performer(dim=8, depth=0, heads=2), "depth must be at least 1"),
    "vocab": (lambda: nn.PerformerLM(vocab=0, dim=8, depth=1, heads=2), "vocab must be at least 1"),
    "layers": (lambda: nn.Performer(dim=8, depth=1, heads=2, layers="FX"), "string of F and E"),
    "kind": (lambda: nn.Performer(dim=8, depth=1, heads=2, kind="trig"), "kind must be one of"),
    "activation": (lambda: nn.Performer(dim=8, depth=1, heads=2, activation="x"), "activation must"),
    "norm": (lambda: nn.Performer(dim=8, depth=1, heads=2, norm="x"), "norm must be one of"),
    "last norm": (lambda: nn.Performer(dim=8, depth=1, heads=2, final_norm="x"), "final_norm must be"),
    "features": (lambda: nn.FavorSelfAttention(8, 2, 7), "num_features must be even"),
    "decay": (lambda: nn.FavorSelfAttention(8, 2, causal=False, decay=0.9), "decay needs causal"),
    "decay above 1": (lambda: nn.FavorSelfAttention(8, 2, decay=(0.9, 3.0)), "and at most 1"),
    "decays": (lambda: nn.Performer(dim=8, depth=1, heads=2, causal=True, decay=(0.9,) * 3), r"\(2\)"),
    "decays of near heads": (
        lambda: nn.FavorSelfAttention(16, 4, local_heads=2, decay=(0.9,) * 4),
        r"for each head of keys that is not local \(2\), got shape \(4,\)",
    ),
    "qk": (lambda: nn.FavorSelfAttention(8, 2, qk="rms"), "qk must be 'sphere' or None"),
    "dropout": (lambda: nn.Dropout(1.0), "rate must be at least 0 and less than 1, got 1.0"),
    "rotary": (lambda: nn.Rotary(5), "dim must be even, got 5"),
    "pairs": (lambda: nn.Rotary(6, "thirds"), "pairs must be one of 'adjacent', 'halves'"),
    "rate": (lambda: nn.constant(-1.0), "rate must be finite and greater than 0"),
    "betas": (lambda: nn.AdamW(params(), betas=(0.9, 1.0)), "betas must be at least 0"),
    "frozen": (lambda: nn.AdamW(params(), frozen=("block",)), "got 'block'"),
    "no parameters": (lambda: nn.AdamW({}), "params must hold at least one array"),
    "mixed": (lambda: nn.AdamW({"a": np.ones(2), "b": np.ones(2, np.float32)}), "b must have the dty"),
    "integers": (lambda: nn.AdamW({"a": {"b": np.ones(2, int)}}), "a.b must be float32 or float64"),
    "key": (lambda: nn.Dropout(0.5).vjp({}, np.ones(3), key=(0, -1)), "key must be at least 0"),
    "positions": (lambda: nn.LearnedPositions(3, 2).vjp({"weight": np.ones((3, 2))}, np.ones((4, 2))),
                  "x must have at most 3 positions, got 4"),
    "heads of x": (lambda: nn.UnitScale(3).vjp({"radius": np.ones(3)}, np.ones((4, 2, 2))),
                   r"x must have shape \(\.\.\., 3, L, d\), got \(4, 2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


LOGITS = np.zeros((2, 3))
LOSSES = {
    "range": (lambda: nn.cross_entropy(LOGITS, [0, 3]), "targets must be from 0 to 2, got 3"),
    "shape": (lambda: nn.cross_entropy(LOGITS, [0]), r"targets must have shape \(2,\), got \(1,\)"),
    "one logit": (lambda: nn.cross_entropy(0.5, 0), "logits must have at least 1 axes"),
    "floats": (lambda: nn.cross_entropy(LOGITS, [0.0, 1.0]), "targets must hold integers"),
    "all ignored": (lambda: nn.cross_entropy(LOGITS, [1, 1], ignore=1), "at least one that counts"),
    "none": (lambda: nn.cross_entropy(np.zeros((0, 3)), np.zeros(0, int)), "at least one"),
    "shapes": (lambda: nn.mean_squared([1.0], [1.0, 2.0]), r"must have the shape \(1,\) of output"),
    "empty": (lambda: nn.qlike([], []), "not empty"),
    "negative": (lambda: nn.qlike([0.0], [-1.0]), "targets must be at least 0, got -1"),
    "pairs": (lambda: nn.gaussian([[1.0]], [1.0]), r"output must have shape \(\.\.\., 2\)"),
    "levels": (lambda: nn.quantile([[1.0]], [1.0], [1.5]), "levels must be between 0 and 1"),
    "quantiles": (lambda: nn.quantile([[1.0]], [1.0], [0.1, 0.5]), r"must have shape \(\.\.\., 2\)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), LOSSES.values(), ids=LOSSES)
def test_losses(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
