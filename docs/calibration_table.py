"""Table of the calibration page: errors on the synthetic families of tests/families.py."""

import sys
from pathlib import Path

import numpy as np

import favor_np

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from families import DIM, DRAWS, FAMILIES, FEATURES, draw

ROWS = {
    "FAVOR+ (no pairs)": None,
    "antithetic pairs": None,
    "oprf": "oprf",
    "sderf": "sderf",
    "saderf": "saderf",
    "aderf": "aderf",
    "saderf+sderf": "saderf+sderf",
    "aderf+sderf": "aderf+sderf",
    "spherical": "spherical",
    "auto": "auto",
}


def errors(name, family, draws=DRAWS):
    """Root-mean-square errors on the calibration data and on fresh data of the same kind."""
    squares = []
    for seed in range(draws):
        plain = favor_np.feature_map(
            "positive", DIM, FEATURES, antithetic=not name.startswith("FAVOR+"), rng=seed
        )
        sets = [draw(*family, seed, fresh=fresh) for fresh in (False, True)]
        fm = plain if ROWS[name] is None else plain.calibrate(*sets[0][:2], ROWS[name])
        squares.append(
            [
                np.mean((favor_np.favor_attention(*qkv, fm) - favor_np.exact_attention(*qkv)) ** 2)
                for qkv in sets
            ]
        )
    return np.sqrt(np.mean(squares, axis=0))


def table(draws=DRAWS):
    """One row a method: errors on calibration data / fresh data, by family."""
    lines = [["method", *FAMILIES], ["---", *["---:"] * len(FAMILIES)]]
    for name in ROWS:
        cells = [errors(name, family, draws) for family, _ in FAMILIES.values()]
        lines.append([name, *(f"{own:.4f} / {fresh:.4f}" for own, fresh in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    print(table())
