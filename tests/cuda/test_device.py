"""What is said where no GPU can be used: one line each, and no cost for who does not ask."""

import os
import site
import subprocess
import sys
from pathlib import Path

import ptxrun
import pytest
from stub_driver import CHILD as STUB
from support import child

HERE = Path(__file__).parent
SAID = """
from favor_np.cuda import device
print(device.problem())
"""
ptxrun.require()


def said(code, *options, **environ):
    """What a child process prints: one line."""
    text = child.python(code, *options, **environ)
    assert text.count("\n") == 1, text
    return text[:-1]


def test_the_package_does_not_load_cuda():
    code = """
    import sys
    import numpy as np
    import favor_np
    from favor_np.cuda import device
    x = np.ones((3, 8, 4), np.float32)
    fm = favor_np.feature_map("positive", dim=4, num_features=8)
    state = favor_np.AttentionState.zeros(fm, value_dim=4)
    favor_np.favor_attention(*x, fm, causal=True)
    favor_np.favor_attention_vjp(*x, fm)[1](x[0])
    state.step(*x[:, 0])
    print(sorted(n for n in sys.modules if n.startswith(("numba_cuda", "numba.cuda", "cuda"))))
    """
    loaded = eval(said(code))
    assert not [name for name in loaded if not name.startswith("numba_cuda")], loaded
    bare = eval(said("import sys; print([n for n in sys.modules if 'numba_cuda' in n])"))
    assert {name.split(".")[0] for name in loaded} <= {name.split(".")[0] for name in bare}


def test_without_numba_cuda_the_error_names_the_extras():
    text = said("import sys; sys.modules['numba_cuda'] = None\n" + SAID)
    assert text.startswith("a GPU needs numba-cuda: pip install 'favor_np[cuda13]'")
    assert "favor_np[cuda12]" in text


def test_numbas_own_target_is_refused():
    """Without .pth files, as with PYTHONPATH alone, Numba's deprecated target is what is found."""
    path = ":".join([str(HERE.parents[1]), *site.getsitepackages()])
    text = said(SAID, "-S", PYTHONPATH=path)
    assert text.startswith("numba.cuda is the implementation 'Built-in', not 'NVIDIA'")


def test_the_simulator_is_refused():
    text = said(SAID, NUMBA_ENABLE_CUDASIM="1")
    assert text == "numba.cuda is its simulator: unset NUMBA_ENABLE_CUDASIM"


def test_a_numpy_without_row_stack():
    """As from 2.5 on, where numba-cuda 0.30 asks for it nevertheless once something is compiled."""
    code = """
    import numba, numba.np.arrayobj, numpy as np
    if hasattr(np, "row_stack"):
        del np.row_stack
        np.__all__.remove("row_stack")
    from favor_np.cuda import device
    text, _ = device.numba_cuda().compile_ptx(lambda x: None, (numba.float32[::1],), cc=(9, 0))
    print(".entry" in text, hasattr(np, "row_stack"))
    """
    assert said(code) == "True False"


def test_no_driver():
    text = said(SAID, NUMBA_DISABLE_CUDA="1")
    assert text.startswith("no NVIDIA driver can be used (CUDA is disabled")


def test_a_driver_without_a_gpu():
    text = said(f"{STUB}stub_driver.install(devices=-1){SAID}")
    assert text.startswith("no NVIDIA driver can be used (")
    assert "CUDA_ERROR_NO_DEVICE" in text
    text = said(f"{STUB}stub_driver.install(devices=0){SAID}")
    assert text.startswith("the driver finds no GPU")


def test_an_old_driver():
    text = said(f"{STUB}stub_driver.install(version=12040){SAID}")
    assert text.startswith("the driver knows CUDA 12.4, but kernels are compiled with CUDA 13.")
    assert text.endswith("pip install 'favor_np[cuda12]'")


def test_a_device_is_described():
    code = f"""{STUB}stub_driver.install()
from favor_np.cuda import device
print(device.current(), device.problem(), device.driver_version())
"""
    assert said(code) == "stub, 132 multiprocessors, sm_90 None (13, 0)"


PLACED = """
stub_driver.install(devices=2)
from numba import cuda
from favor_np.cuda import device
here, there = np.ones(3), cuda.to_device(np.ones(3))
class Foreign:
    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__
with cuda.gpus[1]:
    far = Foreign(cuda.to_device(np.ones(3)))
def check(**arrays):
    try:
        device.check_placement(arrays)
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_arrays_have_to_lie_on_the_current_device():
    assert child.python(f"{STUB}{PLACED}check(q=there, k=there, mask=None); check(q=here)") == ""
    text = said(f"{STUB}{PLACED}check(q=there, k=here)")
    assert text.startswith("TypeError k lies in host memory and q on a CUDA device")
    text = said(f"{STUB}{PLACED}check(q=there, k=far)")
    assert text.startswith("ValueError k lies on CUDA device 1, but the current device is 0")
    text = said(f"{STUB}{PLACED}\nwith cuda.gpus[1]: check(q=there, k=far)")
    assert text.startswith("ValueError q lies on CUDA device 0, but the current device is 1")


def test_out_of_memory():
    code = """
stub_driver.install(memory=1 << 30)
from numba import cuda
from favor_np.cuda import device
kept = cuda.device_array(1 << 29, np.uint8)
try:
    with device.clear_errors():
        cuda.device_array((1 << 29) + 1, np.uint8)
except MemoryError as error:
    print(error)
"""
    assert said(STUB + code) == "out of memory on stub, of whose 1.0 GiB 0.5 are free"


def test_other_errors_pass_as_they_are():
    code = """
stub_driver.install()
from favor_np.cuda import device
try:
    with device.clear_errors():
        raise OSError("something else")
except OSError as error:
    print(error)
"""
    assert said(STUB + code) == "something else"


@pytest.mark.parametrize(
    ("environ", "status", "text"),
    [
        ({}, 0, "NOT run on a GPU"),
        ({"FAVOR_NP_REQUIRE_GPU": "1"}, 4, "a GPU is required: no NVIDIA driver"),
        ({"FAVOR_NP_REQUIRE_GPU": "1", "NUMBA_ENABLE_CUDASIM": "1"}, 4, "its simulator"),
        ({"FAVOR_NP_REQUIRE_GPU": "1", "FAVOR_NP_STUB_GPU": "1"}, 4, "asks for a real one"),
    ],
)
def test_the_tests_of_a_gpu_are_skipped_or_fail(environ, status, text):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "tests/gpu", "-k", "mixed"]
    done = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env=os.environ | {"NUMBA_DISABLE_CUDA": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=child.HANG,
        check=False,
    )
    assert done.returncode == status
    assert text in done.stdout + done.stderr
