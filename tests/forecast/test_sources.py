"""Files as exchanges, brokers and statistical offices write them."""

import pytest
from support.price_files import DAYS, HOURS, LATE_HOURS, MONTHS, check, table

SOURCES = {
    "cryptodatadownload": (
        "https://example.org\nunix,date,symbol,open,high,low,close,Volume BTC,tradecount",
        "{u}000,{t:%Y-%m-%d %H:%M:%S},BTC/USDT,1,1,1,{p},2.5,9",
        HOURS,
    ),
    "nasdaq": ("Date,Close/Last,Volume,Open", "{t:%m/%d/%Y},${p},100,$1.5", DAYS),
    "investing": (
        '"Date","Price","Open","Vol.","Change %"',
        '"{t:%b %d, %Y}","{p:,.2f}","1,001.00","1.23M","-0.45%"',
        DAYS,
    ),
    "metatrader": (
        "<DATE>\t<TIME>\t<OPEN>\t<CLOSE>\t<TICKVOL>\t<SPREAD>",
        "{t:%Y.%m.%d}\t{t:%H:%M:%S}\t1\t{p}\t5\t2",
        HOURS,
    ),
    "stooq": (
        "<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<CLOSE>,<VOL>",
        "AAPL.US,60,{t:%Y%m%d},{t:%H%M%S},1,{p},5",
        HOURS,
    ),
    "fred": ("observation_date,DGS10", "{t:%Y-%m-%d},{p}", DAYS),
    "coingecko": (
        "snapped_at,price,market_cap,total_volume",
        "{t:%Y-%m-%d} 00:00:00 UTC,{p},1e9,2e8",
        DAYS,
    ),
    "coinmarketcap": (
        "timeOpen;timeClose;timeHigh;name;open;close;volume;marketCap;timestamp",
        '"{t:%Y-%m-%d}T00:00:00.000Z";"{t:%Y-%m-%d}T23:59:59.999Z";"{t:%Y-%m-%d}T03:10:00.000Z";'
        '"2781";1.2;{p};5e9;8e11;"{t:%Y-%m-%d}T23:59:59.999Z"',
        DAYS,
    ),
    "alpha vantage": (
        "timestamp,open,close,adjusted_close,volume,dividend_amount,split_coefficient",
        "{t:%Y-%m-%d},1,400,{p},5,0.0,1.0",
        DAYS,
    ),
    "tiingo": (
        "date,close,high,adjClose,adjHigh,adjVolume,divCash,splitFactor",
        "{t:%Y-%m-%d}T00:00:00.000Z,400,1,{p},1,5,0.0,1.0",
        DAYS,
    ),
    "polygon": ("v,vw,o,c,h,l,t,n", "5,1.1,1.5,{p},1.7,1.2,{u}000,7", HOURS),
    "databento": (
        "ts_event,rtype,instrument_id,open,high,low,close,volume,symbol",
        "{u}000000000,34,5482,1,1,1,{p},9,ESH4",
        HOURS,
    ),
    "ecb": (
        "KEY,FREQ,CURRENCY,TIME_PERIOD,OBS_VALUE,OBS_STATUS",
        "EXR.D.USD,D,USD,{t:%Y-%m-%d},{p},A",
        DAYS,
    ),
    "eurostat": (
        "DATAFLOW,LAST UPDATE,freq,geo,TIME_PERIOD,OBS_VALUE,OBS_FLAG",
        "ESTAT:X(1.0),15/04/24 23:00:00,M,DE,{t:%Y-%m},{p},",
        MONTHS,
    ),
    "bse": (
        "Date,Open Price,Close Price,WAP,No.of Shares,Total Turnover (Rs.),Spread Close-Open",
        "{t.day}-{t:%B-%Y},1.5,{p},1.55,100,1000,0.2,",
        DAYS,
    ),
    "nasdaq nordic": (
        "sep=;\nDate;Bid;Ask;Opening price;Closing price;Average price;Total volume;",
        "{t:%Y-%m-%d};1.0;1.1;1.0;{p};1.05;500;",
        DAYS,
    ),
    "bloomberg": (
        "Security,ZZZ US Equity\nStart Date,01/02/2024\nCurrency,USD\n\nDate,PX_LAST",
        "{t:%m/%d/%Y},{p}",
        DAYS,
    ),
    "office for national statistics": (
        '"Title","CPI"\n"CDID","D7BT"\n"Unit","Index"\n"Release date","14-02-2024"',
        '"{t:%Y %b}","{p}"',
        MONTHS,
    ),
    "statistics canada": (
        "REF_DATE,GEO,DGUID,UOM,VALUE,STATUS,SYMBOL,TERMINATED,DECIMALS",
        "{t:%Y-%m},Canada,2016A,Cents,{p},,,,1",
        MONTHS,
    ),
    "swiss national bank": (
        '"CubeId";"devkum"\n"PublishingDate";"2024-02-11 10:00"\n\n"Date";"D0";"D1";"Value"',
        '"{t:%Y-%m}";"M0";"USD1";"{p}"',
        MONTHS,
    ),
    "ercot": (
        "Delivery Date,Hour Ending,Repeated Hour Flag,Settlement Point,Settlement Point Price",
        "{t:%m/%d/%Y},{t:%H}:00,N,HB_HOUSTON,{p}",
        LATE_HOURS,
    ),
    "coinapi": (
        "time_period_start;time_period_end;time_open;price_open;price_close;trades_count",
        "{t:%Y-%m-%dT%H:%M:%S}.0000000Z;{t:%Y-%m-%dT%H}:59:59.0000000Z;{t:%Y-%m-%dT%H}:00:01.1Z;1;{p};9",
        HOURS,
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_files_of_particular_sources(read, source):
    head, row, times = SOURCES[source]
    check(read(table(head, row, times)), times)
    lines = table("", row, times).splitlines()[::-1]  # newest first
    check(read("\n".join([head, *lines])), times)
