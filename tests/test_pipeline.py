"""A long causal head shared out chunk by chunk: the bits of one thread, whatever moves or does not fit."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.child import BEGIN, python
from support.inputs import anisotropic_inputs, random_inputs
from support.tuning import recorded, tuned
from support.workspaces import poison_workspaces

import favor_np
from favor_np import favor_attention, feature_map
from favor_np.cpu import schedule, tuning
from favor_np.cpu.layout import layout
from favor_np.cpu.records import FITS, MOVED, RING
from favor_np.cpu.tiles import CHUNK
from favor_np.jobs import Shapes, broadcast_jobs

#: The shortest head that is shared out where no test says otherwise.
LONG = tuning.MIN_SHARED_LENGTH


@pytest.fixture(autouse=True)
def pipelines():
    """Share out whatever is longer than a chunk; the pipelines that are run."""
    with tuned(MIN_PARALLEL_WORK=0, MIN_SHARED_LENGTH=CHUNK + 1), recorded("pipeline") as run:
        yield run


def notes(pipeline):
    """Of each state that is left: the chunk at which c moved last, and whether its keys fit together."""
    rows = pipeline.words[
        -3 * (pipeline.states + 1) : -3
    ]  # the last three are those of the beginning
    rows = rows.reshape(pipeline.states, 3)
    return rows[:, MOVED], rows[:, FITS].astype(bool)


def inputs(L, d=7, dv=5, lead=(1,), *, std=0.7, dtype=np.float32, **options):
    return random_inputs(L, d, dv, lead, std=std, dtype=dtype, **options)


def results(q, k, v, fm, threads, **options):
    """The output and the state of a call, its workspaces poisoned before."""
    poison_workspaces()
    state = options.pop("state", None)
    state = None if state is None else state.copy()
    out, after = favor_attention(
        q, k, v, fm, causal=True, return_state=True, num_threads=threads, state=state, **options
    )
    return out, after.c, after.S, after.z


def same_bits(*args, numbers=(2, 3, 8), **options):
    """Compare results of several threads with those of one, twice: the second finds used workspaces."""
    one = results(*args, threads=1, **options)
    for threads in (*numbers, *numbers):
        for got, expected in zip(results(*args, threads=threads, **options), one, strict=True):
            np.testing.assert_array_equal(got, expected)
    return one


SIZES = {
    "small": (7, 5, {"num_features": 24}),
    "plain": (64, 64, {"num_features": 256, "antithetic": False}),
    "blocks": (33, 20, {"num_features": 300}),
    "relu": (16, 16, {"num_features": 70, "kind": "relu"}),
    "elu": (16, 16, {"num_features": 70, "kind": "elu"}),
    "one": (1, 1, {"num_features": 2}),
}


def a_map(size):
    dim, width, options = SIZES[size]
    options = {"kind": "positive"} | options
    return dim, width, feature_map(options.pop("kind"), dim, rng=0, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", [66, 128, 129, 1000, 3001])
@pytest.mark.parametrize("size", SIZES)
def test_any_size(pipelines, size, length, dtype):
    dim, width, fm = a_map(size)
    same_bits(*inputs(length, dim, width, dtype=dtype), fm)
    assert len(pipelines) == 6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.99, 0.9995])
def test_decay_moves_c_ever_again(pipelines, decay, size):
    dim, width, fm = a_map(size)
    same_bits(*inputs(2500, dim, width), fm, decay=decay)
    if decay < 0.9:
        moved, _ = notes(pipelines[0])
        assert (moved > 0).all()


@pytest.mark.parametrize("where", [3, 64, 70, 1500, 2499])
@pytest.mark.parametrize("times", [0.1, 30, 1000])
def test_keys_of_another_size(pipelines, where, times):
    """c moves, and keys of a chunk may not fit together: then it is gone through in pieces."""
    q, k, v = inputs(2500, 16, 8)
    fm = feature_map("positive", 16, 64, antithetic=False, rng=0)
    k[:, :where] *= times  # the features of large keys are small
    same_bits(q, k, v, fm)
    if times > 1 and where == 2499:
        _, fit = notes(pipelines[0])
        assert not fit[pipelines[0].last]
    for step in range(40):
        k[:, where + step * 50 :] *= 0.8
    same_bits(q, k, v, fm)


def test_every_chunk_has_keys_that_do_not_fit(pipelines):
    q, k, v = inputs(1500, 16, 8)
    k[:] = (
        2 * np.sqrt(3.0 * np.arange(1500, 0, -1))[:, None] * (k[:, :1] / np.linalg.norm(k[:, :1]))
    )
    same_bits(q, k, v, feature_map("positive", 16, 64, rng=0))
    _, fit = notes(pipelines[0])
    assert not fit[: 1500 // CHUNK].any()


def test_keys_that_are_not_there():
    q, k, v = inputs(2000)
    fm = a_map("small")[2]
    rng = np.random.default_rng(1)
    for mask in (
        rng.random((1, 2000)) < 0.5,
        np.arange(2000)[None] >= 700,
        np.arange(2000)[None] < 700,
        np.zeros((1, 2000), bool),
    ):
        same_bits(q, k, v, fm, key_mask=mask)
        same_bits(q, k, v, fm, key_mask=mask, decay=0.8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [5, 64, 999, 1999])
def test_what_is_not_finite_reaches_no_row_before_it(bad, where):
    fm = a_map("small")[2]
    for spoil in range(3):
        arguments = inputs(2000)
        clean = results(*arguments, fm, threads=2)[0]
        arguments[spoil][:, where, 0] = bad
        out = same_bits(*arguments, fm)[0]
        np.testing.assert_array_equal(out[:, :where], clean[:, :where])
        assert not np.isfinite(out[:, where]).all()


def test_on_from_a_state_and_into_it(pipelines):
    q, k, v = inputs(2000)
    fm = a_map("small")[2]
    state = favor_attention(q, 2 * k, v, fm, return_state=True)[1]
    same_bits(q, k, v, fm, state=state)
    state = favor_attention(q, k, v, fm, causal=True, decay=0.97, return_state=True)[1]
    same_bits(q, k, v, fm, state=state)
    cut = 700
    one = results(q, k, v, fm, threads=1)
    first, state = favor_attention(
        q[:, :cut], k[:, :cut], v[:, :cut], fm, causal=True, return_state=True, num_threads=2
    )
    rest = results(q[:, cut:], k[:, cut:], v[:, cut:], fm, threads=2, state=state)
    close = 1e-5
    np.testing.assert_allclose(
        np.concatenate([first, rest[0]], axis=1), one[0], rtol=close, atol=close
    )
    assert pipelines


def test_on_from_a_state_that_has_single_tokens(pipelines):
    q, k, v = inputs(1000, lead=(1,))
    fm = feature_map("positive", dim=7, num_features=24)
    state = favor_np.AttentionState(fm, 5, (1,), dtype=np.float32)
    for t in range(5):  # which are not folded yet
        state.step(q[:, t], k[:, t], v[:, t])
    pipelines.clear()
    found = same_bits(q[:, 5:], k[:, 5:], v[:, 5:], fm, state=state)[0]
    assert pipelines
    expected = favor_attention(q, k, v, fm, causal=True)[:, 5:]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_heads_that_share_keys_and_heads_that_are_left_over(pipelines):
    fm = a_map("small")[2]
    q, k, v = inputs(1000, lead=(6,))
    same_bits(q, k[:1], v[:1], fm, enable_gqa=True, numbers=(2, 5))
    assert len(pipelines) == 4
    pipelines.clear()
    same_bits(q[:3], k[:3], v[:3], fm, numbers=(2,))  # two at once, and one by both
    assert len(pipelines) == 2
    pipelines.clear()
    same_bits(q[:4], k[:4], v[:4], fm, numbers=(5,))  # only one would be idle
    assert not pipelines
    same_bits(q, k, v, fm, numbers=(5,), decay=np.linspace(0.9, 0.999, 6))
    assert len(pipelines) == 2


def test_a_long_sequence_among_short_ones(pipelines):
    fm = a_map("small")[2]
    q, k, v = inputs(2000)
    offsets = [0, 100, 1800, 1810, 2000]
    same_bits(q, k, v, fm, cu_seqlens=offsets, numbers=(2, 3))
    assert len(pipelines) == 4
    same_bits(q, k, v, fm, cu_seqlens=offsets, decay=0.95, numbers=(2,))


def test_bfloat16_and_parts(pipelines):
    q, k, v = inputs(1500, 64, 48)
    fm = feature_map("positive", 64, 256, rng=0)
    with tuned(USE_BFLOAT16=True):
        same_bits(q, k, v, fm, precision="bfloat16")
        v[:, 700, 3] = np.nan
        same_bits(q, k, v, fm, precision="bfloat16")
    before = len(pipelines)
    with tuned(USE_BF16X3=True):
        same_bits(q, k, v, fm)
    assert len(pipelines) == before + 6


def test_calibrated_maps():
    q, k = anisotropic_inputs(1, length=1200)
    v = inputs(1200)[2]
    for method in ("oprf", "aderf", "auto"):
        same_bits(q, k, v, feature_map("positive", 8, 64, rng=0).calibrate(q, k, method))


def test_error_bars(pipelines):
    q, k, v = inputs(1500, 8, 5)
    fm = feature_map("positive", 8, 64, rng=0)
    found = []
    for number in (1, 2, 5):
        with favor_np.thread_limit(number):
            found.append(favor_np.diagnose(q, k, v, fm, causal=True))
    for one in found[1:]:
        np.testing.assert_array_equal(one.output, found[0].output)
        np.testing.assert_array_equal(one.standard_error, found[0].standard_error)
    assert len(pipelines) == 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_the_keys_are(data):
    """Keys of any size, masked and decaying at will, in groups of any number of threads."""
    length = data.draw(st.integers(66, 1200))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    sizes = data.draw(st.lists(st.floats(-3, 4), min_size=len(cuts), max_size=len(cuts)))
    q, k, v = inputs(length, seed=data.draw(st.integers(0, 9)))
    for cut, size in zip(cuts, sizes, strict=True):
        k[:, cut:] *= np.float32(np.exp(size))
    options = {}
    if data.draw(st.booleans()):
        options["key_mask"] = np.random.default_rng(0).random((1, length)) < data.draw(
            st.floats(0, 1)
        )
    if data.draw(st.booleans()):
        options["decay"] = data.draw(st.floats(0.2, 1.0))
    same_bits(q, k, v, a_map("small")[2], numbers=(data.draw(st.integers(2, 9)),), **options)


@pytest.mark.parametrize(
    ("heads", "threads", "few"),
    [(1, 2, 1), (1, 4, 1), (2, 4, 2), (3, 4, 3), (4, 5, 0), (3, 2, 1), (5, 4, 1), (4, 2, 0), (0, 2, 0)],
)  # fmt: skip
def test_threads_share_the_heads_that_would_leave_some_of_them_idle(heads, threads, few):
    jobs = broadcast_jobs(Shapes(*3 * [(heads, 9999, 4)]))
    assert schedule.shared_count(jobs, threads) == few


@tuned(MIN_SHARED_LENGTH=LONG)
def test_short_heads_are_left_whole():
    for length, few in ((900, 0), (LONG - 1, 0), (LONG, 1)):
        jobs = broadcast_jobs(Shapes(*3 * [(1, length, 4)]))
        assert schedule.shared_count(jobs, 2) == few


@pytest.mark.parametrize(
    ("features", "width", "threads"), [(256, 64, 2), (256, 64, 64), (4096, 256, 8), (2, 1, 3)]
)
def test_memory_is_enough_and_no_more(features, width, threads):
    of = layout(feature_map("positive", 16, features), np.dtype(np.float32), width)
    pipeline = schedule.pipeline(of, 10**6, threads)
    own = 4 * of.features * (of.value_columns + CHUNK)
    assert pipeline.states * own <= max(tuning.MAX_GROUP_BYTES, RING * own)
    c, s, z, rooms, keys = of.stateful.make(threads, pipeline.states + 1)
    assert len(rooms) == threads
    assert {len(array) for array in (c, s, z, keys)} == {pipeline.states + 1}
    assert keys[0].size == of.features * CHUNK


ONE_HEAD = (
    BEGIN
    + """
q, k, v = q[:1], k[:1], v[:1]
right = call(1)
check()
"""
)


def test_threads_without_a_processor_of_their_own():
    """Whoever waits lets those work for whom it waits."""
    python(ONE_HEAD + """
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for threads in (2, 3, 8, 2):
    for _ in range(30):
        check(threads)
""")  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_forks_between_and_during_pipelines():
    python(ONE_HEAD + """
working = True

def work():
    while working:
        check()

thread = threading.Thread(target=work)
thread.start()
for _ in range(15):
    check(3)
    child = os.fork()
    if child == 0:
        check(), check(4)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
working = False
thread.join()
""")  # fmt: skip


def test_callers_at_the_same_time():
    """Those that find all helpers busy do without."""
    python(ONE_HEAD + """
def work():
    for _ in range(20):
        check(3)

threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert favor_np.cpu.threads.POOL._active == 0
""")  # fmt: skip
