"""Bugs planted in the package's own kernels: what is checked on the CPU must find them."""

import re

import ptxrun

ptxrun.require()

import gate
import numba
import numpy as np
import pytest
from cases import Case
from planting import MODULES, planted, source_of
from ptxdevice import PtxDevice
from support.tolerance import relative_error

import favor_np
from favor_np.cuda.code import THREADS

#: Slices, columns, stages, and parts of a chunk, for keys are tall, come twice; chunks in the scan.
CAUSAL = Case(length=131, std=6.0, masked=True, causal=True, seed=3)
#: And here the tiles of a fold.
FULL = Case(length=131, masked=True, seed=3)


def forward():
    """Attention over a part, and from the state that it leaves over the rest; then over all."""
    q, k, v = CAUSAL.arrays()
    fm, keywords = CAUSAL.feature_map(), CAUSAL.keywords()
    mask = keywords.pop("key_mask")
    with PtxDevice().installed():
        first, state = favor_np.favor_attention(
            q[:, :70], k[:, :70], v[:, :70], fm, key_mask=mask[:70], return_state=True,
            device="cuda", **keywords,
        )  # fmt: skip
        second = favor_np.favor_attention(
            q[:, 70:], k[:, 70:], v[:, 70:], fm, key_mask=mask[70:], state=state, device="cuda",
            **keywords,
        )  # fmt: skip
        assert_right(CAUSAL, np.concatenate([first, second], axis=1))
        whole = favor_np.favor_attention(
            *FULL.arrays(), FULL.feature_map(), device="cuda", **FULL.keywords()
        )
        assert_right(FULL, whole)


def assert_right(case, out):
    assert relative_error(out, case.expected()) < case.tolerance(), "the result is wrong"


def places(pattern):
    """Where the kernels of attention have a text: modules and positions, by line."""
    for module in MODULES[:3]:
        text = source_of(module)
        for found in re.finditer(pattern, text):
            line = text[: found.start()].count("\n") + 1
            name = f"{module.rpartition('.')[2]}:{line}"
            yield pytest.param(module, found.start(), found[0], id=name)


def test_nothing_is_found_without_a_bug():
    forward()


#: But for two of a read: the product that follows the first has one as well, and after the second
#: a warp reads rows that it wrote itself, with a barrier of its own in between.
BARRIERS = (
    r"cuda\.syncthreads\(\)"
    r"(?!\n {8}(?:for part in|part = )|\n {16}if causal:\n {20}multiply_rows)"
)


@pytest.mark.parametrize(("module", "start", "text"), [*places(BARRIERS)][::3])  # 9 s each
def test_a_barrier_less(module, start, text):
    with planted(module, start, text, "pass"), pytest.raises(AssertionError, match=r"race|uninit"):
        forward()


#: Guards of the tails: of rows, of columns, of log-norms, of what is written.
GUARDS = [
    ("tiles", "    if i < count:", "    if True:"),
    ("favor", "if p < count and inside:", "if inside:"),
    ("favor", "if p < count and inside:", "if p < count:"),
    ("favor", "if p >= count or (mask.size", "if (mask.size"),
    ("favor", "and i < job[COUNT]:", "and i < TILE:"),
]


@pytest.mark.parametrize(("module", "old", "new"), GUARDS)
def test_a_guard_less(module, old, new):
    module = f"favor_np.cuda.kernels.{module}"
    start = source_of(module).index(old)
    with planted(module, start, old, new), pytest.raises(AssertionError, match=r"out of bounds"):
        forward()


def test_a_python_float_is_refused_by_the_gate():
    """Where np.float32(limit) is meant, a float would bring float64 into the kernel."""
    function, signature = gate.launched()["pack"]
    assert numba.float32 in signature
    doubled = tuple(numba.float64 if kind == numba.float32 else kind for kind in signature)
    faults = gate.figures(gate.compiled((function, doubled), (9, 0)), (9, 0)).faults(THREADS)
    assert any("float64" in fault for fault in faults)
