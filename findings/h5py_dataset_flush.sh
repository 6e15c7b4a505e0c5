#!/usr/bin/env bash
# h5py 3.16.0 (HDF5 2.0.0), numpy 2.4.6
#
# Dataset.flush() does not make a new file safe. When the writing process is killed right after it, the
# file cannot be opened, though it has its full size. After File.flush() it can, and the data are there.
#
# Seen:
#   Dataset.flush(): 10048 bytes, OSError: Unable to synchronously open file (bad object header version number)
#   File.flush(): 10048 bytes, last value 999.0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check h5py==3.16.0 numpy==2.4.6

v/bin/python - <<'PYTHON'
import os
import signal
import subprocess
import sys

import h5py

WRITE = """
import os, signal, sys
import h5py, numpy as np
file = h5py.File(sys.argv[1], "w")
dataset = file.create_dataset("x", data=np.arange(1000.0))
(dataset if sys.argv[2] == "Dataset" else file).flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def after_kill(kind):
    name = kind + ".h5"
    done = subprocess.run([sys.executable, "-c", WRITE, name, kind])
    assert done.returncode == -signal.SIGKILL
    try:
        with h5py.File(name, "r") as file:
            result = f"last value {file['x'][-1]}"
    except OSError as error:
        result = f"OSError: {error}"
    print(f"{kind}.flush(): {os.path.getsize(name)} bytes, {result}")
    return result


assert after_kill("Dataset").startswith("OSError: ")
assert after_kill("File") == "last value 999.0"
PYTHON
