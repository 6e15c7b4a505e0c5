"""What the bridges to the automatic differentiation of other frameworks share.

A bridge hands its framework an *attend*: a function of the arrays that have gradients, which
returns the result and a pullback whose gradients bear the names of those arrays.  A framework that
keeps arrays itself, and frees them, is given the two halves of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import FeatureMap, favor_attention_vjp, gradients
from favor_np.attention import check
from favor_np.call import Call, Forward
from favor_np.features import checked
from favor_np.validation import outline

Array: TypeAlias = npt.NDArray[Any]


class Attend:
    """attend(q, k, v, ...) of named arrays, a projection in place of the map's own.

    Of these the floating ones have gradients, a decay if it has a factor a token.
    """

    def __init__(self, feature_map: FeatureMap, **options: Any) -> None:
        self.feature_map, self.options = checked(feature_map), options

    def __call__(
        self, q: Array, k: Array, v: Array, projection: Any = None, **more: Any
    ) -> tuple[Array, Callable[[Array], gradients.Gradients]]:
        """Return the result and the pullback."""
        return favor_attention_vjp(q, k, v, self._map(projection), **self.options, **more)

    def has_gates(self, q: Any, k: Any, v: Any, **of_keys: Any) -> bool:
        """Whether the decay, one of `of_keys`, has a factor for each token of these arrays."""
        given = {
            name: outline(np.shape(x), np.bool_ if name == "key_mask" else np.float32)
            for name, x in of_keys.items()
            if x is not None
        }
        q, k, v = (outline(np.shape(x)) for x in (q, k, v))
        return check(q, k, v, self.feature_map, **(self.options | given)).gates is not None

    def forward(self, **arrays: Any) -> tuple[Array, ...]:
        """Return the result in 32 or 64 bits, and what else `backward` needs."""
        forward = gradients.attend_forward(self._check(**arrays))
        return forward.out, *forward.normalizers

    def backward(
        self, grad_out: Array, out: Array, *normalizers: Any, **arrays: Any
    ) -> gradients.Gradients:
        """Return the gradients from what `forward` returned, and from the same arrays."""
        forward = Forward(out, normalizers)
        return gradients.pullback_of(self._check(**arrays), forward)(grad_out)

    def _check(self, q: Array, k: Array, v: Array, projection: Any = None, **more: Any) -> Call:
        return check(q, k, v, self._map(projection), **self.options, **more)

    def _map(self, projection: Any) -> FeatureMap:
        if projection is None:
            return self.feature_map
        return dataclasses.replace(self.feature_map, projection=projection)
