"""Machine code on disk: whose folders are trusted, and files that are read whole or not at all.

A file begins with a line that says what it is, and another one with what its code was compiled from
and for, and its SHA-256; the rest is machine code.  No fault of a file or a folder is the user's:
what cannot be read is compiled, and what cannot be written is kept in memory.  Set
``FAVOR_NP_CACHE=0`` to do neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).parent
_FROZEN = bool(getattr(sys, "frozen", False))
#: What of this package is on the disk: its folder, the archive it is in, the program it is frozen
#: in.
_PLACE = Path(sys.executable) if _FROZEN else _PACKAGE
_PLACE = next(path for path in (_PLACE, *_PLACE.parents) if path.exists())
_MAGIC = b"favor_np machine code 1\n"


def enabled() -> bool:
    """Whether code is kept."""
    return os.environ.get("FAVOR_NP_CACHE", "1") != "0"


def folders() -> list[Path]:
    """Return where machine code may lie: it is read in all of these, and written in the first."""
    name = f"favor_np-{hashlib.sha256(str(_PLACE).encode()).hexdigest()[:16]}"
    if os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(os.environ["NUMBA_CACHE_DIR"]).absolute() / name]
    home = _home() / name
    beside = [] if _FROZEN else [_PACKAGE / "__pycache__"]  # what it unpacks may be gone afterwards
    return [*beside, *([home] if home.is_absolute() else [])]


def _home() -> Path:
    """Return the folder for what programs of this user keep, as each system has it."""
    environ, user = os.environ, Path("~").expanduser()
    if sys.platform == "win32":
        return Path(environ.get("LOCALAPPDATA") or user / "AppData/Local") / "favor_np/Cache"
    if sys.platform == "darwin":
        return user / "Library/Caches/favor_np"
    return Path(environ.get("XDG_CACHE_HOME") or user / ".cache") / "favor_np"


#: Modes of what is made here: nobody else may write, whatever the umask; others may read, as who
#: runs a container does what was compiled when its image was built.
_FOLDER, _FILE = 0o755, 0o644
#: Versions of the sources whose code is kept for a kernel: programs that use two of them share a
#: cache.
_VERSIONS = 4


def _safe(found: os.stat_result) -> bool:
    """Tell if nobody can write there who could not change this package itself."""
    owners = (os.geteuid(), 0, _PLACE.stat().st_uid)
    return found.st_uid in owners and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """Open a folder, no link, if it is safe, so that nobody can exchange it; else OSError.

    None where there are no such descriptors: paths must do.
    """
    if os.name != "posix":
        yield None
        return
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(at)
        package = _PACKAGE.stat() if _PACKAGE in folder.parents else None
        if package is not None and package.st_uid == found.st_uid:  # no safer than the sources
            found = os.stat_result((found.st_mode & ~package.st_mode, *found[1:]))
        if not _safe(found):
            raise PermissionError(f"others can write to {folder}")
        yield at
    finally:
        os.close(at)


def _make(folder: Path) -> None:
    """Make a folder and those above it that are missing."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(_FOLDER, exist_ok=True)


def _writable(folder: Path) -> bool:
    try:
        _make(folder)
        with _opened(folder):
            return os.access(folder, os.W_OK)
    except OSError:
        return False


def _read(folder: Path, name: str) -> bytes:
    """Return the content of a file that nobody else could write, or OSError."""
    with _opened(folder) as at:
        if at is None:
            return (folder / name).read_bytes()
        entry = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        try:
            found = os.fstat(entry)
            if not (stat.S_ISREG(found.st_mode) and _safe(found)):
                raise PermissionError(f"others can write to {folder / name}")
            with open(entry, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(entry)


def _write(folder: Path, name: str, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with _opened(folder) as at:
        where = "" if at is not None else folder
        draft, target = (os.path.join(where, each) for each in (f"{name}.{uuid.uuid4().hex}", name))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        entry = os.open(draft, flags, _FILE, dir_fd=at)
        try:
            with open(entry, "wb") as file:
                if at is not None:
                    os.fchmod(entry, _FILE)
                file.write(data)
            os.replace(draft, target, src_dir_fd=at, dst_dir_fd=at)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=at)


def cache_path() -> str | None:
    """Return the folder that is written to; None if there is none."""
    if not enabled():
        return None
    return next((str(folder) for folder in folders() if _writable(folder)), None)


def _name(symbol: str, header: dict[str, str]) -> str:
    key = hashlib.sha256(repr(sorted(header.items())).encode()).hexdigest()[:16]
    return f"{symbol}-{header['sources']}-{key}.code"


def load(symbol: str, header: dict[str, str]) -> bytes | None:
    """Return the code that was kept for this symbol, compiled from and for what the header says."""
    for folder in folders() if enabled() else ():
        try:
            code = _parse(_read(folder, _name(symbol, header)), symbol, header)
        except Exception:  # no such file, no permission, not what we wrote, ...: compile
            continue
        if code is not None:
            return code
    return None


def _parse(content: bytes, symbol: str, header: dict[str, str]) -> bytes | None:
    if not content.startswith(_MAGIC):
        return None
    line, _, code = content[len(_MAGIC) :].partition(b"\n")
    expected = {"symbol": symbol, **header, "sha256": hashlib.sha256(code).hexdigest()}
    return code if json.loads(line) == expected else None


def save(symbol: str, header: dict[str, str], code: bytes) -> None:
    """Keep code, if there is a place for it."""
    seal = {"symbol": symbol, **header, "sha256": hashlib.sha256(code).hexdigest()}
    content = _MAGIC + json.dumps(seal).encode() + b"\n" + code
    for folder in filter(_writable, folders() if enabled() else ()):
        try:
            _write(folder, _name(symbol, header), content)
            with contextlib.suppress(OSError):  # somebody else removed it first
                _forget(folder, symbol, header["sources"])
            return
        except Exception:  # disk full, folder gone, ...: this process has its code already
            pass


def count(prefix: str, sources: str) -> int:
    """Return how many kernels with such names are kept, compiled from these sources."""
    names: set[str] = set()
    for folder in folders() if enabled() else ():
        names.update(path.name for path in folder.glob(f"{prefix}*-{sources}-*.code"))
    return len(names)


def _forget(folder: Path, symbol: str, current: str) -> None:
    """Remove the code, and drafts, of all but these sources and the versions compiled last."""
    written: dict[str, float] = {}
    entries = [(path, path.name[len(symbol) + 1 :][:16]) for path in folder.glob(f"{symbol}-*")]
    for path, sources in entries:
        written[sources] = max(written.get(sources, 0), path.stat().st_mtime)
    written[current] = math.inf
    kept = sorted(written, key=written.__getitem__)[-_VERSIONS:]
    for path, sources in entries:
        if sources not in kept:
            path.unlink(missing_ok=True)
