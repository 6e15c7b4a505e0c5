"""What the bridges to the automatic differentiation of other frameworks share.

A bridge hands its framework an *attend*: a function of the arrays that have gradients, which returns
the result and a pullback whose gradients bear the names of those arrays.  A framework that keeps
arrays itself, and frees them, is given the two halves of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy.typing as npt

from favor_np import FeatureMap, favor_attention_vjp, gradients, validation
from favor_np.attention import Prepared, prepare

Array: TypeAlias = npt.NDArray[Any]

#: The arrays that have gradients, in the order of an attend's arguments.
NAMES = ("q", "k", "v", "projection")


class Attend:
    """attend(q, k, v[, projection]), the projection in place of the map's own."""

    def __init__(self, feature_map: FeatureMap, **options: Any) -> None:
        if not isinstance(feature_map, FeatureMap):
            raise TypeError(f"feature_map must be a FeatureMap, got {validation.got(feature_map)}")
        self.feature_map, self.options = feature_map, options

    def __call__(
        self, q: Array, k: Array, v: Array, projection: Any = None, **more: Any
    ) -> tuple[Array, Callable[[Array], gradients.Gradients]]:
        """Return the result and the pullback."""
        return favor_attention_vjp(q, k, v, self._map(projection), **self.options, **more)

    def forward(self, **arrays: Any) -> tuple[Array, ...]:
        """Return the result as it was computed, in 32 or 64 bits, and what else `backward` needs."""
        call = self._prepared(**arrays)
        _, result = call.targets(whole=True)
        weights, _ = gradients.attend(call, result)
        return result, *weights

    def backward(
        self, grad_out: Array, result: Array, *weights: Any, **arrays: Any
    ) -> gradients.Gradients:
        """Return the gradients from what `forward` returned, and from the same arrays."""
        return gradients.pullback_of(self._prepared(**arrays), result, weights)(grad_out)

    def _prepared(
        self, q: Array, k: Array, v: Array, projection: Any = None, **more: Any
    ) -> Prepared:
        return prepare(q, k, v, self._map(projection), **self.options, **more)

    def _map(self, projection: Any) -> FeatureMap:
        if projection is None:
            return self.feature_map
        return dataclasses.replace(self.feature_map, projection=projection)
