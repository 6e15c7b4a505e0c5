"""Which column of a table is the price, which one is the time, and whose prices they are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import words
from .errors import PriceError, listed, quote
from .formats import DAY, NONE, Ints
from .numbers import F64, decimal_mark, is_missing
from .table import Table
from .times import Unreadable, is_clock, read_times

# ----------------------------------------------------------------------------------------
# The price
# ----------------------------------------------------------------------------------------


def price_column(
    table: Table, column: str | None, among: Sequence[int] | None = None
) -> tuple[int, str]:
    """The column of prices, and what to say of the choice.

    It is the one that is called a closing price, or just a price; the adjusted one where both
    are there, because a return should not see a split; otherwise the only column of numbers
    that is not called something else.  Any other choice is the user's.

    Parameters
    ----------
    table : Table
    column : str, optional
        Its name, or its number counted from 1.
    among : sequence of int, optional
        The columns that come into question.

    Raises
    ------
    PriceError
        If there is none, or more than one.
    """
    if column is not None:
        return _named_column(table, column), ""
    header = table.header
    numeric = [i for i in table.of_kind("number") if among is None or i in among]
    found = [i for i in numeric if words.is_close(header[i])]
    if not found and {"o", "h", "l", "c"} <= {name.lower() for name in header}:
        found = [i for i in numeric if header[i].lower() == "c"]
    if not found:  # reading it tells what is wrong
        texts = [i for i in table.of_kind("text", "") if words.is_close(header[i])]
        found = texts if table.named and len(texts) == 1 and among is None else []
    adjusted = [i for i in found if words.is_adjusted(header[i])]
    if len(found) == 2 and len(adjusted) == 1:
        other = next(i for i in found if i not in adjusted)
        return adjusted[0], f"adjusted prices taken, not {header[other]} (--column to choose)"
    if not found:
        found = [i for i in numeric if not _is_no_price(table, i)]
        if not found:
            raise PriceError(f"no column of prices among {listed(header)}; name it with --column")
    if len(found) > 1:
        raise PriceError(
            f"the price could be column {listed([header[i] for i in found], 'or')}; "
            f"name one with --column ({table.line()})"
        )
    name = header[found[0]]
    plain = table.named and not words.is_close(name) and len(words.words(name) & words.OTHER_PRICE)
    return found[0], f"no closing price, column {quote(name)} taken" if plain else ""


def _named_column(table: Table, column: str) -> int:
    wanted = column.strip()
    for same in (str, str.casefold):
        found = [i for i, name in enumerate(table.header) if same(name) == same(wanted)]
        if len(found) == 1:
            return found[0]
    if len(found) > 1:
        raise PriceError(
            f"{len(found)} columns are called {quote(column)}; "
            f"give the number of one (from 1): --column {found[0] + 1}"
        )
    if wanted.isdecimal() and 1 <= int(wanted) <= len(table.header):
        return int(wanted) - 1
    raise PriceError(f"no column {quote(column)}; there are {listed(table.header)}")


def _is_no_price(table: Table, index: int) -> bool:
    """Whether a column of numbers is called something else, counts the rows, or is a time."""
    name, cells = table.header[index], table.sample(index)
    if words.is_no_price(name):
        return True
    whole = all(re.fullmatch(r"\d{1,18}", cell) for cell in cells)
    if whole and (words.is_date(name) or (words.is_symbol(name) and table.named)):
        return True
    if whole and len(cells) > 2 and index == 0 and len(table.of_kind("number")) > 1:
        counts = [int(cell) for cell in cells]
        if counts[0] in (0, 1) and counts == sorted(counts) and set(np.diff(counts[:50])) == {1}:
            return True
    return _looks_like_time(table, index)


def other_mark(table: Table, price: int) -> str | None:
    """The decimal mark that other columns tell; a point where commas separate the cells."""
    for index in table.of_kind("number"):
        if index != price and (mark := decimal_mark(table.sample(index))):
            return mark
    comma = any("," in cell for cell in table.sample(price))
    return "." if table.separator == "," or (table.separator != ";" and not comma) else None


# ----------------------------------------------------------------------------------------
# The time
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeColumn:
    """Texts that hold times, put together where they stand in several columns."""

    name: str
    texts: list[str]
    said: str = ""
    indices: tuple[int, ...] = ()


def time_column(table: Table, price: int, *, date_format: str | None = None) -> TimeColumn | None:
    """The times of a table, None where it has none.

    Of several columns the first counts that is called a time and can be read, then the first
    that can be read.  A day and a clock may stand apart, and year, month and day.

    Raises
    ------
    PriceError
        Where the only column that could hold times holds none.
    """
    others = [i for i in range(len(table.header)) if i != price]
    dates = [i for i in others if table.kind(i) == "time" and not _is_clock_column(table, i)]
    parts = None if dates else _calendar_parts(table, others)
    if parts is not None:
        return _with_clock(table, parts, others, None)
    named = [i for i in others if table.named and words.is_date(table.header[i])]
    if date_format is not None:
        found = [i for i in others if _readable(table, i, date_format)]
        found = found or named or [i for i in others if table.kind(i) == "time"]
        if not found:
            raise PriceError(f"no column holds times as {quote(date_format)}")
    else:
        found = [*dates, *(i for i in named if table.kind(i) == "number")]
        found += [i for i in others if i not in found and _looks_like_time(table, i)]
    if found:
        index = found[0]
        if len(found) > 1:
            readable = {i: _readable(table, i, date_format) for i in found}
            index = min(found, key=lambda i: (not readable[i], i not in named, i))
            alike = [i for i in found if readable[i] and _same_name(table, i, index)]
            index = max((i for i in alike if i < price), default=index)  # its own, side by side
        date = TimeColumn(table.header[index], table.column(index), indices=(index,))
        return _with_clock(table, date, others, date_format)
    found = [i for i in others if _is_clock_column(table, i)]
    found += [i for i in named if table.kind(i) == "text"]
    found += [i for i in others if _could_be_time(table, i)]
    if found:  # reading it tells what is wrong
        return TimeColumn(table.header[found[0]], table.column(found[0]), indices=(found[0],))
    return None


def _same_name(table: Table, one: int, other: int) -> bool:
    """Whether columns are called the same, but for a number at the end: Date, Date.1."""
    names = {re.sub(r"[._ ]\d+$", "", table.header[i]).casefold() for i in (one, other)}
    return table.named and len(names) == 1


def _readable(table: Table, index: int, date_format: str | None = None) -> bool:
    """Whether nearly all cells are times, be it in more than one way; constants are none."""
    cells = table.sample(index)
    if len(cells) > 1 and len(set(cells)) == 1:
        return False
    try:
        return len(read_times(cells, "", date_format=date_format).known) > 0.9 * len(cells)
    except Unreadable:
        return False
    except PriceError:  # more than one way
        return date_format is None


def _looks_like_time(table: Table, index: int) -> bool:
    """Whether a column of numbers under an unknown name is one of times."""
    cells = table.sample(index)
    if table.kind(index) != "number" or not all(
        re.fullmatch(r"-?\d{1,19}(\.\d+)?", c) for c in cells
    ):
        return False
    numbers = np.array([float(cell) for cell in cells])
    steps = np.diff(numbers)
    monotone = bool((steps >= 0).all() or (steps <= 0).all())
    whole = (numbers == np.floor(numbers)).all()
    padded = any(re.match(r"0\d", cell) for cell in cells)
    if whole and (padded or numbers.min() > 1e7) and _readable(table, index):
        return monotone or bool((numbers < 1e8).all())
    unknown = not table.named or not words.known(table.header[index])
    first = index == 0 and unknown and len(table.of_kind("number")) > 1
    steady = len(steps) > 1 and monotone and bool((steps != 0).all())
    return first and steady and _readable(table, index)


def _could_be_time(table: Table, index: int) -> bool:
    """Whether a column of texts differs from row to row and has digits, as times do."""
    cells = table.sample(index)
    if table.kind(index) != "text" or words.is_no_price(table.header[index]):
        return False
    with_digits = sum(any(map(str.isdigit, cell)) for cell in cells)
    return len(set(cells)) > 0.9 * len(cells) and with_digits > 0.9 * len(cells)


def _calendar_parts(table: Table, others: list[int]) -> TimeColumn | None:
    """Year, month and day, or quarter, or week, that stand in columns of their own."""

    def find(kind: set[str], shape: str) -> list[int]:
        for i in others:
            if words.words(table.header[i]) & kind and table.named:
                cells = table.sample(i)
                if cells and all(re.fullmatch(rf"{shape}(\.0)?", cell) for cell in cells):
                    return [i]
        return []

    year = find(words.YEAR, r"(1[89]|20)\d\d")
    month = find(words.MONTH, r"(M?(0?[1-9]|1[0-2])|[^\W\d_]{3,}\.?)")
    if not year:
        return None
    if month:
        between, indices = "-", year + month + find(words.DAY, r"(0?[1-9]|[12]\d|3[01])")
    elif quarter := find(words.QUARTER, "Q?[1-4]"):
        between, indices = "Q", year + quarter
    elif week := find(words.WEEK, r"(0?[1-9]|[1-4]\d|5[0-3])"):
        between, indices = "W", year + week
    else:
        return None
    columns = [[re.sub(r"^[MQ](?=\d)|\.0$", "", c) for c in table.column(i)] for i in indices]
    texts = [between.join(cells) if all(cells) else "" for cells in zip(*columns, strict=True)]
    return TimeColumn(" ".join(table.header[i] for i in indices), texts, indices=tuple(indices))


def _is_clock_column(table: Table, index: int) -> bool:
    cells = table.sample(index)
    return table.kind(index) == "time" and sum(map(is_clock, cells)) > 0.9 * len(cells)


_MIDNIGHT = re.compile(
    r"[T ](0?0:00(:00(\.0+)?)?|12:00(:00)? AM) *(Z|[+-]\d\d:?\d\d)?$", re.IGNORECASE
)


def _with_clock(
    table: Table, date: TimeColumn, others: list[int], date_format: str | None
) -> TimeColumn:
    """Add the column of clocks or hours, if days stand alone and there is one."""
    if not _days_alone(date.texts, date_format):
        return date
    others = [i for i in others if i not in date.indices]
    clocks = [i for i in others if _is_clock_column(table, i)]
    named = [i for i in others if table.named and words.is_clock(table.header[i])]
    candidates = [i for i in clocks if i in named] + [i for i in clocks if i not in named]
    candidates += [i for i in named if table.kind(i) in ("number", "text")]
    if len(set(date.texts)) < 0.6 * len(date.texts):  # several rows a day
        candidates += [i for i in table.of_kind("number") if i in others and i not in named]
    for i in candidates:
        texts = _clocks(table.column(i))
        if texts is not None and (i in named or i in clocks or _in_order(date.texts, texts)):
            days = [_MIDNIGHT.sub("", day) for day in date.texts]
            texts = [f"{day} {text}" if text else "" for day, text in zip(days, texts, strict=True)]
            said = f"time of day from column {quote(table.header[i])}"
            return TimeColumn(date.name, texts, said, (*date.indices, i))
    return date


def _days_alone(texts: Sequence[str], date_format: str | None) -> bool:
    """Whether times are days without a clock, or with one that is always midnight."""
    some = texts[:: max(1, len(texts) // 100)]
    try:
        reading = read_times(some, "", date_format=date_format, day_first=True)
    except PriceError:
        return False
    if any(re.fullmatch(r"\d{9,}|\d{4}(\.0)?", text) for text in some):  # Unix time, years
        return False
    days = np.unique(reading.known)
    firsts = days.view("M8[ns]").astype("M8[M]").astype("M8[ns]") == days.view("M8[ns]")
    months = len(days) > 1 and bool(firsts.all())
    return not months and not (days % DAY).any()


def _clocks(cells: Sequence[str]) -> list[str] | None:
    """Clocks as 07:00 or 7, from 070000, 700, HE07, "07:00 - 08:00" and the like; None if not."""
    found = [
        re.fullmatch(
            r"\D{0,6}(\d{1,6}(?:[:.]\d\d){0,2}(?:\.\d+)?(?:\s*[AaPp]\.?[Mm]\.?)?)(\s*[-–].*|\D*)", c
        )
        for c in cells
    ]
    texts = [match[1].removesuffix(".0").rstrip(".") if match else "" for match in found]
    given = [text for text in texts if text]
    if len(given) < 0.9 * len(cells):
        return None
    if all(map(str.isdigit, given)):
        width = max(map(len, given))
        if width > 6 or (width < 3 and len(given) > 24 and len(set(given)) == 1):
            return None
        if width > 2:  # 700, 70000
            width += width % 2
            pairs = [re.findall("..", text.zfill(width)) if text else [] for text in texts]
            texts = [":".join(pair) for pair in pairs]
            return texts if all(not p or p[0] <= "24" for p in pairs) else None
        if max(map(int, given)) > 25:
            return None
    return texts


def _in_order(days: Sequence[str], clocks: Sequence[str]) -> bool:
    """Whether what may be clocks only rises within each day, or only falls."""
    if len(set(clocks)) < 3 or not all(re.fullmatch(r"\d\d?(:\d\d)*", clock) for clock in clocks):
        return False
    minutes = [60 * int(h) + int(m or 0) for h, _, m in (c[:5].partition(":") for c in clocks)]
    same = np.array([one == other for one, other in itertools.pairwise(days)])
    steps = np.diff(minutes)[same]
    return len(steps) > 0 and bool(max((steps > 0).mean(), (steps < 0).mean()) > 0.99)


# ----------------------------------------------------------------------------------------
# Whose prices
# ----------------------------------------------------------------------------------------


def chosen_series(table: Table, symbols: Sequence[str]) -> tuple[Table, list[int] | None, str]:
    """The rows of the symbols, or, where columns are called so, those columns; and what to say.

    Raises
    ------
    PriceError
        If no cell and no column is called so.
    """
    among, said = None, []
    for symbol in symbols:
        wanted = symbol.strip().casefold()
        columns = sorted(
            range(len(table.header)),
            key=lambda i: (not words.is_symbol(table.header[i]), table.kind(i) != "text", i),
        )
        for i in columns:
            rows = np.array([cell.casefold() == wanted for cell in table.column(i)])
            if rows.any() and (words.is_symbol(table.header[i]) or table.kind(i) == "text"):
                table = table.keep(rows)
                said.append(f"rows with {symbol.strip()} in column {quote(table.header[i])}")
                break
        else:
            word = re.compile(rf"(?<![^\W_]){re.escape(wanted)}(?![^\W_])")
            among = [i for i, name in enumerate(table.header) if word.search(name.casefold())]
            if not among:
                several = [i for i in columns if _several(table, i)]
                found = f"; column {_values(table, several[0])}" if several else ""
                raise PriceError(f"no row and no column has {quote(symbol)}{found}")
    return table, among, ", ".join(said)


def check_one_series(table: Table, values: F64, times: Ints | None, used: Sequence[int]) -> None:
    """Refuse prices of several things in one column.

    That is so where a column called symbol, ticker, ... has several values, or one of texts
    with any name where the price jumps whenever the text changes.
    """
    for i in range(len(table.header)):
        if i in used or not _several(table, i):
            continue
        named = table.named and words.is_symbol(table.header[i])
        if named or _jumps(table.column(i), values, times):
            raise PriceError(
                f"several series in one file: column {_values(table, i)}; choose one with --symbol"
            )


def separating_column(table: Table, times: Ints, used: Sequence[int]) -> str:
    """The column that tells rows of the same time apart, as words for a message; or ""."""
    for i in range(len(table.header)):
        if i not in used and _several(table, i):
            pairs = set(zip(times.tolist(), table.column(i), strict=True))
            if len(pairs) > 0.99 * len(times):
                return f"; column {_values(table, i)}: choose with --symbol"
    return ""


def _several(table: Table, index: int) -> bool:
    """Whether a column has some values that come again and again."""
    if table.kind(index) != "text" and not (table.named and words.is_symbol(table.header[index])):
        return False
    different = {cell for cell in table.column(index) if not is_missing(cell)}
    return 2 <= len(different) <= max(2, len(table) // 2)


def _values(table: Table, index: int) -> str:
    values = list(dict.fromkeys(cell for cell in table.column(index) if cell))
    return f"{quote(table.header[index])} has {listed(values)}"


def _jumps(labels: Sequence[str], values: F64, times: Ints | None) -> bool:
    """Whether the price jumps where the label changes, far beyond its moves elsewhere."""
    good = np.isfinite(values) & (values > 0)
    if times is not None:
        good &= times != NONE
    codes = np.unique(labels, return_inverse=True)[1][good]
    logs, moments = np.log(values[good]), np.arange(good.sum()) if times is None else times[good]
    order = np.argsort(moments, kind="stable")
    codes, logs = codes[order], logs[order]
    changes = codes[1:] != codes[:-1]
    if changes.sum() < 2 * len(set(codes.tolist())):
        return False
    grouped = np.argsort(codes, kind="stable")
    inside = np.abs(np.diff(logs[grouped]))[codes[grouped][1:] == codes[grouped][:-1]]
    across = np.abs(np.diff(logs))[changes]
    if not len(inside):
        return False
    return bool(np.median(across) > 0.02 and np.median(across) > 5 * np.median(inside))
