"""How the threads of a call share its jobs: by counters in the words of ``call.control``.

`threads.TilePool` calls a kernel on several threads with the same block; each claims jobs until
none is left and returns how many are finished by then, so that the last one knows that it was the
last.
"""

from __future__ import annotations

from favor_np.cpu.kernels.floats import IEEE, float_mode, set_float_mode
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.simd import fetch_add
from favor_np.cpu.records import CAME, COUNT, FINISHED, NEXT


@jit()
def enter(control):
    """The number of this thread, and of its room; its floating-point mode until now."""
    mode = float_mode()
    set_float_mode(IEEE)
    return fetch_add(control, CAME, 1), mode


@jit()
def claim(control):
    """The number of a job that nobody else will do; -1 if there is none."""
    job = fetch_add(control, NEXT, 1)
    return job if job < control[COUNT] else -1


@jit()
def report(control, what):
    """Count a job that could not be done, or rows that are not finite."""
    fetch_add(control, what, 1)


@jit()
def leave(control, finished, mode):
    """Put the floating-point mode back, count this thread's jobs; how many are finished."""
    set_float_mode(mode)
    if finished == 0:  # came too late: whoever finished the last job has said so
        return 0
    return fetch_add(control, FINISHED, finished) + finished


def each_job(do):
    """Make the kernel that does ``do(call, job)``, which needs no room, for each job it gets."""
    body = jit()(do)

    @jit()
    def kernel(call):
        _, mode = enter(call.control)
        finished = 0
        while True:
            job = claim(call.control)
            if job < 0:
                break
            body(call, job)
            finished += 1
        return leave(call.control, finished, mode)

    return kernel
