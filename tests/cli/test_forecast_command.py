"""``favor-np forecast``: what it prints and writes, and what it says to bad input."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from support.forecasting import run, unexpected

from favor_np.cli import main
from favor_np.forecast import read_prices

QUICK = ["--features", "64"]


@pytest.fixture
def series(tmp_path):
    """A small file of hourly prices."""

    def make(rows=400, name="hours.csv"):
        rng = np.random.default_rng(rows)
        prices = 30 * np.exp(np.cumsum(0.01 * rng.standard_normal(rows)))
        times = np.datetime64("2024-01-01T00:00") + 60 * np.arange(rows)
        path = tmp_path / name
        lines = [f"{t}:00Z,{p:.4f}" for t, p in zip(times, prices, strict=True)]
        path.write_text("\n".join(["Timestamp,Close", *lines]))
        return str(path)

    return make


def test_default_run_prints_what_was_promised(capsys):
    out = run(capsys)
    assert max(map(len, out.splitlines())) <= 80
    for part in (
        "WTI crude oil",
        "10,225 of 10,226 rows",
        "1 x price not above zero (line 8,645)",
        "10,192 windows of 32 returns",
        "mean of s = |x + y|² is 2.00: good",
        "auto, on the first 256 windows",
        "NEXT STEP after 2026-08-18, price 86.48",
        "predicted move",
        "P(up)",
        "SIGNAL",
        "hit rate",
        "95 % interval",
        "zero forecast",
        "exact attention",
        "no better than the zero forecast",
        "after costs of 0.02 %",
        "buy and hold",
        "steady risk",
        "the more frequent direction so far",
        "peak extra memory",
        "correlation 0.98",
        "of the standard error of the",
        "random features",
        "they hold here (95 %",
        "steps are longer, up to 5 days",
        "252: counted over 40.6 years",
    ):
        assert part in out, part
    assert "windows on, with the calibration" in " ".join(out.split())
    assert "WARNING" not in out
    assert "\N{NO-BREAK SPACE}" not in out


def test_volatility_and_the_bad_regime(capsys):
    out = run(capsys, "--target", "volatility", *QUICK)
    for part in ("log absolute returns", "better than the constant", "exponential", "no direction"):
        assert part in out, part
    out = run(capsys, "--scale", "0.125", *QUICK)
    assert "WARNING" in out
    assert "2 times the limit 4 of the" in out
    assert "--scale 0.062 or less" in " ".join(out.split())


@pytest.mark.parametrize("target", ["return", "volatility"])
@pytest.mark.parametrize("horizon", ["1", "24"])
def test_text_is_80_columns_wide_whatever_the_series(capsys, series, target, horizon):
    path = series(300, "a-file-with-quite-a-long-name-" + "x" * 60 + ".csv")
    out = run(capsys, path, "--target", target, "--horizon", horizon, "--scale", "9", *QUICK)
    assert max(map(len, out.splitlines())) <= 80
    assert "1 hour apart" in " ".join(out.split())


def test_json_has_the_same_facts(capsys, series):
    data = json.loads(run(capsys, "--json", *QUICK))
    assert data["input"]["rows"] == 10226
    assert data["input"]["dropped"]["price not above zero"] == {"rows": 1, "first_line": 8645}
    assert data["next"]["signal"] in ("BUY", "SELL", "HOLD")
    assert 0 < data["next"]["chance"] < 1
    assert data["past"]["hit_low"] < data["past"]["hit_rate"] < data["past"]["hit_high"]
    assert data["past"]["forecasts"] == 9691 == sum(data["past"]["signals"].values())
    text = " ".join(run(capsys, *QUICK).split())
    for name, count in data["past"]["signals"].items():
        assert f"{count:,} {name}" in text
    assert data["favor"]["seconds"] > 0
    assert data["exact"]["peak_bytes"] > 0
    assert data["settings"]["features"] == 64
    assert data["settings"]["calibrated_from"] == 256
    assert 0 < data["error_bars"]["effective_sample_size"] < 64
    assert 0.5 < data["error_bars"]["inside"] < 1
    plain = json.loads(run(capsys, "--json", "--calibration", "none", *QUICK))
    assert plain["settings"]["calibrated_from"] is None
    assert plain["exact"]["rmse"] > data["exact"]["rmse"]
    volatility = json.loads(run(capsys, series(), "--json", "--target", "volatility", *QUICK))
    assert volatility["next"]["chance_down"] is None
    assert volatility["past"]["r2"] < 1


@pytest.mark.parametrize("target", ["return", "volatility"])
def test_csv_has_every_forecast(capsys, series, tmp_path, target):
    path, out = series(), tmp_path / "out.csv"
    text = run(capsys, path, "--csv", str(out), "--target", target, "--window", "20", *QUICK)
    assert f"Wrote {out}" in " ".join(text.split())
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 400 - 20 - 1
    assert rows[0]["time"] == "2024-01-01T21:00:00"
    assert rows[-1]["outcome"] == ""
    assert rows[-1]["exact"] != ""
    assert all(0 < float(row["effective_sample_size"]) <= 64 for row in rows)
    assert float(rows[-1]["standard_error"]) > 0
    with open(path) as file:
        prices = [float(row["Close"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose([float(row["price"]) for row in rows], prices[21:])
    outcome = np.diff(np.log(prices[21:]))
    outcome = np.abs(outcome) if target == "volatility" else outcome
    np.testing.assert_allclose([float(row["outcome"]) for row in rows[:-1]], outcome, atol=1e-9)
    if target == "return":
        assert {row["signal"] for row in rows} <= {"BUY", "SELL", "HOLD"}


def test_csv_keeps_fractions_of_seconds_and_reads_back_whole(capsys, tmp_path):
    path, out = tmp_path / "quarters.csv", tmp_path / "out.csv"
    prices = 101.123456789012 + np.sin(np.arange(120))
    lines = [f"{1735689600000 + 250 * i},{price!r}" for i, price in enumerate(prices.tolist())]
    path.write_text("\n".join(["timestamp,price", *lines]))
    run(capsys, str(path), "--csv", str(out), "--window", "8", *QUICK)
    again = read_prices(out)
    np.testing.assert_array_equal(again.values, prices[-len(again) :])
    assert len(again) == 120 - 8 - 1
    assert again.dropped == {}
    assert again.step == "0.25 seconds"
    assert str(again.times[-1]) == "2025-01-01T00:00:29.750000"


def test_what_the_user_says_of_the_file(capsys, tmp_path):
    path = tmp_path / "two.csv"
    rows = [
        f"{1 + i // 12:02}/{1 + i % 12:02}/2024;{name};{price + i % 7},5"
        for i in range(120)
        for name, price in (("AAA", 10), ("BBB", 500))
    ]
    path.write_text("\n".join(["Date;Ticker;Close", *rows, "n/a;AAA;x"]))
    expect_error(capsys, "--symbol", str(path), "--day-first")
    expect_error(
        capsys, "--day-first, --no-day-first or --date-format", str(path), "--symbol", "AAA"
    )
    for told in (["--no-day-first"], ["--date-format", "%m/%d/%Y"]):
        out = run(capsys, str(path), "--symbol", "AAA", *told, "--json", *QUICK)
        data = json.loads(out)["input"]
        assert (data["used"], data["first"], data["last"]) == (120, "2024-01-01", "2024-10-12")
        assert "decimal comma" in data["note"]
    told = ["--symbol", "AAA", "--no-day-first"]
    expect_error(capsys, "1 of 121 rows are unusable", str(path), *told, "--allow-missing", "0")
    with pytest.raises(SystemExit):
        main(["forecast", str(path), "--allow-missing", "5"])
    assert "not a share" in capsys.readouterr().err


def test_csv_without_times(capsys, tmp_path):
    path, out = tmp_path / "p.csv", tmp_path / "out.csv"
    path.write_text("price\n" + "\n".join(str(10 + i % 7) for i in range(100)))
    assert "no time column" in run(capsys, str(path), "--csv", str(out), *QUICK)
    with out.open() as file:
        assert next(csv.DictReader(file))["row"] == "34"


def test_threshold_and_cost_are_in_percent(capsys, series):
    path = series()
    data = json.loads(run(capsys, path, "--json", "--threshold", "0.5", "--cost", "0.1", *QUICK))
    assert data["past"]["threshold"] == pytest.approx(0.005)
    assert data["past"]["cost"] == pytest.approx(0.001)
    data = json.loads(run(capsys, path, "--json", "--cost", "0.1", *QUICK))
    assert data["past"]["threshold"] == pytest.approx(0.001)


def test_seed_decides_and_threads_do_not(capsys, series):
    path = series()
    moves = [
        json.loads(run(capsys, path, "--json", *QUICK, *more))["next"]["move"]
        for more in ([], ["--seed", "0", "--threads", "1"], ["--seed", "1"])
    ]
    assert moves[0] == moves[1] != moves[2]


def test_error_bars_that_do_not_hold_are_said_to_be_too_small(capsys):
    """What is said follows from the measured share: all forecasts share one draw of features."""
    options = ["--scale", "0.1875", "--features", "256", "--seed", "1"]
    data = json.loads(run(capsys, *options, "--json"))["error_bars"]
    assert data["inside"] < 0.9
    assert data["needed"] > 2
    text = " ".join(run(capsys, *options).split())
    assert f"{100 * data['inside']:.1f} % of the differences" in text
    assert f"too small, it takes {data['needed']:.2g} for 95 %" in text
    assert "by the differences found in the past" in text
    assert "hold here" not in text


def test_one_window_that_decides_alone_has_no_standard_error(capsys, series):
    out = " ".join(run(capsys, series(), "--scale", "10000", *QUICK).split())
    assert "standard error unknown, from 1 effective past windows: the move does not" in out
    data = json.loads(run(capsys, series(), "--scale", "10000", "--json", *QUICK))
    assert data["next"]["standard_error"] is None


def test_sessions_are_counted_and_a_constant_has_no_sharpe_ratio(capsys, tmp_path):
    path = tmp_path / "minutes.csv"
    times = np.datetime64("2024-03-04T14:30") + np.arange(390)
    rows = [f"{t},{100 * 1.0001**i:.9f}" for i, t in enumerate(times)]
    path.write_text("\n".join(["Time,Close", *rows]))
    out = run(capsys, str(path), "--cost", "0", *QUICK)
    assert "98,280: 390 a session, 252 sessions" in out
    assert "buy and hold      +2.7 %, Sharpe undefined" in out
    assert "strategy and buying and holding earned an equal sum" in " ".join(out.split())
    assert "(z over 1,000)" in out
    data = json.loads(run(capsys, str(path), "--json", "--cost", "0", *QUICK))["past"]
    assert [data[way]["sharpe"] for way in ("strategy", "hold")] == [None, None]
    assert data["steps_per_year"] == 98280
    hours = [f"{t},{30 + i % 7}" for i, t in enumerate(times[0] + 60 * np.arange(150) +
             np.repeat(np.arange(15), 10) * 60 * 14)]  # fmt: skip
    path.write_text("\n".join(["Time,Close", *hours]))
    out = " ".join(run(capsys, str(path), *QUICK).split())
    assert "14 of 149 steps are longer, up to 15 hours; each counts as one, and moves over" in out


@pytest.mark.parametrize("target", ["return", "volatility"])
def test_replay(capsys, series, target):
    path = series(3000)
    options = [path, "--replay", "--target", target, "--horizon", "2", *QUICK]
    out = run(capsys, *options)
    assert max(map(len, out.splitlines())) <= 80
    section = out[out.index("REPLAY of 3,000 prices") :].splitlines()
    assert ("2,966 of 2,966 signals" in " ".join(out.split())) == (target == "return")
    for part in ("memory            a state of ", "latency           p50 ", ", p90 ", ", p99 "):
        assert part in out, part
    counts = [int(line[20:].split()[0].replace(",", "")) for line in section if "µs  " in line]
    assert sum(counts) == 3000 - 32 - 2
    data = json.loads(run(capsys, *options, "--json"))["replay"]
    assert data["forecasts"] == sum(counts)
    assert data["difference"] < 1e-5
    assert data["same_signals"] == (sum(counts) if target == "return" else None)
    assert 0 < data["seconds"]["p50"] <= data["seconds"]["p99"] <= data["seconds"]["max"]
    assert "REPLAY" not in run(capsys, *options[:1], *QUICK)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(capsys, series, tmp_path, suffix):
    out = tmp_path / f"out.{suffix}"
    run(capsys, series(), "--plot", str(out), *QUICK)
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert {p.name for p in tmp_path.iterdir()} == {"hours.csv", out.name}


def test_column_and_standard_input(series, tmp_path):
    path = tmp_path / "two.csv"
    path.write_text("a,b\n" + "\n".join(f"{i % 5 + 1},{i % 3 + 1}" for i in range(80)))
    command = [sys.executable, "-m", "favor_np.cli", "forecast", "-", "--column", "b", *QUICK]
    done = subprocess.run(command, input=path.read_bytes(), capture_output=True, check=True)
    assert b"standard input, column b" in done.stdout
    assert unexpected(done.stderr.decode()) == []


GOOD = "\n".join(f"2024-01-{i:02},{i % 3 + 1}" for i in range(1, 29))
BAD = {
    "empty": b"",
    "blank": b"\n \n",
    "binary": bytes(range(256)) * 10,
    "picture": b"\x89PNG\r\n\x1a\n\x00\x00",
    "header only": b"Date,Price\n",
    "one row": b"Date,Price\n2024-01-01,5\n",
    "equal": b"Date,Price\n" + b"".join(b"2024-01-%02d,5\n" % i for i in range(1, 29)),
    "nan": b"Date,Price\n" + b"".join(b"2024-01-%02d,nan\n" % i for i in range(1, 29)),
    "text": b"Date,Price\n" + b"".join(b"2024-01-%02d,abc\n" % i for i in range(1, 29)),
    "negative": b"Date,Price\n" + b"".join(b"2024-01-%02d,-4\n" % i for i in range(1, 29)),
    "two prices": b"Date,Price,Close\n2024-01-01,1,2\n2024-01-02,2,1\n",
    "two numbers": b"a,b\n1,2\n2,1\n",
    "no number": b"a,b\nx,y\nz,w\n",
    "dates of a kind unknown": b"Date,Price\n01/13/2024,1\n01/14/2024,2\n",
    "jump": b"Date,Price\n2023-12-31,1e150\n" + GOOD.encode(),
    "too short": b"Date,Price\n" + GOOD.encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_and_status_2(name, tmp_path, capsys):
    path = tmp_path / "bad.csv"
    path.write_bytes(BAD[name])
    expect_error(capsys, "bad.csv", str(path))


def expect_error(capsys, part, *argv):
    assert main(["forecast", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("favor-np: error: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err


def test_bad_paths_are_one_line_and_status_2(tmp_path, capsys, series):
    path = series()
    expect_error(capsys, "No such file", str(tmp_path / "none.csv"))
    expect_error(capsys, "s a directory", str(tmp_path))
    expect_error(capsys, 'no column "gold"', path, "--column", "gold")
    expect_error(capsys, "s a directory", path, "--csv", str(tmp_path))
    expect_error(capsys, "does not exist", path, "--csv", str(tmp_path / "no" / "out.csv"))
    expect_error(capsys, "would overwrite", path, "--csv", path)
    expect_error(capsys, "would overwrite", path, "--csv", "x.png", "--plot", "x.png")
    expect_error(capsys, "a picture is one of", path, "--plot", str(tmp_path / "out.gif"))
    expect_error(capsys, "too few", path, "--window", "399")
    expect_error(capsys, "too few", path, "--horizon", "1000000")
    assert [p.name for p in tmp_path.iterdir()] == ["hours.csv"]


def test_plot_without_matplotlib_is_known_before_the_work(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    expect_error(capsys, "pip install 'favor_np[plot]'", "none.csv", "--plot", "x.png")


def test_no_traceback_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "favor_np.cli", "forecast", str(tmp_path / "none.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("favor-np: error: ")
    assert done.stderr.count("\n") == 1


def test_volatility_is_forecast_by_models_as_well(capsys, series):
    out = " ".join(run(capsys, "--target", "volatility", *QUICK).split())
    for part in (
        "MODELS that are refitted as they would have been, 9,224 forecasts",
        "EWMA QLIKE 2.6129, R² +0.150",
        "HAR and attention is better than the constant (p = 0.00",
        "90 % of the next moves; such intervals held 90.0 %, in calm, usual and wild times 8",
    ):
        assert part in out, part
    options = ("--target", "volatility", "--horizon", "2", "--json", *QUICK)
    models = json.loads(run(capsys, series(700), *options))["models"]
    assert models["forecasts"] == 350
    assert list(models["models"]) == ["constant", "EWMA", "HAR", "HAR and attention"]
    interval = models["interval"]
    assert interval["next_low"] == -interval["next_high"] < 0
    assert 0.8 < interval["coverage"] < 1
    size = models["models"]["EWMA"]["next_standard_deviation"]
    assert size == pytest.approx(0.014, rel=0.3)  # of two steps of one percent
    assert "models" not in json.loads(run(capsys, series(400), *options))  # too few to refit
