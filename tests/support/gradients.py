"""Gradients of layers against finite differences, in float64."""

import numpy as np

from favor_np import nn

#: Differences are of the fourth order: norms of small rows are strongly curved.
H = 2e-5


def double(layer, seed=0, std=0.5):
    """Parameters in float64; those that begin with zeros or ones have moved from there."""
    rng = np.random.default_rng(seed)
    params = nn.astype(layer.init(rng), np.float64)
    for name, array in nn.leaves(params):
        if not name.endswith("projection"):
            array += std * rng.standard_normal(array.shape) * max(array.std(), 0.2)
    return params


def moved(params, directions, by):
    """A tree some way in a direction; one without a direction stays."""
    if not isinstance(params, dict):
        return params if directions is None else params + by * directions
    return {
        name: moved(value, None if directions is None else directions.get(name), by)
        for name, value in params.items()
    }


def at(tree, name):
    for word in name.split("."):
        tree = tree[word]
    return tree


def only(name, array):
    """The tree that has nothing but one leaf."""
    for word in reversed(name.split(".")):
        array = {word: array}
    return array


def errors(layer, x, params=None, *, fixed=("projection",), seed=0, **options):
    """Relative errors of the gradients of x and of each parameter, along random directions.

    The gradient of the projection is looked at only if the layer learns it: `fixed` names it.
    """
    rng = np.random.default_rng(seed)
    params = double(layer, seed) if params is None else params
    y, pullback = layer.vjp(params, x, **options)
    weight = rng.standard_normal(y.shape)
    grads = nn.zeros_like(params)
    grad_x = pullback(weight, grads)

    def value(params, x):
        return float((layer.apply(params, x, **options) * weight).sum())

    def error(place, inner, size):
        one, two = (value(*place(H * n)) - value(*place(-H * n)) for n in (1, 2))
        slope = (8 * one - two) / (12 * H)
        return abs(slope - inner) / (abs(slope) + 1e-3 * size)

    found = {}
    if np.asarray(x).dtype.kind == "f":
        step = rng.standard_normal(x.shape)
        found["x"] = error(
            lambda by: (params, x + by * step), (grad_x * step).sum(),
            np.linalg.norm(grad_x) * np.linalg.norm(step),
        )  # fmt: skip
    for name, array in nn.leaves(params):
        if name.rpartition(".")[2] in fixed:
            assert not at(grads, name).any()
            continue
        step = rng.standard_normal(array.shape)
        one = only(name, step)
        grad = at(grads, name)
        found[name] = error(
            lambda by, one=one: (moved(params, one, by), x), (grad * step).sum(),
            np.linalg.norm(grad) * np.linalg.norm(step),
        )  # fmt: skip
        assert grad.any(), f"{name} has no gradient"
    return found


def check(layer, x, *args, limit=1e-6, **options):
    """Assert that all gradients are right, and that pullbacks add."""
    found = errors(layer, x, *args, **options)
    assert found
    assert max(found.values()) < limit, {n: e for n, e in found.items() if e >= limit}
