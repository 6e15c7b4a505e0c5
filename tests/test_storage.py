"""AttentionState.save and load: the same bits, or a clear refusal; the old file or the new one."""

import gc
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.child import python
from support.inputs import draw, random_inputs
from support.parameters import each_dtype, each_map

import favor_np
from favor_np import AttentionState, FeatureMap, favor_attention


def folded(fm, *lead, dtype=np.float64, length=70):
    _, k, v = random_inputs(length, lead=lead, dtype=dtype)
    return AttentionState.zeros(fm, value_dim=5, batch_shape=lead, dtype=dtype).update(k, v)


def saved(tmp_path, state, name="state"):
    path = tmp_path / name
    state.save(path)
    return path


def arrays(state):
    return (state.c, state.S, state.z)


def assert_equal(loaded, state):
    assert loaded.feature_map == state.feature_map
    assert loaded.feature_map.projection.dtype == state.feature_map.projection.dtype
    assert (loaded.value_dim, loaded.batch_shape) == (state.value_dim, state.batch_shape)
    assert loaded.dtype == state.dtype
    assert loaded.dtype.isnative
    for x, y in zip(arrays(loaded), arrays(state), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)


# -- The same bits --------------------------------------------------------------------------------


@each_map
@each_dtype
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("lead", [(3,), (2, 3), (0, 3)])
def test_round_trip(tmp_path, options, dtype, heads, lead):
    W = draw(17, 6) if heads is None else draw(heads, 17, 6)
    fm = FeatureMap.from_projection(W.astype(dtype), scale=1 / 3, kernel_epsilon=0.1, **options)
    state = folded(fm, *lead, dtype=dtype)
    assert_equal(AttentionState.load(saved(tmp_path, state)), state)


def test_round_trip_without_batch_or_keys(tmp_path):
    state = AttentionState.zeros(FeatureMap.from_projection(draw(17, 6)), value_dim=5)
    assert_equal(AttentionState.load(saved(tmp_path, state)), state)


def again_from_file(state, tmp_path):
    return AttentionState.load(saved(tmp_path, state))


def again_from_pickle(state, tmp_path):
    return pickle.loads(pickle.dumps(state))


@each_map
@each_dtype
@pytest.mark.parametrize("again", [again_from_file, again_from_pickle])
@pytest.mark.parametrize("rows", [16, 17, 70])
def test_continues_with_the_same_bits(tmp_path, options, dtype, again, rows):
    """Keys of very different lengths too: they move exponents, and cut chunks."""
    fm = FeatureMap.from_projection(draw(rows, 6, dtype=dtype), **options)
    state = folded(fm, 2, dtype=dtype)
    q, k, v = random_inputs(100, lead=(2,), seed=1, dtype=dtype)
    k *= np.exp(draw(2, 100, 1, seed=2)).astype(dtype)
    twin = again(state, tmp_path)
    for part in (slice(0, 1), slice(1, 60), slice(60, 100)):
        expected, _ = favor_attention(
            q[:, part], k[:, part], v[:, part], fm, causal=True, state=state, return_state=True
        )
        out, _ = favor_attention(
            q[:, part], k[:, part], v[:, part], fm, causal=True, state=twin, return_state=True
        )
        assert np.array_equal(out, expected)
        for s in (state, twin):
            s.update(k[:, part], v[:, part])
        assert_equal(twin, state)
        assert np.array_equal(twin.attend(q), state.attend(q))
    for t in range(20):
        token = q[:, t], k[:, t], v[:, t]
        assert np.array_equal(twin.step(*token), state.step(*token))
    assert_equal(twin, state)


def test_padding_moves_no_exponents(tmp_path):
    """A long key before short ones: padding must not move the exponents of all."""
    fm = FeatureMap.from_projection(draw(17, 6))
    state = folded(fm, dtype=np.float32)
    q, k, v = random_inputs(64, seed=1, dtype=np.float32)
    k[0] *= 10
    twin = AttentionState.load(saved(tmp_path, state))
    out, twin = favor_attention(q, k, v, fm, causal=True, state=twin, return_state=True)
    expected, state = favor_attention(q, k, v, fm, causal=True, state=state, return_state=True)
    assert np.array_equal(out, expected)
    assert_equal(twin, state)


@each_map
@each_dtype
@pytest.mark.parametrize("again", [again_from_file, again_from_pickle])
def test_masked_tokens_fade_it(tmp_path, options, dtype, again):
    """Only masked keys after it was loaded: they count as time, whatever the padding holds."""
    fm = FeatureMap.from_projection(draw(17, 6, dtype=dtype), **options)
    _, k, v = random_inputs(9, lead=(2,), dtype=dtype)
    state = AttentionState(fm, 5, 2, decay=[0.3, 0.9], dtype=dtype).update(k, v)
    twin = again(state, tmp_path)
    for s in (state, twin):
        s.update(k, v, np.zeros(9, bool))
    assert_equal(twin, state)


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    state = folded(FeatureMap.from_projection(draw(17, 6)))
    state.update(np.full((1, 6), np.nan), np.ones((1, 5)))
    loaded = AttentionState.load(saved(tmp_path, state))
    for x, y in zip(arrays(loaded), arrays(state), strict=True):
        assert np.array_equal(x, y, equal_nan=True)
    assert np.isnan(loaded.z).any()


def test_the_file(tmp_path):
    """What the format promises to other readers; and no suffix, no other file."""
    fm = FeatureMap.from_projection(draw(17, 6), scale=0.1)
    state = folded(fm, 2)
    path = tmp_path / "no suffix"
    state.save(str(path))
    assert os.listdir(tmp_path) == ["no suffix"]
    with np.load(path, allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        for name in ("c", "S", "z"):
            assert np.array_equal(file[name], getattr(state, name))
        assert np.array_equal(file["projection"], fm.projection)
    assert header["format"] == "favor_np.AttentionState"
    assert header["version"] == 3
    assert float.fromhex(header["scale"]) == 0.1
    assert header["fingerprint"] == fm.fingerprint
    assert header["favor_np"] == favor_np.__version__
    with zipfile.ZipFile(path) as file:
        for name in ("projection", "c", "S", "z"):
            assert b"'descr': '<" in file.read(f"{name}.npy")
    before = path.read_bytes()
    state.save(path)
    assert path.read_bytes() == before


def test_saving_through_a_link_keeps_the_link(tmp_path):
    state = folded(FeatureMap.from_projection(draw(17, 6)))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    state.save(link)
    assert link.is_symlink()
    assert_equal(AttentionState.load(tmp_path / "target"), state)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_saving_keeps_the_mode_of_a_file(tmp_path, umask):
    """A secret stays one; a new file has the mode that the umask leaves."""
    state = folded(FeatureMap.from_projection(draw(17, 6)))
    path, link = tmp_path / "state", tmp_path / "link"
    before = os.umask(umask)
    try:
        state.save(path)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        link.symlink_to(path)
        for mode in (0o600, 0o640, 0o666, 0o400, 0o755):
            path.chmod(mode)
            for way in (path, link):
                state.save(way)
                assert path.stat().st_mode & 0o777 == mode
        if os.geteuid() == 0:
            os.chown(path, 12345, 54321)
            state.save(path)
            assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)
    finally:
        os.umask(before)
    assert_equal(AttentionState.load(path), state)


# -- Refused --------------------------------------------------------------------------------------


def test_damaged_files_are_refused(tmp_path):
    """Cut anywhere, it is refused; with any byte changed, refused or not worse for it."""
    state = folded(FeatureMap.from_projection(draw(2, 6)), dtype=np.float32)
    path = saved(tmp_path, state)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cannot be read as an AttentionState"):
            AttentionState.load(path)
    refused = 0
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            loaded = AttentionState.load(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            assert_equal(loaded, state)
            refused += "local header" in region(data, at)
    assert refused > 0.9 * len(data)


def region(data, at):
    """Say where a byte is: zip keeps times and sizes twice, and reads one of them."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for info in file.infolist():
            if info.header_offset <= at < info.header_offset + 80:
                return "local header"
    return "elsewhere"


def rewrite(path, edit=None, drop=(), /, **entries):
    """Change the header, or whole entries, of a file; its checksums are right again."""
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files if name not in drop}
    if edit is not None:
        changed = edit(json.loads(kept["header"].tobytes()))
        kept["header"] = np.frombuffer(json.dumps(changed).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, **(kept | entries))


WRONG = {
    "newer": (
        {"header": lambda h: h | {"version": 5, "favor_np": "9.1"}},
        r"written by a newer favor_np \(9.1\).*version 5.*up to 4",
    ),
    "no version": ({"header": lambda h: h | {"version": None}}, "version must be an integer"),
    "other format": ({"header": lambda h: h | {"format": "model"}}, "format"),
    "header is a list": ({"header": lambda h: [h]}, "format"),
    "header is no JSON": ({"entries": {"header": np.full(9, 65, np.uint8)}}, "Expecting value"),
    "no header": ({"drop": ["header"]}, "lacks 'header.npy'"),
    "no S": ({"drop": ["S"]}, "must have the entries .*'S.npy'"),
    "another entry": ({"entries": {"bias": np.ones(17)}}, "must have the entries .*got .*'bias.npy'"),
    "no dtype": ({"header": lambda h: {n: h[n] for n in h if n != "dtype"}}, "lacks 'dtype'"),
    "half": ({"header": lambda h: h | {"dtype": "float16"}}, "dtype must be float32 or float64"),
    "other dtype": ({"header": lambda h: h | {"dtype": "float32"}}, "c must have dtype <i4"),
    "value_dim": ({"header": lambda h: h | {"value_dim": 6}}, r"S must have shape \(2, 17, 6\)"),
    "value_dim 0": ({"header": lambda h: h | {"value_dim": 0}}, "value_dim must be at least 1"),
    "value_dim 5.0": ({"header": lambda h: h | {"value_dim": 5.0}}, "value_dim must be an integer"),
    "batch": ({"header": lambda h: h | {"batch_shape": [10**15]}}, "c must have shape"),
    "batch -1": ({"header": lambda h: h | {"batch_shape": [-1]}}, "batch_shape must be at least 0"),
    "batch 2": ({"header": lambda h: h | {"batch_shape": 2}}, "not iterable"),
    "kind": ({"header": lambda h: h | {"kind": "cosine"}}, "kind must be one of"),
    "trig": ({"header": lambda h: h | {"kind": "trig"}}, "feature map"),
    "scale nan": ({"header": lambda h: h | {"scale": "nan"}}, "scale must be finite"),
    "scale inf": ({"header": lambda h: h | {"scale": "0x1p9999"}}, "too large"),
    "scale number": ({"header": lambda h: h | {"scale": 0.5}}, "argument"),
    "other scale": ({"header": lambda h: h | {"scale": (0.5).hex()}}, "fingerprint"),
    "antithetic": ({"header": lambda h: h | {"antithetic": 1}}, "antithetic must be True or False"),
    "epsilon": ({"header": lambda h: h | {"kernel_epsilon": "-0x1p0"}}, "kernel_epsilon must be"),
    "extra": ({"header": lambda h: h | {"extra": 3}}, "mapping"),
    "projection": ({"entries": {"projection": draw(17, 6, seed=9)}}, "fingerprint"),
    "infinite": ({"entries": {"projection": np.full((17, 6), np.inf)}}, "projection must be finite"),
    "per head": ({"entries": {"projection": draw(3, 17, 6)}}, "fingerprint"),
    "shape of z": ({"entries": {"z": np.zeros((2, 16))}}, r"z must have shape \(2, 17\), got"),
    "fortran": ({"entries": {"z": np.zeros((17, 2)).T}}, "z must have dtype"),
    "big-endian": ({"entries": {"z": np.zeros((2, 17), ">f8")}}, "z must have dtype <f8, got >f8"),
    "objects": ({"entries": {"z": np.full((2, 17), None)}}, r"z must have dtype <f8, got \|O"),
    "object header": ({"entries": {"header": np.array([{}])}}, r"header must have dtype \|u1"),
    "lengths": ({"entries": {"lengths": np.zeros(3, np.int64)}}, r"lengths must have shape \(2,\)"),
    "negative rates": ({"entries": {"rates": np.array([0.1, -0.1])}}, "rates must be those of a decay"),
    "large rates": ({"entries": {"rates": np.array([0.1, 1e300])}}, "rates must be those of a decay"),
    "rates nan": ({"entries": {"rates": np.array([0.1, np.nan])}}, "rates must be those of a decay"),
    "negative lengths": ({"entries": {"lengths": np.array([3, -1])}}, "lengths must be from 0 to"),
    "large lengths": ({"entries": {"lengths": np.array([3, 2**63 - 1])}}, "lengths must be from 0 to"),
    "high exponents": ({"entries": {"c": np.full((2, 17), 2**63 - 1)}}, "c must be from -4611"),
    "low exponents": ({"entries": {"c": np.full((2, 17), -(2**63))}}, "c must be from -4611"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files_are_refused(tmp_path, change, message):
    path = saved(tmp_path, folded(FeatureMap.from_projection(draw(17, 6)), 2))
    rewrite(path)
    AttentionState.load(path)  # so it is the change that is refused
    entries = change.get("entries", {})
    rewrite(path, change.get("header"), change.get("drop", ()), **entries)
    with pytest.raises(ValueError, match=message) as caught:
        AttentionState.load(path)
    assert str(path) in str(caught.value)


def test_a_map_for_other_heads_is_refused(tmp_path):
    """All but batch_shape is consistent: no array has an entry."""
    path = saved(tmp_path, folded(FeatureMap.from_projection(draw(3, 17, 6)), 0, 3))
    empty = {name: np.zeros((0, 2, 17)) for name in ("c", "z")} | {"S": np.zeros((0, 2, 17, 5))}
    rewrite(path, lambda h: h | {"batch_shape": [0, 2]}, **empty)
    with pytest.raises(ValueError, match=r"does not fit a state of batch_shape \(0, 2\)"):
        AttentionState.load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign"
    with path.open("wb") as file:
        np.savez(file, weights=np.ones(3))
    with pytest.raises(ValueError, match=r"foreign cannot be read .* lacks 'header.npy'"):
        AttentionState.load(path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match=r"foreign cannot be read .* not a zip file"):
        AttentionState.load(path)
    path.write_bytes(pickle.dumps(folded(FeatureMap.from_projection(draw(17, 6)))))
    with pytest.raises(ValueError, match=r"foreign cannot be read .* not a zip file"):
        AttentionState.load(path)


def test_pickled_objects_are_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = saved(tmp_path, folded(FeatureMap.from_projection(draw(17, 6)), 2))
    for name in ("header", "projection", "c", "S", "z", "rates", "lengths"):
        bomb = np.empty((2, 17), object)
        bomb[:] = Bomb()
        rewrite(path, **{name: bomb})
        with pytest.raises(ValueError, match=f"{name} must have dtype"):
            AttentionState.load(path)
        path = saved(tmp_path, folded(FeatureMap.from_projection(draw(17, 6)), 2))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["header", "projection", "c", "S", "z", "rates", "lengths"])
def test_nothing_is_allocated_for_a_lie(tmp_path, name):
    """An entry that says it has 10**12 rows, and one that unpacks to far more than the file."""
    path = saved(tmp_path, folded(FeatureMap.from_projection(draw(17, 6)), 2))
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    entry = f"{name}.npy"
    huge = io.BytesIO()
    dtype = {"header": "|u1", "c": "<i8", "lengths": "<i8"}.get(name, "<f8")
    np.lib.format.write_array_header_1_0(
        huge, {"descr": dtype, "fortran_order": False, "shape": (2, 10**12)}
    )
    with zipfile.ZipFile(path, "w") as file:
        for each, data in entries.items():
            file.writestr(each, huge.getvalue() if each == entry else data)
    with pytest.raises(ValueError, match=f"{name} must have"):
        AttentionState.load(path)
    with zipfile.ZipFile(path, "w") as file:
        for each, data in entries.items():
            packed = zipfile.ZIP_DEFLATED if each == entry else zipfile.ZIP_STORED
            file.writestr(each, data, packed)
    with pytest.raises(ValueError, match=f"{name} must not be compressed"):
        AttentionState.load(path)


def test_other_faults_pass_through(tmp_path):
    state = folded(FeatureMap.from_projection(draw(17, 6)))
    with pytest.raises(FileNotFoundError):
        AttentionState.load(tmp_path / "missing")
    with pytest.raises((IsADirectoryError, PermissionError)):  # Windows says the latter
        AttentionState.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        state.save(tmp_path / "no such folder" / "state")
    with pytest.raises(ValueError, match="path must be a regular file"):
        state.save(tmp_path)
    with pytest.raises(ValueError, match="path must be a regular file"):
        state.save(os.devnull)
    for path in (3, None, b"state"):
        with pytest.raises(TypeError, match="path must be a str or"):
            state.save(path)
        with pytest.raises(TypeError, match="path must be a str or"):
            AttentionState.load(path)
    assert os.listdir(tmp_path) == []


# -- Whole or not at all --------------------------------------------------------------------------

MAKE = """
    import numpy as np, os, sys
    from favor_np import AttentionState, FeatureMap
    fm = FeatureMap.from_projection(np.ones((64, 8)))
    def make(number, batch=8):
        x = np.full((batch, 1, 8), number / 1000)
        return AttentionState.zeros(fm, 8, batch).update(x, x)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_kill_leaves_the_old_or_the_new_file(tmp_path):
    """The number that a state reads never goes back, and every file can be read."""
    path = tmp_path / "state"
    code = (
        MAKE
        + """
    for number in range(int(sys.argv[1]), 1000):
        make(number).save("state")
        print(number, flush=True)
    """
    )
    number = 0
    for turn in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(number + 1)],
            stdout=subprocess.PIPE, cwd=tmp_path, text=True,
        )  # fmt: skip
        try:
            for line in itertools.islice(process.stdout, 3 + 5 * turn):
                told = int(line)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        state = AttentionState.load(path)
        number = round(1000 * state.attend(np.ones((8, 1, 8)))[0, 0, 0])
        assert number >= told
    left = [name for name in os.listdir(tmp_path) if name != "state"]
    assert len(left) <= 6  # a kill can leave its one temporary file


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    out = python(
        MAKE
        + """
    import errno, resource
    make(1).save("state")
    before = open("state", "rb").read()
    for limit in (0, 1, 1000, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for number, batch in ((2, 8), (3, 100)):
            try:
                make(number, batch).save("state")
            except OSError as error:
                assert (error.errno, error.filename) == (errno.EFBIG, "state")
            else:
                raise AssertionError(limit)
            assert os.listdir() == ["state"]
            assert open("state", "rb").read() == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    make(2).save("state")
    assert open("state", "rb").read() != before
    print("done")
    """,
        cwd=tmp_path,
    )
    assert out == "done\n"


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_no_permission():
    """In a folder that one may read and not write; root becomes somebody else."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        out = python(
            MAKE
            + """
    make(1).save("state")
    os.chmod("state", 0o644)
    make(1).save("secret")
    os.chmod("secret", 0)
    os.chmod(".", 0o555)
    if os.geteuid() == 0:
        os.setuid(65534)
    before = open("state", "rb").read()
    for call in (make(2).save, AttentionState.load):
        for path in ("state", "new") if call != AttentionState.load else ("secret",):
            try:
                call(path)
            except PermissionError:
                pass
            else:
                raise AssertionError(path)
    assert open("state", "rb").read() == before
    print(sorted(os.listdir()))
    """,
            cwd=folder,
        )
        os.chmod(folder, 0o700)
        assert out == "['secret', 'state']\n"


OLD = Path(__file__).parent / "data" / "states"


@pytest.mark.parametrize("name", ["plain", "float64", "decay", "calibrated", "relu", "packed"])
def test_files_of_older_versions_go_on(name):
    """Written at 5741c2f, when states held nothing beside (c, S, z): versions 1 and 2."""
    state, answers = AttentionState.load(OLD / f"{name}.state"), np.load(OLD / "answers.npz")
    q, k, v = (answers[x] for x in "qkv")
    if name == "packed":
        assert np.array_equal(state.lengths, [13, 17])
        found = state.attend(q[0, :4], cu_seqlens=[0, 2, 4])
        assert np.allclose(found, answers[name], rtol=1e-5, atol=1e-6)
        return
    assert np.array_equal(state.lengths, [30, 30])
    found = np.stack([state.attend(q[:, i : i + 1])[:, 0] for i in range(5)], axis=1)
    assert np.allclose(found, answers[name], rtol=1e-5, atol=1e-6)
    steps = np.stack([state.step(q[:, i], k[:, i], v[:, i]) for i in range(30, 40)], axis=1)
    assert np.allclose(steps, answers[f"{name}_steps"], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_of_an_archive_stays_an_interrupt(tmp_path, monkeypatch):
    """While an entry is closed: zipfile raises a ValueError of its own in place of it."""

    def interrupted(self):
        raise KeyboardInterrupt

    state = folded(FeatureMap.from_projection(draw(17, 6)), 2)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile._ZipWriteFile, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            state.save(tmp_path / "state")
        gc.collect()
    assert os.listdir(tmp_path) == []
