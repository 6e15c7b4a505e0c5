"""From text to a table: the separator, the header, the rows, and what is neither."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from . import numbers, times
from .errors import PriceError
from .words import known

Lines = npt.NDArray[np.intp]
Row = list[str]

BLANKS, WIDE = " ", "  "  # columns that stand one beside the other, with or without single blanks
HEAD = 200  # rows that decide what a file looks like


@dataclass
class Table:
    """Named columns of texts; what was decided on the way is in `said`.

    Parameters
    ----------
    header : list of str
        Names of the columns: "column 1", ... where there is no header.
    rows : list of list of str
        The cells; a row may be shorter than the header.
    lines : ndarray of int
        Line of each row in the file, from 1.
    named : bool
        Whether the file has a header.
    separator : str
        What stands between cells.
    said : list of str
        Decisions, in words.
    left_out : dict
        Lines that are no rows, by reason.
    """

    header: list[str]
    rows: Sequence[Sequence[str]]
    lines: Lines
    named: bool = True
    separator: str = ","
    said: list[str] = field(default_factory=list)
    left_out: dict[str, Lines] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start with no column taken apart."""
        self._columns: dict[int, list[str]] = {}
        self._kinds: dict[int, str] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def column(self, index: int) -> list[str]:
        """The cells of a column, without blanks around them, "" where a row is too short."""
        if index not in self._columns:
            self._columns[index] = _cells(self.rows, index)
        return self._columns[index]

    def sample(self, index: int) -> list[str]:
        """Some cells of a column that are not missing: of the first, middle and last rows."""
        count, third = len(self.rows), HEAD // 3
        middle = range(third, count - third, max(1, (count - 2 * third) // third))
        rows = [*self.rows[:third], *(self.rows[i] for i in middle)]
        rows += self.rows[max(third, count - third) :]
        return [cell for cell in _cells(rows, index) if not numbers.is_missing(cell)]

    def kind(self, index: int) -> str:
        """What a column holds: "number", "time", "text", or "" for nothing."""
        if index not in self._kinds:
            self._kinds[index] = kind_of(self.sample(index))
        return self._kinds[index]

    def of_kind(self, *kinds: str) -> list[int]:
        """The columns of some kinds."""
        return [i for i in range(len(self.header)) if self.kind(i) in kinds]

    def keep(self, wanted: npt.NDArray[np.bool_]) -> Table:
        """The table of some of the rows."""
        rows = [row for row, there in zip(self.rows, wanted, strict=True) if there]
        lines = self.lines[wanted]
        return Table(self.header, rows, lines, self.named, self.separator, self.said, self.left_out)

    def line(self, index: int = 0) -> str:
        """A row as it stands in the file, for messages."""
        shown = (self.separator + " " * (self.separator == ",")).join(self.rows[index])
        shown = "".join(c if c.isprintable() else "?" for c in " ".join(shown.split()))
        return f"line {self.lines[index]}: {shown if len(shown) <= 70 else shown[:67] + '...'}"


def read_table(text: str) -> Table:
    """Split the text of a file.

    The header is the line above the first row that is as wide as the rows and knows the most
    words for columns; lines above it, repetitions of it, comments (#) and footers are left out.
    """
    separator, text, skipped = _separator(text)
    cells: list[Row] = []
    lines: list[int] = []
    comments: dict[int, Row] = {}
    try:
        for row, line in _split(text, separator):
            if row[0].startswith("#"):
                comments[len(cells)] = row
            elif any(map(str.strip, row)):
                cells.append(row)
                lines.append(line + skipped)
    except csv.Error as error:
        raise PriceError(str(error)) from None
    if not cells:
        raise PriceError("no rows")
    if text.count('"') % 2 and any("\n" in cell for cell in cells[-1]):
        raise PriceError(f"line {lines[-1]}: a quote is opened and never closed")
    return tabulate(cells, np.array(lines, np.intp), separator, comments)


def tabulate(
    cells: list[Row],
    lines: Lines,
    separator: str = ",",
    comments: dict[int, Row] | None = None,
) -> Table:
    """Find the header among rows of cells, and what is no row."""
    kinds, width = _body(cells)
    first = next((i for i, row in enumerate(cells) if _is_data(row, kinds)), len(cells))
    above = cells[:first]
    if first == len(cells):  # nothing looks like data
        first = int(len(cells) == 1 or not any(kinds))
        above = cells[:first]
    levels = [row for row in above if len(row) >= width]
    rows_among = _rows_among(levels, kinds)
    if rows_among:  # whose time cannot be read
        first = next(i for i, row in enumerate(cells) if row is rows_among[0])
        above, levels = cells[:first], levels[: len(levels) - len(rows_among)]
    if not levels:
        levels = [
            [row[0].lstrip("# "), *row[1:]]
            for place, row in (comments or {}).items()
            if place <= first and len(_trimmed(row)) == width and sum(map(known, row)) > 1
        ][-1:]
    if not levels:
        told = [sum(map(known, row)) * (len(row) > 1) for row in above]
        narrow = [i for i, words in enumerate(told) if words > 1 or (words and i == len(above) - 1)]
        if narrow:
            raise PriceError(
                f"the rows have {width} cells (line {lines[first]}), the header in line "
                f"{lines[narrow[-1]]} names {len(above[narrow[-1]])}: "
                "which is which cannot be known"
            )
    rows, lines = cells[first:], lines[first:]
    if not rows:
        raise PriceError("a header and no rows")
    header = _names(levels) if levels else [f"column {i + 1}" for i in range(width)]
    table = Table(header, rows, lines, bool(levels), separator)
    _leave_out(table, levels, kinds)
    return table


# ----------------------------------------------------------------------------------------
# Separator
# ----------------------------------------------------------------------------------------


def _separator(text: str) -> tuple[str, str, int]:
    """The separator, the text without the line that names it, and how many lines that were."""
    told = re.match(r'\s*"?sep=(.)"?;*,*[^\S\n]*\n', text, re.IGNORECASE)
    if told:
        return told[1], text[told.end() :], text.count("\n", 0, told.end())
    return find_separator(text), text, 0


def find_separator(text: str) -> str:
    """The separator that cuts most lines into equally many cells; blanks if no other does."""
    lines = [s for s in text[: 2**16].split("\n") if s.strip() and not s.startswith("#")]
    lines = lines[: 2 * HEAD]

    def agreeing(separator: str) -> int:
        try:
            widths = Counter(len(row) for row, _ in _split("\n".join(lines), separator))
        except csv.Error:
            return 0
        return max((count for width, count in widths.items() if width > 1), default=0)

    best = max("\t|;,", key=agreeing)  # of equal ones the first: commas are also decimal marks
    if agreeing(best) >= len(lines) / 2:
        return best
    blanks = max((WIDE, BLANKS), key=agreeing)
    if agreeing(blanks) >= max(agreeing(best), len(lines) / 2):
        return blanks
    return best if agreeing(best) else ","


def _split(text: str, separator: str) -> Iterator[tuple[Row, int]]:
    """Rows that are not empty, with the lines they end in."""
    lines: Iterable[str] = io.StringIO(text)
    if separator in (BLANKS, WIDE):
        gap = re.compile(r"[ \t\u00a0]" + ("{2,}" if separator == WIDE else "+"))
        lines, separator = (gap.sub("\t", line.strip()) + "\n" for line in lines), "\t"
    quotes = "'" if re.match(rf"\s*'[^'\n]*'{re.escape(separator)}", text) else '"'
    reader = csv.reader(lines, delimiter=separator, quotechar=quotes, skipinitialspace=True)
    return ((row, reader.line_num) for row in reader if row)


# ----------------------------------------------------------------------------------------
# Header and rows
# ----------------------------------------------------------------------------------------


def _cells(rows: Sequence[Sequence[str]], index: int) -> list[str]:
    return [row[index].strip() if index < len(row) else "" for row in rows]


def _trimmed(row: Row) -> Row:
    """The row without empty cells at its end."""
    end = len(row)
    while end and not row[end - 1].strip():
        end -= 1
    return row[:end]


def kind_of(texts: Sequence[str]) -> str:
    """What most cells of a column are: "number", "time", "text", or "" where all are missing."""
    found = Counter(
        "number" if numbers.is_number(text) else "time" if times.is_time(text) else "text"
        for text in texts
        if not numbers.is_missing(text)
    )
    return found.most_common(1)[0][0] if found else ""


def _body(cells: list[Row]) -> tuple[list[str], int]:
    """Kinds of the columns and width of the rows, from rows that hardly can be the header."""
    begin = max(1, len(cells) // 3) if len(cells) > 1 else 0
    step = max(1, (len(cells) - begin) // HEAD)
    rows = [_trimmed(row) for row in cells[begin::step]]
    count = Counter(map(len, rows))
    usual = max(count, key=lambda width: (count[width], width))
    rows = [row for row in rows if len(row) <= usual or count[len(row)] > len(rows) / 5]
    widest = max(map(len, rows))
    return [kind_of(_cells(rows, i)) for i in range(widest)], widest


def _is_data(row: Row, kinds: list[str]) -> bool:
    """Whether a row is one of the body: it has a time where the body has, or numbers."""
    cells = [(cell.strip(), kind) for cell, kind in zip(row, kinds, strict=False)]
    if sum(bool(cell) for cell, _ in cells) < 2 <= sum(map(bool, kinds)):
        return False
    if "time" in kinds:
        return any(kind == "time" and times.is_time(cell) for cell, kind in cells)
    cells = [(cell, kind) for cell, kind in cells if kind == "number" and cell]
    found = [numbers.is_number(cell) or numbers.is_missing(cell) for cell, _ in cells]
    return bool(found) and all(found) and any(numbers.is_number(cell) for cell, _ in cells)


def _rows_among(levels: list[Row], kinds: list[str]) -> list[Row]:
    """The lines from the first on that is no header but has numbers where the body has."""
    told = [sum(map(known, row)) for row in levels]
    head = told.index(max(told)) if any(told) else -1
    for i, row in enumerate(levels[head + 1 :], head + 1):
        cells = zip(row, kinds, strict=False)
        if row[0].strip() and any(k == "number" and numbers.is_number(c) for c, k in cells):
            return levels[i:]
    return []


def _names(levels: list[Row]) -> list[str]:
    """Names of the columns, from one or several lines.

    The line that knows most words counts.  The others are added where it repeats names, and
    stand in where it has none.
    """
    level = max(levels, key=lambda row: sum(map(known, row)))  # of equal ones the first
    width = len(_trimmed(level))
    width = max(width, *(len(_trimmed(row)) for row in levels if len(row) <= len(level)))
    columns = [[" ".join(cell.split()) for cell in _cells(levels, i)] for i in range(width)]
    main = levels.index(level)
    names = [column[main] for column in columns]
    repeated = {name for name, count in Counter(filter(None, names)).items() if count > 1}
    telling = [i for i in range(len(levels)) if len({column[i] for column in columns[1:]}) > 1]
    for i, column in enumerate(columns):
        if names[i] in repeated and len(telling) > 1:
            names[i] = " ".join(dict.fromkeys(column[j] for j in telling if column[j]))
        names[i] = names[i] or next(filter(None, column), "") or f"column {i + 1}"
    return names


def _leave_out(table: Table, levels: list[Row], kinds: list[str]) -> None:
    """Take out what is no row; rows with more cells than the header names are an error."""
    width, repeated, footers = len(table.header), [], []
    keep = np.ones(len(table), bool)
    for i, row in enumerate(table.rows):
        if row in levels:
            repeated.append(i)
        elif len(row) > width or not any(row[1:]):
            cells = _trimmed(list(row))
            if not _is_data(cells, kinds) and len(kinds) > 1 and not _begins(cells, kinds):
                footers.append(i)
            elif len(cells) > width:
                raise PriceError(
                    f"line {table.lines[i]} has {len(cells)} cells, where "
                    + (f"the header names {width}" if levels else f"most have {width}")
                    + f" ({table.line(i).partition(': ')[2]})"
                )
    for reason, found in (("header repeated", repeated), ("not a row of the table", footers)):
        if found:
            table.left_out[reason] = table.lines[found]
            keep[found] = False
    if not keep.all():
        table.rows = [row for row, there in zip(table.rows, keep, strict=True) if there]
        table.lines = table.lines[keep]
    if not table.rows:
        raise PriceError("a header and no rows")


def _begins(cells: Row, kinds: list[str]) -> bool:
    """Whether a row without further cells begins like a row: by a time or a number."""
    return len(cells) == 1 and (
        times.is_time(cells[0].strip()) or (kinds[0] == "number" and numbers.is_number(cells[0]))
    )
