"""Tests on a GPU: skipped without one, failing without one where FAVOR_NP_REQUIRE_GPU=1.

FAVOR_NP_STUB_GPU=1 runs them on the driver of tests/cuda/stub_driver.py: numba-cuda's own runtime,
kernels executed from their PTX on the CPU.
"""

import os

import pytest

REQUIRED = os.environ.get("FAVOR_NP_REQUIRE_GPU") == "1"
STUB = os.environ.get("FAVOR_NP_STUB_GPU") == "1"


def pytest_configure(config):
    """Before anything imports numba.cuda."""
    # Without that package the driver links, as it must on the stub.
    config.addinivalue_line("filterwarnings", "ignore:cuda.bindings.nvjitlink:RuntimeWarning")
    if STUB:
        import stub_driver

        if REQUIRED:
            raise pytest.UsageError("FAVOR_NP_REQUIRE_GPU=1 asks for a real one")
        config.stub_driver = stub_driver.install(devices=2, memory=1 << 29)


@pytest.fixture(scope="session", autouse=True)
def _gpu():
    from favor_np.cuda import device

    problem = device.problem()
    if problem and (REQUIRED or STUB):
        pytest.fail(f"a GPU is required: {problem}")
    if problem:
        pytest.skip(f"NOT run on a GPU: {problem}")
