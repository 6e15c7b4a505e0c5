"""Models of favor_np.nn against twins in PyTorch: gradients tensor by tensor, and 50 steps."""

import numpy as np
import pytest
from support import bridges

from favor_np import nn

torch = bridges.require("torch")
F = torch.nn.functional


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of products in the same order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Twin:
    """The same language model, written in PyTorch from its parameters."""

    def __init__(self, model, params):
        self.model = model
        self.params = {
            name: torch.tensor(array, requires_grad=not name.endswith("projection"))
            for name, array in nn.leaves(params)
        }

    def __call__(self, tokens):
        m, p = self.model, self.params
        x = F.embedding(torch.tensor(tokens), p["embedding.weight"])
        if m.positions == "learned":
            x = x + p["positions.weight"][: x.shape[1]]
        for i in range(m.depth):
            at = f"blocks.{i}."
            exact = m.exact or (m.layers * m.depth)[i] == "E"
            x = x + self.attention(self.before(x, at + "attention."), at, exact)
            x = x + self.feedforward(self.before(x, at + "feedforward."), at)
        x = self.norm(x, "norm.")
        if m.tied:
            return x @ p["embedding.weight"].T
        return self.linear(x, "head.")

    def linear(self, x, name):
        return F.linear(x, self.params[name + "weight"], self.params.get(name + "bias"))

    def norm(self, x, name):
        weight = self.params[name + "weight"]
        if self.model.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, self.params[name + "bias"])
        if self.model.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
        return x / x.norm(dim=-1, keepdim=True) * weight

    def before(self, x, name):
        x = self.norm(x, name + "norm.")
        if self.model.shift:
            half = x.shape[-1] // 2
            x = torch.cat([x[..., :half], F.pad(x[..., half:], (0, 0, 1, -1))], -1)
        return x

    def rotate(self, x):
        length, dim = x.shape[-2:]
        angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, dim, 2) / dim).double()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def attention(self, x, at, exact):
        m, at = self.model, at + "attention.branch."
        heads = self.linear(x, at + "qkv.").unflatten(-1, (-1, m.dim // m.heads)).transpose(1, 2)
        kv = m.kv_heads or m.heads
        q, k, v = heads.split([m.heads, kv, kv], 1)
        radius = self.params.get(at + "sphere.radius")
        scale = 1.0 if radius is not None else (m.dim // m.heads) ** -0.5
        if radius is not None:
            length = (2 * torch.sigmoid(radius)).sqrt()[:, None, None]
            q = F.normalize(q, dim=-1) * length.repeat_interleave(m.heads // kv, 0)
            k = F.normalize(k, dim=-1) * length
        if m.rotary:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(m.heads // kv, 1) for t in (k, v))
        if exact:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            w = self.params[at + "projection"] * scale**0.5
            w = torch.cat([w, -w])
            query, key = ((t @ w.T - scale / 2 * t.square().sum(-1, True)).exp() for t in (q, k))
            weights = (query @ key.transpose(-1, -2)).tril()
            out = weights / weights.sum(-1, keepdim=True) @ v
        return self.linear(out.transpose(1, 2).flatten(-2), at + "output.")

    def feedforward(self, x, at):
        at += "feedforward.branch."
        x = self.linear(x, at + "up.")
        if self.model.activation == "swiglu":
            a, b = x.chunk(2, -1)
            x = F.silu(a) * b
        elif self.model.activation == "geglu":
            a, b = x.chunk(2, -1)
            x = F.gelu(a) * b
        else:
            x = {"gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
                 "relu2": lambda t: F.relu(t) ** 2}[self.model.activation](x)  # fmt: skip
        return self.linear(x, at + "down.")


SIZES = {"vocab": 13, "dim": 16, "depth": 2, "heads": 4, "num_features": 32}
MODELS = {
    "exact": {"exact": True},
    "favor": {},
    "mixed": {"layers": "FE", "norm": "layer", "bias": True, "activation": "gelu_tanh"},
    "free": {"qk": None, "rotary": None, "positions": "learned", "length": 24, "tied": False,
             "shift": False, "activation": "swiglu"},
    "grouped": {"kv_heads": 2, "norm": "scale", "activation": "geglu", "qkv_bias": True},
    "squares": {"activation": "relu2"},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 2, (50, 3, 21))
for i in range(1, 21):  # so that there is something to learn
    TOKENS[..., i] = (3 * TOKENS[..., i - 1] + TOKENS[..., i]) % 13


def made(options, dtype, std):
    """A model, and parameters whose zeros have become small numbers."""
    model, rng = nn.PerformerLM(**SIZES | options), np.random.default_rng(1)
    params = nn.astype(model.init(rng), dtype)
    for name, array in nn.leaves(params):
        if not name.endswith("projection"):
            array += std * rng.standard_normal(array.shape)
    return model, params


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_gradient(options):
    model, params = made(options, np.float64, 0.1)
    twin, grads, tokens = Twin(model, params), nn.zeros_like(params), TOKENS[0]
    logits, pullback = model.vjp(params, tokens[:, :-1])
    loss, grad = nn.cross_entropy(logits, tokens[:, 1:])
    pullback(grad, grads)
    theirs = twin(tokens[:, :-1])
    np.testing.assert_allclose(logits, theirs.detach(), atol=1e-12)
    right = F.cross_entropy(theirs.flatten(0, 1), torch.tensor(tokens[:, 1:].ravel()))
    assert loss == pytest.approx(right.item(), rel=1e-13)
    right.backward()
    for name, found in nn.leaves(grads):
        if not name.endswith("projection"):
            wanted = twin.params[name].grad.numpy()
            limit = 1e-11 * abs(wanted).max()
            np.testing.assert_allclose(found, wanted, atol=limit, rtol=0, err_msg=name)


@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-9), (np.float32, 1e-3)])
@pytest.mark.parametrize("options", [MODELS["exact"], MODELS["favor"]], ids=["exact", "favor"])
def test_fifty_steps(options, dtype, limit):
    """With warm-up, clipping and weight decay."""
    model, params = made(options, dtype, 0.02)
    twin, optimizer = Twin(model, params), nn.AdamW(params, weight_decay=0.1)
    rate = nn.cosine(0.01, steps=50, warmup=5)
    learned = [p for p in twin.params.values() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in learned if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step, tokens in enumerate(TOKENS):
        logits, pullback = model.vjp(params, tokens[:, :-1], key=(0, step))
        loss, grad = nn.cross_entropy(logits, tokens[:, 1:])
        pullback(grad, optimizer.grads)
        norm = optimizer.step(rate(step), clip=0.5)
        right = F.cross_entropy(
            twin(tokens[:, :-1]).flatten(0, 1), torch.tensor(tokens[:, 1:].ravel())
        )
        theirs.zero_grad()
        right.backward()
        for group in theirs.param_groups:
            group["lr"] = rate(step)
        size = torch.nn.utils.get_total_norm([p.grad for p in learned])
        assert norm == pytest.approx(size.item(), rel=100 * limit)
        for p in learned:  # torch's own clipping has an epsilon
            p.grad *= min(1.0, 0.5 / size)
        theirs.step()
        assert abs(loss - right.item()) < limit, step
    assert loss < 0.8 * np.log(13)
