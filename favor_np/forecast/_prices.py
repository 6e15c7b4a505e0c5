"""Price series: reading them from delimited text, and what could not be used."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Times = npt.NDArray[np.datetime64]

BUNDLED = files("favor_np.forecast") / "data" / "wti-daily.csv"  # in a zip file, too
BUNDLED_NAME = "WTI crude oil, USD a barrel (bundled, US EIA)"

PRICE_WORDS = {"price", "close", "closing", "last", "settle", "settlement", "value"}
NOT_PRICE_WORDS = {
    *("open", "high", "low", "volume", "vol", "bid", "ask", "change", "chg", "percent", "time"),
    *("date", "prev", "previous", "qty", "quantity", "size", "count", "trades", "market", "cap"),
}
TIME_WORDS = {"date", "time", "datetime", "timestamp", "unix", "day", "month", "ts", "period"}


class PriceError(ValueError):
    """A price series that cannot be read or used; the message is one line for the user."""


@dataclass(frozen=True, eq=False, repr=False)
class Prices:
    """A series of positive prices in order of time.

    Parameters
    ----------
    values : ndarray, shape (n,), float64
        The prices: finite and greater than 0.
    times : ndarray, shape (n,), datetime64, optional
        Their times (UTC), increasing; None where only the order is known.
    name : str
        What the series is called in reports.
    column : str
        The column it was read from.
    rows : int
        Data rows in the file.
    dropped : dict
        For each reason why rows could not be used, how many there were and where the first
        one is (line number, counted from 1).
    order : str
        How the rows stood in the file: "ascending", "descending", "unsorted" or "file".
    note : str
        A choice that the reader made and the user should know about; mostly empty.
    """

    values: F64
    times: Times | None = None
    name: str = "prices"
    column: str = ""
    rows: int = 0
    dropped: dict[str, tuple[int, int]] = field(default_factory=dict)
    order: str = "file"
    note: str = ""

    def __repr__(self) -> str:
        """One line: how many, from when to when."""
        span = f"{self.time_label(0)} to {self.time_label(-1)}"
        return f"<Prices {self.name!r}: {len(self):,}, {span}, step {self.step}>"

    def __len__(self) -> int:
        """Number of usable prices."""
        return len(self.values)

    @property
    def step(self) -> str:
        """The usual distance of two prices in words: "1 day", "5 minutes", "1 step"."""
        if self.times is None or len(self) < 2:
            return "1 step"
        seconds = float(np.median(np.diff(self.times) / np.timedelta64(1, "s")))
        for unit, size in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0), ("second", 1.0)):
            if seconds >= size:
                count = seconds / size
                return f"{count:.4g} {unit}{'' if f'{count:.4g}' == '1' else 's'}"
        return f"{seconds:.3g} seconds"

    def time_label(self, index: int) -> str:
        """Time of one price, as short as the series allows."""
        if self.times is None:
            return f"price {index % len(self) + 1:,}"
        times = self.times.astype(f"datetime64[{_shortest_unit(self.times)}]")
        return str(times[index]).replace("T", " ")

    @classmethod
    def from_array(cls, values: npt.ArrayLike, name: str = "prices") -> Prices:
        """Make a series from numbers alone; those that are no usable price are dropped.

        Parameters
        ----------
        values : array_like, shape (n,)
            Prices in order of time.
        name : str
            What the series is called.

        Returns
        -------
        Prices

        Raises
        ------
        PriceError
            If `values` is not one-dimensional or fewer than two prices can be used.

        Examples
        --------
        >>> from favor_np.forecast import Prices
        >>> series = Prices.from_array([20.0, 21.0, -3.0, 22.0])
        >>> series.values, series.dropped
        (array([20., 21., 22.]), {'price not above zero': (1, 3)})
        """
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1:
            raise PriceError(f"prices must be one-dimensional, got shape {array.shape}")
        dropped = _Dropped()
        keep = _keep_usable(array, np.arange(1, len(array) + 1), dropped)
        _check_enough(array[keep], name)
        return cls(array[keep], name=name, rows=len(array), dropped=dropped.reasons)


def read_prices(path: str | PathLike[str] | None = None, column: str | None = None) -> Prices:
    """Read a price series from a text file with columns.

    Separators are found among comma, semicolon, tab and bar; a header is used if there is one.
    The price is the column whose name has one of the words price, close, last, settle or value
    (and not open, high, low, volume, ...), or the only column of numbers.  Where both "Adj
    Close" and "Close" are there, the adjusted one is taken, because a return should not see a
    split; any other choice between several columns is the user's, through `column`.  Times are
    ISO 8601 or Unix seconds (milliseconds and smaller are recognised by their size) and are
    taken as UTC; rows may be in any order, of two with the same time the one further down the
    file counts.  A row without a usable price (missing, text, NaN, infinite, zero or negative:
    it has no logarithm) or time is dropped and counted, and the next return spans the gap.

    Parameters
    ----------
    path : path-like, optional
        The file; "-" is standard input.  Default: the bundled daily prices of WTI crude oil.
    column : str, optional
        Name of the price column, or its number counted from 1.

    Returns
    -------
    Prices

    Raises
    ------
    PriceError
        If no series can be read from the file.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> from favor_np.forecast import read_prices
    >>> prices = read_prices()
    >>> len(prices), prices.step, prices.time_label(0), prices.time_label(-1)
    (10225, '1 day', '1986-01-02', '2026-08-18')
    >>> prices.dropped
    {'price not above zero': (1, 8645)}
    """
    if path is None:
        return _parse(BUNDLED.read_bytes(), BUNDLED.name, BUNDLED_NAME, column)
    if fspath(path) == "-":
        return _parse(sys.stdin.buffer.read(), "standard input", "standard input", column)
    return _parse(Path(path).read_bytes(), fspath(path), Path(path).name, column)


# ----------------------------------------------------------------------------------------
# From bytes to a series
# ----------------------------------------------------------------------------------------


class _Dropped:
    """Counts of unusable rows by reason, with the line of the first."""

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[int, int]] = {}

    def add(self, reason: str, lines: npt.NDArray[np.intp]) -> None:
        if len(lines):
            self.reasons[reason] = (len(lines), int(lines[0]))


def _parse(data: bytes, file: str, name: str, column: str | None) -> Prices:
    header, rows, lines, delimiter = _table(_decode(data, file), file)
    price = _price_column(header, rows, column, file)
    time = _time_columns(header, rows, price)
    texts = _cells(rows, price)
    values = _numbers(texts, decimal_comma=delimiter in ";\t")
    times = None if time is None else _times(rows, time)

    dropped = _Dropped()
    has_time = np.ones(len(rows), bool) if times is None else ~np.isnat(times)
    if not has_time.any():
        sample = next((t for t in _cells(rows, time[0]) if t), "") if time else ""
        raise PriceError(
            f"{file}: no time can be read from column {_label(header, time[0] if time else 0)}, "
            f"which holds {_quote(sample)}: ISO dates (2020-04-20) or Unix seconds are expected"
        )
    dropped.add("time missing or not ISO 8601 or Unix seconds", lines[~has_time])
    values, lines = values[has_time], lines[has_time]
    texts = [text for text, there in zip(texts, has_time, strict=True) if there]
    keep = _keep_usable(values, lines, dropped, texts)
    if not keep.any():
        raise PriceError(
            f"{file}: no usable price in column {_label(header, price)} "
            f"({_quote(texts[0])} in line {lines[0]})"
        )
    note = ""
    if column is None and sum(_is_price(h) for h in header) == 2:
        note = "adjusted prices taken, not Close (--column to choose)"
    values, lines = values[keep], lines[keep]
    order = "file"
    if times is not None:
        times = times[has_time][keep]
        values, times, order = _sorted(values, times, lines, dropped)
    elif time is None:
        note = note or "no time column: rows are taken in the order of the file"
    _check_enough(values, file, _label(header, price))
    return Prices(values, times, name, header[price], len(rows), dropped.reasons, order, note)


def _decode(data: bytes, file: str) -> str:
    if not data.strip():
        raise PriceError(f"{file}: the file is empty")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-16"]
    elif b"\x00" in data:
        raise PriceError(f"{file}: a binary file, not delimited text")
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not re.search(r"[\x01-\x08\x0e-\x1f\x7f]", text):
            return text
    raise PriceError(f"{file}: a binary file, not delimited text")


def _table(text: str, file: str) -> tuple[list[str], list[list[str]], npt.NDArray[np.intp], str]:
    """Split into header, rows, their line numbers, and the separator that was found."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    first = next((s for s in text.split("\n") if s.strip() and not s.startswith("#")), "")
    delimiter = max(",;\t|", key=first.count)
    if first.count(delimiter) == 0:
        delimiter = ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in reader:
            if row and not row[0].startswith("#") and any(map(str.strip, row)):
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise PriceError(f"{file}: line {reader.line_num}: {error}") from None
    if not rows:
        raise PriceError(f"{file}: no rows")
    if any(np.isfinite(_number(cell)) for cell in rows[0]):
        header = [f"column {i + 1}" for i in range(len(rows[0]))]
    else:
        header = [cell.strip() for cell in rows.pop(0)]
        lines.pop(0)
    if not rows:
        raise PriceError(f"{file}: a header and no rows")
    return header, rows, np.array(lines, dtype=np.intp), delimiter


def _cells(rows: list[list[str]], column: int) -> list[str]:
    return [row[column].strip() if column < len(row) else "" for row in rows]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _numbers(texts: list[str], *, decimal_comma: bool) -> F64:
    if decimal_comma and not any("." in text for text in texts):
        texts = [text.replace(",", ".") for text in texts]
    return np.array([_number(text) for text in texts], dtype=np.float64)


def _keep_usable(
    values: F64,
    lines: npt.NDArray[np.intp],
    dropped: _Dropped,
    texts: Sequence[str] | None = None,
) -> npt.NDArray[np.bool_]:
    """Tell which values are prices, and count the others by reason."""
    number, finite, positive = ~np.isnan(values), np.isfinite(values), values > 0
    if texts is not None:
        empty = np.array([not text for text in texts], dtype=bool)
        dropped.add("price missing", lines[empty])
        number |= empty
    dropped.add("price not a number", lines[~number])
    dropped.add("price infinite", lines[np.isinf(values)])
    dropped.add("price not above zero", lines[finite & ~positive])
    keep: npt.NDArray[np.bool_] = finite & positive
    return keep


def _sorted(
    values: F64, times: Times, lines: npt.NDArray[np.intp], dropped: _Dropped
) -> tuple[F64, Times, str]:
    """Sort by time; of equal times keep the one furthest down the file."""
    steps = np.diff(times).astype(np.int64)
    order = "unsorted"
    if (steps >= 0).all():
        order = "ascending"
    elif (steps <= 0).all():
        order = "descending"
    ranks = np.argsort(times, kind="stable")
    values, times, lines = values[ranks], times[ranks], lines[ranks]
    last = np.append(times[1:] != times[:-1], True)
    dropped.add("time repeated", np.sort(lines[~last]))
    return values[last], times[last], order


def _check_enough(values: F64, file: str, column: str = "") -> None:
    where = f" in column {column}" if column else ""
    if len(values) < 2:
        raise PriceError(f"{file}: {len(values)} usable price{where}: a series needs more")
    if (values == values[0]).all():
        raise PriceError(
            f"{file}: all {len(values):,} prices{where} are equal: nothing to forecast"
        )


# ----------------------------------------------------------------------------------------
# Which column is what
# ----------------------------------------------------------------------------------------


def _words(name: str) -> set[str]:
    """Split a column's name: "AdjClose" and "adj_close" are both {"adj", "close"}."""
    return set(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()))


def _is_price(name: str) -> bool:
    words = _words(name)
    return bool(words & PRICE_WORDS) and not words & NOT_PRICE_WORDS


def _label(header: list[str], column: int) -> str:
    return _quote(header[column] if column < len(header) else f"column {column + 1}")


def _quote(text: str) -> str:
    text = text if len(text) <= 30 else text[:27] + "..."
    return '"' + "".join(c if c.isprintable() else "?" for c in text) + '"'


def _names(header: list[str], columns: Sequence[int], conjunction: str) -> str:
    names = [_label(header, column) for column in columns[:8]]
    if len(columns) > len(names):
        names.append(f"{len(columns) - len(names)} more")
    return f" {conjunction} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _price_column(header: list[str], rows: list[list[str]], column: str | None, file: str) -> int:
    if column is not None:
        return _named_column(header, column, file)
    found = [i for i, name in enumerate(header) if _is_price(name)]
    if len(found) == 2:  # the one pair with an order of preference
        adjusted = [i for i in found if _words(header[i]) & {"adj", "adjusted"}]
        if len(adjusted) == 1 and all("close" in _words(header[i]) for i in found):
            return adjusted[0]
    if not found:
        head = rows[:50]
        numeric = [i for i in range(len(header)) if np.isfinite(_numeric_share(head, i))]
        times = [i for i in numeric if _words(header[i]) & TIME_WORDS or _looks_like_time(head, i)]
        found = [i for i in numeric if i not in times]
        if not found:
            raise PriceError(
                f"{file}: no column of prices among {_names(header, range(len(header)), 'and')}; "
                "name it with --column"
            )
    if len(found) > 1:
        raise PriceError(
            f"{file}: the price could be column {_names(header, found, 'or')}; "
            "name one with --column"
        )
    return found[0]


def _named_column(header: list[str], column: str, file: str) -> int:
    wanted = column.strip().casefold()
    for fold in (str, str.casefold):
        found = [i for i, name in enumerate(header) if fold(name) == fold(column.strip())]
        if len(found) == 1:
            return found[0]
    if len(found) > 1:
        raise PriceError(
            f"{file}: {len(found)} columns are called {_quote(column)}; "
            f"give the number of one (from 1): --column {found[0] + 1}"
        )
    if wanted.isdecimal() and 1 <= int(wanted) <= len(header):
        return int(wanted) - 1
    raise PriceError(
        f"{file}: no column {_quote(column)}; there are {_names(header, range(len(header)), 'and')}"
    )


def _numeric_share(rows: list[list[str]], column: int) -> float:
    """Share of numbers in a column; NaN for none."""
    cells = [cell for cell in _cells(rows, column) if cell]
    share = sum(np.isfinite(_number(cell.replace(",", "."))) for cell in cells) / max(len(cells), 1)
    return share if share > 0 else np.nan


def _looks_like_time(rows: list[list[str]], column: int) -> bool:
    """Whether a nameless column of numbers is one of times: whole, large or 20200420, one-way."""
    cells = _cells(rows, column)
    numbers = np.array([_number(cell) for cell in cells])
    if not (np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all()):
        return False
    steps = np.diff(numbers)
    calendar = all(len(cell) == 8 and _iso_time(cell) for cell in cells)
    return bool((calendar or (numbers > 1e8).all()) and ((steps >= 0).all() or (steps <= 0).all()))


def _time_columns(
    header: list[str], rows: list[list[str]], price: int
) -> tuple[int, int | None] | None:
    """Find the column of times, and a second one where date and time of day stand apart."""
    head = rows[:50]
    others = [i for i in range(len(header)) if i != price]
    named = [i for i in others if _words(header[i]) & TIME_WORDS]
    for i in named or others:
        numeric = np.isfinite(_numeric_share(head, i))
        if numeric and not named and not _looks_like_time(head, i):  # numbers are not dates
            continue
        if not np.isnat(_times(head, (i, None))).all():
            clock = [j for j in others if _words(header[j]) == {"time"} and j != i]
            for j in clock:
                if not np.isnat(_times(head, (i, j))).all():
                    return i, j
            return i, None
    return (named[0], None) if named else None


# ----------------------------------------------------------------------------------------
# Times
# ----------------------------------------------------------------------------------------


def _times(rows: list[list[str]], columns: tuple[int, int | None]) -> Times:
    """Times of all rows in UTC microseconds; NaT where there is none."""
    texts = _cells(rows, columns[0])
    if columns[1] is not None:
        clock = _cells(rows, columns[1])
        texts = [f"{day}T{time}" for day, time in zip(texts, clock, strict=True)]
    numbers = np.array([_number(text) for text in texts])
    numeric = np.isfinite(numbers)
    if numeric.sum() <= len(texts) / 2:
        return np.array([_iso_time(text) for text in texts], dtype="datetime64[us]")
    if np.median(numbers[numeric]) < 1e8:  # 20200420, or a year
        calendar = np.array([_iso_time(text) for text in texts], dtype="datetime64[us]")
        if not np.isnat(calendar[numeric]).any():
            return calendar
    return _unix_times(numbers)


def _unix_times(numbers: F64) -> Times:
    """Unix times; the unit follows from the size: 1e11 seconds would be the year 5138."""
    size = float(np.nanmedian(numbers))
    units = ((1e11, 1e6), (1e14, 1e3), (1e17, 1.0), (np.inf, 1e-3))
    factor = next(factor for limit, factor in units if size < limit)
    micro = numbers * factor
    valid = np.isfinite(micro) & (np.abs(micro) < 2.0**62)
    times = np.full(len(numbers), np.datetime64("NaT"), dtype="datetime64[us]")
    times[valid] = np.round(micro[valid]).astype(np.int64).astype("datetime64[us]")
    return times


def _iso_time(text: str) -> datetime | None:
    """Read ISO 8601 in UTC, also a month or year alone, and dots or slashes (year first)."""
    try:
        return _in_utc(datetime.fromisoformat(text))
    except ValueError:
        pass
    match = re.fullmatch(
        r"(1[6-9]\d\d|2[01]\d\d)(?:[-./](\d{1,2})(?:[-./](\d{1,2})(?:[T ]+(\S.*))?)?)?", text
    )
    if match is None:
        return None
    year, month, day, clock = match.groups()
    try:
        when = date(int(year), int(month or 1), int(day or 1)).isoformat()
        clock = (clock or "00:00").removesuffix("UTC").strip()
        return _in_utc(datetime.fromisoformat(f"{when}T{clock}"))
    except ValueError:
        return None


def _in_utc(when: datetime) -> datetime | None:
    try:
        return when if when.tzinfo is None else when.astimezone(UTC).replace(tzinfo=None)
    except OverflowError:  # year 1 or 9999, pushed over the edge by its zone
        return None


def _shortest_unit(times: Times) -> str:
    micro = times.astype("datetime64[us]").astype(np.int64)
    for unit, size in (("D", 86_400_000_000), ("m", 60_000_000), ("s", 1_000_000)):
        if not (micro % size).any():
            return unit
    return "us"
