"""The picture: price, forecast, what it would have earned, and how exact FAVOR+ was."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.figures import BLUE, GREEN, GREY, INK, ORANGE, RED, style

from ._compare import ExactComparison, compare_with_exact
from ._error_bars import ErrorBars, error_bars
from ._evaluate import ReturnEvaluation, VolatilityEvaluation, evaluate
from ._forecast import Forecast
from ._live import Replay
from ._windows import F64

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECENT = 90  # prices in the close-up


@validation.own_error_state
def draw(
    result: Forecast,
    record: ReturnEvaluation | VolatilityEvaluation | None,
    exact: ExactComparison | None,
    bars: ErrorBars | None,
    replayed: Replay | None,
) -> Figure:
    """Draw what `Forecast.plot` says; what is None, but for the replay, is computed first."""
    with style():
        from matplotlib.figure import Figure

        record = evaluate(result) if record is None else record
        exact = compare_with_exact(result) if exact is None else exact
        bars = error_bars(result) if bars is None else bars
        rows = [["price", "price"], ["recent", "record"], ["bars", "bars"], ["exact", "error"]]
        rows += [["latency", "latency"]] if replayed is not None else []
        heights = [1, 1.1, 0.8, 1.1, 0.7][: len(rows)]
        figure = Figure(figsize=(11, 3.3 * sum(heights)), dpi=110, layout="constrained")
        panels: dict[str, Any] = figure.subplot_mosaic(rows, height_ratios=heights)
        figure.suptitle(
            f"{result.prices.name}\n{result.target} of the next "
            f"{'step' if result.horizon == 1 else f'{result.horizon} steps'} by causal FAVOR+ "
            f"attention over {len(result):,} past windows, {result.num_features:,} features",
            fontsize=11,
            x=0.01,
            ha="left",
        )
        _price(panels["price"], result, record)
        if isinstance(record, ReturnEvaluation):
            _recent_returns(panels["recent"], result, record)
            _equity(panels["record"], result, record)
        else:
            _recent_volatility(panels["recent"], result, record)
            _calibration(panels["record"], result, record)
        _error_bars(panels["bars"], result, exact, bars)
        _against_exact(panels["exact"], result, exact)
        _advantage(panels["error"], result, record, exact)
        if replayed is not None:
            _latency(panels["latency"], replayed)
    return figure


def plot(
    result: Forecast,
    record: ReturnEvaluation | VolatilityEvaluation,
    exact: ExactComparison,
    bars: ErrorBars,
    replayed: Replay | None = None,
) -> Figure:
    """Draw a forecast: the old spelling of `Forecast.plot`."""
    warnings.warn(
        "forecast.plot(result, record, exact, bars, replayed) is now result.plot(record=..., "
        "exact=..., bars=..., replayed=...), all of them optional",
        DeprecationWarning,
        stacklevel=2,
    )
    return result.plot(record=record, exact=exact, bars=bars, replayed=replayed)


def _time(result: Forecast, index: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    times = result.prices.times
    return index if times is None else times[index]


def _concise(axes: Any, result: Forecast) -> None:
    if result.prices.times is not None:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _log_scale(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _price(axes: Any, result: Forecast, record: ReturnEvaluation | VolatilityEvaluation) -> None:
    values = result.prices.values
    axes.plot(_time(result, np.arange(len(values))), values, color=INK, lw=0.7)
    if values.max() > 3 * values.min():
        _log_scale(axes)
        axes.set_ylim(bottom=0.7 * values.min())  # room for the signals
    axes.set_title("Price" + (" and signals" if isinstance(record, ReturnEvaluation) else ""))
    axes.margins(x=0.005)
    _concise(axes, result)
    if isinstance(record, ReturnEvaluation):
        judged = slice(record.start, record.stop)
        signals, when = record.signals[judged], _time(result, result.index[judged])
        for sign, colour, label in ((1, GREEN, "BUY"), (-1, RED, "SELL")):
            low = 0.06 if sign > 0 else 0.0
            axes.vlines(
                when[signals == sign],
                low,
                low + 0.05,
                transform=axes.get_xaxis_transform(),
                color=colour,
                lw=0.5,
                label=f"{label} ({int((signals == sign).sum()):,})",
            )
        axes.legend(loc="upper left", ncols=2)
        _room_for_legend(axes)


def _room_for_legend(axes: Any) -> None:
    """Leave a fifth of the height above what is drawn."""
    transform = axes.transScale
    (_, low), (_, high) = transform.transform([(1, y) for y in axes.get_ylim()])
    axes.set_ylim(top=transform.inverted().transform((1, high + 0.2 * (high - low)))[1])


def _recent_returns(axes: Any, result: Forecast, record: ReturnEvaluation) -> None:
    """Last prices, each with the band that had been forecast for it."""
    horizon, values = result.horizon, result.prices.values
    rows = np.arange(max(len(result) - RECENT, horizon), len(result))
    index = result.index[rows]
    made = rows - horizon  # the forecasts of these prices
    base = values[result.index[made]]
    band = [base * np.exp(result.predicted[made] + sign * result.spread[made]) for sign in (-1, 1)]
    when = _time(result, index)
    axes.fill_between(when, *band, color=BLUE, alpha=0.16, lw=0, label="forecast ± 1 sd")
    axes.plot(when, base * np.exp(result.predicted[made]), color=BLUE, lw=0.9, label="forecast")
    axes.plot(when, values[index], color=INK, lw=1.1, label="price")
    shift = 0.035 * (np.max(band) - np.min(band))
    for sign, colour, marker, label in ((1, GREEN, "^", "BUY"), (-1, RED, "v", "SELL")):
        chosen = record.signals[rows] == sign
        axes.scatter(
            when[chosen],
            values[index[chosen]] - sign * shift,
            s=14,
            c=colour,
            marker=marker,
            label=label,
            zorder=3,
            lw=0,
        )
    step = when[-1] - when[-2]
    move, spread = result.next.move, result.next.spread
    ends = values[-1] * np.exp([move - spread, move, move + spread])
    axes.errorbar(
        [when[-1] + horizon * step],
        ends[1:2],
        yerr=[[ends[1] - ends[0]], [ends[2] - ends[1]]],
        color=ORANGE,
        fmt="o",
        ms=4,
        capsize=3,
        lw=1.5,
        zorder=4,
        label=f"next: {100 * np.expm1(move):+.3f}%, P(up) {100 * result.next.chance:.0f}%",
    )
    axes.set_title(f"The last {len(rows)} prices and what had been forecast for them")
    _room_for_legend(axes)
    axes.legend(loc="upper left", ncols=2)
    _concise(axes, result)


def _recent_volatility(axes: Any, result: Forecast, record: VolatilityEvaluation) -> None:
    rows = np.arange(max(len(result) - 3 * RECENT, 0), len(result))
    when = _time(result, np.minimum(result.index[rows] + result.horizon, len(result.prices) - 1))
    axes.vlines(when, 0, 100 * result.outcome[rows], color=GREY, lw=1, label="absolute return")
    for values, colour, label in (
        (result.predicted, BLUE, "FAVOR+"),
        (record.ewma, ORANGE, "exponentially weighted"),
        (record.constant, INK, "constant"),
    ):
        axes.plot(when, 100 * values[rows], color=colour, lw=1.2, label=label)
    axes.set_ylim(bottom=0)
    _room_for_legend(axes)
    axes.set_ylabel("%")
    axes.set_title(f"The last {len(rows)} absolute returns and their forecasts")
    axes.legend(loc="upper left", ncols=2)
    _concise(axes, result)


def _equity(axes: Any, result: Forecast, record: ReturnEvaluation) -> None:
    when = _time(result, result.index[record.start :])
    for equity, colour, label in (
        (record.hold.equity, GREY, "buy and hold"),
        (record.strategy.equity, BLUE, "strategy"),
    ):
        label = f"{label} {100 * (equity[-1] - 1):+,.0f}%"
        axes.plot(when, np.maximum(equity, 1e-12), color=colour, lw=1, label=label)
    worth = np.concatenate([record.strategy.equity, record.hold.equity])
    if worth.max() > 3 * worth.min() > 0:
        _log_scale(axes)
    axes.axhline(1, color=INK, lw=0.6)
    axes.set_title(f"Worth of 1, costs of {100 * record.cost:g}% a position included")
    axes.legend(loc="upper left")
    _concise(axes, result)


def _calibration(axes: Any, result: Forecast, record: VolatilityEvaluation) -> None:
    judged = slice(record.start, record.stop)
    outcome = result.outcome[judged]
    for values, colour, label in (
        (result.predicted, BLUE, f"FAVOR+, R² {record.r2:.3f}"),
        (record.ewma, ORANGE, f"exponentially weighted, R² {record.r2_ewma:.3f}"),
    ):
        groups = np.array_split(np.argsort(values[judged]), min(10, len(outcome)))
        points = np.array([(values[judged][g].mean(), outcome[g].mean()) for g in groups])
        axes.plot(*(100 * points.T), "o-", color=colour, ms=4, lw=1, label=label)
    ends = (*axes.get_xlim(), *axes.get_ylim())
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, lw=0.6)
    axes.set_title("Tenths of the forecasts: predicted and true mean (%)")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.legend(loc="upper left")


def _error_bars(axes: Any, result: Forecast, exact: ExactComparison, bars: ErrorBars) -> None:
    """Last forecasts with what the random features leave uncertain, and exact ones beside them."""
    rows = np.arange(max(exact.rows - RECENT, 0), exact.rows)
    when, middle = _time(result, result.index[rows]), 100 * result.predicted[rows]
    half = 196 * bars.standard_error[rows]
    axes.fill_between(
        when,
        middle - half,
        middle + half,
        color=BLUE,
        alpha=0.3,
        lw=0,
        label="FAVOR+ ± 1.96 standard errors of its features",
    )
    axes.plot(when, middle, color=BLUE, lw=0.9, label="FAVOR+")
    axes.plot(when, 100 * exact.predicted[rows], color=ORANGE, lw=0.9, label="exact attention")
    size = np.median(bars.effective_sample_size[rows])
    axes.set_title(
        f"The last {len(rows)} forecasts (%): effective sample size {size:,.0f} of "
        f"{result.num_features:,} features in the median"
    )
    axes.margins(x=0.005)
    _room_for_legend(axes)
    axes.legend(loc="upper left", ncols=3)
    _concise(axes, result)


def _against_exact(axes: Any, result: Forecast, exact: ExactComparison) -> None:
    judged = slice(result.warm_up, exact.rows)
    x, y = 100 * exact.predicted[judged], 100 * result.predicted[judged]
    thin = max(len(x) // 20_000, 1)
    axes.scatter(x[::thin], y[::thin], s=4, color=BLUE, alpha=0.15, lw=0, rasterized=True)
    low, high = np.quantile(np.concatenate([x, y]), [0.001, 0.999])
    pad = 0.05 * (high - low) or 1.0
    axes.plot([low - pad, high + pad], [low - pad, high + pad], color=INK, lw=0.8)
    axes.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
    axes.locator_params(nbins=6)
    axes.set_xlabel("exact attention, %")
    axes.set_ylabel("FAVOR+, %")
    axes.set_title(f"Forecasts, FAVOR+ against exact: correlation {exact.correlation:.4f}")


def _advantage(
    axes: Any,
    result: Forecast,
    record: ReturnEvaluation | VolatilityEvaluation,
    exact: ExactComparison,
) -> None:
    """Squared error of the simple forecast less ours, summed: rising is better than simple."""
    judged = slice(record.start, record.stop)
    outcome = result.outcome[judged]
    simple = record.constant[judged] if isinstance(record, VolatilityEvaluation) else 0.0
    baseline = (outcome - simple) ** 2
    total = baseline.sum() or 1.0  # the simple forecast may have been right
    when = _time(result, result.index[judged])
    curves: list[tuple[F64, str, str]] = [
        (exact.predicted[record.start : min(exact.rows, record.stop)], ORANGE, "exact"),
        (result.predicted[judged], BLUE, "FAVOR+"),
    ]
    if isinstance(record, VolatilityEvaluation):
        curves.insert(0, (record.ewma[judged], GREY, "exponentially weighted"))
    for values, colour, label in curves:
        count = len(values)
        gain = np.cumsum(baseline[:count] - (outcome[:count] - values) ** 2) / total
        axes.plot(when[:count], 100 * gain, color=colour, lw=1, label=label)
    axes.axhline(0, color=INK, lw=0.6)
    name = "constant" if isinstance(record, VolatilityEvaluation) else "zero forecast"
    axes.set_title(f"Squared error saved against the {name} so far (%)")
    axes.legend(loc="best")
    _concise(axes, result)


def _latency(axes: Any, replayed: Replay) -> None:
    edges, counts = replayed.histogram()
    micro = 1e6 * edges
    axes.bar(micro, counts, micro[1] - micro[0], align="edge", color=BLUE, alpha=0.35, lw=0)
    axes.set_yscale("log")  # the tail is what a live system waits for
    axes.set_ylim(0.5, 8 * counts.max())
    for share in (50, 99):
        value = 1e6 * float(np.percentile(replayed.seconds, share))
        axes.axvline(value, color=INK, lw=0.8)
        axes.annotate(
            f"p{share} {value:,.3g}" if value < 1000 else f"p{share} {value:,.0f}",
            (value, 1),
            (3, -3),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            va="top",
        )
    longest = 1e6 * replayed.seconds.max()
    axes.set_title(
        f"Forecasts by the microseconds that each took live; the last bar has all longer ones, "
        f"up to {longest:,.0f}"
    )
    axes.grid(axis="x", visible=False)
