"""The error of a price series that cannot be read, and how messages quote what was found."""

from __future__ import annotations

from collections.abc import Sequence


class PriceError(ValueError):
    """A price series that cannot be read or used; the message is one line for the user."""


def quote(text: str) -> str:
    """A cell in quotation marks, short and printable."""
    text = text if len(text) <= 30 else text[:27] + "..."
    return '"' + "".join(c if c.isprintable() else "?" for c in text) + '"'


def listed(names: Sequence[str], conjunction: str = "and") -> str:
    """Quoted names in a row: '"a", "b" and "c"', no more than eight."""
    shown = [quote(name) for name in names[:8]]
    if len(names) > len(shown):
        shown.append(f"{len(names) - len(shown)} more")
    return f" {conjunction} ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
