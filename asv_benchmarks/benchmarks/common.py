"""Inputs and warm-up, memoised: asv calls ``setup`` before every timed call."""

import functools

import numpy as np

import favor_np


@functools.lru_cache
def inputs(length, dim=64, heads=4, std=0.35, dtype="float32"):
    """Queries, keys and values (1, heads, length, dim), read-only."""
    rng = np.random.default_rng(0)
    arrays = []
    for scale in (std, std, 1.0):
        array = rng.standard_normal((1, heads, length, dim), dtype)
        array *= scale
        array.flags.writeable = False
        arrays.append(array)
    return tuple(arrays)


@functools.lru_cache
def feature_map(features=256, dim=64, kind="positive", projection="orthogonal", antithetic=True):
    return favor_np.feature_map(
        kind, dim=dim, num_features=features, projection=projection, antithetic=antithetic
    )


@functools.lru_cache
def sized(size):
    """Numbers of a size written as text, such as "L=1024 d=64 m=256"."""
    return {name: int(number) for name, number in (part.split("=") for part in size.split())}


_warm = set()


def warm(key, call):
    """Run ``call`` once in this process, so that nothing is compiled while the clock runs."""
    if key not in _warm:
        call()
        _warm.add(key)
