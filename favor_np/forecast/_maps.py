"""The feature maps of a forecast: a plain one at first, then one that knows the windows before it.

A map is calibrated once, on the first PREFIX windows, and used for those after them: every output
depends on its own past only.  PREFIX does not depend on the length of the series, so that a feed
without an end is treated alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from favor_np.calibration import METHODS

from ._windows import F32, Windows

if TYPE_CHECKING:
    from favor_np.features import FeatureMap

#: Windows: docs/calibration.md has the errors that decided.
PREFIX = 256
CALIBRATIONS = ("auto", "none", *METHODS)


class Section(NamedTuple):
    """Rows ``start:stop`` of the sequence, and the map of their queries and of all keys so far."""

    start: int
    stop: int
    feature_map: FeatureMap


def plain_map(dim: int, num_features: int, scale: float, seed: int) -> FeatureMap:
    """Return the map that knows nothing of the data."""
    from favor_np.features import feature_map

    return feature_map("positive", dim=dim, num_features=num_features, scale=scale, rng=seed)


def calibrated(fm: FeatureMap, queries: F32, keys: F32, method: str) -> FeatureMap:
    """Return the map that knows these windows.

    It is not centred: the mean of the first windows is not that of those to come, which is near
    zero, for they are measured against the long run.
    """
    return fm.calibrate(queries, keys, method, center=False)


def sections(windows: Windows, fm: FeatureMap, method: str) -> tuple[Section, ...]:
    """Cut the sequence where the map changes."""
    rows = len(windows)
    if method == "none" or rows <= PREFIX:
        return (Section(0, rows, fm),)
    known = calibrated(fm, windows.queries[:PREFIX], windows.keys[:PREFIX], method)
    return Section(0, PREFIX, fm), Section(PREFIX, rows, known)
