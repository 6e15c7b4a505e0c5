"""Progress of long work: ``progress(stage, done, total)``, and the bars that follow it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias

from favor_np import validation

Progress: TypeAlias = Callable[[str, int, int], object]


class Report(Protocol):
    """What work calls to tell how far it is; a bar shows the note beside the time left."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> object:
        """Tell it."""


PATIENCE = 2.0  # seconds that work takes before a bar is worth it


def reporting(progress: bool | Progress | None) -> AbstractContextManager[Report]:
    """Check the argument of this name, and return the context of work whose progress is told.

    Parameters
    ----------
    progress : bool or callable, optional
        Called as ``progress(stage, done, total)``. True shows a bar a stage on standard error and
        leaves it there; None removes it at the end, and shows it only if standard error is a
        terminal, tqdm is there, and the work lasts over two seconds.

    Returns
    -------
    context manager
        It gives what to call as ``report(stage, done, total)``: see `Report`.  A stage whose first
        call has ``done = 0`` is one long call: its bar is shown at once.

    Raises
    ------
    TypeError
        If `progress` is something else.
    ImportError
        If it is True and tqdm is missing.
    """
    if callable(progress):
        told = progress
        return nullcontext(
            lambda stage, done, total, note="": told(stage, done, total)  # noqa: ARG005
        )
    if progress is None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        shown = terminal and find_spec("tqdm") is not None
    else:
        shown = validation.flag("progress", progress)
    if not shown:
        return nullcontext(silent)
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm: pip install 'favor_np[progress]'", name="tqdm"
        ) from None
    return _bars(tqdm, stay=progress is not None)


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Tell nobody."""


@contextmanager
def _bars(tqdm: Callable[..., Any], *, stay: bool) -> Iterator[Report]:
    """Yield what shows a bar for each stage, one after the other."""
    now: str | None = None
    bar: Any = None
    begin = time.monotonic()

    def show(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal now, bar, begin
        if stage != now:
            if bar is not None:
                bar.close()
                begin = time.monotonic()
            wait = 0.0 if stay or done == 0 else begin + PATIENCE - time.monotonic()
            now = stage
            bar = tqdm(
                desc=stage,
                initial=done,
                total=total,
                delay=max(wait, 0.0),
                leave=stay,
                unit_scale=total >= 10_000,
            )
        bar.set_postfix_str(note, refresh=False)
        bar.update(max(done - bar.n, 0))

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
