"""Errors, beside the times: a faster kernel that is less accurate shows up here."""

import numpy as np

import favor_np

from .common import feature_map, full_only, inputs


def relative(out, reference):
    return float(np.sqrt(np.mean((out - reference) ** 2) / np.mean(reference**2)))


class Estimator:
    """Error of the estimate against exact attention, root mean square, L = 1024."""

    params = ([64, 256, 1024], ["orthogonal antithetic", "orthogonal plain", "iid plain"])
    param_names = ("m", "map")
    unit = "relative"

    def setup(self, m, kind):
        full_only(m == 1024)

    def track_error(self, m, kind):
        projection, signs = kind.split()
        fm = feature_map(m, projection=projection, antithetic=signs == "antithetic")
        arrays = inputs(1024)
        exact = favor_np.exact_attention(*(x.astype(np.float64) for x in arrays))
        return relative(favor_np.favor_attention(*arrays, fm), exact)


class Rounding:
    """Largest error of float32 against float64, same features, relative to the largest output."""

    params = (["causal", "full"], ["0.5", "2", "4"])
    param_names = ("kind", "std")
    unit = "relative"

    def setup(self, kind, std):
        full_only(std == "2")
        self.arrays = inputs(1024, std=float(std))
        self.wide = [x.astype(np.float64) for x in self.arrays]
        self.causal = kind == "causal"

    def track_favor(self, kind, std):
        return self.error(favor_np.favor_attention, feature_map())

    def track_exact(self, kind, std):
        return self.error(favor_np.exact_attention)

    def error(self, attention, *fm):
        out = attention(*self.arrays, *fm, causal=self.causal)
        reference = attention(*self.wide, *fm, causal=self.causal)
        return float(abs(out - reference).max() / abs(reference).max())
