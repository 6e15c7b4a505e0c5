"""Kernels compiled for other processors: the same results, and vector code where it counts."""

import re
import subprocess
import sys

import numpy as np
import pytest
from support.child import HANG, environment, names_of

import favor_np
from favor_np.cpu.processor import TARGET

#: What a processor must have to run the code of a target, its vectors and their register.
TARGETS = {
    "x86-64": ("plain", 16, "xmm"),
    "x86-64-v3": ("avx2", 32, "ymm"),
    "x86-64-v4": ("avx512", 64, "zmm"),
    "haswell": ("avx2", 32, "ymm"),
    "skylake-avx512": ("avx512", 64, "zmm"),
}
#: Of these only the assembly is looked at.
NAMES = ("haswell", "skylake-avx512")
WIDTHS = ["plain", "avx2", "avx512"]

pytestmark = pytest.mark.skipif(TARGET.isa not in WIDTHS, reason="these are x86 processors")


def results(dtype):
    """Every kernel on sizes that fill no tile."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 150, n)).astype(dtype) for n in (17, 17, 19))
    found = {}
    for kind in ("positive", "relu", "elu"):
        fm = favor_np.feature_map(kind, dim=17, num_features=70, rng=1)
        for causal in (False, True):
            found[f"{kind} {causal}"] = favor_np.favor_attention(q, k, v, fm, causal=causal)
        state = favor_np.AttentionState.zeros(fm, 19, (2,), dtype=dtype)
        state.update(k, v)
        found[f"{kind} step"] = state.step(q[:, 0], k[:, 0], v[:, 0])
    found["exact"] = favor_np.exact_attention(q, k, v)
    found["exact causal"] = favor_np.exact_attention(q, k, v, causal=True)
    for causal in (False, True):
        grads = favor_np.exact_attention_vjp(q, k, v, causal=causal)[1](v)
        found[f"exact gradient {causal}"] = np.concatenate(grads, axis=-1)
    return {f"{np.dtype(dtype)} {name}": value for name, value in found.items()}


#: What a process of another target does.
PROCESS = """
import sys
from pathlib import Path
from favor_np.cpu import code, processor
from favor_np.cpu.kernels import jit

class Kernel(jit._Kernel):
    def emit_native_object(self):
        (folder / "assembly").write_text(self.get_asm_str())
        return super().emit_native_object()

name, folder, compiler = sys.argv[1], Path(sys.argv[2]), jit._Kernel
found = {} if name in NAMES else results(np.float32) | results(np.float64)
np.savez(folder / "results", bytes=processor.VECTOR_BYTES, **found)
jit._Kernel = Kernel
code.kernel("attend_exact", np.dtype(np.float32)).compile()
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One process for each target, all at once: they compile."""
    team = {}
    for name, (isa, *_) in TARGETS.items():
        if WIDTHS.index(isa) <= WIDTHS.index(TARGET.isa):
            environ = {"NUMBA_CPU_NAME": name, "PYTHONWARNINGS": "error"}
            folder = tmp_path_factory.mktemp(name)
            command = [sys.executable, "-c", names_of(__file__) + PROCESS, name, str(folder)]
            process = subprocess.Popen(
                command, env=environment(**environ), stderr=subprocess.PIPE, text=True
            )
            team[name] = folder, process
    yield team
    for _, process in team.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request, processes):
    """Name, results and assembly of one target."""
    name = request.param
    if name not in processes:
        pytest.skip("this machine cannot run its code")
    folder, process = processes[name]
    error = process.communicate(timeout=HANG)[1] if process.returncode is None else ""
    assert (process.returncode, error) == (0, "")
    with np.load(folder / "results.npz") as found:
        return name, dict(found), (folder / "assembly").read_text()


@pytest.fixture(scope="module")
def expected():
    """The results here, in float64 also for float32."""
    wide = results(np.float64)
    return wide | {name.replace("float64", "float32"): value for name, value in wide.items()}


@pytest.mark.parametrize("compiled", sorted(TARGETS.keys() - NAMES), indirect=True)
def test_same_results(compiled, expected):
    name, found, _ = compiled
    assert found.keys() - {"bytes"} == expected.keys()
    for case, value in expected.items():
        tolerance = 1e-5 if "float32" in case else 1e-13
        error = np.abs(found[case] - value).max() / np.abs(value).max()
        assert error <= tolerance, (name, case, error)


def hottest_loop(assembly):
    """The lines of the loop with the most sums of float32: of a block that jumps to itself."""
    blocks = re.split(r"^(\S+):.*$", assembly, flags=re.MULTILINE)
    loops = [
        lines
        for label, lines in zip(blocks[1::2], blocks[2::2], strict=True)
        if re.search(rf"\bj\w+\s+{re.escape(label)}$", lines, re.MULTILINE)
    ]
    return max(loops, key=lambda lines: len(re.findall(r"\b(?:vfmadd\w+|v?add)ps\b", lines)))


def test_hot_loop_is_vector_code(compiled):
    """Two vectors of sums for each row of a tile, fused and in registers where that can be."""
    name, found, assembly = compiled
    _, width, register = TARGETS[name]
    assert found["bytes"] == width
    loop = hottest_loop(assembly)
    sums = {64: 2 * 14, 32: 2 * 6, 16: 2 * 6}[width]
    if width == 16:
        assert len(re.findall(r"\bmulps\b", loop)) >= sums
        assert len(re.findall(r"\baddps\b", loop)) >= sums
    else:
        assert len(re.findall(rf"\bvfmadd\w+ps\b.*%{register}", loop)) >= sums
        # One of 28 sums may: it is stored and loaded again, at no cost that could be measured.
        moved = re.findall(rf"\bv?mov\w+\s+(?:%{register}.*\(%rsp\)|.*\(%rsp\), %{register})", loop)
        assert len(moved) <= (2 if width == 64 else 0), "sums leave the registers"
    assert "call" not in loop


def test_no_wider_instructions_than_the_processor_has(compiled):
    name, _, assembly = compiled
    _, width, _ = TARGETS[name]
    if width < 64:
        assert "%zmm" not in assembly
    if width < 32:
        assert "%ymm" not in assembly
        assert not re.search(r"\bv\w+ps\b", assembly), "AVX"


def test_fused_products_are_never_called(compiled):
    """Where there is no such instruction, fma of the C library is a hundred times slower."""
    name, _, assembly = compiled
    assert not re.search(r"\bfmaf?\b", assembly)
    # Sums fuse where they can, in float64 and in scalar code too.
    if TARGETS[name][1] > 16:
        assert re.search(r"\bvfmadd\w+pd\b", assembly)
