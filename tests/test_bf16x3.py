"""Projections and logits as products of parts: exactly cut numbers, no larger an error than without."""

import functools
import itertools
from typing import Annotated, NamedTuple

import numpy as np
import pytest
from support.inputs import OPTIONS, random_inputs
from support.kernels import compiled
from support.tolerance import relative_rms
from support.tuning import tuned
from support.workspaces import forget_layouts, poison_workspaces

from favor_np import (
    FeatureMap,
    exact_attention,
    favor_attention,
    favor_attention_vjp,
    feature_map,
)
from favor_np.cpu.kernels import bfloat16
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.layout import layout
from favor_np.cpu.memory import aligned_copy
from favor_np.cpu.pairs import TILE_CONFIG, parts_of
from favor_np.cpu.processor import TARGET, amx_unavailable
from favor_np.cpu.record import Array, Field, Floats2, Ints1

#: Whether there is a matrix unit; this asks the system for it.
UNIT = not amx_unavailable()


@pytest.fixture(autouse=True)
def _find_and_leave_no_layouts():
    forget_layouts()
    yield
    forget_layouts()


inputs = functools.partial(random_inputs, std=0.5, dtype=np.float32)


def with_and_without(function):
    """What a function returns, without parts and with them."""
    found = []
    for wanted in (False, True):
        with tuned(USE_BF16X3=wanted):
            poison_workspaces()
            found.append(function())
    return found


def numbers(pairs):
    """The numbers of pairs, (..., 2 pairs)."""
    bits = np.ascontiguousarray(pairs).view(np.uint32)
    pair = np.stack([bits << 16, bits & np.uint32(0xFFFF0000)], axis=-1)
    return pair.reshape(*bits.shape[:-1], -1).view(np.float32)


class Cut(NamedTuple):
    source: Floats2
    left: Floats2
    right: Floats2


@jit()
def cut_both(call):
    rows, cols = call.source.shape
    bfloat16.split_along(call.source, rows, cols, call.left)
    bfloat16.split_down(call.source, rows, cols, call.right)
    return 0


class Product(NamedTuple):
    """`c` is added to if `add` is not 0."""

    a: Floats2
    b: Floats2
    c: Floats2
    add: Ints1
    config: Annotated[Array, Field("u1")]


@jit()
def multiply(call):
    if bfloat16.AMX:
        bfloat16.configure(call.config)
    (rows, cols), pairs = call.c.shape, call.a.shape[1] // 3
    bfloat16.gemm_bf16x3(call.a, call.b, call.c, rows, cols, pairs, call.add[0] != 0)
    if bfloat16.AMX:
        bfloat16.release()
    return 0


@functools.cache
def kernel(body, cls):
    """Compiled for the matrix unit, if this process may use it."""
    return compiled(body, cls, way=TARGET.way)


def wide(shape, seed=0):
    """Numbers of all sizes and both signs, zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-60, 60, shape)
    x[rng.random(shape) < 0.1] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("cols", [16, 32, 48, 64])
def test_the_parts_of_a_number_are_8_bits_each_and_add_up_to_it(cols):
    rows, depth = 34, -(-cols // 32) * 16
    source = aligned_copy(wide((rows, cols)))
    left = aligned_copy(np.full((rows, 3 * depth), np.nan, np.float32))
    right = aligned_copy(np.full((3 * 20, cols), np.nan, np.float32))
    kernel(cut_both, Cut)(source, left, right)
    padded = np.pad(source, ((0, 0), (0, 2 * depth - cols)))
    along = [numbers(left[:, p * depth : (p + 1) * depth]) for p in range(3)]
    down = [numbers(np.ascontiguousarray(right[p * 20 : (p + 1) * 20].T)).T for p in range(3)]
    assert np.array_equal(sum(x.astype(np.float64) for x in along), padded)
    assert np.array_equal(sum(x.astype(np.float64) for x in down)[:rows], source)
    assert not any(x[rows:].any() for x in down)
    for part in (*along, *down):
        assert not (part.view(np.uint32) & 0xFFFF).any()
    assert np.array_equal(left.view(np.uint32), parts_of(padded).view(np.uint32))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("depth", [32, 96, 256])
@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (64, 64), (48, 32), (32, 80), (16, 48)])
def test_a_product_of_parts_errs_no_more_than_one_of_float32(rows, cols, depth, add):
    rng = np.random.default_rng(depth)
    a, b, c = (rng.standard_normal(s).astype(np.float32)
               for s in ((rows, depth), (depth, cols), (rows, cols)))  # fmt: skip
    expected = a.astype(np.float64) @ b + (c if add else 0)
    got = aligned_copy(c if add else np.full_like(c, np.nan))
    left = aligned_copy(parts_of(a))
    right = aligned_copy(parts_of(b.T).T)
    kernel(multiply, Product)(left, right, got, np.array([int(add)]), TILE_CONFIG)
    chain = np.zeros_like(c)
    for k in range(depth):
        chain += a[:, k : k + 1] * b[k]
    error = np.sqrt(np.mean((got - expected) ** 2))
    assert error < np.sqrt(np.mean((chain + (c if add else 0) - expected) ** 2))
    assert error < 3e-7 * np.sqrt(depth)


MAPS = {
    "positive": lambda dim: feature_map("positive", dim, 96, antithetic=False, rng=0),
    "antithetic": lambda dim: feature_map("positive", dim, 140, rng=0),
    "relu": lambda dim: feature_map("relu", dim, 70, rng=0),
    "elu": lambda dim: feature_map("elu", dim, 70, rng=0),
    "heads": lambda dim: FeatureMap.from_projection(
        np.stack([feature_map("positive", dim, 48, rng=h).projection for h in range(3)])
    ),
}


@pytest.mark.parametrize("length", [2, 63, 65, 200])
@pytest.mark.parametrize("dim", [1, 7, 33, 64, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_the_error_is_no_larger_whatever_the_sizes(causal, dim, length):
    q, k, v = inputs(length, dim, 17, (3,), std=1.0 / dim**0.25)
    for name, make in MAPS.items():
        fm = make(dim)
        exactly = favor_attention(*(x.astype(np.float64) for x in (q, k, v)), fm, causal=causal)
        plain, split = with_and_without(lambda: favor_attention(q, k, v, fm, causal=causal))  # noqa: B023
        assert split.dtype == np.float32
        assert relative_rms(split, exactly) < 1.2 * relative_rms(plain, exactly) + 2e-7, name
        if length > 2:
            assert not np.array_equal(plain, split), name  # the other way was taken


@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), {"causal": True, "window": 70}],
    ids=[*OPTIONS, "window"],
)
@pytest.mark.parametrize("kind", ["positive", "calibrated", "heads"])
def test_with_everything_else(options, kind):
    q, k, v = inputs(300, 40, 20, (3,), seed=1)
    fm = MAPS.get(kind, MAPS["positive"])(40)
    if kind == "calibrated":
        fm = fm.calibrate(q, k, "aderf+sderf")
    exactly = favor_attention(*(x.astype(np.float64) for x in (q, k, v)), fm, **options)
    plain, split = with_and_without(lambda: favor_attention(q, k, v, fm, **options))
    assert relative_rms(split, exactly) < 1.2 * relative_rms(plain, exactly) + 2e-7


@pytest.mark.parametrize("length", [300, 5000])
@tuned(USE_BF16X3=True)
def test_no_bit_depends_on_later_tokens_or_on_threads(length):
    q, k, v = inputs(length, 32, 32, std=1.0)
    fm = feature_map("positive", 32, 256, rng=0)
    out = favor_attention(q, k, v, fm, causal=True, num_threads=1)
    assert np.array_equal(out, favor_attention(q, k, v, fm, causal=True, num_threads=2))
    later = length - 37
    for change in (20.0, np.nan, np.inf):
        q2, k2, v2 = q.copy(), k.copy(), v.copy()
        q2[later:], k2[later:], v2[later:] = -q[later:], change * k[later:], change
        changed = favor_attention(q2, k2, v2, fm, causal=True)
        assert np.array_equal(changed[:later], out[:later])
        assert not np.array_equal(changed[later:], out[later:])
    assert np.array_equal(favor_attention(q, k, v, fm, causal=True, num_threads=1), out)


@tuned(USE_BF16X3=True)
def test_packed_sequences_are_those_alone_to_the_bit():
    q, k, v = inputs(300, 40, 20)
    fm = feature_map("positive", 40, 96, rng=0)
    ends = [0, 1, 5, 130, 300]
    for causal in (False, True):
        packed = favor_attention(q, k, v, fm, causal=causal, cu_seqlens=ends)
        for start, end in itertools.pairwise(ends):
            rows = slice(start, end)
            alone = favor_attention(q[rows], k[rows], v[rows], fm, causal=causal)
            assert np.array_equal(packed[rows], alone)


@tuned(USE_BF16X3=True)
def test_tokens_of_a_state_go_on_where_parts_ended():
    q, k, v = inputs(90, 40, 16, (2,))
    fm = feature_map("positive", 40, 96, rng=0)
    whole = favor_attention(q, k, v, fm, causal=True)
    _, state = favor_attention(q[:, :70], k[:, :70], v[:, :70], fm, causal=True, return_state=True)
    for i in range(70, 90):
        np.testing.assert_allclose(
            state.step(q[:, i], k[:, i], v[:, i]), whole[:, i], rtol=2e-5, atol=2e-6
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 63, 65, 200, 1100])
@pytest.mark.parametrize("dim", [1, 7, 33, 64, 100])
def test_exact_attention(dim, length, causal):
    q, k, v = inputs(length, dim, 17, (2,), std=3.0 / dim**0.25)
    mask = np.arange(length) % 5 != 3
    options = {"causal": causal, "key_mask": mask}
    exactly = exact_attention(*(x.astype(np.float64) for x in (q, k, v)), **options)
    plain, split = with_and_without(lambda: exact_attention(q, k, v, **options))
    few = (
        4e-7 if dim == 1 else 0
    )  # a single product of float32 is rounded once, one of parts is not
    assert relative_rms(split, exactly) < 1.2 * relative_rms(plain, exactly) + 2e-7 + few


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "decay": 0.9}, {"cu_seqlens": [0, 1, 130, 200]}],
    ids=["full", "causal", "decay", "packed"],
)
@pytest.mark.parametrize("kind", [*MAPS, "calibrated"])
def test_gradients(kind, options):
    q, k, v = inputs(200, 40, 17, (3,))
    g = np.random.default_rng(5).standard_normal(v.shape).astype(np.float32)
    fm = MAPS.get(kind, MAPS["positive"])(40)
    if kind == "calibrated":
        fm = fm.calibrate(q, k, "aderf+sderf")

    def gradients(*arrays):
        found = favor_attention_vjp(*arrays, fm, **options)[1](g.astype(arrays[0].dtype))
        return found.q, found.k, found.v

    exactly = gradients(*(x.astype(np.float64) for x in (q, k, v)))
    plain, split = with_and_without(lambda: gradients(q, k, v))
    for wanted, before, now in zip(exactly, plain, split, strict=True):
        assert relative_rms(now, wanted) < 1.2 * relative_rms(before, wanted) + 3e-7
        assert not np.array_equal(before, now)


def test_rows_that_are_not_finite_spoil_what_they_did():
    q, k, v = inputs(200, 40, 20)
    q[3], k[150], v[160, 2] = np.nan, np.inf, np.nan
    fm = feature_map("positive", 40, 96, rng=0)
    for attention in (exact_attention, favor_attention):
        of = [fm] if attention is favor_attention else []
        for causal in (False, True):
            plain, split = with_and_without(lambda: attention(q, k, v, *of, causal=causal))  # noqa: B023
            assert np.array_equal(np.isfinite(plain), np.isfinite(split))
            assert np.isnan(split).any()


def test_they_are_used_where_they_pay():
    """And only there: rows that are short, few features, float64 and other vectors have no parts."""
    for dim, features, dtype, expected in [
        (64, 256, np.float32, UNIT),
        (32, 128, np.float32, UNIT),
        (64, 256, np.float64, False),
        (16, 4096, np.float32, False),
        (128, 32, np.float32, False),
        (32, 64, np.float32, False),
    ]:
        fm = feature_map("positive", dim, features, rng=0)
        found = layout(fm, np.dtype(dtype), 16)
        assert (found.parts is not None) == ("parts" in found.variant) == expected


@tuned(amx_unavailable=lambda: "Operation not permitted")
def test_without_the_systems_leave_there_are_none():
    q, k, v = inputs(100, 64, 16)
    fm = feature_map("positive", 64, 128, rng=0)
    assert layout(fm, np.dtype(np.float32), 16).parts is None
    for attention in (exact_attention, functools.partial(favor_attention, feature_map=fm)):
        found = attention(q, k, v)
        with tuned(USE_BF16X3=False):
            assert np.array_equal(attention(q, k, v), found)
