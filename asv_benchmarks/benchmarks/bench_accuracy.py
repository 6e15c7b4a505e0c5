"""Errors, beside the times: a faster kernel that is less accurate shows up here."""

import functools

import numpy as np

import favor_np
from favor_np.compare import Setting

from .common import TIMER, feature_map, full_only, inputs, warm


@functools.lru_cache
def price_windows():
    """1024 windows of the bundled prices, and those before them."""
    return Setting("prices").tokens(1024)


@functools.lru_cache
def price_values():
    """Values for these windows, and what exact attention makes of them."""
    tokens = price_windows()
    v = np.random.default_rng(0).standard_normal(tokens.k.shape, np.float32)
    return v, exact(tokens.q, tokens.k, v, scale=tokens.scale)


def exact(*arrays, **options):
    """Exact attention in float64."""
    return favor_np.exact_attention(*(x.astype(np.float64) for x in arrays), **options)


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
        return relative(favor_np.favor_attention(*arrays, fm), exact(*arrays))


class Calibrated:
    """Maps that know windows of prices: their error on later ones, and what knowing them takes."""

    params = ([64, 256, 1024], ["none", "oprf", "aderf+sderf", "spherical", "auto"])
    param_names = ("m", "method")
    timer = TIMER

    def setup(self, m, method):
        full_only(m == 1024)
        self.tokens = price_windows()
        q = self.tokens.q
        self.map = favor_np.feature_map("positive", q.shape[-1], m, scale=self.tokens.scale)
        warm("calibrate", lambda: self.calibrated("oprf"))

    def calibrated(self, method):
        if method == "none":
            return self.map
        return self.map.calibrate(self.tokens.known_q, self.tokens.known_k, method)

    def time_calibrate(self, m, method):
        self.calibrated(method)

    def track_error(self, m, method):
        (v, expected), fm = price_values(), self.calibrated(method)
        out = favor_np.favor_attention(self.tokens.q, self.tokens.k, v, fm)
        return relative(out, expected)

    track_error.unit = "relative"


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


class Drift:
    """Error of a state after many single tokens, relative to float64: keys all equal, values 0, then 1."""

    unit = "relative"
    timeout = 600

    def track_steps(self):
        fm, count = feature_map(8, 4, antithetic=True), 100_000
        key = np.array([0.3, -0.2, 0.1, 0.25], np.float32)
        state = favor_np.AttentionState.zeros(fm, value_dim=1)
        for i in range(count):
            out = state.step(key, key, [float(2 * i >= count)])
        return float(abs(out[0] - 0.5)) / 0.5
