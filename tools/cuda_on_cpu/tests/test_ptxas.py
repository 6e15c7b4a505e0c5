"""The figures of machine code: what is a fault is found."""

import ptxrun

ptxrun.require()

import dataclasses

import demo
import numba
import ptxas
import pytest
from mutants import function_of, mutate
from numba import cuda

f4 = numba.float32
ROWS = (f4[:, ::1], f4[:, ::1], numba.int32)


def figures(kernel, signature=ROWS, cc=(9, 0), threads=demo.THREADS):
    return ptxas.figures(ptxrun.compile_ptx(kernel, signature, cc, launch_bounds=threads), cc)


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_the_demo_kernels_pass(cc):
    found = figures(demo.softmax_rows, cc=cc)
    assert found.faults(demo.THREADS) == []
    assert found.shared == 2 * 4 * demo.THREADS
    assert found.registers > 8


def test_float64_is_a_fault():
    mutant = mutate(demo.softmax_rows, "- highest) / total", "- highest) * 1.5 / total")
    assert any("float64" in fault for fault in figures(mutant).faults(64))


def test_an_array_in_local_memory_is_a_fault():
    def kernel(x, out, n):
        mine = cuda.local.array(64, f4)
        for i in range(64):
            mine[i] = x[0, i]
        for i in range(n):
            mine[(i * n) & 63] += x[1, i]  # no register has a number that is not known
        out[0, cuda.threadIdx.x] = mine[n & 63]

    found = figures(kernel)
    assert found.local_depot
    assert found.stack >= 256
    assert len(found.faults(64)) == 2


def test_too_many_registers_are_a_fault():
    found = figures(demo.softmax_rows)
    many = dataclasses.replace(found, registers=65)
    assert many.faults(1008) == []
    assert many.faults(1024) == ["65 registers of 1024 threads"]


def test_too_much_shared_memory_does_not_assemble():
    def kernel(out):
        tile = cuda.shared.array(12 * 1024 + 1, f4)
        tile[cuda.threadIdx.x] = out[0]
        cuda.syncthreads()
        out[cuda.threadIdx.x] = tile[cuda.threadIdx.x + 1]

    with pytest.raises(RuntimeError, match="too much shared data"):
        figures(kernel, (f4[::1],))


def test_spills_are_a_fault():
    """A hundred values live through a loop, where 1024 threads leave room for 64 registers."""
    names = [f"a{i}" for i in range(100)]
    lines = [f"    {name} = x[{i}, cuda.threadIdx.x]" for i, name in enumerate(names)]
    lines += ["    for k in range(n):"]
    lines += [f"        {a} = {a} * {b} + x[k, {i}]" for i, (a, b) in enumerate(
        zip(names, names[1:] + names[:1], strict=True))]  # fmt: skip
    lines += [f"    out[{i}, cuda.threadIdx.x] = {name}" for i, name in enumerate(names)]
    kernel = function_of("def kernel(x, out, n):\n" + "\n".join(lines) + "\n", cuda=cuda)
    found = figures(kernel, threads=1024)
    assert found.spill_stores > 0
    assert any("spilled" in fault for fault in found.faults(1024))


def test_wide_loads_are_counted():
    def kernel(x, out, n):
        tile = cuda.shared.array(256, f4, alignment=16)
        t = cuda.threadIdx.x & 63
        for i in range(4):
            tile[4 * t + i] = x[0, t + i]
        cuda.syncthreads()
        at = 4 * (63 - t)
        out[0, t] = tile[at] + tile[at + 1] + tile[at + 2] + tile[at + 3]

    assert figures(kernel).wide_shared_loads == 1
    narrow = mutate(kernel, ", alignment=16", "", f4=f4)
    assert figures(narrow).wide_shared_loads == 0


def test_loops_of_products_are_found():
    """Of two loops the one with products, and of a loop in a loop the inner one."""

    def kernel(x, out, n):
        total = f4(0)
        for i in range(n):
            total += x[0, i]
        for k in range(n):
            for i in range(n):
                for j in range(24):
                    total += x[i, j] * x[k, j]
            total += f4(k)
        out[0, 0] = total

    ((products, instructions, _),) = figures(kernel).loops
    assert 24 <= products < instructions < 400
    assert figures(mutate(kernel, "x[i, j] * x[k, j]", "x[i, j] + x[k, j]")).loops == []
