"""What the reports of ``favor-np forecast`` share: sections of labelled rows, tables, and JSON."""

from __future__ import annotations

import csv
import math
import textwrap
from pathlib import Path
from typing import Any

from favor_np.forecast import Prices
from favor_np.forecast._calendar import gaps

from ._text import GLUE, WIDTH

Section = tuple[str, list[tuple[str, str]]]

LABEL = 18  # width of the first column


def lines_of(sections: list[Section]) -> list[str]:
    """Return the lines of a report, at most 80 columns wide."""
    lines = []
    for title, rows in sections:
        lines += [*textwrap.wrap(title, WIDTH), *(x for row in rows for x in _row(*row)), ""]
    return lines[:-1]


def _row(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {label:<{LABEL}}",
        subsequent_indent=" " * (LABEL + 2),
        break_on_hyphens=False,
    )


def read_section(prices: Prices) -> Section:
    """Say what was read, and what could not be used."""
    column = f", column {prices.column}" if prices.column else ""
    order = f", {prices.order} in the file" if prices.order in ("descending", "unsorted") else ""
    rows = [
        ("series", prices.name + column),
        (
            "used",
            f"{len(prices):,} of {prices.rows:,} rows, {prices.time_label(0)} to "
            f"{prices.time_label(-1)}, {prices.step} apart{order}",
        ),
    ]
    rows += [
        ("dropped", f"{count:,} x {reason} (line {line:,}{' on' * (count > 1)}); returns span gaps")
        for reason, (count, line) in prices.dropped.items()
    ]
    found = gaps(prices)
    if found is not None:
        rows.append(
            (
                "gaps",
                f"{found.count:,} of {found.steps:,} steps are longer, up to "
                f"{_duration(found.longest)}; each counts as one, and moves over them are "
                f"{two(found.ratio)} times as large",
            )
        )
    return "READ", rows + ([("note", prices.note)] if prices.note else [])


def about_input(prices: Prices) -> dict[str, Any]:
    """Return the same for JSON."""
    return {
        "name": prices.name,
        "column": prices.column,
        "rows": prices.rows,
        "used": len(prices),
        "dropped": {
            reason: {"rows": count, "first_line": line}
            for reason, (count, line) in prices.dropped.items()
        },
        "order": prices.order,
        "step": prices.step,
        "first": prices.time_label(0),
        "last": prices.time_label(-1),
        "note": prices.note,
    }


def two(value: float) -> str:
    """Two figures, without an exponent unless it is huge."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def _duration(value: float) -> str:
    """Return seconds in the largest unit that they fill."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, size = next((u for u in units if value >= u[1]), ("second", 1))
    count = f"{value / size:,.3g}"
    return f"{count}{GLUE}{unit}{'' if count == '1' else 's'}"


def clean(value: Any) -> Any:
    """Replace what JSON has no word for (NaN, infinities) by null."""
    if isinstance(value, dict):
        return {name: clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write columns as CSV; what is not known is empty."""
    cells = [_column_cells(values) for values in columns.values()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*cells, strict=True))


def _column_cells(values: Any) -> list[Any]:
    items = values if isinstance(values, list) else values.tolist()
    return [
        ("" if math.isnan(item) else f"{item:.10g}") if isinstance(item, float) else item
        for item in items
    ]
