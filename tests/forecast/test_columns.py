"""Which column is the price, and whose prices they are."""

import datetime as dt

import pytest
from support.price_files import DAYS, HOURS, PRICES, check, comma, table

from favor_np.forecast import PriceError
from favor_np.forecast.reading import words
from favor_np.forecast.reading.columns import price_column, time_column
from favor_np.forecast.reading.table import read_table


@pytest.mark.parametrize(
    "head",
    [
        "Datum;Erster;Hoch;Tief;Schlusskurs;Stuecke",
        "Datum;Eröffnungskurs;Tageshoch;Tagestief;Schluss;Umsatz",
        "Datum;Eröffn.;Hoch;Tief;Zuletzt;+/- %",
        "Date;Ouv.;Plus Haut;Plus Bas;Dernier;Variation %",
        "Date;Ouverture;Haut;Bas;Clôture;Volume",
        "Fecha;Apertura;Máximo;Mínimo;Último;% var.",
        "Fecha;Apertura;Máximo;Mínimo;Cierre;Volumen",
        "Data;Apertura;Massimo;Minimo;Chiusura;Var. %",
        "Data;Abertura;Máxima;Mínima;Fechamento;Var%",
        "Data;Otwarcie;Najwyzszy;Najnizszy;Zamkniecie;Wolumen",
        "Datum;Open;Hoog;Laag;Laatste;Verschil%",
        "Datum;Öppning;Högst;Lägst;Stängning;Volym",
        "Дата;Откр.;Макс.;Мин.;Цена;Объём",
        "Tarih;Açılış;Yüksek;Düşük;Şimdi;Fark %",
        "日付;始値;高値;安値;終値;出来高",
        "Date;Opening price;High price;Low price;Closing price;Average price",
        "Date;Open;High;Low;Close;Weighted Price",
        "Date;Prev Close;High;Low;Close;Typical Price",
        "Date;Open;High;Low;Settle;Prev. Day Open Interest",
        "Date;Open;High;Low;Latest;Change",
        "Date;Open;High;Low;Close/Last;Volume",
        "Date;o;h;l;c;v",
        "<DATE>;<OPEN>;<HIGH>;<LOW>;<CLOSE>;<VOL>",
        "snapped_at;open;total_volume;market_cap;price;count",
        "Date;open_price;high_price;low_price;last_price;vol",
        "timeOpen;open;high;low;close;marketCap",
    ],
)
def test_the_price_has_many_names(read, head):
    text = table(head, lambda t, p: f"{t:%Y-%m-%d};1,5;9,5;1,2;{comma(p)};500")
    prices = read(text)
    check(prices)
    assert prices.column == head.split(";")[4]


@pytest.mark.parametrize(
    "names",
    [
        *("Close*,Adj Close**", "close,adj_close", "Close,Adj. Close", "Close,Adjusted Close"),
        *(
            "close,adjClose",
            "close,adjclose",
            "CLOSE,ADJCLOSE",
            "close,closeadj",
            "Close,Close (adj)",
        ),
        *("close,adjusted_close", "close,adjustedClose", "Close,Adj-Close", "Last,Adj Last"),
        "Schluss,Schluss bereinigt",
        "Close Close price adjusted for splits.,Adj Close Price adjusted for splits and dividends.",
    ],
)
def test_adjusted_prices_win(read, names):
    prices = read(table(f"Date,{names}", "{t:%Y-%m-%d},404,{p}"))
    check(prices)
    assert prices.column == names.split(",")[1]
    assert "adjusted prices taken" in prices.note


@pytest.mark.parametrize(
    "name",
    [
        *("Volume", "Return", "Change", "Change %", "Vol.", "Umsatz", "Log Return", "Pct Change"),
        *("Turnover", "Open Interest", "Market Cap", "Trades", "daily_returns"),
    ],
)
def test_a_file_without_prices_is_refused(read, name):
    with pytest.raises(PriceError, match="no column of prices"):
        read(table(f"Date,{name}", "{t:%Y-%m-%d},{p}"))


def test_candidates_are_listed_with_a_line_of_the_file(read):
    text = table("time,bid,ask", "{t:%Y-%m-%d %H:%M},{p},{p}5", HOURS)
    with pytest.raises(PriceError, match=r'"bid" or "ask"; .* \(line 2: 2024-01-02 07:00, 101'):
        read(text)
    check(read(text, column="bid"), HOURS)
    with pytest.raises(PriceError, match="--column"):
        read(table("", "{t:%Y-%m-%d},1.5,9.5,1.2,{p}"))
    prices = read(table("Date,Average", "{t:%Y-%m-%d},{p}"))  # of one candidate it is said
    assert 'no closing price, column "Average" taken' in prices.note


def test_times_are_never_prices(read):
    for head, row in (("timestamp", "{u}"), ("a,b", "{u},{u}"), ("", "{u},{u}000")):
        with pytest.raises(PriceError, match=r"no column of prices|could be column"):
            read(table(head, row, HOURS))


@pytest.mark.parametrize("name", ["symbol", "Ticker", "isin", "Name", "kurs von"])
@pytest.mark.parametrize("blocks", [False, True])
def test_several_symbols(read, name, blocks):
    one = table("", "{t:%Y-%m-%d},AAA,{p}").splitlines()
    two = table("", lambda t, p: f"{t:%Y-%m-%d},BBB,{5 * p:.2f}").splitlines()
    rows = one + two if blocks else [row for pair in zip(one, two, strict=True) for row in pair]
    text = "\n".join([f"date,{name},close", *rows])
    with pytest.raises(
        PriceError, match=f'column "{name}" has "AAA" and "BBB"; choose .* --symbol'
    ):
        read(text)
    prices = read(text, symbol="aaa")
    check(prices)
    assert "aaa" in prices.note
    with pytest.raises(PriceError, match=f'no row and no column has "CCC"; column "{name}" has'):
        read(text, symbol="CCC")


def test_symbols_that_alternate_without_a_repeated_time(read):
    def row(t, p):
        return f"{t:%Y-%m-%d},{'BBB,500' if t.day % 2 else f'AAA,{p}'}"

    with pytest.raises(PriceError, match='column "venue" has "AAA" and "BBB"'):
        read(table("date,venue,close", row))


def test_symbols_that_are_numbers_and_symbols_in_two_columns(read):
    rows = [
        f"{t:%Y-%m-%d},{ticker},{place},{factor * p}"
        for ticker, place, factor in ((600519, "SH", 1), (600519, "HK", 3), (700, "HK", 5))
        for t, p in zip(DAYS, PRICES, strict=True)
    ]
    text = "\n".join(["date,ticker,market place,close", *rows])
    with pytest.raises(PriceError, match='column "ticker" has "600519" and "700"'):
        read(text)
    with pytest.raises(PriceError, match='column "market place" has "SH" and "HK"'):
        read(text, symbol="600519")
    check(read(text, symbol=["600519", "SH"]))


def test_texts_that_tell_no_series_apart(read):
    check(
        read(
            table(
                "time,side,price", lambda t, p: f"{t},{'buy' if t.hour % 3 else 'sell'},{p}", HOURS
            )
        ),
        HOURS,
    )
    check(read(table("Date,Weekday,Close", "{t:%Y-%m-%d},{t:%a},{p}")))


@pytest.mark.parametrize("head", ["Date,WTI,Date,Brent", "Date,WTI,Date.1,Brent"])
def test_series_side_by_side_have_their_own_times(read, head):
    later = [t + dt.timedelta(days=300) for t in DAYS]
    text = table(
        head, lambda t, p: f"{t - dt.timedelta(days=300):%Y-%m-%d},{2 * p},{t:%Y-%m-%d},{p}", later
    )
    check(read(text, column="Brent"), later)
    check(read(text, column="WTI"), DAYS, [2 * p for p in PRICES])


def test_two_prices_for_one_time(read):
    lines = table("Date,Open,High,Low,Close,Volume", "{t:%Y-%m-%d},1,9,1,{p},5").splitlines()
    check(read("\n".join([lines[0], *(line for line in lines[1:] for _ in range(2))])))  # the same
    twice = "\n".join(
        [*lines, *(line.replace(",5", ",9").replace(",1,", ",2,") for line in lines[1:])]
    )
    check(read(twice))
    other = [f"{t:%Y-%m-%d},1,9,1,{3 * p},5" for t, p in zip(DAYS, PRICES, strict=True)]
    with pytest.raises(PriceError, match=r"40 of 80 rows have another price for a time .*line 42"):
        read("\n".join([*lines, *other]))
    ticks = table("time,price", "2024-01-02 07:00:{t.day:02},{p:.3f}\n2024-01-02 07:00:{t.day:02},{p:.3f}1",
                  DAYS[:29], [101 + i % 3 for i in range(29)])  # fmt: skip
    prices = read(ticks)
    assert len(prices) == 29
    assert prices.values[0] == 101.0001


# ----------------------------------------------------------------------------------------
# The decisions
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("AdjClose", {"adj", "close"}),
        ("adj_close", {"adj", "close"}),
        ("ADJCLOSE", {"adj", "close"}),
        ("Schlußkurs", {"schlusskurs"}),
        ("Vortageskurs", {"vortageskurs", "vortag"}),
        ("Handelsvolumen", {"handelsvolumen", "volumen"}),
        ("marketCap", {"market", "cap"}),
        ("closetime", {"close", "time"}),
        ("Clôture", {"cloture"}),
        ("Exchange", {"exchange"}),
        ("52W H", {"w", "h"}),
    ],
)
def test_words_of_a_name(name, found):
    assert words.words(name) == found


@pytest.mark.parametrize(
    "name", ["Close", "Close/Last", "PX_LAST", "Spot Price", "priceUSD", "종가"]
)
def test_names_of_prices(name):
    assert words.is_close(name)


@pytest.mark.parametrize(
    "name", ["Open", "Prev Close", "Weighted Price", "Close time", "price change", "WTI"]
)
def test_names_of_other_things(name):
    assert not words.is_close(name)


def test_which_column_is_what():
    parsed = read_table("Date,Hour,Bid,Close\n2024-01-02,7,1.5,2.5\n2024-01-02,8,1.5,2.6\n")
    assert price_column(parsed, None) == (3, "")
    assert price_column(parsed, "bid") == (2, "")
    assert price_column(parsed, "3") == (2, "")
    found = time_column(parsed, 3)
    assert found.texts == ["2024-01-02 7", "2024-01-02 8"]
    assert found.indices == (0, 1)
    assert time_column(read_table("n,Close\n5,2.5\n9,2.6\n"), 1) is None
