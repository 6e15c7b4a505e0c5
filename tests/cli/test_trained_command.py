"""``favor-np forecast --model performer``: what it prints, writes, saves and refuses."""

import csv
import json

import numpy as np
import pytest
from support.forecasting import run

from favor_np.cli import main
from favor_np.forecast import PerformerForecaster, inputs, read_prices

QUICK = ["--model", "performer", "--epochs", "1", "--members", "1"]


@pytest.fixture
def series(tmp_path):
    """A file of hourly prices whose volatility has clusters and hours."""

    def make(rows=800, step=60):
        rng = np.random.default_rng(0)
        level = np.sin(np.arange(rows) / 60) + np.cos(2 * np.pi * np.arange(rows) / 24)
        prices = 30 * np.exp(np.cumsum(0.01 * np.exp(level / 2) * rng.standard_normal(rows)))
        times = np.datetime64("2024-01-01T00:00") + step * np.arange(rows)
        path = tmp_path / f"{rows}-{step}.csv"
        lines = [f"{t}:00Z,{p:.6f}" for t, p in zip(times, prices, strict=True)]
        path.write_text("\n".join(["Timestamp,Close", *lines]))
        return str(path)

    return make


@pytest.mark.parametrize("target", ["volatility", "return"])
def test_a_report(target, series, capsys, tmp_path):
    picture = tmp_path / "out.png"
    out = run(capsys, series(), *QUICK, "--target", target, "--plot", str(picture))
    told = [
        line for line in out.splitlines() if not line.startswith("Wrote ")
    ]  # a path has any length
    assert max(map(len, told)) <= 80
    parts = ["METHOD", "NEXT STEP after", "interval", "for 90 % of such moves", "WALK-FORWARD 400",
             "its start", "Performer is", "by Diebold and Mariano", "after shocks"]  # fmt: skip
    parts += {
        "volatility": ["constant", "EWMA", "HAR", "GARCH", "HAR and attention", "QLIKE"],
        "return": ["zero", "mean so far", "predicted move", "hit rate"],
    }[target]
    words = " ".join(out.split())
    for part in parts:
        assert part in words
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_and_csv_say_the_same(series, capsys, tmp_path):
    path, table = series(), tmp_path / "out.csv"
    data = json.loads(
        run(capsys, path, *QUICK, "--target", "volatility", "--json", "--csv", str(table))
    )
    rows = list(csv.DictReader(table.read_text().splitlines()))
    past = data["past"]
    assert len(rows) == past["forecasts"]
    assert rows[-1]["outcome"] == ""
    assert rows[0]["time"] == "2024-01-17T16:00:00"
    for name in ("constant", "ewma", "har", "garch", "har_and_attention", "its_start", "performer"):
        deviation, outcome = (
            100 * np.array([float(row[column]) for row in rows[:-1]])
            for column in (name, "outcome")
        )
        known = next(m for n, m in past["models"].items() if n.lower().replace(" ", "_") == name)
        loss = np.mean((outcome / deviation) ** 2 + 2 * np.log(deviation))
        assert known["loss"] == pytest.approx(loss, rel=1e-6)
    held = [
        float(r["low"]) <= float(r["outcome"]) <= float(r["high"]) for r in rows[:-1] if r["low"]
    ]
    assert past["interval"]["coverage"] == pytest.approx(np.mean(held))
    following = data["next"]
    assert following["low"] < 0 < following["standard_deviation"] < following["high"]


def test_what_was_saved_forecasts_at_once(series, capsys, tmp_path):
    path, saved = series(), str(tmp_path / "model.safetensors")
    target = ["--target", "volatility", "--json"]
    first = json.loads(run(capsys, path, *QUICK, *target, "--save", saved))
    again = json.loads(run(capsys, path, "--model", "performer", "--load", saved, "--json"))
    for name, value in first["next"].items():
        assert again["next"][name] == pytest.approx(value, rel=1e-5)
    assert "past" not in again
    X = inputs(read_prices(path))
    model = PerformerForecaster(epochs=1, members=1).fit(X)
    deviation = 100 * again["next"]["standard_deviation"]
    assert deviation == pytest.approx(np.sqrt(model.predict()[-1]), rel=1e-5)
    out = run(capsys, path, "--model", "performer", "--load", saved)
    assert "nothing was trained now" in out
    assert "WALK-FORWARD" not in out


def test_overlapping_outcomes_are_judged_without_overlap_as_well(series, capsys):
    path = series()
    argv = [path, "--model", "performer", "--epochs", "0", "--horizon", "4"]
    words = " ".join(run(capsys, *argv).split())
    data = json.loads(run(capsys, *argv, "--json"))
    z = data["past"]["models"]["zero"]["z_thinned"]
    assert f"z by every 4th forecast alone: zero {z:+.1f}, mean so far" in words


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "performer", "--window", "5"], "--window is not for --model performer"),
        (["--model", "performer", "--features", "64"], "--features is not for --model performer"),
        (["--model", "performer", "--replay"], "--replay is not for --model performer"),
        (["--epochs", "3"], "--epochs is not for --model attention"),
        (["--load", "x"], "--load is not for --model attention"),
        (["--model", "performer", "--load", "x", "--csv", "y"], "leave out --csv"),
        (["--model", "performer", "--load", "none"], "No such file"),
        (["--model", "performer", "--save", "none/x"], "the directory"),
    ],
)
def test_bad_options_are_one_line(argv, message, series, capsys):
    assert main(["forecast", series(), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_bad_series_are_one_line(series, capsys, tmp_path):
    saved = str(tmp_path / "model.safetensors")
    run(capsys, series(), *QUICK, "--save", saved)
    load = ["--model", "performer", "--load", saved]
    for path, argv, message in (
        (series(300), QUICK, "299 returns, and --model performer needs 600"),
        (series(800, 1440), load, "trained on 32 columns"),
        (series(), [*load, "--horizon", "3"], "trained for a horizon of 1, not 3"),
        (series(90), load, "need 100 returns to go on from, got 89"),
    ):
        assert main(["forecast", path, *argv]) == 2
        assert message in capsys.readouterr().err
