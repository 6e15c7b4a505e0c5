"""The tables of docs/volatility.md: every series that ships in a package, every forecast of volatility.

python tools/volatility_table.py            # needs arch and bokeh-sampledata
python tools/volatility_table.py WTI IBM    # some of them
"""

import sys
from importlib import import_module

import numpy as np

from favor_np.forecast import (
    EWMA,
    GARCH,
    HAR,
    Constant,
    FavorHAR,
    PerformerForecaster,
    backtest,
    conformal_intervals,
    inputs,
    read_prices,
    samples,
    simulated_minutes,
)

OURS = "Performer"
MODELS = {
    "constant": (Constant(), 1),
    "EWMA": (EWMA(), 20),
    "HAR": (HAR(), 20),
    "GARCH": (GARCH(), 250),
    "FavorHAR": (FavorHAR(), 20),
    "its start": (PerformerForecaster(epochs=0), None),
    OURS: (PerformerForecaster(), None),
}
RIVALS = [name for name in MODELS if name not in ("constant", OURS)]


def stock(name):
    """Daily closes, adjusted, 2000 to 2013: public domain."""
    stocks = import_module("bokeh_sampledata.stocks")
    return np.asarray(getattr(stocks, name)["adj_close"], np.float64)


def index(name):
    """Daily closes, 1999 to 2018."""
    return import_module(f"arch.data.{name}").load()["Adj Close"].to_numpy(np.float64)


SERIES = {
    "WTI": read_prices,
    **{name: lambda name=name: stock(name) for name in ("AAPL", "GOOG", "IBM", "MSFT")},
    **{name: lambda name=name: index(name) for name in ("sp500", "nasdaq")},
    "simulated minutes": lambda: simulated_minutes(20_000),
}


def found(prices, start=1000):
    """Backtests by model, and what the intervals of each cover."""
    X, y = samples(prices)
    known = inputs(prices)  # with the calendar, where there are times
    moves = samples(prices, squared=False).y
    made = {}
    for name, (model, refit) in MODELS.items():
        rows = known if isinstance(model, PerformerForecaster) else X
        often = max(250, len(y) // 20) if refit is None else refit
        made[name] = backtest(model, rows, y, start=start, refit=often)
    covered = {
        name: conformal_intervals(moves[b.index], np.zeros(len(b)), np.sqrt(b.predicted))
        for name, b in made.items()
    }
    return made, covered


def p_value(ours, rival):
    """A p-value with its sign: who is better."""
    test = ours.against(rival)
    if test.p_value >= 0.05:
        return f"{test.p_value:.2f}"
    return f"{'better' if test.statistic > 0 else 'worse'}, {test.p_value:.1g}"


def main(names):
    scores = [
        f"| series | forecasts | {' | '.join(MODELS)} |",
        f"| --- | ---: |{' ---: |' * len(MODELS)}",
    ]
    r2 = [f"| series | {' | '.join(MODELS)} |", f"| --- |{' ---: |' * len(MODELS)}"]
    tests = [
        f"| {OURS} against | {' | '.join(RIVALS)} |",
        f"| --- |{' ---: |' * len(RIVALS)}",
    ]
    cover = [
        "| series | overall | calm | usual | wild | after shocks |",
        f"| --- |{' ---: |' * 5}",
    ]
    for name in names:
        made, covered = found(SERIES[name]())
        cells = [f"{b.score:.4f}" for b in made.values()]
        scores.append(f"| {name} | {len(made['HAR']):,} | {' | '.join(cells)} |")
        r2.append(f"| {name} | {' | '.join(f'{b.r2:+.3f}' for b in made.values())} |")
        cells = [p_value(made[OURS], made[rival]) for rival in RIVALS]
        tests.append(f"| {name} | {' | '.join(cells)} |")
        held = covered[OURS]
        shares = (held.coverage, *held.by_scale, held.after_shocks)
        cover.append(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    print("\n\n".join("\n".join(table) for table in (scores, r2, tests, cover)))


if __name__ == "__main__":
    main(sys.argv[1:] or SERIES)
