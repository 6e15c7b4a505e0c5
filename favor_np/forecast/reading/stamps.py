"""Times that are written as one number each: digits of the calendar, days, Unix time."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .errors import PriceError, quote
from .formats import (
    DAY,
    DIGITS,
    LAST,
    NONE,
    Bools,
    Ints,
    Reading,
    pattern,
    read_as,
    spread,
    viable,
)
from .numbers import is_missing
from .words import is_date

SERIALS = (25_569, 73_051)  # 1970 to 2100, as spreadsheets count days
_NUMBER = re.compile(r"([+-]?\d+)(?:[.,](\d+))?")
_CUT = re.compile(r"\d[.,]\d+[eE]\+\d+")
UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")


def stamp_readings(texts: Sequence[str], name: str) -> dict[str, Reading] | None:
    """The ways to read numbers as times, perhaps none; None if they hardly are numbers."""
    some = [cell for cell in spread(texts) if not is_missing(cell)]
    if 2 * sum(_NUMBER.fullmatch(cell) is not None for cell in some) <= len(some):
        if 2 * sum(_CUT.fullmatch(cell) is not None for cell in some) > len(some):
            raise PriceError(
                f"column {quote(name)} holds {quote(some[0])}: a spreadsheet has cut the last "
                "digits off these times"
            )
        return None
    found = re.findall(rf"^{_NUMBER.pattern}$|^.*$", "\n".join(texts), re.MULTILINE)
    cells = [whole for whole, _ in found]
    decimals = max(len(rest.rstrip("0")) for _, rest in found)
    readings = _calendar(cells) if decimals == 0 else _months(found)
    if readings:
        return readings
    there = np.array([0 < len(cell) < 20 and abs(int(cell)) < 2**63 for cell in cells])
    if not there.any():
        return {}
    whole = np.array([int(cell) if ok else 0 for cell, ok in zip(cells, there, strict=True)])
    part = np.array([int(f"{rest:0<9}"[:9]) for _, rest in found])
    if SERIALS[0] <= whole[there].min() and whole[there].max() < SERIALS[1]:
        return {"days": _serials(whole, part, there, decimals)}
    elapsed = whole[there].min() == 0 and is_date(name)
    if np.median(np.abs(whole[there])) < 1e8 and not elapsed:  # 1973
        return {}
    return {"Unix": _unix(whole, np.where(whole < 0, -part, part), there)}


def _calendar(cells: list[str]) -> dict[str, Reading]:
    """Digits without separators: 202401, 02012024, 20240102070000."""
    given = [cell for cell in cells if cell]
    longest, shortest = max(map(len, given)), min(map(len, given))
    if longest in (6, 8, 10, 12, 14) and shortest == longest - 1:  # a zero lost on the way
        cells = [cell.zfill(longest) if cell else "" for cell in cells]
    text = "\n".join(cells)
    enough = (0.99 if longest == 10 else 0.9) * len(given)  # Unix seconds have 10 as well

    def readings(forms: list[str]) -> dict[str, Reading]:
        found = {form: read_as(text, pattern(form)) for form in viable(forms, cells)}
        return {form: r for form, r in found.items() if len(r.known) >= enough}

    long = readings([f for f in DIGITS if "%Y" in f])
    if long and longest != 6:
        return long
    if long and (np.abs(np.diff(long["%Y%m"].months)) == 1).all() and len(given) > 12:
        return long  # months in a row, which are no days of the 12 months 2001 to 2012
    return long | readings([f for f in DIGITS if "%y" in f])


def _months(found: list[tuple[str, str]]) -> dict[str, Reading]:
    """Months behind a point: 1871.01, ..., 1871.1 for October, or 01.1871."""
    texts = [f"{a}-{b:0<2}" if len(a) == 4 else f"{b:0<4}-{a}" if a else "" for a, b in found]
    reading = read_as("\n".join(texts), pattern("%Y-%m"))
    enough = len(reading.known) > 0.9 * sum(map(bool, texts))
    return {"%Y-%m": reading} if enough else {}


def _serials(whole: Ints, part: Ints, there: Bools, decimals: int) -> Reading:
    """Days since 1899-12-30, to what so many decimals can tell apart."""
    unit = 60_000 if decimals < 6 else 1000 if decimals < 9 else 1  # milliseconds
    moments = (whole - SERIALS[0] + part / 1e9) * 86_400_000
    nano = np.round(moments / unit).astype(np.int64) * unit * 10**6
    return Reading(np.where(there, nano, NONE), "dates are days as spreadsheets count them")


def _unix(whole: Ints, part: Ints, there: Bools) -> Reading:
    """Time since 1970; the unit follows from the size of each number: 1e11 s are the year 5138."""
    size = np.abs(whole.astype(np.float64))

    def read(unit: Ints) -> Reading:
        factor = 10 ** (9 - 3 * unit)
        good = there & (size * factor < (LAST - 1970) * 365.25 * DAY)
        nano = np.where(good, whole, 0) * factor + part * factor // 10**9
        used = " and ".join(UNITS[i] for i in np.unique(unit[there]))
        return Reading(np.where(good, nano, NONE), f"Unix {used}")

    unit = np.searchsorted([1e11, 1e14, 1e17], size, side="right").astype(np.int64)
    reading = read(unit)
    if len(set(unit[there])) > 1 and not (reading.ordered and len(reading.known) == there.sum()):
        largest = read(np.full_like(unit, unit[there].max()))  # near 1970 all numbers are small
        return largest if largest.ordered else reading
    return reading
