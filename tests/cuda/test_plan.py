"""How calls are cut for a device."""

import json
from pathlib import Path

import numpy as np
import ptxrun
import pytest

ptxrun.require()

from favor_np.cuda import plan
from favor_np.cuda.code import RESIDENT, THREADS
from favor_np.cuda.device import ARCHITECTURES, KNOWN
from favor_np.cuda.kernels.tiles import TILE
from favor_np.jobs import KEYS, Shapes, broadcast_jobs

TABLE = json.loads(Path(__file__).with_name("gate.json").read_text())
each_device = pytest.mark.parametrize("device", KNOWN.values(), ids=KNOWN)


@each_device
def test_one_long_sequence_fills_the_device(device):
    cut = plan.lengths(device, 1, 2**17, 4, 1, causal=False)
    blocks = 4 * -(-(2**17) // cut.stretch)
    assert device.multiprocessors <= blocks <= 2 * RESIDENT * device.multiprocessors
    assert cut.stretch % TILE == 0


@each_device
def test_a_multiprocessor_holds_the_blocks_that_are_planned_for_it(device):
    blocks = plan.resident(device)
    assert blocks == (1 if device.name == "Tesla T4" else RESIDENT)
    folds = [x for name, row in TABLE.items() if name.startswith("fold") for x in row.values()]
    largest = max(figures["shared"] for figures in folds) + 1024
    assert largest <= plan.FOLD_BYTES
    assert blocks * largest <= device.shared_memory
    assert blocks * THREADS <= device.threads
    assert blocks * THREADS * max(figures["registers"] for figures in folds) <= device.registers


@each_device
def test_blocks_of_all_kernels_fit(device):
    for name, row in TABLE.items():
        for figures in row.values():
            assert figures["shared"] <= device.static_shared_memory, name
            assert figures["registers"] * THREADS <= device.registers, name


def test_plans_are_known_for_every_architecture_but_one():
    """And kernels are compiled for those of all devices."""
    known = {device.compute_capability for device in KNOWN.values()}
    assert known <= set(ARCHITECTURES)
    assert set(ARCHITECTURES) - known == {(10, 0)}


@each_device
def test_many_sequences_are_not_cut_further_than_needed(device):
    cut = plan.lengths(device, 4096, 2**12, 4, 1, causal=False)
    assert cut.stretch >= 2**12
    assert plan.lengths(device, 1, 10, 4, 1, causal=False).stretch == TILE * plan.SHORTEST


@each_device
@pytest.mark.parametrize("problems", [1, 16, 4096])
def test_causal_sequences_are_cut_the_same_for_all_devices(device, problems):
    cut = plan.lengths(device, problems, 2**20, 4, 1, causal=True)
    assert cut == plan.lengths(KNOWN["T4"], problems, 2**20, 4, 1, causal=True)
    assert cut.stretch == TILE
    state = 4 * TILE * (4 * TILE + 8)
    assert cut.span == TILE or problems * cut.span // TILE * state <= plan.ROOM


@pytest.mark.parametrize("length", [1, TILE, 100])
def test_stretches_cover_every_position_once(length):
    counts = np.array([0, 1, 63, 64, 65, 300])
    seen = [np.zeros(n, int) for n in counts]
    for start in range(0, 300, 150):
        parts = plan.stretches(counts, length, (start, start + 150))
        for owner, first, n in zip(parts.owner, parts.start, parts.lengths, strict=True):
            assert n > 0
            seen[owner][first : first + n] += 1
    assert all((x == 1).all() for x in seen)


def test_tables_go_backwards_from_the_last_row():
    jobs = broadcast_jobs(Shapes((70, 4), (70, 4), (70, 4)))
    sides = plan.keys_and_queries(jobs)
    parts = plan.stretches(jobs.table[:, KEYS], TILE, (0, 70))
    table = plan.fold_table(sides, parts, backwards=True)
    rows = [row + step * i for _, step, n, _, _, row, *_ in table for i in range(n)]
    assert rows == list(range(69, -1, -1))
