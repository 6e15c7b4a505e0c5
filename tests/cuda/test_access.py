"""How the package's kernels access memory: whole sectors of it, without conflicts of banks."""

import ptxrun

ptxrun.require()

import pytest
from cases import Case
from planting import planted, source_of
from ptxdevice import PtxDevice
from support.tolerance import relative_error

import favor_np
from favor_np.cuda.code import THREADS, bounds
from favor_np.cuda.kernels import tiles


class TracingDevice(PtxDevice):
    """Keeps the reports of kernels, by name, with what they say of banks and sectors."""

    def __init__(self):
        super().__init__()
        self.reports = {}

    def launch(self, kernel, grid, args, stream=None):
        options = {"launch_bounds": bounds(kernel)}
        report = ptxrun.run(kernel, grid, THREADS, args, options=options, trace=True)
        assert report.ok, f"{kernel.__qualname__}: {report}"
        self.reports[kernel.__name__] = report


def traced(precision="full"):
    """The reports of a causal call of two chunks and stages."""
    case = Case(66, dim=20, value_dim=3, rows=32, lead=(), causal=True)
    with TracingDevice().installed() as device:
        out = favor_np.favor_attention(
            *case.arrays(), case.feature_map(), causal=True, device="cuda", precision=precision
        )
    limit = case.tolerance() if precision == "full" else 2e-2
    assert relative_error(out, case.expected()) < limit
    return device.reports


@pytest.fixture(scope="module", params=["full", "bfloat16"])
def reports(request):
    return traced(request.param)


def test_every_kernel_is_traced(reports):
    assert {"pack", "fold", "scan", "read"} <= set(reports)


def test_global_memory_is_accessed_in_whole_sectors(reports):
    """But where rows of 20 numbers begin within one."""
    for name, report in reports.items():
        assert report.sectors
        for line, sectors in report.sectors.items():
            assert sectors <= 2, (name, line, sectors)


def test_shared_memory_has_no_more_than_small_conflicts(reports):
    for name, report in reports.items():
        for line, passes in report.bank_passes.items():
            assert passes <= 3, (name, line, passes)


def test_rows_that_are_not_padded_are_seen():
    old = "STRIDE, DEPTH, STAGE = 68, 16, 20"
    start = source_of(tiles.__name__).index(old)
    with planted(tiles.__name__, start, old, "STRIDE, DEPTH, STAGE = 64, 16, 16"):
        found = traced()
    passes = [n for name in ("fold", "read") for n in found[name].bank_passes.values()]
    assert max(passes) > 3
