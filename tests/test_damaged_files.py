"""Damaged files of every format, as `nox -s fuzz` has them for longer: read, or refused plainly."""

import runpy
from pathlib import Path

import numpy as np
import pytest

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "tools/fuzz_files.py"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return list(FUZZ["samples"](tmp_path_factory.mktemp("samples")))


@pytest.mark.parametrize("number", range(10))
@pytest.mark.filterwarnings("ignore")  # of what a damaged file makes libraries say
def test_damaged_files_are_read_or_refused(samples, number, tmp_path):
    kind, data, suffix, read = samples[number]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data)
    read(path)
    refused = 0
    for seed in range(1, 21):
        path.write_bytes(FUZZ["damaged"](np.random.default_rng(seed), data))
        try:
            read(path)
        except FUZZ["REFUSED"]:
            refused += 1
    assert refused > 0, kind
