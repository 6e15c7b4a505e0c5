"""What the sub-commands share: types of options, output files, what is told meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from favor_np.figures import require_matplotlib

#: Files that an interrupt has to remove.
unfinished: set[Path] = set()
PICTURES = ("png", "pdf", "svg")


class CommandError(Exception):
    """What the user has to know, in one line; the program ends with status 2."""


def integer(least: int = 1, *, even: bool = False) -> Callable[[str], int]:
    """Make the type of an option: an integer of at least `least`."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (even and number % 2):
            kind = "an even number" if even else "an integer"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} of at least {least}")
        return number

    return convert


def real(*, positive: bool = False) -> Callable[[str], float]:
    """Make the type of an option: a finite number, not negative or greater than 0."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0.0 <= number < float("inf") or (positive and number == 0.0):
            limit = "greater than 0" if positive else "not below 0"
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {limit}")
        return number

    return convert


def share(text: str) -> float:
    """Convert an option that is a share, from 0 to 1."""
    number = real()(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, a number from 0 to 1")
    return number


def output_path(path: str, *inputs: str | None) -> Path:
    """Return where `path` is; refuse what cannot be written, and files that must stay: `inputs`."""
    target = Path(path).resolve()
    if target.is_dir():
        raise CommandError(f"{path}: is a directory")
    if not target.parent.is_dir():
        raise CommandError(f"{path}: the directory {target.parent} does not exist")
    if any(other is not None and target == Path(other).resolve() for other in inputs):
        raise CommandError(f"{path}: would overwrite another file of this command")
    if target.exists() and not os.access(target, os.W_OK):
        raise CommandError(f"{path}: cannot be written")
    return target


def checkpoint_path(path: str, *inputs: str | None) -> Path:
    """As `output_path`, of a file that is written again and again, beside it first."""
    target = output_path(path, *inputs)
    if target.exists() and not target.is_file():
        raise CommandError(f"{path}: is no regular file")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from None
    return target


@contextlib.contextmanager
def output_file(path: str | None, *inputs: str | None) -> Iterator[Path | None]:
    """Yield a temporary file that takes the place of `path` at the end, if all went well.

    That `path` can be written is known before the work begins, and no half-written file is
    ever left there.  `inputs` are files that must not be overwritten.
    """
    if path is None:
        yield None
        return
    target = output_path(path, *inputs)
    if target.exists() and not target.is_file():  # a device or a pipe
        yield target
        return
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    unfinished.add(temporary)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
        unfinished.discard(temporary)


def picture_format(path: str | None) -> str:
    """Check what a picture needs, before any work; its format, "" for no picture."""
    if path is None:
        return ""
    require_matplotlib()
    suffix = Path(path).suffix.lower().removeprefix(".") or "png"
    if suffix not in PICTURES:
        raise CommandError(f"{path}: a picture is one of .{', .'.join(PICTURES)}")
    return suffix


@contextlib.contextmanager
def compilation_told() -> Iterator[None]:
    """Say on standard error, once, that kernels are being compiled, if any are."""
    from favor_np import store
    from favor_np.cpu import code
    from favor_np.cuda import code as code_of_gpu

    told: list[object] = []

    def tell(kernel: object) -> None:
        if not told:
            told.append(kernel)
            folder = store.cache_path()
            where = "processor, up to a minute"
            if isinstance(kernel, str):
                where = "GPU, some minutes"
            kept = f"kept in {folder}" if folder else "not kept, as there is no cache"
            print(
                f"favor-np: compiling the kernels of attention for this {where}; they are {kept}",
                file=sys.stderr,
                flush=True,
            )

    listeners = code.LISTENERS, code_of_gpu.LISTENERS
    for each in listeners:
        each.append(tell)
    try:
        yield
    finally:
        for each in listeners:
            each.remove(tell)
