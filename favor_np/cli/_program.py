"""What ``favor-np`` does with its arguments, and how its errors look."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from favor_np import __version__

from . import COMMANDS
from ._options import CommandError, unfinished


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def run(argv: Sequence[str] | None) -> int:
    """Run a sub-command; see `favor_np.cli.main`."""
    if argv is None:  # this process is the program
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with contextlib.suppress(ValueError):  # only the main thread may
                signal.signal(signal.SIGINT, _stop)
        argv = sys.argv[1:]
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by >&-: no other file may take its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or ² still gets its text
    parser = _parser(argv)
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    module = importlib.import_module(f"favor_np.cli.{args.command}")
    try:
        status: int = module.run(args)
        sys.stdout.flush()
    except (CommandError, FloatingPointError) as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _complain(f"{name}{error.strerror or error}")
    except MemoryError as error:
        return _complain(f"not enough memory: {error}" if str(error) else "not enough memory")
    except ImportError as error:
        if error.name not in ("matplotlib", "onnx", "onnxruntime", "safetensors", "tqdm"):
            raise
        return _complain(str(error))
    return status


def _stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    """End the program at once.

    A KeyboardInterrupt would become an ImportError where it meets an extension module that is being
    imported, leave objects half made, and be lost in finalizers.
    """
    for path in unfinished:
        path.unlink(missing_ok=True)
    line = b"favor-np: error: interrupted\n"
    os.write(2, b"\n" + line if os.isatty(2) else line)  # a progress bar has no end of line
    os._exit(130)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="favor-np",
        description="Linear-time attention (FAVOR+) on NumPy arrays.",
        epilog="favor-np COMMAND --help tells the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"favor-np {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in argv:  # only its module is needed, and importing the others takes time
            importlib.import_module(f"favor_np.cli.{name}").add_arguments(command)
    return parser


def _complain(message: str) -> int:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"favor-np: error: {line}", file=sys.stderr)
    return 2
