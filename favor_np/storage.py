"""The file of an `AttentionState` or a `WindowState`: an npz archive, written whole or not at all.

The entry ``header`` is JSON (bytes, as an array of uint8); every other entry is an array, and all
are uncompressed and little-endian.  Nothing in a file is executed, and nothing is believed: the
sizes of entries are those of the bytes that are there, and shapes are checked before use.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np._version import __version__
from favor_np.features import Calibration, FeatureMap

Array: TypeAlias = npt.NDArray[Any]

FORMAT = "favor_np.AttentionState"
#: The same of the segment of a `WindowState`, and these entries beside.
WINDOW_FORMAT = "favor_np.WindowState"
WINDOW = ("window_k", "window_v", "window_mask", "window_log2_bias", "window_faded")
#: Raised when an older reader could no longer understand what is written: 2 has calibrated maps, 3
#: what states hold beside (c, S, z), 4 how far factors of a token each have made keys fade.
VERSION = 4
#: The largest that numbers can be: -log2 of the smallest decay; tokens, so that the sum of two
#: fits.
RATE, LONGEST = 1074.0, 2**62
ENTRIES = ("header", "projection", "c", "S", "z", "rates", "lengths")
#: In files of states that such factors have made fade.
FADE = ("fade_whole", "fade_fraction")
REST = ("S_rest", "z_rest", "tail", "tail_features", "tail_values")


class Parts(NamedTuple):
    """What defines a state, in the order of the arguments it is pickled with."""

    feature_map: FeatureMap
    value_dim: int
    batch_shape: tuple[int, ...]
    dtype: str
    c: Array
    s: Array
    z: Array
    sequences: int | None
    rates: Array | None
    lengths: Array
    rest: tuple[Array, ...] | None = None
    fade: tuple[Array, ...] | None = None


def path_of(name: str, value: str | os.PathLike[str]) -> Path:
    """Return `value` as a path; TypeError if it is none."""
    try:
        return Path(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a str or os.PathLike, got {validation.got(value)}"
        ) from None


def write(
    path: str | os.PathLike[str],
    parts: Parts,
    extra: dict[str, Any] | None = None,
    window: dict[str, Array] | None = None,
) -> None:
    """Write a state, and `extra` for its reader (anything JSON can hold), whole or not at all.

    If it is that of a `WindowState`'s segment, `window` has its tokens.
    """
    fm = parts.feature_map
    header = {
        "format": FORMAT if window is None else WINDOW_FORMAT,
        "version": 3 if parts.fade is None else VERSION,
        "favor_np": __version__,
        "dtype": np.dtype(parts.dtype).name,
        "batch_shape": parts.batch_shape,
        "value_dim": parts.value_dim,
        "sequences": parts.sequences,
        "kind": fm.kind,
        "scale": fm.scale.hex(),
        "antithetic": fm.antithetic,
        "kernel_epsilon": fm.kernel_epsilon.hex(),
        "fingerprint": fm.fingerprint,
        "extra": extra or {},
    }
    arrays: dict[str, Any] = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "projection": fm.projection,
        "c": parts.c,
        "S": parts.s,
        "z": parts.z,
        "rates": np.zeros(len(parts.lengths)) if parts.rates is None else parts.rates,
        "lengths": parts.lengths,
    }
    if fm.calibration is not None:
        parts_of_map = fm.calibration._asdict()
        arrays |= {name: array for name, array in parts_of_map.items() if array is not None}
    arrays |= zip(REST, parts.rest or (), strict=parts.rest is not None)
    if parts.fade is not None:
        arrays |= zip(FADE, parts.fade, strict=True)
    arrays |= window or {}
    for name, array in arrays.items():
        arrays[name] = np.require(array, array.dtype.newbyteorder("<"), "C")
    with replacing(path) as file:
        _write_archive(file, arrays)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Give a file to write, which takes the place of that at `path` at the end of the block.

    So a file is written whole or not at all.  One that is replaced leaves its mode to the new one
    and, where that is allowed, its owner.
    """
    target = path_of("path", path).resolve()  # what a link points to, not the link
    if target.exists() and not target.is_file():
        raise ValueError(f"path must be a regular file, got {os.fspath(path)!r}")
    before = target.stat() if target.exists() else None
    temporary = target.with_name(f".favor_np-{secrets.token_hex(8)}.tmp")
    mode = 0o666 if before is None else before.st_mode & 0o777
    try:
        with open(temporary, "xb", opener=functools.partial(os.open, mode=mode)) as file:
            if before is not None and os.name == "posix":
                with contextlib.suppress(OSError):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.filename is None:  # of a disk that is full
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can open a directory
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_archive(file: Any, arrays: dict[str, Any]) -> None:
    """Write what `numpy.savez` does."""
    archive = zipfile.ZipFile(file, "w", allowZip64=True)
    try:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
        archive.close()
    finally:
        archive.fp = None  # or it complains, now and when it is deleted, of what an interrupt left


def read(path: str | os.PathLike[str]) -> tuple[Parts, dict[str, Any]]:
    """Read what `write` wrote; ValueError for anything else."""
    parts, extra, _ = _read(path, FORMAT)
    return parts, extra


def read_window(
    path: str | os.PathLike[str],
) -> tuple[Parts, dict[str, Any], dict[str, Array]]:
    """Read what `write` wrote of a `WindowState`."""
    return _read(path, WINDOW_FORMAT)


def _read(
    path: str | os.PathLike[str], kind: str
) -> tuple[Parts, dict[str, Any], dict[str, Array]]:
    data = path_of("path", path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            return _parse(file, kind)
    except MemoryError:
        raise
    except Exception as error:  # bytes can be wrong in more ways than can be listed
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        of = kind.rpartition(".")[2]
        article = "an" if of[0] == "A" else "a"
        raise ValueError(f"{os.fspath(path)} cannot be read as {article} {of}: {reason}") from error


def _parse(file: zipfile.ZipFile, kind: str) -> tuple[Parts, dict[str, Any], dict[str, Array]]:
    header = json.loads(_array(file, "header", "|u1").tobytes())
    if not isinstance(header, dict) or header.get("format") != kind:
        raise ValueError(f"its header does not name the format {kind}")
    version = validation.integer("version", header["version"])
    if version > VERSION:
        raise ValueError(
            f"it was written by a newer favor_np ({header.get('favor_np')}), in format version "
            f"{version}; this favor_np reads up to {VERSION}"
        )
    names = sorted(file.namelist())
    calibrated = [name for name in Calibration._fields if f"{name}.npy" in names]
    exact = REST if version >= 3 else ()
    faded = FADE if any(f"{name}.npy" in names for name in FADE) else ()
    tokens = WINDOW[: 5 if "window_log2_bias.npy" in names else 3] if kind == WINDOW_FORMAT else ()
    known = sorted(f"{name}.npy" for name in (*ENTRIES, *exact, *faded, *calibrated, *tokens))
    if names != known:
        raise ValueError(f"it must have the entries {known}, got {names}")
    calibration = None
    if calibrated:
        entries: dict[str, Any] = {name: _array(file, name, "<f8") for name in calibrated}
        calibration = Calibration(**({"change": None} | entries))
    dtype = validation.float_dtype("dtype", header["dtype"])
    value_dim = validation.integer("value_dim", header["value_dim"])
    batch = tuple(validation.integer("batch_shape", n, minimum=0) for n in header["batch_shape"])
    fm = FeatureMap(
        _array(file, "projection", "<f4", "<f8"),
        header["kind"],
        float.fromhex(header["scale"]),
        header["antithetic"],
        float.fromhex(header["kernel_epsilon"]),
        calibration,
    )
    if fm.fingerprint != header["fingerprint"]:
        raise ValueError("its feature map is not the one whose fingerprint it has")
    if fm.kind == "trig" or fm.num_heads not in (None, *batch[-1:]):
        raise ValueError(f"its feature map does not fit a state of batch_shape {batch}")
    sequences = header["sequences"]
    if sequences is not None:
        sequences = validation.integer("sequences", sequences)
    slots = batch if sequences is None else (*batch, sequences)
    size, features = dtype.itemsize, (*slots, fm.num_features)
    c = _array(file, "c", f"<i{size}", shape=features)
    s = _array(file, "S", f"<f{size}", shape=(*features, value_dim))
    z = _array(file, "z", f"<f{size}", shape=features)
    rates = _array(file, "rates", "<f8", shape=(math.prod(slots),))
    lengths = _array(file, "lengths", "<i8", shape=(math.prod(slots),))
    if not ((rates >= 0) & (rates <= RATE)).all():
        raise ValueError(f"rates must be those of a decay in (0, 1], from 0 to {RATE}")
    if not ((lengths >= 0) & (lengths <= LONGEST)).all():
        raise ValueError(f"lengths must be from 0 to {LONGEST}")
    exponent = 2 ** (8 * size - 2)  # so that differences fit
    if not ((c >= -exponent) & (c <= exponent)).all():
        raise ValueError(f"c must be from {-exponent} to {exponent}")
    rest = _rest(file, size, len(lengths), fm.num_features, value_dim) if exact else None
    fade = tuple(_array(file, name, "<f8", shape=(len(lengths),)) for name in faded) or None
    if (
        fade is not None
        and not ((fade[0] >= 0) & (fade[0] <= LONGEST) & (fade[1] >= 0) & (fade[1] < 1)).all()
    ):
        raise ValueError(f"fade must be a whole part, from 0 to {LONGEST}, and a fraction")
    parts = (c, s, z, sequences, rates if rates.any() else None, lengths, rest, fade)
    extra, window = {**header["extra"]}, {}
    if tokens:
        rows = (*batch, validation.integer("window", extra["window"]))
        validation.integer("length", extra["length"], minimum=0)
        of_numbers = {"window_k": (*rows, fm.dim), "window_v": (*rows, value_dim)}
        kinds = {
            "window_mask": ("|b1", rows),
            "window_log2_bias": ("<f8", rows),
            "window_faded": ("<f8", batch),
        }
        kinds |= {name: (f"<f{size}", shape) for name, shape in of_numbers.items()}
        window = {n: _array(file, n, kinds[n][0], shape=kinds[n][1]) for n in tokens}
        if any(not np.isfinite(window[n]).all() for n in tokens[3:]):
            raise ValueError("window_log2_bias and window_faded must be finite")
    return Parts(fm, value_dim, batch, dtype.str, *parts), extra, window


def _rest(
    file: zipfile.ZipFile, size: int, slots: int, features: int, value_dim: int
) -> tuple[Array, ...]:
    """Return what a state holds beside (c, S, z): see ``kernels.state``."""
    from favor_np.cpu.tiles import TAIL

    kind, count = f"<f{size}", _array(file, "tail", f"<i{size}", shape=(slots,))
    if not ((count >= 0) & (count <= TAIL)).all():
        raise ValueError(f"tail must be from 0 to {TAIL}")
    tail = (slots, int(count.max(initial=0)))
    return (
        _array(file, "S_rest", kind, shape=(slots, features, value_dim)),
        _array(file, "z_rest", kind, shape=(slots, features)),
        count,
        _array(file, "tail_features", kind, shape=(*tail, features)),
        _array(file, "tail_values", kind, shape=(*tail, value_dim)),
    )


def _array(
    file: zipfile.ZipFile, name: str, *dtypes: str, shape: tuple[int, ...] | None = None
) -> Array:
    """Return the array of one entry, made of no more bytes than the file has."""
    entry = {info.filename: info for info in file.infolist()}[f"{name}.npy"]
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f"{name} must not be compressed")
    stream = io.BytesIO(file.read(entry))  # which checks the checksum
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{name} must be in npy format 1.0, got {version}")
    found, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.str not in dtypes or fortran:
        raise ValueError(f"{name} must have dtype {' or '.join(dtypes)}, got {dtype.str}")
    if found != (found if shape is None else shape):
        raise ValueError(f"{name} must have shape {shape}, got {found}")
    start, size = stream.tell(), stream.getbuffer().nbytes
    if size - start != math.prod(found) * dtype.itemsize:
        raise ValueError(f"{name} must have the bytes of shape {found}, got {size - start}")
    numbers = np.frombuffer(stream.getbuffer(), dtype, offset=start)  # which can be written to
    return numbers.reshape(found).astype(dtype.newbyteorder("="), copy=False)
