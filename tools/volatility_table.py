"""The tables of docs/volatility.md: every series that ships in a package, every forecast of volatility.

python tools/volatility_table.py            # needs arch and bokeh-sampledata
"""

from importlib import import_module

import numpy as np

from favor_np.forecast import (
    EWMA,
    GARCH,
    HAR,
    Constant,
    FavorHAR,
    backtest,
    conformal_intervals,
    read_prices,
    samples,
    simulated_minutes,
)

MODELS = {
    "constant": (Constant(), 1),
    "EWMA": (EWMA(), 20),
    "HAR": (HAR(), 20),
    "GARCH": (GARCH(), 250),
    "FavorHAR": (FavorHAR(), 20),
}


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
    moves = samples(prices, squared=False).y
    made = {
        name: backtest(model, X, y, start=start, refit=refit)
        for name, (model, refit) in MODELS.items()
    }
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


def main():
    scores = [f"| series | forecasts | {' | '.join(MODELS)} |", f"| --- | ---: |{' ---: |' * 5}"]
    tests = ["| FavorHAR against | EWMA | HAR | GARCH |", "| --- | ---: | ---: | ---: |"]
    cover = [
        "| series | overall | calm | usual | wild | after shocks |",
        f"| --- |{' ---: |' * 5}",
    ]
    for name, read in SERIES.items():
        made, covered = found(read())
        cells = [f"{b.score:.4f} / {b.r2:+.3f}" for b in made.values()]
        scores.append(f"| {name} | {len(made['HAR']):,} | {' | '.join(cells)} |")
        cells = [p_value(made["FavorHAR"], made[rival]) for rival in ("EWMA", "HAR", "GARCH")]
        tests.append(f"| {name} | {' | '.join(cells)} |")
        held = covered["FavorHAR"]
        shares = (held.coverage, *held.by_scale, held.after_shocks)
        cover.append(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    print("\n".join(("\n".join(scores), "", "\n".join(tests), "", "\n".join(cover))))


if __name__ == "__main__":
    main()
