"""The one place that calls ``numba.njit``: compilation flags, fewer compilations, the disk cache.

Two things differ from plain Numba.  A function that only kernels call is optimised and turned into
machine code as part of the kernels alone, which halves the time of a first call.  And the cache on
disk never raises, never serves code of other sources or another signature, and survives damaged
files and any number of processes.  Set ``FAVOR_NP_CACHE=0`` to compile in memory always.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import pickle
import pkgutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core import serialize
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.misc.appdirs import AppDirs
from numba.np import linalg

from favor_np import jobs, numerics

#: Reassociation is allowed (it is what vectorises a sum), NaN and infinity stay what they are.
FAST = frozenset({"contract", "reassoc", "nsz", "arcp", "afn"})
#: Products and sums may fuse and nothing else: for code that rounds by adding a large number.
EXACT = frozenset({"contract"})

_PACKAGE = Path(__file__).parent
#: Modules outside this package whose constants kernels freeze into machine code.
_SHARED = (jobs, numerics)
_FROZEN = bool(getattr(sys, "frozen", False))
#: What of this package is on the disk: its folder, the archive it is in, the program it is frozen
#: in.
_PLACE = Path(sys.executable) if _FROZEN else _PACKAGE
_PLACE = next(path for path in (_PLACE, *_PLACE.parents) if path.exists())


def _sources() -> str:
    """Digest of everything compiled code depends on that a kernel's signature does not tell."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    parts = [path.read_bytes() for path in sorted(_PACKAGE.glob("*.py"))] or list(_loaded())
    for part in (*parts, *map(_constants, _SHARED)):
        digest.update(part)
    return digest.hexdigest()[:16] if parts else ""


def _constants(module: ModuleType) -> bytes:
    """Return the constants of a module as loaded: its file may have changed since."""
    return repr(sorted((name, x) for name, x in vars(module).items() if name.isupper())).encode()


def _loaded() -> Iterator[bytes]:
    """Return the modules of this package as their loaders know them: source or code."""
    package = sys.modules[__package__]
    for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        spec = importlib.util.find_spec(f"{__package__}.{name}")
        loader: Any = None if spec is None else spec.loader
        source = loader.get_source(f"{__package__}.{name}")
        if source is None:
            source = _described(loader.get_code(f"{__package__}.{name}"))
        yield source.encode()


def _described(value: object) -> str:
    """Describe code, the same in every process: the bytes of marshal are not."""
    if isinstance(value, frozenset):
        return str(sorted(map(_described, value)))
    if isinstance(value, CodeType):
        names = value.co_names, value.co_varnames, value.co_cellvars, value.co_freevars
        counts = value.co_argcount, value.co_kwonlyargcount, value.co_flags
        return repr((value.co_code, names, counts, [*map(_described, value.co_consts)]))
    return repr(value)


try:  # now, before an editor changes what is being imported
    SOURCES = _sources()
except (AttributeError, ImportError, OSError):
    SOURCES = ""


def _folders() -> list[Path]:
    """Return where machine code may lie: it is read in all of these, and written in the first."""
    name = f"favor_np-{hashlib.sha256(str(_PLACE).encode()).hexdigest()[:16]}"
    if numba.config.CACHE_DIR:
        return [Path(numba.config.CACHE_DIR).absolute() / name]
    home = Path(AppDirs("favor_np", appauthor=False).user_cache_dir) / name
    beside = [] if _FROZEN else [_PACKAGE / "__pycache__"]  # what it unpacks may be gone afterwards
    return [*beside, *([home] if home.is_absolute() else [])]


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


class _Store:
    """A kernel's machine code on disk, in place of Numba's cache; no fault of it is the user's.

    One sealed file an entry, named by all that it depends on.  (Numba's index can give one process
    the code that another stored for a different signature, if both fill it at once.)
    """

    def __init__(self, name: str, flags: tuple[object, ...]) -> None:
        config = numba.config
        self._flags = (*flags, config.BOUNDSCHECK, config.OPT, config.DEBUGINFO_DEFAULT)
        self._stem = f"{name}-{sys.implementation.cache_tag}-"
        self._folders = _folders()

    @property
    def cache_path(self) -> str | None:
        """The folder that is written to; None if there is none."""
        return next((str(folder) for folder in self._folders if _writable(folder)), None)

    def entry(self, signature: Any, codegen: Any) -> str:
        """Return the name of the file with the code for this signature and processor."""
        key = repr((signature, codegen.magic_tuple(), self._flags))
        return f"{self._stem}{SOURCES}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.nbc"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return what was compiled for this signature, or None."""
        target_context.refresh()
        for folder in self._folders:
            try:
                content = _read(folder, self.entry(signature, target_context.codegen()))
                seal, data = content[:32], content[32:]
                if hashlib.sha256(data).digest() == seal:
                    return CompileResult._rebuild(target_context, *pickle.loads(data))
            except Exception:  # no such file, no permission, ...: compile
                pass
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled, if there is a place for it."""
        if result.library.has_dynamic_globals:
            return
        for folder in filter(_writable, self._folders):
            try:
                data = serialize.dumps(result._reduce())
                seal = hashlib.sha256(data).digest()
                _write(folder, self.entry(signature, result.codegen), seal + data)
                with contextlib.suppress(OSError):  # somebody else removed it first
                    self._forget(folder)
                return
            except Exception:  # disk full, folder gone, ...: this process has its code already
                pass

    def _forget(self, folder: Path) -> None:
        """Remove the code of all but these sources and the versions that were compiled last."""
        written: dict[str, float] = {}
        entries = [
            (path, path.name[len(self._stem) :][:16]) for path in folder.glob(f"{self._stem}*")
        ]
        for path, sources in entries:
            written[sources] = max(written.get(sources, 0), path.stat().st_mtime)
        written[SOURCES] = math.inf
        kept = sorted(written, key=written.__getitem__)[-_VERSIONS:]
        for path, sources in entries:
            if sources not in kept:
                path.unlink(missing_ok=True)


class _Part(JITCodeLibrary):  # type: ignore[misc]  # Numba's classes have no types
    """Code that is only ever linked into a kernel, and optimised there: none of its own runs."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:  # noqa: ARG002
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Do nothing: there is no machine code that could look for it."""


class _PartCompiler(Compiler):  # type: ignore[misc]  # Numba's classes have no types
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *args: Any) -> None:
        library = _Part(targetctx.codegen(), "part")
        library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, *args)


def _not_callable(*args: Any, **kwargs: Any) -> None:
    raise TypeError("this function has no machine code of its own: only kernels can call it")


def jit(*, fastmath: frozenset[str] = FAST, cache: bool = False) -> Callable[..., Any]:
    """Compile for kernels: no GIL, IEEE division, no exceptions, no new arrays.

    ``cache`` belongs on the kernels that Python calls; what they call is compiled into them, and
    cannot be called from Python.
    """
    if numba.config.DISABLE_JIT:
        raise RuntimeError("favor_np computes in compiled code only: unset NUMBA_DISABLE_JIT")

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"fastmath": set(fastmath), "no_cfunc_wrapper": True}
        if not cache:
            options |= {"pipeline_class": _PartCompiler, "no_cpython_wrapper": True}
        dispatcher = numba.njit(nogil=True, error_model="numpy", _nrt=False, **options)(function)
        specialise = dispatcher.get_call_template
        # A literal 0 or True at a call site is no reason to compile the callee once more.
        dispatcher.get_call_template = lambda args, kws: specialise(
            [types.unliteral(a) for a in args], {k: types.unliteral(a) for k, a in kws.items()}
        )
        if not cache:
            dispatcher._compile_for_args = _not_callable
            dispatcher.add_overload = lambda result: dispatcher.overloads.update(
                {tuple(result.signature.args): result}
            )
        elif SOURCES and os.environ.get("FAVOR_NP_CACHE", "1") != "0":
            dispatcher._cache = _Store(function.__name__, tuple(sorted(fastmath)))
        return dispatcher

    return decorate


def _without_blas() -> None:
    """Load Numba's array functions without scipy.linalg, a third of the time of a warm first call.

    Numba imports it then to know whether ``np.dot`` would compile (we require scipy: it would),
    and checks it again whenever something with ``np.dot`` is compiled.
    """
    check, linalg.ensure_blas = linalg.ensure_blas, lambda: None
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = check


with contextlib.suppress(AttributeError):
    _without_blas()
