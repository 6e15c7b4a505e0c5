"""Start-up, each in a process of its own."""

import subprocess
import sys

from .common import favor, full_only

FIRST_CALL = """
import numpy as np
import favor_np
x = np.ones((64, 32), np.float32)
fm = favor_np.feature_map("positive", dim=32, num_features=32)
favor_np.favor_attention(x, x, x, fm, causal=True)
"""


class Startup:
    number = 1
    repeat = (3, 7, 20.0)

    def setup(self):
        """Fill the cache."""
        favor("L=64 d=32 m=32", kind="antithetic", heads=1)()

    def timeraw_import_numpy(self):
        return "import numpy"

    def timeraw_import_over_numpy(self):
        return "import favor_np", "import numpy"

    def timeraw_first_call(self):
        """Numpy's import, ours, and a first call that finds the cache warm."""
        return FIRST_CALL


class Cold:
    """A first call that has to compile all it needs."""

    number = 1
    repeat = 3
    warmup_time = 0

    def setup(self):
        full_only(True)

    def timeraw_first_call(self):
        off = "os.environ['FAVOR_NP_CACHE'] = os.environ['FAVOR_NP_PREBUILT'] = '0'"
        return f"import os; {off}" + FIRST_CALL


class Memory:
    """What a first call adds to the memory that a process holds once it has imported NumPy."""

    unit = "MB"

    def setup(self):
        """Fill the cache."""
        favor("L=64 d=32 m=32", kind="antithetic", heads=1)()

    def track_first_call(self):
        held = "import resource; r = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        code = "import numpy\n" + held + "before = r\n" + FIRST_CALL + held + "print(r - before)"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return int(found.stdout) / 1024
