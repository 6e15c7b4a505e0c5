"""How a column of numbers is written, and the numbers.

A column has one decimal mark.  It is the one that lets most cells be well-formed; where both
do, as with 990, 1,036 and 1,017, the one that makes the column the smoother series.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .errors import PriceError, quote

F64 = npt.NDArray[np.float64]

MISSING = {
    *("", ".", "..", "...", "-", "--", "---", "–", "—", ":", "*", "?", "x", "\\n"),
    *("n/a", "na", "#n/a", "#na", "#n/a n/a", "n.a.", "n.a", "(na)", "<na>", "nat", "nd", "n.d."),
    *("null", "none", "nil", "n.v.", "n.v", "nv", "k.a.", "kein wert", "kein wert vorhanden"),
    *("not available", "no data", "missing", "undefined", "closed", "holiday"),
    *("#value!", "#div/0!", "#ref!", "#num!"),
}

# Largest numbers of integer and floating types, which stand for "undefined".
UNDEFINED = [2.0**63, 2.0**64, 2.0**31 - 1, 2.0**32 - 1, 2.0**63 / 1e9, np.finfo(np.float64).max]
UNDEFINED += [float(np.finfo(np.float32).max), 3.4e38, 1.7e308]

_BLANKS = " \u00a0\u2009\u202f"
_BLANK = f"[{_BLANKS}]"
_UNIT = (
    r"(?:US\$|[ACR]\$|[$€£¥₹₽₿¢%]|kr\.?|zł|Kč|Rs\.?|USDT?|EUR|GBP|GBX|CHF|JPY|CAD|AUD|NZD|SEK|NOK|"
    r"DKK|PLN|CZK|HUF|CNY|HKD|INR|BRL|RUB|TRY|ZAR|KRW|MXN|BTC|ETH)"
)
_FACTORS = {"K": 1e3, "k": 1e3, "M": 1e6, "m": 1e6, "B": 1e9, "T": 1e12, "Mio": 1e6, "Mrd": 1e9}
_NOTES = r"(?:\([a-z]\)|\(?[pre]\)?|[*†]{1,3})"  # preliminary, revised, estimated


def _shape(decimal: str, thousands: str) -> str:
    """A cell with such marks: groups: sign and unit, number, factor, unit, note."""
    groups = "|".join(
        rf"\d{{1,3}}(?:{mark}\d{{2,3}})*{mark}\d{{3}}" for mark in (thousands, _BLANK, "['’]")
    )
    whole = rf"(?:{groups}|\d+)"
    number = rf"(?:{whole}(?:{decimal}\d*)?|{decimal}\d+)(?:[eE][+-]?\d+)?"
    sign = "[+−-]?"
    return (
        rf"^({sign}(?:{_UNIT}{_BLANK}?)?)({sign}{number}){_BLANK}?"
        rf"(Mio\.?|Mrd\.?|[KkMmBT](?![A-Za-z]))?{_BLANK}?({_UNIT})?{_BLANK}?({_NOTES})?$"
    )


SHAPES = {".": _shape(r"\.", ","), ",": _shape(",", r"\.")}
_ANY = re.compile("|".join(SHAPES.values()))
_WORDS = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


def is_missing(text: str) -> bool:
    """Whether a cell stands for no value."""
    return len(text) < 22 and text.strip().casefold() in MISSING


def is_number(text: str) -> bool:
    """Whether a cell is a number in some way of writing."""
    return bool(_ANY.match(text.strip()) or _WORDS.fullmatch(text.strip()))


def read_numbers(
    texts: Sequence[str],
    name: str,
    *,
    decimal: str | None = None,
    others: Callable[[], str | None] = lambda: None,
) -> tuple[F64, str]:
    """The numbers of a column, NaN where there is none, and in words how they are written.

    Parameters
    ----------
    texts : sequence of str
        The cells.
    name : str
        Of the column, for messages.
    decimal : {".", ","}, optional
        The decimal mark, where the user says it.
    others : callable
        Gives the decimal mark of other columns, asked only where this one leaves it open.

    Returns
    -------
    values : ndarray of float64
    said : str
    """
    guessed, mark = [], decimal or decimal_mark(texts)
    if mark is None:
        sample = next(t for t in texts if re.search(r"\d[.,]\d", t))
        mark = others()
        if mark is None:
            raise PriceError(
                f"column {quote(name)} holds {quote(sample)}, which may be a whole number or have "
                "three decimals: --decimal . or --decimal , says which"
            )
        if mark == "," or "," in sample:
            value = _parse([sample], mark or ".")[0][0]
            guessed = [f"{quote(sample)} in column {quote(name)} is taken for {value:.12g}"]
    values, units, said = _parse(texts, mark or ".")
    if len(units - {"%"}) > 1:
        raise PriceError(f"prices in several currencies: {', '.join(sorted(units))}")
    if mark == ",":
        said = ["decimal comma", *said]
    return values, ", ".join([*guessed, *said])


def decimal_mark(texts: Sequence[str]) -> str | None:
    """The decimal mark of a column: "" where there is none, None where the cells leave it open."""
    text = "\n".join(texts)
    if "," not in text and not re.search(r"\d\.\d{3}(?!\d)", text):
        return "." if "." in text else ""
    counts = {mark: len(re.findall(shape, text, re.MULTILINE)) for mark, shape in SHAPES.items()}
    if counts["."] != counts[","]:
        return max(counts, key=lambda mark: counts[mark])
    values = {mark: _parse(texts, mark)[0] for mark in SHAPES}
    if np.array_equal(values["."], values[","], equal_nan=True):
        return ""
    below_one = re.search(r"(?<![\d.,])0([.,])\d", text)
    if below_one:  # no whole number begins with 0
        return below_one[1]
    roughness = {mark: _roughness(values[mark]) for mark in SHAPES}
    if max(roughness.values()) > 3 * min(roughness.values()):
        return min(roughness, key=lambda mark: roughness[mark])
    return None


def _roughness(values: F64) -> float:
    """Mean size of the steps of the logarithm."""
    logs = np.log(values[(values > 0) & np.isfinite(values)])
    return float(np.abs(np.diff(logs)).mean()) if len(logs) > 1 else 0.0


def _parse(texts: Sequence[str], mark: str) -> tuple[F64, set[str], list[str]]:
    """Numbers with that decimal mark, their units, and what had to be taken off them."""
    if mark == ".":
        try:
            return np.array(list(map(float, texts)), np.float64), set(), []
        except ValueError:
            pass
    text = "\n".join(" ".join(cell.split()) if "\n" in cell else cell for cell in texts)
    found = re.findall(f"(?:{SHAPES[mark]})|^.*$", text, re.MULTILINE)
    before, cells, factors, after, notes = zip(*found, strict=True)
    drop = ("," if mark == "." else ".") + _BLANKS + "'’"
    clean = "\n".join(cells).translate(str.maketrans(mark + "−", ".-", drop)).split("\n")
    values = np.array([float(cell) if cell else np.nan for cell in clean])
    for i in np.flatnonzero(np.isnan(values)).tolist():
        if _WORDS.fullmatch(texts[i]):
            values[i] = float(texts[i])
    values[["-" in cell or "−" in cell for cell in before]] *= -1
    said = []
    if any(factors):
        values *= [_FACTORS.get(factor.rstrip("."), 1.0) for factor in factors]
        said.append("K, M and B multiplied out")
    if any(notes):
        said.append(f"marks such as {quote(next(filter(None, notes)))} left out")
    units = {cell.strip("+−-" + _BLANKS) for cell in {*before, *after}} - {""}
    if "p" in notes and units & {"£", "GBP"}:  # pence
        units.add("p")
    if "%" in units:
        said.append("numbers in %")
    return values, units, said


def is_undefined(values: F64) -> npt.NDArray[np.bool_]:
    """Which numbers are the largest of a type, far beyond the others: no values at all."""
    usable = values[np.isfinite(values) & (values > 0)]
    if not len(usable):
        return np.zeros(len(values), bool)
    far = values > 100 * np.median(usable)
    return np.isin(values, UNDEFINED) & far
