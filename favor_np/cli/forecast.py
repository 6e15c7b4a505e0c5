"""``favor-np forecast``: a price series forecast from its own past by causal attention."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from favor_np import __version__
from favor_np.forecast import (
    ErrorBars,
    ExactComparison,
    Forecast,
    PriceError,
    Replay,
    ReturnEvaluation,
    Trading,
    VolatilityEvaluation,
    compare_with_exact,
    error_bars,
    evaluate,
    forecast,
    read_prices,
    replay,
)
from favor_np.forecast._forecast import GOOD_REGIME
from favor_np.forecast._maps import CALIBRATIONS
from favor_np.forecast._setting import TARGETS, Setting

from . import _options as options
from . import _trained
from ._models import Models, models_of, models_section
from ._options import integer, real
from ._report import Section, about_input, clean, lines_of, read_section, two, write_table
from ._text import GLUE, memory, printed, seconds

Evaluation = ReturnEvaluation | VolatilityEvaluation

OF_ATTENTION = ("window", "num_features", "calibration", "scale")
OF_PERFORMER = ("epochs", "members", "save", "load")
BAR = 48  # longest bar of a histogram
HELD = 0.9  # share of differences within error bars from which on these are said to hold
WAYS = ("strategy", "hold", "steady")
SIGNALS = {1: "BUY", 0: "HOLD", -1: "SELL"}

DESCRIPTION = """\
Forecast the next step of a price series from the steps before it, without training: the
present window of returns is compared with every past one by causal FAVOR+ attention, and what
followed the similar ones is averaged. Prints the forecast with its uncertainty, how such
forecasts did on the past (walk-forward, never looking ahead), and what FAVOR+ cost and missed
beside exact attention.
"""

EPILOG = """\
PRICES.csv needs a column of prices (price, close, last, settle, value, in the usual European
languages, or the only one of numbers) and should have one of times, in any order. It may be
packed (.gz, .xz, .zip), or .xlsx, .parquet or .feather ("favor_np[files]"). How numbers and times
are written is found out, and said in the report. Rows without a usable price, negative ones
included, are dropped and counted. BUY is one unit long until the
next signal, SELL one short, HOLD no position. This is a demonstration, not financial advice.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("prices", nargs="?", metavar="PRICES.csv", help="default: daily WTI crude oil; - is stdin")
    add("--column", metavar="NAME", help="the price column: its name, or its number from 1")
    add(
        "--symbol",
        action="append",
        metavar="NAME",
        help="where the file has several series: the rows that have NAME in a column, or the "
        "columns called so; may be given again",
    )
    add("--date-format", metavar="FORMAT", help="how times are written, such as %%d.%%m.%%Y")
    add(
        "--day-first",
        action=argparse.BooleanOptionalAction,
        help="03/04/2024 is the 3rd of April (or not), where no day above 12 tells",
    )
    add(
        "--decimal",
        choices=[".", ","],
        metavar="MARK",
        help='the decimal mark, "." or ",", where "1,036" could be either',
    )
    add(
        "--allow-missing",
        type=options.share,
        default=0.05,
        metavar="SHARE",
        help="share of rows that may be unusable, from 0 to 1 (0.05)",
    )
    add(
        "--target",
        choices=TARGETS,
        default=Setting.target,
        help="predict the next return, or its absolute value (default %(default)s)",
    )
    add(
        "--model",
        choices=["attention", "performer"],
        default="attention",
        help="attention over past windows, which trains nothing, or a small Performer that begins "
        "as a regression and is trained (default %(default)s)",
    )
    add(
        "--window",
        type=integer(),
        default=Setting.window,
        metavar="N",
        help="returns in a window (%(default)s)",
    )
    add(
        "--horizon",
        type=integer(),
        default=Setting.horizon,
        metavar="N",
        help="steps ahead (%(default)s)",
    )
    add(
        "--features",
        dest="num_features",
        type=integer(2, even=True),
        default=Setting.num_features,
        metavar="M",
        help="random features, even: more are more exact and take longer (%(default)s)",
    )
    add(
        "--calibration",
        metavar="METHOD",
        default=Setting.calibration,
        choices=CALIBRATIONS,
        help="how the features are fitted to the first 256 windows, for those after them: auto, "
        "none, or oprf, sderf, saderf, aderf, saderf+sderf, aderf+sderf, spherical (%(default)s)",
    )
    add(
        "--scale",
        type=real(positive=True),
        metavar="S",
        help="scale of attention: larger lets fewer, more similar windows count. Default: "
        "1/window for returns (|x|² = 1 after scaling), 4/spans for volatility (|x|² <= 4)",
    )
    add(
        "--threshold",
        type=real(),
        metavar="PCT",
        help="predicted move in %% beyond which to BUY or SELL (default: the cost)",
    )
    add(
        "--cost",
        type=real(),
        default=0.02,
        metavar="PCT",
        help="cost in %% of buying or selling a whole position (0.02)",
    )
    add(
        "--replay",
        action="store_true",
        help="feed the prices one by one as well, as if they came live: is it the same, and how "
        "long does a forecast take",
    )
    add(
        "--seed",
        type=integer(0),
        default=Setting.seed,
        metavar="N",
        help="seed of the features (%(default)s)",
    )
    add("--threads", type=integer(), metavar="N", help="threads (default: all there are)")
    trained = parser.add_argument_group("with --model performer")
    add = trained.add_argument
    add(
        "--epochs",
        type=integer(0),
        metavar="N",
        help="passes over the prices at most; 0: the regression alone (8)",
    )
    add(
        "--members",
        type=integer(),
        metavar="N",
        help="seeds whose Performers are averaged (3)",
    )
    add("--save", metavar="FILE", help="write what was trained (needs safetensors)")
    add("--load", metavar="FILE", help="forecast at once by what --save wrote, without training")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of text")
    add("--csv", metavar="OUT.csv", help="write every forecast")
    add("--plot", metavar="OUT.png", help="draw a picture (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Forecast, print, write; return the exit status."""
    _check_options(args)
    picture = options.picture_format(args.plot)
    with contextlib.ExitStack() as stack:
        try:
            prices = read_prices(
                args.prices,
                args.column,
                symbol=args.symbol,
                date_format=args.date_format,
                day_first=args.day_first,
                decimal=args.decimal,
                allow_missing=args.allow_missing,
            )
            table = stack.enter_context(options.output_file(args.csv, args.prices))
            figure = stack.enter_context(options.output_file(args.plot, args.prices, args.csv))
            stack.enter_context(options.compilation_told())
            if args.model == "performer":
                others = (args.prices, args.csv, args.plot)
                saved = stack.enter_context(options.output_file(args.save, *others))
                return _trained.run(args, prices, _trained.Files(table, figure, saved, picture))
            result = forecast(
                prices,
                **{name: getattr(args, name) for name in vars(Setting())},
                num_threads=args.threads,
            )
        except PriceError as error:
            raise options.CommandError(str(error)) from None
        threshold = (args.cost if args.threshold is None else args.threshold) / 100
        record = evaluate(result, threshold=threshold, cost=args.cost / 100)
        exact = compare_with_exact(result, num_threads=args.threads)
        bars = error_bars(result)
        replayed = replay(result, threshold=threshold) if args.replay else None
        models = models_of(result) if args.target == "volatility" else None
        if table is not None:
            _write_csv(table, result, record, exact, bars)
        if figure is not None:
            drawn = result.plot(record=record, exact=exact, bars=bars, replayed=replayed)
            drawn.savefig(figure, format=picture)
    if args.json:
        data = _as_dict(result, record, exact, bars)
        if replayed is not None:
            data["replay"] = _replay_dict(result, record, replayed)
        if models is not None:
            data["models"] = models.as_dict()
        print(json.dumps(clean(data), indent=2, allow_nan=False))
        return 0
    lines = _report(result, record, exact, bars, replayed, models)
    lines += [f"Wrote {path}" for path in (args.csv, args.plot) if path is not None]
    print(printed(lines))
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options of the other model."""
    if args.model == "performer":
        unused = {name: getattr(Setting(), name) for name in OF_ATTENTION}
        unused |= {"replay": False, "threshold": None}
    else:
        unused = dict.fromkeys(OF_PERFORMER)
    for name, default in unused.items():
        if getattr(args, name) != default:
            option = "--" + ("features" if name == "num_features" else name)
            raise options.CommandError(f"{option} is not for --model {args.model}")
    if args.model == "performer":
        _trained.check(args)


# ----------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------


def _report(
    result: Forecast,
    record: Evaluation,
    exact: ExactComparison,
    bars: ErrorBars,
    replayed: Replay | None,
    models: Models | None,
) -> list[str]:
    """The report, at most 80 columns wide."""
    sections = [
        read_section(result.prices),
        _method_section(result),
        _next_section(result, record, bars, _bars_dict(result, bars, exact)),
        _past_section(result, record, exact),
        *([] if models is None else [models_section(models)]),
        _exact_section(result, exact, bars),
    ]
    if replayed is not None:
        sections.append(_replay_section(result, record, replayed))
    return lines_of(sections)


def _method_section(result: Forecast) -> Section:
    windows = "returns" if result.target == "return" else "log absolute returns"
    rows = [
        ("attention", f"causal FAVOR+ over {len(result):,} windows of {result.window:,} {windows}"),
        ("features", f"{result.num_features:,}, seed {result.seed}, scale {result.scale:.4g}"),
    ]
    if len(result.sections) > 1:
        rows.append(
            ("calibration", f"{result.calibration}, on the first {result.sections[0].stop:,} "
                            "windows, for the forecasts after them")
        )  # fmt: skip
    before = " before calibration" if len(result.sections) > 1 else ""
    s, error = result.mean_s, 100 * result.weight_error
    if s <= 1.01 * GOOD_REGIME:
        rows.append(
            ("regime", f"mean of s = |x + y|² is {s:.2f}: good (up to {GOOD_REGIME:g}); a single "
                       f"weight is ±{GLUE}{two(error)}{GLUE}%{before}")
        )  # fmt: skip
    else:
        rows.append(
            ("WARNING", f"mean of s = |x + y|² is {s:.3g}, {s / GOOD_REGIME:.2g} times the limit "
                        f"{GOOD_REGIME:g} of the good regime: a single weight is ±{GLUE}"
                        f"{two(error)}{GLUE}%{before}, and the forecast may be far from exact "
                        f"attention's. Take --scale {_round_down(result.scale * GOOD_REGIME / s)} "
                        "or less, or more --features")
        )  # fmt: skip
    return "METHOD", rows


def _next_section(
    result: Forecast, record: Evaluation, bars: ErrorBars, found: dict[str, Any]
) -> Section:
    step, percent = result.next, _Percent(result)
    ahead = "STEP" if result.horizon == 1 else f"{result.horizon} STEPS"
    show = percent.signed if result.target == "return" else percent
    similar = ", ".join(f"{p.time} ({show(p.move)})".replace(" ", GLUE) for p in step.similar)
    alike = ("most alike", f"{similar}: past windows, and what followed")
    held = found["inside"] >= HELD
    noise = (1.96 if held else found["needed"]) * float(bars.standard_error[-1])
    features = ("random features", f"±{GLUE}{percent(noise)} (95{GLUE}%"
                                   f"{'' if held else ', by the differences found in the past'}), "
                                   "with an effective sample size of "
                                   f"{bars.effective_sample_size[-1]:,.0f}")  # fmt: skip
    if isinstance(record, ReturnEvaluation):
        doubt = 2 * math.hypot(step.standard_error, noise / 2)
        clear = "stands out" if abs(step.move) > doubt else "does not stand out"
        error = percent(step.standard_error) if math.isfinite(doubt) else "unknown"
        threshold = percent.plain(record.threshold)
        rows = [
            ("predicted move", f"{percent.signed(step.move)}, one standard deviation: "
                               f"{percent.signed(step.move - step.spread)} to "
                               f"{percent.signed(step.move + step.spread)}"),
            ("P(up)", f"{100 * step.chance:.1f}{GLUE}%, P(down) "
                      f"{100 * step.chance_down:.1f}{GLUE}%"),
            ("standard error", f"{error}, from {step.precedents:,.0f} effective past windows: the "
                               f"move {clear} from zero"),
            ("exact attention", percent.signed(step.exact)),
            features,
            alike,
            ("SIGNAL", f"{SIGNALS[int(record.signals[-1])]} (BUY above +{threshold}, SELL below "
                       f"-{threshold})"),
        ]  # fmt: skip
    else:
        mean = float(record.constant[-1])
        rows = [
            ("absolute move", f"{percent(step.move)}, {step.move / mean:.2f} times the mean so "
                              f"far ({percent(mean)}); spread {percent(step.spread)}"),
            ("P(above mean)", f"{100 * step.chance:.1f}{GLUE}%, from {step.precedents:,.0f} "
                              "effective past windows"),
            features,
            ("beside it", f"exact attention {percent(step.exact)}, exponentially weighted average "
                          f"{percent(float(record.ewma[-1]))}"),
            alike,
            ("SIGNAL", "none: a volatility has no direction"),
        ]  # fmt: skip
    return f"NEXT {ahead} after {step.time}, price {step.price:g}", rows


def _past_section(result: Forecast, record: Evaluation, exact: ExactComparison) -> Section:
    percent, index = _Percent(result), result.index
    label = result.prices.time_label
    title = (
        f"WALK-FORWARD {record.stop - record.start:,} forecasts, "
        f"{label(int(index[record.start]))} to {label(int(index[record.stop - 1]))}"
    )
    no_peeking = f"each from its own past only; the first {result.warm_up:,} are not counted"
    ours, theirs, count = _rmse_beside_exact(result, record, exact)
    beside = f"exact attention {percent(theirs)}"
    if exact.extrapolated:
        beside += f" (on the first {count:,}, where FAVOR+ has {percent(ours)})"
    if isinstance(record, ReturnEvaluation):
        overlap = thinned = ""
        if result.horizon > 1:
            overlap = f", outcomes overlap {result.horizon}-fold"
            thinned = f", {_z(record.z_thinned)} without overlap"
        judged = record.signals[record.start : record.stop]
        counts = {sign: int((judged == sign).sum()) for sign in SIGNALS}
        hit = f"{100 * record.hit_rate:.1f}{GLUE}% of {record.moves:,} moves"
        rows = [
            ("judged", no_peeking),
            ("hit rate", f"{hit if record.moves else 'no moves'}, 95{GLUE}% interval "
                         f"{100 * record.hit_low:.1f} to {100 * record.hit_high:.1f}{GLUE}%"
                         f"{overlap}; always up: {100 * record.up_share:.1f}{GLUE}%, the more "
                         f"frequent direction so far: {100 * record.base_rate:.1f}{GLUE}% "
                         f"({_z(record.z_hits)})"),
            ("error (rmse)", f"{percent(record.rmse)}, zero forecast {percent(record.rmse_zero)}, "
                             + beside),
            ("band", f"one standard deviation held {100 * record.coverage:.1f}{GLUE}% of the "
                     f"outcomes (normal: 68.3{GLUE}%)"),
            ("against zero", f"R² {record.r2:+.5f} ({_z(record.z)}{thinned}): "
                             + _verdict(record.z, "the zero forecast")),
            ("strategy", f"{_earned(record.strategy, record)}, after costs of "
                         f"{percent.plain(record.cost)}; {counts[1]:,}{GLUE}BUY, "
                         f"{counts[-1]:,}{GLUE}SELL, {counts[0]:,}{GLUE}HOLD"),
            ("buy and hold", _earned(record.hold, record)),
            ("steady risk", f"{_earned(record.steady, record)}: long, by the mean volatility "
                            "so far over the present one"),
        ]  # fmt: skip
        if record.year:
            rows.append(("steps a year", f"{record.steps_per_year:,.0f}: {record.year}"))
        rows.append(("in short", _honest_words(record)))
    else:
        better = "better" if record.r2_ewma > record.r2 else "not better"
        rows = [
            ("judged", no_peeking),
            ("error (rmse)", f"{percent(record.rmse)}, constant (mean so far) "
                             f"{percent(record.rmse_constant)}, " + beside),
            ("against constant", f"R² {record.r2:+.4f} ({_z(record.z)}): "
                                 + _verdict(record.z, "the constant")),
            ("weighted average", f"R² {record.r2_ewma:+.4f} (exponential, 0.94): {better}"),
        ]  # fmt: skip
    return title, rows


def _exact_section(result: Forecast, exact: ExactComparison, bars: ErrorBars) -> Section:
    percent, found = _Percent(result), _bars_dict(result, bars, exact)
    star = " *" if exact.extrapolated else ""
    rows = [
        ("FAVOR+", f"{seconds(exact.favor_seconds)}, peak extra memory "
                   f"{memory(exact.favor_peak_bytes)}"),
        ("exact", f"{seconds(exact.seconds)}{star}, peak extra memory {memory(exact.peak_bytes)}"
                  f"{star} (all weights, if stored: {memory(exact.matrix_bytes)})"),
    ]  # fmt: skip
    if exact.extrapolated:
        rows.append(
            ("", f"* would take over 10{GLUE}s: measured on the first {exact.rows:,} windows "
                 f"({seconds(exact.measured_seconds)}), the time extrapolated by the square of "
                 "the length")
        )  # fmt: skip
    if len(result.sections) > 1:
        once = seconds(exact.calibration_seconds)
        rows.insert(1, ("", f"and {once} once for the calibration, however long the series"))
    pays = f"{exact.pays_from:,} windows on, with the calibration"
    rows.append(
        ("faster", f"FAVOR+, {exact.speedup:.3g} times; it pays from {pays}" if exact.speedup >= 1
                   else f"exact, {1 / exact.speedup:.3g} times: the series is short. "
                        f"FAVOR+ pays from {pays}")
    )  # fmt: skip
    share = 100 * exact.rmse / exact.spread if exact.spread > 0 else math.nan
    part = f" (first {exact.rows:,})" if exact.extrapolated else ""
    rows.append(
        ("difference", f"correlation {exact.correlation:.4f}, rmse {percent.fine(exact.rmse)}: "
                       f"{two(share)}{GLUE}% of the spread of the exact forecasts{part}"
                       + _beside_doubt(result, exact))
    )  # fmt: skip
    rows.append(
        ("error bars", f"effective sample size {found['effective_sample_size']:,.0f} of "
                       f"{result.num_features:,} features in the median forecast, "
                       f"{found['effective_sample_size_low']:,.0f} at the 5{GLUE}% quantile; "
                       f"{100 * found['inside']:.1f}{GLUE}% of the differences are within 1.96 "
                       f"standard errors{part}: {_held(found)}")
    )  # fmt: skip
    return f"FAVOR+ AND EXACT ATTENTION on the same {len(result):,} windows, compiled", rows


def _beside_doubt(result: Forecast, exact: ExactComparison) -> str:
    doubt = result.next.standard_error
    if result.target != "return" or not 0 < doubt < math.inf:
        return ""
    return f", and {two(100 * exact.rmse / doubt)}{GLUE}% of the standard error of the next one"


def _held(found: dict[str, Any]) -> str:
    """Say what follows from the share of differences that the error bars hold."""
    if found["inside"] < HELD:
        return (
            f"too small, it takes {found['needed']:.2g} for 95{GLUE}%. All forecasts share one "
            "draw of the features; more --features would help"
        )
    if found["warnings"]:
        return "they hold here, but with so small a sample size they often do not"
    return f"they hold here (95{GLUE}% should be, in the mean over draws of the features)"


def _bars_dict(result: Forecast, bars: ErrorBars, exact: ExactComparison) -> dict[str, Any]:
    """Error bars beside what exact attention found, after the warm-up."""
    judged = slice(result.warm_up, exact.rows)
    error = np.abs(result.predicted[judged] - exact.predicted[judged])
    error /= np.maximum(bars.standard_error[judged], 1e-300)
    low, median = np.quantile(bars.effective_sample_size[result.warm_up :], (0.05, 0.5)).tolist()
    return {
        "effective_sample_size": median,
        "effective_sample_size_low": low,
        "inside": float(np.mean(error <= 1.96)),
        "needed": float(np.quantile(error, 0.95)),
        "next_standard_error": float(bars.standard_error[-1]),
        "next_effective_sample_size": float(bars.effective_sample_size[-1]),
        "warnings": list(bars.warnings),
    }


def _replay_section(result: Forecast, record: Evaluation, replayed: Replay) -> Section:
    data = _replay_dict(result, record, replayed)
    same = ""
    if data["same_signals"] is not None:
        same = f", {data['same_signals']:,} of {len(result):,} signals the same"
    latency = ", ".join(f"{name} {seconds(value)}" for name, value in data["seconds"].items())
    rows = [
        ("agreement", f"with the forecasts above to {replayed.difference:.1g} of the largest"
                      + same),
        ("memory", f"a state of {replayed.state_bytes / 2**10:,.0f}{GLUE}KiB, "
                   "whatever came before"),
        ("latency", latency),
    ]  # fmt: skip
    if replayed.calibration_seconds:
        once = seconds(replayed.calibration_seconds)
        rows.append(("", f"and {once} once for the calibration, between two prices"))
    edges, counts = replayed.histogram()
    edges = 1e6 * edges
    labels = [f"{low:g} to {high:g} µs" for low, high in itertools.pairwise(edges)]
    for label, count in zip([*labels, f"over {edges[-1]:g} µs"], counts, strict=True):
        bar = "#" * round(BAR * count / counts.max())
        rows.append((label, f"{count:>9,} {bar}".rstrip().replace(" ", GLUE)))
    return f"REPLAY of {len(result.prices):,} prices, one at a time, as if they came live", rows


def _replay_dict(result: Forecast, record: Evaluation, replayed: Replay) -> dict[str, Any]:
    signals = getattr(record, "signals", None)
    points = np.percentile(replayed.seconds, (50, 90, 99, 100)).tolist()
    return {
        "forecasts": len(result),
        "difference": replayed.difference,
        "same_signals": None if signals is None else int((replayed.signals == signals).sum()),
        "state_bytes": replayed.state_bytes,
        "seconds": dict(zip(("p50", "p90", "p99", "max"), points, strict=True)),
        "calibration_seconds": replayed.calibration_seconds,
    }


def _rmse_beside_exact(
    result: Forecast, record: Evaluation, exact: ExactComparison
) -> tuple[float, float, int]:
    """Errors of FAVOR+ and of exact attention on the forecasts that both made."""
    part = slice(record.start, min(record.stop, exact.rows))
    outcome = result.outcome[part]
    ours, theirs = (
        math.sqrt(((outcome - predicted[part]) ** 2).mean())
        for predicted in (result.predicted, exact.predicted)
    )
    return ours, theirs, len(outcome)


def _z(value: float) -> str:
    if abs(value) > 1000:  # differences that are constant, but for rounding
        return f"z{GLUE}{'over' if value > 0 else 'below'}{GLUE}{math.copysign(1000, value):,.0f}"
    return f"z{GLUE}={GLUE}{value:+.1f}"


def _verdict(z: float, rival: str) -> str:
    if z > 2:
        return f"better than {rival}, by more than chance"
    return f"worse than {rival}" if z < -2 else f"no better than {rival}"


def _honest_words(record: ReturnEvaluation) -> str:
    skill = record.z_hits > 2 or record.z > 2
    gain, hold = float(record.strategy.equity[-1]), float(record.hold.equity[-1])
    if math.isclose(gain, hold, rel_tol=1e-9):
        earned = "strategy and buying and holding earned an equal sum."
    elif gain > hold:
        earned = f"strategy earned more than buying and holding{'' if skill else ', by luck'}."
    else:
        earned = "strategy earned less than buying and holding."
    if skill:
        return f"There is some skill here; the {earned}"
    return (
        "No skill that chance could not explain: past patterns did not tell the direction; the "
        + earned
    )


def _earned(trading: Trading, record: ReturnEvaluation) -> str:
    sharpe = "undefined"
    if not math.isnan(trading.sharpe):
        year = "year" if record.year else "step"
        sharpe = f"{trading.sharpe:.2f}{GLUE}±{GLUE}{trading.sharpe_error:.2f}{GLUE}a{GLUE}{year}"
    trades = f"{trading.trades:,}{GLUE}trade{'' if trading.trades == 1 else 's'}"
    return (
        f"{100 * trading.gain:+,.1f}{GLUE}%, Sharpe {sharpe}, {trades}, turnover "
        f"{trading.turnover:,.0f}"
    )


class _Percent:
    """Log returns as percentages, with the digits that suit the size of the series' moves."""

    def __init__(self, result: Forecast) -> None:
        outcome = abs(result.outcome[: -result.horizon])
        size = 100 * float(outcome.mean())
        self._digits = min(max(3 - math.floor(math.log10(size)), 3), 9) if size > 0 else 3

    def __call__(self, value: float) -> str:
        return f"{100 * value:.{self._digits}f}{GLUE}%"

    @staticmethod
    def plain(value: float) -> str:
        return f"{100 * value:.6g}{GLUE}%"

    def fine(self, value: float) -> str:
        return f"{100 * value:.{self._digits + 2}f}{GLUE}%"

    def signed(self, value: float) -> str:
        return f"{100 * math.expm1(value):+.{self._digits}f}{GLUE}%"


def _round_down(value: float) -> str:
    digits = 1 - math.floor(math.log10(value))
    return f"{math.floor(value * 10**digits) / 10**digits:g}"


# ----------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------


def _as_dict(
    result: Forecast, record: Evaluation, exact: ExactComparison, bars: ErrorBars
) -> dict[str, Any]:
    """Everything that the report says; moves, errors and costs as log returns, not in %."""
    prices, step = result.prices, result.next
    past = {
        name: value
        for name, value in vars(record).items()
        if name not in ("signals", *WAYS, "constant", "ewma")
    }
    past |= {
        "forecasts": record.stop - record.start,
        "first": prices.time_label(int(result.index[record.start])),
        "last": prices.time_label(int(result.index[record.stop - 1])),
    }
    ours, theirs, rows = _rmse_beside_exact(result, record, exact)
    past["beside_exact"] = {"forecasts": rows, "rmse": ours, "rmse_exact": theirs}
    forecast = {name: value for name, value in vars(step).items() if name != "similar"}
    forecast["similar"] = [vars(precedent) for precedent in step.similar]
    if isinstance(record, ReturnEvaluation):
        signals = record.signals
        judged = signals[record.start : record.stop]
        past |= {
            "hit_rate": record.hit_rate,
            **{name: _trading_dict(getattr(record, name)) for name in WAYS},
            "signals": {name: int((judged == sign).sum()) for sign, name in SIGNALS.items()},
        }
        forecast["signal"] = SIGNALS[int(signals[-1])]
    return {
        "favor_np": __version__,
        "input": about_input(prices),
        "settings": {
            "target": result.target,
            "window": result.window,
            "horizon": result.horizon,
            "features": result.num_features,
            "calibration": result.calibration,
            "calibrated_from": result.sections[1].start if len(result.sections) > 1 else None,
            "scale": result.scale,
            "seed": result.seed,
        },
        "regime": {"mean_s": result.mean_s, "weight_error": result.weight_error},
        "next": forecast,
        "past": past,
        "favor": {
            "seconds": exact.favor_seconds,
            "calibration_seconds": exact.calibration_seconds,
            "peak_bytes": exact.favor_peak_bytes,
        },
        "error_bars": _bars_dict(result, bars, exact),
        "exact": {
            name: value
            for name, value in vars(exact).items()
            if name not in ("predicted", "favor_seconds", "favor_peak_bytes", "calibration_seconds")
        },
    }


def _trading_dict(trading: Trading) -> dict[str, Any]:
    named = {name: value for name, value in vars(trading).items() if name != "equity"}
    return {"return": trading.gain, **named}


def _write_csv(
    path: Path, result: Forecast, record: Evaluation, exact: ExactComparison, bars: ErrorBars
) -> None:
    """One row a forecast; moves are log returns over the horizon, unknown ones are empty."""
    prices = result.prices
    columns: dict[str, Any] = {"price": [repr(x) for x in prices.values[result.index].tolist()]}
    if prices.times is None:
        columns = {"row": result.index + 1} | columns
    else:
        columns = {"time": prices.time_texts(result.index)} | columns
    if isinstance(record, ReturnEvaluation):
        columns |= {
            "predicted_move": result.predicted,
            "spread": result.spread,
            "p_up": result.chance,
            "p_down": result.chance_down,
            "signal": [SIGNALS[sign] for sign in record.signals.tolist()],
        }
    else:
        columns |= {
            "predicted_absolute_move": result.predicted,
            "spread": result.spread,
            "p_larger_than_mean": result.chance,
            "constant": record.constant,
            "exponentially_weighted": record.ewma,
        }
    columns["standard_error"] = bars.standard_error
    columns["effective_sample_size"] = bars.effective_sample_size
    columns["exact"] = np.append(exact.predicted, np.full(len(result) - exact.rows, np.nan))
    columns["outcome"] = result.outcome
    write_table(path, columns)
