"""A pipeline: one long causal problem for all threads of a call.

The chunks are folded each into a state of its own, these are added up in order, and each chunk is
read with the sum of those before it.  Turn by turn one group of chunks is folded, the states of the
group before it are added up, and the one before that is read.  So what a job needs was claimed many
jobs earlier, threads hardly ever wait for each other, and nobody waits for a thread that has
claimed nothing.

A chunk is folded before it is known what c is by then, as if it did not move any more.  Where it
has moved, which is rare, the chunk is folded again when its state is to be added: so every bit is
what one thread makes of it that goes through all chunks.
"""

from __future__ import annotations

from favor_np.cpu.kernels.chunk import attend_chunk, piece
from favor_np.cpu.kernels.floats import IEEE, set_float_mode
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.simd import call_function, fetch_add, load
from favor_np.cpu.kernels.state import add_state, copy_state, raise_state
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.records import (
    BASE,
    CHUNKS,
    FITS,
    FOLD,
    GIVE_WAY,
    GROUP,
    LEFT,
    MOVED,
    READ,
    RING,
    SCAN,
    THREADS,
    WHOLE,
)
from favor_np.cpu.tiles import CHUNK, PAD
from favor_np.jobs import KEYS

#: For so many groups after c has moved chunks are not folded before their turn: it may well move
#: again.
CALM = 6


@jit()
def pipeline_job(pipeline, number):
    """What a job does, the chunk where its group begins, and the turn that folds it."""
    group = pipeline[GROUP]
    turn, place = divmod(number, 2 * group + 1)
    if place < group:
        return FOLD, turn * group + place, turn
    if place == group:
        return SCAN, (turn - 1) * group, turn - 1
    return READ, (turn - 3) * group + place - 1, turn - 2


@jit()
def await_all(pipeline, what, turn):
    """Wait until no job of that kind of a turn is left, yielding the processor."""
    while fetch_add(pipeline, LEFT + 3 * (turn + RING) + what, 0) > 0:
        call_function(pipeline[GIVE_WAY])


@jit()
def pass_on(pipeline, what, turn):
    """Count a job as done."""
    fetch_add(pipeline, LEFT + 3 * (turn + RING) + what, -1)


@jit()
def note(pipeline, slot):
    """Where the words of a state begin."""
    return LEFT + 3 * (-(-pipeline[CHUNKS] // pipeline[GROUP]) + RING + slot)


@jit()
def slot_of(pipeline, chunk):
    """Where the state of a chunk is; before the first one, that of the beginning."""
    states = RING * pipeline[GROUP]
    return chunk % states if chunk >= 0 else states


@jit()
def await_turn(pipeline, what, chunk, turn):
    """Wait for what a job needs."""
    if what == FOLD:
        await_all(pipeline, READ, turn - RING)
        await_all(pipeline, SCAN, turn - 2)
        if turn < 2 and chunk > 0:
            await_all(pipeline, FOLD, -1)
    elif what == SCAN:
        await_all(pipeline, FOLD, turn)
        await_all(pipeline, SCAN, turn - 1)
    else:
        await_all(pipeline, SCAN, turn)


@jit()
def basis_of(pipeline, what, chunk, turn):
    """The state whose c a chunk is to be folded with; -1 if the job is not to fold it."""
    if what == READ:
        return -1
    own, before = note(pipeline, slot_of(pipeline, chunk)), chunk - 1
    if what == FOLD:  # as a rule the first chunk finds c, and it stays there
        before = 0 if turn < 2 and chunk > 0 else (turn - 1) * pipeline[GROUP] - 1
    basis = slot_of(pipeline, before)
    moved, fits = pipeline[note(pipeline, basis) + MOVED], pipeline[note(pipeline, basis) + FITS]
    if what == SCAN and pipeline[own + BASE] == moved:
        return -1
    if what == FOLD and not (fits and (moved <= 0 or chunk - moved > CALM * pipeline[GROUP])):
        pipeline[own + BASE] = chunk  # as of no other
        return -1
    return basis


@jit()
def note_fold(pipeline, chunk, basis, fits, c):
    """Keep what has to be known of a chunk that was folded."""
    slot, moved, same = slot_of(pipeline, chunk), pipeline[note(pipeline, basis) + MOVED], True
    for r in range(c.shape[1]):
        same = same and c[slot, r] == c[basis, r]
    own = note(pipeline, slot)
    pipeline[own + BASE], pipeline[own + FITS] = moved, fits
    pipeline[own + MOVED] = moved if same and fits else chunk


@jit()
def scan_state(pipeline, chunk, c, s, z, scale):
    """Add a chunk's state to the sum of those before it, and put that sum in its place."""
    slot, before, total = (
        slot_of(pipeline, chunk),
        slot_of(pipeline, chunk - 1),
        slot_of(pipeline, -1),
    )
    features, moved = c.shape[1] - PAD, pipeline[note(pipeline, slot) + MOVED] == chunk
    for r in range(0, features if moved else 0, VECTOR_BYTES // z.itemsize):
        raise_state(load(c, before, r), load(c, slot, r), s, z, total, features, r, scale)
    add_state(c, s, z, slot, total)


@jit()
def attend_pipeline(par, p, pipeline, features, number, c, s, z, t):
    """One job.  Behind the states of chunks lies the sum of those added."""
    what, chunk, turn = pipeline_job(pipeline, number)
    if not 0 <= chunk < pipeline[CHUNKS]:
        return
    await_turn(pipeline, what, chunk, turn)
    last, total, distance = chunk + 1, slot_of(pipeline, -1), pipeline[THREADS] * CHUNK
    if what == SCAN:
        last = min(chunk + pipeline[GROUP], pipeline[CHUNKS])
    for i in range(chunk, last):
        slot, at, end = slot_of(pipeline, i), i * CHUNK, min(i * CHUNK + CHUNK, p.row[KEYS])
        keys = features[slot]
        own, basis = note(pipeline, slot), basis_of(pipeline, what, i, turn)
        if basis >= 0:
            for r in range(c.shape[1]):
                c[slot, r] = c[basis, r]
        if basis >= 0 or (what == READ and pipeline[own + FITS]):
            taken = attend_chunk(
                par,
                p,
                READ if what == READ else FOLD,
                at,
                end - at,
                distance,
                c,
                s,
                z,
                slot,
                keys,
                t,
            )
            if what != READ:
                note_fold(pipeline, i, basis, taken == end - at, c)
        set_float_mode(IEEE)
        if what == SCAN and pipeline[own + FITS]:
            scan_state(pipeline, i, c, s, z, t.scale)
        elif what == SCAN:  # a chunk in pieces, as one thread goes through it
            for r in range(c.shape[1]):
                c[slot, r] = c[slot_of(pipeline, i - 1), r]
            copy_state(s, z, total, slot, c.shape[1] - PAD)
            split = False
            while at < end:
                count = piece(at, end, split)
                taken = attend_chunk(par, p, WHOLE, at, count, count, c, s, z, slot, keys, t)
                at, split = at + taken, taken < count
            copy_state(s, z, slot, total, c.shape[1] - PAD)
    if what == FOLD and chunk == 0:
        pass_on(pipeline, FOLD, -1)
    pass_on(pipeline, what, turn)
