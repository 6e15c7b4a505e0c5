"""``favor-np demo``: one screen, and an honest word on short series."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from favor_np.cli import main
from favor_np.cli.demo import Column, _words
from favor_np.forecast import ExactComparison


def test_demo_is_one_screen(capsys):
    assert main(["demo", "--rows", "20000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    out = " ".join(lines)
    for part in (
        "WTI crude oil",
        "simulated minutes",
        "10,225, 1 day apart",
        "20,000, 1 minute apart",
        "FAVOR+, 192 features",
        "inside its 95 % error bars",
        "by more than chance, and worse than a moving average",
    ):
        assert part in out, part


# Ten thousand windows. Exact attention takes 1 s, so it takes (n / 10,000)^2 s for n of them.
COMPARISON = ExactComparison(
    predicted=np.zeros(10_000),
    rows=10_000,
    seconds=1.0,
    measured_seconds=1.0,
    extrapolated=False,
    peak_bytes=0,
    matrix_bytes=4 * 10_000**2,
    correlation=1.0,
    rmse=0.0,
    spread=1.0,
    favor_seconds=0.5,
    favor_peak_bytes=0,
    calibration_seconds=0.0,
)


@pytest.mark.parametrize(
    ("favor_seconds", "calibration_seconds", "words"),
    [
        (
            2.0,
            0.0,
            "your series is short, take exact attention: from 20,000 windows on FAVOR+ pays",
        ),
        (0.5, 1.4, "short: FAVOR+ pays from 14,594 windows on, for the calibration takes longer"),
        (0.5, 0.0, "FAVOR+ pays: it is faster from 5,000 windows on"),
    ],
)
def test_times_are_put_into_words(favor_seconds, calibration_seconds, words):
    times = replace(
        COMPARISON, favor_seconds=favor_seconds, calibration_seconds=calibration_seconds
    )
    record = SimpleNamespace(z=0.0, r2=0.0, r2_ewma=0.1)
    column = Column(range(10_000), record, times, inside=0.95)
    assert _words(column).partition(".")[0] == words


def test_a_short_series_of_ones_own(capsys, tmp_path):
    prices = 30 * np.exp(np.cumsum(0.01 * np.random.default_rng(0).standard_normal(300)))
    path = tmp_path / "short.csv"
    path.write_text("\n".join(["Close", *map(str, prices)]))
    assert main(["demo", str(path), "--rows", "10000"]) == 0
    assert "short.csv: " in capsys.readouterr().out


def test_a_missing_file_is_one_line(capsys):
    assert main(["demo", "no-such-file.csv"]) == 2
    assert capsys.readouterr().err.startswith("favor-np: error: no-such-file.csv: ")
