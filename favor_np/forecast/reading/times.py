"""How a column of times is written, and the times.

A way of writing is a format such as ``%d-%m-%Y``, in which "-" stands for any usual separator,
with a clock behind it or without.  The format of a column is the one that reads most of its
cells; where two do, such as day first and month first, the user is asked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import PriceError, quote
from .numbers import is_missing
from .words import is_date, plain

Times = npt.NDArray[np.datetime64]
Ints = npt.NDArray[np.int64]

FORMATS = [
    *("%Y-%m-%d", "%d-%m-%Y", "%m-%d-%Y", "%y-%m-%d", "%d-%m-%y", "%m-%d-%y"),
    *("%d %b %Y", "%b %d %Y", "%d %b %y", "%b %d %y", "%Y %b %d"),
    *("%Y-%m", "%m-%Y", "%b %Y", "%Y %b", "%b %y", "%Y:%m", "%YM%m", "%YQ%q", "Q%q %Y", "%YW%V", "%YW%V-%u"),
]
DIGITS = ["%Y%m%d", "%d%m%Y", "%m%d%Y", "%y%m%d", "%d%m%y", "%m%d%y", "%Y%m", "%Y"]

NONE = np.iinfo(np.int64).min  # of a time, as NumPy has it
DAY = 86_400 * 10**9  # nanoseconds
FIRST, LAST = 1800, 2100  # years
SERIALS = (25_569, 73_051)  # 1970 to 2100 as spreadsheets count days

_PARTS = {
    "Y": r"(?P<Y>\d{4})",
    "y": r"(?P<y>\d{2})",
    "m": r"(?P<m>\d{1,2})",
    "d": r"(?P<d>\d{1,2})",
    "b": r"(?P<b>[^\W\d_]{3,})\.?",
    "q": r"(?P<q>[1-4])",
    "V": r"(?P<V>\d{1,2})",
    "u": r"(?P<u>[1-7])",
    "H": r"(?P<H>\d{1,2})",
    "I": r"(?P<H>\d{1,2})",
    "M": r"(?P<M>\d{2})",
    "S": r"(?P<S>\d{2})",
    "f": r"(?P<f>\d{1,9})",
    "p": r"(?P<p>[AaPp]\.? ?[Mm]\.?)",
    "z": r"(?P<z>Z|(?:UTC|GMT)?[+-]\d\d:?\d\d|UTC|GMT)",
    "%": "%",
}
_PARTS["B"] = _PARTS["b"]
_DIRECTIVES = "%Y %y %m %d %b %H %I %M %S %f %p %z"
_LOOSE = {  # what a separator of our own formats stands for
    " ": r"(?:[-/.,' ]+|(?<!\d)|(?!\d))(?:de +|of +)?",
    ":": ":",
    "M": r"[- ]?M",
    "Q": r"[- /]?[QqKkTt]",
    "W": r"[- ]?[Ww]",
}
_ORDINAL = r"(?P<d>\d{1,2})(?:st|nd|rd|th|er|º)?"
_WEEKDAY = (
    r"(?:(?i:mo|tu|we|th|fr|sa|su|lu|ma|me|mi|je|jue|ve|vi|di|do|so|sá|dom|seg|ter|qua|qui|sex)"
    r"[^\W\d_]*\.?,? +)?"
)
_ZONE = (
    r"(?P<z>[Zz]|[A-Z]{3,4}|(?:UTC|GMT)? ?[+-]\d\d?(?::?\d\d)?)?(?: +[A-Z]{3,4})? *(?:\(.*\)|\[.*\])?"
)
_HALF = r"(?:[ -]*(?P<p>[AaPp]\.? ?[Mm]\.?))?"
_CLOCK = (
    r"(?:(?:[Tt]|[ ,;_:-]+)(?P<H>\d{1,2})(?:[:.hH](?P<M>\d\d)(?:[:.](?P<S>\d\d)"
    r"(?:[.,:](?P<f>\d{1,9})\d*)?)?)?" + _HALF + r")? *" + _ZONE
)
_DIGIT_CLOCK = (  # the separators may be left out
    r"(?:[Tt ,;_:-]{0,2}(?P<H>\d\d|\d(?=:))(?::?(?P<M>\d\d)(?::?(?P<S>\d\d)"
    r"(?:[.,:]?(?P<f>(?<=[.,:])\d{1,9}|\d{9}|\d{6}|\d{3}))?)?)?" + _HALF + r")? *" + _ZONE
)
_CLOCK_ALONE = re.compile(
    r"[Tt]?\d{1,2}([:hH]\d\d([:.]\d\d([.,:]\d+)?)?)( *[AaPp]\.? ?[Mm]\.?)? *(Z|UTC|GMT|[+-]\d\d:?\d\d)?"
    r"|\d{1,2} *[AaPp]\.?[Mm]\.?"
)

_MONTHS = [
    "jan gen ene janv sty led oca янв tammi", "feb fev fevr lut uno unor sub helmi фев",
    "mar mrz maer mrt maa brez мар maalis", "apr avr abr kwi dub nis апр huhti",
    "may mai mag mei maj maio kve мая май touko", "jun juin giu cze haz июн kesa",
    "jul juil lug lip tem июл heina", "aug aou ago sie srp авг elo",
    "sep set wrz zar eyl сен syys", "oct okt out ott paz rij eki окт loka",
    "nov lis kas ноя marras", "dec dez dic gru pro ara дек joulu",
]  # fmt: skip
_PREFIXES = {prefix: i + 1 for i, row in enumerate(_MONTHS) for prefix in row.split()}
_ZONES = {"Z": 0, "UTC": 0, "GMT": 0, "UT": 0, "EST": -5, "EDT": -4, "CDT": -5, "MST": -7, "MDT": -6}
_ZONES |= {"PST": -8, "PDT": -7, "WET": 0, "CET": 1, "CEST": 2, "MEZ": 1, "MESZ": 2, "EET": 2, "JST": 9}


class Unreadable(PriceError):
    """A column that holds no times, however it is read."""


@dataclass(frozen=True)
class Reading:
    """Times of a column: nanoseconds since 1970, `NONE` where there is none; how, in words."""

    nanoseconds: Ints
    said: str = ""

    @property
    def good(self) -> int:
        """How many times could be read."""
        return int((self.nanoseconds != NONE).sum())

    @property
    def times(self) -> Times:
        """The times, in microseconds unless some need nanoseconds."""
        times = self.nanoseconds.view("datetime64[ns]")
        some = self.nanoseconds[self.nanoseconds != NONE]
        return times if (some % 1000).any() else times.astype("datetime64[us]")

    @property
    def whole_days(self) -> bool:
        """Whether there is no time of day."""
        some = self.nanoseconds[self.nanoseconds != NONE]
        return not (some % DAY).any()


def is_time(text: str) -> bool:
    """Whether a cell that is no plain number is a time: a date, or a clock."""
    text = _one_line(text)
    if not any(map(str.isdigit, text)) or len(text) > 70:
        return False
    return is_clock_text(text) or any(_pattern(f).fullmatch(text) for f in (*FORMATS, *DIGITS))


def _one_line(text: str) -> str:
    """Blanks of any kind as blanks."""
    return text if text.isascii() and text.isprintable() else " ".join(text.split())


def is_clock_text(text: str) -> bool:
    """Whether a cell is a time of day."""
    return _CLOCK_ALONE.fullmatch(text) is not None


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
    if date_format is not None:
        found = [_read(text, _pattern(date_format, True))]
        if not found[0].good:
            raise PriceError(
                f"no time in column {quote(name)} is written as --date-format {quote(date_format)}: "
                f"{quote(next(filter(None, texts), ''))}"
            )
        return found[0]
    numeric = _numeric(texts, name, day_first)
    if numeric is not None:
        return numeric
    some = [t for t in (*texts[:100], *texts[-100:]) if not is_missing(t)]
    viable = [f for f in (*FORMATS, *DIGITS) if sum(map(bool, map(_pattern(f).fullmatch, some))) > len(some) / 2]
    readings = {f: _read(text, _pattern(f)) for f in viable}
    best = max((r.good for r in readings.values()), default=0)
    if best == 0:
        parts = [t.partition(" - ") for t in texts]
        if some and all(middle for _, middle, _ in parts):  # from - to
            return read_times([start for start, *_ in parts], name, day_first=day_first)
        raise _unreadable(texts, name)
    return _settled({f: r for f, r in readings.items() if r.good == best}, some, name, day_first)


def _unreadable(texts: Sequence[str], name: str) -> Unreadable:
    sample = next((t for t in texts if not is_missing(t)), "")
    what = "a clock without a date" if is_clock_text(sample) else "no time"
    return Unreadable(
        f"{what} can be read from column {quote(name)}, which holds {quote(sample)}; ISO dates "
        "(2020-04-20) or Unix seconds are expected, or what --date-format says (%d.%m.%Y)"
    )


# ----------------------------------------------------------------------------------------
# Formats
# ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _pattern(form: str, literal: bool = False) -> re.Pattern[str]:
    """The expression of a format; one of the user's own is taken literally."""
    digits, named = form in DIGITS, "%b" in form
    found = ""
    for token in re.findall(r"%.|.", form):
        if token[1:] and (token[1] not in _PARTS or (literal and token[1] in "qVu")):
            raise PriceError(f"--date-format: {token} is not known; there are {_DIRECTIVES}")
        if token[1:]:
            part = _ORDINAL if token == "%d" and named else _PARTS[token[1]]
            found += part.replace("{1,2}", "{2}") if digits and not literal else part
        elif literal:
            found += re.escape(token)
        elif token == "-":  # the same separator at all places
            found += "(?P=s) ?" if "(?P<s>" in found else "(?P<s>[-/. ]) ?"
        else:
            found += _LOOSE[token]
    if literal:
        return re.compile(found + ("" if "(?P<H>" in found else _CLOCK), re.I)
    if "%d" not in form:
        return re.compile(found)
    if digits:
        clock = _DIGIT_CLOCK
        if "%y" in form:  # 24010207 is no hour of a day
            clock = clock.replace(r"(?::?(?P<M>", r"(?:(?::?)(?P<M>").replace(")?)?)?" + _HALF, ")?)?)" + _HALF)
        return re.compile(found + clock)
    return re.compile(_WEEKDAY + found + _CLOCK)


def _read(text: str, pattern: re.Pattern[str]) -> Reading:
    """All times of a column, given one below the other."""
    line = re.compile(rf"^(?:{pattern.pattern})$|^.*$", pattern.flags | re.M)
    rows = line.findall(text)
    group = pattern.groupindex
    width = pattern.groups
    columns = list(zip(*rows, strict=True)) if width > 1 else [rows]

    def texts(name: str) -> Sequence[str]:
        return columns[group[name] - 1] if name in group else ()

    def number(name: str, default: int) -> Ints:
        cells = texts(name)
        if not cells:
            return np.full(len(rows), default)
        return np.array([int(cell) if cell else default for cell in cells], np.int64)

    year = number("Y", -1)
    if "y" in group:
        short = number("y", -1)
        year = np.where(short < 0, -1, short + np.where(short < 70, 2000, 1900))
    month = number("m", 1)
    if "q" in group:
        month = 3 * number("q", 1) - 2
    if "b" in group:
        names = texts("b")
        table = {name: _month(name) for name in set(names)}
        month = np.array([table[name] for name in names])
    days, good = _days(year, month, number("d", 1))
    if "V" in group:
        days, good = _weeks(year, number("V", 0), number("u", 1))

    hour, minute, second = number("H", 0), number("M", 0), number("S", 0)
    half = texts("p")
    if any(half):
        late = np.array([cell[:1] in ("p", "P") for cell in half])
        given = np.array([bool(cell) for cell in half])
        good &= ~given | ((hour >= 1) & (hour <= 12))
        hour = np.where(given, hour % 12 + 12 * late, hour)
    good &= (hour < 24) | ((hour == 24) & (minute == 0) & (second == 0))
    good &= (minute < 60) & (second < 60)
    local = ((hour * 60 + minute) * 60 + second) * 10**9
    if any(texts("f")):
        local += np.array([int(cell.ljust(9, "0")) if cell else 0 for cell in texts("f")])
    shift, zoned, said = _offsets(texts("z"), good)
    good &= zoned
    if said and not local[good].any():  # days: their own, wherever that is
        shift, said = np.zeros(len(rows), np.int64), "days are local ones, as written"
    return Reading(np.where(good, days * DAY + local - shift, NONE), said)


def _days(year: Ints, month: Ints, day: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Days since 1970 of a date, and whether there is such a date."""
    good = (year >= FIRST) & (year <= LAST) & (month >= 1) & (month <= 12) & (day >= 1)
    months = np.where(good, (year - 1970) * 12 + month - 1, 0)
    first, after = (m.astype("M8[M]").astype("M8[D]").astype(np.int64) for m in (months, months + 1))
    return first + day - 1, good & (day <= after - first)


def _weeks(year: Ints, week: Ints, weekday: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Days since 1970 of a weekday of an ISO week: week 1 has the 4th of January."""
    fourth, good = _days(year, np.ones_like(year), np.full_like(year, 4))
    return fourth - (fourth + 3) % 7 + 7 * (week - 1) + weekday - 1, good & (week >= 1) & (week <= 53)


def _month(name: str) -> int:
    """Number of a month by the beginning of its name; 0 for none."""
    name = plain(name)
    return max(((len(p), m) for p, m in _PREFIXES.items() if name.startswith(p)), default=(0, 0))[1]


def _offsets(
    zones: Sequence[str], good: npt.NDArray[np.bool_]
) -> tuple[Ints, npt.NDArray[np.bool_], str]:
    """Nanoseconds to take off, whether each zone is known, and what to say of them."""
    if not any(zones):
        return np.zeros(len(good), np.int64), np.ones(len(good), bool), ""
    table = {zone: _offset(zone) for zone in set(zones)}
    shift = np.array([table[zone] for zone in zones], np.int64)
    said = "times shifted to UTC" if shift[good & (shift != NONE)].any() else ""
    return np.where(shift == NONE, 0, shift), shift != NONE, said


def _offset(zone: str) -> int:
    name = zone.upper().replace(" ", "")
    if name in _ZONES:
        return _ZONES[name] * 3600 * 10**9
    match = re.fullmatch(r"(?:UTC|GMT)?([+-])(\d\d?)(?::?(\d\d))?", name)
    if match is None:  # unknown, or none where other cells have one
        return int(NONE)
    minutes = 60 * int(match[2]) + int(match[3] or 0)
    return (minutes if match[1] == "+" else -minutes) * 60 * 10**9


def _settled(
    readings: dict[str, Reading], some: Sequence[str], name: str, day_first: bool | None
) -> Reading:
    """The one reading among those that read equally many cells, or an error that asks."""

    def different(readings: dict[str, Reading]) -> bool:
        first, *others = readings.values()
        return any((first.nanoseconds != other.nanoseconds).any() for other in others)

    if different(readings):
        order = {f: "".join(re.findall("%([dmyY])", f)).lower() for f in readings}
        readings = _evener(readings, {f: o.endswith("y") for f, o in order.items()})
        dotted = bool(some) and all(re.match(r"\d+\. ?\d+\.", text) for text in some)
        if day_first is not None or dotted:
            first = "m" if day_first is False else "d"
            readings = {f: r for f, r in readings.items() if order[f][0] == first} or readings
    if different(readings):
        shown = re.match(r"\S+(\s+\S+)?", next(iter(some), ""))
        ways = " or ".join(readings)
        days = set(readings) & {"%d-%m-%Y", "%d-%m-%y", "%d%m%Y", "%d%m%y"}
        raise PriceError(
            f"column {quote(name)} holds {quote(shown[0] if shown else '')}, which may be written as "
            f"{ways}: " + ("--day-first, --no-day-first or " if days else "")
            + f"--date-format says which, as in --date-format '{next(iter(readings))}'"
        )
    form, reading = next(iter(readings.items()))
    if form == "%b %y":
        months = reading.nanoseconds[reading.nanoseconds != NONE].view("M8[ns]").astype("M8[M]").astype(int)
        if len(months) > 2 and (np.diff(months) % 12 == 0).mean() > 0.5:
            raise PriceError(
                f"column {quote(name)} holds {quote(some[0])}, months of years or days without a "
                "year? --date-format says which"
            )
    usual = form.startswith(("%Y", "Q%q")) or "b" in form
    said = "" if usual else f"dates as {form.replace('-', _mark(some))}"
    return Reading(reading.nanoseconds, "; ".join(filter(None, [said, reading.said])))


def _evener(readings: dict[str, Reading], last: dict[str, bool]) -> dict[str, Reading]:
    """Those with the year first, or last, where the others have gaps far beyond theirs."""
    gaps = {f: np.abs(np.diff(r.nanoseconds[r.nanoseconds != NONE])).max(initial=0) for f, r in readings.items()}
    least = {where: min(gap for f, gap in gaps.items() if last[f] == where) for where in set(last.values())}
    if len(least) < 2 or max(least.values()) < 3 * min(least.values()):
        return readings
    best = min(least, key=lambda where: least[where])
    return {f: r for f, r in readings.items() if last[f] == best}


def _mark(some: Sequence[str]) -> str:
    match = re.search(r"\d([-/.\s])\d", next(iter(some), ""))
    return match[1] if match else "-"


def _sorted(reading: Reading) -> bool:
    steps = np.diff(reading.nanoseconds[reading.nanoseconds != NONE])
    return bool((steps >= 0).all() or (steps <= 0).all())


# ----------------------------------------------------------------------------------------
# Numbers that are times
# ----------------------------------------------------------------------------------------


def _numeric(texts: Sequence[str], name: str, day_first: bool | None) -> Reading | None:
    """Times that are written as one number each, None if most cells are none."""
    text = "\n".join(texts)
    found = re.findall(r"^([+-]?\d+)(?:[.,](\d+))?$|^.*$", text, re.M)
    cells = [cell for cell, _ in found if cell]
    given = sum(not is_missing(t) for t in texts)
    if len(cells) <= given / 2:
        if len(re.findall(r"^\d[.,]\d+[eE]\+\d+$", text, re.M)) > given / 2:
            raise PriceError(
                f"column {quote(name)} holds {quote(next(filter(None, texts)))}: a spreadsheet has "
                "cut the last digits off these times"
            )
        return None
    decimals = max(len(rest.rstrip("0")) for _, rest in found)
    if decimals == 0:
        calendar = _calendar([cell for cell, _ in found], name, day_first)
        if calendar is not None:
            return calendar
    elif decimals in (1, 2, 4):  # 1871.01, ..., 1871.1, or 01.1871
        months = [f"{a}-{b:0<2}" if len(a) == 4 else f"{b:0<4}-{a}" if a else "" for a, b in found]
        reading = _read("\n".join(months), _pattern("%Y-%m"))
        if reading.good > 0.9 * len(cells):
            return reading
    there = np.array([0 < len(cell) < 20 and abs(int(cell)) < 2**63 for cell, _ in found])
    whole = np.array([int(cell) if ok else 0 for (cell, _), ok in zip(found, there, strict=True)])
    part = np.array([int(f"{rest:0<9}"[:9]) for _, rest in found], np.int64)
    if not there.any():
        raise _unreadable(texts, name)
    if SERIALS[0] <= whole[there].min() and whole[there].max() < SERIALS[1]:
        unit = 60.0 if decimals < 6 else 1.0 if decimals < 9 else 1e-3  # seconds they can tell apart
        seconds = (whole - SERIALS[0] + part / 1e9) * 86_400
        nano = np.round(np.round(seconds / unit) * unit * 1000).astype(np.int64) * 10**6
        return Reading(np.where(there, nano, NONE), "dates counted in days by a spreadsheet")
    return _unix(whole, part, there, texts, name)


def _calendar(cells: list[str], name: str, day_first: bool | None) -> Reading | None:
    """Times that are digits without separators: 202401, 02012024, 20240102070000."""
    given = [cell for cell in cells if cell]
    longest, shortest = max(map(len, given)), min(map(len, given))
    if longest in (8, 10, 12, 14) and shortest == longest - 1:  # a zero lost on the way
        cells = [cell.zfill(longest) if cell else "" for cell in cells]
    text = "\n".join(cells)
    enough = (0.99 if longest == 10 else 0.9) * len(given)
    for forms in (
        [f for f in DIGITS if "Y" in f and (longest >= 8) == ("d" in f)],
        [f for f in DIGITS if "y" in f],
    ):
        readings = {f: _read(text, _pattern(f)) for f in forms}
        if longest == 6 and "%Y%m" in readings and not _steady_months(readings["%Y%m"]):
            readings |= {f: _read(text, _pattern(f)) for f in DIGITS if "y" in f}
        best = max(reading.good for reading in readings.values())
        if best >= enough:
            readings = {f: r for f, r in readings.items() if r.good == best}
            return _settled(readings, given, name, day_first)
    return None


def _steady_months(reading: Reading) -> bool:
    months = reading.nanoseconds[reading.nanoseconds != NONE].view("M8[ns]").astype("M8[M]")
    return len(months) > 12 and bool((np.abs(np.diff(months).astype(int)) == 1).all())


def _unix(
    whole: Ints, part: Ints, there: npt.NDArray[np.bool_], texts: Sequence[str], name: str
) -> Reading:
    """Unix times: the unit follows from the size of each number, 1e11 s being the year 5138."""
    size = np.abs(whole.astype(np.float64))
    unit = np.searchsorted([1e11, 1e14, 1e17], size, side="right")
    elapsed = whole[there].min() == 0 and is_date(name)
    if np.median(size[there]) < 1e8 and not elapsed:
        raise _unreadable(texts, name)

    def read(unit: npt.NDArray[np.intp]) -> Ints:
        factor = 10 ** (9 - 3 * unit)
        good = there & (size * factor < (LAST - 1970) * 365.25 * DAY)
        return np.where(good, np.where(good, whole, 0) * factor + part * factor // 10**9, NONE)

    nano, used = read(unit), set(unit[there].tolist())
    lost = (nano[there] == NONE).any()
    if len(used) > 1 and (lost or not _sorted(Reading(nano))):  # milliseconds of 1970 are small
        largest = Reading(read(np.full_like(unit, max(used))))
        if _sorted(largest):
            nano, used = largest.nanoseconds, {max(used)}
    units = ("seconds", "milliseconds", "microseconds", "nanoseconds")
    return Reading(nano, "Unix " + " and ".join(units[i] for i in sorted(used)))
