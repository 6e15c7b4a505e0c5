"""The checker that runs kernels as Python: right where NumPy is right, and it finds what is planted."""

import ptxrun

ptxrun.require()

import demo
import numba
import numpy as np
import pytest
import simcheck
from mutants import mutate
from numba import cuda

f4 = numba.float32
i4 = np.int32


def demo_report(kernel, n, **options):
    x = np.random.default_rng(n).standard_normal((2, n), np.float32)
    if "total" in kernel.__name__:
        out = np.zeros(n, np.float32)
        args, grid, right = (x[0].copy(), out, i4(n)), 1, np.cumsum(x[0].astype(np.float64))
    else:
        out = np.zeros((2, n), np.float32)
        args, grid, right = (x, out, i4(n)), 2, demo.softmax(x)
    report = simcheck.run(kernel, grid, demo.THREADS, args, outputs=[1], **options)
    return report, out, right


@pytest.mark.parametrize("kernel", [demo.running_total, demo.softmax_rows])
@pytest.mark.parametrize("n", [1, 64, 65, 150])
def test_the_demo_kernels_are_right(kernel, n):
    report, out, right = demo_report(kernel, n, seed=n)
    assert report.ok, report
    np.testing.assert_allclose(out, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bug", demo.BUGS, ids=[bug[0] for bug in demo.BUGS])
def test_planted_bugs_are_found(bug):
    _, kernel, old, new, kind = bug
    mutant = mutate(kernel, old, new)
    found = [finding for n in (50, 150) for finding in demo_report(mutant, n)[0].findings]
    assert any(finding.startswith(kind) for finding in found), found
    assert "<source" in str(found) or kind == "unwritten"  # names the line


def test_a_race_names_both_lines():
    def kernel(out):
        shared = cuda.shared.array(32, f4)
        t = cuda.threadIdx.x
        shared[t] = f4(t)
        out[t] = shared[31 - t]

    report = simcheck.run(kernel, 1, 32, (np.zeros(32, np.float32),))
    first = kernel.__code__.co_firstlineno
    races = [finding for finding in report.findings if finding.startswith("race")]
    named = {f"test_simcheck.py:{first + line}" for line in (3, 4)}
    assert any(all(place in race for place in named) for race in races), report


def test_a_device_function_is_followed():
    @cuda.jit(device=True)
    def half(x):
        return x / f4(2) + cuda.shared.array(1, f4)[0]

    def kernel(x, out):
        out[cuda.threadIdx.x] = half(x[cuda.threadIdx.x])

    report = simcheck.run(kernel, 1, 4, (np.ones(4, np.float32), np.ones(4, np.float32)))
    assert [finding.split(":")[0] for finding in report.findings] == ["uninitialised"]


def test_warps():
    def kernel(x, out):
        t = cuda.threadIdx.x
        value = x[t]
        out[0, t] = cuda.shfl_xor_sync(0xFFFFFFFF, value, 5)
        out[1, t] = cuda.shfl_down_sync(0xFFFFFFFF, value, 3)
        out[2, t] = cuda.shfl_up_sync(0xFFFFFFFF, value, 2)
        out[3, t] = cuda.shfl_sync(0xFFFFFFFF, value, 9)
        out[4, t] = cuda.ballot_sync(0xFFFFFFFF, t % 3 == 0)
        out[5, t] = cuda.syncthreads_count(t % 3 == 0)

    x, t = np.arange(100, 132, dtype=np.int32), np.arange(32)
    out = np.zeros((6, 32), np.int64)
    report = simcheck.run(kernel, 1, 32, (x, out), outputs=[1])
    assert report.ok, report
    assert np.array_equal(out[0], x[t ^ 5])
    assert np.array_equal(out[1], x[np.where(t < 29, t + 3, t)])
    assert np.array_equal(out[2], x[np.where(t > 1, t - 2, t)])
    assert set(out[3]) == {109}
    assert set(out[4]) == {sum(1 << i for i in range(0, 32, 3))}
    assert set(out[5]) == {11}


def test_only_syncwarp_orders_a_warp():
    def shuffled(out):
        shared = cuda.shared.array(32, i4)
        t = cuda.threadIdx.x
        shared[t] = t
        cuda.shfl_sync(0xFFFFFFFF, t, 0)
        out[t] = shared[31 - t]

    assert "race" in str(simcheck.run(shuffled, 1, 32, (np.zeros(32, i4),)))
    ordered = mutate(shuffled, "cuda.shfl_sync(0xFFFFFFFF, t, 0)", "cuda.syncwarp()", i4=i4)
    assert simcheck.run(ordered, 1, 32, (np.zeros(32, i4),)).ok


def test_a_warp_that_waits_for_a_lane_that_never_comes():
    def kernel(out):
        t = cuda.threadIdx.x
        if t > 0:
            out[t] = cuda.shfl_sync(0xFFFFFFFF, t, 0)

    assert "deadlock" in str(simcheck.run(kernel, 1, 32, (np.zeros(32, i4),)))


def test_atomics_do_not_race():
    def kernel(total, x):
        cuda.atomic.add(total, 0, x[cuda.grid(1)])

    total, x = np.zeros(1), np.arange(64.0)
    report = simcheck.run(kernel, 2, 32, (total, x))
    assert report.ok, report
    assert total[0] == x.sum()
    plain = mutate(
        kernel, "cuda.atomic.add(total, 0, x[cuda.grid(1)])", "total[0] += x[cuda.grid(1)]"
    )
    assert "race" in str(simcheck.run(plain, 2, 32, (total, x)))


def test_arrays_of_a_thread_are_checked():
    def kernel(out, n):
        mine = cuda.local.array((2, 2), f4)
        mine[0, 0] = f4(1)
        out[0] = mine[0, 0] + mine[0, 1]
        mine[1, n] = f4(2)

    report = simcheck.run(kernel, 1, 1, (np.zeros(1, np.float32), 2))
    assert [finding.split(":")[0] for finding in report.findings] == [
        "uninitialised",
        "out of bounds",
    ]


def test_banks_and_sectors_are_counted():
    def kernel(x, out, stride):
        shared = cuda.shared.array(1024, f4)
        t = cuda.threadIdx.x
        shared[t * stride] = x[t * stride]
        out[t] = shared[t * stride]

    for stride, passes, sectors in ((1, 1, 4), (2, 2, 8), (32, 32, 32)):
        x, out = np.zeros(1024, np.float32), np.zeros(32, np.float32)
        report = simcheck.run(kernel, 1, 32, (x, out, stride), stats=True)
        assert set(report.bank_passes.values()) == {passes}
        assert sorted(report.sectors.values()) == [4, sectors]


def test_too_much_shared_memory_and_an_exception():
    def kernel(out):
        shared = cuda.shared.array(16 * 1024, f4)
        shared[cuda.threadIdx.x] = out[0, 0, 0]

    kinds = [x.split(":")[0] for x in simcheck.run(kernel, 1, 1, (np.zeros(1, i4),)).findings]
    assert kinds == ["shared memory", "exception"]
