"""The package's own kernels as plain Python, under the checker that needs no compiler."""

import ptxrun

ptxrun.require()

import pytest
import simcheck
from cases import Case
from ptxdevice import PtxDevice
from support.tolerance import relative_error

import favor_np
from favor_np.cuda.runtime import THREADS


class PythonDevice(PtxDevice):
    """Runs kernels under simcheck; `reports` has what it counted."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.reports = options, {}

    def launch(self, kernel, grid, args, stream=None):
        report = simcheck.run(kernel, grid, THREADS, args, **self.options)
        assert report.ok, f"{kernel.__qualname__}: {report}"
        self.reports[kernel.__name__] = report


@pytest.fixture(scope="module")
def reports():
    """Of a causal call of two chunks and stages."""
    case = Case(66, dim=20, value_dim=3, rows=32, lead=(), causal=True)
    with PythonDevice(stats=True).installed() as device:
        out = favor_np.favor_attention(
            *case.arrays(), case.feature_map(), causal=True, device="cuda"
        )
    assert relative_error(out, case.expected()) < case.tolerance()
    return device.reports


def test_nothing_is_found(reports):
    assert {"pack", "fold", "scan", "read"} <= set(reports)


def test_global_memory_is_accessed_in_whole_sectors(reports):
    """A warp of float32 takes four sectors where its threads are neighbours in a row of 64.

    Rows of other arrays have columns in blocks of 16, so a warp reads two of them: at most 8.  Four
    numbers a thread (`four`, `put_four`) are one access of 16 sectors, and counted here one by one.
    """
    for name, report in reports.items():
        for line, sectors in report.sectors.items():
            most = 16 if line.startswith("storage.py") else 8
            assert sectors <= most, (name, line, sectors)


def test_shared_memory_has_no_more_than_small_conflicts(reports):
    for name, report in reports.items():
        for line, passes in report.bank_passes.items():
            assert passes <= 4, (name, line, passes)
