"""A training step, beside its matrix products and attention alone; tokens generated one by one."""

import runpy
from pathlib import Path

import numpy as np

from favor_np import nn

from .common import TIMER, full_only, interleave, ratio

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "training.py"))
SIZES = {
    "dim=256 4x1024": (256, 4, 4, 1024, 4, 128),
    "dim=256 1x4096": (256, 4, 4, 4096, 1, 128),
    "dim=64 8x512": (64, 2, 2, 512, 8, 64),
    "dim=64 16x128": (64, 2, 2, 128, 16, 64),
}


class Step:
    """Time of a step by size."""

    params = (list(SIZES), [False, True])
    param_names = ("size", "exact")
    timer = TIMER

    def setup(self, size, exact):
        full_only("dim=256" in size or exact)
        self.step = TOOL["Step"](*SIZES[size], exact=exact)
        self.step()

    def time_step(self, size, exact):
        self.step()


class Overhead:
    """Time of a step over that of its products and its attention alone."""

    params = (list(SIZES),)
    param_names = ("size",)

    def setup(self, size):
        full_only("dim=256" in size)

    def track_over_products_and_attention(self, size):
        alone = TOOL["alone"](*SIZES[size]).values()
        calls = TOOL["Step"](*SIZES[size]), lambda: [call() for call in alone]
        return ratio(*interleave(*calls).T)


class Generate:
    """Time of a token after a long prompt."""

    timer = TIMER

    def setup(self):
        self.model = nn.PerformerLM(vocab=256, dim=256, depth=4, heads=4)
        self.params = self.model.init(np.random.default_rng(0))
        self.step, self.state = self.model.prepare(self.params), {}
        self.model.extend(self.params, self.state, np.zeros((1, 1024), np.int64))

    def time_token(self):
        self.step(self.state, np.zeros((1, 1), np.int64))
