"""Attention over whole sequences, four heads."""

import favor_np

from .common import feature_map, inputs, sized, warm

SIZES = ["L=1024 d=64 m=256", "L=8192 d=64 m=256", "L=16384 d=64 m=64", "L=1000 d=50 m=200"]
DTYPES = ["float32", "float64"]


class Favor:
    """FAVOR+ forward."""

    params = (SIZES, DTYPES, ["antithetic", "plain"])
    param_names = ("size", "dtype", "map")
    causal = False

    def setup(self, size, dtype, kind):
        n = sized(size)
        self.arrays = inputs(n["L"], n["d"], dtype=dtype)
        self.map = feature_map(n["m"], n["d"], antithetic=kind == "antithetic")
        warm((self.causal, size, dtype, kind), self.call)

    def call(self):
        return favor_np.favor_attention(*self.arrays, self.map, causal=self.causal)


class Bidirectional(Favor):
    def time_forward(self, size, dtype, kind):
        self.call()


class Causal(Favor):
    causal = True

    def time_forward(self, size, dtype, kind):
        self.call()


class OtherMaps:
    """Generalised attention, causal."""

    params = (["relu", "elu"],)
    param_names = ("kind",)

    def setup(self, kind):
        self.arrays = inputs(8192)
        self.map = feature_map(kind=kind, antithetic=False)
        warm(kind, self.call)

    def call(self):
        return favor_np.favor_attention(*self.arrays, self.map, causal=True)

    def time_causal(self, kind):
        self.call()


class Small:
    """What a call costs when there is next to nothing to compute."""

    def setup(self):
        self.arrays = inputs(64, 32, heads=1)
        self.map = feature_map(32, 32)
        warm("small", self.call)

    def call(self):
        return favor_np.favor_attention(*self.arrays, self.map, causal=True)

    def time_causal(self):
        self.call()


class Exact:
    """Softmax attention, the rival."""

    params = ([1024, 8192], DTYPES, ["causal", "full"])
    param_names = ("L", "dtype", "kind")

    def setup(self, length, dtype, kind):
        self.arrays = inputs(length, dtype=dtype)
        self.causal = kind == "causal"
        warm((dtype, kind), self.call)

    def call(self):
        return favor_np.exact_attention(*self.arrays, causal=self.causal)

    def time_forward(self, length, dtype, kind):
        self.call()
