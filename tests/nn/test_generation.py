"""Generation: token by token, the logits are those of the whole text at once."""

import numpy as np
import pytest

from favor_np import nn

SIZES = {"vocab": 19, "dim": 16, "depth": 2, "heads": 4, "num_features": 32}
MODELS = {
    "usual": {},
    "exact": {"exact": True},
    "mixed": {"layers": "FE", "rotary": "halves"},
    "grouped": {"kv_heads": 2},
    "grouped exact": {"kv_heads": 2, "exact": True},
    "decay": {"decay": 0.9},
    "exact with decay": {"decay": (0.9, 1.0), "exact": True, "kv_heads": 2},
    "local": {"local_heads": 2, "window": 9, "kv_heads": 2, "decay": 0.9},
    "local, a window of one": {"local_heads": 1, "window": 1, "layers": "FE"},
    "learned": {"positions": "learned", "length": 64, "rotary": None, "shift": False},
    "sinusoidal": {"positions": "sinusoidal", "tied": False, "gate": True, "norm": None},
    "relu": {"kind": "relu", "qk": None},
    "odd": {"dim": 15, "dim_head": 4},
}
TOKENS = np.random.default_rng(0).integers(0, 19, (3, 50))


def made(options, dtype=np.float64):
    model, rng = nn.PerformerLM(**SIZES | options), np.random.default_rng(1)
    params = nn.astype(model.init(rng), dtype)
    for name, array in nn.leaves(params):
        if not name.endswith("projection"):
            array += 0.1 * rng.standard_normal(array.shape)
    return model, params


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("pieces", [[50], [1] * 50, [20, *[1] * 10, 7, 1, 12]], ids=str)
def test_piece_by_piece(options, pieces):
    model, params = made(options)
    state, ends = {}, np.cumsum(pieces)
    found = [
        model.extend(params, state, TOKENS[:, end - count : end])
        for end, count in zip(ends, pieces, strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(found, 1), model.apply(params, TOKENS), atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_prepared_it_is_the_same(options, dtype):
    """Token by token and several at a time, from and to a state that `extend` has changed."""
    model, params = made(options, dtype)
    step, whole = model.prepare(params), model.apply(params, TOKENS)
    atol = 1e-11 if dtype == np.float64 else 1e-4
    state = {}
    model.extend(params, state, TOKENS[:, :7])
    for i in range(7, 40):
        y = step(state, TOKENS[:, i, None])
        assert (y.shape, y.dtype) == ((3, 1, 19), dtype)
        np.testing.assert_allclose(y[:, 0], whole[:, i], atol=atol)
    np.testing.assert_allclose(step(state, TOKENS[:, 40:45]), whole[:, 40:45], atol=atol)
    last = model.extend(params, state, TOKENS[:, 45:])
    np.testing.assert_allclose(last, whole[:, 45:], atol=atol)


def test_layers_of_ones_own_are_prepared_as_they_extend():
    """Also where they inherit from layers that prepare something else."""

    class Twice(nn.Linear):
        def vjp(self, params, x, *, key=None):
            y, pullback = super().vjp(params, x, key=key)
            return 2 * y, lambda grad, grads: pullback(2 * grad, grads)

    class Backwards(nn.Chain):
        def extend(self, params, state, x):
            for name, layer in reversed(self.parts.items()):
                x = layer.extend(params[name], state.setdefault(name, {}), x)
            return x

    for layer in (Twice(4, 4), Backwards((nn.Linear(4, 4), nn.RMSNorm(4)))):
        chain = nn.Chain((layer, nn.Linear(4, 2)))
        params, x = chain.init(np.random.default_rng(0)), np.ones((3, 1, 4), np.float32)
        found = chain.prepare(params)({}, x)
        np.testing.assert_allclose(found, chain.extend(params, {}, x), rtol=1e-6)


def test_what_is_prepared_is_checked_first():
    model, params = made({})
    params["blocks"]["1"]["attention"]["branch"]["qkv"]["weight"] = np.ones((3, 3))
    with pytest.raises(ValueError, match=r"^blocks\.1\.attention\.branch\.qkv\.weight must have"):
        model.prepare(params)


def test_the_most_likely_tokens_are_those_of_the_whole_text():
    model, params = made({})
    new = model.generate(params, TOKENS[:, :10], 20, temperature=0)
    assert (new.shape, new.dtype) == ((3, 20), np.uint8)
    text = np.concatenate([TOKENS[:, :10], new], 1)
    assert (model.apply(params, text).argmax(-1)[:, 9:-1] == new).all()


def test_at_a_tiny_temperature_the_most_likely_is_drawn():
    model, params = made({})
    new = model.generate(params, TOKENS[:, :10], 20, temperature=0)
    cold = model.generate(params, TOKENS[:, :10], 20, temperature=1e-320, top_k=7)
    np.testing.assert_array_equal(cold, new)


def test_a_seed_and_a_row_decide():
    """A row of a batch is what it would be alone at the first place, and two rows differ."""
    model, params = made({})
    one = model.generate(params, TOKENS[0], 30, seed=3)
    prompts = np.stack([TOKENS[0], TOKENS[0]])
    batch = model.generate(params, prompts, 30, seed=3)
    assert (batch[0] == one).all()
    assert (batch[1] != one).any()
    assert (model.generate(params, TOKENS[0], 30, seed=4) != one).any()


def test_tokens_are_drawn_as_often_as_their_logits_say():
    model, params = made({}, np.float32)
    prompts = np.broadcast_to(TOKENS[0], (20_000, 50))[:, :3]
    logits = model.apply(params, TOKENS[0, :3])[-1].astype(np.float64) / 0.7
    for top_k in (None, 4):
        drawn = model.generate(params, prompts, 1, temperature=0.7, top_k=top_k)[:, 0]
        if top_k:
            logits[np.argsort(logits)[:-4]] = -np.inf
        chance = np.exp(logits - logits.max())
        chance /= chance.sum()
        share = np.bincount(drawn, minlength=19) / len(drawn)
        assert (share[chance == 0] == 0).all()
        assert (abs(share - chance) <= 5 * np.sqrt(chance / len(drawn))).all()


def test_bytes():
    model = nn.PerformerLM(vocab=256, dim=16, depth=1, heads=2, num_features=16)
    params = model.init(np.random.default_rng(0))
    text = bytes(model.generate(params, b"to be or not", 12))
    assert len(text) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 30], 5), "prompt must be from 0 to 18, got 30"),
        (([], 5), "prompt must (not be empty|hold integers)"),
        (([[[1]]], 5), r"prompt must have shape \(L,\) or \(batch, L\), got \(1, 1, 1\)"),
        (([1], -1), "length must be at least 0, got -1"),
        (([1], 5, -1.0), "temperature must be finite and at least 0, got -1"),
        (([1], 5, 1.0, 0), "top_k must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    model, params = made({})
    prompt, length, *more = arguments
    options = dict(zip(("temperature", "top_k"), more, strict=False))
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(params, prompt, length, **options)


def test_no_token_is_generated_where_positions_end():
    """As many as fit; the last one is not read, so it needs no position."""
    model, params = made(MODELS["learned"] | {"length": 12})
    assert model.generate(params, TOKENS[:, :10], 3).shape == (3, 3)
    with pytest.raises(ValueError, match=r"length must be at most 3 after 10 tokens.*got 4"):
        model.generate(params, TOKENS[:, :10], 4)


def test_a_model_that_looks_ahead_cannot_generate():
    model, params = made({"causal": False})
    with pytest.raises(ValueError, match="causal must be True to go on"):
        model.generate(params, [1, 2], 3)
