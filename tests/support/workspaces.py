"""What the package keeps between calls: workspaces, and the layouts of maps."""

import numpy as np

from favor_np.cpu import layout, memory, schedule
from favor_np.cpu.record import TILE, fields


def tiles_of(cls, words, dtype):
    """Go through the tiles of a room, and the blocks in it: name, dtype, first byte and shape."""
    known = fields(cls)
    yield "", np.dtype(np.int64), 0, (len(known) * TILE,)
    for number, (name, field) in enumerate(known.items()):
        start, *axes = map(int, words[TILE * number : TILE * (number + 1)])
        if start and field.block is not None:
            for inner, kind, at, shape in tiles_of(field.block, words[start // 8 :], dtype):
                yield f"{name}.{inner}".rstrip("."), kind, start + at, shape
        elif start:
            yield name, field.dtype(dtype), start, tuple(axes[: field.ndim])


def kept_workspaces():
    """The arrays that this thread keeps for its next calls."""
    return [array for arrays in memory._spare.kept.values() for array in arrays]


def is_kept(workspace, threads, pipeline=0):
    """Whether this thread keeps the arrays of that plan of a workspace."""
    return (workspace, threads, pipeline) in memory._spare.kept


def poison_workspaces():
    """Fill what this thread keeps for its next calls with NaN, but not the words of blocks."""
    for (workspace, *_), arrays in memory._spare.kept.items():
        for array in arrays:
            if array.dtype.kind == "f":
                array.fill(np.nan)
            elif array.dtype == np.uint8:
                words = array.view(np.int64)
                tiles = np.full(words.shape[1], True)
                tiles[: workspace.room.words.size] = workspace.room.words == 0
                words[:, tiles] = -1  # the bits of NaN


def forget_workspaces():
    """Forget what is kept, and how it was laid out."""
    memory._spare.kept.clear()
    for laid_out in (layout.vjp_workspace, layout.exact_workspace, layout.exact_vjp_workspace):
        laid_out.cache_clear()


def forget_layouts():
    """Forget how maps are laid out: equal maps would find what an earlier one was given."""
    layout.layout.cache_clear()
    schedule.schedule.cache_clear()
