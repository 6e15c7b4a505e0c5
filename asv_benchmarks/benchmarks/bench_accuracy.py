"""Errors, beside the times: a faster kernel that is less accurate shows up here."""

import numpy as np

import favor_np

from .common import feature_map, inputs


def relative(out, reference):
    return float(np.sqrt(np.mean((out - reference) ** 2) / np.mean(reference**2)))


class Estimator:
    """Error of the estimate against exact attention."""

    params = ([64, 256, 1024], ["orthogonal", "iid"], ["antithetic", "plain"])
    param_names = ("m", "projection", "map")
    unit = "relative"

    def track_error(self, m, projection, kind):
        fm = feature_map(m, projection=projection, antithetic=kind == "antithetic")
        arrays = inputs(1024)
        exact = favor_np.exact_attention(*(x.astype(np.float64) for x in arrays))
        return relative(favor_np.favor_attention(*arrays, fm), exact)


class Rounding:
    """Error of float32 against float64 with the same features, relative to the largest output."""

    params = (["causal", "full"], [0.5, 2.0, 4.0])
    param_names = ("kind", "std")
    unit = "relative"

    def setup(self, kind, std):
        self.arrays = inputs(1024, std=std)
        self.wide = [x.astype(np.float64) for x in self.arrays]
        self.causal = kind == "causal"

    def track_favor(self, kind, std):
        fm = feature_map()
        out = favor_np.favor_attention(*self.arrays, fm, causal=self.causal)
        reference = favor_np.favor_attention(*self.wide, fm, causal=self.causal)
        return float(abs(out - reference).max() / abs(reference).max())

    def track_exact(self, kind, std):
        out = favor_np.exact_attention(*self.arrays, causal=self.causal)
        reference = favor_np.exact_attention(*self.wide, causal=self.causal)
        return float(abs(out - reference).max() / abs(reference).max())
