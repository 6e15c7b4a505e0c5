"""How far results are from what was expected, and how far rounding lets them be."""

import numpy as np

from support.oracle import REAL, content


def relative_error(got, expected):
    """max|got - expected| / max|expected|, the deviation that golden/README.md uses."""
    got, expected = np.asarray(got, REAL), np.asarray(expected, REAL)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if got.size == 0:
        return 0.0
    worst = np.abs(got - expected).max()  # NaN stays NaN and fails every comparison
    return float(worst / max(np.abs(expected).max(), np.finfo(np.float64).tiny))


def relative_rms(got, expected):
    """The error's root mean square over that of what is expected."""
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))


def state_error(state, other):
    """The larger of the relative errors of S and z."""
    pairs = zip(content(state), content(other), strict=True)
    return max(relative_error(got, expected) for got, expected in pairs)


def tolerance(q, k, feature_map, dtype, decay=None, steps=64):
    """What rounding the log-features costs: eps times the largest, and a little more.

    With a decay, also the rounding of the steps by which a key is raised: 64 in a chunk, and all
    those of a sequence where it is compared with its pieces.  Of relu and elu the features that
    are left may all be small, beside what they are rounded by.
    """
    longest = max(np.max(np.sum(x.astype(float) ** 2, -1), initial=0) for x in (q, k)) ** 0.5
    widest = np.max(np.linalg.norm(feature_map.key_weight, axis=-1))
    largest = 4 * widest * longest + 2 * feature_map.key_norm * longest**2
    rate = 0 if decay is None else -np.log2(np.min(decay))
    small = 1 if feature_map.kind == "positive" else 4
    return small * np.finfo(dtype).eps * (8 + largest + steps * rate)
