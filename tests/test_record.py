"""Blocks as kernels see them: fields of a record by name, whatever their precision and their axes."""

import math
import re
import sys
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest
from llvmlite.binding.object_file import ObjectFileRef
from support.kernels import compiled, object_code
from support.parameters import each_dtype

from favor_np.cpu import record
from favor_np.cpu.code import Kernel, useful_kernels
from favor_np.cpu.kernels.block import room_of
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.memory import workspace
from favor_np.cpu.record import Array, Bytes2, Field, Floats1, Floats2, Floats3, Ints1, Whole1

Floats4 = Annotated[Array, Field(ndim=4)]


class Axes(NamedTuple):
    one: Floats1
    two: Floats2
    three: Floats3
    four: Floats4
    found: Floats1


@jit()
def see_axes(call):
    found = call.found
    found[0] = call.one.shape[0]
    found[1], found[2] = call.two.shape
    found[3], found[4], found[5] = call.three.shape
    found[6], found[7], found[8], found[9] = call.four.shape
    found[10] = call.one[-1]
    found[11] = call.two[1, 2]
    found[12] = call.three[1, 2, 3]
    found[13] = call.four[1, 2, 3, 4]
    return call.one.size


@each_dtype
def test_shapes_and_numbers_of_one_to_four_axes(dtype):
    arrays = [np.arange(np.prod(shape), dtype=dtype).reshape(shape)
              for shape in ((2,), (2, 3), (2, 3, 4), (2, 3, 4, 5))]  # fmt: skip
    found = np.zeros(14, dtype)
    assert compiled(see_axes, Axes, dtype)(*arrays, found) == 2
    assert found.tolist() == [2, 2, 3, 2, 3, 4, 2, 3, 4, 5, 1, 5, 23, 119]


class Kinds(NamedTuple):
    floats: Floats1
    whole: Whole1
    integers: Ints1
    doubles: record.Doubles1
    flags: Annotated[Array, Field("bool")]
    octets: Annotated[Array, Field("u1")]
    constants: Annotated[Array, Field(np.dtype([("count", np.int64), ("share", np.float64)]))]


@jit()
def write_kinds(call):
    call.floats[1] = 0.1
    call.whole[1] = -5
    call.integers[1] = 2**40
    call.doubles[1] = 0.1
    call.flags[1] = call.flags[0]
    call.octets[1] = 255
    call.doubles[0] = call.constants[0].count + call.constants[0].share
    return 0


@each_dtype
def test_every_kind_has_its_own_width(dtype):
    whole = np.int32 if dtype == np.float32 else np.int64
    arrays = [np.zeros(3, kind) for kind in (dtype, whole, np.int64, np.float64, bool, np.uint8)]
    arrays[4][0] = True
    constants = np.array([(3, 0.25)], record.fields(Kinds)["constants"].kind)
    assert compiled(write_kinds, Kinds, dtype)(*arrays, constants) == 0
    expected = [dtype(0.1), -5, 2**40, 0.1, True, 255]
    assert [x[1] for x in arrays] == expected
    assert arrays[3][0] == 3.25
    assert not any(x[2] for x in arrays)


class Leading(NamedTuple):
    rows: record.Rows
    mask: record.Mask
    found: Floats1


@jit()
def see_rows(call):
    rows, found = call.rows, call.found
    found[0] = rows.shape[1]
    found[1], found[2] = rows[0, 1], rows[23, 4]
    found[3], found[4] = call.mask[22], call.mask[23]
    return 0


@each_dtype
@pytest.mark.parametrize("shape", [(24, 5), (4, 6, 5), (1, 2, 3, 4, 5), (24, 1, 5)])
def test_rows_may_lie_on_any_number_of_axes(shape, dtype):
    """And so may the keys of a mask: the kernel knows how many there are."""
    rows, mask = np.arange(120, dtype=dtype).reshape(shape), np.arange(24) > 22
    found = np.zeros(5, dtype)
    assert compiled(see_rows, Leading, dtype)(rows, mask.reshape(shape[:-1]), found) == 0
    assert found.tolist() == [5, 1, 119, 0, 1]


class Optional(NamedTuple):
    found: Ints1
    plain: Annotated[Array | None, Field(variants=("some", "more"))] = None
    other: Annotated[Array | None, Field(ndim=2, variants=("more",))] = None


@jit()
def size_of(array):
    """Whether an argument is None the compiler knows."""
    return 0 if array is None else array.size


@jit()
def see_optional(call):
    call.found[0] = size_of(call.plain) + 10 * size_of(call.other)
    return 7


@pytest.mark.parametrize(("variant", "expected"), [((), 0), (("some",), 3), (("more",), 103)])
def test_fields_that_a_variant_does_not_have_are_none(variant, expected):
    """They need not be given, or are None."""
    found, arrays = np.full(1, -1), (np.zeros(3, np.float32), np.zeros((2, 5), np.float32))
    kernel = compiled(see_optional, Optional, variant=variant)
    assert kernel(found, *arrays[: len(variant) * 2]) == 7
    assert found[0] == expected


class Inner(NamedTuple):
    line: Floats1
    table: record.Whole2


class Outer(NamedTuple):
    first: Floats2
    inner: Annotated[Array | None, Field(variants=("inner",), block=Inner)]
    last: Floats3


class Roomy(NamedTuple):
    room: Bytes2
    found: Ints1


@jit()
def use_inner(inner, me):
    if inner is not None:
        inner.line[3] = me + 3
        inner.table[inner.table.shape[0] - 1, 0] = me + 4


@jit()
def use_room(call):
    for me in range(call.room.shape[0]):
        t = room_of(call, me)
        t.first[1, 2] = me + 1
        t.last[1, 1, 1] = me + 2
        use_inner(t.inner, me)
    call.found[0] = t.last.size
    return 0


@each_dtype
@pytest.mark.parametrize("variant", [(), ("inner",)])
def test_every_thread_has_a_room_of_tiles(variant, dtype):
    shapes: dict[str, Any] = {"first": (2, 3), "last": (2, 2, 2)}
    if variant:
        shapes["inner"] = {"line": (4,), "table": (5, 6)}
    room = record.room(Outer, shapes, np.dtype(dtype))
    (rooms,) = workspace(np.dtype(dtype), room).make(3)
    found, begin = np.zeros(1, np.int64), rooms.ctypes.data
    kernel = compiled(use_room, Roomy, dtype, variant=variant, room=Outer)
    assert kernel(rooms, found) == 0
    assert found[0] == 8
    assert begin % 64 == 0

    def number(me, start, place, kind):
        return rooms[me, start:].view(kind)[place]

    whole = np.int32 if dtype == np.float32 else np.int64
    for me in range(3):
        starts = [rooms[me].view(np.int64)[record.TILE * i] for i in range(3)]
        assert number(me, starts[0], 5, dtype) == me + 1
        assert number(me, starts[2], 7, dtype) == me + 2
        if variant:
            line, table = (number(me, starts[1], record.TILE * i, np.int64) for i in range(2))
            assert number(me, starts[1] + line, 3, dtype) == me + 3
            assert number(me, starts[1] + table, 24, whole) == me + 4


class Failing(NamedTuple):
    rows: Floats1


@jit()
def refuse(call):
    if call.rows[0] > 0:
        raise ValueError("not to be seen")
    return 5


def test_a_kernel_that_raises_returns_minus_one():
    run = compiled(refuse, Failing)
    assert run(np.zeros(1, np.float32)) == 5
    assert run(np.ones(1, np.float32)) == -1


def test_there_are_no_fields_but_those_of_the_record():
    with pytest.raises(Exception, match="Unknown attribute 'nothing'"):
        compiled(jit()(lambda call: call.nothing), Failing)


#: What machine code may look for elsewhere: memory, the C library's mathematics, and nothing else.
MAY_NEED = re.compile(
    r"mem(cpy|set|move)|(erf|exp|exp2|log|log2|pow|ldexp|floor|ceil|rint|trunc)f?"
)


def undefined(code):
    """The symbols of a piece of object code (ELF) that are to be found elsewhere."""
    with ObjectFileRef.from_data(code) as file:
        sections = {section.name(): section.data() for section in file.sections()}
    kind = np.dtype([("name", "<u4"), ("info", "<u2"), ("section", "<u2"), ("value", "<u8", 2)])
    symbols = np.frombuffer(sections[b".symtab"], kind)
    names = sections[b".strtab"]
    found = symbols["name"][(symbols["section"] == 0) & (symbols["name"] > 0)]
    return {names[start : names.index(b"\0", start)].decode() for start in found}


elf = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF")


@jit()
def call_elsewhere(call):
    call.rows[0] = math.pow(call.rows[0], call.rows[1])
    return 0


@elf
def test_what_code_needs_is_seen():
    assert undefined(object_code(call_elsewhere, Failing)) == {"powf"}


@elf
@pytest.mark.parametrize("kernel", list(useful_kernels()), ids=lambda kernel: kernel.symbol)
def test_kernels_need_nothing_of_numba(kernel):
    found = undefined(Kernel(kernel.name, kernel.dtype, kernel.variant).object_code())
    strange = [name for name in found if not MAY_NEED.fullmatch(name)]
    assert not strange


def test_a_record_that_does_not_fit_is_noticed():
    from support import records

    from favor_np.cpu import code

    kernel = code.kernel("holds_large", np.dtype(np.float32))
    good = np.zeros((3, 4), np.float32)
    records.check(kernel, (good,))
    for bad in (good.astype(np.float64), good[0], good.T, good[:, ::2]):
        with pytest.raises(AssertionError, match="rows of favor_np_holds_large"):
            records.check(kernel, (bad,))
