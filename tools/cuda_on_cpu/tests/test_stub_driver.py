"""numba-cuda's own runtime on the driver that has the host's memory for devices."""

import ptxrun

ptxrun.require()

import subprocess
import sys
import textwrap

import stub_driver

CODE = """
driver = stub_driver.install(devices=2)
from numba import cuda

@cuda.jit
def add(x, y, out, last):
    i = cuda.grid(1)
    if i < last:
        out[i] = x[i] + y[i]

x = np.arange(100, dtype=np.float32)
with cuda.gpus[1]:
    stream = cuda.stream()
    there = cuda.to_device(x, stream)
    out = cuda.device_array(100, np.float32)
    add[2, 64, stream](there, there, out, np.int32(100))
    stream.synchronize()
    assert np.array_equal(out.copy_to_host(), 2 * x)
    (launch,) = driver.launches
    assert launch.report.ok and launch.dims == (2, 1, 1, 64, 1, 1) and launch.stream
    try:
        add[2, 64](there, there, out, np.int32(101))
    except Exception:
        print("refused")
    assert "out of bounds" in str(driver.launches[-1].report)
"""


def test_a_launch_goes_through_the_driver():
    code = stub_driver.CHILD + textwrap.dedent(CODE)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n"
    assert "out of bounds" in done.stderr
