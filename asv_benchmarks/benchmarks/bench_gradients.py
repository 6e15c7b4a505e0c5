"""Forward and backward, four heads."""

import favor_np

from .common import TIMER, full_only, inputs, warm


class Exact:
    """Softmax attention and the gradients by queries, keys and values."""

    params = ([1024, 8192], ["float32", "float64"], ["causal", "full"])
    timer = TIMER
    param_names = ("L", "dtype", "kind")

    def setup(self, length, dtype, kind):
        full_only(length > 1024 and dtype == "float64")
        q, k, v = inputs(length, dtype=dtype)
        self.call = lambda: favor_np.exact_attention_vjp(q, k, v, causal=kind == "causal")[1](v)
        warm(("exact gradient", length, dtype, kind), self.call)

    def time_forward_backward(self, length, dtype, kind):
        self.call()
