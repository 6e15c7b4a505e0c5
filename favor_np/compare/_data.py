"""The queries and keys that errors are measured on, and earlier ones that maps may know."""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation

Array: TypeAlias = npt.NDArray[Any]

DATA = ("prices", "volatility", "gaussian")
NAMES = ("q", "k", "known_q", "known_k")  # of arrays in a file
LARGEST = 1e6  # of their numbers: products of these are finite in float32
#: Bytes to which the arrays of a file may expand; where it is small, only to RATIO times its size.
MOST_BYTES, SOME_BYTES, RATIO = 2**30, 2**26, 50
WINDOW = 32  # returns in a window of prices


class Tokens(NamedTuple):
    """Queries and keys (heads, L, d), float32: those to attend with, and those before them."""

    q: Array
    k: Array
    known_q: Array
    known_k: Array
    scale: float


def tokens(data: str, length: int, dim: int, std: float, seed: int) -> Tokens:
    """Return `length` tokens, or what there is, and as many before them.

    Parameters
    ----------
    data : str
        One of DATA, or an .npz file with arrays ``q`` and ``k`` (..., L, d), and perhaps
        ``known_q`` and ``known_k``; without these the first half of the positions is known.
    length : int
        Tokens to attend with, at most.
    dim, std, seed : int, float, int
        Of "gaussian" tokens.
    """
    if data == "gaussian":
        rng = np.random.default_rng(seed)
        q, k = (std * rng.standard_normal((1, 2 * length, dim), np.float32) for _ in range(2))
        return _halves(q, k, length, dim**-0.5)
    if data in DATA:
        from favor_np.forecast import read_prices
        from favor_np.forecast._windows import return_windows, volatility_windows

        make = return_windows if data == "prices" else volatility_windows
        windows = make(np.log(read_prices().values), WINDOW, 1)
        return _halves(windows.queries[None], windows.keys[None], length, windows.scale)
    return _from_file(data, length)


def _halves(q: Array, k: Array, length: int, scale: float) -> Tokens:
    """Split the last tokens: the first half is known."""
    length = min(length, q.shape[1] // 2, k.shape[1] // 2)
    new, old = slice(-length, None), slice(-2 * length, -length)
    return Tokens(q[:, new], k[:, new], q[:, old], k[:, old], scale)


def _from_file(path: str, length: int) -> Tokens:
    """Read what another program wrote; every leading index is a head."""
    if not path.endswith(".npz"):
        raise ValueError(f"data must be one of {', '.join(DATA)} or an .npz file, got {path!r}")
    with Path(path).open("rb") as file:
        try:
            arrays = _arrays(file)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  # bytes can be wrong in countless ways
            raise ValueError(f"{path}: not an .npz file of numbers: {error}") from None
    if not {"q", "k"} <= set(arrays) or len(arrays) == 3:
        raise ValueError(f"{path}: needs arrays q and k, and known_q and known_k or neither")
    try:
        arrays = {name: validation.tensor(name, array) for name, array in arrays.items()}
        validation.finite(**arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = {array.shape[:-2] + array.shape[-1:] for array in arrays.values()}
    if len(shapes) > 1 or min(array.shape[-2] for array in arrays.values()) < 2:
        raise ValueError(
            f"{path}: arrays must have one shape (..., L, d), with two tokens at least"
        )
    if not arrays["q"].size:
        raise ValueError(f"{path}: q must not be empty, got shape {arrays['q'].shape}")
    largest = max(float(abs(array).max()) for array in arrays.values())
    if largest > LARGEST:
        raise ValueError(
            f"{path}: numbers up to {largest:.2g} are no queries and keys of attention: at most "
            f"{LARGEST:g} are compared"
        )
    heads = {
        name: array.reshape(-1, *array.shape[-2:]).astype(np.float32)
        for name, array in arrays.items()
    }
    scale = heads["q"].shape[-1] ** -0.5
    if "known_q" in heads:
        q, k = heads["q"][:, :length], heads["k"][:, :length]
        return Tokens(q, k, heads["known_q"], heads["known_k"], scale)
    return _halves(heads["q"], heads["k"], length, scale)


def _arrays(file: BinaryIO) -> dict[str, Array]:
    """Return the arrays of an .npz file that are needed; nothing is expanded that is too large."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        needed = {name: entries[name] for name in NAMES if name in entries}
        expanded = sum(entry.file_size for entry in needed.values())
        if expanded > min(MOST_BYTES, max(SOME_BYTES, RATIO * size)):
            raise ValueError(
                f"its {size / 2**20:,.3g} MiB would expand to {expanded / 2**20:,.0f} MiB; save "
                f"some thousand tokens of some heads (at most {MOST_BYTES / 2**20:,.0f} MiB)"
            )
        return {name: _array(name, archive, entry) for name, entry in needed.items()}


def _array(name: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Array:
    """Make an array of the bytes of an .npy file, and of no more than there are."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is not compressed as NumPy does it")
    with archive.open(entry) as file:
        content = file.read(entry.file_size)  # read() would expand what the entry does not say
    stream, form = io.BytesIO(content), np.lib.format
    version = form.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has npy format {version}, not (1, 0) or (2, 0)")
    header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a header that Python 2 wrote
        shape, fortran, dtype = header(stream)
    rest = stream.getbuffer()[stream.tell() :]
    if dtype.hasobject or len(rest) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has no {math.prod(shape):,} numbers of dtype {dtype}")
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
