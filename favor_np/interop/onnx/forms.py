"""FAVOR+ attention in ONNX operators, in three forms.

All fold keys into a state (sums, c) and read it.  `sums` (batch, kv_heads, M, dv + 1) are values,
and a one for each key, weighted by features over ``exp(c)``; c (batch, kv_heads, M) are integers,
kept as floats.  Features are ``exp`` of log-features; those of a key are a small number and an
integer that all of its features have in common, so that no digit of the number is lost beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from favor_np import FeatureMap, numerics, validation
from favor_np.interop.onnx.graph import BOOL, CONTRIB, DOUBLE, LINEAR_ATTENTION, TYPES, Graph

Array: TypeAlias = npt.NDArray[Any]

#: Positions that one iteration of a Scan takes: if causal, and if not.
CHUNK, BLOCK = 64, 256
#: c of an empty state, and what is added to the log-features of keys that take no part.
NOTHING = -1e30
#: The least log-feature: its exponential is a normal number.  By the bytes of a float, as below.
LOWEST = {4: -86.0, 8: -700.0}
#: Rows with a smaller denominator may have lost digits to it.
LEAST = {4: 2.0**-80, 8: 2.0**-900}
#: Larger values are cut off, so that their sums stay finite.
LONGEST = {4: 2.0**100, 8: 2.0**900}


#: Larger biases of keys are cut off, so that they are integers and fractions without a rounding.
LARGEST_BIAS = 2.0**22
#: Smaller factors a token count as this.
SMALLEST_DECAY = 1e-30


@dataclass(frozen=True)
class Attention:
    """What is exported: see `export_attention`."""

    feature_map: FeatureMap
    heads: int
    kv_heads: int
    value_dim: int
    causal: bool
    #: In which the graph computes.
    real: np.dtype[Any]
    #: Of queries, keys, values and the result.
    io: np.dtype[Any]

    @property
    def group(self) -> int:
        """Heads of queries for one of keys."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        """Of `sums`: those of the values, and a last one for the denominators."""
        return self.value_dim + 1

    @property
    def bytes(self) -> int:
        """Of a float."""
        return self.real.itemsize

    @cached_property
    def own(self) -> bool:
        """Whether every head has weights of its own."""
        return self.feature_map.num_heads is not None

    def of_heads(self, array: Array) -> Array:
        """Return (heads or 1, r, s) in a shape to compute with (..., heads, n, r or s)."""
        return array if self.own else array[0]

    @cached_property
    def query_weight(self) -> Array:
        """What queries are multiplied with, (..., d, M)."""
        return self.of_heads(self._signed(self.feature_map.query_weight))

    @cached_property
    def key_weight(self) -> Array:
        """The same of keys; for positive maps a last row is for what all features get."""
        fm = self.feature_map
        weight = self._signed(fm.key_weight)
        if fm.kind == "positive":
            weight = np.concatenate([weight, np.ones_like(weight[:, :1])], axis=1)
        return self.of_heads(weight)

    @cached_property
    def bias(self) -> Array:
        """What is added to the log-features of all keys, (..., 1, M)."""
        fm = self.feature_map
        return self.of_heads(np.tile(fm.bias, 2 if fm.antithetic else 1)[:, None])

    def _signed(self, weight: Array) -> Array:
        weight = np.swapaxes(weight, 1, 2)
        return np.concatenate([weight, -weight], axis=2) if self.feature_map.antithetic else weight


class Given(NamedTuple):
    """Names of what goes in: see `export_attention`, whose inputs they are."""

    q: str
    k: str
    v: str
    sums: str
    c: str
    mask: str | None = None
    bias: str | None = None
    #: What decay does: see `clock`.
    clock: tuple[str, str, str] | None = None


# --- features ----------------------------------------------------------------------------------


def within_reach(a: Attention, g: Graph, x: str, center: Array) -> str:
    """Centre queries or keys (..., n, d), and keep their projections finite."""
    if center.any():
        x = g.Sub(x, g.weight(a.of_heads(center[:, None])))
    fm = a.feature_map
    limit = numerics.projection_limit(fm, a.bytes) / math.sqrt(fm.dim)
    return g.Clip(x, -limit, limit)


def log_features(a: Attention, g: Graph, y: str) -> str:
    """Return the logarithms of features from projections."""
    kind = a.feature_map.kind
    if kind == "relu":
        return g.Log(g.Add(g.Max(y, 0.0), a.feature_map.kernel_epsilon))
    if kind == "elu":
        return g.Add(g.Log(g.Add(g.Max(y, 0.0), 1.0)), g.Min(y, 0.0))
    return y


def query_logs(a: Attention, g: Graph, q: str) -> str:
    """Return the log-features (..., n, M) of queries, less what all of a row's have in common."""
    q = within_reach(a, g, q, a.feature_map.query_center)
    return log_features(a, g, g.MatMul(q, g.weight(a.query_weight)))


def key_logs(
    a: Attention, g: Graph, k: str, extra: str | None, lift: str | None
) -> tuple[str, str | None]:
    """Return the log-features (..., n, M) of keys, and integers (..., n, 1) that belong to them.

    `extra` and `lift` (..., n, 1) are added to the one and to the other.
    """
    fm = a.feature_map
    k = within_reach(a, g, k, fm.key_center)
    if fm.kind != "positive":
        y = log_features(a, g, g.MatMul(k, g.weight(a.key_weight)))
        return (y if extra is None else g.Add(y, extra)), lift
    # The square is the largest of all these numbers: float32 would round off what is left of them.
    rows, factor = double(g, k), -fm.key_norm
    if fm.key_factor is not None:
        turned = a.of_heads(np.swapaxes(fm.key_factor, 1, 2))
        rows, factor = g.MatMul(rows, np.ascontiguousarray(turned)), -0.5
    height = g.Mul(g.reduce("ReduceSumSquare", rows, -1), np.array(factor))
    if fm.key_linear.any():
        height = g.Add(height, g.MatMul(double(g, k), a.of_heads(fm.key_linear[:, :, None])))
    whole = g.Ceil(height)
    rest = real(g, g.Sub(height, whole))
    whole = real(g, whole)
    lift = whole if lift is None else g.Add(whole, lift)
    rest = rest if extra is None else g.Add(rest, extra)
    y = g.MatMul(g.Concat(k, rest, axis=-1), g.weight(a.key_weight))
    return (g.Add(y, g.weight(a.bias)) if a.bias.any() else y), lift


def double(g: Graph, x: str) -> str:
    """Convert to float64."""
    return x if g.type == DOUBLE else g.Cast(x, to=DOUBLE)


def real(g: Graph, x: str) -> str:
    """Convert from float64."""
    return x if g.type == DOUBLE else g.Cast(x, to=g.type)


def key_features(a: Attention, g: Graph, logs: str, c: str, lift: str | None) -> tuple[str, str]:
    """Return features of keys over ``exp(c)``, and c without what their integers are."""
    below = c if lift is None else g.Sub(c, lift)
    return g.Exp(g.Clip(g.Sub(logs, below), LOWEST[a.bytes], 1.0)), below


def query_features(a: Attention, g: Graph, logs: str, c: str) -> str:
    """Return features of queries times ``exp(c)``, over their sum."""
    return shares(a, g, g.Add(logs, g.Sub(c, g.reduce("ReduceMax", c, -1))))


def shares(a: Attention, g: Graph, logs: str) -> str:
    """Return ``exp(logs)`` over its sum: at least 1/M for one feature, a normal number for all.

    Some processors take a hundred times as long for numbers below.
    """
    return g.Max(g.Softmax(logs, axis=-1), math.exp(LOWEST[a.bytes]))


def raised(g: Graph, logs: str, lift: str | None) -> str:
    """Return all of the log-features of keys."""
    return logs if lift is None else g.Add(logs, lift)


def faded(a: Attention, g: Graph, sums: str, c: str, after: str) -> str:
    """Return sums over ``exp(c)`` as sums over ``exp(after)``; c is (batch, heads, 1, M)."""
    return g.Mul(sums, g.swap(g.Exp(g.Max(g.Sub(c, after), LOWEST[a.bytes]))))


# --- inputs and outputs --------------------------------------------------------------------------


def lengths(g: Graph, x: str) -> tuple[str, str]:
    """Return batch and number of positions of an input."""
    shape = g.Shape(x)
    return g.Gather(shape, [0]), g.Gather(shape, [1])


def values(a: Attention, g: Graph, x: Given, alive: str | None) -> str:
    """Return the values with a last column of ones, (batch, positions, kv_heads, columns).

    Rows of keys that take no part are zero.
    """
    v = g.Reshape(real_input(a, g, x.v), [0, 0, a.kv_heads, a.value_dim])
    v = g.Clip(v, -LONGEST[a.bytes], LONGEST[a.bytes])
    v = g.Pad(v, [0] * 7 + [1], 1.0)
    return v if alive is None else g.Where(g.Unsqueeze(alive, [3]), v, 0.0)


def keys(a: Attention, g: Graph, x: Given, alive: str | None) -> str:
    """Return the keys, (batch, positions, kv_heads * d); those that take no part are zero."""
    k = real_input(a, g, x.k)
    if alive is None or x.bias is None:
        return k if alive is None else g.Where(alive, k, 0.0)
    dim = a.feature_map.dim
    k = g.Where(g.Unsqueeze(alive, [3]), g.Reshape(k, [0, 0, a.kv_heads, dim]), 0.0)
    return g.Reshape(k, [0, 0, a.kv_heads * dim])


def real_input(a: Attention, g: Graph, name: str) -> str:
    """Return an input in the type in which the graph computes."""
    return name if a.io == a.real else g.Cast(name, to=g.type)


def averages(a: Attention, g: Graph, rows: str, *, masked: bool) -> str:
    """Divide sums (batch, positions, heads, columns) by their last column: the result.

    Rows without a key are zeros over zero, and become zeros.
    """
    total, over = g.several("Split", [rows, [a.value_dim, 1]], 2, axis=3)
    if masked or not a.causal:
        over = g.Add(over, g.Cast(g.Equal(over, 0.0), to=g.type))
    out = g.Reshape(g.Div(total, over), [0, 0, a.heads * a.value_dim])
    return out if a.io == a.real else g.Cast(out, to=TYPES[a.io.name])


class Raised(NamedTuple):
    """What keys have beside their log-features, (batch, positions, kv_heads or 1) each."""

    #: Which keys take part; None if all do.
    alive: str | None = None
    #: What is added to the log-features: a small number, or one that leaves nothing of them.
    extra: str | None = None
    #: Integers that are added to them.
    lift: str | None = None
    #: Integers (batch, 1, kv_heads) that c is lowered by in the end.
    wound: str | None = None


def raised_keys(a: Attention, g: Graph, x: Given) -> Raised:
    """Put together what decay, a mask and a bias do to keys."""
    alive = None if x.mask is None else g.Unsqueeze(x.mask, [2])
    extra, lift, wound = x.clock or (None, None, None)
    if x.bias is not None:
        bias = real_input(a, g, x.bias)
        heard = g.Not(g.Equal(bias, -math.inf))
        alive = heard if alive is None else g.And(alive, heard)
        bias = g.Clip(g.Where(heard, bias, 0.0), -LARGEST_BIAS, LARGEST_BIAS)
        whole = g.Floor(bias)
        rest = g.Sub(bias, whole)
        extra = rest if extra is None else g.Add(extra, rest)
        lift = whole if lift is None else g.Add(lift, whole)
    if alive is not None:
        extra = g.Where(alive, 0.0 if extra is None else extra, NOTHING)
    return Raised(alive, extra, lift, wound)


def clock(g: Graph, rates: Array, length: str, count: str) -> tuple[str, str, str]:
    """By how much decay raises keys, and c in the end: fractions, integers, an integer.

    Key j is raised by j times the rate, -log of the decay of its head.  Only integers ever move c:
    nothing is scaled by a factor so near to 1 that float32 could not hold it.  The first two are
    (batch, positions, kv_heads), the last is (batch, 1, kv_heads).  `length` (batch) are the tokens
    in the state, `count` (1) those that come.
    """
    rates = rates.reshape(1, 1, -1)
    first = g.Unsqueeze(length, [1])
    tokens = g.Add(first, g.Unsqueeze(g.Range(0, g.Squeeze(count, [0]), 1), [0]))
    start, end, each = (
        g.Mul(g.Cast(g.Unsqueeze(n, [2]), to=DOUBLE), rates)
        for n in (first, g.Add(first, count), tokens)
    )
    before, whole = g.Floor(start), g.Floor(each)
    fraction, lift = g.Sub(each, whole), g.Sub(whole, before)
    return real(g, fraction), real(g, lift), real(g, g.Sub(g.Floor(end), before))


def token_clock(g: Graph, decay: str, before: str) -> tuple[tuple[str, str, str], str]:
    """Return the same for a factor a token, (batch, positions, kv_heads), and the next `before`.

    That is a fraction of float64, (batch, kv_heads).
    """
    steps = g.Neg(g.Log(g.Clip(g.Cast(decay, to=DOUBLE), *map(np.array, (SMALLEST_DECAY, 1.0)))))
    start = g.Unsqueeze(before, [1])
    each = g.Add(start, g.CumSum(steps, 1))
    whole = g.Floor(each)
    end = g.Add(start, g.ReduceSum(steps, [1], keepdims=1))
    wound = g.Floor(end)
    parts = real(g, g.Sub(each, whole)), real(g, whole), real(g, wound)
    return parts, g.Squeeze(g.Sub(end, wound), [1])


class Cut:
    """Positions cut into chunks, the last one filled up."""

    def __init__(self, g: Graph, of: str, longest: int) -> None:
        self.g = g
        self.batch, self.count = lengths(g, of)
        self.size = g.Max(g.Min(self.count, [longest]), [1])
        full = g.Div(g.Sub(g.Add(self.count, self.size), [1]), self.size)
        self.chunks = g.Max(full, [1])
        self.more = g.Sub(g.Mul(self.chunks, self.size), self.count)

    def zeros(self) -> str:
        """Return (batch, positions, 1) zeros."""
        shape = self.g.Concat(self.batch, self.count, [1], axis=0)
        zero = numpy_helper.from_array(np.zeros(1, self.g.real))
        return self.g.ConstantOfShape(shape, value=zero)

    def apart(self, x: str, heads: int, width: int, group: int = 1, fill: float = 0.0) -> str:
        """Return (batch, positions, heads * group * width) as (chunks, batch, heads, n, width).

        Where heads are in groups, n are the rows of all heads of a group, one after the other.
        """
        g = self.g
        x = g.Pad(x, g.Concat([0] * 4, self.more, [0], axis=0), fill)
        x = g.Reshape(
            x, g.Concat(self.batch, self.chunks, self.size, [heads, group, width], axis=0)
        )
        if group == 1:
            return g.Transpose(g.Squeeze(x, [4]), perm=[1, 0, 3, 2, 4])
        rows = g.Mul(self.size, [group])
        x = g.Transpose(x, perm=[1, 0, 3, 4, 2, 5])
        return g.Reshape(x, g.Concat([0] * 3, rows, [width], axis=0))

    def together(self, x: str, heads: int, group: int, width: int) -> str:
        """Return (chunks, batch, heads, n, width) as (batch, positions, heads * group, width)."""
        g = self.g
        x = g.Reshape(x, g.Concat([0, 0, heads, group], self.size, [width], axis=0))
        x = g.Transpose(x, perm=[1, 0, 4, 2, 3, 5])
        length = g.Mul(self.chunks, self.size)
        x = g.Reshape(x, g.Concat(self.batch, length, [heads * group, width], axis=0))
        return g.Slice(x, [0], self.count, [1])


# --- the forms -----------------------------------------------------------------------------------


FORMS = ("auto", "chunk", "gated", "whole")


def form_of(form: str, real: np.dtype[Any], *, causal: bool) -> str:
    """Return the form, "auto" being decided; ValueError if it does not go with the rest."""
    form = validation.choice("form", form, FORMS)
    if form == "auto":
        form = "chunk" if causal else "whole"
    if causal == (form == "whole"):
        raise ValueError(f"form={form!r} is for causal={not causal}, got causal={causal}")
    if form == "gated" and real == np.float64:
        raise ValueError(
            "form='gated' is not for float64, in which LinearAttention does not compute"
        )
    return form


def write(form: str, a: Attention, g: Graph, x: Given) -> tuple[str, str, str]:
    """Write attention in a form; result (batch, positions, heads * dv), sums, c."""
    return {"chunk": chunk_form, "gated": gated_form, "whole": whole_form}[form](a, g, x)


def chunk_form(a: Attention, g: Graph, x: Given) -> tuple[str, str, str]:
    """Write causal attention chunk by chunk, in plain operators; result, sums, c."""
    cut = Cut(g, x.k, CHUNK)
    more = raised_keys(a, g, x)
    parts = [
        cut.apart(real_input(a, g, x.q), a.kv_heads, a.feature_map.dim, a.group),
        *key_parts(a, g, x, cut, more),
    ]
    state = x.sums, g.Unsqueeze(x.c, [2])
    body = chunk_body(a, g, lifted=more.lift is not None)
    sums, c, rows = g.several("Scan", [*state, *parts], 3, body=body, num_scan_inputs=len(parts))
    c = g.Squeeze(c, [2])
    if more.wound is not None:
        c = lowered(g, c, more.wound)
    rows = cut.together(rows, a.kv_heads, a.group, a.columns)
    return averages(a, g, rows, masked=more.alive is not None), sums, c


def key_parts(a: Attention, g: Graph, x: Given, cut: Cut, more: Raised) -> list[str]:
    """Cut keys, values, and what keys have beside them, into chunks."""
    v = g.Reshape(values(a, g, x, more.alive), [0, 0, a.kv_heads * a.columns])
    parts = [
        cut.apart(keys(a, g, x, more.alive), a.kv_heads, a.feature_map.dim),
        cut.apart(v, a.kv_heads, a.columns),
        cut.apart(more.extra or cut.zeros(), a.kv_heads if more.lift else 1, 1, fill=NOTHING),
    ]
    return parts + ([] if more.lift is None else [cut.apart(more.lift, a.kv_heads, 1)])


def lowered(g: Graph, c: str, wound: str) -> str:
    """Take the integers (batch, 1, kv_heads) off c (batch, kv_heads, M)."""
    return g.Sub(c, g.Transpose(wound, perm=[0, 2, 1]))


def chunk_body(a: Attention, g: Graph, *, lifted: bool) -> Any:
    """Fold a chunk and read it, by four matrix products.

    What all keys of the chunk are relative to may come from one that a query does not see.  Where
    that leaves a query with next to nothing, the chunk is read one by one.
    """
    b = g.body()
    sums, c, q, k, v, extra = b.takes("sums", "c", "q", "k", "v", "extra")
    lift = b.takes("lift")[0] if lifted else None
    logs, lift = key_logs(a, b, k, extra, lift)
    query = query_logs(a, b, q)
    after = b.Max(c, b.Ceil(b.reduce("ReduceMax", raised(b, logs, lift), 2)))
    phi, _ = key_features(a, b, logs, after, lift)
    phi = b.swap(phi)
    reads = query_features(a, b, query, after)
    before = faded(a, b, sums, c, after)
    weights = lower_triangles(a, b, b.MatMul(reads, phi), k)
    rows = b.Add(b.MatMul(weights, v), b.MatMul(reads, before))
    over = b.Slice(rows, [a.value_dim], [a.columns], [3])
    lost = b.And(b.Greater(over, 0.0), b.Less(over, LEAST[a.bytes]))
    lost = b.ReduceSum(b.Cast(lost, to=b.type), keepdims=0)
    slowly, as_it_is = b.body(), b.body()
    one_by_one = read_one_by_one(a, slowly, (sums, c), query, logs, lift, v)
    slow = slowly.gives("one_by_one", one_by_one)
    fast = as_it_is.gives("as_it_is", as_it_is.Identity(rows))
    (rows,) = b.choice(b.Cast(lost, to=BOOL), slow, fast, 1)
    return b.gives("chunk", b.Add(before, b.MatMul(phi, v)), after, rows)


def lower_triangles(a: Attention, g: Graph, weights: str, k: str) -> str:
    """Return weights (batch, heads, group * n, n) of what queries see."""
    if a.group == 1:
        return g.Trilu(weights, upper=0)
    n = g.Gather(g.Shape(k), [2])
    apart = g.Reshape(weights, g.Concat([0, 0, a.group], n, n, axis=0))
    return g.Reshape(g.Trilu(apart, upper=0), g.Concat([0, 0], g.Mul(n, [a.group]), n, axis=0))


def read_one_by_one(
    a: Attention,
    g: Graph,
    state: tuple[str, str],
    query: str,
    logs: str,
    lift: str | None,
    v: str,
) -> str:
    """Fold and read the keys of a chunk one after the other, right whatever their norms."""
    n = g.Gather(g.Shape(v), [2])
    query = g.Reshape(query, g.Concat([0, 0, a.group], n, [a.feature_map.num_features], axis=0))
    each = [g.Transpose(query, perm=[3, 0, 1, 2, 4])]
    each += (g.Transpose(x, perm=[2, 0, 1, 3]) for x in (logs, v, lift) if x is not None)
    b = g.body()
    sums, c, q, key, value = b.takes("sums", "c", "q", "key", "value")
    height = None if lift is None else b.Unsqueeze(b.takes("lift")[0], [2])
    key = b.Unsqueeze(key, [2])
    after = b.Max(c, b.Ceil(raised(b, key, height)))
    phi, _ = key_features(a, b, key, after, height)
    new = b.MatMul(b.swap(phi), b.Unsqueeze(value, [2]))
    new = b.Add(faded(a, b, sums, c, after), new)
    body = b.gives("token", new, after, b.MatMul(query_features(a, b, q, after), new))
    rows = g.several("Scan", [*state, *each], 3, body=body, num_scan_inputs=len(each))[2]
    shape = g.Concat([0, 0], g.Mul(n, [a.group]), [a.columns], axis=0)
    return g.Reshape(g.Transpose(rows, perm=[1, 2, 3, 0, 4]), shape)


def whole_form(a: Attention, g: Graph, x: Given) -> tuple[str, str, str]:
    """Write attention that is not causal: one Scan folds all keys, another reads the state."""
    cut = Cut(g, x.k, BLOCK)
    more = raised_keys(a, g, x)
    b = g.body()
    sums, c, k, value, extra = b.takes("sums", "c", "k", "v", "extra")
    lift = None if more.lift is None else b.takes("lift")[0]
    logs, lift = key_logs(a, b, k, extra, lift)
    after = b.Max(c, b.Ceil(b.reduce("ReduceMax", raised(b, logs, lift), 2)))
    phi, _ = key_features(a, b, logs, after, lift)
    new = b.Add(faded(a, b, sums, c, after), b.MatMul(b.swap(phi), value))
    parts = key_parts(a, g, x, cut, more)
    state = x.sums, g.Unsqueeze(x.c, [2])
    body = b.gives("fold", new, after)
    sums, c = g.several("Scan", [*state, *parts], 2, body=body, num_scan_inputs=len(parts))
    cut = Cut(g, x.q, BLOCK)
    b = g.body()
    kept, highest, q = b.takes("sums", "c", "q")
    rows = b.MatMul(query_features(a, b, query_logs(a, b, q), highest), kept)
    q = cut.apart(real_input(a, g, x.q), a.kv_heads, a.feature_map.dim, a.group)
    body = b.gives("read", b.Identity(kept), b.Identity(highest), rows)
    rows = g.several("Scan", [sums, c, q], 3, body=body, num_scan_inputs=1)[2]
    rows = cut.together(rows, a.kv_heads, a.group, a.columns)
    return averages(a, g, rows, masked=more.alive is not None), sums, g.Squeeze(c, [2])


def gated_form(a: Attention, g: Graph, x: Given) -> tuple[str, str, str]:
    """Write causal attention around the operator LinearAttention, which takes gates of features.

    The gate of feature r is ``c_r(t - 1) - c_r(t)``: each token is folded relative to the running
    maximum of its own position, so a token at a time gives the same bits as all at once.
    """
    fm, heads = a.feature_map, a.kv_heads
    per_key = [0, 0, heads, 1, fm.dim] if a.own else [0, 0, heads, fm.dim]
    per_query = [0, 0, heads, a.group, fm.dim] if a.own else [0, 0, a.heads, fm.dim]
    more = raised_keys(a, g, x)
    columns = [3, 4] if a.own else [3]
    extra, lift = (None if n is None else g.Unsqueeze(n, columns) for n in (more.extra, more.lift))
    logs, lift = key_logs(a, g, g.Reshape(keys(a, g, x, more.alive), per_key), extra, lift)
    if a.own:
        logs = g.Squeeze(logs, [3])
        lift = None if lift is None else g.Squeeze(lift, [3])
    c, gates, tops = running_maximum(g, x.c, g.Ceil(raised(g, logs, lift)))
    phi, below = key_features(a, g, logs, tops, lift)
    if a.group > 1 or a.own:
        below = g.Unsqueeze(below, [3])
    reads = query_logs(a, g, g.Reshape(real_input(a, g, x.q), per_query))
    if a.group > 1 and not a.own:
        reads = g.Reshape(reads, [0, 0, heads, a.group, fm.num_features])
    # Any number that all features of a query have in common cancels: `below` is smaller than c.
    reads = shares(a, g, g.Add(reads, below))
    features = fm.num_features
    v = g.Reshape(values(a, g, x, more.alive), [0, 0, heads * a.columns])
    reads = g.Reshape(reads, [0, 0, a.heads * features])
    phi, gates = (g.Reshape(n, [0, 0, heads * features]) for n in (phi, gates))
    rows, sums = g.several(
        "LinearAttention",
        [reads, phi, v, x.sums, gates],
        2,
        domain="" if g.opset >= LINEAR_ATTENTION else CONTRIB,
        q_num_heads=a.heads,
        kv_num_heads=heads,
        update_rule="gated",
        scale=1.0,
    )
    if more.wound is not None:
        c = lowered(g, c, more.wound)
    rows = g.Reshape(rows, [0, 0, a.heads, a.columns])
    return averages(a, g, rows, masked=more.alive is not None), sums, c


def running_maximum(g: Graph, highest: str, tops: str) -> list[str]:
    """Return the last of the running maxima, their differences to the one before, and all of them.

    One position needs no Scan, and none at all must not meet one: that ends onnxruntime.
    """
    count = g.Gather(g.Shape(tops), 1)
    one, other = g.body(), g.body()
    before = one.Unsqueeze(highest, [1])
    after = one.Max(before, tops)
    single = one.gives("one", one.Squeeze(after, [1]), one.Sub(before, after), after)

    some, none = other.body(), other.body()
    b = some.body()
    before, now = b.takes("c", "now")
    after = b.Max(before, now)
    body = b.gives("highest", after, b.Sub(before, after), b.Identity(after))
    options = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1, 1]}
    found = some.several("Scan", [highest, tops], 3, body=body, **options)
    as_it_is = none.gives("none", *(none.Identity(x) for x in (highest, tops, tops)))
    several = other.choice(other.Cast(count, to=BOOL), some.gives("some", *found), as_it_is, 3)
    return g.choice(g.Equal(count, 1), single, other.gives("other", *several), 3)
