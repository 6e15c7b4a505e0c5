"""No kernel reads or writes outside its arrays and tiles."""

import signal
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


@pytest.mark.parametrize("what", ["array", "before a tile", "after a tile"])
def test_a_fault_is_noticed(what):
    done = run(what)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), (done.returncode, done.stderr)


def test_no_kernel_leaves_its_arrays_and_tiles():
    done = run()
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout == "no fault\n"
