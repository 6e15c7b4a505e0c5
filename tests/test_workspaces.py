"""Rooms: their tiles begin on cache lines, lie one behind the other, and are those that kernels read."""

from typing import NamedTuple

import numpy as np
import pytest
from support.kernels import compiled
from support.workspaces import tiles_of

from favor_np.cpu import record, tiles
from favor_np.cpu.code import KERNELS
from favor_np.cpu.kernels import block, jit
from favor_np.cpu.memory import workspace
from favor_np.cpu.record import Bytes2
from favor_np.cpu.tiles import Sizes

F4, F8 = np.dtype(np.float32), np.dtype(np.float64)
#: Class, what lays it out, and of which variants there are.
ROOMS = {
    "attention": (tiles.ChunkTiles, tiles.chunk_room, ["", "error_bars", "pairs", "parts"]),
    "its gradient": (tiles.GradientTiles, tiles.gradient_room, ["", "parts"]),
    "exact attention": (tiles.ExactTiles, tiles.exact_room, ["", "pairs", "parts"]),
    "its gradient, exact": (
        tiles.ExactGradientTiles, lambda of, _: tiles.exact_gradient_room(of), [""],
    ),
}  # fmt: skip
CASES = [
    pytest.param(cls, lay_out, frozenset(variant.split()), dtype, id=f"{name} {variant} {dtype}")
    for name, (cls, lay_out, variants) in ROOMS.items()
    for variant in variants
    for dtype in ((F4,) if variant in ("pairs", "parts") else (F4, F8))
]
SIZES = [(1, 1, 1, 1, 16), (17, 19, 2, 3, 64), (64, 64, 2, 2, 48), (100, 0, 1, 5, 32)]


def sizes(dtype, dim, value_dim, signs, blocks, width):
    return Sizes(dtype, dim, tiles.padded(value_dim, dtype.itemsize), signs, blocks, width)


def in_variant(cls, variant):
    """The names of the tiles that there are."""
    for name, field in record.fields(cls).items():
        if not field.variants or variant & set(field.variants):
            yield name
            if field.block is not None:
                yield from (f"{name}.{inner}" for inner in in_variant(field.block, variant))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("cls", "lay_out", "variant", "dtype"), CASES)
def test_tiles_lie_one_behind_the_other(cls, lay_out, variant, dtype, size):
    room, end = lay_out(sizes(dtype, *size), variant), 0
    for name, kind, start, shape in tiles_of(cls, room.words, dtype):
        assert start % 64 == 0, name
        assert start >= end, name
        end = start + kind.itemsize * int(np.prod(shape))
    assert end <= room.nbytes < end + 64
    assert room.nbytes % 64 == 0
    assert room.words.nbytes <= room.nbytes


@pytest.mark.parametrize(("cls", "lay_out", "variant", "dtype"), CASES)
def test_there_are_the_tiles_of_the_variant_and_no_others(cls, lay_out, variant, dtype):
    room = lay_out(sizes(dtype, *SIZES[1]), variant)
    found = {name: shape for name, *_, shape in tiles_of(cls, room.words, dtype) if name}
    assert list(found) == list(in_variant(cls, variant))
    assert all(0 not in shape for shape in found.values())


def test_the_kernels_have_these_rooms():
    taken = {room for _, _, room, *_ in KERNELS.values() if room is not None}
    assert taken == {cls for cls, *_ in ROOMS.values()}


def marking(tiles):
    """A kernel that writes to both ends of each tile its number."""
    lines = ["def mark(call):", "    t = room_of(call, 1)"]
    for number, (name, shape) in enumerate(tiles.items()):
        first = ", ".join("0" for _ in shape)
        last = ", ".join(f"t.{name}.shape[{axis}] - 1" for axis in range(len(shape)))
        lines += [f"    t.{name}[{where}] = {number + 1}" for where in (first, last)]
    names = {"room_of": block.room_of}
    exec("\n".join([*lines, "    return 0"]), names)
    return jit.jit()(names["mark"])


class Marked(NamedTuple):
    room: Bytes2


@pytest.mark.parametrize(("cls", "lay_out", "variant", "dtype"), CASES)
def test_kernels_find_every_tile_and_its_ends(cls, lay_out, variant, dtype):
    """In the row of their thread."""
    room = lay_out(sizes(dtype, *SIZES[1]), variant)
    found = {tile[0]: tile for tile in tiles_of(cls, room.words, dtype)}
    found = {name: tile for name, tile in found.items() if name in in_variant(cls, variant)}
    shapes = {name: shape for name, (_, kind, _, shape) in found.items() if kind != np.int64}
    mark = compiled(marking(shapes), Marked, dtype, variant=variant, room=cls)
    (rooms,) = workspace(dtype, room).make(2)
    before = rooms.copy()
    assert mark(rooms) == 0
    for number, name in enumerate(shapes):
        _, kind, start, shape = found[name]
        tile = rooms[1, start:][: int(np.prod(shape)) * kind.itemsize].view(kind)
        assert (tile[0], tile[-1]) == (number + 1, number + 1), name
        tile[[0, -1]] = 0
    assert np.array_equal(rooms, before)
