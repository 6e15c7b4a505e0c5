"""Attention over arrays larger than memory: folded and read chunk by chunk."""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from favor_np import storage, validation
from favor_np.attention import favor_attention
from favor_np.call import Call
from favor_np.engine import processor
from favor_np.features import ATTENTION_KINDS, FeatureMap, checked
from favor_np.progress import Progress, reporting
from favor_np.state import AttentionState, _restore

#: Arrays that have one number a key.
OF_KEYS = ("key_mask", "key_bias", "decay")
#: Seconds between two checkpoints; a chunk that takes longer is followed by one.
CHECKPOINT_SECONDS = 10.0


def stream_attention(
    q: Any,
    k: Any,
    v: Any,
    feature_map: FeatureMap,
    out: Any,
    *,
    causal: bool = False,
    key_mask: Any = None,
    key_bias: Any = None,
    enable_gqa: bool = False,
    decay: Any = None,
    precision: Literal["full", "bfloat16"] = "full",
    chunk_size: int = 65_536,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Progress | None = None,
    num_threads: int | None = None,
) -> Any:
    """Compute `favor_attention` of arrays that need not fit into memory.

    Positions are read and written in chunks: in one pass if `causal`, otherwise in one over keys
    and values and then one over queries.  With `checkpoint` a run that was interrupted, killed
    included, is continued by the same call, and ends with the bits of one that was not.

    Parameters
    ----------
    q : array_like, shape (..., L_q, d)
        Queries.  They, keys and values may be numpy.memmap or anything else that has `shape` and
        `dtype` and gives arrays for slices, such as data sets of h5py, netCDF4, tensorstore and
        zarr.
    k : array_like, shape (..., L_k, d)
        Keys.  Leading axes of all arrays broadcast as in NumPy.
    v : array_like, shape (..., L_k, dv)
        Values.
    feature_map : FeatureMap
        Of dimension d; any kind but "trig".
    out : array_like, shape (..., L_q, dv)
        Where slices of the result are written; of the dtype that `favor_attention` returns (in a
        file, of either byte order).  It must not overlap an input.
    causal : bool, default False
        Query i sees keys up to i only.
    key_mask, key_bias : array_like, shape (..., L_k), optional
        As for `favor_attention`; read in chunks like the others.
    enable_gqa : bool, default False
        As for `favor_attention`.
    decay : array_like of float, optional
        As for `favor_attention`: a constant, or one factor per token, read in chunks.
    precision : {"full", "bfloat16"}, default "full"
        As for `favor_attention`; unless `causal`, keys are folded in full.
    chunk_size : int, default 65536
        Positions of a chunk, of all leading axes together; the last one may be shorter.
    checkpoint : str or os.PathLike, optional
        A file in which the progress is kept: written at the start, then every 10 seconds or
        after every chunk that takes longer, and at an interrupt, each time after `out` was
        flushed; removed at the end.  If it exists, the call continues from it.
        `AttentionState.load` can read it.
    progress : bool or callable, optional
        Whether to show a bar on standard error (needs tqdm), or what to call after each chunk as
        ``progress(stage, done, total)``.  Default: a bar, if that is a terminal, tqdm is there, and
        the work lasts over two seconds.
    num_threads : int, optional
        Default: see `thread_limit`.  The result is the same for any number.

    Returns
    -------
    array_like
        `out`.

    Raises
    ------
    TypeError, ValueError
        As `favor_attention`; if `chunk_size` is not a positive integer; if `out` does not fit,
        cannot be written or overlaps an input; if an input has masked values (variables of netCDF4
        are searched for them before anything is computed).
    ValueError
        If `checkpoint` is damaged, or was not written by this call (one with the same shapes,
        dtypes, map, `causal`, `precision` and `chunk_size`), or an array no longer holds the last
        chunk that was done before; if `out` lies in a file that could not be opened again after a
        kill.
    OSError
        If an array or the checkpoint cannot be read or written.
    ImportError
        If `progress` is True and tqdm is missing.

    See Also
    --------
    favor_attention : For arrays in memory.
    AttentionState.update : Folds keys and values that come from a generator.

    Notes
    -----
    The result is that of `favor_attention` within rounding, and depends on `chunk_size` in that
    way only.  Memory-mapped pages are given back to the system after each chunk.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from favor_np import favor_attention, feature_map, stream_attention
    >>> fm = feature_map("positive", dim=4, num_features=64)
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1000, 4), np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     out = np.memmap(Path(folder, "out"), np.float32, "w+", shape=(1000, 4))
    ...     resume = Path(folder, "checkpoint")
    ...     done = stream_attention(q, k, v, fm, out, chunk_size=300, checkpoint=resume)
    ...     np.allclose(out, favor_attention(q, k, v, fm), atol=1e-5)
    ...     del out, done  # closes the file
    True
    """
    checked(feature_map, ATTENTION_KINDS)
    size = validation.integer("chunk_size", chunk_size)
    q, k, v, key_mask, key_bias, decay = map(_sliceable, (q, k, v, key_mask, key_bias, decay))
    of_keys = {"key_mask": key_mask, "key_bias": key_bias}
    call = processor().check(
        _outline("q", q),
        _outline("k", k),
        _outline("v", v),
        feature_map,
        causal=causal,
        enable_gqa=enable_gqa,
        num_threads=num_threads,
        **{n: None if x is None else _outline(n, x) for n, x in of_keys.items()},
    )
    call.bfloat16 = validation.is_bfloat16(precision, call.compute)
    if decay is not None and not hasattr(decay, "shape"):
        decay = validation.array_of("decay", decay)
    shape = () if decay is None else tuple(decay.shape)
    if len(shape) == len(call.state_shape) + 1:
        if not call.causal:
            raise ValueError("decay needs causal=True")
        validation.gates_shape(shape, call.state_shape, call.keys)
        of_keys["decay"], decay = decay, None
    elif decay is not None:
        validation.decay_rates(decay, call.state_shape, causal=call.causal)
    of_keys = {name: array for name, array in of_keys.items() if array is not None}
    _check_out(out, call, {"q": q, "k": k, "v": v, **of_keys})
    reported = reporting(progress)
    if 0 in call.out_shape:
        return out
    state = AttentionState.zeros(
        feature_map, call.v.shape[-1], call.state_shape, decay=decay, dtype=call.compute
    )
    keys, queries = 0 if call.causal else call.keys, call.out_shape[-2]  # rows of the two passes
    folds = -(-keys // size)
    steps = folds + -(-queries // size)

    def part(step: int) -> tuple[slice, dict[str, Any]]:
        """Return the positions that a step works on, and the arrays."""
        if step < folds:
            start, length, arrays = step * size, keys, {"k": k, "v": v, **of_keys}
        else:
            start, length, arrays = (step - folds) * size, queries, {"q": q, "out": out}
            if call.causal:
                arrays |= {"k": k, "v": v, **of_keys}
        return slice(start, min(start + size, length)), arrays

    def read(step: int) -> dict[str, Any]:
        rows, arrays = part(step)
        found = {n: _read(n, array, rows) for n, array in arrays.items() if n != "out"}
        inputs = {n: getattr(call, n).dtype for n in found if n not in of_keys}
        return found | {n: found[n].astype(kind, copy=False) for n, kind in inputs.items()}

    kept, found, done = None, None, 0
    if checkpoint is not None:
        _check_reopens(out)
        kept = _Checkpoint(
            storage.path_of("checkpoint", checkpoint), _identity(call, of_keys, decay, size)
        )
        found = kept.load(steps)
        if found is not None:
            after, done, digests = found
            kept.check_state(after, state, min(done * size, queries if call.causal else keys))
            if done:
                state = after
            if done and digests != _digests(*part(done - 1)):
                kept.refuse("q, k, v or out no longer hold what they held when it was written")
    if any(map(_masks, (q, k, v, *of_keys.values()))):
        for step in range(done, steps):
            read(step)
    _check_writes(out)
    if kept is not None and found is None:
        _flush_file(out)  # what was made for this call must outlive it
        kept.save(state, 0, {})  # if it cannot be written, then now
    written, saved = time.monotonic(), done

    def save() -> None:
        nonlocal written, saved
        if kept is not None and saved < done:
            _flush(out)  # first: what the checkpoint calls done must be on the disk
            kept.save(state, done, _digests(*part(done - 1)))
            written, saved = time.monotonic(), done

    positions = sum(_length(part(step)[0]) for step in range(done))
    try:
        with reported as report:
            for step in range(done, steps):
                rows, arrays = part(step)
                chunk = read(step)
                if step < folds:
                    after = state.copy().update(**chunk, num_threads=num_threads)
                else:
                    if call.causal:
                        result, after = favor_attention(
                            **chunk,
                            feature_map=feature_map,
                            causal=True,
                            state=state,
                            return_state=True,
                            enable_gqa=enable_gqa,
                            precision=precision,
                            num_threads=num_threads,
                        )
                    else:
                        result = favor_attention(
                            **chunk,
                            k=call.k[..., :0, :],
                            v=call.v[..., :0, :],
                            feature_map=feature_map,
                            state=state,
                            enable_gqa=enable_gqa,
                            precision=precision,
                            num_threads=num_threads,
                        )
                        after = state
                    out[..., rows, :] = result.astype(call.result, copy=False)
                state, done = after, step + 1  # together: no interrupt comes between
                if time.monotonic() - written >= CHECKPOINT_SECONDS:
                    save()
                for array in arrays.values():
                    _release(array)
                positions += _length(rows)
                report("attention", positions, keys + queries)
    except (KeyboardInterrupt, SystemExit):
        save()
        raise
    if kept is not None:
        _flush(out)
        kept.path.unlink(missing_ok=True)
    return out


def _outline(name: str, array: Any) -> Any:
    """Return an array of the same shape and dtype that takes no memory: to be checked."""
    shape, dtype = _form(name, array)
    if isinstance(array, (np.matrix, np.ma.MaskedArray)):
        validation.array_of(name, array)
    if _library(array) == "netCDF4":  # what it unpacks is of another dtype than what it stores
        dtype = np.asarray(_rows(name, array, slice(0, 1))).dtype.newbyteorder("=")
    if dtype.kind in "biu" and name != "key_mask":
        dtype = np.dtype(np.float64)  # what it is converted to, chunk by chunk
    return validation.outline(shape, dtype)


def _sliceable(array: Any) -> Any:
    """Return what is sliced as an array is: pandas takes slices for labels."""
    return np.asarray(array) if hasattr(array, "iloc") else array


def _form(name: str, array: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        # A dtype of tensorstore names the one of NumPy.
        return tuple(array.shape), np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    except (AttributeError, TypeError):
        raise TypeError(
            f"{name} must have shape and dtype as an array has, got {validation.got(array)}"
        ) from None


def _check_out(out: Any, call: Call, inputs: dict[str, Any]) -> None:
    shape, dtype = _form("out", out)
    in_memory = isinstance(out, np.ndarray)
    if dtype != call.result and (in_memory or dtype.newbyteorder("=") != call.result):
        raise TypeError(f"out must have dtype {call.result}, got {dtype}")
    if shape != call.out_shape:
        raise ValueError(f"out must have shape {call.out_shape}, got {shape}")
    if in_memory and not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    for name, array in inputs.items():
        if in_memory and isinstance(array, np.ndarray):
            same = np.may_share_memory(out, array)
        else:
            same = out is array or (_library(out) == _library(array) == "h5py" and out == array)
        if same:
            raise ValueError(f"out must not overlap an input, got that of {name}")


def _check_writes(out: Any) -> None:
    """Refuse what cannot be written to: write what is there already."""
    if not hasattr(out, "__getitem__"):  # it only takes rows, and may send them anywhere
        return
    first = (..., slice(0, 1), slice(None))
    try:
        out[first] = np.asarray(out[first])
    except Exception as error:  # every library has its own
        raise ValueError(f"out must be writeable: {error}") from error


def _check_reopens(out: Any) -> None:
    """Refuse files that nobody could open after a kill, and what never gets to a file."""
    if _library(out) == "h5py" and out.file.id.get_create_plist().get_version()[0] >= 3:
        raise ValueError(
            "with a checkpoint out must lie in a file that HDF5 opens after a kill: not in one "
            "that was made with libver='latest' or 'v110', got such a file; 'v108' or 'earliest' "
            "will do"
        )
    if type(getattr(out, "store", None)).__name__ == "ZipStore":
        raise ValueError(
            "with a checkpoint out must lie in a store that zarr opens after a kill, got a ZipStore"
        )
    mapped = _mapped(out) if isinstance(out, np.ndarray) else None
    if mapped is not None and mapped.mode == "c":
        raise ValueError(
            "with a checkpoint out must be written to its file, got a copy-on-write memory map"
        )


def _masks(array: Any) -> bool:
    """Whether an array may give masked chunks: netCDF4 compares all it reads with _FillValue."""
    return _library(array) == "netCDF4" and bool(array.mask)


def _read(name: str, array: Any, rows: slice) -> Any:
    """Return these rows as they lie in memory or are read from a file."""
    chunk = _rows(name, array, rows)
    if np.ma.is_masked(chunk):
        raise TypeError(
            f"{name} has masked values in rows {rows.start} to {rows.stop}, which stand for no "
            "numbers: fill them, or leave the rows out (netCDF4 masks what equals _FillValue, "
            "unless told by set_auto_mask(False))"
        )
    return np.asarray(chunk)


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _mapped(array: Any) -> Any:
    """Return the numpy.memmap that an array is, or is a view of; None if there is none."""
    while array is not None and getattr(array, "_mmap", None) is None:
        array = getattr(array, "base", None)
    return array


def _flush(array: Any) -> None:
    """Write to the disk what was written to the array."""
    if isinstance(array, np.ndarray):
        array = _mapped(array)
    if not _flush_file(array) and hasattr(array, "flush"):
        array.flush()


def _flush_file(array: Any) -> bool:
    """Write all of the file in which h5py or netCDF4 keep an array; whether there is one.

    Without its other parts, the array's own would lie in a file that nobody can open.
    """
    library = _library(array)
    if library == "h5py":
        array.file.flush()
        path = array.file.filename
    elif library == "netCDF4":
        array.group().sync()
        path = array.group().filepath()
    else:
        return False
    with suppress(OSError):  # not every path is one of the system's
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # both leave it to the system when
        finally:
            os.close(handle)
    return True


def _library(array: Any) -> str:
    """Return the name of the package that an array is of."""
    return type(array).__module__.partition(".")[0]


def _release(array: Any) -> None:
    """Take the pages of a mapped file out of this process: they stay in the system's cache."""
    mapped = _mapped(array)
    if mapped is not None and mapped.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)  # mode "c" would lose what was written


def _rows(name: str, array: Any, rows: slice) -> Any:
    """Return these rows of an array, or these numbers of one that has one a key."""
    return array[..., rows] if name in OF_KEYS else array[..., rows, :]


def _identity(call: Call, of_keys: dict[str, Any], decay: Any, size: int) -> dict[str, Any]:
    """Return all that two calls must share if one is to continue the other."""
    arrays = {name: getattr(call, name) for name in ("q", "k", "v")}
    forms = {n: (x.dtype, x.shape) for n, x in arrays.items()}
    forms |= {name: _form(name, array)[::-1] for name, array in of_keys.items()}
    more: dict[str, Any] = {"enable_gqa": True} if call.grouped else {}
    if call.bfloat16:
        more["precision"] = "bfloat16"
    if decay is not None:
        more["decay"] = np.asarray(decay, np.float64).tolist()
    return {
        **{name: f"{dtype} {shape}" for name, (dtype, shape) in forms.items()},
        "feature_map": call.map.fingerprint,
        "causal": call.causal,
        "chunk_size": size,
        **more,
    }


def _digests(rows: slice, arrays: dict[str, Any]) -> dict[str, str]:
    """Return a hash of these rows of each array, as it holds them now, in any byte order."""
    chunks = {name: np.asarray(_rows(name, array, rows)) for name, array in arrays.items()}
    return {
        name: hashlib.sha256(chunk.astype(chunk.dtype.newbyteorder("<")).tobytes()).hexdigest()
        for name, chunk in chunks.items()
    }


class _Checkpoint:
    """The file of an unfinished run: its state, how many steps are done, and whose it is."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = identity

    def save(self, state: AttentionState, done: int, digests: dict[str, str]) -> None:
        """Write the file: `done` steps are behind, the last on rows with these digests."""
        extra = {"stream_attention": self.identity, "done": done, "digests": digests}
        storage.write(self.path, storage.Parts(*state.__reduce__()[1]), extra)

    def load(self, steps: int) -> tuple[AttentionState, int, dict[str, str]] | None:
        """Return what was saved, or None; ValueError if another call saved it."""
        try:
            parts, extra = storage.read(self.path)
        except FileNotFoundError:
            return None
        found = extra.get("stream_attention")
        if not isinstance(found, dict):
            self.refuse("it holds a state that stream_attention did not write")
        for name in {**self.identity, **found}:
            if found.get(name) != self.identity.get(name):
                mine = self.identity.get(name)
                self.refuse(f"its {name} is {found.get(name)}, got {mine}")
        done, digests = extra.get("done"), extra.get("digests")
        if type(done) is not int or not 0 <= done <= steps:
            self.refuse(f"it must have done 0 to {steps} steps, got {done!r}")
        if not isinstance(digests, dict):
            self.refuse("it has no digests")
        return _restore(*parts), done, digests

    def check_state(self, found: AttentionState, new: AttentionState, tokens: int) -> None:
        """Refuse a state that is not of the kind of `new`, or has not seen so many tokens."""
        if found.feature_map != new.feature_map:
            self.refuse("its state has another feature map")
        mine, its = (
            (s.batch_shape, s.value_dim, s.dtype.name, s.sequences, s._rates is None)
            for s in (new, found)
        )
        if its != mine:
            self.refuse("its state is not one of this call")
        if not (found.lengths == tokens).all():
            self.refuse(f"its state must have seen {tokens} tokens")

    def refuse(self, reason: str) -> NoReturn:
        """Say why the file cannot be continued from."""
        raise ValueError(f"checkpoint {self.path} does not belong to this call: {reason}")
