"""``favor-np forecast --model performer``: what is trained beside what any forecast has to beat."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from favor_np import __version__
from favor_np.forecast import (
    EWMA,
    GARCH,
    HAR,
    Backtest,
    Constant,
    FavorHAR,
    Intervals,
    PerformerForecaster,
    Prices,
    backtest,
    conformal_intervals,
    inputs,
    samples,
)
from favor_np.forecast._backtest import Estimator
from favor_np.forecast._setting import Setting

from . import _options as options
from ._report import Section, about_input, clean, lines_of, read_section, write_table
from ._text import GLUE, printed, seconds

F64 = npt.NDArray[np.float64]

FEWEST, START, REFIT = 600, 1000, 250
FEWEST_TO_LOAD = 20
LONG, FITS, FITS_OF_LONG = 15_000, 20, 8  # how often the past is fitted, and that of a long series
COVERAGE = 0.9
OURS, BEGINNING = "Performer", "its start"
ARTICLE = {"constant": "the constant", "mean so far": "the mean so far", "zero": "no move"}
LINES = 250  # steps in the close-up of the picture


class _Zero(Constant):
    """No move at all."""

    def predict(self, X: npt.ArrayLike) -> F64:
        """Return zeros."""
        return np.zeros(len(np.asarray(X)))


@dataclass(frozen=True)
class _Past:
    """Backtests by name, and intervals of the returns that followed."""

    made: dict[str, Backtest]
    intervals: Intervals

    @property
    def ours(self) -> Backtest:
        """The last of them."""
        return self.made[OURS]


@dataclass(frozen=True)
class _Next:
    """The next forecast, in log returns."""

    mean: float
    deviation: float
    low: float
    high: float
    usual: float


@dataclass(frozen=True)
class Files:
    """Where results go, if anywhere, and the format of the picture."""

    table: Path | None
    figure: Path | None
    saved: Path | None
    picture: str


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before any work."""
    if (args.save or args.load) and importlib.util.find_spec("safetensors") is None:
        raise options.CommandError("--save and --load need safetensors: pip install 'favor_np[nn]'")
    if args.load is None:
        return
    for name in ("epochs", "members", "save", "csv", "plot"):
        if getattr(args, name) is not None:
            raise options.CommandError(f"--load forecasts only the next step: leave out --{name}")


def run(args: argparse.Namespace, prices: Prices, files: Files) -> int:
    """Train or load, forecast, print, write; return the exit status."""
    X = inputs(prices)
    began = time.perf_counter()
    if args.load is not None:
        model, past = _loaded(args, X), None
    else:
        if len(X) < FEWEST or not X[: len(X) // 2, 0].any():
            raise options.CommandError(
                f"{prices.name}: {len(X)} returns, and --model performer needs {FEWEST} that vary"
            )
        model = PerformerForecaster(
            target=args.target, horizons=(args.horizon,), seed=args.seed, **_sizes(args)
        )
        past = _walk_forward(args, prices, X, model)
        model.fit(X, progress=None)
    took = time.perf_counter() - began
    step = _next(model, X)
    if files.saved is not None:
        model.save(files.saved)
    if past is not None and files.table is not None:
        _write(files.table, prices, past)
    if past is not None and files.figure is not None:
        _draw(prices, past, step).savefig(files.figure, format=files.picture)
    if args.json:
        data = _as_dict(prices, model, step, past, took)
        print(json.dumps(clean(data), indent=2, allow_nan=False))
        return 0
    sections = [read_section(prices), _method(model, took, loaded=args.load is not None)]
    sections.append(_next_section(prices, model, step))
    sections += [] if past is None else [_past_section(prices, model, past)]
    lines = lines_of(sections)
    lines += [f"Wrote {path}" for path in (args.csv, args.plot, args.save) if path is not None]
    print(printed(lines))
    return 0


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    found = {name: getattr(args, name) for name in ("epochs", "members")}
    return {name: value for name, value in found.items() if value is not None}


def _loaded(args: argparse.Namespace, X: F64) -> PerformerForecaster:
    """Return what was saved; it has its own target and horizon."""
    try:
        model = PerformerForecaster.load(args.load)
    except ValueError as error:
        raise options.CommandError(str(error)) from None
    if X.shape[1] != model.n_features_in_:
        raise options.CommandError(
            f"{args.load}: was trained on {model.n_features_in_} columns (the return, hours and "
            f"weekdays), these prices have {X.shape[1]}: of another step, or without times"
        )
    if args.horizon not in (Setting.horizon, model.horizons[0]):
        raise options.CommandError(
            f"{args.load}: was trained for a horizon of {model.horizons[0]}, not {args.horizon}"
        )
    fewest = max((FEWEST_TO_LOAD, *model.spans))
    if len(X) < fewest:
        raise options.CommandError(
            f"{args.load}: its averages need {fewest} returns to go on from, got {len(X)}"
        )
    return model


def _next(model: PerformerForecaster, X: F64) -> _Next:
    recent = X[-model.context :]
    interval = model.predict_interval(recent, coverage=COVERAGE)[-1].reshape(-1, 2)[0] / 100
    mean, variance = (x[-1, 0] for x in model.moments(recent))
    usual = float(np.sqrt(np.mean(X[:, 0] ** 2) * model.horizons[0])) / 100
    low, high = map(float, interval)
    return _Next(float(mean) / 100, float(np.sqrt(variance)) / 100, low, high, usual)


# -- The past -------------------------------------------------------------------------------------


def _walk_forward(
    args: argparse.Namespace, prices: Prices, X: F64, model: PerformerForecaster
) -> _Past:
    """Forecast the past by all models, refitted as they would have been."""
    volatile = model.target == "volatility"
    returns, y = samples(prices, horizon=args.horizon, squared=volatile)
    setting: dict[str, Any] = {
        "horizon": args.horizon,
        "start": min(START, len(y) // 2),
        "refit": max(REFIT, len(y) // (FITS if len(y) < LONG else FITS_OF_LONG)),
        "loss": "qlike" if volatile else "squared",
    }
    start = PerformerForecaster(**model.get_params() | {"epochs": 0})
    simple: dict[str, Estimator]
    if volatile:
        simple = {"constant": Constant(), "EWMA": EWMA(horizon=args.horizon), "HAR": HAR()}
        if importlib.util.find_spec("arch") is not None:
            simple["GARCH"] = GARCH(horizon=args.horizon)
        simple["HAR and attention"] = FavorHAR(seed=args.seed)
    else:
        simple = {"zero": _Zero(), "mean so far": Constant()}
    made = {name: backtest(each, returns, y, **setting) for name, each in simple.items()}
    made[BEGINNING] = backtest(start, X, y, **setting)
    made[OURS] = made[BEGINNING]
    if model.epochs:
        made[OURS] = backtest(model, X, y, **setting)
    moves = samples(prices, horizon=args.horizon, squared=False).y
    centre, variance = np.zeros(len(made[OURS])), made[OURS].predicted
    if not volatile:  # returns have intervals by the volatility that a regression predicts
        twin = PerformerForecaster(**start.get_params() | {"target": "volatility"})
        squares = backtest(twin, X, moves**2, **setting | {"loss": "qlike"})
        centre, variance = made[OURS].predicted, squares.predicted
    held = conformal_intervals(
        moves[made[OURS].index], centre, np.sqrt(variance), coverage=COVERAGE, horizon=args.horizon
    )
    return _Past(made, held)


def _words(past: _Past) -> str:
    """Say whom the Performer beats."""
    verdicts = [
        past.ours.against(made).verdict(ARTICLE.get(name, name))
        for name, made in past.made.items()
        if made is not past.ours
    ]
    return f"{OURS} is {', '.join(verdicts)}, by Diebold and Mariano"


def _hits(past: _Past) -> tuple[float, float]:
    """Share of moves whose sign was predicted, and of those in the usual direction so far."""
    ours = past.ours
    moved = ours.known & (ours.outcome != 0)
    sign = np.sign(ours.outcome[moved])
    right = np.sign(ours.predicted[moved]) == sign
    usual = np.where(ours.mean[moved] >= 0, 1, -1) == sign
    return float(right.mean()), float(usual.mean())


# -- Text -----------------------------------------------------------------------------------------


def _percent(value: float) -> str:
    digits = 3 if abs(value) >= 1e-3 else 5
    return f"{100 * value:.{digits}f}{GLUE}%"


def _method(model: PerformerForecaster, took: float, *, loaded: bool) -> Section:
    columns = model.start_.shape[0] - 1
    what = "log variance" if model.target == "volatility" else "return, and its log variance,"
    rows = [
        (
            "start",
            f"regression of the {what} on {columns:,} columns: averages of squares and of "
            "signed returns with several decays, and what the calendar tells",
        ),
    ]
    size = f"{model.dim} wide, {model.heads} heads, {model.num_features} random features"
    if model.epochs:
        gain = model.validation_scores_[0] - model.best_loss_
        part = f"the last {100 * model.validation:.0f}{GLUE}% of the prices"
        said = f"which lowered the loss of {part} by {gain:.4f}"
        if not gain > 0:
            said = f"but in {part} that was no better than the start, which remains"
        rows.append(
            (
                "Performer",
                f"causal, {size}, {model.members} seed{'s' * (model.members > 1)}; "
                f"{model.n_iter_} passes, {said}",
            )
        )
    else:
        rows.append(("Performer", "none (--epochs 0): the start alone"))
    told = "to load: nothing was trained now" if loaded else "for all that follows"
    rows.append(("time", f"{seconds(took)} {told}"))
    return "METHOD", rows


def _next_section(prices: Prices, model: PerformerForecaster, step: _Next) -> Section:
    horizon = model.horizons[0]
    ahead = "STEP" if horizon == 1 else f"{horizon} STEPS"
    rows = []
    if model.target == "return":
        rows.append(("predicted move", f"{100 * step.mean:+.4f}{GLUE}% (log return)"))
    rows += [
        (
            "volatility",
            f"standard deviation {_percent(step.deviation)}, "
            f"{step.deviation / step.usual:.2f} times that of all returns",
        ),
        (
            "interval",
            f"{100 * step.low:+.3f} to {100 * step.high:+.3f}{GLUE}%, for "
            f"{100 * COVERAGE:.0f}{GLUE}% of such moves",
        ),
    ]
    label, price = prices.time_label(len(prices) - 1), prices.values[-1]
    return f"NEXT {ahead} after {label}, price {price:g}", rows


def _past_section(prices: Prices, model: PerformerForecaster, past: _Past) -> Section:
    ours, held = past.ours, past.intervals
    name = "QLIKE" if ours.loss == "qlike" else "mean square"
    rows = [
        (label, f"{name} {made.score:.4f}, R² {made.r2:+.4f}") for label, made in past.made.items()
    ]
    rows.append(("in short", _words(past)))
    if ours.horizon > 1:
        thinned = [
            f"{name} {ours.against(made).thinned:+.1f}"
            for name, made in past.made.items()
            if made is not ours
        ]
        rows.append(
            ("without overlap", f"z by every {ours.horizon}th forecast alone: {', '.join(thinned)}")
        )
    if model.target == "return":
        right, usual = _hits(past)
        rows.append(
            (
                "hit rate",
                f"{100 * right:.1f}{GLUE}% of moves; the more frequent direction so far: "
                f"{100 * usual:.1f}{GLUE}%",
            )
        )
    shares = ", ".join(f"{100 * share:.0f}{GLUE}%" for share in held.by_scale)
    rows.append(
        (
            "intervals",
            f"of {100 * held.target:.0f}{GLUE}% held {100 * held.coverage:.1f}{GLUE}%, in "
            f"calm, usual and wild times {shares}, after shocks "
            f"{100 * held.after_shocks:.0f}{GLUE}%",
        )
    )
    first, last = (prices.time_label(int(ours.index[i]) + 1) for i in (0, -1))
    title = f"WALK-FORWARD {len(ours):,} forecasts, {first} to {last}, {ours.fits} fits each"
    return title, rows


# -- Files ----------------------------------------------------------------------------------------


def _as_dict(
    prices: Prices, model: PerformerForecaster, step: _Next, past: _Past | None, took: float
) -> dict[str, Any]:
    """Everything that the report says; moves as log returns, not in %."""
    data: dict[str, Any] = {
        "favor_np": __version__,
        "input": about_input(prices),
        "settings": {"model": "performer"} | _listed(model.get_params()),
        "training": {
            "passes": model.n_iter_,
            "loss_curve": model.loss_curve_,
            "validation_scores": model.validation_scores_,
            "seconds": took,
        },
        "next": {
            "move": step.mean,
            "standard_deviation": step.deviation,
            "low": step.low,
            "high": step.high,
            "coverage": COVERAGE,
        },
    }
    if past is None:
        return data
    models: dict[str, Any] = {}
    for name, made in past.made.items():
        models[name] = {"loss": made.score, "r2": made.r2}
        if made is not past.ours:
            test = past.ours.against(made)
            models[name] |= {
                "performer_gains": test.difference,
                "z": test.statistic,
                "z_thinned": test.thinned,
                "p": test.p_value,
            }
    held = past.intervals
    data["past"] = {
        "forecasts": len(past.ours),
        "fits": past.ours.fits,
        "loss": past.ours.loss,
        "models": models,
        "interval": {
            "target": held.target,
            "coverage": held.coverage,
            "by_volatility": list(held.by_scale),
            "after_shocks": held.after_shocks,
        },
    }
    if model.target == "return":
        right, usual = _hits(past)
        data["past"] |= {"hit_rate": right, "base_rate": usual}
    return data


def _listed(params: dict[str, Any]) -> dict[str, Any]:
    return {name: list(x) if isinstance(x, tuple) else x for name, x in params.items()}


def _write(path: Path, prices: Prices, past: _Past) -> None:
    """One row a forecast; returns are log returns, volatilities standard deviations."""
    ours, held = past.ours, past.intervals
    rows = ours.index + 1  # row i of the returns ends at price i + 1
    columns: dict[str, Any] = {"price": [repr(x) for x in prices.values[rows].tolist()]}
    if prices.times is None:
        columns = {"row": rows + 1} | columns
    else:
        columns = {"time": prices.time_texts(rows)} | columns
    for name, made in past.made.items():
        values = np.sqrt(made.predicted) if made.loss == "qlike" else made.predicted
        columns[name.lower().replace(" ", "_")] = values / 100
    columns |= {"low": held.lower / 100, "high": held.upper / 100, "outcome": held.outcome / 100}
    write_table(path, columns)


def _draw(prices: Prices, past: _Past, step: _Next) -> Any:
    """Draw the last returns with their intervals, and what each model gained over the first."""
    from favor_np.figures import BLUE, GREEN, GREY, INK, ORANGE, RED, style

    ours, held = past.ours, past.intervals
    when: Any = ours.index + 1
    if prices.times is not None:
        when = prices.times[when]
    rival = "EWMA" if ours.loss == "qlike" else "zero"
    names = [name for name in past.made if name not in ("constant", rival)]
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 7), layout="constrained")
        top, bottom = figure.subplots(2)
        last = slice(-LINES, None)
        top.fill_between(
            when[last],
            held.lower[last],
            held.upper[last],
            color=BLUE,
            alpha=0.2,
            lw=0,
            label=f"{100 * held.target:.0f}% interval, {100 * held.coverage:.1f}% held",
        )
        top.plot(when[last], held.outcome[last], ".", color=INK, ms=3, label="what followed")
        top.plot([when[-1]] * 2, [100 * step.low, 100 * step.high], color=RED, lw=2, label="next")
        top.set(ylabel="%", title=f"The last {len(when[last])} moves of {prices.name}")
        top.legend(loc="upper left", ncols=3)
        colours = dict(zip(names, [GREY, ORANGE, GREEN, RED, INK] * 2, strict=False)) | {OURS: BLUE}
        for name in names:
            gain = np.cumsum(past.made[rival].losses - past.made[name].losses)
            bottom.plot(
                when[ours.known],
                gain,
                color=colours[name],
                lw=1.6 if name == OURS else 0.9,
                label=name,
            )
        bottom.axhline(0, color=INK, lw=0.6)
        loss = "QLIKE" if ours.loss == "qlike" else "squared error"
        bottom.set_title(f"{loss} saved against {rival} so far")
        bottom.legend(loc="upper left", ncols=3)
    return figure
