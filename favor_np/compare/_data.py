"""The queries and keys that errors are measured on, and earlier ones that maps may know."""

from __future__ import annotations

import zipfile
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation

Array: TypeAlias = npt.NDArray[Any]

DATA = ("prices", "volatility", "gaussian")
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
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("q", "k", "known_q", "known_k") if name in file}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz file of numbers: {error}") from None
    if not {"q", "k"} <= set(arrays) or len(arrays) == 3:
        raise ValueError(f"{path}: needs arrays q and k, and known_q and known_k or neither")
    arrays = {name: validation.tensor(name, array) for name, array in arrays.items()}
    validation.finite(**arrays)
    shapes = {array.shape[:-2] + array.shape[-1:] for array in arrays.values()}
    if len(shapes) > 1 or min(array.shape[-2] for array in arrays.values()) < 2:
        raise ValueError(
            f"{path}: arrays must have one shape (..., L, d), with two tokens at least"
        )
    heads = {
        name: array.astype(np.float32).reshape(-1, *array.shape[-2:])
        for name, array in arrays.items()
    }
    scale = heads["q"].shape[-1] ** -0.5
    if "known_q" in heads:
        q, k = heads["q"][:, :length], heads["k"][:, :length]
        return Tokens(q, k, heads["known_q"], heads["known_k"], scale)
    return _halves(heads["q"], heads["k"], length, scale)
