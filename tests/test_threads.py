"""Threads, forks, pools and signals: the right result and no hang, whatever surrounds a call."""

import gc
import os
import signal
import sys
import threading
import weakref

import numpy as np
import pytest
from child import python

import favor_np
from favor_np import exact_attention, favor_attention, launch, thread_limit, threads

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

#: Two Python threads share this call, and a helper is there after it.
BEGIN = """
import os, signal, sys, threading, time
import numpy as np
import favor_np

rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 4, 2048, 32)).astype(np.float32)
fm = favor_np.feature_map("positive", dim=32, num_features=64)

def call(threads=2):
    return favor_np.favor_attention(q, k, v, fm, causal=True, num_threads=threads)

def helpers():
    return sum(t.name == "favor_np-helper" for t in threading.enumerate())

right = call(1)

def check(threads=2):
    assert (call(threads) == right).all()
"""

#: What a forked child does: it ends with status 0, or 14 if it hangs.
CHILD = """
def child(use=check):
    signal.alarm(30)
    try:
        use()
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)
    os._exit(0)

def fork(use=check):
    pid = os.fork()
    if pid == 0:
        child(use)
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile here, into the cache: the processes below then start in half a second."""
    x = np.ones((2, 3), np.float32)
    favor_attention(x, x, x, favor_np.feature_map("positive", dim=3, num_features=4))
    exact_attention(x, x, x)


def problem(dtype=np.float32, heads=4, length=1100, seed=0):
    x = np.random.default_rng(seed).standard_normal((3, heads, length, 32))
    return (*x.astype(dtype), favor_np.feature_map("positive", dim=32, num_features=64))


# ----------------------------------------------------------------------------------------
# Embedding
# ----------------------------------------------------------------------------------------


def test_many_python_threads_call_at_once():
    python(
        BEGIN
        + """
exact = favor_np.exact_attention(q, k, v, num_threads=1)
barrier, failures = threading.Barrier(16), []

def work(number):
    barrier.wait()
    try:
        for turn in range(6):
            check(1 + number % 4)
            assert (favor_np.exact_attention(q, k, v, num_threads=2) == exact).all()
    except BaseException as error:
        failures.append(error)

team = [threading.Thread(target=work, args=(n,)) for n in range(16)]
for thread in team: thread.start()
for thread in team: thread.join()
assert not failures, failures
"""
    )


def test_first_calls_of_many_threads_at_once():
    python(
        """
import threading, numpy as np, favor_np
x = np.ones((2, 3, 4), np.float32)
barrier, results = threading.Barrier(8), []

def work():
    barrier.wait()
    results.append(favor_np.exact_attention(x, x, x))

team = [threading.Thread(target=work) for _ in range(8)]
for thread in team: thread.start()
for thread in team: thread.join()
assert len(results) == 8 and all((r == 1).all() for r in results)
"""
    )


@forks
def test_fork_after_use():
    out = python(
        BEGIN
        + CHILD
        + """
check()
assert helpers() == 1
def grandchild():
    check()
    assert helpers() == 1
    other = threading.Thread(target=check)
    other.start()
    other.join()
    fork()
    check()
for _ in range(3):
    fork(grandchild)
    check()
print("fine")
""",
        "-W",
        "error",
    )
    assert out == "fine\n"


@forks
def test_fork_while_other_threads_call():
    python(
        BEGIN
        + CHILD
        + """
stop, failures = threading.Event(), []

def work():
    try:
        while not stop.is_set():
            check()
    except BaseException as error:
        failures.append(error)

team = [threading.Thread(target=work) for _ in range(3)]
for thread in team: thread.start()
for _ in range(12):
    fork()
    time.sleep(0.005)
stop.set()
for thread in team: thread.join()
assert not failures, failures
""",
        # Python warns of any fork beside threads; these are the test's own.
        "-W",
        "ignore:This process:DeprecationWarning",
    )


@forks
def test_fork_while_another_thread_compiles():
    wait = """
while 'favor_np.threads' not in sys.modules: time.sleep(0.001)
import numba.core.event as event
class Begun(event.Listener):
    def on_start(self, event): begun.set()
    def on_end(self, event): pass
begun = threading.Event()
event.register("numba:compile", Begun())
assert begun.wait(60)"""
    python(
        """
import os, signal, sys, threading, time
import numpy as np
import favor_np
from favor_np import exact, validation
x = np.ones((2, 3, 4), np.float32)
def check():
    assert (favor_np.exact_attention(x, x, x) == 1).all()
"""
        + CHILD
        + "other = threading.Thread(target=check)\nother.start()\n"
        + wait
        + "\nfork()\nother.join()\ncheck()\n",
        "-W",
        "ignore:This process:DeprecationWarning",
        FAVOR_NP_CACHE="0",
    )


POOLED = """
import sys
import numpy as np
import favor_np

def work(seed):
    q, k, v = np.random.default_rng(seed).standard_normal((3, 4, 2048, 32)).astype(np.float32)
    fm = favor_np.feature_map("positive", dim=32, num_features=64)
    return favor_np.favor_attention(q, k, v, fm, num_threads=2)

def used():
    assert work(0).shape == (4, 2048, 32)  # the parent has helpers when it makes its pool
    return [work(seed) for seed in range(4)]
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_pools(method, tmp_path):
    if method != "spawn" and os.name != "posix":
        pytest.skip("needs fork")
    (tmp_path / "pooled.py").write_text(POOLED)
    python(
        f"""
import multiprocessing, sys
sys.path.insert(0, {str(tmp_path)!r})
from pooled import used, work
if __name__ == "__main__":
    right = used()
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        got = pool.map_async(work, range(4)).get(90)
    assert all((a == b).all() for a, b in zip(got, right, strict=True))
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )


@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib(backend, tmp_path):
    pytest.importorskip("joblib")
    (tmp_path / "pooled.py").write_text(POOLED)
    python(
        f"""
import joblib
from pooled import used, work
right = used()
got = joblib.Parallel(n_jobs=2, backend={backend!r}, timeout=90)(
    joblib.delayed(work)(seed) for seed in range(4)
)
assert all((a == b).all() for a, b in zip(got, right, strict=True))
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        JOBLIB_TEMP_FOLDER=str(tmp_path),
    )


def test_nested_in_a_thread_pool():
    python(
        BEGIN
        + """
from concurrent.futures import ThreadPoolExecutor

def outer(number):
    with favor_np.thread_limit(1 + number % 3):
        assert (call(None) == right).all()
    with ThreadPoolExecutor(2) as inner:
        list(inner.map(check, [1, 2, 3]))

with ThreadPoolExecutor(4) as pool:
    list(pool.map(outer, range(8)))
check()
"""
    )


@pytest.mark.parametrize(
    "end",
    [
        "assert helpers() == 3",
        "threading.Thread(target=lambda: [call(4) for _ in range(10**6)], daemon=True).start(); "
        "time.sleep(0.05)",
        "import atexit; atexit.register(check, 4); atexit.register(check, 6)",
        "sys.stdout.x = type('Late', (), {'__del__': lambda self, check=check: check(4)})()",
    ],
    ids=["idle", "busy", "atexit", "del"],
)
def test_interpreter_ends_with_helpers_alive(end):
    python(BEGIN + "check(4)\n" + end, "-W", "error")


def test_nothing_warns():
    python(
        BEGIN + "check()\nfavor_np.exact_attention(q, k, v)\n", "-W", "error", "-bb", "-X", "dev"
    )


# ----------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------

#: A call of half a second, and a thread that waits until the main one is inside it.
LONG = """
out = np.empty((2, 16384, 32), np.float32)
Q, K, V = rng.standard_normal((3, 2, 16384, 32)).astype(np.float32)
wide = favor_np.feature_map("positive", dim=32, num_features=4096)

def long(threads):
    favor_np.favor_attention(Q, K, V, wide, causal=True, out=out, num_threads=threads)

def inside():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code.co_name != "long":
        frame = frame.f_back
    here = sys._current_frames()[threading.main_thread().ident].f_code
    return frame is not None and here.co_name in ("call", "_share", "_wait")

def interrupt(sent):
    while not inside():
        time.sleep(0.0005)
    time.sleep(0.02)
    assert inside(), "the call was too short"
    os.kill(os.getpid(), sent)
"""


@posix
@pytest.mark.parametrize("number", [1, 2])
def test_keyboard_interrupt_comes_when_the_call_is_finished(number):
    python(
        BEGIN
        + LONG
        + f"""
number = {number}
long(number)
expected = out.copy()
out[:] = np.nan
threading.Thread(target=interrupt, args=(signal.SIGINT,)).start()
try:
    long(number)
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("not interrupted")
assert (out == expected).all()
check()
assert helpers() == 1
out[:] = np.nan
long(2)
assert (out == expected).all()
"""
    )


@posix
def test_keyboard_interrupt_while_compiling():
    python(
        """
import os, signal, threading, time
import numpy as np
import favor_np
from favor_np import launch
import numba.core.event as event

class Begun(event.Listener):
    def on_start(self, event): os.kill(os.getpid(), signal.SIGINT)
    def on_end(self, event): pass
listener = Begun()
event.register("numba:compile", listener)
x = np.ones((4, 2048, 16), np.float32)
try:
    favor_np.exact_attention(x, x, x, num_threads=2)
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("not interrupted")
event.unregister("numba:compile", listener)
assert not launch.exact_kernels.attend_exact.overloads, "a helper went on compiling"
assert (favor_np.exact_attention(x, x, x, num_threads=2) == 1).all()
""",
        FAVOR_NP_CACHE="0",
    )


@posix
def test_signal_handler_that_calls():
    """It runs wherever the interrupted call happens to be, the pool's own bookkeeping included."""
    python(
        BEGIN
        + """
handled = 0

def handler(number, frame):
    global handled
    handled += 1
    if handled % 3:
        check(handled % 4 + 1)
    else:
        favor_np.threads.POOL._grow(helpers() + 1 if helpers() < 20 else 1)

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
end = time.monotonic() + 2
while time.monotonic() < end:
    check()
signal.setitimer(signal.ITIMER_REAL, 0)
assert handled > 50, handled
assert favor_np.threads.POOL._active == 0
"""
    )


@posix
def test_signal_handler_that_raises():
    """As many timeouts do: no helper may go on with arrays that the next call uses."""
    python(
        BEGIN
        + """
armed = False
def handler(number, frame):
    if armed:
        raise TimeoutError

signal.signal(signal.SIGALRM, handler)
raised = 0
for turn in range(200):
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-5 * (turn % 60))
            call(3)
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        raised += 1
    if turn % 8 == 0:
        check(3)
assert raised > 0
check()
"""
    )


# ----------------------------------------------------------------------------------------
# The pool by itself: kernels in Python
# ----------------------------------------------------------------------------------------


class Kernel:
    """A kernel by its contract: take jobs until none is left, say how many are finished by now."""

    def __init__(self, job=lambda number, helping: None):
        self.job, self.lock, self.runs = job, threading.Lock(), []

    def __call__(self, array, control, count):
        finished = 0
        while True:
            with self.lock:
                number = int(control[0])
                control[0] += 1
            if number >= count:
                break
            self.job(number, threading.current_thread().name == "favor_np-helper")
            finished += 1
        self.runs.append((threading.current_thread().name, finished))
        if not finished:
            return 0
        with self.lock:
            control[8] += finished
            return int(control[8])


def test_caller_waits_for_what_a_helper_has_claimed():
    done, helping = [], threading.Event()

    def job(number, helper):
        if helper:
            helping.set()
            threading.Event().wait(0.2)
        else:
            assert helping.wait(10)
        done.append(number)

    pool = threads.TilePool()
    for _ in range(3):
        done.clear()
        helping.clear()
        control = pool.call(Kernel(job), (np.ones(1),), 5, 2)
        assert sorted(done) == [0, 1, 2, 3, 4]
        assert control[8] == 5
    pool.stop()


@posix
def test_interrupts_wait_for_what_a_helper_has_claimed():
    """Every one of them: people press Ctrl-C twice."""
    helping, done = threading.Event(), []

    def job(number, helper):
        if helper:
            helping.set()
            threading.Event().wait(0.3)
        else:
            assert helping.wait(10)
        done.append(number)

    main = threading.get_ident()

    def interrupt():
        assert helping.wait(10)
        for _ in range(3):
            threading.Event().wait(0.05)
            signal.pthread_kill(main, signal.SIGUSR1)

    def handler(number, frame):
        done.append("interrupted")
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, handler)
    pool, other = threads.TilePool(), threading.Thread(target=interrupt)
    other.start()
    try:
        with pytest.raises(InterruptedError):
            pool.call(Kernel(job), (np.ones(1),), 2, 2)
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
            assert helping.wait(10)
        done.append(number)

    class Interrupted(Kernel):
        def __call__(self, array, control, count):
            result = super().__call__(array, control, count)
            if count and threading.current_thread().name != "favor_np-helper":
                raise KeyboardInterrupt
            return result

    pool = threads.TilePool()
    with pytest.raises(KeyboardInterrupt):
        pool.call(Interrupted(job), (np.ones(1),), 3, 2)
    assert sorted(done) == [0, 1, 2]
    pool.stop()


def test_call_ends_without_helpers():
    """Be they busy, or unable to start as when the interpreter goes down."""
    pool, free, busy = threads.TilePool(), threading.Event(), threading.Event()

    def hold(number, helper):
        busy.set()
        assert free.wait(10)

    other = threading.Thread(target=pool.call, args=(Kernel(hold), (np.ones(1),), 2, 2))
    other.start()
    assert busy.wait(10)
    kernel, array = Kernel(), np.ones(3)
    gone = weakref.ref(array)
    assert pool.call(kernel, (array,), 4, 3)[8] == 4
    assert kernel.runs[-1] == (threading.current_thread().name, 4)
    del array
    gc.collect()
    assert gone() is None, "a job in the queue keeps the arrays of a finished call"
    free.set()
    other.join(10)
    pool.stop()


@forks
def test_forks_are_watched_once(monkeypatch):
    """Twice would take a lock twice and release it once."""
    hooks = []

    def register(**hook):
        threading.Event().wait(0.1)
        hooks.append(hook)

    monkeypatch.setattr(os, "register_at_fork", register)
    pool, barrier = threads.TilePool(), threading.Barrier(8)

    def work():
        barrier.wait(10)
        pool.call(Kernel(), (np.ones(1),), 1, 1)

    team = [threading.Thread(target=work) for _ in range(8)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(10)
    assert len(hooks) == 1


@forks
def test_fork_hooks_come_after_those_of_logging():
    """The last hooks run first: a fork must not wait for a compilation that waits for logging."""
    python(
        """
import os, sys
register, loaded = os.register_at_fork, []

def spy(**hook):
    if "TilePool" in repr(hook):
        loaded.append({"logging", "numba"} <= sys.modules.keys())
    register(**hook)

os.register_at_fork = spy
import numpy as np, favor_np
x = np.ones((1, 2))
with favor_np.thread_limit(2):
    assert "favor_np.threads" in sys.modules and "logging" not in sys.modules
    favor_np.exact_attention(x, x, x)
assert loaded == [True], loaded
"""
    )


def test_no_thread_can_be_started(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert threads.TilePool().call(Kernel(), (np.ones(1),), 4, 3)[8] == 4


def test_error_in_a_kernel_reaches_the_caller():
    def job(number, helper):
        if helper:
            raise MemoryError("no tiles")
        threading.Event().wait(0.1)

    pool = threads.TilePool()
    with pytest.raises(MemoryError, match="no tiles"):
        pool.call(Kernel(job), (np.ones(1),), 3, 2)
    assert pool.call(Kernel(), (np.ones(1),), 3, 2)[8] == 3
    pool.stop()


def test_concurrent_callers_share_the_threads():
    """With as many callers as threads nobody gets a helper."""
    pool, barrier = threads.TilePool(), threading.Barrier(3)
    kernels = [Kernel(lambda number, helper: number == 0 and barrier.wait(10)) for _ in range(3)]
    team = [
        threading.Thread(target=pool.call, args=(kernel, (np.ones(1),), 2, 2)) for kernel in kernels
    ]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(20)
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
        *[
            ({"FAVOR_NP_NUM_THREADS": bad, "OMP_NUM_THREADS": "7"}, 7)
            for bad in ("", "0", "-1", "two", "1.5", "²")
        ],
    ],
)
def test_environment_sets_the_count(environ, count):
    assert threads.default_threads(environ) == count


def test_argument_then_limit_then_environment():
    python(
        """
import favor_np
from favor_np.threads import resolve_threads
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
from favor_np.threads import default_threads
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

    def spied(self, kernel, args, count, number):
        def spy(*args):
            before = int(args[-2][8])
            result = kernel(*args)
            name = threading.current_thread().name
            finished[name] = finished.get(name, 0) + (result > before)
            return result

        return plain(self, spy, args, count, number)

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
