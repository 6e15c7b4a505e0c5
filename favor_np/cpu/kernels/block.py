"""Blocks as kernels see them: ``call.q`` is the array at a field of a record, ``t.rows`` a tile.

A block is one pointer.  Reading a field loads where the array lies and how long its axes are; none
of that changes while a kernel runs, and LLVM is told so.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    infer_getattr,
    intrinsic,
    lower_getattr_generic,
    models,
    register_model,
)
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

from favor_np.cpu import record

_I64 = ir.IntType(64)
#: Where a NumPy array has its data, its number of axes (32 bits) and their lengths, behind what
#: every Python object has.
_DATA, _NDIM, _SHAPE = 0, 8, 16


class Block(types.Type):  # type: ignore[misc]  # Numba's classes have no types
    """A record, or a room, of a variant of a kernel in one precision."""

    def __init__(
        self, cls: Any, variant: frozenset[str], dtype: np.dtype[Any], room: Any, *, is_room: bool
    ) -> None:
        self.cls, self.variant, self.dtype, self.room = cls, variant, dtype, room
        self.fields = record.fields(cls)
        self.is_room = is_room
        name = "_".join((cls.__name__, dtype.name, *sorted(variant)))
        super().__init__(name=f"Block({name})")

    @property
    def key(self) -> Any:
        """What makes two types the same."""
        return self.cls, self.variant, self.dtype, self.room

    def type_of(self, name: str) -> Any:
        """Return Numba's type of a field."""
        field = self.fields[name]
        if field.variants and not self.variant & set(field.variants):
            return types.none
        if field.block is not None:
            return Block(field.block, self.variant, self.dtype, None, is_room=True)
        return types.Array(from_dtype(field.dtype(self.dtype)), field.ndim, "C")


@register_model(Block)
class _BlockModel(models.PrimitiveModel):  # type: ignore[misc]  # Numba's classes have no types
    def __init__(self, dmm: Any, fe_type: Block) -> None:
        super().__init__(dmm, fe_type, _I64.as_pointer())


@infer_getattr
class _BlockFields(AttributeTemplate):  # type: ignore[misc]  # Numba's classes have no types
    key = Block

    def generic_resolve(self, block: Block, name: str) -> Any:
        return block.type_of(name) if name in block.fields else None


def _word(builder: Any, pointer: Any, number: Any) -> Any:
    """Load a word that never changes."""
    value = builder.load(builder.gep(pointer, [number]))
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)


@lower_getattr_generic(Block)
def _get_field(context, builder, block, value, name):
    kind, number = block.type_of(name), list(block.fields).index(name)
    if kind is types.none:
        return context.get_dummy_value()
    if block.is_room:
        words = builder.gep(value, [_number(record.TILE * number)])
        start = builder.udiv(_word(builder, words, _number(0)), _number(8))
        data, shape = builder.gep(value, [start]), builder.gep(words, [_number(1)])
        if isinstance(kind, Block):
            return data
    else:
        header = _word(builder, value, _number(0))
        found = builder.add(_word(builder, value, _number(1 + number)), header)
        fields = builder.inttoptr(found, _I64.as_pointer())
        data = builder.inttoptr(_word(builder, fields, _number(_DATA // 8)), _I64.as_pointer())
        shape = _word(builder, fields, _number(_SHAPE // 8))
        shape = builder.inttoptr(shape, _I64.as_pointer())
        if block.fields[name].rows:  # the first length is not asked, and may be any axis'
            first = _word(builder, shape, _number(0))
            if numba.config.BOUNDSCHECK:
                first = _number(2**60)
            axes = [first] * kind.ndim
            if kind.ndim > 1:
                count = builder.and_(
                    _word(builder, fields, _number(_NDIM // 8)), _number(2**32 - 1)
                )
                axes[-1] = _word(builder, shape, builder.sub(count, _number(1)))
            return _array(context, builder, kind, data, axes)
    axes = [_word(builder, shape, _number(axis)) for axis in range(kind.ndim)]
    return _array(context, builder, kind, data, axes)


def _array(context: Any, builder: Any, kind: Any, data: Any, axes: Any) -> Any:
    """Make the array of a type whose axes have these lengths."""
    result = make_array(kind)(context, builder)
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides = [_number(size)]
    for axis in reversed(axes[1:]):
        strides.insert(0, builder.mul(strides[0], axis, flags=("nsw",)))
    populate_array(
        result,
        data=builder.bitcast(data, context.get_data_type(kind.dtype).as_pointer()),
        shape=axes,
        strides=strides,
        itemsize=_number(size),
        meminfo=None,
    )
    return result._getvalue()


@intrinsic
def room_of(typingctx, call, me):
    """The tiles of a thread: its row of ``call.room``."""

    def codegen(context, builder, signature, args):
        kind = call.type_of("room")
        rows = make_array(kind)(
            context, builder, _get_field(context, builder, call, args[0], "room")
        )
        width = builder.extract_value(rows.shape, 1)
        start = builder.gep(rows.data, [builder.mul(args[1], width)])
        return builder.bitcast(start, _I64.as_pointer())

    return call.room(call, types.intp), codegen
