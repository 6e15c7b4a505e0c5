"""Arrays and tiles that begin or end at a page that nobody may touch: one element too far is a fault.

Run as a program (python -m support.guard), it makes every kind of call on such arrays.
"""

import contextlib
import ctypes
import functools
import itertools
import mmap
import sys
from unittest import mock

import numpy as np

from favor_np import (
    AttentionState,
    FeatureMap,
    diagnose,
    exact_attention,
    exact_attention_vjp,
    favor_attention,
    favor_attention_vjp,
)
from favor_np.call import Forward
from favor_np.cpu import memory, record
from favor_np.cpu.processor import amx_unavailable
from favor_np.cpu.tiles import ChunkTiles, Sizes, chunk_room
from favor_np.engine import processor
from favor_np.nn import fused
from support.tuning import tuned
from support.workspaces import forget_workspaces, tiles_of

PAGE = mmap.PAGESIZE


def protect(address):
    """Let nobody touch a page."""
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    if mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(shape, dtype, front=False):
    """Zeros of this shape that end (or begin) at a page without access."""
    count, dtype = int(np.prod(shape)), np.dtype(dtype)
    size = count * dtype.itemsize
    pages = -(-max(size, 1) // PAGE)
    room = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for address in (base, base + (pages + 1) * PAGE):
        protect(address)
    offset = PAGE if front else PAGE + pages * PAGE - size
    return np.frombuffer(room, dtype, count, offset).reshape(shape)


@contextlib.contextmanager
def guarded_memory(*, front=False):
    """Guard the engine's own arrays, too: weights, states, workspaces and each tile of a room."""
    lay_out, make, guards = record.room, memory.Workspace.make, {}

    def pages(nbytes):
        """As many bytes in whole pages, and one page more."""
        return -(-nbytes // PAGE) * PAGE + PAGE

    def apart(cls, shapes, dtype):
        """A room whose tiles begin, or end, at pages."""
        room = lay_out(cls, shapes, dtype)
        known, tiles = list(record.fields(cls)), list(tiles_of(cls, room.words, dtype))
        for name, kind, _, shape in tiles if not front else ():
            if name in known and record.fields(cls)[name].block is None:
                size = int(np.prod(shape)) * kind.itemsize
                room.words[record.TILE * known.index(name)] += -size % PAGE
        guards[room.words.tobytes()] = [
            pages(start + int(np.prod(shape)) * kind.itemsize) - PAGE
            for _, kind, start, shape in tiles_of(cls, room.words, dtype)
        ]
        return room

    def make_guarded(workspace, *args):
        arrays = make(workspace, *args)
        (rooms,) = (array for array in arrays if array.dtype == np.uint8)
        for row in rooms:
            for offset in guards[workspace.room.words.tobytes()]:
                protect(row.ctypes.data + offset)
        return arrays

    with (
        mock.patch.object(record, "_lines", pages),
        mock.patch.object(record, "room", apart),
        mock.patch.object(memory.Workspace, "make", make_guarded),
        tuned(aligned=lambda shape, dtype, *_: guarded(shape, dtype, front)),
    ):
        yield


def inputs(dtype, front):
    rng = np.random.default_rng(0)
    for L, Lk, d, dv, rows in [
        (1, 1, 1, 1, 1),
        (3, 5, 2, 7, 3),
        (16, 16, 16, 16, 16),
        (64, 65, 15, 17, 33),
        (130, 129, 17, 1, 65),
        (63, 200, 33, 31, 130),
    ]:
        arrays = []
        for shape in ((2, L, d), (2, Lk, d), (2, Lk, dv)):
            array = guarded(shape, dtype, front)
            array[...] = rng.standard_normal(shape)
            arrays.append(array)
        mask = guarded((2, Lk), bool, front)
        mask[...] = rng.random((2, Lk)) < 0.7
        yield *arrays, mask, guarded((2, L, dv), dtype, front), rng.standard_normal((rows, d))


def attend_and_differentiate(q, k, v, mask, out, W, kind, antithetic, front):
    """Every call with a map."""
    dtype, fm = q.dtype.type, FeatureMap.from_projection(W, kind, antithetic=antithetic)
    causal = as_many(q, k, v, front)
    favor_attention(q, k, v, fm, key_mask=mask, out=out)
    favor_attention(*causal, fm, causal=True)
    favor_attention(*causal, fm, causal=True, num_threads=3)
    favor_attention(*(30 * x for x in causal), fm, causal=True)
    if dtype == np.float32:
        half = {"precision": "bfloat16"}
        favor_attention(q, k, v, fm, key_mask=mask, out=out, **half)
        favor_attention(*causal, fm, causal=True, **half)
        favor_attention(*causal, fm, causal=True, num_threads=3, **half)
    if kind == "positive":
        diagnose(q, k, v, fm, key_mask=mask)
        diagnose(*causal, fm, causal=True)
    state = AttentionState.zeros(fm, v.shape[-1], (2,), dtype=dtype)
    state.update(k, v, mask)
    state.attend(q)
    state.step(q[:, 0], k[:, 0], v[:, 0])
    state.merge(AttentionState.zeros(fm, v.shape[-1], (2,), dtype=dtype).update(2 * k, v))
    gradients = favor_attention_vjp(q, k, v, fm, key_mask=mask)[1](out)
    gradients.projection  # noqa: B018 (it is computed when it is asked for)
    for by in (1, 30):
        arrays = [by * x for x in causal]
        result, pullback = favor_attention_vjp(*arrays, fm, causal=True)
        pullback(result)


def attend_exactly(q, k, v, mask, out, front):
    """Every call without a map; also with weights and gradients that are guarded."""
    causal = as_many(q, k, v, front)
    exact_attention(q, k, v, key_mask=mask)
    exact_attention(*causal, causal=True)
    if q.dtype == np.float32:
        exact_attention(q, k, v, key_mask=mask, precision="bfloat16")
        exact_attention(*causal, causal=True, precision="bfloat16")
    exact_attention_vjp(*causal, causal=True)[1](causal[2])
    call = processor().check(q, k, v, key_mask=mask, num_threads=1)
    call.scale = 0.3
    normalizers = [guarded(x.size, x.dtype, front) for x in call.engine.normalizers(out)]
    grads = [guarded(x.shape, x.dtype, front) for x in (q, k, v)]
    call.engine.attend_exact(call, out, normalizers)
    call.engine.exact_vjp(call, Forward(out, normalizers), out, grads)


def attend_with_options(q, k, v, W, front):
    """Calls with biases, forgetting, windows and packed sequences."""
    fm, causal = FeatureMap.from_projection(W, "positive"), as_many(q, k, v, front)
    length = causal[0].shape[1]
    bias, decay = (guarded((2, length), q.dtype, front) for _ in range(2))
    ends = guarded(3, np.int64, front)
    decay[...], ends[:] = 0.9, [0, length // 2, length]
    for options in ({"key_bias": bias}, {"decay": decay}, {"window": 7}):
        exact_attention(*causal, causal=True, **options)
        out, pullback = favor_attention_vjp(*causal, fm, causal=True, **options)
        pullback(out)
    favor_attention(*causal, fm, causal=True, cu_seqlens=ends)


def pass_through_layers(v, front):
    """Every kernel of layers, there and back."""

    def like(x):
        return guarded(np.shape(x), v.dtype, front)

    with mock.patch.multiple(
        fused,
        empty=functools.partial(guarded, front=front),
        empty_like=lambda x: guarded(x.shape, x.dtype, front),
    ):
        weight = like(v[0, 0])
        for bias, shifted in itertools.product((None, weight), (False, True)):
            norm = fused.Norm(v, weight, bias, 1e-5, centred=True, shifted=shifted)
            norm.back(norm.y)
        for name in (*fused.FUNCTIONS, *fused.GATED):
            wide = guarded((*v.shape[:-1], 2 * v.shape[-1]), v.dtype, front)
            fused.activate_back(name, wide, fused.activate(name, wide))
        length, dim = v.shape[-2], 2 * v.shape[-1]
        lengths, turns = guarded(3, v.dtype, front), like(np.empty((2, length, dim)))
        rows = like(np.empty((2, length, 4 * dim)))
        for options in ({}, {"lengths": lengths, "turns": (turns[0], turns[1])}):
            for adjacent in (False, True):
                heads = fused.Heads((2, 1, 1), dim, adjacent=adjacent, **options)
                heads.merge(heads.split(rows), rows)
        targets = guarded(length, np.int64, front)
        fused.cross_entropy(v[0], targets, 1.0)
        vectors = tuple(guarded(v.size, v.dtype, front) for _ in range(4))
        pieces, constants = guarded((1, 3), np.int64, front), guarded(7, np.float64, front)
        pieces[0] = 0, v.size, 1
        fused.square_sum(vectors[0], pieces)
        fused.adam(vectors, pieces, constants)


def as_many(q, k, v, front):
    """As many queries as keys, also guarded."""
    n, found = min(q.shape[1], k.shape[1]), []
    for x in (q, k, v):
        found.append(guarded((len(x), n, x.shape[2]), x.dtype, front))
        found[-1][...] = x[:, :n]
    return found


def main():
    amx_unavailable()  # asks the system for the matrix unit
    kinds = (np.float32, False), (np.float32, True), (np.float64, False)
    for (dtype, parts), front in itertools.product(kinds, (False, True)):
        forget_workspaces()
        # Three threads share what is not shorter.
        ways = {"USE_BF16X3": parts, "USE_BFLOAT16": True}
        with tuned(MIN_PARALLEL_WORK=0, MIN_SHARED_LENGTH=2, **ways), guarded_memory(front=front):
            for q, k, v, mask, out, W in inputs(dtype, front):
                for kind, antithetic in (("positive", False), ("positive", True), ("elu", False)):
                    attend_and_differentiate(q, k, v, mask, out, W, kind, antithetic, front)
                attend_exactly(q, k, v, mask, out, front)
                attend_with_options(q, k, v, W, front)
                pass_through_layers(v, front)
    print("no fault")


def touch(what):
    """Read what must not be read: to see that a fault is one."""
    if what == "array":
        np.lib.stride_tricks.as_strided(guarded(3, np.float32), (4,))[3]
        return
    dtype, front = np.dtype(np.float32), what == "before a tile"
    with guarded_memory(front=front):
        room = chunk_room(Sizes(dtype, 17, 32), frozenset(["error_bars"]))
        (rooms,) = memory.workspace(dtype, room).make(2)
    for name, kind, start, shape in tiles_of(ChunkTiles, room.words, dtype):
        if name == "groups.num":
            tile = rooms[1, start:][: int(np.prod(shape)) * kind.itemsize]
            assert not tile.any()
            rooms[1, start - 1 if front else start + tile.size]


if __name__ == "__main__":
    if sys.argv[1:]:
        touch(sys.argv[1])
        print("no fault")
    else:
        main()
