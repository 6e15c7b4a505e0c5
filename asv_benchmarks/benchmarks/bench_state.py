"""The state: one token at a time, a block at a time, merged."""

import numpy as np

import favor_np

from .common import feature_map, warm

HEADS, DIM = 8, 64


class State:
    """Eight heads, d = 64."""

    params = ([64, 256],)
    param_names = ("m",)

    def setup(self, m):
        rng = np.random.default_rng(0)
        self.token = rng.standard_normal((3, 1, HEADS, 1, DIM), np.float32)
        self.block = rng.standard_normal((3, 1, HEADS, 256, DIM), np.float32)
        self.state, self.other = (
            favor_np.AttentionState.zeros(
                feature_map(m, DIM), value_dim=DIM, batch_shape=(1, HEADS)
            )
            for _ in range(2)
        )
        for state in (self.state, self.other):
            state.update(*self.block[1:])
        warm(m, lambda: (self.time_step(m), self.time_attend(m), self.time_merge(m)))

    def time_step(self, m):
        self.state.step(*self.token)

    def time_update(self, m):
        self.state.update(*self.block[1:])

    def time_attend(self, m):
        self.state.attend(self.block[0])

    def time_merge(self, m):
        self.state.merge(self.other)
