"""Reading price series: what is found, what is dropped, what is refused."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from favor_np.forecast import PriceError, Prices, read_prices


@pytest.fixture
def write(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "prices.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return path

    return write


def test_bundled_series_drops_the_negative_price():
    prices = read_prices()
    assert (prices.rows, len(prices)) == (10226, 10225)
    assert prices.dropped == {"price not above zero": (1, 8645)}
    assert np.datetime64("2020-04-20") not in prices.times.astype("datetime64[D]")
    assert prices.values.min() > 0
    assert prices.step == "1 day"


DAYS = ["2024-01-01", "2024-01-02", "2024-01-03"]


@pytest.mark.parametrize(
    "text",
    [
        "Date,Price\n2024-01-01,1\n2024-01-02,2\n2024-01-03,4\n",
        "Date,Price\r\n2024-01-01,1\r\n2024-01-02,2\r\n2024-01-03,4\r\n",
        "Date,Price\r2024-01-01,1\r2024-01-02,2\r2024-01-03,4",
        "\ufeffdate;close\n2024-01-03;4,0\n2024-01-02;2,0\n2024-01-01;1,0\n",
        "time\tOpen\tClose\n2024-01-01T00:00Z\t9\t1\n2024-01-02T00:00Z\t9\t2\n"
        "2024-01-03T00:00Z\t9\t4\n",
        "# made by a program\nTIMESTAMP,Last\n2023-12-31 23:30:00-01:00,1\n"
        "2024-01-01 23:30:00-01:00,2\n2024-01-02 23:30:00-01:00,4\n",
        "Date,Open,High,Low,Close,Adj Close,Volume\n2024-01-01,5,6,4,5,1,9\n"
        "2024-01-02,5,6,4,5,2,9\n2024-01-03,5,6,4,5,4,9\n",
        "date,time,closing price,price change\n2024-01-01,00:00,1,7\n2024-01-02,00:00,2,7\n"
        "2024-01-03,00:00,4,7\n",
        "unix,date,symbol,open,high,low,close,Volume USD\n1704067200,x,BTC,9,9,9,1,3\n"
        "1704153600,x,BTC,9,9,9,2,3\n1704240000,x,BTC,9,9,9,4,3\n",
        "open_time,open,close,close_time\n1704067200000,9,1,1\n1704153600000,9,2,2\n"
        "1704240000000,9,4,3\n",
        "day,WTI\n2024/1/3,4\n2024/1/1,1\n2024/1/2,2\n",
        "20240101,1\n20240102,2\n20240103,4\n",
        "1704067200,1\n1704153600,2\n1704240000,4\n",
        'Date,Price\n"2024-01-01","1"\n"2024-01-02","2"\n"2024-01-03","4"\n',
        "Price|Date\n1|2024-01-01\n2|2024-01-02\n4|2024-01-03\n",
        "Date, Price\n\n2024-01-01, 1\n2024-01-02, 2\n\n2024-01-03, 4\n\n",
    ],
)
def test_formats_that_mean_the_same(write, text):
    prices = read_prices(write(text))
    np.testing.assert_array_equal(prices.values, [1, 2, 4])
    np.testing.assert_array_equal(prices.times.astype("datetime64[D]"), np.array(DAYS, "M8[D]"))
    assert prices.dropped == {}
    assert prices.step == "1 day"


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8"])
def test_encodings(write, encoding):
    text = "Datum;Close é\n2024-01-01;1\n2024-01-02;2\n"
    assert read_prices(write(text, encoding)).column == "Close é"


def test_column_by_name_and_number(write):
    path = write("Date,Brent,WTI\n2024-01-01,1,10\n2024-01-02,2,20\n")
    for column, values in (("brent", [1, 2]), ("WTI", [10, 20]), ("3", [10, 20])):
        np.testing.assert_array_equal(read_prices(path, column).values, values)
    with pytest.raises(PriceError, match=r'could be column "Brent" or "WTI"; name one with --col'):
        read_prices(path)
    with pytest.raises(PriceError, match=r'no column "gold"; there are "Date", "Brent" and "WTI"'):
        read_prices(path, "gold")


def test_adjusted_close_is_preferred_and_said(write):
    prices = read_prices(write("Date,Close,AdjClose\n2024-01-01,2,1\n2024-01-02,4,3\n"))
    assert prices.column == "AdjClose"
    assert "adjusted" in prices.note


@pytest.mark.parametrize(
    "head", ["Date,Price,Close", "Date,Price,Price", "Date,Close,Value", "Date,Last,Settle"]
)
def test_two_prices_are_ambiguous(write, head):
    with pytest.raises(PriceError, match="the price could be column"):
        read_prices(write(f"{head}\n2024-01-01,2,1\n2024-01-02,4,3\n"))


def test_two_columns_of_one_name_go_by_number(write):
    path = write("Date,Price,Price\n2024-01-01,2,1\n2024-01-02,4,3\n")
    with pytest.raises(PriceError, match="--column 2"):
        read_prices(path, "Price")
    np.testing.assert_array_equal(read_prices(path, "3").values, [1, 3])


def test_unusable_rows_are_counted(write):
    rows = ["2024-01-01,1", "2024-01-02,", "2024-01-03,abc", "2024-01-04,nan", "2024-01-05,inf"]
    rows += ["2024-01-06,0", "2024-01-07,-3", "2024-01-08,5", "soon,6", "2024-01-08,7", "short"]
    path = write("Date,Price\n" + "\n".join(rows))
    with pytest.raises(
        PriceError, match=r"7 of 10 rows are unusable: .*; --allow-missing 0\.7 takes"
    ):
        read_prices(path, allow_missing=0.69)
    prices = read_prices(path, allow_missing=0.7)
    np.testing.assert_array_equal(prices.values, [1, 7])  # of equal times the last in the file
    assert prices.dropped == {
        "not a row of the table": (1, 12),
        "time missing or not written as the others": (1, 10),
        "price missing": (1, 3),
        "price not a number": (2, 4),
        "price infinite": (1, 6),
        "price not above zero": (2, 7),
        "time repeated": (1, 9),
    }
    assert prices.rows == 11 == len(prices) + sum(n for n, _ in prices.dropped.values())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("newest_first", [False, True])
def test_the_newest_rows_unusable_is_said(write, rows, newest_first):
    lines = [f"2024-{1 + i // 28:02}-{1 + i % 28:02},{100 + i % 7}" for i in range(60)]
    lines[-rows:] = [f"{line.split(',')[0]},N/A" for line in lines[-rows:]]
    lines = lines[::-1] if newest_first else lines
    note = read_prices(write("\n".join(["Date,Price", *lines]))).note
    first = 2 if newest_first else 62 - rows
    assert f"unusable (line {first}): the series ends before" in note
    assert ("the last row is" in note) == (rows == 1)


@pytest.mark.parametrize(
    ("at", "factor", "others", "said"),
    [
        (50, 3.0, 1.001, True),
        (50, 2.0, 1.001, False),  # a day of a wild market
        (50, 3.0, 1.2, False),  # as wild as the others
        (50, 1 / 3, 1.001, True),
        (1, 3.0, 1.001, True),
        (99, 3.0, 1.001, True),
    ],
)
@pytest.mark.parametrize("recovers", [1, 1.0001, 0.9999])
def test_a_price_far_from_its_neighbours_is_said(write, at, factor, others, said, recovers):
    prices = 50 * others ** (np.arange(100) % 2.0)
    prices[at] *= factor
    prices[at + 1 :] *= recovers
    note = read_prices(write("\n".join(["Price", *map(repr, prices.tolist())]))).note
    assert ("times all others" in note) == said, note


def test_a_hole_in_the_middle_is_no_end(write):
    lines = [f"2024-01-{1 + i:02},{'N/A' if i == 9 else 100 + i % 7}" for i in range(30)]
    assert read_prices(write("\n".join(["Date,Price", *lines]))).note == ""


def test_options_are_checked(write):
    path = write("Date,Price\n2024-01-01,1\n2024-01-02,2\n")
    with pytest.raises(ValueError, match=r"decimal must be '\.' or ','"):
        read_prices(path, decimal=";")
    with pytest.raises(ValueError, match="allow_missing must be between 0 and 1, got 5"):
        read_prices(path, allow_missing=5)


def test_order_of_rows_does_not_matter(write):
    rows = [f"{day},{price}" for day, price in zip(DAYS, (1, 2, 4), strict=True)]
    for order, label in (([0, 1, 2], "ascending"), ([2, 1, 0], "descending"), ([1, 0, 2], "unsor")):
        prices = read_prices(write("\n".join(["Date,Price", *(rows[i] for i in order)])))
        np.testing.assert_array_equal(prices.values, [1, 2, 4])
        assert prices.order.startswith(label)


@pytest.mark.parametrize("factor", [1, 1000, 10**6, 10**9])
def test_unix_times_in_any_unit(write, factor):
    lines = [f"{(1704067200 + 3600 * i) * factor},{i + 1}" for i in range(4)]
    prices = read_prices(write("time,price\n" + "\n".join(lines)))
    assert prices.times[0] == np.datetime64("2024-01-01T00:00")
    assert prices.step == "1 hour"


def test_small_unix_times_years_and_months(write):
    assert read_prices(write("time,price\n0,1\n60,2\n120,3\n")).step == "1 minute"
    assert read_prices(write("date,price\n1999,1\n2000,2\n2001,3\n")).time_label(0) == "1999-01-01"
    assert read_prices(write("date,price\n1999-01,1\n1999-02,2\n")).time_label(1) == "1999-02-01"


def test_without_times_the_order_of_the_file_counts(write):
    prices = read_prices(write("price\n3\n1\n2\n"))
    np.testing.assert_array_equal(prices.values, [3, 1, 2])
    assert prices.times is None
    assert "no time column" in prices.note
    assert prices.time_label(-1) == "price 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "binary"),
        (b"\x7fELF\x02\x01\x01", "binary"),
        (b"\x1f\x8b\x08\x08abc\xff\xfe", "cannot be unpacked"),
        (b"# only a comment\n", "no rows"),
        (b",,,\n,,\n", "no rows"),
        (b"Date,Price\n", "a header and no rows"),
        (b"Date,Price\n2024-01-01,5\n", "1 usable price"),
        (b"Date,Price\n2024-01-01,5\n2024-01-02,5\n", "all 2 prices"),
        (b"Date,Price\n2024-01-01,nan\n2024-01-02,NaN\n", 'no usable price in column "Price"'),
        (b"Date,Price\n2024-01-01,abc\n2024-01-02,def\n", '"abc" in line 2'),
        (b"Date,Price\n2024-01-01,-1\n2024-01-02,0\n", "no usable price"),
        (b"Date,Note\n2024-01-01,abc\n2024-01-02,def\n", "no column of prices"),
        (b"Date,Price\nsoon 4,1\nlater 5,2\n", "ISO dates"),
        (
            b'Date,Price\n2024-01-01,"1\n2024-01-02,2\n',
            "line 3: a quote is opened and never closed",
        ),
    ],
)
def test_files_that_are_refused(write, content, message):
    with pytest.raises(PriceError, match=message) as caught:
        read_prices(write(content))
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_prices(tmp_path / "none.csv")
    with pytest.raises(OSError, match="directory"):
        read_prices(tmp_path)


def test_standard_input(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(b"price\n1\n2\n")

    monkeypatch.setattr("sys.stdin", Stdin)
    assert len(read_prices("-")) == 2


@pytest.mark.parametrize(
    ("values", "times"),
    [
        (np.array([1.0, -2.0]), None),
        (np.array([1.0, np.nan]), None),
        (np.ones((2, 2)), None),
        (np.array([1.0, 2.0]), np.array(DAYS, "M8[D]")),
        (np.array([1.0, 2.0, 3.0]), np.array(DAYS[::-1], "M8[D]")),
        ([1.0, 2.0, np.nan], np.array(DAYS, "M8[D]")),
    ],
    ids=str,
)
def test_what_is_no_series_is_refused(values, times):
    with pytest.raises(PriceError, match=r"must (be one-dimensional|increase)"):
        Prices(values, times)


def test_a_series_of_numbers_and_times():
    prices = Prices([1, 2, 3], DAYS)
    assert prices.values.dtype == np.float64
    assert prices.step == "1 day"


def test_from_array_checks():
    with pytest.raises(PriceError, match="one-dimensional"):
        Prices.from_array(np.ones((2, 2)))
    with pytest.raises(PriceError, match="needs more"):
        Prices.from_array([1.0, np.nan])
    assert "'prices': 2, price 1 to price 2, step 1 step" in repr(Prices.from_array([1.0, 2.0]))


def test_minute_data(write):
    count = 262_800
    minutes = np.datetime64("2024-01-01T00:00") + np.arange(count)
    walk = 100 + np.cumsum(np.random.default_rng(0).choice([-0.01, 0.01], count))
    lines = [f"{t}:00Z,{p:.2f}" for t, p in zip(minutes, walk, strict=True)]
    path = write("timestamp,close\n" + "\n".join(lines))
    prices = read_prices(path)
    assert (len(prices), prices.step) == (count, "1 minute")
    assert prices.time_label(-1) == str(minutes[-1]).replace("T", " ")


CELLS = st.sampled_from(
    [
        *("1", "2.5", "-1", "nan", "inf", "1e400", "", " ", "abc", "Price", "Date", '"', "#"),
        *("20240101", "2024-01-02", "9999-12-31T23:59-23:00", "1704067200", "-9e18", "9" * 20),
    ]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=6).map(
            lambda lines: "\n".join(["Date,Price", *lines]).encode()
        ),
        st.lists(st.lists(CELLS, max_size=4).map(";".join), max_size=6).map(
            lambda lines: "\n".join(lines).encode()
        ),
    )
)
def test_any_bytes_are_read_or_refused_in_one_line(write, content):
    try:
        prices = read_prices(write(content))
    except PriceError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert len(prices) >= 2
        assert (prices.values > 0).all()
        assert np.isfinite(prices.values).all()
        assert prices.times is None or (np.diff(prices.times) > np.timedelta64(0)).all()
        assert prices.step
        assert prices.time_label(-1)
