"""stream_attention: the whole in chunks, and the same bytes whatever interrupted it."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from support.child import HANG, environment, python
from support.inputs import draw, random_inputs
from support.parameters import each_causal, each_dtype, each_map
from support.tolerance import relative_error
from support.tuning import tuned

from favor_np import (
    AttentionState,
    FeatureMap,
    favor_attention,
    storage,
    stream_attention,
    streaming,
)

FM = FeatureMap.from_projection(draw(17, 6))


class OnDisk:
    """What data sets of h5py and zarr have in common, and what was asked of it."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.longest = self.flushed = 0

    def _note(self, index):
        assert index[0] is Ellipsis
        assert index[2] == slice(None)
        start, stop = index[1].start, index[1].stop
        assert 0 <= start < stop <= self.shape[-2]
        self.longest = max(self.longest, stop - start)

    def __getitem__(self, index):
        self._note(index)
        return self.array[index].copy()

    def __setitem__(self, index, value):
        self._note(index)
        assert value.dtype == self.dtype
        self.array[index] = value

    def flush(self):
        self.flushed += 1


# -- The numbers ----------------------------------------------------------------------------------


@each_map
@each_dtype
@each_causal
@pytest.mark.parametrize("chunk_size", [1, 37, 64, 500, 1000])
def test_equals_the_whole(options, dtype, causal, chunk_size):
    if chunk_size == 1 and not causal:
        chunk_size = 3
    fm = FeatureMap.from_projection(draw(2, 17, 6), **options)
    q, k, v = random_inputs(200, lead=(3, 2), dtype=dtype)
    q = np.concatenate([q, -q, q], axis=-2)[..., : 200 if causal else 530, :]
    expected = favor_attention(q, k, v, fm, causal=causal)
    out = np.full(expected.shape, np.nan, dtype)
    assert stream_attention(q, k, v, fm, out, causal=causal, chunk_size=chunk_size) is out
    assert relative_error(out, expected) < 200 * np.finfo(dtype).eps


class NumbersOnDisk(OnDisk):
    """One number a key."""

    def _note(self, index):
        assert index[0] is Ellipsis
        assert len(index) == 2
        self.longest = max(self.longest, index[1].stop - index[1].start)


@each_causal
@pytest.mark.parametrize("decay", [None, [0.9, 0.99], "gates"])
def test_masks_biases_groups_and_decay(causal, decay, tmp_path):
    q, k, v = draw(4, 200, 6), draw(2, 200, 6, seed=1), draw(2, 200, 5, seed=2)
    rng = np.random.default_rng(3)
    mask, bias = rng.random((2, 200)) < 0.8, rng.normal(size=(2, 200))
    gates = rng.uniform(0.01, 1, (2, 200))
    more = {"key_mask": mask, "key_bias": bias, "enable_gqa": True, "causal": causal}
    on_disk = {n: NumbersOnDisk(more[n]) for n in ("key_mask", "key_bias")}
    if decay is not None and not causal:
        with pytest.raises(ValueError, match="needs causal"):
            stream_attention(q, k, v, FM, np.empty((4, 200, 5)), enable_gqa=True, decay=gates)
        return
    if decay == "gates":
        more["decay"], on_disk["decay"] = gates, NumbersOnDisk(gates)
    elif decay is not None:
        more["decay"] = decay
    expected = favor_attention(q, k, v, FM, **more)
    out = np.empty_like(expected)
    resume = tmp_path / "resume"
    stream_attention(q, k, v, FM, out, chunk_size=37, checkpoint=resume, **more | on_disk)
    assert relative_error(out, expected) < 1e-13
    assert all(array.longest == 37 for array in on_disk.values())


@pytest.mark.parametrize("decay", [[0.5, 0.9], np.linspace(0.2, 0.9, 60)], ids=["heads", "tokens"])
def test_lists_and_series_are_what_their_arrays_are(decay):
    shape = (2, 60, 6) if len(decay) == 2 else (60, 6)
    q, k, v = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2)
    expected = favor_attention(q, k, v, FM, causal=True, decay=decay)
    for given in (list(decay), pd.Series(decay)):
        out = np.empty_like(expected)
        stream_attention(q, k, v, FM, out, causal=True, chunk_size=17, decay=given)
        assert relative_error(out, expected) < 1e-13


def test_frames_are_what_their_arrays_are():
    q, k, v, bias = draw(60, 6), draw(60, 6, seed=1), draw(60, 6, seed=2), draw(60)
    expected = favor_attention(q, k, v, FM, key_bias=bias)
    out = np.empty_like(expected)
    frames = map(pd.DataFrame, (q, k, v))
    stream_attention(*frames, FM, out, chunk_size=17, key_bias=pd.Series(bias))
    assert relative_error(out, expected) < 1e-13


@each_causal
def test_leading_axes_broadcast(causal):
    q, k, v = draw(3, 1, 90, 6), draw(2, 90, 6, seed=1), draw(1, 1, 90, 5, seed=2)
    expected = favor_attention(q, k, v, FM, causal=causal)
    out = np.empty_like(expected)
    stream_attention(q, k, v, FM, out, causal=causal, chunk_size=32)
    assert relative_error(out, expected) < 1e-13


@each_causal
@pytest.mark.parametrize(
    ("types", "result"),
    [
        ((np.float16, np.float16, np.float16), np.float16),
        ((np.float32, np.int64, np.float32), np.float64),
        (("<f4", ">f4", ">f4"), np.float32),
    ],
)
def test_dtypes(causal, types, result):
    q, k, v = (x.astype(t) for x, t in zip(random_inputs(90), types, strict=True))
    expected = favor_attention(q, k, v, FM, causal=causal)
    out = np.empty((90, 5), result)
    stream_attention(q, k, v, FM, out, causal=causal, chunk_size=40)
    assert np.allclose(out.astype(float), expected.astype(float), atol=2 * np.finfo(result).eps * 8)


@each_causal
def test_reads_and_writes_one_chunk_at_a_time(causal, tmp_path):
    arrays = random_inputs(100, lead=(2,))
    q, k, v = map(OnDisk, arrays)
    out = OnDisk(np.empty((2, 100, 5)))
    stream_attention(
        q, k, v, FM, out, causal=causal, chunk_size=33, checkpoint=tmp_path / "checkpoint"
    )
    assert {a.longest for a in (q, k, v, out)} == {33}
    assert out.flushed
    expected = favor_attention(*arrays, FM, causal=causal)
    assert relative_error(out.array, expected) < 1e-13


def test_out_may_be_something_that_only_takes_rows():
    q, k, v = random_inputs(100)
    rows = []

    class Sink:
        shape, dtype = v.shape, v.dtype

        def __setitem__(self, index, value):
            rows.append(value)

    stream_attention(q, k, v, FM, Sink(), chunk_size=30)
    assert relative_error(np.concatenate(rows, -2), favor_attention(q, k, v, FM)) < 1e-13


@each_causal
@pytest.mark.parametrize(
    ("Lq", "Lk", "dv", "lead"), [(0, 0, 5, ()), (9, 9, 0, ()), (9, 9, 5, (0, 2))]
)
def test_empty(causal, Lq, Lk, dv, lead):
    out = np.empty((*lead, Lq, dv))
    q, k, v = np.ones((*lead, Lq, 6)), np.ones((*lead, Lk, 6)), np.ones((*lead, Lk, dv))
    assert stream_attention(q, k, v, FM, out, causal=causal) is out


def test_no_keys():
    out = np.full((9, 5), np.nan)
    stream_attention(np.ones((9, 6)), np.ones((0, 6)), np.ones((0, 5)), FM, out, chunk_size=4)
    assert not out.any()


@each_causal
def test_the_number_of_threads_changes_no_bit(causal):
    q, k, v = random_inputs(5000)
    one, two = np.empty((5000, 5)), np.empty((5000, 5))
    stream_attention(q, k, v, FM, one, causal=causal, chunk_size=3000, num_threads=1)
    stream_attention(q, k, v, FM, two, causal=causal, chunk_size=3000, num_threads=2)
    assert np.array_equal(one, two)


# -- Refused, before anything is done -------------------------------------------------------------


def test_numbers_of_keys_that_do_not_fit():
    q, k, v = draw(90, 6), draw(90, 6), draw(90, 5)
    for name, value in (
        ("key_mask", np.ones(89, bool)),
        ("key_bias", np.ones(89)),
        ("decay", np.ones(89)),
        ("decay", 1.5),
    ):
        with pytest.raises(ValueError, match=name):
            stream_attention(q, k, v, FM, np.empty((90, 5)), causal=True, **{name: value})


def test_refused(tmp_path):
    q, k, v = random_inputs(20, lead=(2,))
    good = {"q": q, "k": k, "v": v, "feature_map": FM, "out": np.full((2, 20, 5), np.nan)}
    read_only = np.zeros((2, 20, 5))
    read_only.setflags(write=False)
    memory = np.zeros((2, 20, 6))
    for wrong, error, message in [
        ({"q": q.tolist()}, TypeError, "q must have shape and dtype"),
        ({"k": k + 1j}, TypeError, "k must hold real numbers"),
        ({"v": np.ma.masked_greater(v, 0)}, TypeError, "v is a masked array"),
        ({"q": q[..., :5]}, ValueError, r"q must have shape \(..., L, 6\)"),
        ({"q": q[0, 0]}, ValueError, "q must have at least 2 axes"),
        ({"v": v[:, :19]}, ValueError, "v must have one row for each row of k, got 19"),
        ({"k": np.ones((3, 20, 6))}, ValueError, "leading axes do not broadcast"),
        ({"q": q[:, :19], "causal": True}, ValueError, "causal=True needs as many"),
        ({"feature_map": None}, TypeError, "feature_map must be a FeatureMap"),
        ({"feature_map": FeatureMap(FM.projection, "trig", 1, False, 1)}, ValueError, "trig"),
        ({"out": None}, TypeError, "out must have shape and dtype"),
        ({"out": np.ones((2, 20, 6))}, ValueError, r"out must have shape \(2, 20, 5\)"),
        ({"out": np.ones((2, 20, 5), np.float32)}, TypeError, "out must have dtype float64"),
        ({"out": np.ones((2, 20, 5), ">f8")}, TypeError, "out must have dtype float64"),
        ({"out": read_only}, ValueError, "out must be writeable"),
        ({"out": memory[..., :5], "q": memory}, ValueError, "out must not overlap .* of q"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size must be an integer"),
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a str or os.PathLike, got 3"),
        ({"checkpoint": tmp_path / "none" / "file"}, FileNotFoundError, "none"),
    ]:
        path = {"checkpoint": tmp_path / "checkpoint"}
        with pytest.raises(error, match=message):
            stream_attention(**(good | path | wrong))
        assert np.isnan(good["out"]).all()
        assert os.listdir(tmp_path) == []
    stream_attention(**good)
    assert np.isfinite(good["out"]).all()


# -- Interrupted and resumed ----------------------------------------------------------------------


class Stop(Exception):
    pass


class Broken(OnDisk):
    """A disk that fails when it is read for the nth time."""

    def __init__(self, array, reads):
        super().__init__(array)
        self.reads = reads

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise Stop
        return super().__getitem__(index)


@pytest.fixture
def each_chunk():
    with tuned(CHECKPOINT_SECONDS=0.0):
        yield


@each_causal
@pytest.mark.parametrize("broken", ["q", "k"])
@pytest.mark.parametrize("reads", range(0, 12, 3))
def test_resumes_after_any_chunk(each_chunk, tmp_path, causal, broken, reads):
    path = tmp_path / "checkpoint"
    arrays = dict(zip("qkv", random_inputs(100, lead=(2,), dtype=np.float32), strict=True))
    whole, out = (np.full((2, 100, 5), np.nan, np.float32) for _ in range(2))
    options = {"feature_map": FM, "causal": causal, "chunk_size": 30, "checkpoint": path}
    stream_attention(**arrays, out=whole, **options)
    assert os.listdir(tmp_path) == []
    interrupted = arrays | {broken: Broken(arrays[broken], reads)}
    ended = False
    try:
        stream_attention(**interrupted, out=out, **options)
        ended = True
    except Stop:
        assert os.listdir(tmp_path) == ["checkpoint"]
    assert ended == (reads >= 8)
    resumed = arrays | {"k": OnDisk(arrays["k"])}
    stream_attention(**resumed, out=out, **options)
    assert os.listdir(tmp_path) == []
    assert np.array_equal(out, whole)


def interrupted(path, causal=False, reads=5, **changes):
    """A run that ends in its pass over queries; the arguments of the call that resumes it."""
    q, k, v = random_inputs(100, lead=(2,), dtype=np.float32)
    out = np.zeros((2, 100, 5), np.float32)
    call = {"q": q, "k": k, "v": v, "feature_map": FM, "out": out}
    call |= {"causal": causal, "chunk_size": 30, "checkpoint": path}
    with pytest.raises(Stop):
        stream_attention(**(call | {"q": Broken(q, reads)}))
    return call


def test_a_checkpoint_of_another_call_is_refused(each_chunk, tmp_path):
    path = tmp_path / "checkpoint"
    call = interrupted(path)
    before, out = path.read_bytes(), call["out"].copy()
    q, k, v = call["q"], call["k"], call["v"]
    wide = {name: call[name].astype(np.float64) for name in ("q", "k", "v", "out")}
    other = FeatureMap.from_projection(draw(17, 6, seed=1))
    for change, message in [
        ({"q": q[:, :90], "out": out[:, :90]}, r"its q is float32 \(2, 100, 6\), got .*90"),
        ({"k": k[:, :90], "v": v[:, :90]}, r"its k is float32 \(2, 100, 6\), got .*90"),
        ({"v": v[..., :4], "out": out[..., :4].copy()}, r"its v is .*5\), got .*4\)"),
        (wide, "its q is float32 .*got float64"),
        ({"feature_map": other}, "its feature_map is"),
        ({"causal": True}, "its causal is False, got True"),
        ({"chunk_size": 31}, "its chunk_size is 30, got 31"),
        ({"precision": "bfloat16"}, "its precision is None, got bfloat16"),
        ({"out": np.zeros_like(out)}, "no longer hold"),
        ({"q": q + 1}, "no longer hold"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            stream_attention(**(call | change))
        assert str(path) in str(caught.value)
        assert path.read_bytes() == before
    assert np.array_equal(call["out"], out)
    stream_attention(**call)
    assert not path.exists()


def test_other_keys_are_refused_while_keys_are_folded(each_chunk, tmp_path):
    path = tmp_path / "checkpoint"
    q, k, v = random_inputs(100)
    out = np.zeros((100, 5))
    options = {"chunk_size": 30, "checkpoint": path}
    with pytest.raises(Stop):
        stream_attention(q, Broken(k, 4), v, FM, out, **options)
    with pytest.raises(ValueError, match="no longer hold"):
        stream_attention(q, k[::-1].copy(), v, FM, out, **options)
    stream_attention(q, k, v, FM, out, **options)


def test_a_file_that_is_no_checkpoint_is_left_alone(tmp_path):
    path = tmp_path / "state"
    q, k, v = random_inputs(10)
    AttentionState.zeros(FM, 5).save(path)
    for match in ("did not write", "cannot be read"):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=match):
            stream_attention(q, k, v, FM, np.empty((10, 5)), checkpoint=path)
        assert path.read_bytes() == before
        path.write_bytes(before[:-9])


@each_causal
def test_other_first_chunks_are_refused(each_chunk, tmp_path, causal):
    """One step is done: its keys, or its queries and what was written for them, are compared."""
    path = tmp_path / "checkpoint"
    q, k, v = random_inputs(100)
    out = np.zeros((100, 5))
    options = {"causal": causal, "chunk_size": 30, "checkpoint": path}
    with pytest.raises(Stop):
        stream_attention(q, Broken(k, 2), v, FM, out, **options)
    assert storage.read(path)[1]["done"] == 1
    before = path.read_bytes()
    for which in range(3 if causal else 2):
        arrays = [q, k.copy(), v.copy(), out.copy()]
        arrays[which + 1][3] += 1
        with pytest.raises(ValueError, match="no longer hold"):
            stream_attention(*arrays[:3], FM, arrays[3], **options)
        assert path.read_bytes() == before
    stream_attention(q, k, v, FM, out, **options)
    assert relative_error(out, favor_attention(q, k, v, FM, causal=causal)) < 1e-13


@each_causal
def test_forged_checkpoints_are_refused(each_chunk, tmp_path, causal):
    """Their extra says what no run would, or their state is another one's."""
    path = tmp_path / "checkpoint"
    call = interrupted(path, causal, 7 if causal else 5)
    parts, extra = storage.read(path)
    out, steps = call["out"].copy(), 4 if causal else 8
    assert extra["done"] < steps
    fewer = parts._replace(lengths=parts.lengths - 1)
    wide = AttentionState.zeros(FM, 6, 2, dtype=np.float32)
    other = AttentionState.zeros(FeatureMap.from_projection(draw(17, 6, seed=1)), 5, 2)
    single = AttentionState.zeros(FM, 5, 1, dtype=np.float32)
    double = AttentionState.zeros(FM, 5, 2, dtype=np.float64)
    packed = AttentionState.zeros(FM, 5, 2, dtype=np.float32, sequences=1)
    fading = AttentionState.zeros(FM, 5, 2, dtype=np.float32, decay=[0.5, 0.6])
    forged = [
        *((parts, {n: x for n, x in extra.items() if n != lost}) for lost in extra),
        *(
            (parts, extra | {"done": done})
            for done in (None, "3", 2.0, True, -1, steps + 1, 10**30, [1])
        ),
        *((parts, extra | {"digests": digests}) for digests in (None, [], "x", {}, {"q": 1})),
        *((parts, extra | {"stream_attention": whose}) for whose in (None, [], {})),
        (fewer, extra),
        (parts, extra | {"done": 0}),
        (parts, extra | {"done": 1}),
        *(
            (storage.Parts(*state.__reduce__()[1])._replace(lengths=parts.lengths), extra)
            for state in (wide, other, single, double, packed, fading)
        ),
    ]
    for wrong, about in forged:
        if wrong.batch_shape == (1,):
            wrong = wrong._replace(lengths=parts.lengths[:1])
        storage.write(path, wrong, about)
        with pytest.raises(ValueError, match="does not belong to this call") as caught:
            stream_attention(**call)
        assert caught.type is ValueError
        assert np.array_equal(call["out"], out)
    storage.write(path, parts, extra)
    stream_attention(**call)
    expected = favor_attention(call["q"], call["k"], call["v"], FM, causal=causal)
    assert relative_error(call["out"], expected) < 1e-5


def test_the_state_of_a_checkpoint_of_nothing_is_not_believed(tmp_path):
    """It says that nothing was folded: so the run begins with nothing."""
    path = tmp_path / "checkpoint"
    call = interrupted(path, reads=2)
    parts, extra = storage.read(path)
    assert extra["done"] == 0
    storage.write(path, parts._replace(s=parts.s + 1, z=parts.z + 1, c=parts.c * 0), extra)
    stream_attention(**call)
    expected = favor_attention(call["q"], call["k"], call["v"], FM)
    assert relative_error(call["out"], expected) < 1e-5


def test_the_state_of_a_checkpoint_can_be_loaded(each_chunk, tmp_path):
    path = tmp_path / "checkpoint"
    call = interrupted(path, causal=True, reads=7)  # each chunk is read twice: once to be hashed
    parts, extra = storage.read(path)
    assert extra["done"] == 3
    state = AttentionState.load(path)
    expected = AttentionState.zeros(FM, 5, 2, dtype=np.float32)
    expected.update(call["k"][:, :90], call["v"][:, :90])
    assert parts.value_dim == 5
    assert np.allclose(state.attend(call["q"]), expected.attend(call["q"]), atol=1e-5)


def test_out_is_flushed_before_the_checkpoint_says_so(each_chunk, tmp_path):
    path = tmp_path / "checkpoint"
    seen = []

    class Watched(OnDisk):
        def flush(self):
            written = np.isfinite(self.array[:, 0]).sum() // 30
            seen.append((storage.read(path)[1]["done"], written))

    out = Watched(np.full((90, 5), np.nan))
    stream_attention(*random_inputs(90), FM, out, causal=True, chunk_size=30, checkpoint=path)
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 3)]


def test_a_short_run_writes_its_checkpoint_once(tmp_path):
    """Not after every chunk, unless it takes long."""
    path = tmp_path / "checkpoint"
    call = interrupted(path, reads=2)
    assert storage.read(path)[1]["done"] == 0
    stream_attention(**call)
    expected = favor_attention(call["q"], call["k"], call["v"], FM)
    assert relative_error(call["out"], expected) < 1e-5


@each_causal
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("reads", [0, 1, 3, 6, 7])
def test_an_interrupt_writes_the_checkpoint(tmp_path, causal, error, reads):
    """Whenever it comes: what was done is not lost, and nothing counts twice."""
    path = tmp_path / "checkpoint"
    q, k, v = random_inputs(100, lead=(2,), dtype=np.float32)
    whole, out = np.empty((2, 100, 5), np.float32), np.zeros((2, 100, 5), np.float32)
    options = {"feature_map": FM, "causal": causal, "chunk_size": 30}
    stream_attention(q, k, v, out=whole, **options)

    class Interrupted(Broken):
        def __getitem__(self, index):
            try:
                return super().__getitem__(index)
            except Stop:
                self.reads = 10**6  # once
                raise error from None

    interrupted = {"q": Interrupted(q, reads - 4), "k": k, "v": v}
    if causal or reads < 4:
        interrupted = {"q": q, "k": Interrupted(k, reads % 4), "v": v}
    with pytest.raises(error):
        stream_attention(**interrupted, out=out, checkpoint=path, **options)
    assert storage.read(path)[1]["done"] == (reads % 4 if causal else reads)
    stream_attention(q, k, v, out=out, checkpoint=path, **options)
    assert np.array_equal(out, whole)


def test_mapped_files_are_found_behind_views(tmp_path):
    mapped = np.memmap(tmp_path / "file", np.float32, "w+", shape=(4, 6))
    for view in (mapped, mapped[1:], mapped.T, np.asarray(mapped).reshape(2, 2, 6)[:, 1:]):
        assert streaming._mapped(view)._mmap is mapped._mmap
    for other in (mapped + 1, np.ones(3), OnDisk(np.ones(3)), None):
        assert streaming._mapped(other) is None


RUN = """
    import os, signal, sys, threading
    import numpy as np
    from favor_np import feature_map, storage, stream_attention
    from support.tuning import tuned

    fm = feature_map("positive", dim=8, num_features=64)
    q, k, v = (np.load(name + ".npy", mmap_mode="r") for name in "qkv")
    out = np.load(sys.argv[1] + ".npy", mmap_mode="r+")
    causal, target = sys.argv[2] == "causal", float(sys.argv[3])
    write, killer = storage.write, threading.Thread(
        target=lambda: os.kill(os.getpid(), signal.SIGKILL)
    )

    def writing(path, parts, extra):
        write(path, parts, extra)
        if extra["done"] >= target and killer.ident is None:
            killer.start()  # whatever this thread is at when the other one comes to it
        if extra["done"] >= target + 20:
            killer.join()

    storage.write = writing
    checkpoint = sys.argv[1] + ".checkpoint"
    with tuned(CHECKPOINT_SECONDS=0.0):
        stream_attention(q, k, v, fm, out, causal=causal, chunk_size=500, checkpoint=checkpoint)
"""


def run(folder, name, causal, kill_at=np.inf):
    """Run to the end, or until so many steps are done; how it ended."""
    arguments = name, "causal" if causal else "both", str(kill_at)
    command = [sys.executable, "-c", textwrap.dedent(RUN), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(), timeout=HANG, check=False
    ).returncode


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@each_causal
def test_killed_and_resumed(tmp_path, causal):
    """Killed three times in the middle, each time further on: the bytes are the same."""
    rng = np.random.default_rng(0)
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((2, 100_000, 8), np.float32))
    for name in ("whole", "out"):
        np.save(tmp_path / f"{name}.npy", np.full((2, 100_000, 8), np.nan, np.float32))
    assert run(tmp_path, "whole", causal) == 0
    checkpoint = tmp_path / "out.checkpoint"
    steps = 200 if causal else 400
    for target in (0.05, 0.2, 0.4):
        assert run(tmp_path, "out", causal, target * steps) == -signal.SIGKILL
        done = storage.read(checkpoint)[1]["done"]
        assert target * steps <= done < steps
    assert run(tmp_path, "out", causal) == 0
    assert not checkpoint.exists()
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@each_causal
def test_interrupted_again_and_again(tmp_path, causal):
    """By Ctrl-C at any moment, in the midst of writing a checkpoint too: the bytes are the same."""
    python(
        f"""
        import os, signal, sys, zipfile
        import numpy as np
        from favor_np import feature_map, stream_attention
        from favor_np.cpu import threads
        from support.tuning import tuned

        def complain(report, hook=sys.unraisablehook):
            if report.object is not zipfile.ZipFile.__del__:  # of one interrupted as it was made
                hook(report)

        sys.unraisablehook = complain
        fm = feature_map("positive", dim=8, num_features=64)
        q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6000, 8), np.float32)
        whole, out = np.zeros_like(q), np.zeros_like(q)

        def run(out, path):
            with tuned(CHECKPOINT_SECONDS=0.0):
                stream_attention(q, k, v, fm, out, causal={causal}, chunk_size=100, checkpoint=path)

        def interrupt(number, frame):
            raise KeyboardInterrupt

        run(whole, "whole")
        signal.signal(signal.SIGALRM, interrupt)
        interrupts = 0
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.011 + 0.0037 * (interrupts % 7 + interrupts // 7))
                run(out, "checkpoint")
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts > 3, interrupts
        assert np.array_equal(out, whole)
        assert threads.POOL._active == 0
        assert not os.path.exists("checkpoint")
        """,
        cwd=tmp_path,
    )


# -- Memory, progress -----------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set")
@each_causal
def test_memory_is_bounded(tmp_path, causal):
    """Four files of 64 MB, in a process that grows by less than one of them."""
    grown = python(
        """
        import numpy as np
        from favor_np import feature_map, stream_attention
        from favor_np.measure import peak_memory
        causal = CAUSAL
        fm = feature_map("positive", dim=16, num_features=32)
        x = np.zeros((2, 10_000, 16), np.float32)
        q, k, v, out = (
            np.memmap(name, np.float32, "w+", shape=(2, 500_000, 16)) for name in "qkvo"
        )
        stream_attention(x, x, x, fm, np.empty_like(x), causal=causal)
        print(peak_memory(
            lambda: stream_attention(q, k, v, fm, out, causal=causal, chunk_size=10_000)
        ))
        """.replace("CAUSAL", str(causal)),
        cwd=tmp_path,
    )
    assert int(grown) < 64e6


def test_pages_written_to_a_copy_on_write_map_are_kept(tmp_path):
    q, k, v = random_inputs(5000)
    np.save(tmp_path / "out.npy", np.zeros((5000, 5)))
    out = np.load(tmp_path / "out.npy", mmap_mode="c")
    stream_attention(q, k, v, FM, out, chunk_size=512)
    assert relative_error(out, favor_attention(q, k, v, FM)) < 1e-13


@each_causal
def test_progress(causal):
    q, k, v = random_inputs(100)
    out, seen = np.empty((100, 5)), []
    stream_attention(
        q, k, v, FM, out, causal=causal, chunk_size=60, progress=lambda *x: seen.append(x)
    )
    total = 100 if causal else 200
    done = [60, 100] if causal else [60, 100, 160, 200]
    assert seen == [("attention", count, total) for count in done]


def test_progress_of_a_run_that_is_continued(tmp_path):
    q, k, v = random_inputs(100)
    out, seen = np.memmap(tmp_path / "out", np.float64, "w+", shape=(100, 5)), []

    def stop_in_the_middle(*step):
        seen.append(step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    options = {"causal": True, "chunk_size": 30, "checkpoint": tmp_path / "checkpoint"}
    with pytest.raises(KeyboardInterrupt):
        stream_attention(q, k, v, FM, out, progress=stop_in_the_middle, **options)
    stream_attention(q, k, v, FM, out, progress=lambda *step: seen.append(step), **options)
    assert [done for _, done, _ in seen] == [30, 60, 90, 100]
    assert relative_error(out, favor_attention(q, k, v, FM, causal=True)) < 1e-13


def test_progress_in_a_bar(capsys):
    q, k, v = random_inputs(100)
    stream_attention(q, k, v, FM, np.empty((100, 5)), chunk_size=30, progress=True)
    assert "attention: 100%" in capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    q, k, v = random_inputs(100)
    out = np.full((100, 5), np.nan)
    with pytest.raises(ImportError, match=r"tqdm: pip install 'favor_np\[progress\]'"):
        stream_attention(q, k, v, FM, out, progress=True)
    assert np.isnan(out).all()
