"""Small price files in many layouts, and what all of them mean."""

import datetime as dt

import numpy as np

COUNT = 40
PRICES = [round(101 + 5 * np.sin(i / 3) + i / 7, 2) for i in range(COUNT)]
HIGH = [round(10 * price - 60, 2) for price in PRICES]  # on both sides of 1,000
DAYS = [dt.datetime(2024, 1, 2) + dt.timedelta(days=i) for i in range(COUNT)]
HOURS = [dt.datetime(2024, 1, 2, 7) + dt.timedelta(hours=i) for i in range(COUNT)]
LATE_HOURS = [hour + dt.timedelta(days=12) for hour in HOURS]  # from the 14th on
MONTHS = [dt.datetime(2020 + i // 12, 1 + i % 12, 1) for i in range(COUNT)]
QUARTERS = [dt.datetime(2010 + i // 4, 1 + 3 * (i % 4), 1) for i in range(COUNT)]
YEARS = [dt.datetime(1980 + i, 1, 1) for i in range(COUNT)]
EPOCH = dt.datetime(1970, 1, 1)


def unix(time):
    return int((time - EPOCH).total_seconds())


def serial(time):
    return (time - dt.datetime(1899, 12, 30)).total_seconds() / 86400


def table(head, row, times=DAYS, prices=PRICES):
    """A file: `row` makes a line of a time t and a price p, or is a format of t, p and Unix u."""
    pairs = zip(times, prices, strict=True)
    if isinstance(row, str):
        lines = [row.format(t=t, p=p, u=unix(t)) for t, p in pairs]
    else:
        lines = [row(t, p) for t, p in pairs]
    return "\n".join([head] * bool(head) + lines) + "\n"


def german(price):
    return f"{price:,.2f}".replace(",", "_").replace(".", ",").replace("_", ".")


def comma(price):
    return f"{price:.2f}".replace(".", ",")


def reverse(text):
    head, *lines = text.splitlines()
    return "\n".join([head, *lines[::-1]])


def check(prices, times=DAYS, values=PRICES):
    np.testing.assert_array_equal(prices.values, values)
    np.testing.assert_array_equal(prices.times, np.array(times, "M8[us]"))
