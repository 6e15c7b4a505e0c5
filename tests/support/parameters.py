"""What tests are parametrized by, and strategies of Hypothesis."""

import numpy as np
import pytest
from hypothesis import strategies as st

from support.inputs import MAPS

#: Lengths at and around the tiles of the kernels.
EDGES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129]

each_map = pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_causal = pytest.mark.parametrize("causal", [False, True])

sizes = st.sampled_from(EDGES) | st.integers(1, 140)
layouts = st.sampled_from(["C", "F", "strided", "reversed", "swapped", "read-only", "unaligned"])
