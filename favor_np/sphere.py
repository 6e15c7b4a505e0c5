"""Rows on a sphere: softmax weights that depend on angles alone, where random features are best.

A row x of d columns becomes (x, sqrt(d)) over its length.  Columns should have variance one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from favor_np.features import FeatureMap, feature_map

KNOWN = 512  # normal rows that a map is calibrated on

Array = npt.NDArray[Any]


def on_sphere(rows: Array) -> Array:
    """Append a constant to rows (n, d), as long as a typical one, and make them of length one."""
    dim = rows.shape[1]
    found = np.empty((len(rows), dim + 1), rows.dtype)
    largest = np.maximum(np.abs(rows).max(1, initial=0.0), 1.0)[:, None]  # no square overflows
    found[:, :dim], found[:, dim:] = rows / largest, np.sqrt(dim) / largest
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def sphere_map(dim: int, num_features: int, scale: float, seed: int, dtype: Any) -> FeatureMap:
    """Return the map of rows that had `dim` columns, with weights exp(scale cos angle).

    It is calibrated on normal rows, not on the data: whoever makes it anew has the same.
    """
    fm = feature_map("positive", dim + 1, num_features, scale=scale, rng=seed, dtype=dtype)
    typical = on_sphere(np.random.default_rng(seed).standard_normal((KNOWN, dim)))
    return fm.calibrate(typical, typical)
