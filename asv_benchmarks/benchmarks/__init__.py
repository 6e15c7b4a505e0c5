"""The suite of asv. One thread unless the environment says otherwise; read before NumPy loads."""

import os

for name in ("FAVOR_NP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
