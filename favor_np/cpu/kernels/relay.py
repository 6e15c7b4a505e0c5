"""A relay: one long causal problem for all threads of a call.

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
def relay_job(relay, number):
    """What a job does, the chunk where its group begins, and the turn that folds it."""
    group = relay[GROUP]
    turn, place = divmod(number, 2 * group + 1)
    if place < group:
        return FOLD, turn * group + place, turn
    if place == group:
        return SCAN, (turn - 1) * group, turn - 1
    return READ, (turn - 3) * group + place - 1, turn - 2


@jit()
def await_all(relay, what, turn):
    """Wait until no job of that kind of a turn is left, yielding the processor."""
    while fetch_add(relay, LEFT + 3 * (turn + RING) + what, 0) > 0:
        call_function(relay[GIVE_WAY])


@jit()
def pass_on(relay, what, turn):
    """Count a job as done."""
    fetch_add(relay, LEFT + 3 * (turn + RING) + what, -1)


@jit()
def note(relay, slot):
    """Where the words of a state begin."""
    return LEFT + 3 * (-(-relay[CHUNKS] // relay[GROUP]) + RING + slot)


@jit()
def slot_of(relay, chunk):
    """Where the state of a chunk is; before the first one, that of the beginning."""
    states = RING * relay[GROUP]
    return chunk % states if chunk >= 0 else states


@jit()
def await_turn(relay, what, chunk, turn):
    """Wait for what a job needs."""
    if what == FOLD:
        await_all(relay, READ, turn - RING)
        await_all(relay, SCAN, turn - 2)
        if turn < 2 and chunk > 0:
            await_all(relay, FOLD, -1)
    elif what == SCAN:
        await_all(relay, FOLD, turn)
        await_all(relay, SCAN, turn - 1)
    else:
        await_all(relay, SCAN, turn)


@jit()
def basis_of(relay, what, chunk, turn):
    """The state whose c a chunk is to be folded with; -1 if the job is not to fold it."""
    if what == READ:
        return -1
    own, before = note(relay, slot_of(relay, chunk)), chunk - 1
    if what == FOLD:  # as a rule the first chunk finds c, and it stays there
        before = 0 if turn < 2 and chunk > 0 else (turn - 1) * relay[GROUP] - 1
    basis = slot_of(relay, before)
    moved, fits = relay[note(relay, basis) + MOVED], relay[note(relay, basis) + FITS]
    if what == SCAN and relay[own + BASE] == moved:
        return -1
    if what == FOLD and not (fits and (moved <= 0 or chunk - moved > CALM * relay[GROUP])):
        relay[own + BASE] = chunk  # as of no other
        return -1
    return basis


@jit()
def note_fold(relay, chunk, basis, fits, c):
    """Keep what has to be known of a chunk that was folded."""
    slot, moved, same = slot_of(relay, chunk), relay[note(relay, basis) + MOVED], True
    for r in range(c.shape[1]):
        same = same and c[slot, r] == c[basis, r]
    own = note(relay, slot)
    relay[own + BASE], relay[own + FITS] = moved, fits
    relay[own + MOVED] = moved if same and fits else chunk


@jit()
def scan_state(relay, chunk, c, s, z, scale):
    """Add a chunk's state to the sum of those before it, and put that sum in its place."""
    slot, before, total = slot_of(relay, chunk), slot_of(relay, chunk - 1), slot_of(relay, -1)
    features, moved = c.shape[1] - PAD, relay[note(relay, slot) + MOVED] == chunk
    for r in range(0, features if moved else 0, VECTOR_BYTES // z.itemsize):
        raise_state(load(c, before, r), load(c, slot, r), s, z, total, features, r, scale)
    add_state(c, s, z, slot, total)


@jit()
def attend_relay(par, p, relay, features, number, c, s, z, t):
    """One job.  Behind the states of chunks lies the sum of those added."""
    what, chunk, turn = relay_job(relay, number)
    if not 0 <= chunk < relay[CHUNKS]:
        return
    await_turn(relay, what, chunk, turn)
    last, total, distance = chunk + 1, slot_of(relay, -1), relay[THREADS] * CHUNK
    if what == SCAN:
        last = min(chunk + relay[GROUP], relay[CHUNKS])
    for i in range(chunk, last):
        slot, at, end = slot_of(relay, i), i * CHUNK, min(i * CHUNK + CHUNK, p.row[KEYS])
        keys = features[slot]
        own, basis = note(relay, slot), basis_of(relay, what, i, turn)
        if basis >= 0:
            for r in range(c.shape[1]):
                c[slot, r] = c[basis, r]
        if basis >= 0 or (what == READ and relay[own + FITS]):
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
                note_fold(relay, i, basis, taken == end - at, c)
        set_float_mode(IEEE)
        if what == SCAN and relay[own + FITS]:
            scan_state(relay, i, c, s, z, t.scale)
        elif what == SCAN:  # a chunk in pieces, as one thread goes through it
            for r in range(c.shape[1]):
                c[slot, r] = c[slot_of(relay, i - 1), r]
            copy_state(s, z, total, slot, c.shape[1] - PAD)
            split = False
            while at < end:
                count = piece(at, end, split)
                taken = attend_chunk(par, p, WHOLE, at, count, count, c, s, z, slot, keys, t)
                at, split = at + taken, taken < count
            copy_state(s, z, slot, total, c.shape[1] - PAD)
    if what == FOLD and chunk == 0:
        pass_on(relay, FOLD, -1)
    pass_on(relay, what, turn)
