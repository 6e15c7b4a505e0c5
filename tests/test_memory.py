"""No kernel reads or writes outside its arrays."""

import subprocess
import sys

import pytest
from support.child import HANG, TESTS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs mmap and mprotect")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "support.guard", *arguments],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def test_a_fault_is_noticed():
    assert run("fault").returncode < 0


def test_no_kernel_leaves_its_arrays():
    done = run()
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout == "no fault\n"
