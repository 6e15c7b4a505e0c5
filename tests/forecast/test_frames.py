"""Series and frames of other libraries, workbooks and columnar files."""

import datetime as dt
import decimal
import subprocess
import sys

import numpy as np
import openpyxl
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import xarray as xr
from support.price_files import COUNT, DAYS, PRICES, check, table

from favor_np.forecast import PriceError, Prices, forecast, read_prices

INDEX = pd.DatetimeIndex(DAYS)
TOKYO = INDEX.tz_localize("Asia/Tokyo")
DATES = [day.date() for day in DAYS]
FRAME = pd.DataFrame({"Open": 1.5, "Close": PRICES, "Volume": 1000}, index=INDEX)

WITH_TIMES = {
    "pandas Series": pd.Series(PRICES, INDEX),
    "a falling index": pd.Series(PRICES, INDEX)[::-1],
    "days with a zone": pd.Series(PRICES, TOKYO),
    "an index of texts": pd.Series(PRICES, INDEX.strftime("%d.%m.%Y")),
    "nullable numbers": pd.Series(pd.array(PRICES, dtype="Float64"), INDEX),
    "a name that is no price": pd.Series(PRICES, INDEX, name="volume"),
    "texts": pd.Series([f"${price}" for price in PRICES], INDEX),
    "pandas DataFrame": FRAME,
    "times in a column": FRAME.reset_index(),
    "levels of columns": pd.concat({"ZZZ": FRAME}, axis=1).swaplevel(axis=1),
    "polars DataFrame": pl.DataFrame({"date": DATES, "close": PRICES}),
    "polars LazyFrame": pl.LazyFrame({"date": DATES, "close": PRICES}),
    "polars with a zone": pl.DataFrame(
        {"t": pl.Series(DAYS).dt.replace_time_zone("Asia/Tokyo"), "close": PRICES}
    ),
    "Arrow table": pa.table({"date": pa.array(DATES), "close": PRICES}),
    "Arrow with a zone": pa.table({"t": pa.array(TOKYO), "close": PRICES}),
    "Arrow dictionary": pa.table(
        {"t": pa.array([str(date) for date in DATES]).dictionary_encode(), "close": PRICES}
    ),
    "Arrow decimals": pa.table(
        {"t": DATES, "close": [decimal.Decimal(str(price)) for price in PRICES]}
    ),
    "xarray DataArray": xr.DataArray(PRICES, {"time": INDEX}, "time", name="wti"),
    "xarray Dataset": xr.Dataset({"close": ("time", PRICES)}, {"time": INDEX}),
}
WITHOUT_TIMES = {
    "list": PRICES,
    "object": np.array(PRICES, object),
    "Decimal": [decimal.Decimal(str(price)) for price in PRICES],
    "nothing masked": np.ma.array(PRICES),
    "pandas Series": pd.Series(PRICES),
    "polars Series": pl.Series(PRICES),
    "Arrow array": pa.array(PRICES),
    "Arrow chunks": pa.chunked_array([PRICES[:9], PRICES[9:]]),
    "xarray": xr.DataArray(PRICES, dims="x"),
}
REFUSED = {
    "masked": np.ma.masked_less(PRICES, 102),
    "complex": np.array(PRICES) + 0j,
    "dates": INDEX.to_numpy(),
    "date": DATES,
    "spans": INDEX.to_numpy() - INDEX.to_numpy()[0],
    "bool": np.array(PRICES) > 102,
    "str": [str(price) for price in PRICES],
    "dict": {"close": PRICES},
    "Series of dates": pd.Series(INDEX, INDEX),
    "Series of complex": pd.Series(np.array(PRICES) + 0j, INDEX),
    "DataArray of dates": xr.DataArray(INDEX, {"time": INDEX}, "time"),
}


@pytest.mark.parametrize("make", [Prices, Prices.from_array])
@pytest.mark.parametrize("kind", WITH_TIMES)
def test_times_come_with_the_prices(kind, make):
    check(make(WITH_TIMES[kind]))


@pytest.mark.parametrize("make", [Prices, Prices.from_array])
@pytest.mark.parametrize("kind", WITHOUT_TIMES)
def test_prices_without_times(kind, make):
    prices = make(WITHOUT_TIMES[kind])
    np.testing.assert_array_equal(prices.values, PRICES)
    assert prices.times is None


@pytest.mark.parametrize("make", [Prices, Prices.from_array, forecast])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_price(kind, make):
    with pytest.raises(TypeError, match=r"^prices must (not be masked|be real numbers)"):
        make(REFUSED[kind])


def test_hours_with_a_zone_are_shifted_to_utc():
    local = pd.date_range("2024-01-02 00:30", periods=COUNT, freq="h", tz="America/New_York")
    utc = local.tz_convert("UTC").tz_localize(None)
    for values in (
        pd.Series(PRICES, local),
        pl.DataFrame({"t": pl.Series(utc).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"), "close": PRICES}),
        pa.table({"t": pa.array(local), "close": PRICES}),
    ):  # fmt: skip
        check(Prices.from_array(values), utc)


def test_periods_and_nanoseconds():
    months = pd.period_range("2020-01", periods=COUNT, freq="M")
    check(Prices.from_array(pd.Series(PRICES, months)), months.to_timestamp())
    index = pd.to_datetime(1704178800000000001 + np.arange(COUNT))
    prices = Prices.from_array(pd.Series(PRICES, index))
    np.testing.assert_array_equal(prices.times.astype(int), index.astype(int))


def test_gaps_of_a_frame_are_dropped_and_said():
    values = pd.Series(PRICES, INDEX)
    values.iloc[[3, -1]] = np.nan
    prices = Prices.from_array(values)
    assert prices.dropped == {"price missing": (2, 4)}
    assert "the last row is unusable" in prices.note


@pytest.mark.parametrize(
    "values",
    [
        pd.Series([], pd.DatetimeIndex([]), dtype=float),
        pd.DataFrame(),
        FRAME[:0],
        FRAME[[]],
        pl.DataFrame({"date": [], "close": []}),
        pa.table({}),
        xr.DataArray([], {"time": []}, "time"),
        [],
    ],
    ids=lambda values: f"{type(values).__name__} {np.shape(values)}",
)
def test_nothing_is_an_error(values):
    with pytest.raises(PriceError, match=r"^prices"):
        Prices.from_array(values)


def test_a_frame_of_several_series():
    both = pd.concat({"AAA": FRAME, "BBB": 2 * FRAME})
    with pytest.raises(PriceError, match='"AAA" and "BBB"; choose one with --symbol'):
        Prices.from_array(both)
    check(Prices.from_array(both, symbol="AAA"))
    wide = pd.concat({"AAA": FRAME, "BBB": 2 * FRAME}, axis=1)
    with pytest.raises(PriceError, match='"AAA Close" or "BBB Close"'):
        Prices.from_array(wide)
    check(Prices.from_array(wide, column="AAA Close"))


def test_a_filtered_index_is_no_time():
    values = pd.Series(PRICES)[[i for i in range(COUNT) if i % 5]]
    assert Prices.from_array(values).times is None


def test_forecast_takes_a_series_with_its_times():
    index = pd.date_range("2024-01-01", periods=200)
    values = pd.Series(100 + np.sin(np.arange(200)), index)[::-1]
    result = forecast(values, window=4, num_features=64)
    assert result.prices.time_label(-1) == result.next.time == str(index[-1].date())
    same = forecast(values.to_numpy()[::-1], window=4, num_features=64)
    np.testing.assert_array_equal(result.predicted, same.predicted)


@pytest.mark.parametrize("suffix", ["parquet", "feather", "xlsx"])
def test_columnar_files_and_workbooks(tmp_path, suffix):
    path = tmp_path / f"prices.{suffix}"
    frame = FRAME.rename_axis("Date").reset_index()
    getattr(frame, {"xlsx": "to_excel"}.get(suffix, f"to_{suffix}"))(
        path, **({"index": False} if suffix == "xlsx" else {})
    )
    prices = read_prices(path)
    check(prices)
    assert (prices.column, prices.name) == ("Close", path.name)


def test_a_workbook_with_a_title_and_sheets(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["nothing here"])
    sheet = book.create_sheet("Data")
    sheet.append(["Prices of ZZZ"])
    sheet.append([])
    sheet.append([None, "Day", "Clock", "Close"])
    for i, price in enumerate(PRICES):
        sheet.append([None, DATES[i // 24], dt.time(i % 24), price])
    book.save(tmp_path / "prices.xlsx")
    prices = read_prices(tmp_path / "prices.xlsx")
    check(prices, [DAYS[0] + dt.timedelta(hours=i) for i in range(COUNT)])
    assert "sheet 'Data' of 2 read" in prices.note


@pytest.mark.parametrize(("suffix", "start"), [("parquet", b"PAR1"), ("feather", b"ARROW1")])
def test_damaged_files_are_errors_of_one_line(tmp_path, suffix, start):
    path = tmp_path / f"prices.{suffix}"
    path.write_bytes(start + b"abc")
    with pytest.raises(PriceError, match=rf"\.{suffix} file that cannot be read") as caught:
        read_prices(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["parquet", "xlsx"])
def test_without_the_libraries_the_extra_is_named(tmp_path, suffix):
    path = tmp_path / f"prices.{suffix}"
    frame = FRAME.reset_index()
    frame.to_parquet(path) if suffix == "parquet" else frame.to_excel(path)
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['openpyxl', 'pandas', 'polars', 'pyarrow']))\n"
        "from favor_np.cli import main\n"
        f"sys.exit(main(['forecast', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'favor_np[files]'" in done.stderr


def test_no_library_is_imported_for_a_text_file(tmp_path):
    path = tmp_path / "prices.csv"
    path.write_text(table("Date,Close", "{t:%Y-%m-%d},{p}"))
    code = (
        "import sys\nfrom favor_np.forecast import read_prices\n"
        f"read_prices({str(path)!r})\n"
        "print({'openpyxl', 'pandas', 'polars', 'pyarrow', 'xarray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
