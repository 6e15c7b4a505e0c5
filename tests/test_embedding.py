"""What surrounds a call: threads, forks, pools and signals; the right result and no hang."""

import os

import pytest
from support.child import BEGIN, FORK, python

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture(autouse=True)
def way(each_way):
    """All of this holds for code that was compiled here, and for code that was shipped."""
    return each_way


def test_where_their_code_comes_from(way):
    code = "from favor_np.cpu import code\nprint({k.origin for k in code.every_kernel()} - {''})"
    for _ in range(2):
        found = python(BEGIN + "check()\n" + code)
    assert found == ("{'shipped'}\n" if way == "shipped" else "{'stored'}\n")


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
        + FORK
        + """
check()
assert helpers() == 1
def grandchild():
    check()
    assert helpers() == 1
    other = threading.Thread(target=check)
    other.start()
    other.join()
    fork(check)
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
        + FORK
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
    fork(check)
    time.sleep(0.005)
stop.set()
for thread in team: thread.join()
assert not failures, failures
""",
        # Python warns of any fork beside threads; these are the test's own.
        "-W",
        "ignore:This process:DeprecationWarning",
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
        got = pool.map(work, range(4))
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
got = joblib.Parallel(n_jobs=2, backend={backend!r})(
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

#: Python ignores interrupts where whoever started it does, as shells do for what runs behind them.
LISTEN = """
import signal, traceback
signal.signal(signal.SIGINT, signal.default_int_handler)
"""

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

over = False

def interrupt(sent):
    while not inside() and not over:
        time.sleep(0.0005)
    os.kill(os.getpid(), sent)
"""


@posix
@pytest.mark.parametrize("number", [1, 2])
def test_keyboard_interrupt_comes_when_the_call_is_finished(number):
    python(
        BEGIN
        + LISTEN
        + LONG
        + f"""
number = {number}
long(number)
expected = out.copy()
out[:] = np.nan

def interrupted():  # the call, and not what is around it
    global over
    over, out[:] = False, np.nan
    thread = threading.Thread(target=interrupt, args=(signal.SIGINT,))
    thread.start()
    try:
        long(number)
        over = True
        thread.join()
        time.sleep(0)
    except KeyboardInterrupt as error:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        return "long" in frames
    raise AssertionError("not interrupted")

while not interrupted():
    pass
assert (out == expected).all()
check()
assert helpers() == 1
out[:] = np.nan
long(2)
assert (out == expected).all()
"""
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
        favor_np.cpu.threads.POOL._grow(helpers() + 1 if helpers() < 20 else 1)
    if handled < 200:
        signal.setitimer(signal.ITIMER_REAL, 0.003)

check(3)  # with three threads the fourth head has another kernel: none is compiled in a handler
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.003)
while handled < 200:
    check()
assert favor_np.cpu.threads.POOL._active == 0
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
