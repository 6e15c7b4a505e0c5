"""States and live forecasts in hard use: interrupts, threads that share one, signal handlers, forks."""

import copy
import functools
import itertools
import os
import pickle
import threading
import time

import numpy as np
import pytest
from support.child import python

from favor_np import AttentionState, WindowState, favor_attention, feature_map
from favor_np.forecast import LiveForecast
from favor_np.guard import Guard

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FM = feature_map("positive", dim=8, num_features=32, rng=0)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def run_together(count, work):
    """Call work(0), work(1), ... in threads that start together; raise what any of them raised."""
    start, errors = threading.Barrier(count), []

    def run(number):
        start.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 (it is raised below)
            errors.append(error)

    team = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    if errors:
        raise errors[0]


# -- Threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [50, 2000])
def test_updates_of_many_threads_all_count(length):
    k = drawn(4, 20, length, 8)
    state = AttentionState.zeros(FM, value_dim=8)

    def work(number):
        for keys in k[number]:
            state.update(keys, keys, num_threads=1)

    run_together(4, work)
    expected = AttentionState.zeros(FM, value_dim=8)
    expected.update(k.reshape(-1, 8), k.reshape(-1, 8))
    assert state.lengths == 80 * length
    assert np.allclose(state.attend(k[0, 0]), expected.attend(k[0, 0]), rtol=1e-4, atol=1e-5)


def test_steps_of_many_threads_all_count():
    """With decay a step reads and writes the number of tokens and the exponents as well."""
    k = drawn(4, 300, 2, 8)
    state = AttentionState.zeros(FM, 1, 2, decay=0.9999)
    ones = np.ones((2, 1), np.float32)

    def work(number):
        for key in k[number]:
            assert np.allclose(state.step(key, key, ones), 1, atol=1e-4)

    run_together(4, work)
    assert (state.lengths == 1200).all()
    expected = AttentionState.zeros(FM, 1, 2, decay=0.9999)
    for key in k.reshape(-1, 2, 8):
        expected.step(key, key, ones)
    mine, its = (np.ldexp(s.z.astype(float), s.c).sum() for s in (state, expected))
    assert 0.85 < mine / its < 1.15  # in another order


def test_merges_of_each_other_do_not_wait_for_ever():
    one, two = (AttentionState.zeros(FM, 8).update(*drawn(2, 5, 8, seed=s)) for s in (1, 2))

    def work(number):
        for _ in range(20):
            (one, two)[number].merge((two, one)[number])

    run_together(2, work)
    assert min(one.lengths, two.lengths) >= 21 * 5


def test_a_state_merges_with_itself():
    k = drawn(30, 8)
    state = AttentionState.zeros(FM, 8).update(k, k)
    before = state.attend(k)
    state.merge(state)
    assert state.lengths == 60
    assert np.allclose(state.attend(k), before, atol=1e-6)


@pytest.mark.parametrize(
    "snapshot",
    [
        lambda state, path: state.copy(),
        lambda state, path: pickle.loads(pickle.dumps(state)),
        lambda state, path: (state.save(path), AttentionState.load(path))[1],
        lambda state, path: favor_attention(
            *np.ones((3, 0, 8)), FM, state=state, return_state=True
        )[1],
        lambda state, path: AttentionState.zeros(FM, 8, dtype=np.float64).merge(state),
    ],
    ids=["copy", "pickle", "save", "prefix", "merge"],
)
def test_a_snapshot_of_a_state_at_work_is_whole(snapshot, tmp_path):
    """All values are (1, 0, 0, ...) n times: S / z is 1 and z is n times that of one key."""
    key, value = np.full(8, 0.1), np.eye(8)[0]
    zeros = functools.partial(AttentionState.zeros, FM, 8, dtype=np.float64)
    state, ended = zeros(), threading.Event()
    one = zeros().update(key[None], value[None])
    unit = np.ldexp(one.z.astype(float), one.c)

    def work(number):
        if number == 0:
            try:
                for turn in itertools.count():
                    taken = snapshot(state, tmp_path / "state")
                    if turn > 60 and taken.lengths > 300:
                        break
                    z = np.ldexp(taken.z.astype(float), taken.c)
                    assert np.allclose(z, taken.lengths * unit, rtol=1e-9)
                    assert np.allclose(taken.S[:, 0], taken.z, rtol=1e-12)
            finally:
                ended.set()
        else:
            while not ended.is_set():
                state.step(key, key, value)

    run_together(2, work)


def test_a_reader_that_waits_goes_before_the_changes_that_come_later():
    guard, changes, seen = Guard("thing"), [], []
    reader = threading.Thread(target=lambda: seen.append(guard.read(lambda: len(changes))))

    def first(_):
        reader.start()
        while not guard._awaited:
            time.sleep(1e-3)

    guard.change(first, None)
    for number in range(2000):
        guard.change(changes.append, number)
    reader.join()
    assert seen[0] < 100  # one for every 0.1 s that the reader is kept from running


def test_readers_share_a_state_while_another_thread_changes_it():
    key = np.full((1, 8), 0.1, np.float32)
    state, ended = AttentionState.zeros(FM, 8).update(key, key), threading.Event()

    def work(number):
        if number:
            try:
                for _ in range(100):
                    assert np.allclose(state.attend(key), key, rtol=1e-5)
            finally:
                ended.set()
        else:
            while not ended.is_set():
                state.update(key, key)

    run_together(3, work)


def test_windows_of_many_threads_are_whole():
    """All values are equal: so is every result, and the window is full in the end."""
    k, ones = drawn(3, 200, 8), np.ones(2, np.float32)
    state = WindowState(FM, value_dim=2, window=20)

    def work(number):
        for key in k[number]:
            assert np.allclose(state.step(key, key, ones), 1, atol=1e-5)
            assert np.allclose(state.attend(key[None]), 1, atol=1e-5)
            assert copy.copy(state).length >= 1

    run_together(3, work)
    assert state.length == 600
    assert state._mask.all()


def test_prices_of_many_threads_are_taken_one_after_the_other():
    live, alone = (LiveForecast(window=4, num_features=16) for _ in range(2))
    prices = 100 + drawn(3, 300)

    def work(number):
        for price in prices[number]:
            live.push(float(price))
            if price > 101.5:
                copy.deepcopy(live).push(100.0)

    run_together(3, work)
    for price in prices.ravel():
        alone.push(float(price))
    assert live.state.lengths == alone.state.lengths


def test_copies_of_a_live_forecast_go_their_own_way():
    live = LiveForecast(window=4, num_features=16)
    for price in 100 + drawn(50):
        live.push(float(price))
    twins = [copy.copy(live), copy.deepcopy(live), pickle.loads(pickle.dumps(live))]
    expected = [live.push(p) for p in (100.0, 99.0, 102.0)]
    for twin in twins:
        assert [twin.push(p) for p in (100.0, 99.0, 102.0)] == expected


def test_a_copy_made_in_the_midst_of_a_change_of_another_object_is_free():
    """A lock is never copied: neither one that is held nor one that is shared."""
    guard = Guard("thing")

    def copies(_):
        return copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))

    for twin in guard.change(copies, None):
        other = threading.Thread(target=twin.change, args=(int, 0))
        other.start()
        other.join(10)
        assert not other.is_alive()


# -- Interrupts -----------------------------------------------------------------------------------

#: Interrupts `call` at many moments; after each `check` says if the object is whole.
INTERRUPT = """
import signal, time
import numpy as np
from favor_np import AttentionState, WindowState, feature_map
from favor_np.cpu import threads

def handler(number, frame):
    if armed:
        raise KeyboardInterrupt

armed = False
signal.signal(signal.SIGALRM, handler)

def interrupted(call, after):
    global armed
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, after)
            call()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False

def spoiled(call):
    try:
        return call(), False
    except RuntimeError as error:
        assert "is spoiled" in str(error), error
        return None, True

fm = feature_map("positive", dim=16, num_features=128, rng=0)
rng = np.random.default_rng(0)

def hunt(make, change, read, longest):
    "Interrupt change(object); what read(object) says afterwards is what it says of one that was not."
    seen, thing, known, turn = [0, 0], make(), {}, 0
    right = make()
    known[0] = read(right)
    while seen[0] < 60:
        turn += 1
        if len(known) < 300:
            change(right)
            known[len(known)] = read(right)
        hit = interrupted(lambda: change(thing), longest * (turn % 37 + 0.1) / 37)
        got, bad = spoiled(lambda: (read(thing), lengths(thing)))
        seen[0] += hit
        seen[1] += bad
        assert hit or not bad, "spoiled without a reason"
        if bad:
            for use in (lambda: change(thing), thing.copy):
                assert spoiled(use)[1], "a spoiled state is still in use"
            thing = make()
        else:
            values, count = got
            assert np.array_equal(values, known[count]), (turn, hit, count)
            if count >= len(known) - 1:
                thing = make()
    assert threads.POOL._active == 0
    print(*seen)
"""


@posix
@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("kind", ["step", "update", "long update", "merge", "attend"])
def test_an_interrupted_state_is_whole_or_says_that_it_is_spoiled(kind, decay):
    code = f"""
heads, decay, kind = 40, {decay}, {kind!r}
length = {{"step": 1, "update": 100, "long update": 1500, "merge": 7, "attend": 100}}[kind]
k, v, q = rng.standard_normal((3, heads, length, 16), np.float32)
other = AttentionState.zeros(fm, 16, heads, decay=decay).update(k, v)

def make():
    return AttentionState.zeros(fm, 16, heads, decay=decay)

def change(state):
    if kind == "step":
        state.step(q[:, 0], k[:, 0], v[:, 0], num_threads=2)
    elif kind == "merge":
        state.merge(other)
    elif kind == "attend":
        state.attend(q, num_threads=2)
    else:
        state.update(k, v, num_threads=2)

def read(state):
    return state.attend(q[:, :3])

def lengths(state):
    found = np.unique(state.lengths)
    assert found.size == 1
    return int(found[0]) // length

change(make())
start = time.perf_counter()
for _ in range(5):
    change(make())
hunt(make, change, read, 1.3 * (time.perf_counter() - start) / 5)
"""
    out = python(INTERRUPT + code)
    if kind == "attend":
        assert out.split()[1] == "0"


@posix
@pytest.mark.parametrize("kind", ["step", "update", "attend"])
def test_an_interrupted_window_is_whole_or_says_that_it_is_spoiled(kind):
    code = f"""
kind = {kind!r}
k, v, q = rng.standard_normal((3, 8, 30, 16), np.float32)

def make():
    return WindowState(fm, 16, 40, 8, decay=0.9).update(k, v)

def change(state):
    if kind == "step":
        state.step(q[:, 0], k[:, 0], v[:, 0])
    elif kind == "attend":
        state._forget()
        state.attend(q)
    else:
        state.update(k, v)

def read(state):
    return state.copy().attend(q[:, :3])

def lengths(state):
    return (state.length - 30) // {{"step": 1, "attend": 30, "update": 30}}[kind]

change(make())
start = time.perf_counter()
for _ in range(5):
    change(make())
hunt(make, change, read, 1.3 * (time.perf_counter() - start) / 5)
"""
    out = python(INTERRUPT + code)
    if kind == "attend":
        assert out.split()[1] == "0"


@posix
def test_an_interrupted_live_forecast_is_whole_or_says_that_it_is_spoiled():
    python(
        INTERRUPT
        + """
import copy
from favor_np.forecast import LiveForecast

prices = (100 + rng.standard_normal(3000)).tolist()
start, hits, bad = LiveForecast(window=4, num_features=64, calibration="none"), 0, 0
for price in prices[:20]:
    start.push(price)
live, right = copy.deepcopy(start), copy.deepcopy(start)
for turn, price in enumerate(prices[20:]):
    hit = interrupted(lambda: live.push(price), 1e-6 * (turn % 60 + 1))
    tick = right.push(price)
    hits += hit
    if hit:  # was it taken, or not?
        found, spoilt = spoiled(lambda: copy.deepcopy(live))
        bad += spoilt
        if not spoilt:
            count = int(found.state.lengths)
            assert count in (int(right.state.lengths), int(right.state.lengths) - 1)
            if count < right.state.lengths:
                assert found.push(price) == tick
        live = copy.deepcopy(right)
    if hits > 40:
        break
assert hits > 20, hits
"""
    )


@posix
def test_a_signal_handler_that_uses_the_state_it_interrupts_gets_an_error():
    """And none where it interrupts what only reads, or something else."""
    python(
        """
import signal, time
import numpy as np
from favor_np import AttentionState, WindowState, feature_map

fm = feature_map("positive", dim=16, num_features=128, rng=0)
k = np.random.default_rng(0).standard_normal((8, 100, 16), np.float32)
state, refused, done = AttentionState.zeros(fm, 16, 8), 0, 0
window, other = WindowState(fm, 16, 50, 8), state.copy().update(k, k)

def handler(number, frame):
    global refused, done
    for use in (lambda: state.attend(k), lambda: state.step(k[:, 0], k[:, 0], k[:, 0]), state.copy,
                lambda: window.step(k[:, 0], k[:, 0], k[:, 0])):
        try:
            use()
            done += 1
        except RuntimeError as error:
            assert "spoiled" in str(error)
            refused += 1

for use in (lambda: state.attend(k), lambda: window.attend(k)):
    use()
handler(0, None)
assert refused == 0
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0011, 0.0011)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    state.update(k, k)
    state.merge(other)
    state.attend(k)
    window.update(k, k)
    window.attend(k)
signal.setitimer(signal.ITIMER_REAL, 0)
assert refused > 20 and done > 20, (refused, done)
for x in (state.attend(k), window.attend(k)):
    assert np.isfinite(x).all()
"""
    )


# -- Forks ----------------------------------------------------------------------------------------


@forks
def test_in_the_child_of_a_fork_no_state_waits_for_a_thread_that_is_not_there():
    """What another thread was changing is spoiled there; all else goes on."""
    python(
        """
import os, signal, threading
import numpy as np
from favor_np import AttentionState, feature_map
from favor_np.cpu import threads

fm = feature_map("positive", dim=4, num_features=8)
x = np.ones((3, 4), np.float32)
busy, read, idle = (AttentionState.zeros(fm, 4).update(x, x) for _ in range(3))
held, go = [threading.Event(), threading.Event()], threading.Event()

def hold(event):
    event.set()
    go.wait()

team = [
    threading.Thread(target=busy._guard.change, args=(hold, held[0])),
    threading.Thread(target=read._guard.read, args=(hold, held[1])),
]
for thread, event in zip(team, held):
    thread.start()
    event.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    status = 1
    try:
        for state in (read, idle):
            assert state.update(x, x).lengths == 6
        try:
            busy.update(x, x)
        except RuntimeError as error:
            status = "spoiled" not in str(error)
    finally:
        os._exit(status)
go.set()
for thread in team:
    thread.join()
assert os.waitpid(pid, 0)[1] == 0
assert busy.update(x, x).lengths == 6
"""
    )
