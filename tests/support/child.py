"""Python processes for tests that fork, interrupt, break the disk, or might hang."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parents[1]

#: Seconds after which a test hangs: the one limit of time in this suite, far beyond what a busy
#: machine needs.
HANG = 1200

#: Two Python threads share this call, and a helper is there after it.
BEGIN = """
import os, signal, sys, threading, time
import numpy as np
import favor_np

rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 4, 2048, 32)).astype(np.float32)
fm = favor_np.feature_map("positive", dim=32, num_features=64)

def call(threads=2):
    return favor_np.favor_attention(q, k, v, fm, causal=True, num_threads=threads)

def helpers():
    return sum(t.name == "favor_np-helper" for t in threading.enumerate())

right = call(1)

def check(threads=2):
    assert (call(threads) == right).all()
"""

#: What a forked child does: it ends with status 0, or 14 if it hangs.
FORK = f"""
def fork(use):
    pid = os.fork()
    if pid == 0:
        signal.alarm({HANG})
        try:
            use()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


def environment(**changes):
    """The environment of a process that finds `support`, with these changes."""
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)} | changes


def names_of(file):
    """Code that gives a process the names of a test file."""
    return f"import runpy\nglobals().update(runpy.run_path({str(file)!r}))\n"


def python(code, *options, timeout=HANG, cwd=None, unset=(), **environ):
    """Run ``code`` in a fresh interpreter; what it printed.  It must end well and say no more."""
    env = {name: value for name, value in environment(**environ).items() if name not in unset}
    process = subprocess.Popen(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
        start_new_session=os.name == "posix",
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        if os.name == "posix":  # with all its children
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs after {timeout} s\n{out}\n{err}") from None
    assert (process.returncode, err) == (0, ""), (process.returncode, out, err)
    return out
