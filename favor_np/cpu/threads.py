"""Threads: how many, and the pool that shares out the jobs of one kernel call.

Numba's own parallel layers abort, hang or leak under fork, nesting or concurrent callers.  Here the
calling thread always works and helpers are optional: whatever has happened to them (fork,
interpreter shutdown, a thread limit), a call finishes.  Jobs are claimed inside compiled code with
an atomic counter, so each thread takes the interpreter lock once a call.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from favor_np.cpu.record import pack
from favor_np.cpu.records import CONTROL, COUNT, FINISHED

if TYPE_CHECKING:
    from favor_np.cpu.code import Kernel

_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar(
    "favor_np_threads", default=None
)


@contextlib.contextmanager
def thread_limit(count: int) -> Iterator[None]:
    """Use `count` threads for the calls inside a ``with`` block.

    It holds for the current context only (thread or asyncio task).  An argument ``num_threads``
    overrides it; it overrides the environment variables FAVOR_NP_NUM_THREADS,
    NUMBA_NUM_THREADS and OMP_NUM_THREADS, in this order.

    Parameters
    ----------
    count : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        If `count` is not an integer, or is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> with favor_np.thread_limit(1):
    ...     favor_np.exact_attention(np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 1))).ravel()
    array([1., 1.])
    """
    from favor_np.validation import integer

    token = _limit.set(integer("count", count))
    try:
        yield
    finally:
        _limit.reset(token)


def cgroup_cpus(
    groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")
) -> float:
    """Return the processor quota of the tightest control group around us, or infinity."""
    best = math.inf
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return best
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounts / "cpu" if controllers else mounts
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            try:
                if controllers:
                    quota = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (folder / "cpu.max").read_text().split()[:2]
                if quota.strip() != "max" and int(quota) > 0:
                    best = min(best, int(quota) / int(period))
            except (OSError, ValueError):
                pass
            if folder == root:
                break
    return best


def default_threads(environ: Mapping[str, str] | None = None) -> int:
    """Return the thread count of the environment, else that of the processors we may use.

    A variable that holds something else is ignored, our own with a RuntimeWarning.
    """
    environ = os.environ if environ is None else environ
    for name in ("FAVOR_NP_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        text = environ.get(name, "").split(",")[0].strip()
        if text.isdecimal() and int(text) > 0:
            return int(text)
        if text and name == "FAVOR_NP_NUM_THREADS":
            warnings.warn(
                f"{name} must be an integer of at least 1, got {environ[name]!r}: it is ignored",
                RuntimeWarning,
                stacklevel=2,
            )
    if hasattr(os, "process_cpu_count"):  # Python 3.13: knows affinity and PYTHON_CPU_COUNT
        allowed = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = cgroup_cpus()
    return max(1, allowed if quota == math.inf else min(allowed, math.ceil(quota)))


_default: int | None = None


def resolve_threads(argument: int | None) -> int:
    """Return the thread count in force: argument, then `thread_limit`, then the environment."""
    global _default
    if argument is not None:
        return argument
    limit = _limit.get()
    if limit is not None:
        return limit
    if _default is None:
        _default = default_threads()
    return _default


def _failure() -> RuntimeError:
    """Return the error for a kernel that has raised one: none does but with NUMBA_BOUNDSCHECK=1."""
    return RuntimeError("a kernel has read or written outside an array")


class TilePool:
    """Runs a kernel on the calling thread and on helpers that wake up in time."""

    def __init__(self) -> None:
        self._getcpu: Callable[[], int] | None = None
        self._steered = sys.platform.startswith("linux")
        self._reset()

    def _reset(self) -> None:
        self._queue: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.RLock()  # a signal handler may call while its thread holds it
        #: The calls that share their jobs now.  No lock, and one step each to come and go: no
        #: interrupt leaves a call behind that has ended.
        self._callers: dict[int, bool] = {}
        self._cpu = -1

    @property
    def _active(self) -> int:
        return len(self._callers)

    def stop(self) -> None:
        """Send the helpers home and hold the lock: done before a fork."""
        self._lock.acquire()
        for _ in self._threads:
            self._queue.put(None)
        patience = time.monotonic() + 0.2  # for those without a job
        for thread in self._threads:
            thread.join(max(0.0, patience - time.monotonic()))
        self._threads, self._cpu = [], -1

    def release(self) -> None:
        """Go on in the parent after a fork."""
        self._lock.release()

    def restart(self) -> None:
        """Begin anew in the child of a fork, where no helper lives."""
        self._reset()

    def _grow(self, count: int) -> None:
        with self._lock:
            while len(self._threads) < count:
                thread = threading.Thread(
                    target=self._help, args=(self._queue,), daemon=True, name="favor_np-helper"
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is going down
                    return
                self._threads.append(thread)
                self._cpu = -1

    @staticmethod
    def _help(jobs: queue.SimpleQueue[list[Any] | None]) -> None:
        while True:
            job = jobs.get()
            if job is None:
                return
            try:
                run, block, _record, count, done, errors = job
            except ValueError:  # emptied: that call is over
                continue
            try:
                finished = run(block)
                if finished == count:
                    done.release()
                elif finished < 0:
                    errors.append(_failure())
            except BaseException as error:  # the caller must not wait for ever
                errors.append(error)
            # Do not keep the caller's arrays alive until the next job.
            job = run = block = _record = done = errors = None

    def _steer(self) -> None:
        """Keep the helpers off the caller's processor: the scheduler likes to put them there."""
        try:
            if self._getcpu is None:
                import ctypes

                self._getcpu = ctypes.PyDLL(None).sched_getcpu
            cpu = self._getcpu()
            if cpu == self._cpu:
                return
            self._cpu = cpu
            allowed = os.sched_getaffinity(0) - {cpu}
            for thread in self._threads:
                if allowed and thread.native_id is not None:
                    os.sched_setaffinity(thread.native_id, allowed)
        except (OSError, AttributeError):
            self._steered = False
        except BaseException:  # an interrupt: the next call steers them all
            self._cpu = -1
            raise

    def call(
        self,
        kernel: Kernel,
        arrays: tuple[Any, ...],
        rest: tuple[Any, ...],
        count: int,
        threads: int,
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Run `count` jobs of a kernel, on up to `threads` threads, and return its control words.

        Its record is (*arrays, control words, *rest).  An interrupt is raised when all jobs are
        finished: they work on the caller's arrays.
        """
        run = kernel.load()  # compile alone: who interrupts that shall not wait for it
        control = np.zeros(CONTROL, np.int64)
        control[COUNT] = count
        record = (*arrays, control, *rest)
        block = pack(record)
        if threads <= 1 or count <= 1:
            if run(block) < 0:
                raise _failure()
            return control
        callers, me = self._callers, id(control)
        try:
            callers[me] = True
            helpers = min(threads - len(callers), count - 1)  # other callers fill the machine too
            self._share(run, block, record, control, helpers)
        finally:
            callers.pop(me, None)
        return control

    def _share(
        self,
        run: Callable[[bytes], int],
        block: bytes,
        record: tuple[Any, ...],
        control: Any,
        helpers: int,
    ) -> None:
        if helpers > len(self._threads):
            self._grow(helpers)
        helpers = min(helpers, len(self._threads))
        if helpers > 0 and self._steered:
            self._steer()
        count, done, errors = int(control[COUNT]), threading.Lock(), list[BaseException]()
        done.acquire()
        job: list[Any] = [run, block, record, count, done, errors]
        finished = 0
        try:
            try:
                for _ in range(helpers):
                    self._queue.put(job)
            finally:
                finished = run(block)
                if finished < 0:
                    errors.append(_failure())
        finally:
            if finished != count and helpers > 0:  # one of them still works on what it has claimed
                self._wait(control, count, done, errors)
            job.clear()  # whoever comes late finds nothing to do, and keeps no array alive
        if errors:
            raise errors[0]

    @staticmethod
    def _wait(control: Any, count: int, done: threading.Lock, errors: list[BaseException]) -> None:
        interrupt: BaseException | None = None
        while True:
            try:
                # The timeout is for errors, and for interrupts that lost what the kernel returned.
                if done.acquire(timeout=0.05) or control[FINISHED] >= count or errors:
                    break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


POOL = TilePool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=POOL.stop, after_in_parent=POOL.release, after_in_child=POOL.restart)


@functools.cache
def give_way() -> int:
    """Return the address of the system's function by which a thread lets others run."""
    import ctypes

    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0
