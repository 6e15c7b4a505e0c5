"""The checker that executes PTX: right where NumPy is right, and it finds what is planted."""

import ptxrun

ptxrun.require()

import math
import re
import types

import demo
import numba
import numpy as np
import ptx
import pytest
import scipy.special
from mutants import function_of, mutate
from numba import cuda

f4 = numba.float32
i4 = np.int32


def elementwise(expressions, a, b, kind):
    """The results of all expressions of x = a[i], y = b[i], found by one kernel."""
    lines = "".join(f"        out[{n}, i] = {e}\n" for n, e in enumerate(expressions))
    kernel = function_of(
        "def kernel(a, b, out):\n    i = cuda.grid(1)\n    if i < a.size:\n"
        f"        x, y = a[i], b[i]\n{lines}",
        cuda=cuda, math=math, numba=numba,
    )  # fmt: skip
    out = np.zeros((len(expressions), a.size), kind)
    report = ptxrun.run(kernel, -(-a.size // 64), 64, (a, b, out), outputs=[2])
    assert report.ok, report
    return out


FLOATS = {
    "x + y": np.add, "x - y": np.subtract, "x * y": np.multiply, "x / y": np.divide,
    "-x": lambda x, y: -x, "abs(x)": lambda x, y: abs(x), "x ** 2": lambda x, y: x * x,
    "min(x, y)": np.minimum, "max(x, y)": np.maximum, "cuda.fma(x, y, x)": lambda x, y: x * y + x,
    "cuda.selp(x < y, x, y)": np.minimum, "math.copysign(x, y)": np.copysign,
    "math.ldexp(x, numba.int32(3))": lambda x, y: 8 * x, "math.isnan(x) + x": lambda x, y: x,
    "math.floor(x)": lambda x, y: np.floor(x), "math.ceil(y)": lambda x, y: np.ceil(y),
    "math.sqrt(abs(x))": lambda x, y: np.sqrt(abs(x)), "math.exp(x)": lambda x, y: np.exp(x),
    "math.log(abs(x))": lambda x, y: np.log(abs(x)), "math.erf(x)": lambda x, y: scipy.special.erf(x),
}  # fmt: skip
CIRCULAR = {
    "math.cos(x)": lambda x, y: np.cos(x), "math.sin(y)": lambda x, y: np.sin(y),
    "math.tanh(x)": lambda x, y: np.tanh(x),
}  # fmt: skip


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats(kind):
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-3, 3, 200).astype(kind) for _ in range(2))
    table = FLOATS | CIRCULAR if kind == np.float32 else FLOATS
    found = elementwise(list(table), a, b, kind)
    tolerance = 8 * np.finfo(kind).eps
    for (name, right), values in zip(table.items(), found, strict=True):
        expected = right(a.astype(np.float64), b.astype(np.float64))
        np.testing.assert_allclose(values, expected, tolerance, tolerance, err_msg=name)


def test_float64_sines_are_refused():
    x = np.ones(1)
    with pytest.raises(NotImplementedError):
        elementwise(["math.sin(x)"], x, x, np.float64)


INTEGERS = [
    "x + y", "x - y", "x * y", "x // y", "x % y", "x & y", "x | y", "x ^ y", "~x", "x << (y & 7)",
    "x >> (y & 7)", "min(x, y)", "max(x, y)", "abs(x)", "-x", "x == y", "x < y",
    "cuda.popc(x)", "cuda.clz(x)",
]  # fmt: skip


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint32, np.uint64])
def test_integers(kind):
    rng = np.random.default_rng(1)
    width = np.iinfo(kind).bits
    top = 40000 if width == 32 else np.iinfo(kind).max // 1000
    a, b = (rng.integers(-top if kind in (np.int32, np.int64) else 1, top, 200) for _ in range(2))
    a, b = a.astype(kind), np.where(b == 0, 7, b).astype(kind)
    oracle = types.SimpleNamespace(
        popc=lambda x: (x % 2**width).bit_count(), clz=lambda x: width - (x % 2**width).bit_length()
    )
    for name, found in zip(INTEGERS, elementwise(INTEGERS, a, b, kind), strict=True):
        values = zip(a.tolist(), b.tolist(), strict=True)
        right = [int(eval(name, {"cuda": oracle, "x": x, "y": y})) % 2**width for x, y in values]
        assert [int(x) % 2**width for x in found] == right, name


@pytest.mark.parametrize("into", [np.int32, np.int64, np.uint32, np.float64, np.float16])
def test_conversions(into):
    a = np.array([0, 1.5, -2.5, 3.999, -7.25, 1e3, 65504, 6e-8, 1e-5], np.float32)
    if into == np.uint32:
        a = np.abs(a)
    assert np.array_equal(elementwise(["x"], a, a, into)[0], a.astype(into))


def test_half_is_read_and_written():
    x = np.array([1, 0.1, 65504, 6e-8, np.inf, np.nan], np.float16)
    (found,) = elementwise(["numba.float32(x) * numba.float32(0.5)"], x, x, np.float16)
    assert np.array_equal(found, (x.astype(np.float32) / 2).astype(np.float16), equal_nan=True)
    with pytest.raises(NotImplementedError):  # its arithmetic is not known: never a wrong pass
        elementwise(["x * y"], x, x, np.float16)


def test_warps():
    def kernel(x, out):
        t = cuda.threadIdx.x
        value = x[t]
        out[0, t] = cuda.shfl_xor_sync(0xFFFFFFFF, value, 5)
        out[1, t] = cuda.shfl_down_sync(0xFFFFFFFF, value, 3)
        out[2, t] = cuda.shfl_up_sync(0xFFFFFFFF, value, 2)
        out[3, t] = cuda.shfl_sync(0xFFFFFFFF, value, 9)
        out[4, t] = cuda.ballot_sync(0xFFFFFFFF, t % 3 == 0)
        out[5, t] = cuda.any_sync(0xFFFFFFFF, t == 40)
        out[6, t] = cuda.all_sync(0xFFFFFFFF, t < 32)

    x = np.random.default_rng(0).integers(0, 99, 64, np.int32)
    out = np.zeros((7, 64), np.int64)
    report = ptxrun.run(kernel, 1, 64, (x, out), outputs=[1])
    assert report.ok, report
    x, t = x.reshape(2, 32), np.arange(32)
    assert np.array_equal(out[0].reshape(2, 32), x[:, t ^ 5])
    assert np.array_equal(out[1].reshape(2, 32), x[:, np.where(t < 29, t + 3, t)])
    assert np.array_equal(out[2].reshape(2, 32), x[:, np.where(t > 1, t - 2, t)])
    assert np.array_equal(out[3].reshape(2, 32), x[:, np.full(32, 9)])
    for warp in range(2):
        ballot = sum(1 << lane for lane in range(32) if (32 * warp + lane) % 3 == 0)
        assert {int(y) % 2**32 for y in out[4, 32 * warp : 32 * warp + 32]} == {ballot}
    assert np.array_equal(out[5] != 0, np.arange(64) >= 32)
    assert np.array_equal(out[6] != 0, np.arange(64) < 32)


def test_atomics():
    def kernel(x, total, most):
        i = cuda.grid(1)
        cuda.atomic.add(total, 0, x[i])
        cuda.atomic.max(most, 0, x[i])

    x = np.random.default_rng(0).integers(-99, 99, 256, np.int32)
    total, most = np.zeros(1, np.int32), np.full(1, -1000, np.int32)
    report = ptxrun.run(kernel, 4, 64, (x, total, most))
    assert report.ok, report
    assert (total[0], most[0]) == (x.sum(), x.max())


@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_the_demo_kernels_are_right(cc, n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((3, n), np.float32)
    out = np.empty_like(x)
    args = (x, out, i4(n))
    report = ptxrun.run(demo.softmax_rows, 3, demo.THREADS, args, cc=cc, outputs=[1], seed=n)
    assert report.ok, report
    np.testing.assert_allclose(out, demo.softmax(x), rtol=1e-5)
    args = (x[0], out[0], i4(n))
    report = ptxrun.run(demo.running_total, 1, demo.THREADS, args, cc=cc, outputs=[1], seed=n)
    assert report.ok, report
    np.testing.assert_allclose(out[0], np.cumsum(x[0].astype(float)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bug", demo.BUGS, ids=[bug[0] for bug in demo.BUGS])
def test_planted_bugs_are_found(bug):
    _, kernel, old, new, kind = bug
    mutant = mutate(kernel, old, new)
    found = [finding for n in (50, 150) for finding in demo_report(mutant, n).findings]
    assert any(finding.startswith(kind) for finding in found), found
    assert "<source" in str(found) or kind == "unwritten"  # names the line


def demo_report(kernel, n):
    x = np.random.default_rng(0).standard_normal((2, n), np.float32)
    if "total" in kernel.__name__:
        return ptxrun.run(kernel, 1, demo.THREADS, (x[0], x[1].copy(), i4(n)), outputs=[1])
    return ptxrun.run(kernel, 2, demo.THREADS, (x, np.zeros_like(x), i4(n)), outputs=[1])


@pytest.mark.parametrize("kernel", [demo.running_total, demo.softmax_rows])
def test_nothing_is_found_without_a_bug(kernel):
    for n in (50, 150):
        report = demo_report(kernel, n)
        assert report.ok, report


def test_a_race_of_blocks_is_found_although_the_writer_has_read_too():
    def kernel(x, out):
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        out[block, t] = x[t]  # both blocks read
        cuda.syncthreads()
        out[block, t] += x[t]
        cuda.syncthreads()
        if block == 0:
            x[t] = f4(0)  # no barrier orders this and what the other block reads

    x = np.ones(32, np.float32)
    report = ptxrun.run(kernel, 2, 32, (x, np.zeros((2, 32), np.float32)), seed=1)
    assert any("race" in finding for finding in report.findings)
    report = ptxrun.run(kernel, 1, 32, (x, np.zeros((1, 32), np.float32)))
    assert report.ok, report


def test_a_race_names_both_lines():
    def kernel(out):
        shared = cuda.shared.array(32, f4)
        t = cuda.threadIdx.x
        shared[t] = f4(t)
        out[t] = shared[31 - t]

    report = ptxrun.run(kernel, 1, 32, (np.zeros(32, np.float32),))
    first = kernel.__code__.co_firstlineno
    named = {f"test_ptxrun.py:{first + line}" for line in (3, 4)}
    races = [finding for finding in report.findings if finding.startswith("race")]
    assert any(all(place in race for place in named) for race in races), report


def test_only_syncwarp_orders_a_warp():
    def shuffled(out):
        shared = cuda.shared.array(32, i4)
        t = cuda.threadIdx.x
        shared[t] = t
        out[t] = cuda.shfl_sync(0xFFFFFFFF, t, 0)
        out[t] += shared[31 - t]

    assert "race" in str(ptxrun.run(shuffled, 1, 32, (np.zeros(32, i4),)))
    ordered = mutate(shuffled, "out[t] +=", "cuda.syncwarp()\n    out[t] +=", i4=i4)
    report = ptxrun.run(ordered, 1, 32, (np.zeros(32, i4),))
    assert report.ok, report


def test_what_is_added_without_an_atomic_races():
    def kernel(total, x):
        total[0] += x[cuda.grid(1)]

    report = ptxrun.run(kernel, 2, 32, (np.zeros(1, i4), np.arange(64, dtype=i4)))
    assert "race" in str(report)


@pytest.mark.parametrize(("stride", "passes", "sectors"), [(1, 1, 1), (2, 2, 2), (32, 32, 8)])
def test_banks_and_sectors_are_counted(stride, passes, sectors):
    def kernel(x, out, stride):
        shared = cuda.shared.array(1024, f4)
        t = cuda.threadIdx.x
        shared[t * stride] = x[t * stride]
        cuda.syncwarp()
        out[t] = shared[(31 - t) * stride]

    x, out = np.zeros(1032, np.float32), np.zeros(40, np.float32)
    x, out = (array[-array.ctypes.data % 32 // 4 :][: len(array) - 8] for array in (x, out))
    report = ptxrun.run(kernel, 1, 32, (x, out, i4(stride)), trace=True)
    assert report.ok, report
    assert set(report.bank_passes.values()) == {passes}
    assert sorted(report.sectors.values()) == [1, sectors]


def test_a_quarter_of_a_warp_has_the_banks_for_four_words_a_thread():
    def kernel(out, pitch):
        shared = cuda.shared.array(4096, f4, alignment=16)
        t = cuda.threadIdx.x & 31
        at = numba.uint32((4 * t * pitch) & 4092)
        for i in range(4):
            shared[at + i] = f4(t)
        cuda.syncwarp()
        out[t] = shared[0]

    for pitch in (1, 8):
        report = ptxrun.run(kernel, 1, 32, (np.zeros(32, np.float32), i4(pitch)), trace=True)
        assert report.ok, report
        assert "st.shared.v4" in report.ptx
        assert max(report.bank_passes.values()) == pitch


def test_neighbours_in_one_word_do_not_race():
    def kernel(out):
        shared = cuda.shared.array(64, numba.uint8)
        t = cuda.threadIdx.x
        shared[t] = t
        cuda.syncthreads()
        out[t] = shared[63 - t]

    out = np.zeros(64, np.uint8)
    report = ptxrun.run(kernel, 1, 64, (out,), outputs=[0])
    assert report.ok, report
    assert np.array_equal(out, np.arange(64)[::-1])


@pytest.mark.parametrize("cc", [(7, 5), (9, 0), (12, 0)])
def test_the_ptx_is_that_of_numba(cc):
    signature = (f4[:, ::1], f4[:, ::1], numba.int32)
    right, _ = cuda.compile_ptx(demo.softmax_rows, signature, cc=cc, lineinfo=True)

    def text(ptx):
        return re.sub(r"_ZN\w+|smem_\d+", "", ptx)  # they count what was compiled

    assert text(ptxrun.compile_ptx(demo.softmax_rows, signature, cc)) == text(right)


def test_a_device_function_is_compiled_without_a_device():
    @cuda.jit(device=True)
    def doubled(x):
        return x + x

    def kernel(x):
        x[cuda.threadIdx.x] = doubled(x[cuda.threadIdx.x])

    x = np.arange(4, dtype=np.float32)
    for n, cc in enumerate(((8, 0), (9, 0), (12, 0)), 1):
        assert ptxrun.run(kernel, 1, 4, (x,), cc=cc).ok
        assert np.array_equal(x, np.arange(4) * 2.0**n)


def test_an_access_between_two_shared_arrays_is_found():
    def kernel(out, n):
        a = cuda.shared.array(16, f4, alignment=16)
        b = cuda.shared.array(16, f4, alignment=16)
        t = cuda.threadIdx.x
        a[t] = f4(1)
        b[t] = f4(2)
        cuda.syncthreads()
        out[t] = a[t + n] + b[t]

    out = np.zeros(16, np.float32)
    assert ptxrun.run(kernel, 1, 16, (out, i4(0))).ok
    report = ptxrun.run(kernel, 1, 16, (out, i4(1)))
    assert "out of bounds" in str(report)


def test_a_warp_that_waits_for_a_lane_that_never_comes():
    def kernel(out):
        t = cuda.threadIdx.x
        if t > 0:
            out[t] = cuda.shfl_sync(0xFFFFFFFF, t, 0)

    report = ptxrun.run(kernel, 1, 32, (np.zeros(32, np.int32),))
    assert "deadlock" in str(report)


def test_a_python_float_brings_float64():
    def kernel(x, out, scale):
        i = cuda.grid(1)
        if i < x.size:
            out[i] = x[i] * scale

    x = np.ones(64, np.float32)
    report = ptxrun.run(kernel, 1, 64, (x, x.copy(), 0.5))
    assert ptxrun.float64_instructions(report.ptx)
    report = ptxrun.run(kernel, 1, 64, (x, x.copy(), np.float32(0.5)))
    assert not ptxrun.float64_instructions(report.ptx)


#: One product of a warp: lanes read eight numbers of A, four of B and four of C, and write four.
PRODUCT = """
.visible .entry k(
.param .u64 k_0,
.param .u64 k_1
)
{
.reg .b32 %r<7>;
.reg .f32 %f<16>;
.reg .b64 %rd<4>;
mov.u32 %r6, %laneid;
ld.param.u64 %rd0, [k_0]; ld.param.u64 %rd1, [k_1];
mul.wide.u32 %rd2, %r6, 64; add.s64 %rd2, %rd0, %rd2;
mul.wide.u32 %rd3, %r6, 16; add.s64 %rd3, %rd1, %rd3;
LOADS
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 SUMS, {%r0, %r1, %r2, %r3}, {%r4, %r5}, SUMS;
st.global.v4.f32 [%rd3], SUMS;
ret;
}
""".replace("SUMS", "{%f12, %f13, %f14, %f15}").replace(
    "LOADS",
    "".join(f"ld.global.f32 %f{i}, [%rd2+{4 * i}];\n" for i in range(16))
    + "".join(f"cvt.rn.bf16x2.f32 %r{i}, %f{2 * i + 1}, %f{2 * i};\n" for i in range(6)),
)


def product(lanes, found):
    spans = [(x.ctypes.data, x.nbytes) for x in (lanes, found)]
    values = [address for address, _ in spans]
    return ptxrun.execute_raw(PRODUCT, 1, len(lanes), values, spans)[0]


def test_a_product_of_tensor_cores():
    """Of numbers that are rounded to bfloat16, where the PTX ISA says that lanes have them."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape) for shape in ((16, 16), (16, 8), (16, 8)))
    a[0, 0], a[3, 5], b[2, 3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**100  # two ties, a large number
    a[:, 2] *= 2.0**-100
    lanes, found = np.zeros((32, 16), np.float32), np.zeros((32, 4), np.float32)
    expected = np.zeros((32, 4))
    bits = a.astype(np.float32).view(np.int32), b.astype(np.float32).view(np.int32)
    near = [((x + 0x7FFF + (x >> 16 & 1)) & -0x10000).view(np.float32).astype(float) for x in bits]
    whole = near[0] @ near[1] + c.astype(np.float32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(8):
            row, column = group + 8 * (i // 2 % 2), 2 * member + i % 2 + 8 * (i // 4)
            lanes[lane, i] = a[row, column]
        for i in range(4):
            lanes[lane, 8 + i] = b[2 * member + i % 2 + 8 * (i // 2), group]
            at = group + 8 * (i // 2), 2 * member + i % 2
            lanes[lane, 12 + i], expected[lane, i] = c[at], whole[at]
    assert product(lanes, found).ok
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert near[0][0, 0] == 1
    assert near[0][3, 5] == 1 + 2.0**-6


def test_a_product_needs_a_whole_warp():
    report = product(np.zeros((16, 16), np.float32), np.zeros((16, 4), np.float32))
    assert "barrier" in str(report)


@pytest.mark.parametrize(
    "line",
    ["add.f16x2 %r1, %r1, %r1;", "cp.async.ca.shared.global [%r1], [%rd1], 4;", "nonsense.b32 %r1;",
     "bar.sync 1;", "cvt.rn.f16x2.f32 %r1, %f1, %f1;", "ld.global.b128 %r1, [%rd1];",
     "cvt.rna.tf32.f32 %r1, %f1;",
     "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r1}, {%f1};"],
)  # fmt: skip
def test_what_is_not_known_is_refused(line):
    text = f".visible .entry k(\n)\n{{\n.reg .b32 %r<2>;\n.reg .b64 %rd<2>;\n{line}\nret;\n}}\n"
    with pytest.raises(NotImplementedError):
        ptx.translate(text)
