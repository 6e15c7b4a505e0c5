"""What the compilers make of the package's kernels is what is written down, and nothing is a fault."""

import ptxrun

ptxrun.require()

import dataclasses
import json

import gate
import numpy as np
import pytest

from favor_np.cli import warmup
from favor_np.cuda.code import THREADS
from favor_np.cuda.device import ARCHITECTURES


def test_a_launch_is_noted_with_the_types_that_numba_sees():
    def kernel(x, out, columns):
        out[0, 0] = x[0, columns]

    recorder = gate.Recorder()
    x, out = np.zeros((2, 2, 3), np.float32)
    x.flags.writeable = False
    half = out.astype(np.float16)
    for args in ((out, out, np.int32(3)), (out, out, np.int32(4)), (x, half, 3)):
        recorder.launch(kernel, (1,), args)
    assert list(recorder.kernels) == [
        "kernel",
        "kernel(x 2d f4 const, out 2d f2, columns i8)",
    ]


@pytest.fixture(scope="module")
def kernels():
    return gate.launched()


TABLE = json.loads(gate.TABLE.read_text())


def test_the_table_has_every_kernel_that_is_launched(kernels):
    assert sorted(kernels) == sorted(TABLE), (
        "PYTHONPATH=tests:tools/cuda_on_cpu python tests/cuda/gate.py"
    )


def of_the_table():
    """Kernels and architectures; variants, which differ in a few instructions, for the last one.

    They are relu and elu, biased keys, gradients of the projection, products of bfloat16 (sm_80
    differs from sm_89, below, in nothing here), and 16-bit numbers, which names have in round
    brackets.
    """
    variants = ("kind=1", "kind=2", "biased=1", "of_map=1", "bfloat16=1", "(")
    for name in TABLE:
        varied = any(text in name for text in variants)
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


@pytest.mark.parametrize("name", [name for name in TABLE if "bfloat16=0" in name])
def test_products_load_128_bits_at_a_time(name):
    for found in TABLE[name].values():
        assert found["wide_shared_loads"] > 0
        assert found["loops"]


def largest(kernels):
    """The kernels with the most registers, which stand for the others."""
    return {
        name: kernel
        for name, kernel in kernels.items()
        if name.startswith(("read[", "pull["))
        and all(part in name for part in ("causal=1", "kind=0", "per_sign=2"))
        and not any(part in name for part in ("divide=0", "of_map=1"))
        and "(" not in name
    }


@pytest.mark.parametrize(
    "cc", [cc for cc in ARCHITECTURES if cc not in gate.STRICT], ids=gate.architecture
)
def test_other_architectures_compile(cc, kernels):
    """Small kernels for one of them: what they make of float32 is the same for all.

    A few words may spill here: the loops of products have none of them.
    """
    chosen = largest(kernels)
    assert len(chosen) == 5  # biased ones as well, and one of bfloat16
    if cc < (8, 0):
        chosen = {name: kernel for name, kernel in chosen.items() if "bfloat16=1" not in name}
    if cc == ARCHITECTURES[0]:
        chosen = chosen | {name: kernel for name, kernel in kernels.items() if "[" not in name}
    for name, kernel in chosen.items():
        found = gate.figures(gate.compiled(kernel, cc), cc)
        assert found.float64 == 0, name
        assert found.spill_stores <= (80 if "bfloat16=1" in name else 32), name
        assert found.shared <= 49152
        assert found.registers * THREADS <= 65536


def test_warming_up_launches_every_kernel_for_float32():
    """`favor-np warmup --device cuda` compiles what is launched with these arguments."""
    with gate.Recorder().installed() as recorder:
        for fm in warmup._maps():
            for causal in (True, False):
                warmup._call_on_gpu(fm, causal=causal)
    assert set(recorder.kernels) >= {
        name for name in TABLE if "(" not in name and "bfloat16=1" not in name and name != "convert"
    }
