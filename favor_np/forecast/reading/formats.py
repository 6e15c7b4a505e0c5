"""Ways of writing a time: formats, the expressions that they stand for, and what these read.

A format is one of `datetime.datetime.strptime`, with %q for a quarter and %V, %u for the week
of a year and its day.  In those of our own "-" is any usual separator, the same throughout, and
" " any or none; a clock may follow a day.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import PriceError
from .words import plain

Times = npt.NDArray[np.datetime64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FORMATS = [
    *("%Y-%m-%d", "%d-%m-%Y", "%m-%d-%Y", "%y-%m-%d", "%d-%m-%y", "%m-%d-%y"),
    *("%d %b %Y", "%b %d %Y", "%d %b %y", "%b %d %y", "%Y %b %d"),
    *("%Y-%m", "%m-%Y", "%Y:%m", "%YM%m", "%b %Y", "%Y %b", "%b %y"),
    *("%YQ%q", "Q%q %Y", "%YW%V", "%YW%V-%u"),
]
DIGITS = ["%Y%m%d", "%d%m%Y", "%m%d%Y", "%y%m%d", "%d%m%y", "%m%d%y", "%Y%m", "%Y"]

NONE = np.iinfo(np.int64).min  # of a time, as NumPy has it
DAY = 86_400 * 10**9  # nanoseconds
FIRST, LAST = 1800, 2100  # years

_PARTS = {
    "Y": r"(?P<Y>\d{4})",
    "y": r"(?P<y>\d\d)",
    "m": r"(?P<m>\d\d?)",
    "d": r"(?P<d>\d\d?)",
    "b": r"(?P<b>[^\W\d_]{3,})\.?",
    "B": r"(?P<b>[^\W\d_]{3,})\.?",
    "H": r"(?P<H>\d\d?)",
    "I": r"(?P<H>\d\d?)",
    "M": r"(?P<M>\d\d)",
    "S": r"(?P<S>\d\d)",
    "f": r"(?P<f>\d{1,9})",
    "p": r"(?P<p>[AaPp]\.? ?[Mm]\.?)",
    "z": r"(?P<z>Z|(?:UTC|GMT)?[+-]\d\d:?\d\d|UTC|GMT)",
}
_OURS = _PARTS | {"q": "(?P<q>[1-4])", "V": r"(?P<V>\d\d?)", "u": "(?P<u>[1-7])"}
_LOOSE = {
    " ": r"(?:[-/.,' ]+|(?<!\d)|(?!\d))(?:de +|of +)?",
    ":": ":",
    "M": "[- ]?M",
    "Q": "[- /]?[QqKkTt]",
    "W": "[- ]?[Ww]",
}
_ORDINAL = r"(?P<d>\d\d?)(?:st|nd|rd|th|er|º)?"
_WEEKDAY = (
    r"(?:(?i:mo|tu|we|th|fr|sa|su|lu|ma|me|mi|je|jue|ve|vi|di|do|so|sá|dom|seg|ter|qua|qui|sex)"
    r"[^\W\d_]*\.?,? +)?"
)
_HALF = r"(?:[- ]*(?P<p>[AaPp]\.? ?[Mm]\.?))?"
_ZONE = (
    r" *(?P<z>[Zz]|[A-Z]{3,4}|(?:UTC|GMT)? ?[+-]\d\d?(?::?\d\d)?)?"
    r"(?: +[A-Z]{3,4})? *(?:\(.*\)|\[.*\])?"
)
_CLOCK = (
    r"(?:(?:[Tt]|[ ,;_:-]+)(?P<H>\d\d?)(?:[:.hH](?P<M>\d\d)(?:[:.](?P<S>\d\d)"
    rf"(?:[.,:](?P<f>\d{{1,9}})\d*)?)?)?{_HALF})?{_ZONE}"
)


def _digit_clock(minutes: str) -> str:
    """A clock behind digits, whose separators may be left out, with minutes or ("?") without."""
    fraction = r"(?:[.,:]?(?P<f>(?<=[.,:])\d{1,9}|\d{9}|\d{6}|\d{3}))?"
    rest = rf"(?::?(?P<M>\d\d)(?::?(?P<S>\d\d){fraction})?){minutes}"
    return rf"(?:[Tt ,;_:-]{{0,2}}(?P<H>\d\d|(?<=\D)\d){rest}{_HALF})?{_ZONE}"


_MONTHS = [  # beginnings of their names
    "jan gen ene sty led oca tammi янв",
    "feb fev lut uno unor sub helmi фев",
    "mar mrz maer mrt maa brez maalis мар",
    "apr avr abr kwi dub nis huhti апр",
    "may mai mag mei maj kve touko май мая",
    "jun juin giu cze haz kesa июн",
    "jul juil lug lip tem heina июл",
    "aug aou ago sie srp elo авг",
    "sep set wrz zar eyl syys сен",
    "oct okt out ott paz rij eki loka окт",
    "nov lis kas marras ноя",
    "dec dez dic gru pro ara joulu дек",
]
_BEGINNINGS = {plain(name): i + 1 for i, row in enumerate(_MONTHS) for name in row.split()}
_ZONES = dict.fromkeys(("Z", "UTC", "GMT", "UT", "WET"), 0)  # hours
_ZONES |= {"CET": 1, "MEZ": 1, "CEST": 2, "MESZ": 2, "EET": 2, "JST": 9}  # CST, IST are several
_ZONES |= {"EDT": -4, "EST": -5, "CDT": -5, "MDT": -6, "MST": -7, "PDT": -7, "PST": -8}


@dataclass(frozen=True)
class Reading:
    """Times of a column: nanoseconds since 1970, `NONE` where there is none; how, in words."""

    nanoseconds: Ints
    said: str = ""

    @property
    def known(self) -> Ints:
        """Those that could be read."""
        known: Ints = self.nanoseconds[self.nanoseconds != NONE]
        return known

    @property
    def ordered(self) -> bool:
        """Whether they only rise, or only fall."""
        steps = np.diff(self.known)
        return bool((steps >= 0).all() or (steps <= 0).all())

    @property
    def months(self) -> Ints:
        """Months since 1970."""
        months: Ints = self.known.view("M8[ns]").astype("M8[M]").astype(np.int64)
        return months


@functools.lru_cache(maxsize=256)
def pattern(form: str) -> str:
    """The expression of a format of our own."""
    found = ""
    for token in re.findall("%.|.", form):
        if token == "%d" and "%b" in form:
            found += _ORDINAL
        elif token[1:]:
            found += _OURS[token[1]].replace("?)", ")") if form in DIGITS else _OURS[token[1]]
        elif token == "-":
            found += "(?P=s) ?" if "(?P<s>" in found else "(?P<s>[-/. ]) ?"
        else:
            found += _LOOSE[token]
    if "%d" not in form:
        return found
    if form in DIGITS:  # behind two digits of a year an hour alone would be 8 digits, a date
        return found + _digit_clock("" if "%y" in form else "?")
    return _WEEKDAY + found + _CLOCK


def spread(cells: Sequence[str]) -> Sequence[str]:
    """Two to four hundred cells from all over a column."""
    return cells[:: max(1, len(cells) // 200)]


def viable(forms: Sequence[str], cells: Sequence[str]) -> list[str]:
    """The formats that read at least half of some cells, which all can be read in then."""
    some = [cell for cell in spread(cells) if cell]
    text = "\n".join(some)
    if not any(map(str.isalpha, text)):
        forms = [form for form in forms if not re.search("%b|(?<!%)[A-Z]", form)]
    return [f for f in forms if 2 * len(read_as(text, pattern(f)).known) >= len(some) > 0]


def literal_pattern(form: str) -> str:
    """The expression of a format that the user gives; a clock may follow where it has none."""
    found = ""
    for token in re.findall("%.|.", form):
        if token[1:] and token[1] not in _PARTS:
            known = " ".join(f"%{part}" for part in _PARTS)
            raise PriceError(f"--date-format: {token} is not known, but {known} are")
        found += _PARTS[token[1]] if token[1:] else re.escape(token)
    return "(?i:" + found + ("" if "(?P<H>" in found else _CLOCK) + ")"


def month_number(name: str) -> int:
    """Number of a month by the beginning of its name; 0 for none."""
    name = plain(name)
    return max((len(p), m) for p, m in {"": 0, **_BEGINNINGS}.items() if name.startswith(p))[1]


def read_as(text: str, expression: str) -> Reading:
    """All times of a column, whose cells are the lines of a text."""
    line = re.compile(rf"^(?:{expression})$|^.*$", re.MULTILINE)
    rows = line.findall(text)
    columns = list(zip(*rows, strict=True)) if line.groups > 1 else [rows]

    def cells(part: str) -> Sequence[str]:
        return columns[line.groupindex[part] - 1] if part in line.groupindex else ()

    def number(part: str, default: int) -> Ints:
        found = cells(part)
        if not any(found):
            return np.full(len(rows), default)
        return np.array([int(cell) if cell else default for cell in found], np.int64)

    year = number("Y", -1)
    if "y" in line.groupindex:
        short = number("y", -1)
        year = np.where(short < 0, -1, short + np.where(short < 69, 2000, 1900))
    month = number("m", 1)
    if "q" in line.groupindex:
        month = 3 * number("q", 1) - 2
    if "b" in line.groupindex:
        numbers = {name: month_number(name) for name in set(cells("b"))}
        month = np.array([numbers[name] for name in cells("b")])
    days, good = _days(year, month, number("d", 1))
    if "V" in line.groupindex:
        days, good = _weeks(year, number("V", 0), number("u", 1))

    hour, minute, second = number("H", 0), number("M", 0), number("S", 0)
    if any(cells("p")):
        given = np.array([bool(cell) for cell in cells("p")])
        late = np.array([cell[:1] in ("p", "P") for cell in cells("p")])
        good &= ~given | ((hour >= 1) & (hour <= 12))
        hour = np.where(given, hour % 12 + 12 * late, hour)
    good &= (hour < 24) | ((hour == 24) & (minute == 0) & (second == 0))
    good &= (minute < 60) & (second < 60)
    clock = ((hour * 60 + minute) * 60 + second) * 10**9
    if any(cells("f")):
        clock += np.array([int(f"{cell:0<9}") for cell in cells("f")])
    shift, known = _shifts(cells("z"), len(rows))
    good &= known
    said = "times shifted to UTC" if shift[good].any() else ""
    if said and not clock[good].any():  # days keep their date, wherever they were
        shift, said = np.zeros_like(shift), "days by their local date"
    return Reading(np.where(good, days * DAY + clock - shift, NONE), said)


def _days(year: Ints, month: Ints, day: Ints) -> tuple[Ints, Bools]:
    """Days since 1970 of a date, and whether there is such a date."""
    good = (year >= FIRST) & (year <= LAST) & (month >= 1) & (month <= 12) & (day >= 1)
    months = np.where(good, (year - 1970) * 12 + month - 1, 0)
    first, after = (m.astype("M8[M]").astype("M8[D]").astype(int) for m in (months, months + 1))
    return first + day - 1, good & (day <= after - first)


def _weeks(year: Ints, week: Ints, weekday: Ints) -> tuple[Ints, Bools]:
    """Days since 1970 of a day of an ISO week; the 4th of January is in week 1."""
    fourth, good = _days(year, np.ones_like(year), np.full_like(year, 4))
    monday = fourth - (fourth + 3) % 7
    return monday + 7 * (week - 1) + weekday - 1, good & (week >= 1) & (week <= 53)


def _shifts(zones: Sequence[str], count: int) -> tuple[Ints, Bools]:
    """How far zones are ahead of UTC, in nanoseconds, and whether that is known."""
    if not any(zones):
        return np.zeros(count, np.int64), np.ones(count, bool)
    table = {zone: _shift(zone) for zone in set(zones)}
    minutes = [table[zone] for zone in zones]
    known = np.array([m is not None for m in minutes])
    return np.array([m or 0 for m in minutes], np.int64) * 60 * 10**9, known


def _shift(zone: str) -> int | None:
    """Minutes that a zone is ahead of UTC; None for no zone, where other cells have one."""
    zone = zone.upper().replace(" ", "")
    match = re.fullmatch(r"(?:UTC|GMT)?([+-])(\d\d?)(?::?(\d\d))?", zone)
    if match is None:
        return 60 * _ZONES[zone] if zone in _ZONES else None
    return int(match[1] + "1") * (60 * int(match[2]) + int(match[3] or 0))
