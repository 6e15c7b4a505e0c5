"""``favor-np demo``: one screen, and an honest word on short series."""

import numpy as np

from favor_np.cli import main


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
        "within error bars",
        "simulated minutes: FAVOR+ pays",
        "by more than chance, and worse than a moving average",
    ):
        assert part in out, part


def test_a_short_series_is_called_short(capsys, tmp_path):
    prices = 30 * np.exp(np.cumsum(0.01 * np.random.default_rng(0).standard_normal(300)))
    path = tmp_path / "short.csv"
    path.write_text("\n".join(["Close", *map(str, prices)]))
    assert main(["demo", str(path), "--rows", "10000"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "short.csv: your series is short, take exact attention: from" in out


def test_a_missing_file_is_one_line(capsys):
    assert main(["demo", "no-such-file.csv"]) == 2
    assert capsys.readouterr().err.startswith("favor-np: error: no-such-file.csv: ")
