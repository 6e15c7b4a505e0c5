"""What the bridges to the automatic differentiation of other frameworks share.

A bridge hands its framework an *attend*: a function of the arrays that have gradients, which returns
the result and a pullback whose gradients bear the names of those arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy.typing as npt

from favor_np import FeatureMap, favor_attention_vjp, validation

Array: TypeAlias = npt.NDArray[Any]
Attend: TypeAlias = Callable[..., tuple[Array, Callable[[Array], Any]]]

#: The arrays that have gradients, in the order of an attend's arguments.
NAMES = ("q", "k", "v", "projection")


def favor(feature_map: FeatureMap, **options: Any) -> Attend:
    """Return attend(q, k, v[, projection]), the projection in place of the map's own."""
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"feature_map must be a FeatureMap, got {validation.got(feature_map)}")

    def attend(q: Array, k: Array, v: Array, projection: Any = None, **more: Any) -> Any:
        fm = feature_map
        if projection is not None:
            fm = dataclasses.replace(fm, projection=projection)
        return favor_attention_vjp(q, k, v, fm, **options, **more)

    return attend
