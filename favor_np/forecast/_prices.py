"""Price series: the checks that they pass, and what could not be used."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .reading import files, frames
from .reading.columns import (
    check_one_series,
    chosen_series,
    other_mark,
    price_column,
    separating_column,
    time_column,
)
from .reading.errors import PriceError, quote
from .reading.formats import DAY, NONE, Ints
from .reading.numbers import is_missing, is_undefined, read_numbers
from .reading.table import Table, read_table
from .reading.times import read_times

__all__ = ["PriceError", "Prices", "read_prices"]

F64 = npt.NDArray[np.float64]
Times = npt.NDArray[np.datetime64]
Bools = npt.NDArray[np.bool_]
Lines = npt.NDArray[np.intp]
Dropped = dict[str, tuple[int, int]]

BUNDLED = package_files("favor_np.forecast") / "data" / "wti-daily.csv"  # in a zip file, too
BUNDLED_NAME = "WTI crude oil, USD a barrel (bundled, US EIA)"
ALLOW_MISSING = 0.05
LARGEST_STEP = 100  # decimal digits; the square of a larger return is no float64
NO_TIME = "time missing or not written as the others"


@dataclass(frozen=True, eq=False, repr=False)
class Prices:
    """A series of positive prices in order of time.

    Parameters
    ----------
    values : ndarray, shape (n,), float64
        The prices: finite and greater than 0.
    times : ndarray, shape (n,), datetime64, optional
        Their times, increasing: UTC where the file tells zones, but days by their local date;
        None where only the order is known.
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
        What the reader decided and the user should know about; empty for plain files.
    """

    values: F64
    times: Times | None = None
    name: str = "prices"
    column: str = ""
    rows: int = 0
    dropped: dict[str, tuple[int, int]] = field(default_factory=dict)
    order: str = "file"
    note: str = ""

    def __post_init__(self) -> None:
        """Take a series of another library as `from_array` does; refuse what is no series."""
        values, times = self.values, self.times
        if type(values) is not np.ndarray or values.dtype != np.float64:
            if times is None:
                vars(self).update(vars(Prices.from_array(values, self.name)))
                return
            values = frames.real_numbers(values)
            vars(self).update(values=values)
        if values.ndim != 1 or not (np.isfinite(values) & (values > 0)).all():
            raise PriceError(
                "prices must be one-dimensional, finite and above 0; Prices.from_array drops others"
            )
        jumps = np.flatnonzero(abs(np.diff(np.log10(values))) > LARGEST_STEP)
        if len(jumps):
            before, after = values[jumps[0] : jumps[0] + 2].tolist()
            raise PriceError(
                f"prices must not change by more than 1e{LARGEST_STEP} times in a step, "
                f"got {before:g} before {after:g}"
            )
        if times is not None:
            times = np.asarray(times, dtype=None if hasattr(times, "dtype") else "M8[us]")
            vars(self).update(times=times)
            if times.shape != values.shape or not (np.diff(times) > np.timedelta64(0)).all():
                raise PriceError(
                    "times must increase and be as many as prices, "
                    f"got {len(times)} for {len(values)}"
                )

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
        return str(self.times[index].astype(f"M8[{self._unit}]")).replace("T", " ")

    def time_texts(self, indices: npt.NDArray[np.intp]) -> list[str]:
        """Times of some prices in ISO 8601, to the second or finer where the series is finer."""
        assert self.times is not None
        unit = self._unit if self._unit in ("ms", "us", "ns") else "s"
        return [str(time) for time in self.times[indices].astype(f"M8[{unit}]")]

    @functools.cached_property
    def _unit(self) -> str:
        """The coarsest unit that tells all times."""
        assert self.times is not None
        nano = self.times.astype("M8[ns]").astype(np.int64)
        sizes = {"D": DAY, "m": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 1000}
        return next((unit for unit, size in sizes.items() if not (nano % size).any()), "ns")

    @classmethod
    def from_array(
        cls,
        values: Any,
        name: str = "prices",
        column: str | None = None,
        symbol: str | Sequence[str] | None = None,
    ) -> Prices:
        """Make a series from numbers or from a series or frame of another library.

        The times are the index of a pandas Series or DataFrame, a column of a frame or table,
        or the coordinate of an xarray DataArray; rows are sorted by them.  Prices that are
        not usable are dropped.

        Parameters
        ----------
        values : array_like, shape (n,), or series or frame of pandas, polars, Arrow or xarray
            Prices, in order of time where there are no times.
        name : str
            What the series is called.
        column, symbol : str, optional
            Of a frame: as in `read_prices`.

        Returns
        -------
        Prices

        Raises
        ------
        PriceError
            If `values` is not one-dimensional, fewer than two prices can be used, or a frame has
            more than one series.
        TypeError
            If `values` are masked, complex, dates or anything else than real numbers.

        Examples
        --------
        >>> from favor_np.forecast import Prices
        >>> series = Prices.from_array([20.0, 21.0, -3.0, 22.0])
        >>> series.values, series.dropped
        (array([20., 21., 22.]), {'price not above zero': (1, 3)})
        """
        if isinstance(values, Prices):
            return values
        with _named(name):
            table = frames.table_of(values)
            if table is not None:
                if (
                    column is None and getattr(values, "ndim", 2) == 1
                ):  # a series, whatever its name
                    column = str(len(table.header))
                options = _Options(column, _symbols(symbol), allow_missing=1.0)
                return _series(table, name, options)
        array = frames.real_numbers(values)
        if array.ndim != 1:
            raise PriceError(f"prices must be one-dimensional, got shape {array.shape}")
        dropped: Dropped = {}
        keep = _usable(array, np.arange(1, len(array) + 1), dropped)
        with _named(name):
            _check_enough(array[keep])
        return cls(array[keep], name=name, rows=len(array), dropped=dropped)


def read_prices(
    path: str | PathLike[str] | None = None,
    column: str | None = None,
    *,
    symbol: str | Sequence[str] | None = None,
    date_format: str | None = None,
    day_first: bool | None = None,
    decimal: str | None = None,
    allow_missing: float = ALLOW_MISSING,
) -> Prices:
    """Read a price series from a file with columns.

    A text file, also packed (.gz, .bz2, .xz, .zip), or .xlsx, .parquet and .feather with the
    libraries that read them (``pip install 'favor_np[files]'``).  Separators are comma,
    semicolon, tab, bar or blanks; lines above the header, comments and footers are left out.

    The price is the column that is called close, last, settle, price or value, in English or
    another European language, or the only column of numbers that is not called something else
    (volume, change, ...).  Where both "Adj Close" and "Close" are there, the adjusted one is
    taken, because a return should not see a split; any other choice between several columns is
    the user's, through `column`.

    How numbers and times are written is decided for each column as a whole, and `Prices.note`
    says so.  Numbers may have decimal commas, thousands separators, currency signs.  Times are
    ISO 8601, days and months in any order that the file settles, names of months, digits
    alone (20240102), months, quarters, Unix time in any unit, or days as spreadsheets count
    them; a clock may stand in a column of its own.  Zones are shifted to UTC, but days keep
    their local date.  Rows may be in any order; of two with the same time the one further down
    the file counts.  A row without a usable price (missing, text, NaN, infinite, zero or
    negative: it has no logarithm) or time is dropped and counted, and the next return spans
    the gap.

    Parameters
    ----------
    path : path-like, optional
        The file; "-" is standard input.  Default: the bundled daily prices of WTI crude oil.
    column : str, optional
        Name of the price column, or its number counted from 1.
    symbol : str or sequence of str, optional
        Where a file has several series: the rows that have this in a column, or the columns
        that are called so.
    date_format : str, optional
        How times are written, as for `datetime.datetime.strptime`; a clock may follow.
    day_first : bool, optional
        Whether 03/04/2024 is the 3rd of April; needed only where no day is above 12.
    decimal : {".", ","}, optional
        The decimal mark, where "1,036" could be either.
    allow_missing : float
        Share of rows that may be unusable.

    Returns
    -------
    Prices

    Raises
    ------
    PriceError
        If no series can be read from the file, or it can be read in more than one way.
    OSError
        If the file cannot be opened.
    ValueError
        If an option is none of the values above.

    Examples
    --------
    >>> from favor_np.forecast import read_prices
    >>> prices = read_prices()
    >>> len(prices), prices.step, prices.time_label(0), prices.time_label(-1)
    (10225, '1 day', '1986-01-02', '2026-08-18')
    >>> prices.dropped
    {'price not above zero': (1, 8645)}
    """
    if decimal not in (None, ".", ","):
        raise ValueError(f"decimal must be '.' or ',', got {decimal!r}")
    if not 0 <= allow_missing <= 1:
        raise ValueError(f"allow_missing must be between 0 and 1, got {allow_missing!r}")
    options = _Options(column, _symbols(symbol), date_format, day_first, decimal, allow_missing)
    if path is None:
        return _parse(BUNDLED.read_bytes(), BUNDLED.name, BUNDLED_NAME, options)
    name = os.fsdecode(path)
    file = "standard input" if name == "-" else name
    with _named(file):
        data = files.load(name)
    return _parse(data, file, file if name == "-" else Path(name).name, options)


# ----------------------------------------------------------------------------------------
# From a table to a series
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """What the user says about a file: see `read_prices`."""

    column: str | None = None
    symbols: tuple[str, ...] = ()
    date_format: str | None = None
    day_first: bool | None = None
    decimal: str | None = None
    allow_missing: float = ALLOW_MISSING


def _symbols(symbol: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if symbol is None else (symbol,) if isinstance(symbol, str) else tuple(symbol)


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Errors begin with the name of the file."""
    try:
        yield
    except PriceError as error:
        raise PriceError(f"{file}: {error}") from None


def _parse(data: bytes, file: str, name: str, options: _Options) -> Prices:
    with _named(file):
        text = files.contents(data)
        table = read_table(text) if isinstance(text, str) else frames.read_frame(*text)
        return _series(table, name, options)


def _series(table: Table, name: str, options: _Options) -> Prices:
    """Choose columns, read them, drop what cannot be used, and check the rest."""
    table, among, chosen = chosen_series(table, options.symbols)
    price, why = price_column(table, options.column, among)
    column, texts = table.header[price], table.column(price)
    values, written = read_numbers(
        texts, column, decimal=options.decimal, others=lambda: other_mark(table, price)
    )
    clock = time_column(table, price, date_format=options.date_format)
    said = [*table.said, chosen, why]
    nano, used = None, [price]
    if clock is None:
        said += [written, "no time column: rows are taken in the order of the file"]
    else:
        reading = read_times(
            clock.texts, clock.name, date_format=options.date_format, day_first=options.day_first
        )
        nano = reading.nanoseconds
        said += [reading.said, clock.said, written]
        used += clock.indices

    dropped = {why: (len(lines), int(lines[0])) for why, lines in table.left_out.items()}
    rows = len(table) + sum(count for count, _ in dropped.values())
    there = np.ones(len(table), bool) if nano is None else nano != NONE
    _count(dropped, NO_TIME, table.lines[~there])
    keep = there.copy()
    keep[there] = _usable(
        values[there],
        table.lines[there],
        dropped,
        [t for t, x in zip(texts, there, strict=True) if x],
    )
    if not keep.any():
        first = int(np.argmax(there))
        raise PriceError(
            f"no usable price in column {quote(column)} ({quote(texts[first])} in line "
            f"{table.lines[first]})"
        )
    check_one_series(table, values, nano, used)
    _check_share(~keep, dropped, options.allow_missing)
    said.append(_end_missing(keep, nano, table.lines))
    values, lines, order, times = values[keep], table.lines[keep], "file", None
    if nano is not None:
        _check_repeated(table, nano, values, keep, used, options.allow_missing)
        values, nano, order = _sorted(values, nano[keep], lines, dropped)
        _check_steps(nano, clock.name if clock else "")
        times = nano.view("M8[ns]")
        times = times if (nano % 1000).any() else times.astype("M8[us]")
    _check_enough(values, column)
    said.append(_largest_step(values, times))
    note = "; ".join(dict.fromkeys(filter(None, said)))
    return Prices(values, times, name, column, rows, dropped, order, note)


def _count(dropped: Dropped, reason: str, lines: Lines) -> None:
    if len(lines):
        dropped[reason] = (len(lines), int(lines[0]))


def _usable(
    values: F64, lines: Lines, dropped: Dropped, texts: Sequence[str] | None = None
) -> Bools:
    """Tell which values are prices, and count the others by reason."""
    number, finite, positive = ~np.isnan(values), np.isfinite(values), values > 0
    undefined = is_undefined(values)
    if texts is not None:
        missing = np.zeros(len(values), bool)
        missing[~number] = [is_missing(texts[i]) for i in np.flatnonzero(~number).tolist()]
        _count(dropped, "price missing", lines[missing])
        number |= missing
    _count(dropped, "price not a number", lines[~number])
    _count(dropped, "price infinite", lines[np.isinf(values)])
    _count(dropped, "price undefined (largest number of its type)", lines[undefined])
    _count(dropped, "price not above zero", lines[finite & ~positive])
    keep: Bools = finite & positive & ~undefined
    return keep


def _sorted(values: F64, nano: Ints, lines: Lines, dropped: Dropped) -> tuple[F64, Ints, str]:
    """Sort by time; of equal times keep the one furthest down the file."""
    steps = np.diff(nano)
    order = "unsorted"
    if (steps >= 0).all():
        order = "ascending"
    elif (steps <= 0).all():
        order = "descending"
    ranks = np.argsort(nano, kind="stable")
    values, nano, lines = values[ranks], nano[ranks], lines[ranks]
    last = np.append(nano[1:] != nano[:-1], True)
    _count(dropped, "time repeated", np.sort(lines[~last]))
    return values[last], nano[last], order


# ----------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------


def _check_share(unusable: Bools, dropped: Dropped, allowed: float) -> None:
    """Refuse a series with too many holes."""
    share = float(unusable.mean())
    if share > allowed:
        reasons = ", ".join(
            f"{count:,} x {reason} (line {line:,})"
            for reason, (count, line) in dropped.items()
            if reason not in ("header repeated", "not a row of the table")
        )
        raise PriceError(
            f"{int(unusable.sum()):,} of {len(unusable):,} rows are unusable: {reasons}; "
            f"--allow-missing {np.ceil(100 * share) / 100:g} takes the others"
        )


def _end_missing(keep: Bools, nano: Ints | None, lines: Lines) -> str:
    """What to say where the newest rows are not usable."""
    late = ~keep
    if nano is not None:
        known = nano[keep]
        newest_first = len(known) > 1 and known[0] > known[-1]
        place = np.arange(len(keep))
        edge = place < np.argmax(keep) if newest_first else place > place[keep][-1]
        late &= (nano > known.max()) | ((nano == NONE) & edge)
    else:
        late &= np.arange(len(keep)) > np.flatnonzero(keep)[-1]
    count = int(late.sum())
    if not count:
        return ""
    rows = "the last row is" if count == 1 else f"the last {count:,} rows are"
    return f"{rows} unusable (line {lines[late][0]:,}): the series ends before"


def _check_repeated(
    table: Table, nano: Ints, values: F64, keep: Bools, used: Sequence[int], allowed: float
) -> None:
    """Refuse many prices for one time, unless they are trades that are hardly apart."""
    ranks = np.argsort(nano[keep], kind="stable")
    times, logs = nano[keep][ranks], np.log(values[ranks])
    same, moves = times[1:] == times[:-1], np.abs(np.diff(logs))
    several = same & (moves > 0)
    if several.sum() <= allowed * len(times):
        return
    usual = np.median(moves[~same]) if (~same).any() else 0.0
    days = not (times % DAY).any()
    if days or np.median(moves[several]) > max(5 * usual, 0.01):
        first = np.flatnonzero(keep)[ranks[1:][several]].min()
        where = separating_column(table.keep(keep), nano[keep], used)
        raise PriceError(
            f"{int(several.sum()):,} of {len(times):,} rows have another price for a time that was "
            f"there before ({table.line(int(first))}){where}"
        )


def _check_steps(nano: Ints, name: str) -> None:
    """Refuse times that only a mistake makes: days taken for nanoseconds since 1970."""
    steps = np.diff(nano)
    if not len(steps) or np.median(steps) >= 10**6:
        return
    first, last = nano[[0, -1]].view("M8[ns]")
    if nano[0] // DAY == nano[-1] // DAY == 0 or set(name.lower().split()) & {"date", "day"}:
        raise PriceError(
            f"times from {first} to {last}, microseconds apart: days or seconds that were taken "
            "for something smaller when the file was made"
        )


def _check_enough(values: F64, column: str = "") -> None:
    where = f" in column {quote(column)}" if column else ""
    if len(values) < 2:
        raise PriceError(f"{len(values)} usable price{where}: a series needs more")
    if (values == values[0]).all():
        raise PriceError(f"all {len(values):,} prices{where} are equal: nothing to forecast")


def _largest_step(values: F64, times: Times | None) -> str:
    """What to say of a step that is far beyond all others."""
    moves = np.abs(np.diff(np.log(values)))
    if len(moves) < 10:
        return ""
    at = int(np.argmax(moves))
    others = np.delete(moves, [i for i in (at - 1, at, at + 1) if 0 <= i < len(moves)])
    if moves[at] < 1.0 or moves[at] < 10 * others.max():
        return ""
    when = f"price {at + 2:,}" if times is None else str(times[at + 1]).replace("T", " ")[:19]
    return (
        f"one step is {moves[at] / max(others.max(), 1e-300):,.0f} times all others: from "
        f"{values[at]:g} to {values[at + 1]:g} ({when})"
    )
