"""The gate itself: what it must refuse, it refuses."""

import ptxrun

ptxrun.require()

import dataclasses
import json

import demo
import gate
import numba
import numpy as np
import pytest
from mutants import function_of, mutate
from numba import cuda

from favor_np.cuda.device import ARCHITECTURES
from favor_np.cuda.runtime import THREADS

f4 = numba.float32
ROWS = (f4[:, ::1], f4[:, ::1], numba.int32)


def figures(kernel, signature=ROWS, cc=(9, 0), threads=demo.THREADS):
    return gate.figures(gate.compiled((kernel, signature), cc, bounds=threads), cc)


@pytest.mark.parametrize("cc", gate.STRICT)
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


def test_a_launch_is_noted_with_the_types_that_numba_sees():
    recorder = gate.Recorder()
    x, out = np.zeros((2, 2, 3), np.float32)
    x.flags.writeable = False
    half = out.astype(np.float16)
    for args in ((out, out, np.int32(3)), (out, out, np.int32(4)), (x, half, 3)):
        recorder.launch(demo.softmax_rows, (1,), args)
    assert list(recorder.kernels) == [
        "softmax_rows",
        "softmax_rows(x 2d f4 const, out 2d f2, columns i8)",
    ]


# ---- the kernels of the package


@pytest.fixture(scope="module")
def kernels():
    return gate.launched()


TABLE = json.loads(gate.TABLE.read_text())


def test_the_table_has_every_kernel_that_is_launched(kernels):
    assert sorted(kernels) == sorted(TABLE), "PYTHONPATH=tests python tests/cuda/gate.py"


def of_the_table():
    """Kernels and architectures; variants, which differ in a few instructions, for the last one.

    They are relu and elu, and 16-bit numbers, which names have in round brackets.
    """
    for name in TABLE:
        varied = any(text in name for text in ("kind=1", "kind=2", "("))
        for cc in gate.STRICT[-1:] if varied else gate.STRICT:
            yield pytest.param(name, cc, id=f"{name}-{gate.architecture(cc)}")


@pytest.mark.parametrize(("name", "cc"), [*of_the_table()])
def test_figures(name, cc, kernels):
    """Nothing spills, nothing is float64, nothing is too large; and the table is what is found."""
    found = gate.figures(gate.compiled(kernels[name], cc), cc)
    assert found.faults(THREADS) == []
    found, expected = dataclasses.asdict(found), dict(TABLE[name][gate.architecture(cc)])
    # NVVM joins a load of an epilogue more or less, depending on what it compiled before
    wide = "wide_shared_loads"
    assert abs(found.pop(wide) - expected.pop(wide)) <= 1
    assert found == expected


@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith(("fold", "read"))])
def test_products_load_128_bits_at_a_time(name):
    for found in TABLE[name].values():
        assert found["wide_shared_loads"] > 0
        assert found["loops"]


@pytest.mark.parametrize("cc", [ARCHITECTURES[0], ARCHITECTURES[-1]], ids=gate.architecture)
def test_other_architectures_compile(cc, kernels):
    """The kernels of antithetic maps in float32 stand for the others: those differ in little."""
    for name, kernel in kernels.items():
        if "kind" in name and ("kind=0, per_sign=2" not in name or "(" in name):
            continue
        assert gate.figures(gate.compiled(kernel, cc), cc).float64 == 0
