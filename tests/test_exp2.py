"""exp2 of the kernels against extended precision, over mantissas and all exponents."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from support.kernels import compiled

from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.simd import exp2, exp2_short, load, nearest, store
from favor_np.cpu.processor import TARGET, VECTOR_BYTES
from favor_np.cpu.record import Floats2, Whole2

#: Largest error in units of the last place; the last two steps of the polynomial make it.
WORST = 1.0 if TARGET.isa == "plain" else 0.8


class Powers(NamedTuple):
    y: Floats2
    n: Whole2
    power: Floats2
    whole: Whole2


@jit(fastmath=EXACT)
def powers(y, n, power, whole):
    for i in range(0, y.shape[1], VECTOR_BYTES // y.itemsize):
        store(power, 0, i, exp2(load(y, 0, i), load(n, 0, i)))
        store(whole, 0, i, nearest(load(y, 0, i)))


@jit()
def all_powers(call):
    powers(call.y, call.n, call.power, call.whole)
    return 0


@functools.cache
def kernel(body, dtype):
    return compiled(body, Powers, dtype)


def apply(y, n, body=all_powers):
    """exp2(y, n) and nearest(y), of any length."""
    y = np.asarray(y)
    integer = np.int32 if y.dtype == np.float32 else np.int64
    size = -(-y.size // 16) * 16
    wide_y, wide_n = np.zeros((1, size), y.dtype), np.zeros((1, size), integer)
    wide_y[0, : y.size] = y
    wide_n[0, : y.size] = n
    power, whole = np.zeros_like(wide_y), np.zeros_like(wide_n)
    kernel(body, y.dtype)(wide_y, wide_n, power, whole)
    return power[0, : y.size], whole[0, : y.size]


def error(y, n):
    """Largest error of exp2(y, n) in units of the last place of the result."""
    got, whole = apply(y, n)
    assert (whole == np.rint(y)).all()
    exact = np.ldexp(np.exp2(y.astype(np.longdouble) - whole), n)
    ulp = np.spacing(exact.astype(y.dtype)).astype(np.longdouble)
    return float((np.abs(got - exact) / ulp).max())


def samples(dtype, count):
    """Numbers of every exponent that the rounding allows, random mantissas and both ends."""
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    lowest, highest = info.minexp - info.nmant, info.nmant - 1  # |y| < 2**(nmant - 1)
    for exponent in range(lowest, highest):
        mantissa = 1 + rng.random(count)
        mantissa[:3] = 1, 1.5, 2 - 2.0**-info.nmant
        y = np.ldexp(mantissa, exponent).astype(dtype)
        yield np.concatenate([y, -y])


def needs_extended_precision(dtype):
    if np.finfo(np.longdouble).nmant <= np.finfo(dtype).nmant + 4:
        pytest.skip("longdouble is no wider here")


@pytest.mark.parametrize(("dtype", "count"), [(np.float32, 2000), (np.float64, 400)])
def test_every_exponent_of_the_argument(dtype, count):
    needs_extended_precision(dtype)
    assert max(error(y, 0) for y in samples(dtype, count)) <= WORST


@pytest.mark.parametrize("first", [0.5, 1, -0.5, -1])
def test_every_mantissa_of_float32(first):
    needs_extended_precision(np.float32)
    bits = np.arange(2**23, dtype=np.int32) + np.float32(first).view(np.int32)
    for part in np.array_split(bits, 16):
        assert error(part.view(np.float32), 0) <= WORST


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_exponent_of_the_result(dtype):
    """The integer moves the exponent and rounds nothing; too small is zero, never subnormal."""
    info = np.finfo(dtype)
    y = np.random.default_rng(1).uniform(-3, 3, 1000).astype(dtype)
    y[:5] = 0, 0.5, -0.5, 1.5, 2.5
    base, _ = apply(y, 0)
    for n in range(info.minexp - 300, info.maxexp):
        got, _ = apply(y, n)
        moved = np.ldexp(base, n)
        normal = moved >= info.smallest_normal
        if n >= info.minexp + 1:
            assert normal.all()
            np.testing.assert_array_equal(got, moved)
        else:
            assert ((got == 0) | (normal & (got == moved))).all(), n
        if n < info.minexp:
            assert (got == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_below_is_zero(dtype):
    """As far as exponents go: a masked key, an empty state."""
    for n in (-(2**20), -(2**24), -(2**30)):
        assert (apply(np.linspace(-5, 5, 33).astype(dtype), n)[0] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integers_are_exact(dtype):
    info = np.finfo(dtype)
    n = np.arange(info.minexp + 1, info.maxexp)
    for y in (0.0, 7.0, -300.0):
        got, whole = apply(np.full(n.size, y, dtype), n)
        assert (whole == y).all()
        np.testing.assert_array_equal(got, np.ldexp(dtype(1), n))


@jit(fastmath=EXACT)
def short_powers(y, n, power):
    for i in range(0, y.shape[1], VECTOR_BYTES // y.itemsize):
        store(power, 0, i, exp2_short(load(y, 0, i), load(n, 0, i)))


@jit()
def all_short_powers(call):
    short_powers(call.y, call.n, call.power)
    return 0


def test_the_short_polynomial_is_as_accurate_as_it_says():
    y = np.linspace(-40, 40, 2**16, dtype=np.float32)
    power, _ = apply(y, np.rint(y), all_short_powers)
    error = power / np.exp2(y.astype(np.float64)) - 1
    assert 7.4e-5 < error.max() < 7.6e-5
    assert -7.6e-5 < error.min() < -7.4e-5
    assert not apply(y, -126, all_short_powers)[0].any()
