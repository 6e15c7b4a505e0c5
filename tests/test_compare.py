"""``favor-np compare`` and what it is made of."""

import dataclasses
import json
import math
import sys
import time

import numpy as np
import pytest

from favor_np import compare, feature_map, measure
from favor_np.cli import compare as program
from favor_np.cli import main

SMALL = ["--features=16,256", "--lengths=64,128", "--time-features=16", "--dim=16", "--seeds=4"]


def run(*options):
    return main(["compare", *SMALL, *options])


@pytest.fixture(scope="module")
def result():
    return compare.compare(
        compare.Setting(dim=16, seed=3),
        features=[16, 64, 256],
        lengths=[64, 256],
        time_features=[16, 32],
    )


def test_error_falls_with_features_and_with_better_projections(result):
    error = {(r.features, r.projection, r.antithetic): r.mean for r in result.errors}
    assert len(error) == 12
    for kind, antithetic in compare.VARIANTS:
        # 16 times the features: a quarter of the error.
        ratio = error[16, kind, antithetic] / error[256, kind, antithetic]
        assert 2 < ratio < 8
    assert error[256, "orthogonal", True] < error[256, "iid", False]
    assert all(0 < row.spread < row.mean for row in result.errors)


def test_error_is_the_relative_error_of_the_output(result):
    setting = result.setting
    q, k, v = setting.inputs(result.error_length)
    x, y = (a.astype(np.float64) * 16**-0.25 for a in (q, k))
    weights = np.exp(x @ y.T)
    exact = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(setting.exact([q, k, v]), exact, atol=1e-5)
    errors = []
    for seed in range(3, 11):
        fm = feature_map("positive", dim=16, num_features=64, rng=seed)
        weights = fm.query_features(q) @ fm.key_features(k).T
        out = weights / weights.sum(1, keepdims=True) @ v
        errors.append(math.sqrt(((out - exact) ** 2).mean() / (exact**2).mean()))
    row = next(
        r
        for r in result.errors
        if (r.features, r.projection, r.antithetic) == (64, "orthogonal", True)
    )
    assert row.mean == pytest.approx(np.mean(errors), rel=1e-3)
    assert row.spread == pytest.approx(np.std(errors), rel=1e-2)


def test_costs_are_there_for_each_length_and_map(result):
    assert [(r.length, r.features) for r in result.costs] == [
        (64, 16),
        (64, 32),
        (256, 16),
        (256, 32),
    ]
    assert all(r.favor_seconds > 0 and r.exact_seconds > 0 for r in result.costs)
    assert {r.matrix_bytes for r in result.costs} == {4 * 64**2, 4 * 256**2}
    assert list(result.crossings) == [16, 32]


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([0.5, 2, 4], math.sqrt(100 * 1000)),
        ([0.5, 0.5, 0.9], None),
        ([1.5, 2, 4], 100),
        ([2, 0.5, 2], math.sqrt(1000 * 10000)),  # the last time that they cross
        ([0.1, 10, 100], math.sqrt(100 * 1000)),
        ([0.5, 0.5, 2], math.sqrt(1000 * 10000)),
    ],
    ids=["between", "never", "always", "twice", "steep", "late"],
)
def test_crossing(speedups, expected):
    found = compare.crossing([100, 1000, 10000], speedups)
    assert found == (None if expected is None else pytest.approx(expected))
    assert compare.crossing([10000, 1000, 100], speedups[::-1]) == found


def test_crossing_of_nothing():
    assert compare.crossing([], []) is None


def test_progress_ends_at_the_total():
    seen = []
    compare.compare(
        compare.Setting(dim=8),
        features=[8],
        lengths=[16, 32],
        time_features=[8],
        seeds=1,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [("comparing", i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    "options",
    [{"features": [7]}, {"features": [0]}, {"lengths": [0]}, {"seeds": 0}, {"time_features": [3]}],
    ids=str,
)
def test_bad_counts_are_refused(options):
    with pytest.raises(ValueError, match=r"must be"):
        compare.compare(compare.Setting(dim=8), **options)


def test_peak_memory_sees_an_array_that_is_gone_again():
    megabytes = 64
    measured = measure.peak_memory(lambda: np.ones(megabytes * 2**17).sum())
    assert 0.9 * megabytes < measured / 2**20 < 1.5 * megabytes


def test_peak_memory_without_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    test_peak_memory_sees_an_array_that_is_gone_again()


def test_best_time_is_that_of_the_fastest_call():
    seconds = iter([0.03, 0.001, 0.02])
    assert (
        0.001 <= measure.best_time(lambda: time.sleep(next(seconds)), budget=0.02, least=3) < 0.02
    )


def test_tables_fit_a_terminal(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "antithetic" in out
    assert "At L = 128, L²d is 8 times Lmd in operations; measured: " in out


def test_wide_numbers_still_fit(result):
    rows = [
        compare.CostRow(length, 64, 12.3, 9876.5, 123 * 2**20, 999 * 2**30)
        for length in (64, 9999999)
    ]
    lines = program._report(dataclasses.replace(result, costs=rows, crossings={64: 1234567.8}))
    assert max(map(len, lines)) <= 80


def test_json(capsys):
    assert run("--json", "--causal", "--seed=5", "--threads=1") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["setting"] == {"dim": 16, "std": 0.35, "causal": True, "seed": 5, "num_threads": 1}
    assert [row["length"] for row in data["costs"]] == [64, 128]
    assert {"speedup", "matrix_bytes", "favor_bytes"} <= set(data["costs"][0])
    assert len(data["errors"]) == 8
    assert set(data["crossings"]) == {"16"}


@pytest.mark.parametrize("causal", [False, True])
def test_pictured_weights_are_exact_and_near_it(result, causal):
    setting = dataclasses.replace(result.setting, causal=causal)
    figure = dataclasses.replace(result, setting=setting, crossings={4096: None}).plot()
    exact, favor = (axes.images[0].get_array().data for axes in figure.axes[3:5])
    keys = (
        np.arange(1, compare.POSITIONS + 1)
        if causal
        else np.full(compare.POSITIONS, compare.POSITIONS)
    )
    np.testing.assert_allclose(exact.sum(1), keys)
    np.testing.assert_allclose(favor.sum(1), keys)
    assert (np.triu(favor, 1) == 0).all() == causal
    assert abs(favor - exact).std() < 0.1 * exact.std()
    assert np.argmax(exact[48]) in range(45, 52)  # the nearest keys count most
    limits = {axes.images[0].get_clim() for axes in figure.axes[3:5]}
    assert limits == {(0, exact.max())}
    drawn = [line.get_ydata() for line in figure.axes[5].lines]
    np.testing.assert_array_equal(drawn[::2], exact[24::24])
    np.testing.assert_array_equal(drawn[1::2], favor[24::24])


def test_plot(tmp_path, capsys):
    target = tmp_path / "picture.png"
    assert run(f"--plot={target}") == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert str(target) in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    [
        "--features=3",
        "--features=",
        "--lengths=0",
        "--dim=x",
        "--std=nan",
        "--seeds=0",
        "--threads=0",
    ],
)
def test_bad_options_are_one_line(option, capsys):
    with pytest.raises(SystemExit) as stop:
        run(option)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "is not" in err


@pytest.mark.parametrize("name", ["missing/picture.png", "picture.xyz", "."])
def test_pictures_that_cannot_be_are_known_at_once(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "compare", None)
    assert run(f"--plot={tmp_path / name}") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_plot_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(f"--plot={tmp_path / 'picture.png'}") == 2
    assert "pip install 'favor_np[plot]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
