"""Numbers as arrays hold them: float32, float16, and bfloat16 in words of 16 bits.

Whatever is stored, kernels compute in float32.  bfloat16 is the upper half of a float32, so integers do:
an int16 array holds its words, here and nowhere else.
"""

from __future__ import annotations

from numba import float32, int16, int32
from numba.cuda.libdevice import float_as_int, int_as_float
from numba.types import float16

try:
    from numba.cuda.extending import overload
except (
    ImportError
):  # Numba's own target: modules load, for their tables; `device` refuses to launch
    from numba.extending import overload

#: What bfloat16 has for every NaN.
_NAN = 0x7FC0


def number(x):
    """A number of an array in float32; called outside of kernels, not of words."""
    return float32(x)


def rounded(x, array):
    """The float32 x as the array holds it: the nearest, of two the even; outside of kernels x itself."""
    return x


@overload(number, jit_options={"forceinline": True})
def _number(x):
    if x == int16:
        return lambda x: int_as_float(int32(x) << int32(16))
    return lambda x: float32(x)


@overload(rounded, jit_options={"forceinline": True})
def _rounded(x, array):
    if array.dtype == float16:
        return lambda x, array: float16(x)
    if array.dtype == int16:
        return _word
    return lambda x, array: x


def _word(x, array):
    bits = float_as_int(x)
    up = int32(0x7FFF) + ((bits >> int32(16)) & int32(1))
    return int16(int32(bits + up) >> int32(16)) if x == x else int16(_NAN)
