"""``favor-np demo``: what the method is for, in one screen."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass

import numpy as np

from favor_np.forecast import (
    ExactComparison,
    Forecast,
    PriceError,
    Prices,
    VolatilityEvaluation,
    compare_with_exact,
    error_bars,
    evaluate,
    forecast,
    read_prices,
    simulated_minutes,
)
from favor_np.forecast._simulate import ROWS

from . import _options as options
from ._options import integer
from ._text import GLUE, WIDTH, memory, printed, seconds

LABEL, COLUMN = 26, 26
MAX_SECONDS = 2.0  # of exact attention: the rest is extrapolated

DESCRIPTION = """\
Forecast the volatility of two series by attention over their own past, without training: of a
short one, and of half a year of minutes, simulated with clusters of volatility. Shows time, memory
and error of FAVOR+ beside exact attention, in one screen. Times are medians.
"""


@dataclass(frozen=True)
class Column:
    """One series, and what was found."""

    result: Forecast
    record: VolatilityEvaluation
    exact: ExactComparison
    inside: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("prices", nargs="?", metavar="PRICES.csv", help="the short one; default: daily oil prices")
    add("--rows", type=integer(10_000), default=ROWS, metavar="N", help="minutes (%(default)s)")
    add("--seed", type=integer(0), default=0, metavar="N", help="of the minutes and the features")
    add("--threads", type=integer(), metavar="N", help="threads (default: all there are)")


def run(args: argparse.Namespace) -> int:
    """Forecast both series, compare, print; return the exit status."""
    with options.compilation_told():
        try:
            short = _column(read_prices(args.prices), args)
        except PriceError as error:
            raise options.CommandError(str(error)) from None
        long = _column(simulated_minutes(args.rows, seed=args.seed), args)
    print(printed(_report(short, long)))
    return 0


def _column(prices: Prices, args: argparse.Namespace) -> Column:
    result = forecast(prices, target="volatility", seed=args.seed, num_threads=args.threads)
    record = evaluate(result)
    assert isinstance(record, VolatilityEvaluation)
    exact = compare_with_exact(result, max_seconds=MAX_SECONDS, num_threads=args.threads)
    bars = error_bars(result)
    judged = slice(result.warm_up, exact.rows)
    difference = np.abs(result.predicted[judged] - exact.predicted[judged])
    inside = float(np.mean(difference <= 1.96 * bars.standard_error[judged]))
    return Column(result, record, exact, inside)


def _report(short: Column, long: Column) -> list[str]:
    """The table and what follows from it, at most 80 columns wide."""
    columns = [_cells(column) for column in (short, long)]
    lines = textwrap.wrap(
        "How large will the next move be? Attention over all past windows, without training: "
        "what followed those that resemble the present one, averaged.",
        WIDTH,
    )
    lines += ["", f"{'':<{LABEL}}" + "".join(f"{_name(c):>{COLUMN}}" for c in (short, long))]
    lines += [
        f"{label:<{LABEL}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)
        for label, *cells in zip(columns[0], *(c.values() for c in columns), strict=True)
    ]
    if short.exact.extrapolated or long.exact.extrapolated:
        lines.append(
            "* measured on a first part; the time extrapolated by the square of the length"
        )
    lines.append("")
    for column in (short, long):
        lines += textwrap.wrap(f"{_name(column)}: {_words(column)}", WIDTH)
    return lines


def _name(column: Column) -> str:
    return column.result.prices.name.partition(",")[0][: COLUMN - 2]


def _cells(column: Column) -> dict[str, str]:
    result, exact, record = column.result, column.exact, column.record
    star = f"{GLUE}*" if exact.extrapolated else ""
    return {
        "prices": f"{len(result.prices):,}, {result.prices.step} apart",
        f"FAVOR+, {result.num_features} features": seconds(exact.favor_seconds),
        "exact attention": seconds(exact.seconds) + star,
        "FAVOR+ is faster": f"{exact.speedup:.3g} times",
        "memory of FAVOR+": memory(exact.favor_peak_bytes),
        "all weights, if stored": memory(exact.matrix_bytes),
        "distance from exact": f"{100 * exact.rmse / exact.spread:.2g}{GLUE}% of the spread",
        "inside its 95 % error bars": f"{100 * column.inside:.1f}{GLUE}%",
        "R² against the mean": f"{record.r2:+.3f} (z = {record.z:+.1f})",
        "R² of a moving average": f"{record.r2_ewma:+.3f}",
    }


def _words(column: Column) -> str:
    exact, record = column.exact, column.record
    rows = f"{exact.pays_from:,} windows"
    if exact.speedup < 1:
        speed = f"your series is short, take exact attention: from {rows} on FAVOR+ pays"
    elif len(column.result) < exact.pays_from:
        speed = f"short: FAVOR+ pays from {rows} on, for the calibration takes longer"
    else:
        speed = f"FAVOR+ pays: it is faster from {rows} on"
    skill = "no better than the mean so far"
    if record.z > 2:
        skill = "better than the mean so far, by more than chance"
    beside = "better" if record.r2 > record.r2_ewma else "worse"
    return f"{speed}. The forecast is {skill}, and {beside} than a moving average (0.94)."
