"""float16 and bfloat16 as kernels read and write them, number by number."""

import ml_dtypes
import numpy as np
import ptxrun
import pytest
from numba import cuda

ptxrun.require()

from cases import same_rounded

from favor_np.cuda.kernels.pack import change
from favor_np.cuda.kernels.storage import number, rounded

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def held(array):
    """An array as kernels see it: bfloat16 as words."""
    return array if array.dtype == np.float16 else array.view(np.int16)


def read_numbers(source, target):
    i = cuda.blockIdx.x * 256 + (cuda.threadIdx.x & 255)
    target[i] = number(source[i])


def write_numbers(source, target):
    i = cuda.blockIdx.x * 256 + (cuda.threadIdx.x & 255)
    target[i] = rounded(source[i], target)


@each_dtype
def test_every_number_is_read_as_it_is(dtype):
    stored = np.arange(2**16).astype(np.uint16).view(dtype)
    found = np.empty(2**16, np.float32)
    report = ptxrun.run(read_numbers, 256, 256, (held(stored), found), outputs=[1])
    assert report.ok, report
    assert np.array_equal(found, stored.astype(np.float32), equal_nan=True)


@each_dtype
def test_a_number_is_written_as_the_nearest(dtype):
    """Ties go to the even one, what is too large to infinity, NaN stays NaN whatever its bits."""
    stored = np.arange(2**16).astype(np.uint16).view(dtype).astype(np.float32)
    numbers = np.sort(stored[np.isfinite(stored)])
    ties = numbers[:-1] / 2 + numbers[1:] / 2
    beside = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    nan = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    others = np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -0.0], np.float32)
    numbers = np.concatenate([nan, others, numbers, ties, *beside])
    numbers = numbers[: len(numbers) // 256 * 256]
    found = np.empty(len(numbers), dtype)
    report = ptxrun.run(
        write_numbers, len(numbers) // 256, 256, (numbers, held(found)), outputs=[1]
    )
    assert report.ok, report
    with np.errstate(over="ignore", invalid="ignore"):
        expected = numbers.astype(dtype)
    finite = ~np.isnan(numbers)
    assert np.array_equal(found.view(np.uint16)[finite], expected.view(np.uint16)[finite])
    assert np.isnan(found[~finite].astype(np.float32)).all()


@each_dtype
def test_products_of_change_are_rounded(dtype):
    """So the gradients of calibrated maps are written."""
    rng = np.random.default_rng(0)
    rows, matrix = (rng.standard_normal((n, 16), np.float32) for n in (70, 16))
    table = np.array([[0, 64, 0, 0], [64, 6, 64, 0]], np.int32)
    wide, short = np.empty((70, 9), np.float32), np.empty((70, 9), dtype)
    for target in (wide, held(short)):
        args = (rows, matrix, np.float32(0), table, target, np.zeros(70, np.float32))
        report = ptxrun.run(change, 2, 256, args, outputs=[4])
        assert report.ok, report
    assert same_rounded(short, wide, dtype)
