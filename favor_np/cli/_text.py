"""How the reports of the sub-commands write quantities."""

import math

WIDTH = 80
GLUE = "\N{NO-BREAK SPACE}"  # keeps a number and its unit on one line; printed as a space


def printed(lines: list[str]) -> str:
    """Return the text of a report as it is printed."""
    return "\n".join(lines).replace(GLUE, " ")


def figures(value: float) -> str:
    """Three significant figures, never an exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(digits, 0)}f}"


def seconds(value: float) -> str:
    """Return a time in the unit that suits it."""
    if value < 1e-3:
        return f"{figures(value * 1e6)}{GLUE}µs"
    return f"{figures(value * 1e3)}{GLUE}ms" if value < 1 else f"{figures(value)}{GLUE}s"


def memory(value: int) -> str:
    """Return a number of bytes in the unit that suits it."""
    if value < 2**16:
        return f"<{GLUE}64{GLUE}KiB"
    if value < 2**30:
        return f"{figures(value / 2**20)}{GLUE}MiB"
    return f"{figures(value / 2**30)}{GLUE}GiB"
