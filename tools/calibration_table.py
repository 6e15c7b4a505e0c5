"""The tables of the calibration page.

python tools/calibration_table.py                      # the families of tests/support/families.py
python tools/calibration_table.py prices volatility    # data of `favor-np compare`
python tools/calibration_table.py FILE.npz --causal    # queries and keys of another program
python tools/calibration_table.py forecasts            # how much a forecast should know
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import favor_np
from favor_np.cli.compare import in_percent
from favor_np.compare import Setting, compare
from favor_np.compare._data import Tokens
from favor_np.compare._methods import METHODS
from favor_np.forecast import forecast, read_prices

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.families import DIM, DRAWS, FAMILIES, FEATURES, draw_family


def family_errors(method, family, draws=DRAWS):
    """Root-mean-square errors on the calibration data and on fresh data of the same kind."""
    squares = []
    for seed in range(draws):
        sets = [draw_family(*family, seed, fresh=fresh) for fresh in (False, True)]
        known = [x[None] for x in sets[0][:2]]
        fm = method.feature_map(Tokens(*known, *known, DIM**-0.5), FEATURES, seed)
        squares.append([np.mean(difference(fm, *qkv) ** 2) for qkv in sets])
    return np.sqrt(np.mean(squares, axis=0))


def difference(fm, *qkv):
    q, k, v = (x[None] for x in qkv)
    return favor_np.favor_attention(q, k, v, fm) - favor_np.exact_attention(q, k, v)


def family_table():
    """One row a method: errors on calibration data / fresh data, by family."""
    rows = [["method", *FAMILIES]]
    for method in METHODS:
        cells = [family_errors(method, family) for family, _ in FAMILIES.values()]
        rows.append([method.name, *(f"{own:.4f} / {fresh:.4f}" for own, fresh in cells)])
    return rows


def data_table(data, causal):
    """One row a method: errors in percent of the output, by number of features."""
    result = compare(Setting(data, causal=causal), seeds=DRAWS, lengths=[], time_features=[])
    features = list(dict.fromkeys(row.features for row in result.errors))
    rows = [["method", *(f"m = {m}" for m in features)]]
    for method in METHODS:
        rows.append([method.name, *(in_percent(result.error(method.name, m)) for m in features)])
    return rows


def forecast_table(features=1024, draws=8, judged=1000):
    """One row a calibration: distance of forecasts from those by exact attention, by target."""
    choices = {
        "none": None,
        "first 250 windows": (250, False),
        "first 500": (500, False),
        "first 1,000": (1000, False),
        "all, the future included": (None, False),
        "first 250, centred": (250, True),
    }
    rows = [['calibration, "auto"', "returns", "volatility"], *([name] for name in choices)]
    for target in ("return", "volatility"):
        windows = forecast(read_prices(), target=target, num_features=2).windows
        q, k, v, scale = windows.queries, windows.keys, windows.values, windows.scale
        exact = favor_np.exact_attention(q, k, v, causal=True, scale=scale)[judged:, 0]
        for row, known in zip(rows[1:], choices.values(), strict=True):
            errors = []
            for seed in range(draws):
                fm = favor_np.feature_map("positive", q.shape[1], features, scale=scale, rng=seed)
                if known is not None:
                    count, center = known
                    fm = fm.calibrate(q[:count], k[:count], center=center)
                out = favor_np.favor_attention(q, k, v, fm, causal=True)[judged:, 0]
                errors.append(np.sqrt(np.mean((out - exact) ** 2)) / exact.std())
            row.append(f"{np.mean(errors):.3f}")
    return rows


def markdown(rows):
    rows = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="*")
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    for data in options.data:
        rows = forecast_table() if data == "forecasts" else data_table(data, options.causal)
        print(markdown(rows))
    if not options.data:
        print(markdown(family_table()))
