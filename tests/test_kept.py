"""What is kept between calls: tables and workspaces of so many bytes, whatever comes."""

import functools
import sys
import threading
import weakref

import numpy as np
import pytest
from support.child import python
from support.workspaces import is_kept, kept_workspaces

from favor_np import AttentionState, favor_attention, feature_map, tables
from favor_np.cpu import memory, record, tuning
from favor_np.cpu.layout import layout
from favor_np.measure import peak_memory


def table(made):
    @tables.kept(4, lambda array: array.nbytes)
    def zeros(size):
        made.append(size)
        return np.zeros(size, np.int8)

    return zeros


def test_what_was_used_last_is_kept():
    made = []
    zeros = table(made)
    for size in (1, 2, 3, 4):
        assert zeros(size) is zeros(size)
    for size in (5, 6, 7):
        zeros(size)
        assert zeros(1) is zeros(1)  # used all the time: never made again
        for last in range(max(size - 2, 2), size + 1):
            zeros(last)
    assert made == [1, 2, 3, 4, 5, 6, 7]
    for size in range(100, 110):
        zeros(size)
    zeros(2)
    assert made[-1] == 2  # not used for long
    zeros.cache_clear()
    zeros(1)
    assert made[-1] == 1


def test_no_more_bytes_are_kept_than_said():
    made, references = [], []

    @tables.kept(1000, lambda array: array.nbytes)
    def zeros(number, size):
        made.append(number)
        array = np.zeros(size, np.int8)
        references.append(weakref.ref(array))
        return array

    share = tables.KEPT // 16
    for number in range(40):
        zeros(number, share - 1)
        held = [reference() for reference in references]
        assert sum(array.nbytes for array in held if array is not None) <= tables.KEPT
        del held
    made.clear()
    for number in range(33, 40):
        zeros(number, share - 1)
    assert made == []
    zeros(99, tables.KEPT // 2 + 1)  # too large to be kept, and nothing else goes for it
    for number in range(33, 40):
        zeros(number, share - 1)
    assert made == [99]
    zeros(99, tables.KEPT // 2 + 1)
    assert made == [99, 99]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set")
@pytest.mark.parametrize("call", ["heads", "exact", "gradient"])
def test_memory_does_not_grow_with_every_new_shape(call):
    """Tables of 4 to 12 MB a call: of all these shapes they would take 320 MB and more."""
    grown = python(
        f"""
        import numpy as np
        from favor_np import feature_map, exact_attention, exact_attention_vjp, favor_attention

        fm, kind = feature_map("positive", 1, 2), {call!r}

        def use(heads):
            x = np.ones((heads, 1, 1), np.float32)
            if kind == "heads":
                favor_attention(x, x, x, fm)
            elif kind == "exact":
                exact_attention(x, x, x)
            else:
                exact_attention_vjp(x, x, x)[1](x)

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096

        for heads in range(50_000, 50_010):
            use(heads)
        before = resident()
        for heads in range(50_010, 50_090):
            use(heads)
        print(resident() - before)
        """
    )
    assert int(grown) < 3 * tables.KEPT


def spare(sizes, threads=1, pipeline=0):
    """Give back workspaces of so many bytes a thread; which of them are kept then, by number."""
    kept = []

    def work():
        # What a pipeline has is more than its rooms: they do not tell its size.
        rooms = [record.Room(np.zeros(1, np.int64), 1 if pipeline else size) for size in sizes]
        spaces = [memory.Workspace(np.dtype(np.float32), room) for room in rooms]
        for space, size in zip(spaces, sizes, strict=True):
            memory.give_back(space, threads, (np.empty((threads, size), np.uint8),), pipeline)
        kept.extend(i for i, space in enumerate(spaces) if is_kept(space, threads, pipeline))

    thread = threading.Thread(target=work)  # each has its own
    thread.start()
    thread.join()
    return kept


def test_spare_workspaces_are_few_and_small():
    quarter = tuning.MAX_SPARE_BYTES // tuning.MAX_SPARE
    assert spare([100] * 4) == [0, 1, 2, 3]
    assert spare([100] * 7) == [3, 4, 5, 6]
    assert spare([quarter] * 4) == [0, 1, 2, 3]
    assert spare([100, quarter, quarter, 2 * quarter - 100]) == [0, 1, 2, 3]
    assert spare([100, quarter, quarter, 2 * quarter]) == [1, 2, 3]
    assert spare([quarter, quarter, 3 * quarter]) == [1, 2]
    assert spare([quarter, 4 * quarter]) == [1]
    assert spare([quarter, 4 * quarter + 4]) == []
    assert spare([quarter // 2] * 4, threads=2) == [0, 1, 2, 3]
    assert spare([quarter, quarter, quarter], threads=2) == [1, 2]
    assert spare([quarter, 4 * quarter], pipeline=3) == [1]
    assert spare([quarter, 4 * quarter + 4], pipeline=3) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("state", [None, (32, 16)])
def test_the_bytes_of_a_workspace_are_those_of_its_arrays(state, dtype):
    space = memory.Workspace(np.dtype(dtype), record.Room(np.zeros(4, np.int64), 640), state)
    assert space.nbytes == sum(array.nbytes for array in space.make(1))
    assert 3 * space.nbytes == sum(array.nbytes for array in space.make(3))


def test_a_spare_workspace_is_used_again():
    state = AttentionState.zeros(feature_map("positive", 4, 8), 4)
    x = np.ones(4, np.float32)
    state.step(x, x, x)
    before = kept_workspaces()
    state.step(x, x, x)
    after = kept_workspaces()
    assert {id(array) for array in before} == {id(array) for array in after}
    assert before


def test_memory_of_a_window_does_not_grow_with_the_sequence():
    """Neither with its positions nor with its segments."""
    fm = feature_map("positive", 2, 4)
    for window in (1, 8, 64, 1000):
        peaks = []
        for length in (50_000, 400_000):
            x = np.ones((4, length, 2), np.float32)
            out = np.empty_like(x)
            call = functools.partial(
                favor_attention, x, x, x, fm, causal=True, window=window, out=out
            )
            call()
            peaks.append(min(peak_memory(call) for _ in range(2)))
        assert abs(peaks[1] - peaks[0]) < 4 * 2**20, window  # one array of the longer one has 26


def test_a_long_map_takes_no_matrix_of_its_length(tmp_path):
    """A file of 33 KB once took 25 s and 2 GB to load: d x d matrices, for a map without any."""
    fm = feature_map("positive", dim=4096, num_features=4)
    x = np.zeros((1, 4096), np.float32)

    def use():
        layout.cache_clear()
        state = AttentionState.zeros(fm, value_dim=1).update(x, x[:, :1])
        state.save(tmp_path / "state")
        AttentionState.load(tmp_path / "state").attend(x)

    use()
    assert peak_memory(use) < 8 * 2**20  # d x d in float32 alone is 64
