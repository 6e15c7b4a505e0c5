"""Forecasts: the whole of a call, and what exact attention would take instead."""

import functools

from favor_np import forecast

from .common import TIMER, full_only


@functools.lru_cache
def minutes(rows):
    return forecast.simulated_minutes(rows)


@functools.lru_cache
def made(rows):
    return forecast.forecast(minutes(rows), target="volatility")


class Minutes:
    """Simulated minutes, volatility, the default number of features."""

    params = (10_000, 262_800)
    param_names = ("rows",)
    timer = TIMER
    timeout = 300

    def setup(self, rows):
        full_only(rows > 10_000)
        made(rows)

    def time_forecast(self, rows):
        forecast.forecast(minutes(rows), target="volatility")

    def time_error_bars(self, rows):
        forecast.error_bars(made(rows))

    def track_part_of_exact_time(self, rows):
        return 1 / forecast.compare_with_exact(made(rows)).speedup
