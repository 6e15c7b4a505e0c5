"""The program ``favor-np``: one module a sub-command, loaded only when it is asked for.

A sub-command module has two functions: ``add_arguments(parser)`` and ``run(args) -> int``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from favor_np import __version__

from ._options import CommandError

COMMANDS = {
    "forecast": "forecast a price series from its own past, and judge it honestly",
    "compare": "FAVOR+ against exact attention: error, time and memory",
    "info": "versions, processor, threads, cache and GPU of this installation",
    "warmup": "compile the kernels now, so that the first call is quick",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0, or 2 where the user's input was wrong, 130 after an interrupt.

    Examples
    --------
    >>> from favor_np.cli import main
    >>> main(["forecast", "no-such-file.csv"])                  # and one line on stderr
    2
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or ² still gets its text
    args = _parser(argv).parse_args(argv)
    module = importlib.import_module(f"favor_np.cli.{args.command}")
    try:
        status: int = module.run(args)
        sys.stdout.flush()
    except CommandError as error:
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
        if error.name not in ("matplotlib", "tqdm"):
            raise
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    return status


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
    print(f"favor-np: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
