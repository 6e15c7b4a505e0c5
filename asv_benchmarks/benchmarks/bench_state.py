"""The state: one token at a time, a block at a time, merged."""

import numpy as np

import favor_np
from favor_np.cpu import launch
from favor_np.cpu.record import pack
from favor_np.cpu.records import CONTROL, COUNT

from .common import TIMER, feature_map, full_only, interleave, warm

HEADS, DIM, BLOCK = 8, 64, 256


def token(dtype="float32"):
    return np.random.default_rng(0).standard_normal((3, 1, HEADS, 1, DIM), dtype)


def filled(m, dtype="float32"):
    """A state of eight heads that has seen a block."""
    state = favor_np.AttentionState.zeros(
        feature_map(m, DIM), value_dim=DIM, batch_shape=(1, HEADS), dtype=dtype
    )
    rng = np.random.default_rng(1)
    return state.update(*rng.standard_normal((2, 1, HEADS, BLOCK, DIM), dtype))


class State:
    """Eight heads, d = 64; blocks of 256 tokens."""

    params = ([64, 256, 1024], ["float32", "float64"])
    timer = TIMER
    param_names = ("m", "dtype")

    def setup(self, m, dtype):
        full_only(m == 1024 or (dtype == "float64" and m != 256))
        self.token = token(dtype)
        rng = np.random.default_rng(2)
        self.block = rng.standard_normal((3, 1, HEADS, BLOCK, DIM), dtype)
        self.state, self.other = filled(m, dtype), filled(m, dtype)
        calls = (self.time_step, self.time_update, self.time_attend, self.time_merge)
        warm((m, dtype), lambda: [call(m, dtype) for call in calls])

    def time_step(self, m, dtype):
        self.state.step(*self.token)

    def time_update(self, m, dtype):
        self.state.update(*self.block[1:])

    def time_attend(self, m, dtype):
        self.state.attend(self.block[0])

    def time_merge(self, m, dtype):
        self.state.merge(self.other)


class Decode:
    """A step, and what of it passes outside the kernel: the kernel's own call is made again."""

    def setup(self):
        self.state, self.token = filled(256), token()

    def track_step(self):
        return self.measure()[0]

    def track_outside_kernel(self):
        return self.measure()[1]

    def measure(self):
        seen = []
        pool = launch.POOL
        call = pool.call

        def spy(*args):
            seen.append(args)
            return call(*args)

        self.state.step(*self.token)
        pool.call = spy
        try:
            self.state.step(*self.token)
        finally:
            del pool.call
        ((kernel, arrays, rest, count, _),) = seen
        control = np.zeros(CONTROL, np.int64)
        record = (*arrays, control, *rest)
        block, run = pack(record), kernel.load()

        def again():
            control[:] = 0
            control[COUNT] = count
            run(block)

        step, inside = 1e6 * np.median(
            interleave(lambda: self.state.step(*self.token), again), axis=0
        )
        return float(step), float(step - inside)

    track_step.unit = track_outside_kernel.unit = "µs"
