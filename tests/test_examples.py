"""The examples that run for long: on little, stopped, and continued."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.child import HANG, environment

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
EXAMPLE = EXAMPLES / "hundred_million.py"


def command(folder, *options):
    sizes = ["--length", "30000", "--piece", "4000"]
    return [sys.executable, str(EXAMPLE), *sizes, "--folder", str(folder), *options]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_gradient_over_a_file_that_was_killed(tmp_path):
    with subprocess.Popen(command(tmp_path), env=environment(), stderr=subprocess.DEVNULL) as run:
        while not (tmp_path / "gradient.npz").exists():
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    again = subprocess.run(
        command(tmp_path, "--check"), env=environment(), capture_output=True, text=True,
        timeout=HANG, check=True,
    )  # fmt: skip
    error = re.search(r"in memory: (\S+) of the largest", again.stdout)
    assert float(error[1]) < 1e-6


def printed(name, *options):
    """What an example prints."""
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options], env=environment(), capture_output=True,
        text=True, timeout=HANG, check=True,
    )  # fmt: skip
    return run.stdout


def test_recall_on_little():
    """Four pairs, whose values an exact layer learns to look up."""
    sizes = ["--length", "64", "--pairs", "4", "--layers", "E", "--depth", "1", "--steps", "120"]
    share = re.search(r"(\S+)% of 4 values known", printed("recall.py", *sizes))
    assert float(share[1]) > 50  # whoever knows which values there are is right in a quarter


def test_digits_for_an_epoch():
    pytest.importorskip("sklearn")
    shares = re.findall(r"(\S+)% of 359 digits, with", printed("digits.py", "--epochs", "1"))
    assert len(shares) == 2
    assert min(map(float, shares)) > 15  # of ten
