"""What is the header, what are rows, what is neither; and files that are no text."""

import gzip
import lzma
import zipfile

import pytest
from support.price_files import COUNT, DAYS, HIGH, PRICES, check, comma, table
from support.tuning import tuned

from favor_np.forecast import PriceError, read_prices
from favor_np.forecast.reading.table import find_separator, kind_of, read_table

BODY = table("Date,Open,High,Low,Close,Volume", "{t:%Y-%m-%d},1,9,1,{p},5")


@pytest.mark.parametrize(
    "above",
    [
        *("My prices, daily\n", "https://example.org/data\n", "a,b,c,d,e,f,g,h\n", "sep=,\n"),
        *("Symbol,ZZZ\nCurrency,USD\n\n", "# made by a program\n", "Last Price: 101.5\n"),
        *("Symbol,ZZZ,,,,\nFrom,2024-01-02,,,,\n", '"Historical data, of 2024-03-01"\n'),
    ],
)
def test_lines_above_the_header(read, above):
    prices = read(above + BODY)
    check(prices)
    assert prices.column == "Close"


@pytest.mark.parametrize(
    "below",
    [
        *("Source: x\n", "\n\nEnd of file\n", ",,,,,\n", "# end\n", "Source: x,,,,,\n"),
        *('"Downloaded as of 02-11-2024 05:00am CST"\n', "Note, this is, a, b, c, d, e, f, g\n"),
        BODY.partition("\n")[0] + "\n",
    ],
)
def test_lines_below_the_rows(read, below):
    check(read(BODY + below))


@pytest.mark.parametrize("head", ["Date,Close", "a title\nDate,Close\nday,USD", ""])
def test_a_first_row_without_a_time_is_no_header(read, head):
    prices = read(table(head, lambda t, p: f"{'n/a' if t == DAYS[0] else t.date()},{p}"))
    check(prices, DAYS[1:], PRICES[1:])
    line = 1 + head.count("\n") + bool(head)
    assert prices.dropped == {"time missing or not written as the others": (1, line)}


def test_a_repeated_header_is_not_a_row(read):
    prices = read(BODY + BODY.partition("\n")[0])
    assert prices.dropped == {"header repeated": (1, COUNT + 2)}
    assert prices.rows == COUNT + 1


def test_headers_of_several_lines(read):
    one = "Price,Close,High\nTicker,ZZZ,ZZZ\nDate,,"
    prices = read(table(one, "{t:%Y-%m-%d},{p},1"))
    check(prices)
    assert prices.column == "Close"
    two = table("Price,Close,Close,High\nTicker,AAA,BBB,AAA\nDate,,,", "{t:%Y-%m-%d},{p},7{p},1")
    with pytest.raises(PriceError, match='could be column "Close AAA" or "Close BBB"'):
        read(two)
    check(read(two, symbol="AAA"))
    check(read(two, column="close aaa"))
    check(read(table("Date,Close\nYYYY-MM-DD,USD", "{t:%Y-%m-%d},{p}")))
    eia = 'Back to Contents,Data 1: Cushing\nSourcekey,RWTC\nDate,"Cushing, OK WTI Spot Price FOB"'
    assert "WTI Spot" in read(table(eia, '"{t:%b %d, %Y}",{p}')).column


def test_rows_wider_than_the_header_are_refused(read):
    with pytest.raises(PriceError, match=r"have 3 cells \(line 2\), the header in line 1 names 2"):
        read(table("Date,Close", "{t:%Y-%m-%d},1,{p}"))

    def row(t, p):
        return f"{t:%Y-%m-%d},{p}{',5' if t == DAYS[20] else ''}"

    with pytest.raises(PriceError, match=r"line 22 has 3 cells, where the header names 2"):
        read(table("Date,Close", row))
    with pytest.raises(PriceError, match="cells"):
        read(table("Date,Close", "{t:%Y-%m-%d},{p:,.2f}", prices=HIGH))  # 1,036.27 without quotes
    check(read(table("Date;Open;Close", "{t:%Y-%m-%d};1;{p};")))  # but an empty cell is nothing


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("Date        Close", "{t:%Y-%m-%d}  {p:>9}"),
        ("Date     Open    Adj Close", "{t:%Y-%m-%d}  1.5   {p}"),
        ('"Date" "Close"', '"{t:%Y-%m-%d}" {p}'),
        ("'Date','Close'", "'{t:%Y-%m-%d}','{p}'"),
        ("| Date | Close |\n|------|-----|", "| {t:%Y-%m-%d} | {p} |"),
        (",Date,Close", "{t.day},{t:%Y-%m-%d},{p}"),
        (",WTI", "{t:%Y-%m-%d},{p}"),
        ("index,date,x", "7,{t:%Y-%m-%d},{p}"),
        ("#RIC,Date-Time,Last", "A.O,{t:%Y-%m-%d},{p}"),
        ("Date,7203", "{t:%Y-%m-%d},{p}"),
        (",7203", "{t:%Y-%m-%d},{p}"),
    ],
)
def test_tables_of_other_programs(read, head, row):
    if head.startswith("index"):  # a row number is no price

        def row(t, p):
            return f"{DAYS.index(t)},{t:%Y-%m-%d},{p}"

    check(read(table(head, row)))


def test_numbers_as_names_of_columns(read):
    text = table("Date,600519,000001", "{t:%Y-%m-%d},{p},7{p}")
    check(read(text, column="600519"))
    with pytest.raises(PriceError, match='could be column "600519" or "000001"'):
        read(text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\n\n"])
def test_encodings_and_ends_of_lines(read, encoding, newline):
    text = table("Datum;Schlußkurs", lambda t, p: f"{t:%d.%m.%Y};{comma(p)}")
    prices = read(text.replace("\n", newline).encode(encoding))
    check(prices)
    assert prices.column == "Schlußkurs"


def test_packed_files(read, tmp_path):
    check(read(gzip.compress(BODY.encode())))
    check(read(lzma.compress(BODY.encode())))
    for names in (["a.csv"], ["a.csv", "b.csv"], []):
        with zipfile.ZipFile(tmp_path / "prices.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, BODY)
        if len(names) == 1:
            check(read_prices(tmp_path / "prices.zip"))
        else:
            with pytest.raises(PriceError, match=r"binary|one file"):
                read_prices(tmp_path / "prices.zip")


@tuned(MOST=10**5)
def test_a_packed_file_may_not_unpack_to_anything(tmp_path):
    path = tmp_path / "zeros.gz"
    path.write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(PriceError, match="unpacks to more than 100 times"):
        read_prices(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": [1, 2]}', "JSON"),
        ("[[1, 2], [3, 4]]", "JSON"),
        ("<!DOCTYPE html><html>", "a web page"),
        (b"\xd0\xcf\x11\xe0abc", "old workbook"),
        (b"PK\x03\x04abc", "cannot be unpacked"),
        (gzip.compress(b"Date,Close\n" * 99, mtime=0)[:-9], "cannot be unpacked"),
    ],
)
def test_what_is_no_table(read, content, message):
    with pytest.raises(PriceError, match=message):
        read(content)


def test_a_web_address_is_no_file():
    with pytest.raises(PriceError, match="a web address; download the file first"):
        read_prices("https://example.org/prices.csv")


# ----------------------------------------------------------------------------------------
# The decisions
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("a,b\n1,2\n", ","),
        ("a;b\n1,5;2,5\n", ";"),
        ("1,5;2,5\n3,5;4,5\n", ";"),
        ("a\tb\n1,5\t2\n", "\t"),
        ("a|b\n1|2\n", "|"),
        ("a b\n1 2\n", " "),
        ("a  b c\n1  2 3\n", "  "),
        ("A title, with a comma\na;b\n1;2\n3;4\n", ";"),
        ("price\n1\n2\n", ","),
        ('"a;b",c\n"x;y",1\n', ","),
    ],
)
def test_the_separator(text, separator):
    assert find_separator(text) == separator


def test_the_kind_of_a_column():
    assert kind_of(["1", "2,5", "$3", "-", "x1"]) == "number"
    assert kind_of(["2024-01-02", "-", "soon"]) == "time"
    assert kind_of(["AAA", "BBB", "1"]) == "text"
    assert kind_of(["", ".", "N/A"]) == ""


def test_lines_are_counted_as_an_editor_counts_them():
    parsed = read_table('Title\n\nDate,Close\n2024-01-02,1\n\n"2024-01-03","2"\nSource: x\n')
    assert parsed.header == ["Date", "Close"]
    assert parsed.lines.tolist() == [4, 6]
    assert {reason: lines.tolist() for reason, lines in parsed.left_out.items()} == {
        "not a row of the table": [7]
    }
    assert parsed.line(1) == "line 6: 2024-01-03, 2"
    assert read_table("sep=;\nDate;Close\n2024-01-02;1\n").lines.tolist() == [3]
