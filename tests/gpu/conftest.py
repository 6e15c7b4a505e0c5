"""Tests on a GPU: skipped without one, failing without one where FAVOR_NP_REQUIRE_GPU=1.

FAVOR_NP_STUB_GPU=1 runs them on the driver of tools/cuda_on_cpu: numba-cuda's own runtime,
kernels executed from their PTX on the CPU.
"""

import os

import pytest

from favor_np.cuda import device

REQUIRED = os.environ.get("FAVOR_NP_REQUIRE_GPU") == "1"
STUB = os.environ.get("FAVOR_NP_STUB_GPU") == "1"


def pytest_configure(config):
    """Before anything imports numba.cuda."""
    # Without that package the driver links, as it must on the stub.
    config.addinivalue_line("filterwarnings", "ignore:cuda.bindings.nvjitlink:RuntimeWarning")
    if STUB and REQUIRED:
        raise pytest.UsageError("FAVOR_NP_REQUIRE_GPU=1 asks for a real one")
    if STUB:
        import stub_driver

        config.stub_driver = stub_driver.install(devices=2, memory=1 << 29)
    if (REQUIRED or STUB) and (problem := device.problem()):
        raise pytest.UsageError(f"a GPU is required: {problem}")


@pytest.fixture(scope="session", autouse=True)
def _gpu():
    problem = device.problem()
    if problem:
        pytest.skip(f"NOT run on a GPU: {problem}")
