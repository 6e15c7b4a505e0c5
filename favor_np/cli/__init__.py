"""The program ``favor-np``: one module a sub-command, loaded only when it is asked for.

A sub-command module has two functions: ``add_arguments(parser)`` and ``run(args) -> int``.
Nothing is imported here, so that an interrupt finds `main` running, and no traceback is shown.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "forecast": "forecast a price series from its own past, and judge it honestly",
    "demo": "what the method is for, in one screen: a short series beside a long one",
    "compare": "FAVOR+ against exact attention: error, time and memory",
    "export": "a trained model, or attention, as an ONNX model for runtimes without Python",
    "train": "train a language model on a text, and judge it honestly",
    "generate": "continue a text with a model that was trained",
    "info": "versions, processor, threads, cache and GPU of this installation",
    "warmup": "compile the kernels now, so that the first call is quick",
}


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
    try:
        if argv is None:  # this process is the program
            import os

            # Threads of NumPy's products wait for more work for a while, at the cost of ours.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from ._program import run

        return run(argv)
    except KeyboardInterrupt:
        import sys

        print("favor-np: error: interrupted", file=sys.stderr)
        return 130
