"""How a column of times is written, and the times.

The format of a column is the one that reads most of its cells; where several do and differ,
such as day first and month first, the user is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .errors import PriceError, quote
from .formats import (
    DIGITS,
    FORMATS,
    NONE,
    Reading,
    literal_pattern,
    month_number,
    pattern,
    read_as,
    spread,
    viable,
)
from .numbers import is_missing
from .stamps import stamp_readings

LONGEST = 100  # characters of a cell
_EASTERN = str.maketrans("年月년월", "----", "日일")
_CLOCK = re.compile(
    r"[Tt]?\d\d?[:hH]\d\d([:.]\d\d([.,:]\d+)?)?( *[AaPp]\.? ?[Mm]\.?)? *(Z|UTC|GMT|[+-]\d\d:?\d\d)?"
    r"|\d\d? *[AaPp]\.?[Mm]\.?"
)


class Unreadable(PriceError):
    """A column that holds no times, however it is read."""


def is_time(text: str) -> bool:
    """Whether a cell that is no plain number is a time: a date, or a clock."""
    text = _one_line(text)
    if not any(map(str.isdigit, text)):
        return False
    matches = (re.fullmatch(pattern(form), text) for form in (*FORMATS, *DIGITS))
    return is_clock(text) or any(
        match and ("b" not in match.re.groupindex or month_number(match["b"])) for match in matches
    )


def is_clock(text: str) -> bool:
    """Whether a cell is a time of day."""
    return _CLOCK.fullmatch(text) is not None


def _one_line(text: str) -> str:
    """Blanks of any kind as blanks, and 2024年1月2日 as 2024-1-2; nothing longer than a time."""
    if len(text) > LONGEST:
        return ""
    if text.isascii() and text.isprintable():
        return text
    return " ".join(text.translate(_EASTERN).split()).rstrip("-")


def read_times(
    texts: Sequence[str],
    name: str,
    *,
    date_format: str | None = None,
    day_first: bool | None = None,
) -> Reading:
    """The times of a column.

    Parameters
    ----------
    texts : sequence of str
        The cells.
    name : str
        Of the column, for messages and as a hint.
    date_format : str, optional
        As in `datetime.datetime.strptime`; a clock may follow.
    day_first : bool, optional
        Whether 03/04/2024 is the 3rd of April, where the cells leave it open.

    Raises
    ------
    PriceError
        If the cells can be read in several ways, or not at all.
    """
    texts = [_one_line(text) for text in texts]
    text = "\n".join(texts)
    some = [t for t in spread(texts) if not is_missing(t)]
    if date_format is not None:
        reading = read_as(text, literal_pattern(date_format))
        if not len(reading.known):
            raise Unreadable(
                f"no time in column {quote(name)} is written as {quote(date_format)}: "
                f"{quote(next(iter(some), ''))}"
            )
        return reading
    readings = stamp_readings(texts, name)
    if readings is None:
        forms = viable((*FORMATS, *DIGITS), some)
        readings = {form: read_as(text, pattern(form)) for form in forms}
    best = max((len(r.known) for r in readings.values()), default=0)
    if best:
        readings = {form: r for form, r in readings.items() if len(r.known) == best}
        reading = settle(readings, some, name, day_first)
        _check_exchanged(text, reading, name)
        return reading
    starts = [text.partition(" - ") for text in texts]
    if some and all(dash for _, dash, _ in starts):  # from - to
        return read_times([start for start, *_ in starts], name, day_first=day_first)
    what = "a clock without a date" if some and is_clock(some[0]) else "no time"
    raise Unreadable(
        f"{what} can be read from column {quote(name)}, which holds {quote(next(iter(some), ''))}; "
        "ISO dates (2020-04-20) or Unix seconds are expected, or what --date-format says (%d.%m.%Y)"
    )


def settle(
    readings: dict[str, Reading], some: Sequence[str], name: str, day_first: bool | None
) -> Reading:
    """The one reading among those that read equally many cells.

    A year first or last is told by the gaps that it makes; a day first or month first by the
    user, but for dates with points (02.01.2024), which begin with the day wherever they are used.

    Raises
    ------
    PriceError
        If that leaves different readings.
    """
    order = {form: "".join(re.findall("%([dmyY])", form)).lower() for form in readings}
    if _differ(readings):
        readings = _evener(readings, [form for form in readings if order[form][-1:] == "y"])
    if _differ(readings):
        dotted = all(re.match(r"\d+\. ?\d+\.", text) for text in some)
        if day_first is not None or dotted:
            first = "m" if day_first is False else "d"
            readings = {f: r for f, r in readings.items() if order[f][0] == first} or readings
    form, reading = next(iter(readings.items()))
    if _differ(readings):
        firsts = {order[form][0] for form in readings}
        options = "--day-first, --no-day-first or " if firsts == {"d", "m"} else ""
        written = [_written(form, some[0]) for form in readings]
        raise PriceError(
            f"column {quote(name)} holds {quote(some[0])}, which may be written as "
            f"{' or '.join(written)}: {options}--date-format says which, as in "
            f"--date-format '{written[0]}'"
        )
    if form == "%Y-%m" and len(some) > 2 and all(map(_is_season, some)):
        raise PriceError(
            f"column {quote(name)} holds {quote(some[0])}, a month or two years? "
            "--date-format says which"
        )
    if form == "%b %y" and len(some) > 2 and (np.diff(reading.months) % 12 == 0).mean() > 0.5:
        raise PriceError(
            f"column {quote(name)} holds {quote(some[0])}, months of years or days without a year? "
            "--date-format says which"
        )
    said = [reading.said]
    if order[form] and "%b" not in form and not form.startswith("%Y"):
        said.insert(0, f"dates as {_written(form, some[0])}")
    return Reading(reading.nanoseconds, "; ".join(filter(None, said)))


def _written(form: str, text: str) -> str:
    """Return a format with the mark that a cell has between day and month."""
    mark = re.search(r"\d([-/. ])", text)
    return form.replace("-", mark[1]) if mark else form


def _is_season(text: str) -> bool:
    """Whether a cell may be two years, the second cut short: 2011/12."""
    years = re.fullmatch(r"\d\d(\d\d)[-/](\d\d)", text)
    return years is not None and (int(years[1]) + 1) % 100 == int(years[2])


def _check_exchanged(text: str, reading: Reading, name: str) -> None:
    """Refuse times among which a program has taken some days for months, those up to the 12th.

    Then they are in order, if such cells are read as that program has written them.

    Raises
    ------
    PriceError
        If there are such.
    """
    if reading.ordered:
        return
    for form in ("%d-%m-%Y", "%m-%d-%Y"):
        other = read_as(text, pattern(form)).nanoseconds
        mixed = np.where(other == NONE, reading.nanoseconds, other)
        at = np.flatnonzero(mixed != reading.nanoseconds)
        if len(at) and (mixed != other).any() and Reading(mixed).ordered:
            raise PriceError(
                f"column {quote(name)} has days and months in both orders: "
                f"{quote(text.splitlines()[at[0]])} stands where the other order would"
            )


def _differ(readings: dict[str, Reading]) -> bool:
    first, *others = (reading.nanoseconds for reading in readings.values())
    return any((first != other).any() for other in others)


def _evener(readings: dict[str, Reading], last: list[str]) -> dict[str, Reading]:
    """Those with the year last, or not, where the others have gaps three times as large."""
    gaps = {f: np.abs(np.diff(r.known)).max(initial=0) for f, r in readings.items()}
    groups = [group for group in (last, [f for f in readings if f not in last]) if group]
    groups.sort(key=lambda group: min(gaps[form] for form in group))
    least = [min(gaps[form] for form in group) for group in groups]
    if len(groups) == 2 and least[1] > 3 * least[0]:
        return {form: readings[form] for form in groups[0]}
    return readings
