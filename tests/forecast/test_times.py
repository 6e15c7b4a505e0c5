"""Columns of times: however they are written, the same times; or an error that asks."""

import datetime as dt

import numpy as np
import pytest
from support.price_files import (
    COUNT,
    DAYS,
    EPOCH,
    HOURS,
    LATE_HOURS,
    MONTHS,
    PRICES,
    QUARTERS,
    YEARS,
    check,
    reverse,
    serial,
    table,
    unix,
)

from favor_np.forecast import PriceError
from favor_np.forecast.reading.formats import NONE, pattern, read_as
from favor_np.forecast.reading.stamps import stamp_readings
from favor_np.forecast.reading.times import is_time, read_times, settle

DAY_FORMATS = [
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y %m %d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y"),
    *("%m-%d-%Y", "%d.%m.%y", "%m/%d/%y", "%y-%m-%d", "%Y%m%d", "%d%m%Y", "%m%d%Y", "%y%m%d"),
    *("%d%m%y", "%d-%b-%Y", "%b %d %Y", "%d-%b-%y", "%d %B %Y", "%Y-%b-%d", "%d%b%Y"),
    *("%A %d %B %Y", "%a %m/%d/%Y", "%Y-W%V-%u", "%Y-%m-%dT00:00:00Z", "%Y-%m-%d 12:00 AM"),
    *("%Y-%m-%d 00:00:00-05:00", "%Y-%m-%dT00:00:00+0900", "%Y-%m-%d+09:00", "%Y年%m月%d日"),
]
HOUR_FORMATS = [
    *("%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%SZ", "%Y%m%d %H%M%S", "%Y%m%d%H", "%Y%m%d%H%M"),
    *("%Y%m%d%H%M%S", "%Y%m%d%H%M%S000", "%Y%m%dT%H%M%SZ", "%y%m%d%H%M", "%Y.%m.%d %H:%M"),
    *("%Y-%m-%d %I:%M %p", "%Y-%m-%d %I-%p", "%Y-%m-%d %H", "%d.%m.%Y %H:%M:%S.000"),
    *(
        "%d-%b-%Y %H:%M",
        "%b %d %Y %I:%M%p",
        "%Y-%m-%d %H:%M:%S UTC",
        "%Y-%m-%dT%H:%M:%S.000000000Z",
    ),
    *("%Y-%m-%d %H:%M:%S +0000 UTC", "%a %b %d %Y %H:%M:%S GMT+0000 (Universal Time)"),
    *("%Y-%m-%d_%H:%M", "%Y-%m-%d %H.%M", "%Y%m%d-%H:%M:%S", "%d.%m.%Y %H:%M:%S.000 GMT+0000"),
]
MONTH_FORMATS = [
    *("%Y-%m", "%Y/%m", "%Y%m", "%YM%m", "%Y-M%m", "%Y:%m", "%Y.%m", "%m/%Y", "%m.%Y", "%b %Y"),
    *("%b-%y", "%B %Y", "%Y %b", "%Y-%m-01"),
]


@pytest.mark.parametrize("head", ["Date;Close", "Whatever;Close", ""])
@pytest.mark.parametrize("form", DAY_FORMATS)
def test_days(read, form, head):
    text = table(head, f"{{t:{form}}};{{p}}")
    check(read(text))
    if head:
        assert read(reverse(text)).order == "descending"
        check(read(reverse(text)))


@pytest.mark.parametrize("form", HOUR_FORMATS)
def test_hours(read, form):
    check(read(table("Time;Close", lambda t, p: f"{t.strftime(form)};{p}", HOURS)), HOURS)


@pytest.mark.parametrize("head", ["Month,Price", "Date,Price"])
@pytest.mark.parametrize("form", MONTH_FORMATS)
def test_months(read, form, head):
    check(read(table(head, f"{{t:{form}}},{{p}}", MONTHS)), MONTHS)


@pytest.mark.parametrize("form", ["{0}Q{1}", "{0}-Q{1}", "Q{1} {0}", "{0} K{1}", "Q{1}/{0}"])
def test_quarters(read, form):
    text = table(
        "Period,Price", lambda t, p: form.format(t.year, t.month // 3 + 1) + f",{p}", QUARTERS
    )
    check(read(text), QUARTERS)


@pytest.mark.parametrize("head", ["Year,Price", ""])
def test_years(read, head):
    check(read(table(head, "{t:%Y},{p}", YEARS)), YEARS)


def test_months_that_could_be_days(read):
    months = [dt.datetime(2001 + i // 12, 1 + i % 12, 1) for i in range(COUNT)]
    check(read(table("Month,Price", "{t:%Y%m},{p}", months)), months)  # 200101 to 200404


def test_a_spreadsheet_takes_the_zero_off_october(read):
    text = table("Date,Price", lambda t, p: f"{float(f'{t:%Y.%m}')},{p}", MONTHS)
    assert "2020.1," in text
    check(read(text), MONTHS)


@pytest.mark.parametrize(
    "names",
    [
        "Jan Feb Mär Apr Mai Jun Jul Aug Sep Okt Nov Dez",
        "janv. févr. mars avr. mai juin juil. août sept. oct. nov. déc.",
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
        "gen feb mar apr mag giu lug ago set ott nov dic",
        "jan fev mar abr mai jun jul ago set out nov dez",
        "sty lut mar kwi maj cze lip sie wrz paź lis gru",
    ],
)
def test_names_of_months(read, names):
    names = names.split()
    check(read(table("A,Close", lambda t, p: f"{t.day} {names[t.month - 1]} {t.year},{p}")))
    text = table("A,Close", lambda t, p: f"{names[t.month - 1]} {t.year},{p}", MONTHS)
    check(read(text), MONTHS)


@pytest.mark.parametrize("head", ["time,close", "open_time,close", "a,close", ""])
@pytest.mark.parametrize("factor", [1, 10**3, 10**6, 10**9])
def test_unix_time(read, head, factor):
    check(read(table(head, lambda t, p: f"{unix(t) * factor},{p}", HOURS)), HOURS)


@pytest.mark.parametrize("factors", [(1, 1000), (1000, 10**6), (10**6, 10**9)])
def test_unix_time_whose_unit_changes(read, factors):
    def row(t, p):
        return f"{unix(t) * factors[t > HOURS[20]]},{p}"

    prices = read(table("open_time,close", row, HOURS))
    check(prices, HOURS)
    assert "seconds and" in prices.note
    check(read(reverse(table("open_time,close", row, HOURS))), HOURS)


@pytest.mark.parametrize("factor", [1, 1000])
def test_unix_time_on_both_sides_of_1970(read, factor):
    times = [dt.datetime(1962, 1, 2) + dt.timedelta(days=600 * i) for i in range(COUNT)]
    check(read(table("time,close", lambda t, p: f"{unix(t) * factor},{p}", times)), times)


@pytest.mark.parametrize("digits", [5, 7, 10])
def test_days_of_a_spreadsheet(read, digits):
    check(read(table("Date,Close", lambda t, p: f"{serial(t):.0f},{p}")))
    check(read(table("Date,Close", lambda t, p: f"{serial(t):.{digits}f},{p}", HOURS)), HOURS)
    text = table("Datum;Schluss", lambda t, p: f"{serial(t):.9f};{p}".replace(".", ","), HOURS)
    check(read(text), HOURS)


def test_fractions_of_seconds_to_the_nanosecond(read):
    start = unix(HOURS[0]) * 10**9
    for row in (
        lambda i: f"{start + i}",
        lambda i: f"2024-01-02T07:00:00.{i:09}Z",
        lambda i: f"2024-01-02T09:00:00.{i:09}+02:00",
        lambda i: f"20240102 07:00:00.{i:09}",
    ):
        lines = [f"{row(i)},{p}" for i, p in enumerate(PRICES)]
        prices = read("\n".join(["ts,close", *lines]))
        np.testing.assert_array_equal(prices.times.astype(np.int64), start + np.arange(COUNT))
        assert prices.time_label(1) == "2024-01-02 07:00:00.000000001"


def test_clocks_of_all_kinds(read):
    check(
        read(
            table("Date,Close", lambda t, p: f"{t.year}/{t.month}/{t.day} {t.hour}:00,{p}", HOURS)
        ),
        HOURS,
    )

    def twenty_four(t, p):
        day = t if t.hour else t - dt.timedelta(days=1)
        return f"{day:%Y-%m-%d} {t.hour or 24}:00,{p}"

    check(read(table("Date,Close", twenty_four, HOURS)), HOURS)

    def american(t, p):
        return f"{t.month}/{t.day}/{t.year}, {t:%I}:00:00\u202f{t:%p};{p}"

    check(read(table("Date;Close", american, LATE_HOURS)), LATE_HOURS)

    def absent(t, p):
        return f"{t:%Y-%m-%d}{f' {t:%H:%M}' if t.hour else ''},{p}"

    check(read(table("Date,Close", absent, HOURS)), HOURS)
    interval = '"{t:%d.%m.%Y %H:%M} - {t:%d.%m.%Y %H:59}","{p}"'
    check(read(table('"MTU (CET)","Price [EUR/MWh]"', interval, HOURS)), HOURS)


@pytest.mark.parametrize("day", ["%Y-%m-%d", "%Y.%m.%d", "%Y%m%d", "%d-%b-%Y", "%Y-%m-%d 00:00:00"])
@pytest.mark.parametrize("clock", ["%H:%M", "%H:%M:%S", "%H%M%S", "%H%M", "%I:%M %p"])
def test_day_and_clock_in_two_columns(read, day, clock):
    row = f"{{t:{day}}},{{t:{clock}}},{{p}}"
    for head in ("Date,Time,Close", "Datum,Uhrzeit,Close", "a,b,Close"):
        check(read(table(head, row, HOURS)), HOURS)
    prices = read(table("", row, HOURS), column="3")
    check(prices, HOURS)
    assert 'time of day from column "column 2"' in prices.note


@pytest.mark.parametrize("head", ["Date,Hour", "Date,HE", "Datum,Stunde", "Fecha,Hora", "x,y"])
@pytest.mark.parametrize(
    "clock", ["{0}", "{0:02}", "{0:02}:00", "{0:02}00", "HE{0:02}", "{0} - {1}"]
)
def test_hours_in_a_column(read, head, clock):
    if head == "x,y" and clock in ("HE{0:02}", "{0} - {1}"):
        head = "x,Hour"  # under any name only numbers and clocks

    def row(t, p):
        return f"{t:%Y-%m-%d},{clock.format(t.hour, t.hour + 1)},{p}"

    check(read(table(f"{head},Price", row, HOURS)), HOURS)

    def ending(t, p):
        day = t if t.hour else t - dt.timedelta(days=1)
        return f"{day:%Y-%m-%d},{clock.format(t.hour or 24, 0)},{p}"

    check(read(table(f"{head},Price", ending, HOURS)), HOURS)


def test_clocks_that_lost_their_zeros(read):
    for digits in ("%H%M%S", "%H%M"):

        def row(t, p, digits=digits):
            return f"{t:%Y%m%d},{int(t.strftime(digits))},{p}"

        check(read(table("<DATE>,<TIME>,<CLOSE>", row, HOURS)), HOURS)


MONDAYS = [dt.datetime(2024, 1, 1) + dt.timedelta(weeks=i) for i in range(COUNT)]


def test_year_and_quarter_apart(read):
    for quarter in ("{}", "Q{}"):
        text = table(
            "Year,Quarter,Price",
            lambda t, p, quarter=quarter: f"{t.year},{quarter.format(t.month // 3 + 1)},{p}",
            QUARTERS,
        )
        check(read(text), QUARTERS)
    with pytest.raises(PriceError, match="another price for a time"):  # but no hours of a year
        read(text.replace("Quarter", "x").replace("Q", ""))


@pytest.mark.parametrize(
    ("head", "row", "times"),
    [
        ("Year,Month,Day,Price", "{t.year},{t.month},{t.day},{p}", DAYS),
        ("Year,Month,Day,Hour,Price", "{t.year},{t.month},{t.day},{t.hour},{p}", HOURS),
        ("Year,Month,Price", "{t.year},{t:%B},{p}", MONTHS),
        ("Jahr;Monat;Preis", "{t.year};{t.month};{p}", MONTHS),
        ("Year;Month;Day;Close", "{t.year};{t:%b};{t.day};{p}", DAYS),
        ("Year,Week,Price", "{t:%G},{t:%V},{p}", MONDAYS),
        ("Date,Year,Month,Close", "{t:%Y-%m-%d},{t.year},{t.month},{p}", DAYS),
        ("Series ID,Year,Period,Value", "X,{t.year},M{t:%m},{p}", MONTHS),
    ],
)
def test_year_month_and_day_apart(read, head, row, times):
    check(read(table(head, row, times)), times)


def test_zones(read):
    tokyo = table("Date,Close", "{t:%Y-%m-%d} 00:00:00+09:00,{p}")
    prices = read(tokyo)
    check(prices)
    assert "local date" in prices.note

    def summer(t, p):
        return f"{t:%Y-%m-%d}T00:00:00{'-04:00' if t > DAYS[9] else '-05:00'},{p}"

    check(read(table("Date,Close", summer)))
    later = [hour + dt.timedelta(hours=5) for hour in HOURS]
    for zone in ("-05:00", "-0500", " EST", "-05", " GMT-0500", "-05:00[America/New_York]"):
        prices = read(table("Date,Close", f"{{t:%Y-%m-%d %H:%M}}:00{zone},{{p}}", HOURS))
        check(prices, later)
        assert "shifted to UTC" in prices.note
    with pytest.raises(PriceError, match="no time can be read"):
        read(table("Date,Close", "{t:%Y-%m-%d %H:%M} CST,{p}", HOURS))  # China or Chicago


FEBRUARY = [dt.datetime(2024, 2, 1 + i) for i in range(12)]


@pytest.mark.parametrize("form", ["%d/%m/%Y", "%m/%d/%Y", "%d-%m-%y", "%d%m%Y", "%d/%m/%Y 07:00"])
def test_day_or_month_first_is_asked(read, form):
    text = table("Date,Close", f"{{t:{form}}},{{p}}", FEBRUARY, PRICES[:12])
    with pytest.raises(
        PriceError, match=r"--day-first, --no-day-first or --date-format says which"
    ) as error:
        read(text)
    hour = dt.timedelta(hours=7 * ("07" in form))
    times = [day + hour for day in FEBRUARY]
    check(read(text, day_first=form.startswith("%d")), times, PRICES[:12])
    check(read(text, date_format=form.removesuffix(" 07:00")), times, PRICES[:12])
    read(text, date_format=str(error.value).split("'")[1])  # what it suggests


def test_days_with_points_are_day_first(read):
    prices = read(table("Datum;Kurs", "{t:%d.%m.%Y};{p}", FEBRUARY, PRICES[:12]))
    check(prices, FEBRUARY, PRICES[:12])
    assert "%d.%m.%Y" in prices.note


@pytest.mark.parametrize(
    ("head", "row", "message"),
    [
        ("Date,Close", "day {t.day} of {t.month},{p}", 'no time can be read from column "Date"'),
        ("When,Close", "d{t.day}m{t.month},{p}", 'no time can be read from column "When"'),
        ("Time,Close", "{t.day}:{t:%m},{p}", "a clock without a date"),
        ("Date,Close", "{t:%d %b},{p}", "no time"),
        ("Date,Close", "{t:%b-%d},{p}", "months of years or days without a year"),
        ("Date,Close", "3024{t:-%m-%d},{p}", "no time"),
        ("Date,Close", "1724{t:-%m-%d},{p}", "no time"),
        ("Date,Close", "1970-01-01 00:00:00.0000{t:%m%d},{p}", "microseconds apart"),
        ("time,close", "{u:.5E},{p}", "a spreadsheet has cut"),
    ],
)
def test_times_that_are_refused(read, head, row, message):
    with pytest.raises(PriceError, match=message):
        read(table(head, row))


def test_days_and_minutes_since_something_are_not_guessed(read):
    for row in (
        lambda t, p: f"{(t - EPOCH).days},{p}",
        lambda t, p: f"{t.toordinal() + 366},{p}",
        lambda t, p: f"{unix(t) // 60},{p}",
    ):
        with pytest.raises(PriceError, match="no time can be read"):
            read(table("Date,Close", row))


@pytest.mark.parametrize("first", ["%d/%m/%Y", "%m/%d/%Y"])
@pytest.mark.parametrize("turn", [str, reverse])
def test_days_and_months_that_were_exchanged(read, first, turn):
    """A program that expected the other order: all rows are dates, and some of them wrong."""
    other = {"%d/%m/%Y": "%m/%d/%Y", "%m/%d/%Y": "%d/%m/%Y"}[first]
    text = turn(
        table("Date,Close", lambda t, p: f"{t.strftime(first if t.day > 12 else other)},{p}")
    )
    with pytest.raises(PriceError, match=r'column "Date" has days and months in both orders: "'):
        read(text)
    assert len(read(text, date_format=first, allow_missing=0.9)) > 0  # as the user says


def test_seasons_are_no_months(read):
    text = table("Year,Close", lambda t, p: f"{t.year}/{(t.year + 1) % 100:02},{p}",
                 [t.replace(year=t.year + 21) for t in YEARS[:11]], PRICES[:11])  # fmt: skip
    with pytest.raises(PriceError, match='"2001/02", a month or two years'):
        read(text)


def test_an_option_that_does_not_fit_is_an_error(read):
    text = table("Date,Close", "{t:%Y-%m-%d},{p}")
    with pytest.raises(PriceError, match=r'no time in column "Date" is written as "%d\.%m\.%Y"'):
        read(text, date_format="%d.%m.%Y")
    with pytest.raises(PriceError, match="%Q is not known"):
        read(text, date_format="%Q")


# ----------------------------------------------------------------------------------------
# The decisions
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        *("2024-01-02", "2.1.2024", "1/2/24", "2 Jan 2024", "Tue, Jan 2, 2024 7:00 AM", "1995M01"),
        *("20240102T0700", "2024Q1", "2024-W05-1", "7:00", "07:00:00.5", "7 PM", "mars 2024"),
    ],
)
def test_cells_that_are_times(cell):
    assert is_time(cell)


@pytest.mark.parametrize(
    "cell",
    [
        *("", "AAA", "CLF24", "ESH4", "1.5", "1,234.5", "12:5", "Source: 2024", "buy", "N.Y.C."),
        *("BTC/USDT", "001/A/NBP/2024", "$5", "2024-01-02 and more", "1-2-3-4", "x" * 100 + "1"),
    ],
)
def test_cells_that_are_no_times(cell):
    assert not is_time(cell)


def test_most_cells_decide_and_the_others_are_none():
    cells = ["13.01.2024", "14.01.2024", "15.01.2024", "2024-01-15", "soon", "31.02.2024"]
    reading = read_times(cells, "Date")
    assert [time == NONE for time in reading.nanoseconds] == [False] * 3 + [True] * 3
    reading = read_times(["20240113", "20240114", "20240231"] + ["20240115"] * 20, "Date")
    assert (reading.nanoseconds == NONE).sum() == 1


def test_the_year_is_told_by_the_gaps():
    cells = [f"{day:%y-%m-%d}" for day in DAYS]
    first = read_as("\n".join(cells), pattern("%y-%m-%d"))
    last = read_as("\n".join(cells), pattern("%d-%m-%y"))
    assert len(last.known) == len(first.known)  # the 24th of January 2002, 2003, ...
    settled = settle({"%d-%m-%y": last, "%y-%m-%d": first}, cells, "Date", None)
    np.testing.assert_array_equal(settled.nanoseconds, first.nanoseconds)


def test_a_clock_of_twelve_hours():
    cells = ["12:00 AM", "1:30 am", "12:00 p.m.", "11:59 P.M.", "13:00 PM"]
    reading = read_times([f"2024-01-13 {cell}" for cell in cells], "Date")
    hours = (reading.known - reading.known[0]) / 3.6e12
    np.testing.assert_allclose(hours, [0, 1.5, 12, 23 + 59 / 60])
    assert reading.nanoseconds[-1] == NONE


def test_impossible_clocks_and_dates_are_none():
    cells = ["24:01", "25:00", "23:60", "23:59:60"]
    cells = [f"2024-01-13 {cell}" for cell in cells] + ["2023-02-29 00:00", "2024-13-01 00:00"]
    reading = read_times([*cells, *(f"2024-01-{day} 24:00" for day in range(14, 22))], "Date")
    assert (reading.nanoseconds[:6] == NONE).all()
    assert len(reading.known) == 8


def test_two_digits_of_a_year():
    reading = read_times(["13/01/68", "13/01/69", "31/12/99"], "Date")
    years = reading.known.view("M8[ns]").astype("M8[Y]").astype(str)
    assert list(years) == ["2068", "1969", "1999"]


def test_numbers_that_are_times_in_other_ways():
    assert stamp_readings(["2024-01-02"] * 3, "Date") is None
    assert stamp_readings(["19724", "19725"], "Date") == {}
    assert list(stamp_readings(["45293", "45294"], "Date")) == ["days"]
    assert list(stamp_readings(["1704178800", "1704182400"], "Date")) == ["Unix"]
    assert list(stamp_readings(["0", "60", "120"], "time")) == ["Unix"]
    assert stamp_readings(["0", "60", "120"], "x") == {}
    assert list(stamp_readings(["01022024", "2022024"], "x")) == ["%d%m%Y", "%m%d%Y"]
