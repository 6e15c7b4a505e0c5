"""Memory of a long sequence. ``peakmem`` counts Numba (some 185 MB) and the arrays too."""

import favor_np
from favor_np.measure import peak_memory

from .common import feature_map, inputs, warm

LENGTH = 262144


class Memory:
    params = (["causal", "full"],)
    param_names = ("kind",)

    def setup(self, kind):
        self.causal = kind == "causal"
        self.arrays = inputs(LENGTH, heads=1)
        self.map = feature_map()

    def call(self):
        return favor_np.favor_attention(*self.arrays, self.map, causal=self.causal)

    def peakmem_forward(self, kind):
        self.call()

    def track_extra_bytes(self, kind):
        """Bytes beyond inputs and result."""
        warm(kind, self.call)
        return max(peak_memory(self.call) - self.arrays[2].nbytes, 0)

    track_extra_bytes.unit = "bytes"
