"""Projections and the readable feature maps."""

import favor_np

from .common import feature_map, inputs


class Projection:
    """Draw a projection."""

    params = (["orthogonal", "iid"], [64, 256, 1024], [64, 128])
    param_names = ("kind", "m", "d")

    def time_sample(self, kind, m, dim):
        favor_np.sample_projection(m, dim, kind, rng=0)


class Features:
    """Features of 1024 keys, d = 64, as diagnostics use them; attention computes its own."""

    params = (["antithetic", "positive", "relu", "elu", "trig"], ["float32", "float64"])
    param_names = ("kind", "dtype")

    def setup(self, kind, dtype):
        pairs = kind == "antithetic"
        self.map = feature_map(kind="positive" if pairs else kind, antithetic=pairs)
        self.x = inputs(1024, heads=1, dtype=dtype)[0]

    def time_key_features(self, kind, dtype):
        self.map.key_features(self.x)
