"""The pool of threads: who works, who waits, how many there are, and the same bits for any number."""

import ctypes
import gc
import os
import signal
import struct
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from support.child import BEGIN, HANG, python

import favor_np
from favor_np import exact_attention, favor_attention, thread_limit
from favor_np.cpu import launch, threads
from favor_np.cpu.records import COUNT, FINISHED, NEXT

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def problem(dtype=np.float32, heads=4, length=1100, seed=0):
    x = np.random.default_rng(seed).standard_normal((3, heads, length, 32))
    return (*x.astype(dtype), favor_np.feature_map("positive", dim=32, num_features=64))


# ----------------------------------------------------------------------------------------
# The pool by itself: kernels in Python
# ----------------------------------------------------------------------------------------


def arrays_of(block):
    """The arrays of a record, as kernels find them: by the addresses in its block."""
    addresses = struct.unpack(f"={len(block) // 8}q", block)[1:]
    return [ctypes.cast(address, ctypes.py_object).value for address in addresses]


class Kernel:
    """A kernel by its contract: take jobs until none is left, say how many are finished by now."""

    def __init__(self, job=lambda number, helping: None):
        self.job, self.lock, self.runs = job, threading.Lock(), []

    def load(self):
        return self

    def __call__(self, block):
        _, control = arrays_of(block)
        finished = 0
        while True:
            with self.lock:
                number = int(control[NEXT])
                control[NEXT] += 1
            if number >= control[COUNT]:
                break
            self.job(number, threading.current_thread().name == "favor_np-helper")
            finished += 1
        self.runs.append((threading.current_thread().name, finished))
        if not finished:
            return 0
        with self.lock:
            control[FINISHED] += finished
            return int(control[FINISHED])


def run(pool, kernel, count, number, array=None):
    """Call a kernel on one array; its control words."""
    array = np.ones(1) if array is None else array
    return pool.call(kernel, (array,), (), count, number)


def test_caller_waits_for_what_a_helper_has_claimed():
    done, helping = [], threading.Event()

    def job(number, helper):
        if helper:
            helping.set()
            threading.Event().wait(0.2)
        else:
            assert helping.wait(HANG)
        done.append(number)

    pool = threads.TilePool()
    for _ in range(3):
        done.clear()
        helping.clear()
        control = run(pool, Kernel(job), 5, 2)
        assert sorted(done) == [0, 1, 2, 3, 4]
        assert control[FINISHED] == 5
    pool.stop()


@posix
def test_interrupts_wait_for_what_a_helper_has_claimed():
    """Every one of them: people press Ctrl-C twice."""
    helping, handled, enough, done = *(threading.Event() for _ in range(3)), []

    def job(number, helper):
        if helper:
            helping.set()
            assert enough.wait(HANG)
        else:
            assert helping.wait(HANG)
        done.append(number)

    main = threading.get_ident()

    def interrupt():
        assert helping.wait(HANG)
        for _ in range(3):
            threading.Event().wait(0.05)  # the caller has begun to wait again
            signal.pthread_kill(main, signal.SIGUSR1)
            assert handled.wait(HANG)
            handled.clear()
        enough.set()

    def handler(number, frame):
        done.append("interrupted")
        handled.set()
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, handler)
    pool, other = threads.TilePool(), threading.Thread(target=interrupt)
    other.start()
    try:
        with pytest.raises(InterruptedError):
            run(pool, Kernel(job), 2, 2)
        assert done.count("interrupted") == 3
        assert {0, 1} <= set(done)
    finally:
        other.join()
        signal.signal(signal.SIGUSR1, before)
        pool.stop()


def test_interrupt_right_after_the_kernel_waits_too():
    helping, done = threading.Event(), []

    def job(number, helper):
        if helper:
            helping.set()
            threading.Event().wait(0.2)
        else:
            assert helping.wait(HANG)
        done.append(number)

    class Interrupted(Kernel):
        def __call__(self, block):
            result = super().__call__(block)
            if threading.current_thread().name != "favor_np-helper":
                raise KeyboardInterrupt
            return result

    pool = threads.TilePool()
    with pytest.raises(KeyboardInterrupt):
        run(pool, Interrupted(job), 3, 2)
    assert sorted(done) == [0, 1, 2]
    pool.stop()


def test_call_ends_without_helpers():
    """Be they busy, or unable to start as when the interpreter goes down."""
    pool, free, busy = threads.TilePool(), threading.Event(), threading.Event()

    def hold(number, helper):
        busy.set()
        assert free.wait(HANG)

    other = threading.Thread(target=run, args=(pool, Kernel(hold), 2, 2))
    other.start()
    assert busy.wait(HANG)
    kernel, array = Kernel(), np.ones(3)
    gone = weakref.ref(array)
    assert run(pool, kernel, 4, 3, array)[FINISHED] == 4
    assert kernel.runs[-1] == (threading.current_thread().name, 4)
    del array
    gc.collect()
    assert gone() is None, "a job in the queue keeps the arrays of a finished call"
    free.set()
    other.join(HANG)
    pool.stop()


def test_no_thread_can_be_started(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert run(threads.TilePool(), Kernel(), 4, 3)[FINISHED] == 4


def test_error_in_a_kernel_reaches_the_caller():
    def job(number, helper):
        if helper:
            raise MemoryError("no tiles")
        threading.Event().wait(0.1)

    pool = threads.TilePool()
    with pytest.raises(MemoryError, match="no tiles"):
        run(pool, Kernel(job), 3, 2)
    assert run(pool, Kernel(), 3, 2)[FINISHED] == 3
    pool.stop()


def test_concurrent_callers_share_the_threads():
    """With as many callers as threads nobody gets a helper."""
    pool, barrier = threads.TilePool(), threading.Barrier(3)
    kernels = [Kernel(lambda number, helper: number == 0 and barrier.wait(HANG)) for _ in range(3)]
    team = [threading.Thread(target=run, args=(pool, kernel, 2, 2)) for kernel in kernels]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(HANG)
    assert sum(len(kernel.runs) for kernel in kernels) <= 3 * 2 + 1
    assert len(pool._threads) <= 1
    pool.stop()


# ----------------------------------------------------------------------------------------
# How many threads
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"FAVOR_NP_NUM_THREADS": "3", "NUMBA_NUM_THREADS": "5", "OMP_NUM_THREADS": "7"}, 3),
        ({"NUMBA_NUM_THREADS": "5", "OMP_NUM_THREADS": "7"}, 5),
        ({"OMP_NUM_THREADS": "7"}, 7),
        ({"OMP_NUM_THREADS": "6,2"}, 6),
        ({"FAVOR_NP_NUM_THREADS": " 4 "}, 4),
        ({"FAVOR_NP_NUM_THREADS": "", "OMP_NUM_THREADS": "7"}, 7),
        ({"NUMBA_NUM_THREADS": "two", "OMP_NUM_THREADS": "7"}, 7),
    ],
)
def test_environment_sets_the_count(environ, count):
    assert threads.default_threads(environ) == count


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1.5", "²"])
def test_a_count_that_is_none_is_ignored_with_a_warning(bad):
    environ = {"FAVOR_NP_NUM_THREADS": bad, "OMP_NUM_THREADS": "7"}
    with pytest.warns(RuntimeWarning, match=f"FAVOR_NP_NUM_THREADS .* got '{bad}'"):
        assert threads.default_threads(environ) == 7


def test_argument_then_limit_then_environment():
    python(
        """
import favor_np
from favor_np.cpu.threads import resolve_threads
assert resolve_threads(None) == 5
with favor_np.thread_limit(4):
    assert resolve_threads(None) == 4
    with favor_np.thread_limit(6):
        assert resolve_threads(None) == 6
        assert resolve_threads(2) == 2
    assert resolve_threads(None) == 4
assert resolve_threads(None) == 5
""",
        unset=["FAVOR_NP_NUM_THREADS"],
        NUMBA_NUM_THREADS="5",
        OMP_NUM_THREADS="7",
    )


def test_the_count_is_the_number_of_threads_at_work():
    assert (
        python(
            BEGIN
            + """
assert helpers() == 0
counts = []
for number in (None, 2, 4):
    call(number)
    counts.append(helpers())
with favor_np.thread_limit(3):
    call(None)
print(counts, helpers())
""",
            FAVOR_NP_NUM_THREADS="1",
        )
        == "[0, 1, 3] 3\n"
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_affinity_limits_the_count():
    assert (
        python(
            """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from favor_np.cpu.threads import default_threads
print(default_threads({}))
"""
        )
        == "1\n"
    )


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, np.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "300000 100000\n"}, 0.5),
        ("0::/not/mounted\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/../up\n", {"cpu.max": "200000 100000"}, 2),
        (
            "4:cpu,cpuacct:/a\n3:memory:/b\n",
            {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            np.inf,
        ),
        ("0::/\n", {"cpu.max": "rubbish"}, np.inf),
        ("0::/\n", {}, np.inf),
    ],
)
def test_quota_of_the_control_group(groups, files, count, tmp_path):
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mounts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert threads.cgroup_cpus(tmp_path / "cgroup", tmp_path / "mounts") == count


@pytest.mark.parametrize("quota", [0.5, 1.5, np.inf])
def test_quota_limits_the_count(quota, monkeypatch):
    monkeypatch.setattr(threads, "cgroup_cpus", lambda: quota)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads.default_threads({}) == min(allowed, np.ceil(quota))


@pytest.mark.parametrize(
    ("count", "error"),
    [(0, ValueError), (-2, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError)],
)
def test_bad_counts_are_refused(count, error):
    q, k, v, fm = problem(length=3)
    with pytest.raises(error, match="count"), thread_limit(count):
        pass
    with pytest.raises(error, match="num_threads"):
        favor_attention(q, k, v, fm, num_threads=count)
    with pytest.raises(error, match="num_threads"):
        exact_attention(q, k, v, num_threads=count)


def test_limit_is_left_after_an_error():
    before = threads.resolve_threads(None)
    with pytest.raises(ZeroDivisionError), thread_limit(before + 1):
        _ = 1 / 0
    assert threads.resolve_threads(None) == before


# ----------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("heads", [1, 3])
def test_same_bits_for_any_number_of_threads(heads, dtype):
    q, k, v, fm = problem(dtype, heads, 4500)
    for call in (
        lambda n: favor_attention(q, k, v, fm, num_threads=n),
        lambda n: favor_attention(q, k, v, fm, causal=True, num_threads=n),
        lambda n: exact_attention(q, k, v, causal=True, num_threads=n),
        lambda n: favor_attention(q, k, v, fm, return_state=True, num_threads=n)[1].S,
    ):
        one = call(1)
        for number in (2, 3, 8):
            np.testing.assert_array_equal(call(number), one)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_two_threads_take_part(heads, causal, monkeypatch):
    """On a long call the helper finishes some of the jobs."""
    if len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)) < 2:
        pytest.skip("needs two processors")
    q, k, v, fm = problem(length=40_000 // heads)
    finished, plain = {}, threads.TilePool.call

    def spied(self, kernel, *rest):
        def spy(block):
            name, result = threading.current_thread().name, kernel(block)
            finished[name] = finished.get(name, 0) + (result > 0)
            return result

        return plain(self, SimpleNamespace(load=lambda: spy), *rest)

    monkeypatch.setattr(threads.TilePool, "call", spied)
    for _ in range(20):  # on a busy machine it may come late
        favor_attention(q, k, v, fm, causal=causal, num_threads=2)
        if finished.get("favor_np-helper"):
            break
    assert finished.get("favor_np-helper"), finished
    assert finished[threading.current_thread().name]


def test_helpers_are_kept_off_the_callers_processor():
    if not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    q, k, v, fm = problem(length=20_000)
    favor_attention(q, k, v, fm, num_threads=2)
    pool = launch.POOL
    assert pool._steered
    assert pool._cpu in os.sched_getaffinity(0)
    assert pool._threads
    for thread in pool._threads:
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) - {pool._cpu}
