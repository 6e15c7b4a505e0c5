"""Importing favor_np costs nothing over importing numpy: no numba, no scipy, no threads."""

import subprocess
import sys

import pytest
from support.child import HANG


def run(code, *options):
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=HANG,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


HEAVY = ["numba", "llvmlite", "scipy", "matplotlib", "pandas", "tqdm", "concurrent.futures"]


@pytest.mark.parametrize(
    "use",
    [
        "import favor_np",
        "import favor_np; repr(favor_np.feature_map('positive', dim=8, num_features=16))",
        "from favor_np import *",
    ],
)
def test_nothing_heavy_is_imported(use):
    code = f"import numpy, sys; before = set(sys.modules)\n{use}\n"
    code += f"print(sorted((set(sys.modules) - before) & set({HEAVY!r})))"
    assert run(code, "-W", "error") == "[]\n"


def test_importing_starts_no_thread():
    assert run("import favor_np, threading; print(threading.active_count())") == "1\n"


def test_numba_is_imported_by_what_compiles():
    code = """
import os, sys
os.environ |= {"FAVOR_NP_PREBUILT": "0", "FAVOR_NP_CACHE": "0"}
import numpy as np, favor_np
from favor_np.cpu import scaling
print("numba" in sys.modules, scaling.holds_large(np.ones((3, 2))), "numba" in sys.modules)
"""
    assert run(code, "-W", "error") == "False False True\n"


def test_every_public_name_is_listed():
    code = "import favor_np; print([n for n in favor_np.__all__ if not hasattr(favor_np, n)])"
    assert run(code) == "[]\n"
    assert run("import favor_np; print(set(favor_np.__all__) <= set(dir(favor_np)))") == "True\n"
