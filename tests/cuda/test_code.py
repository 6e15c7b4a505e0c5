"""Compiled kernels on disk: the second process does not compile; whatever is wrong, it does."""

import ast
import inspect
from pathlib import Path

import ptxrun
import pytest
import stub_driver
from support import child

ptxrun.require()

import numpy as np

import favor_np
from favor_np.cuda import code
from favor_np.cuda.kernels.pack import convert
from favor_np.cuda.launch import make_fold, make_read

KINDS = (np.dtype("f4"), 1), (np.dtype("f2"), 1)

#: Launches the smallest kernel, which rounds numbers to 16 bits.
SCRIPT = f"""{stub_driver.CHILD}
stub_driver.install()
from numba import cuda
from favor_np.cuda import code, runtime
from favor_np.cuda.kernels.pack import convert
x = cuda.to_device(np.arange(300, dtype=np.float32) / 7)
y = cuda.device_array(300, np.float16)
runtime.launch(convert, (2,), (x, y), 0)
assert y.copy_to_host().tobytes() == x.copy_to_host().astype(np.float16).tobytes()
print(code.counts["compiled"], code.counts["stored"], code.kept())
"""


@pytest.fixture
def run(tmp_path):
    """Run the script with a cache of its own: how many were compiled, found, and are kept."""

    def run(**environ):
        options = {"NUMBA_CACHE_DIR": str(tmp_path), "FAVOR_NP_CACHE": "1"} | environ
        return child.python(SCRIPT, **options).split()

    return run


def test_the_second_process_does_not_compile(run, tmp_path):
    assert run() == ["1", "0", "1"]
    (path,) = tmp_path.rglob("*.code")
    before = path.read_bytes()
    assert b"pickle" not in before
    assert run() == ["0", "1", "1"]
    path.write_bytes(before[:-9] + b"?" + before[-8:])
    assert run() == ["1", "0", "1"]
    assert run(NUMBA_OPT="1") == ["1", "0", "2"]  # another compiler
    assert run(FAVOR_NP_CACHE="0") == ["1", "0", "0"]
    assert len([*tmp_path.rglob("*.code")]) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"kinds": ((np.dtype("f4"), 1), (np.dtype("i2"), 1))},
        {"kinds": ((np.dtype("f4"), 1), (np.dtype("f2"), 2))},
        {"capability": (8, 6)},
    ],
)
def test_what_code_depends_on_is_in_its_header(changed, monkeypatch):
    monkeypatch.setattr(code.device, "driver_version", lambda: (13, 0))
    plain = {"kinds": KINDS, "capability": (8, 9)}
    assert code.header(convert, **plain) != code.header(convert, **(plain | changed))
    assert code.header(convert, **plain)["sources"] == code.SOURCES != ""


def test_each_kernel_has_a_name_of_its_own():
    made = [
        make_fold(kind, signs, biased)
        for biased in (True, False)
        for kind in range(3)
        for signs in (1, 2)
    ]
    made += [
        make_read(0, 2, causal, divide, False) for causal in (True, False) for divide in (0, 1)
    ]
    assert len({code.symbol(kernel) for kernel in made}) == len(made)
    assert code.symbol(convert) == "favor_np_cuda_convert"


def test_kernels_take_nothing_else_from_outside():
    """Of the package: constants that the digest of the sources includes."""
    folder = Path(inspect.getfile(favor_np)).parent / "cuda" / "kernels"
    paths = sorted(folder.glob("*.py"))
    assert len(paths) > 4
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("favor_np"):
                names = {f"{node.module}.{name.name}" for name in node.names}
                ours = node.module.startswith("favor_np.cuda.kernels")
                constants = node.module == "favor_np.numerics" and all(
                    name.rpartition(".")[2].isupper() for name in names
                )
                assert ours or constants or names == {"favor_np.numerics"}, path
