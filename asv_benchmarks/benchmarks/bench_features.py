"""Projections and the readable feature maps."""

import numpy as np

import favor_np

from .common import feature_map, inputs


class Projection:
    params = (["orthogonal", "iid"], [64, 256, 1024])
    param_names = ("kind", "m")

    def time_sample(self, kind, m):
        favor_np.sample_projection(m, 64, kind, rng=0)


class Features:
    params = (["positive", "relu", "elu", "trig"],)
    param_names = ("kind",)

    def setup(self, kind):
        self.map = feature_map(kind=kind, antithetic=kind == "positive")
        self.x = inputs(1024, heads=1)[0].astype(np.float64)

    def time_key_features(self, kind):
        self.map.key_features(self.x)
