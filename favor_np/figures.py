"""What the pictures of the package share: their looks, and the one thing that they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

INK, BLUE, ORANGE, GREEN, RED, GREY = (
    *("#22303c", "#2166ac", "#e08214", "#1b7837", "#b2182b", "#8c98a4"),
)
STYLE = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the looks of the package, if matplotlib is there: see `require_matplotlib`."""
    require_matplotlib()
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, if matplotlib is not there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError(
            "a plot needs matplotlib: pip install 'favor_np[plot]'", name="matplotlib"
        ) from None
