"""Memory of a long sequence. ``peakmem`` counts Numba (some 185 MB) and the arrays too."""

from favor_np.measure import peak_memory

from .common import favor, full_only, warm

LENGTH = 262144


class Memory:
    """L = 262,144, d = 64, m = 256, float32."""

    params = (["causal", "full"], [1, 4])
    param_names = ("kind", "heads")

    def setup(self, kind, heads):
        full_only(heads > 1)
        self.call = favor(
            f"L={LENGTH} d=64 m=256", kind="antithetic", heads=heads, causal=kind == "causal"
        )

    def peakmem_forward(self, kind, heads):
        self.call()

    def track_extra_bytes(self, kind, heads):
        """Bytes beyond inputs and result."""
        warm((kind, heads), self.call)
        return max(peak_memory(self.call) - heads * LENGTH * 64 * 4, 0)

    track_extra_bytes.unit = "bytes"
