"""``favor-np compare`` and what it is made of."""

import dataclasses
import gc
import io
import json
import math
import sys
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from favor_np import compare, feature_map, measure
from favor_np.cli import compare as program
from favor_np.cli import main
from favor_np.compare import _plot
from favor_np.compare._methods import DEFAULT, METHODS

SMALL = ["--features=16,256", "--lengths=64,128", "--time-features=16", "--dim=16", "--seeds=2"]
SMALL += ["--windows=16,64,128"]


def run(*options):
    return main(["compare", *SMALL, *options])


@pytest.fixture(scope="module")
def result():
    return compare.compare(
        compare.Setting("gaussian", dim=16, seed=3),
        features=[16, 64, 256],
        lengths=[64, 256],
        time_features=[16, 32],
        windows=[16, 64, 256],
        seeds=4,
    )


def test_error_falls_with_features_and_with_better_methods(result):
    error = {(r.features, r.method): r.mean for r in result.errors}
    assert len(error) == 3 * len(METHODS)
    for method in METHODS:
        # 16 times the features: a quarter of the error; a bias is no smaller.
        assert 2 < error[16, method.name] / error[256, method.name] < 8
    names = ("FAVOR+ iid", "FAVOR+", "antithetic", "FAVOR++ oprf", "auto")
    ranked = [error[256, name] for name in names]
    assert ranked == sorted(ranked, reverse=True)
    assert all(0 < row.spread < row.mean for row in result.errors)


@pytest.mark.parametrize(("data", "rival"), [("prices", "FAVOR+"), ("volatility", "antithetic")])
def test_methods_that_know_the_past_are_better_on_real_prices(data, rival):
    result = compare.compare(
        compare.Setting(data), features=[256], seeds=3, lengths=[], time_features=[]
    )
    assert result.tokens[:2] == (1, 1024)
    assert result.error("auto uncentred", 256).mean < 0.6 * result.error(rival, 256).mean
    assert result.costs == []


def test_maps_know_none_of_the_tokens_that_are_attended():
    tokens = compare.Setting("prices").tokens(300)
    assert tokens.q.shape == tokens.known_q.shape == (1, 300, 32)
    assert not (tokens.q[0, :, None] == tokens.known_q[0]).all(-1).any()
    other = tokens._replace(q=9 * tokens.q[:, ::-1], k=-tokens.k)
    for method in METHODS:
        assert method.feature_map(tokens, 32, 0) == method.feature_map(other, 32, 0)


def test_error_is_the_relative_error_of_the_output(result):
    setting = result.setting
    tokens = setting.tokens(1024)
    q, k = tokens.q[0], tokens.k[0]
    v = np.random.default_rng(3).standard_normal((1, 1024, 16))[0]
    x, y = (a.astype(np.float64) * 16**-0.25 for a in (q, k))
    weights = np.exp(x @ y.T)
    exact = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(setting.exact([q, k, v]), exact, atol=1e-5)
    errors = []
    for seed in range(3, 7):
        fm = feature_map("positive", dim=16, num_features=64, rng=seed)
        weights = fm.query_features(q) @ fm.key_features(k).T
        out = weights / weights.sum(1, keepdims=True) @ v
        errors.append(math.sqrt(((out - exact) ** 2).mean() / (exact**2).mean()))
    row = result.error("antithetic", 64)
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
        compare.Setting("gaussian", dim=8),
        features=[8],
        lengths=[16, 32],
        time_features=[8],
        windows=[8, 16, 32],
        seeds=1,
        progress=lambda *step: seen.append(step),
    )
    total = len(METHODS) + 4 + 2
    assert seen == [("comparing", i, total) for i in range(1, total + 1)]


@pytest.mark.parametrize(
    "options",
    [
        {"features": [7]},
        {"features": [0]},
        {"lengths": [0]},
        {"seeds": 0},
        {"time_features": [3]},
        {"windows": [0]},
    ],
    ids=str,
)
def test_bad_counts_are_refused(options):
    with pytest.raises(ValueError, match=r"must be"):
        compare.compare(compare.Setting(dim=8), **options)


def test_peak_memory_sees_an_array_that_is_gone_again():
    megabytes = 64
    measured = measure.peak_memory(lambda: np.ones(megabytes * 2**17).sum())
    assert 0.9 * megabytes < measured / 2**20 < 1.5 * megabytes


def test_measuring_collects_no_garbage():
    """In a process with many objects that takes seconds, and a forecast is measured."""
    collected = []

    def note(phase, info):
        collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        measure.peak_memory(int)
    finally:
        gc.callbacks.remove(note)
    assert 2 not in collected


def test_peak_memory_without_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    test_peak_memory_sees_an_array_that_is_gone_again()


def test_best_time_is_that_of_the_fastest_call(monkeypatch):
    clock, seconds = [0.0], iter([0.03, 0.001, 0.02])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call():
        clock[0] += next(seconds)

    assert measure.best_time(call, budget=0.02, least=3) == pytest.approx(0.001)
    assert next(seconds, None) is None


def test_tables_fit_a_terminal(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "antithetic" in out
    assert "At L = 128, L²d is 8 times Lmd in operations; measured: " in out
    assert "Prefer exact attention" in out
    assert all(f"\n{method.name} " in out for method in METHODS)
    assert out.count("\nantithetic * ") == out.count("\n* the default of feature_map\n") == 1
    assert "Time, and extra memory with the result: antithetic *, m = 16" in out
    assert "antithetic       exact    faster  antithetic       exact" in out
    assert "Time with a window, causal, L = 128: exact attention and antithetic * with m" in out
    assert "\n  window       exact        m = 16\n      16" in out
    assert "\n      64" in out
    assert "\n     128 " in out.partition("Time with a window")[0]
    assert "\n     128 " not in out.partition("Time with a window")[2]  # no window at that length
    assert "With a window, prefer it up to" in out


def test_the_map_that_is_marked_is_the_default():
    tokens = compare.Setting("prices").tokens(50)
    default = feature_map("positive", dim=32, num_features=64, scale=tokens.scale, rng=3)
    assert DEFAULT in METHODS
    assert DEFAULT.feature_map(tokens, 64, 3) == default
    assert len({method.name for method in METHODS}) == len(METHODS)


def test_wide_numbers_still_fit(result):
    rows = [
        compare.CostRow(length, 64, 12.3, 9876.5, 123 * 2**20, 999 * 2**30)
        for length in (64, 9999999)
    ]
    windows = [compare.WindowRow(9999999, 9999999, m, 12.3, 9876.5, 9876.5) for m in range(64, 80)]
    lines = program._report(
        dataclasses.replace(result, costs=rows, crossings={64: 1234567.8}, windows=windows)
    )
    assert max(map(len, lines)) <= 80
    errors = [
        compare.ErrorRow(m, method.name, mean, spread)
        for method in METHODS
        for m, mean, spread in [(16, 1e9, 1e8), (2048, 9.99, 99), (65536, 0.999, 0.5)]
    ]
    many = dataclasses.replace(result, errors=errors, setting=compare.Setting("x" * 99 + ".npz"))
    assert max(map(len, program._report(many))) <= 80


def test_advice_on_windows(result):
    assert {(row.window, row.length, row.features) for row in result.windows} == {
        (window, 256, m) for window in (16, 64) for m in (16, 32)
    }
    assert all(row.speedup == row.favor_seconds / row.exact_seconds for row in result.windows)
    rows = [
        compare.WindowRow(window, 4096, m, 4.0, 1.5, exact)
        for m in (16, 64)
        for window, exact in ((64, 1.0), (256, 2.0), (1024, 3.0 if m == 16 else 8.0))
    ]
    _, advice, *_ = dataclasses.replace(result, windows=rows).advice()
    assert "up to 1,024 at least (m = 16) and 512 (m = 64) positions" in advice
    assert "and up to 144 (m = 16) and 144 (m = 64) faster than those that see everything" in advice


def test_advice(result):
    """Exact attention where it is faster, where errors matter, and always if nothing helps."""

    def words(crossings, *errors):
        rows = [
            compare.ErrorRow(64, name, e, 0.0)
            for name, e in zip(("antithetic", "auto"), errors, strict=False)
        ]
        return " ".join(dataclasses.replace(result, crossings=crossings, errors=rows).advice())

    assert "for lengths below 321 (m = 16): there it is faster" in words({16: 321.0})
    assert "below 256 at least (m = 16)" in words({16: None})
    good = words({}, 0.2, 0.05)
    assert "an error of 5.0% of the output is too much" in good
    assert "An error of 10% takes over 64 with antithetic (the default) and 64 with auto" in good
    assert "An error of" not in words({}, 0.3, 0.2)
    assert "at any length for queries and keys like these" in words({}, 9.0, 0.5)


# -- Files of queries and keys --------------------------------------------------------------------


def test_a_file_of_queries_and_keys(tmp_path, capsys):
    q, k = np.random.default_rng(0).standard_normal((2, 3, 2, 40, 16))
    half, whole = tmp_path / "half.npz", tmp_path / "whole.npz"
    np.savez(whole, q=q, k=k)
    np.savez(
        half, q=q[..., 20:, :], k=k[..., 20:, :], known_q=q[..., :20, :], known_k=k[..., :20, :]
    )
    one, other = (compare.Setting(str(path)).tokens(1000) for path in (whole, half))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.q.shape == (6, 20, 16)
    assert run(f"--data={whole}", "--lengths=64") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "6 heads, L = 20, d = 16" in out


KNOWN = np.ones((9, 4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"q": np.ones((9, 4))}, "needs arrays q and k"),
        ({"q": np.ones((9, 4)), "k": np.ones((9, 4)), "known_q": np.ones((9, 4))}, "needs arrays"),
        ({"q": np.ones((9, 4)), "k": np.ones((9, 5))}, "must have one shape"),
        ({"q": np.ones((1, 4)), "k": np.ones((1, 4))}, "two tokens at least"),
        ({"q": np.full((9, 4), np.nan), "k": np.ones((9, 4))}, "q must be finite"),
        ({"q": np.full((9, 4), 1e300), "k": np.ones((9, 4))}, "numbers up to 1e+300 are no"),
        ({"q": np.ones((9, 4), complex), "k": np.ones((9, 4))}, "real numbers up to float64"),
        ({"q": np.ones((9, 4), "M8[s]"), "k": np.ones((9, 4))}, "real numbers up to float64"),
        ({"q": np.ones(9), "k": np.ones(9)}, "at least 2 axes"),
        ({"q": np.ones((9, 0)), "k": np.ones((9, 0))}, "must not be empty"),
        ({"q": np.ones((0, 9, 4)), "k": np.ones((0, 9, 4))}, "must not be empty"),
        (
            {"q": KNOWN, "k": KNOWN[:5], "known_q": KNOWN, "known_k": KNOWN},
            "causal attention needs as many queries as keys, got 9 and 5",
        ),
    ],
    ids=str,
)
def test_bad_files_are_one_line(arrays, message, tmp_path, capsys):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    assert run(f"--data={path}", "--causal") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_no_file_of_arrays_is_one_line(tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK no zip")
    objects = tmp_path / "objects.npz"
    np.savez(objects, q=np.array([{}]), k=np.array([{}]))
    for data, message in [
        (broken, "not an .npz file of numbers"),
        (objects, "not an .npz file of numbers"),
        (tmp_path / "gone.npz", "No such file"),
        ("weather", "data must be one of prices, volatility, gaussian or an .npz file"),
    ]:
        assert run(f"--data={data}") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def npy(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 4)}\n", content=b"1" * 128):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


DAMAGED = {
    "text": b"hello world",
    "no magic": b"\x93NUMPY\x09\x00aaaa",
    "object": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (8, 4)}\n"),
    "huge": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 8)}\n"),
    "negative": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-8, -4)}\n"),
    "not closed": npy(b"{'descr': '<f4'"),
    "deep": npy(b"(" * 300),
    "not unicode": npy(b"\xff\xfe\n"),
    "short": npy(content=b"1" * 127),
    "long": npy(content=b"1" * 132),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_arrays_are_one_line(name, tmp_path, capsys):
    path = tmp_path / "bad.npz"
    for content, status in ((npy(), 0), (DAMAGED[name], 2)):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("q.npy", npy())
            file.writestr("k.npy", content)
        assert run(f"--data={path}", "--lengths=64") == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"favor-np: error: {path}: not an .npz file of numbers: ")


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_archives_are_one_line(kind, tmp_path, capsys):
    """Any byte may be wrong: what the archive says of itself, and what is compressed."""
    path, q = tmp_path / "bad.npz", np.random.default_rng(0).integers(0, 9, (30, 4)).astype(float)
    with zipfile.ZipFile(path, "w", kind) as file:
        for name in "qk":
            stream = io.BytesIO()
            np.lib.format.write_array(stream, q)
            file.writestr(f"{name}.npy", stream.getvalue())
    content = path.read_bytes()
    compare.Setting(str(path)).tokens(10)
    refused = 0
    for at in range(0, len(content), 3):
        for value in (0, content[at] ^ 0x41):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                compare.Setting(str(path)).tokens(10)
            except ValueError as error:
                refused += str(error).startswith(f"{path}: ")
    assert refused > len(content) / 5
    path.write_bytes(content[:-30])
    assert run(f"--data={path}") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_small_file_does_not_become_a_large_array(tmp_path, capsys):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, q=np.zeros((4_200_000, 4), np.float32), k=np.zeros((9, 4)))
    assert path.stat().st_size < 2**17
    assert run(f"--data={path}") == 2
    error = capsys.readouterr().err
    assert "MiB would expand to 64 MiB" in error
    assert error.count("\n") == 1
    size, less = (n.to_bytes(4, "little") for n in (16 * 4_200_000 + 128, 16 * 4 + 128))
    assert path.read_bytes().count(size) > 0
    path.write_bytes(path.read_bytes().replace(size, less))  # what it says of itself may be false
    tracemalloc.start()
    try:
        assert run(f"--data={path}") == 2
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert "not an .npz file of numbers" in capsys.readouterr().err
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("q.npy", npy())
        file.writestr("k.npy", npy())
    assert run(f"--data={path}") == 2
    assert "q is not compressed as NumPy does it" in capsys.readouterr().err
    np.savez_compressed(path, q=np.zeros((400_000, 4), np.float32), k=np.zeros((9, 4)))
    assert compare.Setting(str(path)).tokens(100).q.shape == (1, 4, 4)


def test_json(capsys):
    assert run("--json", "--causal", "--seed=5", "--threads=1") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["setting"] == {
        "data": "prices", "dim": 16, "std": 0.35, "causal": True, "seed": 5, "num_threads": 1
    }  # fmt: skip
    assert data["tokens"] == [1, 1024, 32]
    assert data["advice"]
    assert data["default"] == "antithetic"
    assert [row["length"] for row in data["costs"]] == [64, 128]
    assert {"speedup", "matrix_bytes", "favor_bytes"} <= set(data["costs"][0])
    assert len(data["errors"]) == 2 * len(METHODS)
    assert set(data["errors"][0]) == {"features", "method", "mean", "spread"}
    assert set(data["crossings"]) == {"16"}


@pytest.mark.parametrize("causal", [False, True])
def test_pictured_weights_are_exact_and_near_it(result, causal):
    setting = dataclasses.replace(result.setting, causal=causal)
    figure = dataclasses.replace(result, setting=setting, crossings={4096: None}).plot()
    exact, favor = (axes.images[0].get_array().data for axes in figure.axes[3:5])
    keys = (
        np.arange(1, _plot.POSITIONS + 1) if causal else np.full(_plot.POSITIONS, _plot.POSITIONS)
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
