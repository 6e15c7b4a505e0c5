"""Thresholds and choices of the package, changed while a test runs: the only place that changes them.

`tuned` is a context manager and a decorator:

    with tuned(LONG=65, SERIAL=0): ...
"""

import contextlib
import importlib
from unittest import mock

import numpy as np

from support.workspaces import forget_layouts

#: Where each of them lives.
HOME = {
    "BLOCK": "favor_np.weights",
    "CHECKPOINT_SECONDS": "favor_np.streaming",
    "LONG": "favor_np.cpu.plan",
    "MOST": "favor_np.forecast.reading.files",
    "ROOM": "favor_np.cuda.plan",
    "SERIAL": "favor_np.cpu.launch",
    "SHORTEST": "favor_np.cuda.plan",
    "SLICE": "favor_np.forecast._forecast",
    "WAVE": "favor_np.window",
    "aligned": "favor_np.cpu.plan",
    "refusal": "favor_np.cpu.kernels.bfloat16",
    "relay": "favor_np.cpu.plan",
    "worth_planes": "favor_np.cpu.plan",
}


@contextlib.contextmanager
def tuned(**values):
    """Let these names have these values; an unknown one is an error."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            home = importlib.import_module(HOME[name])
            stack.enter_context(mock.patch.object(home, name, value))
        yield


@contextlib.contextmanager
def recorded(name):
    """Let the results of a function be noted in the list that this gives."""
    home, found = importlib.import_module(HOME[name]), []
    function = getattr(home, name)

    def noting(*args, **options):
        found.append(function(*args, **options))
        return found[-1]

    with tuned(**{name: noting}):
        yield found


@contextlib.contextmanager
def forced_planes(wanted):
    """Let everything of float32 be computed with planes, or nothing."""
    forget_layouts()
    try:
        with tuned(worth_planes=lambda dtype, *_: wanted and dtype == np.float32):
            yield
    finally:
        forget_layouts()
