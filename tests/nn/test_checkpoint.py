"""Checkpoints: what is saved is what is loaded, whole or not at all."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from favor_np import nn, storage

MODEL = nn.PerformerLM(
    vocab=11, dim=8, depth=2, heads=2, num_features=12, decay=(0.9, 1.0), layers="FE"
)


def made(dtype=np.float32):
    params = nn.astype(MODEL.init(np.random.default_rng(0)), dtype)
    optimizer = nn.AdamW(params, betas=(0.8, 0.9), weight_decay=0.3, undecayed=("embedding",))
    for step in range(2):
        logits, pullback = MODEL.vjp(params, np.arange(10), key=(0, step))
        pullback(nn.cross_entropy(logits, np.arange(1, 11))[1], optimizer.grads)
        optimizer.step(0.1)
    return params, optimizer


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_of_it_comes_back(tmp_path, dtype):
    params, optimizer = made(dtype)
    path = tmp_path / "run.safetensors"
    nn.save(path, MODEL, params, optimizer, step=7, note={"seed": 3})
    found = nn.load(path)
    assert (found.model, found.step, found.info) == (MODEL, 7, {"note": {"seed": 3}})
    assert found.optimizer.settings == optimizer.settings
    assert found.optimizer.params is found.params
    assert found.optimizer.count == 2
    for name in ("vector", "m", "v"):
        assert (getattr(found.optimizer, name) == getattr(optimizer, name)).all()
    assert [n for n, _ in nn.leaves(found.params)] == [n for n, _ in nn.leaves(params)]
    assert next(nn.leaves(found.params))[1].dtype == dtype


def test_names_are_those_of_the_tree(tmp_path):
    params, optimizer = made()
    nn.save(tmp_path / "a", MODEL, params, optimizer)
    arrays, names = load_file(tmp_path / "a"), [name for name, _ in nn.leaves(params)]
    assert "blocks.0.attention.branch.projection" in names
    assert set(arrays) == {*names, *(f"adamw.{x}.{name}" for x in "mv" for name in names)}
    for name, array in nn.leaves(params):
        assert (arrays[name] == array).all()


def test_without_an_optimizer(tmp_path):
    params, _ = made()
    nn.save(tmp_path / "a", MODEL, params)
    assert nn.load(tmp_path / "a").optimizer is None


class Own(nn.Linear):
    """A layer of one's own."""


def test_a_model_of_ones_own_has_to_be_given(tmp_path):
    model = Own(2, 3)
    nn.save(tmp_path / "a", model, model.init(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"its model is a .*Own, which favor_np\.nn has not: pass"):
        nn.load(tmp_path / "a")
    assert nn.load(tmp_path / "a", model).model is model


def test_a_class_is_not_taken_for_another_of_its_name(tmp_path):
    """Neither the model nor what it is made of."""

    class Linear(nn.Linear):
        pass

    for model in (Linear(2, 3), nn.Chain((nn.Linear(2, 2), Linear(2, 3)))):
        nn.save(tmp_path / "a", model, model.init(np.random.default_rng(0)))
        with pytest.raises(
            ValueError, match=r"its model is a .*\.Linear, which favor_np\.nn has not"
        ):
            nn.load(tmp_path / "a")
        assert nn.load(tmp_path / "a", model).model is model


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    params, _ = made()
    path = tmp_path / "a"
    nn.save(path, MODEL, params, step=1)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        nn.save(path, MODEL, params, step=2)
    assert nn.load(path).step == 1
    assert list(tmp_path.iterdir()) == [path]


def altered(path, change):
    """Write the file anew with other metadata."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["favor_np.nn"])
    change(about)
    arrays = load_file(path)
    save_file(arrays, path, {"favor_np.nn": json.dumps(about)})


BAD = {
    "no names": (lambda about: about.pop("names"), "it lacks 'names'"),
    "another name": (lambda about: about["names"].append("x"), "it lacks 'x'"),
    "fewer names": (lambda about: about["names"].pop(), "it must have the arrays"),
    "no class": (lambda about: about["model"].update({"class": "save"}), "its model is a save"),
    "a function": (lambda about: about["model"].update({"class": "AdamW"}), "its model is a AdamW"),
    "another field": (lambda about: about["model"].update(x=1), "unexpected keyword argument 'x'"),
    "a wrong field": (lambda about: about["model"].update(heads=3), "multiple of heads"),
    "a negative step": (lambda about: about.update(step=-1), "step must be at least 0"),
    "wrong moments": (lambda about: about["adamw"].update(eps=-1), "eps must be finite"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_files_that_are_wrong(tmp_path, change, message):
    path = tmp_path / "a"
    nn.save(path, MODEL, *made())
    altered(path, change)
    with pytest.raises(ValueError, match=f"cannot be read as a checkpoint: .*{message}"):
        nn.load(path)


@pytest.mark.parametrize("length", [0, 5, 100, 5000, -1])
def test_files_that_are_cut_short(tmp_path, length):
    path = tmp_path / "a"
    nn.save(path, MODEL, made()[0])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        nn.load(path)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda: nn.save(tmp_path / "a", MODEL, {}), lambda: nn.load(tmp_path / "a")):
        with pytest.raises(ImportError, match=r"pip install 'favor_np\[nn\]'"):
            call()


def test_bad_arguments(tmp_path):
    params, optimizer = made()
    with pytest.raises(ValueError, match="optimizer must be that of params"):
        nn.save(tmp_path / "a", MODEL, nn.Linear(2, 3).init(np.random.default_rng(0)), optimizer)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        nn.save(tmp_path / "a", MODEL, params, step=-1)
    with pytest.raises(TypeError, match="path must be"):
        nn.save(3.5, MODEL, params)
    with pytest.raises(FileNotFoundError):
        nn.load(tmp_path / "nothing")


def test_sizes_that_are_numpy_numbers_come_back_as_numbers(tmp_path):
    model = nn.PerformerLM(
        vocab=np.int64(50), dim=np.int32(16), depth=1, heads=2, num_features=8, decay=np.array([0.9, 0.5]),
        dropout=np.float64(0.1), causal=np.True_,
    )  # fmt: skip
    nn.save(tmp_path / "a", model, model.init(np.random.default_rng(0)))
    found = nn.load(tmp_path / "a").model
    assert (found.vocab, found.dim, found.decay, found.dropout) == (50, 16, (0.9, 0.5), 0.1)


def test_training_does_not_begin_where_it_cannot_save(tmp_path):
    model = nn.Linear(2, 2)

    def batches(step):
        raise AssertionError("a step was begun")

    with pytest.raises(OSError, match="cannot be written"):
        nn.train(
            model, model.init(np.random.default_rng(0)), batches, steps=1, rate=0.1,
            loss=nn.mean_squared, path=tmp_path / "missing" / "a",
        )  # fmt: skip
