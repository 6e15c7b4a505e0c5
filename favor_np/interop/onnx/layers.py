"""Layers of `favor_np.nn` in ONNX operators."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from favor_np import nn, validation
from favor_np.interop.onnx import forms
from favor_np.interop.onnx.graph import BOOL, DOUBLE, TYPES, Graph, end
from favor_np.nn.feedforward import _Activation
from favor_np.nn.layer import Layer, leaf, within
from favor_np.nn.tree import Params

Array: TypeAlias = npt.NDArray[Any]

#: Squares of vectors count as this much at least, so that nothing is divided by zero.
TINY = float(np.finfo(np.float32).tiny)
#: Of the polynomial that the error function of float64 is made of.
ERF_DEGREE = 27
#: The logit of a key that a query does not see.
HIDDEN = -1e30


def _innermost(layer: Layer) -> Iterator[Layer]:
    """Go through the layers that have no parts, in their order."""
    if not layer.parts:
        yield layer
    for each in layer.parts.values():
        yield from _innermost(each)


class Rows(NamedTuple):
    """The name of rows (batch, positions, width)."""

    name: str
    width: int


class Writer:
    """A graph of a model that is being written, and what its layers share."""

    def __init__(self, g: Graph, form: str, *, goes_on: bool, masked: bool) -> None:
        self.g, self.form, self.goes_on, self.masked = g, form, goes_on, masked
        self.ends: tuple[list[Any], list[Any]] = [], []
        self.fingerprints: list[str] = []
        self.layers = {"attention": 0, "row": 0}
        self._turns: dict[tuple[Any, ...], tuple[str, str]] = {}
        self._input = ""

    def input(self, model: Layer) -> Rows:
        """Declare what goes in."""
        same = nn.Dropout, nn.ShiftTokens  # what goes out is as wide as what goes in
        first = next((x for x in _innermost(model) if not isinstance(x, same)), model)
        if isinstance(first, nn.Embedding):
            rows, kind = Rows("tokens", 0), TYPES["int64"]
        else:
            width = getattr(first, "inputs", getattr(first, "dim", None))
            if width is None:
                raise ValueError(f"{type(first).__name__} does not say how long rows are")
            rows, kind = Rows("x", width), self.g.type
        self.takes(rows.name, kind, *((rows.width,) if rows.width else ()))
        if self.masked:
            self.ends[0].append(end("key_mask", BOOL, "batch", "positions"))
        return rows

    def takes(self, name: str, kind: int, *shape: int) -> str:
        """Declare the input that says how many sequences and positions there are."""
        self._input = name
        self.ends[0].append(end(name, kind, "batch", "positions", *shape))
        return name

    def output(self, name: str, x: str, *shape: str | int, kind: int | None = None) -> str:
        """Declare what goes out, under a name."""
        self.g.named(x, name)
        self.ends[1].append(end(name, kind or self.g.type, *shape))
        return name

    def past(self, name: str, *shape: str | int, fill: float = 0.0, kind: int | None = None) -> str:
        """Return what is known of rows before, (batch, ...): an input, or if none, as it begins."""
        if self.goes_on:
            self.ends[0].append(end(f"past_{name}", kind or self.g.type, "batch", *shape))
            return f"past_{name}"
        dtype = helper.tensor_dtype_to_np_dtype(kind or self.g.type)
        full = numpy_helper.from_array(np.full(1, fill, dtype))
        return self.g.ConstantOfShape(
            self.g.Concat(self.batch, np.array(shape, np.int64), axis=0), value=full
        )

    def present(self, name: str, x: str, *shape: str | int, kind: int | None = None) -> str:
        """Hand on what is known now; return its new name."""
        if not self.goes_on:
            return x
        return self.output(f"present_{name}", x, "batch", *shape, kind=kind)

    def write(self, layer: Layer, params: Params, x: Rows) -> Rows:
        """Write a layer; ValueError if it, or an option that is not known here, cannot be."""
        if type(layer) not in WRITERS:
            raise ValueError(f"{type(layer).__name__} cannot be exported as ONNX")
        write, known = WRITERS[type(layer)]
        for field in dataclasses.fields(layer):  # type: ignore[arg-type]
            value = getattr(layer, field.name)
            if field.name not in known.split() and value != field.default:
                raise ValueError(f"{field.name}={value!r} cannot be exported as ONNX")
        return write(self, layer, params, x)

    def part(self, layer: Layer, name: str, params: Params, x: Rows) -> Rows:
        """Write a part of a layer."""
        with within(name):
            return self.write(layer.parts[name], params.get(name, {}), x)

    @functools.cached_property
    def batch(self) -> str:
        """Number of sequences, (1)."""
        return self.g.Gather(self.g.Shape(self._input), [0])

    @functools.cached_property
    def count(self) -> str:
        """Number of positions, (1)."""
        return self.g.Gather(self.g.Shape(self._input), [1])

    @functools.cached_property
    def length(self) -> str:
        """How many tokens came before, (batch)."""
        name = self.past("length", kind=TYPES["int64"])
        self.present("length", self.g.Add(name, self.count), kind=TYPES["int64"])
        return name

    @functools.cached_property
    def positions(self) -> str:
        """The number of each position, (batch or 1, positions) of int64."""
        g = self.g
        numbers = g.Unsqueeze(g.Range(0, g.Squeeze(self.count, [0]), 1), [0])
        return g.Add(g.Unsqueeze(self.length, [1]), numbers) if self.goes_on else numbers

    @functools.cached_property
    def mask(self) -> tuple[str, str]:
        """Which positions may be seen: (batch, positions), and those before included."""
        if not self.goes_on:
            return "key_mask", "key_mask"
        before = self.past("mask", "past_positions", kind=BOOL)
        every = self.g.Concat(before, "key_mask", axis=1)
        return "key_mask", self.present("mask", every, "present_positions", kind=BOOL)

    def turns(self, dim: int, base: float, columns: Array) -> tuple[str, str]:
        """Return cosine and sine of positions times frequencies, (batch or 1, positions, columns).

        Angles are of float64: the sine of a large one is lost in float32.
        """
        key = dim, base, columns.tobytes()
        if key not in self._turns:
            g = self.g
            frequency = (base ** (-np.arange(0, dim, 2) / dim))[columns]
            turn = g.Mul(g.Cast(g.Unsqueeze(self.positions, [2]), to=DOUBLE), frequency)
            half = g.Sin(g.Mul(turn, np.array(0.5)))  # cos of float64 is not everywhere
            cos = g.Sub(np.array(1.0), g.Mul(np.array(2.0), g.Mul(half, half)))
            self._turns[key] = forms.real(g, cos), forms.real(g, g.Sin(turn))
        return self._turns[key]


# --- layers ------------------------------------------------------------------------------------


def in_order(w: Writer, layer: Layer, params: Params, x: Rows) -> Rows:
    """Write the parts of a layer one after the other."""
    for name in layer.parts:
        x = w.part(layer, name, params, x)
    return x


def summed(w: Writer, layer: nn.Sum, params: Params, x: Rows) -> Rows:
    """Write the sum of what the parts of a layer make of its input."""
    first, *rest = (w.part(layer, name, params, x) for name in layer.parts)
    total = first.name
    for each in rest:
        if each.width != first.width:
            raise ValueError(
                f"layers must have outputs of one length, got {first.width} and {each.width}"
            )
        total = w.g.Add(total, each.name)
    return Rows(total, first.width)


def language_model(w: Writer, layer: nn.PerformerLM, params: Params, x: Rows) -> Rows:
    """Write a language model, whose last weight may be that of the embedding."""
    x = in_order(w, layer, params, x)
    if not layer.tied:
        return x
    table = w.g.weight(params["embedding"]["weight"])
    return Rows(w.g.MatMul(x.name, w.g.Transpose(table, perm=[1, 0])), layer.vocab)


def residual(w: Writer, layer: nn.Residual, params: Params, x: Rows) -> Rows:
    """Write a branch that is added to what it comes from."""
    y = in_order(w, layer, params, x).name
    if layer.gate:
        y = w.g.Mul(y, w.g.weight(leaf(params, "gate", (1,))))
    return Rows(w.g.Add(x.name, y), x.width)


def linear(w: Writer, layer: nn.Linear, params: Params, x: Rows) -> Rows:
    """Write a product with a matrix, and a bias."""
    weight = leaf(params, "weight", (layer.outputs, layer.inputs))
    y = w.g.MatMul(x.name, w.g.weight(weight.T))
    if layer.bias:
        y = w.g.Add(y, w.g.weight(leaf(params, "bias", (layer.outputs,))))
    return Rows(y, layer.outputs)


def embedding(w: Writer, layer: nn.Embedding, params: Params, x: Rows) -> Rows:
    """Write the rows of tokens."""
    weight = leaf(params, "weight", (layer.count, layer.dim))
    return Rows(w.g.Gather(w.g.weight(weight), x.name), layer.dim)


def dropout(_w: Writer, _layer: nn.Dropout, _: Params, x: Rows) -> Rows:
    """Write nothing."""
    return x


def activation(w: Writer, layer: _Activation, _: Params, x: Rows) -> Rows:
    """Write a function of every number, or of a half of them, times the other."""
    g, name = w.g, layer.name
    write = ACTIVATIONS.get(name)
    if write is None:
        raise ValueError(f"activation={name!r} cannot be exported as ONNX")
    if name not in ("geglu", "swiglu"):
        return Rows(write(g, x.name), x.width)
    width = x.width // 2
    one, other = g.several("Split", [x.name, [width, width]], 2, axis=2)
    return Rows(g.Mul(write(g, one), other), width)


def gelu(g: Graph, x: str) -> str:
    """Write the exact GELU."""
    y = g.Mul(x, math.sqrt(0.5))
    erf = erf_of_float64(g, y) if g.type == DOUBLE else g.Erf(y)
    return g.Mul(g.Mul(x, 0.5), g.Add(erf, 1.0))


def erf_of_float64(g: Graph, x: str) -> str:
    """Write the error function, which onnxruntime has for float32 only.

    The logarithm of ``(1 - erf(z)) * exp(z * z)``, over the first factor of `t`, is a polynomial in
    t = 2 / (2 + z), z not below 0: right to some units in the last place of 1.
    """
    coefficients = erf_polynomial()
    z = g.Abs(x)
    t = g.Div(2.0, g.Add(z, 2.0))
    u = g.Sub(g.Mul(t, 2.0), 1.0)
    total = g.constant(float(coefficients[-1]))
    for each in coefficients[-2::-1].tolist():
        total = g.Add(g.Mul(total, u), each)
    rest = g.Mul(t, g.Exp(g.Sub(total, g.Mul(z, z))))
    return g.Mul(g.Sign(x), g.Sub(1.0, rest))


@functools.cache
def erf_polynomial() -> Array:
    """Return the coefficients, of powers of 2 t - 1."""
    from scipy.special import erfcx

    u = np.polynomial.chebyshev.chebpts1(ERF_DEGREE + 1)
    t = (u + 1) / 2
    found = np.polynomial.chebyshev.chebfit(u, np.log(erfcx(2 / t - 2) / t), ERF_DEGREE)
    return np.asarray(np.polynomial.chebyshev.cheb2poly(found))


def gelu_tanh(g: Graph, x: str) -> str:
    """Write the usual approximation of GELU."""
    inner = g.Mul(x, g.Add(g.Mul(g.Mul(x, x), 0.044715), 1.0))
    return g.Mul(g.Mul(x, 0.5), g.Add(g.Tanh(g.Mul(inner, math.sqrt(2 / math.pi))), 1.0))


def relu(g: Graph, x: str) -> str:
    """Write ReLU."""
    return g.Max(x, 0.0)


def relu2(g: Graph, x: str) -> str:
    """Write the square of ReLU."""
    y = relu(g, x)
    return g.Mul(y, y)


def silu(g: Graph, x: str) -> str:
    """Write SiLU."""
    return g.Mul(x, g.Sigmoid(x))


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
    "geglu": gelu,
    "swiglu": silu,
}


def layer_norm(w: Writer, layer: nn.LayerNorm, params: Params, x: Rows) -> Rows:
    """Write rows of mean 0 and variance 1."""
    g = w.g
    y = normal(g, g.Sub(x.name, g.reduce("ReduceMean", x.name, -1)), layer.eps)
    y = g.Mul(y, g.weight(leaf(params, "weight", (layer.dim,))))
    if layer.bias:
        y = g.Add(y, g.weight(leaf(params, "bias", (layer.dim,))))
    return Rows(y, x.width)


def rms_norm(w: Writer, layer: nn.RMSNorm, params: Params, x: Rows) -> Rows:
    """Write rows whose root mean square is 1."""
    weight = w.g.weight(leaf(params, "weight", (layer.dim,)))
    return Rows(w.g.Mul(normal(w.g, x.name, layer.eps), weight), x.width)


def normal(g: Graph, x: str, eps: float) -> str:
    """Return rows over their root mean square."""
    square = g.reduce("ReduceMean", g.Mul(x, x), -1)
    return g.Div(x, g.Sqrt(g.Add(square, eps)))


def scale_norm(w: Writer, layer: nn.ScaleNorm, params: Params, x: Rows) -> Rows:
    """Write rows of one length."""
    g = w.g
    size = g.Sqrt(g.reduce("ReduceSumSquare", x.name, -1))
    unit = g.Div(x.name, g.Max(size, layer.eps))
    return Rows(g.Mul(unit, g.weight(leaf(params, "weight", (1,)))), x.width)


def learned_positions(w: Writer, layer: nn.LearnedPositions, params: Params, x: Rows) -> Rows:
    """Write the sum with rows of positions; runtimes refuse one that there is not."""
    table = w.g.weight(leaf(params, "weight", (layer.length, layer.dim)))
    return Rows(w.g.Add(x.name, w.g.Gather(table, w.positions)), x.width)


def sinusoidal_positions(w: Writer, layer: nn.SinusoidalPositions, _: Params, x: Rows) -> Rows:
    """Write the sum with sines and cosines of positions."""
    cos, sin = w.turns(layer.dim, 1e4, np.arange(layer.dim // 2))
    return Rows(w.g.Add(x.name, w.g.Concat(sin, cos, axis=2)), x.width)


def rotary(w: Writer, layer: nn.Rotary, _: Params, x: Rows) -> Rows:
    """Write rotations of rows."""
    return Rows(w.g.Squeeze(rotated(w, layer, w.g.Unsqueeze(x.name, [2])), [2]), x.width)


def rotated(w: Writer, layer: nn.Rotary, x: str) -> str:
    """Rotate heads (batch, positions, heads, dim)."""
    g, dim = w.g, layer.dim
    columns = np.arange(dim)
    first = columns[::2] if layer.pairs == "adjacent" else columns[: dim // 2]
    second = first + (1 if layer.pairs == "adjacent" else dim // 2)
    pair = np.empty(dim, np.int64)
    pair[first] = pair[second] = np.arange(dim // 2)
    turned = np.zeros((dim, dim))  # from (a, b) to (-b, a)
    turned[second, first], turned[first, second] = -1, 1
    cos, sin = (g.Unsqueeze(n, [2]) for n in w.turns(dim, layer.base, pair))
    return g.Add(g.Mul(x, cos), g.Mul(g.MatMul(x, g.weight(turned)), sin))


def shift_tokens(w: Writer, layer: nn.ShiftTokens, _: Params, x: Rows) -> Rows:
    """Write rows some columns of which come from others."""
    g = w.g
    share = x.width // (2 if layer.causal else 3)
    if not share:  # there is nothing that moves
        return x
    sizes = [share, share] if layer.causal else [share, share, share]
    sizes += [x.width - sum(sizes)] if sum(sizes) < x.width else []
    parts = g.several("Split", [x.name, sizes], len(sizes), axis=2)
    at = 1 if layer.causal else 2
    name = f"row_{w.layers['row']}"
    w.layers["row"] += 1
    rows = g.Concat(w.past(name, 1, share), parts[at], axis=1)
    parts[at] = g.Slice(rows, [0], [-1], [1])
    w.present(name, g.Slice(rows, [-1], [2**62], [1]), 1, share)
    if not layer.causal:
        parts[0] = g.Slice(g.Pad(parts[0], [0] * 4 + [1, 0], 0.0), [1], [2**62], [1])
    return Rows(g.Concat(*parts, axis=2), x.width)


# --- attention ---------------------------------------------------------------------------------


def attention(w: Writer, layer: nn.FavorSelfAttention, params: Params, x: Rows) -> Rows:
    """Write attention between its linear layers."""
    g, d = w.g, layer._dim_head
    heads, kv_heads = layer.heads, layer._kv_heads
    rows = w.part(layer, "qkv", params, x).name
    sizes = [(heads + kv_heads) * d, kv_heads * d]
    qk, v = g.several("Split", [rows, sizes], 2, axis=2)
    if layer.qk == "sphere" or layer.rotary:
        qk = g.Reshape(qk, [0, 0, heads + kv_heads, d])
        if layer.qk == "sphere":
            qk = on_spheres(w, layer, params, qk)
        if layer.rotary:
            qk = rotated(w, nn.Rotary(d, layer.rotary), qk)
        qk = g.Reshape(qk, [0, 0, (heads + kv_heads) * d])
    q, k = g.several("Split", [qk, [heads * d, kv_heads * d]], 2, axis=2)
    near = None
    if layer.local_heads:
        far = heads - layer.local_heads, layer._kv_far, layer._kv_far
        counts = zip((q, k, v), far, (heads, kv_heads, kv_heads), strict=True)
        cut = [g.several("Split", [x, [n * d, (of - n) * d]], 2, axis=2) for x, n, of in counts]
        (q, k, v), beside = zip(*cut, strict=True)
        near = local(w, layer, *beside)
    out = exact(w, layer, q, k, v) if layer.exact else favor(w, layer, params, q, k, v)
    out = out if near is None else g.Concat(out, near, axis=2)
    w.layers["attention"] += 1
    return w.part(layer, "output", params, Rows(out, heads * d))


def on_spheres(w: Writer, layer: nn.FavorSelfAttention, params: Params, x: str) -> str:
    """Put heads of queries and keys (batch, positions, heads, d) on spheres."""
    assert layer._sphere is not None
    with within("sphere"):
        radii = layer._sphere.lengths(params.get("sphere", {}))
    radii = np.concatenate([np.repeat(radii, layer.heads // layer._kv_heads), radii])[:, None]
    g = w.g
    size = g.Sqrt(g.Max(g.reduce("ReduceSumSquare", x, -1), TINY))
    return g.Mul(x, g.Div(g.weight(radii), size))


def favor(w: Writer, layer: nn.FavorSelfAttention, params: Params, q: str, k: str, v: str) -> str:
    """Write attention with random features."""
    fm, number = layer.feature_map(params), w.layers["attention"]
    w.fingerprints.append(fm.fingerprint)
    heads, d = layer._kv_far, layer._dim_head
    rates = validation.decay_rates(layer.decay, (heads,), causal=layer.causal)
    a = forms.Attention(
        feature_map=fm,
        heads=layer.heads - layer.local_heads,
        kv_heads=heads,
        value_dim=d,
        causal=layer.causal,
        real=w.g.real,
        io=w.g.real,
    )
    sums, highest = (heads, fm.num_features, d + 1), (heads, fm.num_features)
    given = forms.Given(
        q,
        k,
        v,
        w.past(f"state_{number}", *sums),
        w.past(f"max_{number}", *highest, fill=forms.NOTHING),
        mask="key_mask" if w.masked else None,
        clock=None if rates is None else forms.clock(w.g, rates * np.log(2), w.length, w.count),
    )
    form = w.form if layer.causal == (w.form != "whole") else "chunk"
    out, after, c = forms.write(form, a, w.g, given)
    w.present(f"state_{number}", after, *sums)
    w.present(f"max_{number}", c, *highest)
    return out


def exact(w: Writer, layer: nn.FavorSelfAttention, q: str, k: str, v: str) -> str:
    """Write exact attention: a block of queries at a time sees all keys."""
    g, heads, d = w.g, layer._kv_far, layer._dim_head
    group = layer.heads // layer._kv_heads
    rates = validation.decay_rates(layer.decay, (heads,), causal=layer.causal)
    k, v = (g.Transpose(g.Reshape(x, [0, 0, heads, d]), perm=[0, 2, 1, 3]) for x in (k, v))
    if w.masked:
        new = g.Unsqueeze(w.mask[0], [1, 3])
        k, v = (g.Where(new, x, 0.0) for x in (k, v))
    if w.goes_on:
        k, v = (kept(w, name, x, heads, d) for name, x in (("keys", k), ("values", v)))
    cut = forms.Cut(g, q, forms.BLOCK)
    state = [k, v]
    if layer.causal:
        known = g.Sub(g.Gather(g.Shape(k), [2]), w.count)
        state.append(g.Cast(known, to=g.type))
    if w.masked:
        state.append(g.Cast(g.Unsqueeze(w.mask[1], [1, 2]), to=g.type))
    blocks = cut.apart(g.Mul(q, layer._scale), heads, d, group)
    body = exact_body(g, group, rates, causal=layer.causal, masked=w.masked)
    options = {"body": body, "num_scan_inputs": 1}
    rows = g.several("Scan", [*state, blocks], len(state) + 1, **options)[-1]
    return g.Reshape(cut.together(rows, heads, group, d), [0, 0, heads * group * d])


def kept(w: Writer, name: str, x: str, heads: int, dim: int) -> str:
    """Return keys or values with those before, and hand them on."""
    name = f"{name}_{w.layers['attention']}"
    every = w.g.Concat(w.past(name, heads, "past_positions", dim), x, axis=2)
    return w.present(name, every, heads, "present_positions", dim)


def exact_body(g: Graph, group: int, rates: Array | None, *, causal: bool, masked: bool) -> Any:
    """Read all keys with a block of queries, and hand on what the next block needs."""
    b = g.body()
    k, v = b.takes("k", "v")
    first = b.takes("first")[0] if causal else None
    alive = b.takes("alive")[0] if masked else None
    q = b.takes("q")[0]
    hands_on = [b.Identity(k), b.Identity(v)]
    logits = b.MatMul(q, b.swap(k))
    seen = None
    if first is not None:
        count = b.Div(b.Gather(b.Shape(q), 2), group)
        numbers = b.Add(first, b.Cast(b.Range(0, count, 1), to=b.type))
        numbers = b.Unsqueeze(b.Concat(*[numbers] * group, axis=0), [1])
        every = b.Cast(b.Range(0, b.Gather(b.Shape(k), 2), 1), to=b.type)
        seen = b.Not(b.Greater(every, numbers))  # LessOrEqual has no shape before opset 16
        if rates is not None:
            faded = b.weight(np.log(2) * rates[:, None, None])
            logits = b.Sub(logits, b.Mul(b.Sub(numbers, every), faded))
        hands_on.append(b.Add(first, b.Cast(count, to=b.type)))
    if alive is not None:
        may = b.Cast(alive, to=BOOL)
        seen = may if seen is None else b.And(seen, may)
        hands_on.append(b.Identity(alive))
    if seen is not None:
        logits = b.Where(seen, logits, HIDDEN)
    weights = b.Softmax(logits, axis=-1)
    if masked:
        weights = b.Where(seen, weights, 0.0)  # a query may see no key at all
    return b.gives("exact", *hands_on, b.MatMul(weights, v))


def local(w: Writer, layer: nn.FavorSelfAttention, q: str, k: str, v: str) -> str:
    """Write exact attention within a window: a block of queries sees what is around it.

    What a block sees, a query only in part, is gathered for all blocks at once.
    """
    g, d, before = w.g, layer._dim_head, layer.window - 1
    after = 0 if layer.causal else before
    heads, group = layer._kv_heads - layer._kv_far, layer.heads // layer._kv_heads
    k, v = (g.Transpose(g.Reshape(x, [0, 0, heads, d]), perm=[0, 2, 1, 3]) for x in (k, v))
    ones = numpy_helper.from_array(np.ones(1, g.real))
    alive = g.ConstantOfShape(g.Concat(w.batch, w.count, axis=0), value=ones)
    if w.masked:
        new = g.Unsqueeze("key_mask", [1, 3])
        k, v = (g.Where(new, x, 0.0) for x in (k, v))
        alive = g.Cast("key_mask", to=g.type)
    number = w.layers["attention"]
    shape = heads, before, d
    parts = []
    for name, x, axis, sizes in (
        ("near_keys", k, 2, shape),
        ("near_values", v, 2, shape),
        ("near_mask", alive, 1, (before,)),
    ):
        name = f"{name}_{number}"
        every = g.Concat(w.past(name, *sizes), x, axis=axis)
        w.present(name, g.Slice(every, w.count, [2**62], [axis]), *sizes)
        parts.append(every)
    cut = forms.Cut(g, q, forms.BLOCK)
    size, wide = g.Squeeze(cut.size, [0]), g.Add(g.Squeeze(cut.size, [0]), before + after)
    more = g.Add(cut.more, after)
    k, v = (g.Pad(x, g.Concat([0] * 6, more, [0], axis=0), 0.0) for x in parts[:2])
    alive = g.Pad(parts[2], g.Concat([0] * 3, more, axis=0), 0.0)
    starts = g.Mul(g.Range(0, g.Squeeze(cut.chunks, [0]), 1), size)
    columns = g.Range(0, wide, 1)
    rows = g.Add(g.Unsqueeze(starts, [1]), columns)
    k = g.Transpose(g.Gather(k, rows, axis=2), perm=[2, 0, 1, 4, 3])
    v = g.Transpose(g.Gather(v, rows, axis=2), perm=[2, 0, 1, 3, 4])
    alive = g.Transpose(g.Gather(alive, rows, axis=1), perm=[1, 0, 2])
    first = g.Range(0, size, 1)
    apart = g.Sub(columns, g.Unsqueeze(g.Concat(*[first] * group, axis=0), [1]))
    near = g.And(g.Not(g.Less(apart, 0)), g.Not(g.Greater(apart, before + after)))
    seen = g.And(near, g.Cast(g.Unsqueeze(alive, [2, 3]), to=BOOL))
    logits = g.MatMul(cut.apart(g.Mul(q, layer._scale), heads, d, group), k)
    weights = g.Softmax(g.Where(seen, logits, HIDDEN), axis=-1)
    if w.masked:
        weights = g.Where(seen, weights, 0.0)
    rows = cut.together(g.MatMul(weights, v), heads, group, d)
    return g.Reshape(rows, [0, 0, heads * group * d])


#: How layers are written, and which of their fields are known here.
WRITERS: dict[type[Layer], tuple[Callable[..., Rows], str]] = {
    nn.Block: (in_order, "attention feedforward norm shift dropout gate"),
    nn.Chain: (in_order, "layers"),
    nn.Dropout: (dropout, "rate"),
    nn.Embedding: (embedding, "count dim std"),
    nn.FavorSelfAttention: (
        attention,
        "dim heads num_features causal kv_heads dim_head kind antithetic kernel_epsilon qk rotary "
        "decay exact bias output_bias std learn_projection local_heads window",
    ),
    nn.FeedForward: (in_order, "dim hidden activation bias dropout std"),
    nn.LayerNorm: (layer_norm, "dim eps bias"),
    nn.LearnedPositions: (learned_positions, "length dim std"),
    nn.Linear: (linear, "inputs outputs bias std"),
    nn.RMSNorm: (rms_norm, "dim eps"),
    nn.Residual: (residual, "branch norm shift dropout gate"),
    nn.Rotary: (rotary, "dim pairs base"),
    nn.ScaleNorm: (scale_norm, "dim eps"),
    nn.ShiftTokens: (shift_tokens, "causal"),
    nn.Sum: (summed, "layers"),
    nn.SinusoidalPositions: (sinusoidal_positions, "dim"),
    _Activation: (activation, "name"),
}
_BODY = (
    "dim depth heads num_features causal layers exact kv_heads dim_head kind antithetic "
    "kernel_epsilon qk rotary decay learn_projection local_heads window hidden activation norm "
    "final_norm shift gate dropout qkv_bias bias"
)
WRITERS[nn.Performer] = in_order, _BODY
WRITERS[nn.PerformerLM] = (
    language_model,
    f"{_BODY} vocab positions length tied embedding_dropout",
)
