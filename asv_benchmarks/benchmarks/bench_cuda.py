"""A GPU: arrays that lie there, and NumPy arrays that go there and back. Skipped without one."""

import functools

import numpy as np

import favor_np
from favor_np.cuda import device

from .common import feature_map, full_only, inputs, sized, warm

KINDS = ["causal", "full"]
SIZES = ["L=8192 d=64 m=256 H=4", "L=4096 d=64 m=256 H=32", "L=131072 d=64 m=256 H=8"]


@functools.cache
def gpu():
    """numba.cuda, or the reason why there is none; the benchmark is then skipped."""
    problem = device.problem()
    return (None, problem) if problem else (device.numba_cuda(), None)


def cuda():
    module, problem = gpu()
    if module is None:
        raise NotImplementedError(problem)
    return module


@functools.lru_cache(maxsize=2)
def on_device(size):
    n = sized(size)
    return tuple(cuda().to_device(x) for x in inputs(n["L"], n["d"], n["H"]))


def finished(call):
    """Call and wait until the GPU has done it."""
    result = call()
    cuda().synchronize()
    return result


def forward(kind, size, **options):
    """A call of `favor_attention` on arrays that lie there."""
    n, arrays = sized(size), on_device(size)
    fm = feature_map(n["m"], n["d"])
    return lambda: favor_np.favor_attention(*arrays, fm, causal=kind == "causal", **options)


class Forward:
    """Queries, keys, values and the result on the GPU."""

    params = (KINDS, SIZES)
    param_names = ("kind", "size")

    def setup(self, kind, size):
        cuda()
        full_only(size == SIZES[2])
        self.call = forward(kind, size)
        warm((kind, size, "cuda"), lambda: finished(self.call))

    def time_forward(self, kind, size):
        finished(self.call)


class Gradient:
    """The result and the gradients of queries, keys and values, on the GPU."""

    params = (KINDS, SIZES[:2])
    param_names = ("kind", "size")

    def setup(self, kind, size):
        cuda()
        n, arrays = sized(size), on_device(size)
        fm = feature_map(n["m"], n["d"])
        grad = cuda().to_device(np.ones(arrays[2].shape, np.float32))

        def call():
            causal = kind == "causal"
            return favor_np.favor_attention_vjp(*arrays, fm, causal=causal)[1](grad)

        self.call = call
        warm((kind, size, "cuda gradient"), lambda: finished(self.call))

    def time_forward_and_backward(self, kind, size):
        finished(self.call)


class RoundTrip:
    """NumPy arrays with device="cuda": the copies count."""

    params = (KINDS, SIZES[:2])
    param_names = ("kind", "size")

    def setup(self, kind, size):
        cuda()
        n = sized(size)
        arrays, fm = inputs(n["L"], n["d"], n["H"]), feature_map(n["m"], n["d"])
        self.call = lambda: favor_np.favor_attention(
            *arrays, fm, causal=kind == "causal", device="cuda"
        )
        warm((kind, size, "cuda round trip"), self.call)

    def time_forward(self, kind, size):
        finished(self.call)


class Decode:
    """A token appended to a state on the GPU and attended from; so many heads at once."""

    params = ([8, 1024, 2048],)
    param_names = ("heads",)

    def setup(self, heads):
        cuda()
        self.state = favor_np.AttentionState.zeros(
            feature_map(256, 64), value_dim=64, batch_shape=(heads,), device="cuda"
        )
        rng = np.random.default_rng(0)
        self.token = [cuda().to_device(x) for x in rng.standard_normal((3, heads, 64), np.float32)]
        finished(self.step)

    def step(self):
        return self.state.step(*self.token)

    def time_step(self, heads):
        finished(self.step)
