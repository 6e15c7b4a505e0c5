"""Attention over whole sequences, four heads."""

import numpy as np

import favor_np

from .common import TIMER, favor, feature_map, full_only, inputs, warm

SIZES = [
    "L=256 d=64 m=256",
    "L=1024 d=64 m=256",
    "L=8192 d=64 m=256",
    "L=65536 d=64 m=256",
    "L=16384 d=64 m=64",
    "L=8192 d=128 m=512",
    "L=1000 d=50 m=200",
]
QUICK = ["L=1024 d=64 m=256", "L=8192 d=64 m=256", "L=1000 d=50 m=200"]
DTYPES = ["float32", "float64"]


class Favor:
    """FAVOR+ forward, by length, dimension, features, dtype; antithetic features or not."""

    params = (SIZES, DTYPES, ["antithetic", "plain"])
    timer = TIMER
    param_names = ("size", "dtype", "map")
    causal = False

    def setup(self, size, dtype, kind):
        full_only(size not in QUICK or (dtype == "float64" and size != QUICK[1]))
        self.call = favor(size, dtype, kind, causal=self.causal)
        warm((self.causal, size, dtype, kind), self.call)


class Bidirectional(Favor):
    def time_forward(self, size, dtype, kind):
        self.call()


class Causal(Favor):
    causal = True

    def time_forward(self, size, dtype, kind):
        self.call()


class Variants:
    """Causal at L=8192: other maps, and what else a call can be given."""

    params = (["relu", "elu", "key_mask", "gqa", "float16", "return_state"],)
    timer = TIMER
    param_names = ("variant",)

    def setup(self, variant):
        kind = variant if variant in {"relu", "elu"} else "positive"
        q, k, v = inputs(8192)
        fm = feature_map(kind=kind, antithetic=kind == "positive")
        options = {"causal": True}
        if variant == "key_mask":
            options["key_mask"] = np.arange(8192) % 7 > 0
        elif variant == "gqa":
            k, v = k[:, :2], v[:, :2]
            options["enable_gqa"] = True
        elif variant == "float16":
            q, k, v = (np.asarray(x, np.float16) for x in (q, k, v))
        elif variant == "return_state":
            options["return_state"] = True
        self.call = lambda: favor_np.favor_attention(q, k, v, fm, **options)
        warm(variant, self.call)

    def time_causal(self, variant):
        self.call()


class Small:
    """What a call costs when there is next to nothing to compute: L = 64, d = m = 32, one head."""

    params = (["causal", "full"],)
    timer = TIMER
    param_names = ("kind",)

    def setup(self, kind):
        self.call = favor("L=64 d=32 m=32", kind="antithetic", heads=1, causal=kind == "causal")
        warm(kind, self.call)

    def time_call(self, kind):
        self.call()


class Exact:
    """Softmax attention, the rival."""

    params = ([1024, 8192], DTYPES, ["causal", "full"])
    timer = TIMER
    param_names = ("L", "dtype", "kind")

    def setup(self, length, dtype, kind):
        full_only(length > 1024 and dtype == "float64")
        arrays = inputs(length, dtype=dtype)
        self.call = lambda: favor_np.exact_attention(*arrays, causal=kind == "causal")
        warm((length, dtype, kind), self.call)

    def time_forward(self, length, dtype, kind):
        self.call()


class Numbers:
    """Queries and keys of any size: the time of a call must not depend on the numbers in it."""

    params = (["causal", "full"], ["0.35", "4", "8", "30"], ["float32", "float64", "bfloat16"])
    param_names = ("kind", "std", "computed_in")
    timer = TIMER

    def setup(self, kind, std, computed_in):
        full_only(std == "8" or (computed_in != "float32" and std != "0.35" and std != "30"))
        precision = "bfloat16" if computed_in == "bfloat16" else "full"
        dtype = "float64" if computed_in == "float64" else "float32"
        self.arrays = inputs(4096, std=float(std), dtype=dtype)
        self.options = {"causal": kind == "causal", "precision": precision, "num_threads": 1}
        out, self.pullback = favor_np.favor_attention_vjp(
            *self.arrays, feature_map(), **self.options
        )
        self.cotangent = np.ones_like(out)
        calls = self.time_favor, self.time_gradient, self.time_exact
        key = kind, std, computed_in
        warm(key, lambda: [call(*key) for call in calls])

    def time_favor(self, kind, std, computed_in):
        favor_np.favor_attention(*self.arrays, feature_map(), **self.options)

    def time_gradient(self, kind, std, computed_in):
        self.pullback(self.cotangent)

    def time_exact(self, kind, std, computed_in):
        favor_np.exact_attention(*self.arrays, **self.options)
