"""Attention to the last positions only, by two folds and no subtraction.

A sequence is cut into segments as long as the window.  What a query may see is then the beginning of
its own segment up to itself, which is causal attention within segments, and the end of the segment
before: the same from the other side, with the order of the rows turned round.  Each of the two gives a row
and its denominator; their weighted mean is the result.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import launch, plan
from favor_np.features import FeatureMap
from favor_np.validation import AttentionCall

Array: TypeAlias = npt.NDArray[Any]

#: Positions whose rows are turned round at a time: as much extra memory.
WAVE = 32_768


def attend(
    feature_map: FeatureMap,
    call: AttentionCall,
    out: Array,
    window: int,
    offsets: Array | None,
    rates: Array | None,
) -> None:
    """Write causal attention to the last `window` positions to the C-ordered `out`."""
    if offsets is None:
        offsets = np.array([0, call.keys])
    starts = [np.arange(a, b, window) for a, b in itertools.pairwise(offsets)]
    own = np.concatenate([*starts, offsets[-1:]])
    weights = _weights(out)
    _run(feature_map, call, np.arange(call.keys), None, out, own, rates, weights)
    later = np.concatenate([start[1:] for start in starts])  # those with a segment before them
    ends = np.minimum(later + window, offsets[np.searchsorted(offsets, later, side="right")])
    step, back = max(1, WAVE // window), np.arange(window - 1, 0, -1)
    for first in range(0, len(later) if window > 1 else 0, step):
        begin, end = later[first : first + step, None], ends[first : first + step, None]
        keys, queries = begin - window + back, begin + back - 1
        real = (queries < end).ravel()
        rows = np.minimum(queries, end - 1).ravel()
        other = np.empty((*out.shape[:-2], rows.size, out.shape[-1]), out.dtype)
        theirs = _weights(other)
        packs = np.arange(len(begin) + 1) * (window - 1)
        _run(feature_map, call, rows, keys.ravel(), other, packs, rates, theirs)
        rows = rows[real]
        mine = out[..., rows, :]
        w, top = (a.reshape(out.shape[:-1])[..., rows] for a in weights)
        w_other, top_other = (a.reshape(other.shape[:-1])[..., real] for a in theirs)
        highest = np.maximum(top, top_other)
        w = w * np.exp2(np.maximum(top - highest, -2000).astype(w.dtype))
        w_other = w_other * np.exp2(np.maximum(top_other - highest, -2000).astype(w.dtype))
        total = w + w_other
        total[total == 0] = 1  # no key at all: both are zero
        out[..., rows, :] = (mine * w[..., None] + other[..., real, :] * w_other[..., None]) / (
            total[..., None]
        )


def _weights(out: Array) -> tuple[Array, Array]:
    """Return arrays for the denominators of all rows."""
    size = out.size // out.shape[-1]
    return np.empty(size, out.dtype), np.empty(size, plan.integer_of(out.dtype))


def _run(
    feature_map: FeatureMap, call: AttentionCall, queries: Array, keys: Array | None, out: Array,
    offsets: Array, rates: Array | None, weights: tuple[Array, Array],
) -> None:  # fmt: skip
    """Attend causally within `offsets`; with `keys`, backwards: rows `queries` to rows `keys`."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    clock = launch.clock(rates, offsets)
    if keys is not None:
        q, k, v = q[..., queries, :], k[..., keys, :], v[..., keys, :]
        mask = None if mask is None else mask[..., keys]
        if clock is not None:  # raised by the distance to the beginning of the queries' segment
            clock = launch.Clock(-clock.rate, -clock.rate)
    launch.attend(
        feature_map, q, k, v, mask, out,
        dtype=call.compute, causal=True, grouped=call.grouped, state=None, state_shape=None,
        threads=call.threads, offsets=offsets, clock=clock, weights=weights,
    )  # fmt: skip
