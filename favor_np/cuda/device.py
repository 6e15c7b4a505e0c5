"""The GPU: what there is, and in one line what is missing to use it.

Only here is numba-cuda looked for, so this is the module to change for another compiler.  Importing
it loads nothing; the first call that needs a GPU does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

INSTALL = "pip install 'favor_np[cuda13]', or 'favor_np[cuda12]' with a driver before release 580"
#: Device types of DLPack: CUDA's own memory and what it manages.
_DLPACK = {2, 13}


@dataclass(frozen=True)
class Device:
    """What a plan has to know of a GPU; defaults are those of all since compute capability 7.5."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    #: Bytes of memory.
    memory: int
    #: Bytes of shared memory of a multiprocessor.
    shared_memory: int
    #: Threads that a multiprocessor holds.
    threads: int
    #: Registers of a multiprocessor.
    registers: int = 65536
    #: Bytes of shared memory that a block may ask for in its source.
    static_shared_memory: int = 49152
    #: Its number among those of this process.
    number: int = 0

    @property
    def tensor_cores(self) -> bool:
        """Whether its tensor cores multiply bfloat16 numbers."""
        return self.compute_capability >= (8, 0)

    def __str__(self) -> str:
        """Name, size and architecture."""
        major, minor = self.compute_capability
        return f"{self.name}, {self.multiprocessors} multiprocessors, sm_{major}{minor}"


#: Compute capabilities that the tests compile all kernels for; others are compiled for when used.
ARCHITECTURES = ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))

#: GPUs that plans are tested for where there is none.
KNOWN = {
    "H100": Device("NVIDIA H100", (9, 0), 132, 80 << 30, 233472, 2048),
    "H200": Device("NVIDIA H200", (9, 0), 132, 140 << 30, 233472, 2048),
    "A100": Device("NVIDIA A100", (8, 0), 108, 40 << 30, 167936, 2048),
    "L40S": Device("NVIDIA L40S", (8, 9), 142, 48 << 30, 102400, 1536),
    "T4": Device("Tesla T4", (7, 5), 40, 15 << 30, 65536, 1024),
    "RTX 4090": Device("NVIDIA GeForce RTX 4090", (8, 9), 128, 24 << 30, 102400, 1536),
    "RTX 5090": Device("NVIDIA GeForce RTX 5090", (12, 0), 170, 32 << 30, 102400, 1536),
}


@functools.lru_cache
def numba_cuda() -> Any:
    """Import numba.cuda as NVIDIA's numba-cuda provides it.

    Raises ImportError if that is not installed, if Numba's own deprecated target is loaded in its
    place, or if the simulator is on.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        raise ImportError(f"a GPU needs numba-cuda: {INSTALL}", name="numba_cuda")
    try:
        cuda = importlib.import_module("numba.cuda")
    except ImportError as error:
        raise ImportError(f"numba-cuda does not load ({_line(error)}): {INSTALL}") from error
    implementation = getattr(cuda, "implementation", "unknown")
    if implementation != "NVIDIA":
        raise ImportError(
            f"numba.cuda is the implementation {implementation!r}, not 'NVIDIA': numba-cuda's .pth"
            " file was not read, as with PYTHONPATH; install it into this environment"
        )
    if importlib.import_module("numba.cuda.core.config").ENABLE_CUDASIM:
        raise ImportError("numba.cuda is its simulator: unset NUMBA_ENABLE_CUDASIM")
    with _row_stack():
        importlib.import_module("numba.cuda.np.arrayobj")  # else the first compilation would
    return cuda


@contextmanager
def _row_stack() -> Iterator[None]:
    """Let numba-cuda 0.30 load its array functions where NumPy, from 2.5 on, has no `row_stack`."""
    if hasattr(np, "row_stack"):
        yield
        return
    np.row_stack = np.vstack  # noqa: NPY201
    try:
        yield
    finally:
        del np.row_stack  # noqa: NPY201


def current() -> Device:
    """Return the device of the calling thread's context.

    Raises ImportError without numba-cuda, RuntimeError without a driver, with one that is too old,
    and without a GPU.
    """
    cuda = numba_cuda()
    _check_driver()
    return _described(int(cuda.get_current_device().id))


@functools.lru_cache
def _described(number: int) -> Device:
    cuda = numba_cuda()
    with cuda.gpus[number]:
        found = cuda.get_current_device()
        return Device(
            name=_text(found.name),
            compute_capability=tuple(found.compute_capability),
            multiprocessors=found.MULTIPROCESSOR_COUNT,
            memory=cuda.current_context().get_memory_info().total,
            shared_memory=found.MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
            threads=found.MAX_THREADS_PER_MULTIPROCESSOR,
            registers=found.MAX_REGISTERS_PER_MULTIPROCESSOR,
            static_shared_memory=found.MAX_SHARED_MEMORY_PER_BLOCK,
            number=number,
        )


def problem() -> str | None:
    """What keeps this process from using a GPU, in one line; None if nothing does."""
    try:
        current()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver knows; RuntimeError without a driver."""
    cuda = numba_cuda()
    try:
        return tuple(cuda.cudadrv.driver.driver.get_version())
    except ImportError as error:  # so numba-cuda calls it
        reason = _line(error).removeprefix("Error at driver init: ").split(". ")[0]
        raise RuntimeError(f"no NVIDIA driver can be used ({reason}): see nvidia-smi") from error


def toolkit_version() -> tuple[int, int]:
    """The CUDA that kernels are compiled with; ImportError without its libraries."""
    cuda = numba_cuda()
    try:
        return tuple(cuda.runtime.get_version())
    except (RuntimeError, OSError, ImportError) as error:
        raise ImportError(f"CUDA's NVRTC does not load ({_line(error)}): {INSTALL}") from error


@functools.lru_cache  # of what is right only: an error is raised anew
def _check_driver() -> None:
    driver, toolkit = driver_version(), toolkit_version()
    if driver[0] < toolkit[0]:
        raise RuntimeError(
            f"the driver knows CUDA {_dotted(driver)}, but kernels are compiled with CUDA"
            f" {_dotted(toolkit)}: update the driver, or pip install 'favor_np[cuda{driver[0]}]'"
        )
    if not len(numba_cuda().gpus):
        raise RuntimeError("the driver finds no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES")


def on_device(array: Any) -> bool:
    """Return whether an array lies in the memory of a CUDA device."""
    if _of_numba(array):  # which would make its interface first
        return True
    if hasattr(array, "__dlpack_device__"):
        try:
            return int(array.__dlpack_device__()[0]) in _DLPACK
        except (BufferError, ValueError):  # of a kind that DLPack does not know
            return False
    return hasattr(array, "__cuda_array_interface__")


def _of_numba(array: Any) -> bool:
    return type(array).__module__ == "numba.cuda.cudadrv.devicearray"


def ordinal(array: Any) -> int:
    """The number of the device in whose memory an array lies."""
    if _of_numba(array) and array.size:
        return int(array.gpu_data.context.device.id)
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[1])
    driver = numba_cuda().cudadrv.driver
    pointer = array.__cuda_array_interface__["data"][0]
    attribute = driver.binding.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(driver.driver.cuPointerGetAttribute(attribute, pointer))


def check_placement(arrays: Mapping[str, Any]) -> None:
    """Raise unless all arrays lie on the current device; None stands for no array.

    TypeError if some lie in host memory, ValueError if they lie on another device.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    there = [name for name, array in given.items() if on_device(array)]
    here = [name for name in given if name not in there]
    if here and there:
        raise TypeError(
            f"{here[0]} lies in host memory and {there[0]} on a CUDA device: move one of them,"
            " or pass host arrays only with device='cuda'"
        )
    if not there:
        return
    own = int(numba_cuda().get_current_device().id)
    for name in there:
        if (found := ordinal(given[name])) != own:
            raise ValueError(
                f"{name} lies on CUDA device {found}, but the current device is {own}: call it"
                f" within `with numba.cuda.gpus[{found}]:`"
            )


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the driver's errors into a line each: MemoryError, or RuntimeError for an old driver."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("CudaAPIError", "CUDAError"):  # numba-cuda's, cuda.core's
            raise
        if "CUDA_ERROR_OUT_OF_MEMORY" in str(error):
            raise MemoryError(_memory()) from error
        if "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in str(error):
            raise RuntimeError(
                f"the driver, of CUDA {_dotted(driver_version())}, cannot load what CUDA"
                f" {_dotted(toolkit_version())} compiles: update it, or install an older toolkit"
            ) from error
        raise


def _memory() -> str:
    context = numba_cuda().current_context()
    free, total = context.get_memory_info()
    return (
        f"out of memory on {_text(context.device.name)}, of whose {total / 2**30:.1f} GiB"
        f" {free / 2**30:.1f} are free"
    )


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()).rstrip(" :")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
