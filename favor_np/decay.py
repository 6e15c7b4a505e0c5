"""Forgetting that the data decide: a factor a token, as log-weights of keys and back.

The weight of key j for query i is multiplied with ``decay[j + 1] * ... * decay[i]``.  The sum of
the logarithms up to i belongs to the query, which its normalisation removes; what is left is minus
the sum up to j.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.validation import LONGEST_DECAY

Array: TypeAlias = npt.NDArray[Any]


def bias_of(gates: Array, offsets: Array | None = None) -> Array:
    """Return the log-weights of keys in float64, from zero at the beginning of each sequence."""
    bias: Array = -np.log(gates.astype(np.float64))
    for own in _sequences(bias, offsets):
        own[..., :1] = 0  # it multiplies nothing
        np.cumsum(own, -1, out=own)
    if bias.max(initial=0.0) > LONGEST_DECAY * math.log(2):
        raise ValueError(
            f"decay must be larger for {gates.shape[-1]} positions in one call: "
            f"all factors together are 2 ** {-bias.max() / math.log(2):.3g}"
        )
    return bias


def gradient_of(bias_gradient: Array, gates: Array, offsets: Array | None = None) -> Array:
    """Return the gradient by the factors, in their dtype, from that by the log-weights of keys.

    A factor counts for the keys from its own on, which only later queries see: that of a factor
    depends on no cotangent before it.
    """
    grad: Array = bias_gradient.astype(np.float64)
    for own in _sequences(grad, offsets):
        np.cumsum(own[..., ::-1], -1, out=own[..., ::-1])
        own[..., :1] = 0
    with np.errstate(over="ignore"):  # what is beyond the dtype is infinite
        grad /= -gates.astype(np.float64)
        return grad.astype(gates.dtype.newbyteorder("="))


def _sequences(array: Array, offsets: Array | None) -> Iterator[Array]:
    """Go through packed sequences, along the last axis."""
    if offsets is None:
        yield array
        return
    for start, stop in itertools.pairwise(offsets.tolist()):
        yield array[..., start:stop]
