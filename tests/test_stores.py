"""stream_attention into files of other libraries: killed, opened again, continued; or refused."""

import os
import signal
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest
import tensorstore
import zarr
from support import child
from support.inputs import random_inputs
from support.tolerance import relative_error

with warnings.catch_warnings():  # of NumPy's, about the version it was built with
    warnings.simplefilter("ignore", RuntimeWarning)
    import netCDF4

from favor_np import favor_attention, feature_map, storage, stream_attention

SHAPE = (2, 1000, 8)
FM = feature_map("positive", dim=8, num_features=64)


def inputs(seed=0):
    heads, length, dim = SHAPE
    return random_inputs(length, dim, dim, (heads,), seed=seed, dtype=np.float32)


# -- The same array in every kind of file -----------------------------------------------------------


def in_hdf5(path, name="out", **options):
    data = {n: options.pop(n) for n in ("chunks", "compression", "dtype") if n in options}
    file = h5py.File(path, "a", **options)
    return file.require_dataset(name, SHAPE, data.pop("dtype", "f4"), **data)


def in_netcdf(path, format="NETCDF4", group="/", **options):
    if path.exists():
        return netCDF4.Dataset(path, "a")[f"{group}/out"]
    file = netCDF4.Dataset(path, "w", format=format)
    for name, size in zip("hld", SHAPE, strict=True):
        file.createDimension(name, size)
    where = file if group == "/" else file.createGroup(group)
    with warnings.catch_warnings():  # that the dtype is not what endian= says: it is not to be
        warnings.simplefilter("ignore", UserWarning)
        return where.createVariable("out", "f4", tuple("hld"), **options)


def in_zarr(path, dtype="f4"):
    if path.exists():
        return zarr.open_array(path, mode="r+")
    return zarr.create_array(path, shape=SHAPE, dtype=dtype, chunks=(1, 170, 8))


def in_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    options = {"dtype": tensorstore.float32, "shape": SHAPE, "open": True, "create": True}
    return tensorstore.open(spec, **options).result()


def mapped(path, dtype="f4"):
    return np.lib.format.open_memmap(path, "r+" if path.exists() else "w+", dtype, SHAPE)


KINDS = {
    "hdf5": in_hdf5,
    "hdf5 in small chunks": lambda path: in_hdf5(path, chunks=(1, 7, 4), compression="gzip"),
    "hdf5 in a group": lambda path: in_hdf5(path, "a/b"),
    "hdf5 big-endian": lambda path: in_hdf5(path, dtype=">f4"),
    "netcdf": in_netcdf,
    "netcdf in small chunks": lambda path: in_netcdf(path, zlib=True, chunksizes=(1, 7, 4)),
    "netcdf in a group": lambda path: in_netcdf(path, group="a"),
    "netcdf big-endian": lambda path: in_netcdf(path, endian="big"),
    "netcdf 3": lambda path: in_netcdf(path, "NETCDF3_64BIT_OFFSET"),
    "zarr": in_zarr,
    "zarr big-endian": lambda path: in_zarr(path, ">f4"),
    "tensorstore": in_tensorstore,
    "memmap": mapped,
}

KILLED = """
import contextlib, os, signal, sys
from pathlib import Path
from favor_np import stream_attention
from support.tuning import tuned

kind, folder, causal = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "causal"
tunings = contextlib.ExitStack()

class Killing:
    shape, dtype, reads = SHAPE, "f4", 0

    def __init__(self, array):
        self.array = array

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 6:  # from now on nothing is flushed
            tunings.enter_context(tuned(CHECKPOINT_SECONDS=1e9))
        if self.reads == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.array[index]

q, k, v = inputs()
out = KINDS[kind](folder / "out")
if causal:
    k = Killing(k)
else:
    q = Killing(q)
with tuned(CHECKPOINT_SECONDS=0), tunings:
    stream_attention(
        q, k, v, FM, out, causal=causal, chunk_size=90, checkpoint=folder / "checkpoint"
    )
"""


def kill(kind, folder, causal):
    code = child.names_of(__file__) + KILLED
    process = subprocess.run(
        [sys.executable, "-c", code, kind, folder, "causal" if causal else "both"],
        env=child.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("kind", "causal"), [("hdf5", False), *((kind, i % 2 == 0) for i, kind in enumerate(KINDS))]
)
def test_killed_between_checkpoints_and_continued(kind, causal, tmp_path):
    """The file opens, what the checkpoint says is in it, and the rest is computed."""
    checkpoint = tmp_path / "checkpoint"
    kill(kind, tmp_path, causal)
    q, k, v = inputs()
    expected = np.empty_like(v)
    stream_attention(q, k, v, FM, expected, causal=causal, chunk_size=90)
    done = storage.read(checkpoint)[1]["done"] - (0 if causal else 12)
    assert 0 < done < 6
    out = KINDS[kind](tmp_path / "out")
    before = np.asarray(out[...])
    assert np.array_equal(before[:, : 90 * done], expected[:, : 90 * done])
    assert not np.array_equal(before, expected)
    stream_attention(q, k, v, FM, out, causal=causal, chunk_size=90, checkpoint=checkpoint)
    assert np.array_equal(np.asarray(out[...]), expected)
    assert not checkpoint.exists()


# -- Refused, before anything is computed ----------------------------------------------------------


def refused(out, match, path=None, error=ValueError, **changes):
    """The call is refused, and neither reads the arrays nor leaves a file."""

    class Unread:
        shape, dtype = SHAPE, np.dtype("f4")

        def __getitem__(self, index):
            raise AssertionError("read")

    arrays = dict.fromkeys("qkv", Unread()) | changes
    with pytest.raises(error, match=match):
        stream_attention(**arrays, feature_map=FM, out=out, checkpoint=path)
    assert path is None or not path.exists()


@pytest.mark.parametrize("kind", ["hdf5", "netcdf", "zarr", "tensorstore"])
def test_read_only_files(kind, tmp_path):
    path = tmp_path / "out"
    out = KINDS[kind](path)
    out[...] = np.zeros(SHAPE, np.float32)
    if kind == "hdf5":
        out.file.close()
        out = h5py.File(path)["out"]
    elif kind == "netcdf":
        out.group().close()
        out = netCDF4.Dataset(path)["out"]
    elif kind == "zarr":
        out = zarr.open_array(path, mode="r")
    else:
        out = tensorstore.open(out.spec(), read=True, write=False).result()
    refused(out, "out must be writeable", tmp_path / "checkpoint")
    refused(out, "out must be writeable")


def test_files_that_do_not_open_after_a_kill(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    for version in ("latest", "v110"):
        out = in_hdf5(tmp_path / version, libver=version)
        refused(out, "libver='latest'", checkpoint)
        q, k, v = inputs()
        stream_attention(q, k, v, FM, out)  # without a checkpoint nothing is promised
        assert relative_error(out[...], favor_attention(q, k, v, FM)) < 1e-5
    with zarr.storage.ZipStore(tmp_path / "zip", mode="w") as store:
        out = zarr.create_array(store, shape=SHAPE, dtype="f4", chunks=(2, 1000, 8))
        refused(out, "ZipStore", checkpoint)
    np.save(tmp_path / "out.npy", np.zeros(SHAPE, np.float32))
    out = np.load(tmp_path / "out.npy", mmap_mode="c")
    refused(out[:, ::1], "copy-on-write", checkpoint)


def test_wrong_dtypes(tmp_path):
    refused(in_hdf5(tmp_path / "a", dtype="f8"), "out must have dtype float32", error=TypeError)
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}}
    out = tensorstore.open(spec, create=True, dtype=tensorstore.bfloat16, shape=SHAPE).result()
    refused(out, "out must have dtype float32, got bfloat16", error=TypeError)


def test_an_output_that_is_an_input(tmp_path):
    out = in_hdf5(tmp_path / "file")
    again = out.file["out"]
    assert again is not out
    refused(out, "out must not overlap an input, got that of v", v=again)
    out = in_zarr(tmp_path / "zarr")
    refused(out, "out must not overlap an input, got that of q", q=out)


# -- What netCDF4 makes of what it reads --------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_masked_values_are_found_before_anything_is_computed(tmp_path, causal):
    """netCDF4 masks what was never written, in the last chunk here."""
    q, k, v = inputs()
    values, out = in_netcdf(tmp_path / "v"), in_hdf5(tmp_path / "out")
    values[:, :995] = v[:, :995]
    path = tmp_path / "checkpoint"
    for name in "qkv":
        arrays = {"q": q, "k": k, "v": v, name: values}
        with pytest.raises(
            TypeError, match=f"{name} has masked values in rows 900 to 1000, .*fill"
        ):
            stream_attention(
                **arrays,
                feature_map=FM,
                out=out,
                causal=causal,
                chunk_size=90 * 10,
                checkpoint=path,
            )
        assert not path.exists()
        assert not out[...].any()
    values[:, 995:] = v[:, 995:]
    stream_attention(q, k, values, FM, out, causal=causal, chunk_size=90, checkpoint=path)
    assert relative_error(out[...], favor_attention(q, k, v, FM, causal=causal)) < 1e-5


def test_masked_chunks_of_something_else():
    """What nobody could know before: the error says where, and advises what can be done."""
    q, k, v = inputs()

    class Masking:
        shape, dtype = SHAPE, np.dtype("f4")

        def __getitem__(self, index):
            return np.ma.masked_greater(v[index], 3)

    message = "v has masked values in rows 0 to 1000, .* fill them, or leave the rows out"
    with pytest.raises(TypeError, match=message) as caught:
        stream_attention(q, k, Masking(), FM, np.empty_like(v))
    assert "key_mask" not in str(caught.value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [np.float32(2**-12), np.float64(2**-12)])
def test_packed_integers(tmp_path, causal, scale):
    """They are of the dtype that they have when they are read, not of the one they are stored in."""
    file = netCDF4.Dataset(tmp_path / "file", "w")
    for name, size in zip("hld", SHAPE, strict=True):
        file.createDimension(name, size)
    arrays = []
    for name, x in zip("qkv", inputs(), strict=True):
        variable = file.createVariable(name, "i2", tuple("hld"))
        variable.scale_factor = scale
        variable[...] = x
        arrays.append(variable)
    read = [np.asarray(x[...]) for x in arrays]
    assert read[0].dtype == scale.dtype
    out = np.empty(SHAPE, scale.dtype)
    stream_attention(*arrays, FM, out, causal=causal, chunk_size=90)
    expected = favor_attention(*read, FM, causal=causal)
    assert relative_error(out, expected) < 1e-5
    file.close()


@pytest.mark.parametrize("kind", ["hdf5", "netcdf", "zarr", "tensorstore"])
def test_inputs(kind, tmp_path):
    arrays, out = inputs(), np.empty(SHAPE, np.float32)
    stored = [KINDS[kind](tmp_path / name) for name in "qkv"]
    for to, array in zip(stored, arrays, strict=True):
        to[...] = array
    for causal in (False, True):
        stream_attention(*stored, FM, out, causal=causal, chunk_size=90)
        assert relative_error(out, favor_attention(*arrays, FM, causal=causal)) < 1e-5
