"""Numbers near the largest float: what overflows where it is summed is computed anew, scaled.

Attention is linear in the values, so it may be computed from values that are smaller by a power of
two, which is exact.  Only what has overflowed is replaced: nothing else depends on how large other
values are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.cpu.code import kernel
from favor_np.cpu.record import pack
from favor_np.cpu.tiles import PAD

Array: TypeAlias = npt.NDArray[Any]

#: By which power of two large values are scaled down: sums of what is not large do not overflow.
POWER = {4: 96, 8: 768}


def holds_large(rows: Array) -> bool:
    """Whether sums of these numbers may overflow."""
    rows = rows.reshape(-1, rows.shape[-1] if rows.size else 1)
    return kernel("holds_large", rows.dtype)(pack((rows,))) > 0


def power_of(*rows: Array) -> int:
    """Return the power of two to scale arrays down by: 0 if none holds a large number."""
    return POWER[rows[0].itemsize] if any(map(holds_large, rows)) else 0


def scaled(array: Array, power: int) -> Array:
    """Return ``array * 2**power``, silently."""
    with np.errstate(all="ignore"):
        result: Array = np.ldexp(array, power)
    return result


def scaled_states(arrays: Any, s_power: int, z_power: int) -> Any:
    """Return states, or None, whose S and z are multiplied with powers of two."""
    if arrays is None:
        return None
    c, s, z = arrays
    return c.copy(), scaled(s, s_power), scaled(z, z_power)


def means(small: Array, power: int) -> Array:
    """Return ``small * 2**power``; the largest float where only rounding is infinite."""
    large = scaled(small, power)
    over = np.isinf(large) & np.isfinite(small)
    large[over] = np.copysign(np.finfo(large.dtype).max, large[over])
    return large


def fill(array: Array, other: Array) -> None:
    """Put the numbers of another array where this one has none that is finite."""
    np.copyto(array, other, where=~np.isfinite(array))


def keep_in_range(arrays: Any, s_power: int = 0, z_power: int = 0) -> None:
    """Multiply S and z of states with powers of two, and raise c where their sums are large then.

    So whatever is folded, merged or read next is far from the largest float.
    """
    c, s, z = arrays
    features, highest = c.shape[-1] - PAD, np.finfo(z.dtype).maxexp // 2
    sums, counts = s[..., :features, :], z[..., :features]
    if not (s_power or z_power or _reach(2.0**highest, sums) or _reach(2.0**highest, counts)):
        return
    with np.errstate(all="ignore"):  # some may not be finite
        by = np.zeros(counts.shape, c.dtype)
        for size, power in ((np.abs(sums).max(-1), s_power), (counts, z_power)):
            exponents = np.where(np.isfinite(size) & (size != 0), np.frexp(size)[1] + power, 0)
            np.maximum(by, exponents - highest, out=by, casting="same_kind")
        c[..., :features] += by
        rows = s[..., : 2 * features, :]
        np.ldexp(rows, s_power - np.tile(by, 2)[..., None], out=rows)
        rows = z.reshape(*z.shape[:-1], -1, features)  # sums, what rounding has taken, the tail
        np.ldexp(rows, z_power - by[..., None, :], out=rows)


def _reach(limit: float, sums: Array) -> bool:
    """Whether there are numbers that are not below a limit: such, or NaN."""
    return sums.size > 0 and not -limit < sums.min() <= sums.max() < limit
