"""Thresholds and choices of the package, changed while a test runs: the only place that changes them.

`tuned` is a context manager and a decorator:

    with tuned(MIN_SHARED_LENGTH=65, MIN_PARALLEL_WORK=0): ...
"""

import contextlib
import importlib
from unittest import mock

from favor_np.cpu import tuning

#: Where those live that are no thresholds of favor_np.cpu.tuning.
HOME = {
    "BLOCK": "favor_np.weights",
    "CHECKPOINT_SECONDS": "favor_np.streaming",
    "FEATURES": "favor_np.cuda.kernels.step",
    "MOST": "favor_np.forecast.reading.files",
    "ROOM": "favor_np.cuda.plan",
    "SHORTEST": "favor_np.cuda.plan",
    "SLICE": "favor_np.forecast._forecast",
    "WAVE": "favor_np.jobs",
    "aligned": "favor_np.cpu.memory",
    "amx_unavailable": "favor_np.cpu.layout",
    "pipeline": "favor_np.cpu.schedule",
}


@contextlib.contextmanager
def tuned(**values):
    """Let these names have these values; an unknown one is an error."""
    with contextlib.ExitStack() as stack:
        own = {name: value for name, value in values.items() if name not in HOME}
        stack.enter_context(tuning.tuned(**own))
        for name in values.keys() - own:
            home = importlib.import_module(HOME[name])
            stack.enter_context(mock.patch.object(home, name, values[name]))
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
