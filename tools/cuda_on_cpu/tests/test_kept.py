"""What is kept is found again, and whatever a kernel depends on makes another file."""

import ptxrun

ptxrun.require()

import kept
import numba
import numpy as np
import pytest
from numba import cuda

SOURCE = """
SCALE, KIND = 2, numba.float32

@cuda.jit(device=True)
def inner(x):
    return x * SCALE

@cuda.jit(device=True)
def outer(x):
    return inner(x) + KIND(1)

def make(added):
    def kernel(x):
        x[0] = outer(x[0]) + added

    return kernel
"""


def parts(old="", new="", added=3):
    scope = {"cuda": cuda, "numba": numba, "np": np}
    assert old in SOURCE
    exec(compile(SOURCE.replace(old, new), "<a kernel>", "exec"), scope)
    return kept.parts_of(scope["make"](added))


def test_the_same_kernel_is_found_again():
    assert parts() == parts()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SCALE, KIND = 2", "SCALE, KIND = 3"),
        ("numba.float32", "numba.float64"),
        ("x * SCALE", "x / SCALE"),
        ("KIND(1)", "KIND(2)"),
        ("x[0] = ", "x[1] = "),
        ("device=True", "device=True, fastmath=True"),
        ("def make", "\ndef make"),  # a report names lines
    ],
)
def test_whatever_it_depends_on_makes_another(old, new):
    assert parts(old, new) != parts()


def test_what_its_factory_was_asked_for_makes_another():
    assert parts(added=4) != parts()


@pytest.mark.parametrize("value", ["[1, 2]", "np.ones(3)", "object()"])
def test_a_kernel_with_values_that_may_change_is_not_kept(value):
    with pytest.raises(TypeError, match="may stand for anything"):
        parts("SCALE, KIND = 2", f"SCALE, KIND = {value}")


def test_a_file_is_made_once(tmp_path):
    def write(path):
        path.write_text("x")

    folder = tmp_path / "new"
    made = {kept.file(x, write, folder) for x in ((b"1", b"2"), (b"1", b"23"), (b"12", b"3"))}
    assert len(made) == 3
    assert {*folder.iterdir()} == made
    assert kept.file((b"1", b"2"), lambda _: pytest.fail("it is there"), folder) in made
