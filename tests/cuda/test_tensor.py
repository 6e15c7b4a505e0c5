"""precision="tf32x3": products by tensor cores, as exact as the float32 kernels."""

import importlib

import numpy as np
import ptxrun
import pytest
from support.tolerance import relative_error

ptxrun.require()

from cases import Case
from mutants import planted, source_of
from numba import cuda, float32

from favor_np import favor_attention
from favor_np.cuda.kernels import tiles
from favor_np.cuda.kernels.mma import mma_tf32


def test_the_instruction():
    """Fragments lie as PTX says, factors are cut to 11 bits, sums towards zero."""

    def kernel(a, b, c):
        t = cuda.threadIdx.x
        g, t = t >> 2, t & 3
        x, y, z, w = mma_tf32(
            c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1], a[g, t],
            a[g + 8, t], a[g, t + 4], a[g + 8, t + 4], b[t, g], b[t + 4, g],
        )  # fmt: skip
        c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1] = x, y, z, w

    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape, np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(float) for x in (a, b)]
    exact = c + cut[0] @ cut[1]
    assert abs(exact - c - a.astype(float) @ b).max() > 1e-4
    report = ptxrun.run(kernel, 1, 32, (a, b, c), cc=(8, 0))
    assert report.ok, report
    assert (abs(c) <= abs(exact) + 1e-15).all()
    assert (abs(c - exact) <= np.spacing(abs(c))).all()


def products(forms):
    """Errors of forms of product on one tile, in units in the last place of the largest entry."""
    odd = 33
    module = importlib.import_module("favor_np.cuda.kernels.tiles")
    multiply, turned = module.multiply, module.multiply_turned
    rows, product = module.multiply_rows, module.product
    precision, padded, pitch, stride, staged = (
        module.TF32X3, module.PADDED, module.PITCH, module.STRIDE, module.STAGED,
    )  # fmt: skip

    def kernel(a, b, count, out):
        left = cuda.shared.array(padded, float32, alignment=16)
        right = cuda.shared.array(padded, float32, alignment=16)
        plain = cuda.shared.array(staged, float32, alignment=16)
        total = cuda.local.array((4, 4), float32)
        tid, ty, tx = module.lane()
        for i in range(tid >> 6, 64, 4):
            left[i * stride + (tid & 63)] = a[i, tid & 63]
            right[i * stride + (tid & 63)] = b[i, tid & 63]
        for i in range(tid >> 6, 32, 4):
            plain[i * pitch + (tid & 63)] = b[i, tid & 63]
        cuda.syncthreads()
        for form in range(forms):
            module.clear(total)
            if form == 0:
                rows(precision, left, right, total)
            elif form == 1:
                multiply(precision, left, 32, plain, 32, total)
            elif form == 2:
                turned(precision, left, plain, 32, total)
            else:
                cuda.syncthreads()
                product(precision, a, 0, 1, count, b, 0, 1, 64, a.shape[1], plain, total)
            for i in range(4):
                for j in range(4):
                    out[form, ty + 16 * i, tx + 16 * j] = total[i, j]

    a, b = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)
    out = np.zeros((forms, 64, 64), np.float32)
    report = ptxrun.run(kernel, 1, 256, (a, b, np.int32(odd), out), cc=(8, 0), outputs=[3])
    assert report.ok, report
    a, b = a.astype(float), b.astype(float)
    whole = a @ b.T
    whole[odd:] = 0
    expected = np.stack([a @ b.T, a[:, 32:] @ b[:32], a[:32].T @ b[:32], whole][:forms])
    return abs(out - expected).max(axis=(1, 2)) / np.spacing(np.float32(abs(expected).max()))


def test_products_of_tiles():
    """A few units in the last place of the largest entry, where one product of tf32 errs by thousands."""
    assert max(products(4)) < 12


FRAGMENT = "multiply_fragment(total, j, "
BUGS = {
    "low by high": (f"{FRAGMENT}a0 - h0, a1 - h1, a2 - h2, a3 - h3, high0, high1)", "pass"),
    "high by low": (f"{FRAGMENT}h0, h1, h2, h3, low0, low1)", "pass"),
    "high by high": (f"{FRAGMENT}h0, h1, h2, h3, high0, high1)", "pass"),
    "no split": ("int_as_float((float_as_int(x) + int32(0x1000)) & int32(-0x2000))", "x"),
}


@pytest.mark.parametrize(("old", "new"), BUGS.values(), ids=BUGS)
def test_what_is_left_out_is_seen(old, new):
    start = source_of(tiles.__name__).index(old)
    with planted(tiles.__name__, start, old, new):
        assert min(products(1)) > 200


CASES = {
    "causal": Case(67, dim=20, value_dim=5, rows=33, lead=(), causal=True, masked=True),
    "plain-full": Case(67, keys=70, dim=40, value_dim=66, rows=40, lead=(), kind="positive"),
    "far": Case(67, dim=20, value_dim=5, rows=33, lead=(), std=5.0, causal=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_exact_as_float32(case, gpu):
    expected, own = case.expected(), []
    for precision in ("full", "tf32x3"):
        out = favor_attention(
            *case.arrays(), case.feature_map(), precision=precision, device="cuda",
            **case.keywords(),
        )  # fmt: skip
        own.append(relative_error(out, expected))
    assert own[1] < case.tolerance()
    assert own[1] < 5 * own[0]


def test_later_keys_change_no_bit(gpu):
    case = CASES["far"]
    arrays, fm = case.arrays(), case.feature_map()
    options = {"causal": True, "precision": "tf32x3", "device": "cuda"}
    out = favor_attention(*arrays, fm, **options)
    for x in arrays:
        x[50:] *= np.float32(np.nan)
    found = favor_attention(*arrays, fm, **options)
    assert np.array_equal(found[:50], out[:50])
    assert np.isnan(found[50:]).all()


def test_bad_arguments_are_named(gpu):
    case = Case(4, lead=())
    arrays, fm = case.arrays(), case.feature_map()
    with pytest.raises(ValueError, match=r"^precision='tf32x3' needs a CUDA device"):
        favor_attention(*arrays, fm, precision="tf32x3")
    with pytest.raises(ValueError, match=r"^precision='bfloat16' cannot be used on a CUDA device"):
        favor_attention(*arrays, fm, precision="bfloat16", device="cuda")
    with pytest.raises(ValueError, match=r"^precision must be one of"):
        favor_attention(*arrays, fm, precision="half", device="cuda")


def test_an_older_gpu_is_refused(gpu):
    gpu.name = "T4"
    case = Case(4, lead=())
    with gpu.installed(), pytest.raises(ValueError, match=r"8\.0 or newer, got Tesla T4"):
        favor_attention(*case.arrays(), case.feature_map(), precision="tf32x3", device="cuda")
