"""Columns of numbers: decimal marks, thousands, units, and what is no number."""

import numpy as np
import pytest
from support.price_files import COUNT, DAYS, HIGH, PRICES, check, comma, german, table

from favor_np.forecast import PriceError
from favor_np.forecast.reading.numbers import decimal_mark, is_number, read_numbers

WHOLE = [round(price) for price in HIGH]


WAYS = {
    "decimal comma": (comma, PRICES),
    "1.234,5": (german, HIGH),
    "1,234.5": ("{:,.2f}".format, HIGH),
    "1'234.5": (lambda p: f"{p:,.2f}".replace(",", "'"), HIGH),
    "1’234.5": (lambda p: f"{p:,.2f}".replace(",", "’"), HIGH),
    "1 234,5": (lambda p: german(p).replace(".", " "), HIGH),
    "1 234,5 with a thin blank": (lambda p: german(p).replace(".", "\u202f"), HIGH),
    "1,234": ("{:,}".format, WHOLE),
    "1.234": (lambda p: f"{p:,}".replace(",", "."), WHOLE),
    "1 234": (lambda p: f"{p:,}".replace(",", "\u00a0"), WHOLE),
    "$1,234.5": ("${:,.2f}".format, HIGH),
    "1.234,5 €": (lambda p: german(p) + " €", HIGH),
    "USD 1,234.5": ("USD {:,.2f}".format, HIGH),
    "101.5%": ("{:.2f}%".format, PRICES),
    "+101.5": ("+{:.2f}".format, PRICES),
    "1.015e2": ("{:.4e}".format, PRICES),
    "0.1015K": (lambda p: f"{p / 1000:.5f}K", PRICES),
    "101.5(p)": ("{:.2f}(p)".format, PRICES),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
def test_numbers(read, way, separator):
    write, values = WAYS[way]
    quote = '"' * (separator == ",")

    def row(t, p):
        return f"{t:%Y-%m-%d}{separator}{quote}{write(p)}{quote}"

    prices = read(table(f"Date{separator}Close", row, prices=values))
    np.testing.assert_allclose(prices.values, values, rtol=1e-12)


@pytest.mark.parametrize(
    "mark", ["", ".", "-", "--", "N/A", "NA", "null", "n.v.", "#N/A", "..", "nan"]
)
@pytest.mark.parametrize("write", [comma, str])
def test_what_is_missing_does_not_change_the_numbers(read, mark, write):
    def row(t, p):
        return f"{t:%Y-%m-%d};{mark if t == DAYS[7] else write(p)}"

    prices = read(table("Datum;Schluss", row))
    np.testing.assert_array_equal(prices.values, PRICES[:7] + PRICES[8:])
    assert list(prices.dropped.values()) == [(1, 9)]


def test_three_decimals(read):
    small = [round(price / 50, 3) for price in PRICES]
    assert all(1 < price < 10 for price in small)
    for separator in (",", "\t"):
        text = table(f"Date{separator}Close", f"{{t:%Y-%m-%d}}{separator}{{p:.3f}}", prices=small)
        check(read(text), values=small)
    text = table("Date;Close", lambda t, p: f"{t:%Y-%m-%d};{p:.3f}".replace(".", ","), prices=small)
    with pytest.raises(PriceError, match=r"--decimal \. or --decimal , says which"):
        read(text)
    check(read(text, decimal=","), values=small)
    np.testing.assert_allclose(read(text, decimal=".").values, np.multiply(small, 1000))
    text = text.replace("\n", ";0,5\n").replace("Close;0,5", "Close;Chg")  # another column tells
    prices = read(text)
    check(prices, values=small)
    assert "decimal comma" in prices.note
    assert f'in column "Close" is taken for {small[0]},' in prices.note
    whole = [round(1000 * price) for price in small]
    text = table("Date,Close", '{t:%Y-%m-%d},"{p:,}"', prices=whole)
    check(read(text), values=whole)
    assert read(text).note == f'"{whole[0]:,}" in column "Close" is taken for {whole[0]}'
    below = [round(price / 500, 3) for price in PRICES]
    text = table("Date;Close", lambda t, p: f"{t:%Y-%m-%d};{p:.3f}".replace(".", ","), prices=below)
    check(read(text), values=below)


@pytest.mark.parametrize(
    "number",
    ["9223372036854775807", "18446744073709551615", "2147483647", "1.7976931348623157E+308"],
)
def test_the_largest_number_of_a_type_is_no_price(read, number):
    prices = read(table("Date,Close", lambda t, p: f"{t:%Y-%m-%d},{number if t == DAYS[9] else p}"))
    assert len(prices) == COUNT - 1
    assert list(prices.dropped.values()) == [(1, 11)]


def test_a_step_beyond_all_others_is_said(read):
    text = table("Date,Close", lambda t, p: f"{t:%Y-%m-%d},{1000 * p if t > DAYS[20] else p}")
    prices = read(text)
    assert len(prices) == COUNT
    assert "times all others" in prices.note
    assert "2024-01-23" in prices.note


def test_prices_in_several_currencies_are_refused(read):
    with pytest.raises(PriceError, match=r"several currencies: \$, €"):
        read(table("Date,Close", lambda t, p: f"{t:%Y-%m-%d},{'$€'[t.day % 2]}{p}"))
    pence = table(
        "Date,Close", lambda t, p: f"{t:%Y-%m-%d},{f'{100 * p:.0f}p' if t.day % 2 else f'£{p}'}"
    )
    with pytest.raises(PriceError, match="several currencies: p, £"):
        read(pence)


# ----------------------------------------------------------------------------------------
# The decisions
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "mark"),
    [
        (["101", "102"], ""),
        (["101.5", "102"], "."),
        (["101,5", "102"], ","),
        (["1.036,27", "990"], ","),
        (["1,036.27", "990"], "."),
        (["990", "1,036", "1,017"], "."),
        (["990", "1.036", "1.017"], ","),
        (["101", "101.125", "101.25"], "."),
        (["101", "101.125", "100.875"], "."),
        (["1.036", "1.017"], None),
        (["1,036", "1,017"], None),
        (["0,036", "1,017"], ","),
        (["1,036,000", "1,017"], "."),
        (["1,23,456.50", "98,765"], "."),  # as in India
        (["101,5", ".", "-", "n.v."], ","),
        (["a, b", "101"], ""),
    ],
)
def test_the_decimal_mark_of_a_column(cells, mark):
    assert decimal_mark(cells) == mark


@pytest.mark.parametrize(
    "cell", ["1", "-1.5", "+.5", "1e-3", "1,234.5", "1.234,5 €", "$-5", "5 %", "nan"]
)
def test_cells_that_are_numbers(cell):
    assert is_number(cell)


@pytest.mark.parametrize(
    "cell", ["", "-", ".", "1.2.3", "2024-01-02", "JAN-24", "CLF24", "1,23,4.5", "a1"]
)
def test_cells_that_are_no_numbers(cell):
    assert not is_number(cell)


def test_what_numbers_are_read():
    cells = ["-$5.5", "$-5.5", "$1,234.5", "1.5K", "2M", "−3", "inf", "-inf", "nan", "x1", "1,23"]
    values, said = read_numbers(cells, "Close")
    expected = [-5.5, -5.5, 1234.5, 1500, 2e6, -3, np.inf, -np.inf] + [np.nan] * 3
    np.testing.assert_array_equal(values, expected)
    assert said == "K, M and B multiplied out"
