"""The section of a report on volatility: what models forecast that know no more than returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from favor_np.forecast import (
    EWMA,
    HAR,
    Backtest,
    Constant,
    FavorHAR,
    Forecast,
    Intervals,
    backtest,
    conformal_intervals,
    samples,
)
from favor_np.forecast._backtest import Estimator

from ._text import GLUE

FEWEST, START, REFIT = 600, 1000, 250
BEST = "HAR and attention"
COVERAGE = 0.9
ARTICLE = {"constant": "the constant"}


@dataclass(frozen=True)
class Models:
    """Backtests by name, and intervals of the return by the last of them."""

    backtests: dict[str, Backtest]
    intervals: Intervals

    def as_dict(self) -> dict[str, Any]:
        """Everything that the section says, in log returns."""
        best = self.backtests[BEST]
        models = {}
        for name, made in self.backtests.items():
            models[name] = {
                "qlike": made.score,
                "r2": made.r2,
                "next_standard_deviation": float(np.sqrt(made.predicted[-1])) / 100,
            }
            if made is not best:
                test = best.against(made)
                models[name]["z_of_best"] = test.statistic
                models[name]["p_of_best"] = test.p_value
        held = self.intervals
        return {
            "forecasts": len(best),
            "models": models,
            "interval": {
                "target": held.target,
                "next_low": float(held.lower[-1]) / 100,
                "next_high": float(held.upper[-1]) / 100,
                "coverage": held.coverage,
                "by_volatility": list(held.by_scale),
                "after_shocks": held.after_shocks,
            },
        }


def models_of(result: Forecast) -> Models | None:
    """Forecast the same moves by models; None where there are too few prices."""
    X, y = samples(result.prices, horizon=result.horizon)
    rows = len(y)
    start = min(START, rows // 2)
    if rows < max(FEWEST, 20 * result.horizon) or not np.all(y[:start].any()):
        return None
    options: dict[str, Any] = {
        "horizon": result.horizon,
        "start": start,
        "refit": max(REFIT, rows // 20),
    }
    estimators: dict[str, Estimator] = {
        "constant": Constant(),
        "EWMA": EWMA(horizon=result.horizon),
        "HAR": HAR(),
        BEST: FavorHAR(seed=result.seed),
    }
    made = {name: backtest(model, X, y, **options) for name, model in estimators.items()}
    best = made[BEST]
    moves = samples(result.prices, horizon=result.horizon, squared=False).y[best.index]
    scale = np.sqrt(best.predicted)
    held = conformal_intervals(
        moves, np.zeros(len(moves)), scale, coverage=COVERAGE, horizon=result.horizon
    )
    return Models(made, held)


def models_section(models: Models) -> tuple[str, list[tuple[str, str]]]:
    """Return the title and the rows."""
    best, held = models.backtests[BEST], models.intervals
    rows = [
        (
            name,
            f"QLIKE {made.score:.4f}, R² {made.r2:+.3f}; next standard deviation "
            f"{np.sqrt(made.predicted[-1]):.3f}{GLUE}%",
        )
        for name, made in models.backtests.items()
    ]
    verdicts = [
        best.against(made).verdict(ARTICLE.get(name, name))
        for name, made in models.backtests.items()
        if made is not best
    ]
    rows.append(("in short", f"{BEST} is {', '.join(verdicts)}, by Diebold and Mariano"))
    shares = ", ".join(f"{100 * share:.0f}{GLUE}%" for share in held.by_scale)
    rows.append(
        (
            "interval",
            f"{held.lower[-1]:+.2f} to {held.upper[-1]:+.2f}{GLUE}%, {100 * held.target:.0f}"
            f"{GLUE}% of the next moves; such intervals held {100 * held.coverage:.1f}"
            f"{GLUE}%, in calm, usual and wild times {shares}",
        )
    )
    return f"MODELS that are refitted as they would have been, {len(best):,} forecasts", rows
