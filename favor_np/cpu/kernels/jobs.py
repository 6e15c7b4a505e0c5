"""How the threads of a call share its jobs: by counters in the control words ``ctl``.

`threads.TilePool` calls a kernel on several threads with the same words; each claims jobs until
none is left and returns how many are finished by then, so that the last one knows that it was the
last.
"""

from __future__ import annotations

from favor_np.cpu.kernels.floats import IEEE, float_mode, set_float_mode
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.simd import fetch_add

#: Words with: the next job, the threads that came, the jobs finished, the jobs in trouble, and what
#: was found not to be finite.
NEXT, CAME, FINISHED, TROUBLE, OVERFLOW = 0, 4, 8, 12, 14


@jit()
def enter(ctl):
    """The number of this thread, and of its workspace; its floating-point mode until now."""
    mode = float_mode()
    set_float_mode(IEEE)
    return fetch_add(ctl, CAME, 1), mode


@jit()
def claim(ctl):
    """The number of a job that nobody else will do."""
    return fetch_add(ctl, NEXT, 1)


@jit()
def report(ctl, what):
    """Count a job that could not be done, or rows that are not finite."""
    fetch_add(ctl, what, 1)


@jit()
def leave(ctl, finished, mode):
    """Put the floating-point mode back, count this thread's jobs; how many are finished."""
    set_float_mode(mode)
    if finished == 0:  # came too late: whoever finished the last job has said so
        return 0
    return fetch_add(ctl, FINISHED, finished) + finished
