"""Numbers as arrays hold them: float32, float16, and bfloat16 in words of 16 bits.

Whatever is stored, kernels compute in float32.  bfloat16 is the upper half of a float32, so
integers do: an int16 array holds its words, here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, int16, int32, types, uint32
from numba.cuda.extending import intrinsic
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
    """A number of an array in float32."""


def rounded(x, array):
    """The float32 x as the array holds it: the nearest, of two the even."""


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


def four(array, line, place):
    """Four neighbours in a row, counted over all leading axes, of an array of float32: one access.

    They have to begin at a multiple of 16 bytes, as those of padded rows do.
    """


def put_four(array, line, place, a, b, c, d):
    """Write four neighbours: see `four`."""


@overload(four, jit_options={"forceinline": True})
def _four(array, line, place):
    return lambda array, line, place: _load_four(array, uint32(line), uint32(place))


@overload(put_four, jit_options={"forceinline": True})
def _put_four(array, line, place, a, b, c, d):
    return lambda array, line, place, a, b, c, d: _store_four(
        array, uint32(line), uint32(place), (a, b, c, d)
    )


def _vector(context: Any, builder: Any, kind: Any, array: Any, line: Any, place: Any) -> Any:
    """The address of four numbers as a vector's."""
    from numba.cuda.np.arrayobj import make_array

    wide = ir.IntType(64)
    held = make_array(kind)(context, builder, array)
    width = builder.trunc(builder.extract_value(held.shape, kind.ndim - 1), ir.IntType(32))
    row = builder.mul(builder.zext(line, wide), builder.zext(width, wide))
    at = builder.gep(held.data, [builder.add(row, builder.zext(place, wide))])
    return builder.bitcast(at, ir.VectorType(ir.FloatType(), 4).as_pointer())


@intrinsic
def _load_four(typingctx: Any, array: Any, line: Any, place: Any) -> Any:
    result = types.UniTuple(types.float32, 4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.load(_vector(context, builder, signature.args[0], *args))
        found.align = 16
        numbers = [builder.extract_element(found, ir.IntType(32)(i)) for i in range(4)]
        return context.make_tuple(builder, result, numbers)

    return result(array, line, place), codegen


@intrinsic
def _store_four(typingctx: Any, array: Any, line: Any, place: Any, numbers: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.Constant(ir.VectorType(ir.FloatType(), 4), ir.Undefined)
        for i in range(4):
            number = builder.extract_value(args[3], i)
            vector = builder.insert_element(vector, number, ir.IntType(32)(i))
        store = builder.store(vector, _vector(context, builder, signature.args[0], *args[:3]))
        store.align = 16
        return context.get_dummy_value()

    return types.void(array, line, place, numbers), codegen
