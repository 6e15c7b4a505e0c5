"""The program that `nox -s wheel` and the release run with an installed wheel, without Numba."""

import sys

import numpy as np

import favor_np
from favor_np.cpu import code


def finite(out, grads):
    return all(np.isfinite(x).all() for x in (out, grads.q, grads.k, grads.v))


def main():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        q, k, v = rng.standard_normal((3, 2, 200, 32)).astype(dtype)
        fm = favor_np.feature_map("positive", 32, 64)
        for causal in (False, True):
            out, pull = favor_np.favor_attention_vjp(q, k, v, fm, causal=causal)
            assert finite(out, pull(out))
            weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(np.float64(32)))
            weights = np.tril(weights) if causal else weights
            exact = weights @ v / weights.sum(-1, keepdims=True)
            found, pull = favor_np.exact_attention_vjp(q, k, v, causal=causal)
            assert np.abs(found - exact).max() < 1e-5
            assert finite(found, pull(out))
        state = favor_np.AttentionState.zeros(fm, value_dim=32, batch_shape=(2,), dtype=dtype)
        for i in range(200):
            last = state.step(q[:, i], k[:, i], v[:, i])
        causal_out = favor_np.favor_attention(q, k, v, fm, causal=True)
        assert np.abs(last - causal_out[:, -1]).max() < 1e-5
        long = rng.standard_normal((1, 20_000, 32)).astype(dtype)  # one head, for all threads
        assert np.isfinite(favor_np.favor_attention(long, long, long, fm, causal=True)).all()
    origins = {kernel.origin for kernel in code.every_kernel()} - {""}
    assert origins == {"shipped"}, origins
    assert not {"numba", "llvmlite"} & sys.modules.keys()
    print(code.described())


if __name__ == "__main__":
    main()
