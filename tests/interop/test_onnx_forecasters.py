"""Forecasters as ONNX models: returns go in, volatilities come out, the same as from favor_np."""

import functools
import json

import numpy as np
import pytest
from support import bridges

onnx = bridges.require("onnx")
onnxruntime = bridges.require("onnxruntime")

from onnx.reference import ReferenceEvaluator

from favor_np import nn
from favor_np.cli import main
from favor_np.forecast import EWMA, HAR, PerformerForecaster
from favor_np.interop.onnx import export_model

CLOSE = {"float32": 3e-6, "float64": 1e-12}
KINDS = {
    "default": {},
    "horizons": {"horizons": (1, 5)},
    "returns": {"target": "return", "horizons": (1, 5)},
    "averages alone": {"spans": (), "signed": ()},
    "spans alone": {"decays": (), "target": "return"},
    "long spans": {"spans": (1, 1000), "decays": (0.0, 0.999)},
    "regression": {"epochs": 0},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def rows(length, seed=0):
    """Returns in clusters, and columns that tell nothing, hours, and something with a trend."""
    rng = np.random.default_rng(seed)
    hours = np.arange(length) % 24
    returns = np.exp(np.sin(np.arange(length) / 60)) * rng.standard_normal(length)
    returns[: length // 20] = 0.0
    return np.stack([returns, np.ones(length), hours == 3, np.sin(hours) + returns], axis=1)


@functools.cache
def fitted(kind="default"):
    """A forecaster whose Performers say something."""
    sizes = {"epochs": 1, "members": 2, "dim": 8, "num_features": 8}
    forecaster = PerformerForecaster(**sizes | KINDS[kind]).fit(rows(700))
    rng = np.random.default_rng(1)
    for name, array in nn.leaves(forecaster.params_):
        if name[0] != "0" and not name.endswith("projection"):
            array += 0.1 * rng.standard_normal(array.shape).astype(array.dtype)
    return forecaster


def expected(forecaster, x):
    """Mean, variance and volatility, computed in float64, and the intervals of favor_np."""
    x = x.astype(np.float64)
    params = nn.astype(forecaster.params_, np.float64)
    output = forecaster.model_.apply(params, forecaster.memory_.columns(x))
    horizons = len(forecaster.horizons)
    variance = np.exp(output[:, -horizons:])
    volatility = np.sqrt(variance)
    mean = output[:, :-horizons] * volatility if forecaster.target == "return" else 0.0
    interval = forecaster.predict_interval(x).reshape(len(x), horizons, 2)
    return {"mean": mean, "variance": variance, "volatility": volatility, "interval": interval}


class Session:
    """An exported forecaster, run by onnxruntime or by onnx's evaluator."""

    def __init__(self, forecaster, evaluate=False, **options):
        self.model = export_model(forecaster, **options)
        self.names = [x.name for x in self.model.graph.output]
        if evaluate:
            self._run = ReferenceEvaluator(self.model).run
        else:
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = settings.inter_op_num_threads = 1
            self._run = onnxruntime.InferenceSession(
                self.model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            ).run

    def __call__(self, x):
        """The outputs for sequences of rows."""
        return dict(zip(self.names, self._run(None, {"x": x}), strict=True))


def difference(found, wanted):
    return abs(found - wanted).max(initial=0) / abs(wanted).max(initial=1e-300)


@dtypes
@every_kind
def test_the_same_as_favor_np(kind, dtype):
    forecaster = fitted(kind)
    session = Session(forecaster, dtype=dtype)
    x = rows(600, seed=2).astype(dtype)
    found, wanted = session(x[None]), expected(forecaster, x)
    first = "mean" if forecaster.target == "return" else "variance"
    assert session.names[0] == first
    predicted = forecaster.predict(x.astype(np.float64)).reshape(600, -1)
    assert difference(found[first][0], predicted) <= 3e-6
    for name in session.names:
        assert found[name].dtype == dtype
        bound = 3e-6 if name == "interval" else CLOSE[dtype]  # favor_np's are of float32
        assert difference(found[name][0], wanted[name]) <= bound


@pytest.mark.parametrize("evaluate", [False, True], ids=["onnxruntime", "onnx"])
def test_every_length(evaluate):
    """Of several series at once, of which none knows of another, and of none."""
    forecaster = fitted("horizons")
    session = Session(forecaster, evaluate, dtype="float64")
    series = np.stack([rows(300, seed=seed) for seed in (3, 4)])
    wanted = np.stack([expected(forecaster, x)["variance"] for x in series])
    for length in (0, 1, 2, 21, 22, 63, 64, 65, 101, 300):
        found = session(series[:, :length])
        assert found["variance"].shape == (2, length, 2)
        assert found["interval"].shape == (2, length, 2, 2)
        assert difference(found["variance"], wanted[:, :length]) <= CLOSE["float64"]


@pytest.mark.parametrize("form", ["chunk", "gated"])
def test_forms(form):
    forecaster = fitted()
    x = rows(200).astype(np.float32)
    found = Session(forecaster, form=form)(x[None])["variance"][0]
    assert difference(found, expected(forecaster, x)["variance"]) <= CLOSE["float32"]


@pytest.mark.parametrize("opset", [14, 18, 27])
def test_opsets(opset):
    forecaster = fitted()
    x = rows(200)
    found = Session(forecaster, opset=opset, dtype="float64")(x[None])["variance"][0]
    assert difference(found, expected(forecaster, x)["variance"]) <= CLOSE["float64"]


def test_intervals_hold_the_share_asked_for():
    forecaster = fitted("returns")
    x = rows(100)
    for coverage in (0.5, 0.99):
        found = Session(forecaster, dtype="float64", coverage=coverage)(x[None])["interval"][0]
        wanted = forecaster.predict_interval(x, coverage=coverage)
        assert difference(found, wanted) <= 3e-6


@dtypes
def test_har(dtype):
    x = rows(600)[:, :1].astype(dtype)
    forecaster = HAR().fit(x[:-1], x[1:, 0] ** 2)
    session = Session(forecaster, dtype=dtype)
    assert session.names == ["variance", "volatility"]
    for length in (0, 1, 600):
        found, wanted = session(x[None, :length]), forecaster.predict(x)[:length, None]
        assert difference(found["variance"][0], wanted) <= CLOSE[dtype]
        assert difference(found["volatility"][0], np.sqrt(wanted)) <= CLOSE[dtype]


def test_a_model_says_what_it_is():
    forecaster = fitted()
    model = export_model(forecaster)
    onnx.checker.check_model(model, full_check=True)
    facts = {x.key: x.value for x in model.metadata_props}
    assert facts["favor_np.model"] == repr(forecaster)
    assert len(json.loads(facts["favor_np.fingerprints"])) == 2
    (x,) = model.graph.input
    assert [n.dim_param or n.dim_value for n in x.type.tensor_type.shape.dim] == [
        "batch", "positions", 4,
    ]  # fmt: skip


def test_what_is_refused():
    with pytest.raises(ValueError, match="fitted first"):
        export_model(PerformerForecaster())
    with pytest.raises(TypeError, match=r"HAR or PerformerForecaster.*EWMA"):
        export_model(EWMA().fit(np.ones((4, 1)), np.ones(4)))
    forecaster = fitted("regression")
    with pytest.raises(TypeError, match="params must be None"):
        export_model(forecaster, forecaster.params_)
    with pytest.raises(ValueError, match=r"coverage must be .* got 1"):
        export_model(forecaster, coverage=1)
    with pytest.raises(ValueError, match="key_mask"):
        export_model(forecaster, key_mask=True)
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        export_model(forecaster, dtype="float16")
    with pytest.raises(TypeError, match="params must be those of the Linear"):
        export_model(nn.Linear(2, 2))


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["default", "returns"])
def test_export(kind, tmp_path, capsys):
    forecaster = fitted(kind)
    saved, path = str(tmp_path / "model.safetensors"), tmp_path / "model.onnx"
    forecaster.save(saved)
    assert main(["export", saved, str(path)]) == 0
    text = capsys.readouterr().out
    assert main(["export", saved, str(path), "--form", "gated", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "differs from favor_np by" in text
    assert 0 < report["difference"] < 3e-6
    assert report["model"] == repr(forecaster)
    assert report["inputs"] == {"x": ["batch", "positions", 4]}
    assert list(report["outputs"]) == [x.name for x in onnx.load(path).graph.output]


def test_export_of_what_forecast_has_saved(tmp_path, capsys):
    rng = np.random.default_rng(0)
    prices, saved = tmp_path / "prices.csv", str(tmp_path / "model.safetensors")
    values = 30 * np.exp(np.cumsum(0.01 * rng.standard_normal(700)))
    prices.write_text("\n".join(["price", *map(str, values)]))
    quick = ["--model", "performer", "--epochs", "1", "--members", "1", "--target", "volatility"]
    assert main(["forecast", str(prices), *quick, "--save", saved]) == 0
    assert main(["export", saved, str(tmp_path / "model.onnx")]) == 0
    assert "differs from favor_np by" in capsys.readouterr().out
    assert main(["export", saved, str(tmp_path / "other.onnx"), "--key-mask"]) == 2
    assert "key_mask" in capsys.readouterr().err
    assert not (tmp_path / "other.onnx").exists()
