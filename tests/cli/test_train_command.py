"""``favor-np train`` and ``favor-np generate``."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.child import HANG, TESTS

from favor_np import nn
from favor_np.cli import main
from favor_np.nn import data

WORDS = [
    "the",
    "a",
    "quick",
    "slow",
    "brown",
    "red",
    "fox",
    "dog",
    "jumps",
    "runs",
    "over",
    "under",
    "lazy",
    "old",
    "tree",
    "house",
]
SMALL = ["--dim", "16", "--depth", "1", "--heads", "2", "--features", "16", "--length", "32",
         "--batch", "4", "--every", "5"]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    """A file of many paragraphs, every one of them twice."""
    rng = np.random.default_rng(0)
    paragraphs = [" ".join(rng.choice(WORDS, 12)) for _ in range(200)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs + paragraphs))
    return str(path)


def train(text, out, *more):
    return main(["train", text, "--out", str(out), *SMALL, *more])


def test_train_and_generate(text, tmp_path, capsys):
    out, picture = tmp_path / "model.safetensors", tmp_path / "loss.png"
    assert train(text, out, "--steps", "60", "--json", "--plot", str(picture)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == 60
    assert 1 < facts["bits_per_byte"] < 6
    assert abs(facts["with_exact_attention"] - facts["bits_per_byte"]) < 0.1
    assert picture.stat().st_size > 1000
    assert main(["generate", str(out), "--length", "30", "--prompt", "the ", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["step"]) == ("the ", 60)
    assert len(found["text"].encode(errors="replace")) >= 30


def test_the_report(text, tmp_path, capsys):
    assert train(text, tmp_path / "a", "--steps", "5") == 0
    told = capsys.readouterr().out
    for words in ("parameters", "5 steps in", "this model", "exact attention", "five bytes", "xz"):
        assert words in told
    assert main(["generate", str(tmp_path / "a"), "--length", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("The ")


def test_a_run_that_diverges_is_one_line(text, tmp_path, capsys):
    assert train(text, tmp_path / "a", "--steps", "60", "--rate", "1e9", "--no-baselines") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("favor-np: error: the ")
    assert "not finite" in error or " is nan" in error


def test_the_checkpoint_must_not_be_the_text_nor_a_device(text, capsys):
    before = Path(text).read_bytes()
    for out, reason in (
        (text, "would overwrite"),
        (os.devnull, "is no regular file"),
        (f"{text}/model", "does not exist"),
    ):
        assert train(text, out, "--steps", "5") == 2
        assert reason in capsys.readouterr().err
    assert Path(text).read_bytes() == before


@pytest.mark.parametrize(("name", "value"), [("dim", 18), ("depth", 10**9), ("rotary", [1])])
def test_a_checkpoint_that_does_not_fit_its_model_is_one_line(name, value, tmp_path, capsys):
    model = nn.PerformerLM(vocab=256, dim=16, depth=1, heads=2, num_features=8)
    path = tmp_path / "model"
    nn.save(path, model, model.init(np.random.default_rng(0)))
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    about = json.loads(header["__metadata__"]["favor_np.nn"])
    about["model"][name] = value
    header["__metadata__"]["favor_np.nn"] = json.dumps(about)
    forged = json.dumps(header).encode()
    path.write_bytes(len(forged).to_bytes(8, "little") + forged + data[end:])
    assert main(["generate", str(path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"favor-np: error: {path}")


def test_lines_are_paragraphs_where_there_are_none():
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 12)) for _ in range(300)]
    learned, held_out = data.split("\n".join(lines * 2))
    parts = [part.decode().split("\n") for part in (learned, held_out)]
    assert sorted(parts[0] + parts[1]) == sorted(set(lines))
    assert 10 < len(parts[1]) < 80
    spaced = "\n \n".join(lines)  # as WikiText has it
    assert [x.count(b"\n\n") > 10 for x in data.split(spaced)] == [True, True]


def test_bytes_that_are_no_utf_8_stay(text, tmp_path):
    path = tmp_path / "latin"
    path.write_bytes(Path(text).read_bytes().replace(b"fox", b"f\xfcx"))
    learned, held_out = data.split(path.read_text(encoding="utf-8", errors="surrogateescape"))
    assert b"f\xfcx" in learned
    assert b"f\xfcx" in held_out
    assert train(str(path), tmp_path / "a", "--steps", "2", "--no-baselines") == 0


def test_a_prompt_of_any_bytes(text, tmp_path, capsys):
    train(text, tmp_path / "a", "--steps", "5", "--no-baselines")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "a"), "--length", "5", "--prompt", "\udcff"]) == 0
    assert capsys.readouterr().out.startswith("\ufffd")


def test_a_run_goes_on(text, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(text, whole, "--steps", "20", "--no-baselines")
    process = subprocess.Popen(
        [sys.executable, "-m", "favor_np.cli", "train", text, "--out", str(parts), *SMALL,
         "--steps", "20", "--no-baselines", "--every", "1"],
        cwd=TESTS.parent,
    )  # fmt: skip
    while not parts.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    process.wait(HANG)
    if nn.load(parts).step < 20:
        train(text, parts, "--steps", "20", "--no-baselines", "--resume")
    capsys.readouterr()
    one, two = nn.load(whole), nn.load(parts)
    assert (one.step, two.step) == (20, 20)
    for (name, x), (_, y) in zip(nn.leaves(one.params), nn.leaves(two.params), strict=True):
        assert (x == y).all(), name


def test_other_settings_are_refused_by_name(text, tmp_path, capsys):
    out, other = tmp_path / "model", tmp_path / "other.txt"
    assert train(text, out, "--steps", "2", "--no-baselines", "--decay", "0.9") == 0
    capsys.readouterr()
    go_on = ["train", text, "--out", str(out), *SMALL, "--resume", "--steps", "4", "--no-baselines"]
    same = ["--decay", "0.9"]
    error = failed([*go_on, *same, "--rate", "0.1", "--local-heads", "0"], capsys)
    assert "model was trained with --local-heads 1, not 0; --rate 0.002, not 0.1" in error
    assert "--decay [0.9], not None" in failed(go_on, capsys)
    other.write_text("".join(reversed((tmp_path / "text.txt").read_text())))
    assert "trained with another text" in failed(
        [*go_on[:1], str(other), *go_on[2:], *same], capsys
    )
    assert nn.load(out).step == 2
    assert main([*go_on, *same]) == 0
    assert "was to have 2 steps; with 4" in capsys.readouterr().err


def failed(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_bad_input(text, tmp_path, capsys):
    short, bad = tmp_path / "short.txt", tmp_path / "bad.safetensors"
    short.write_text("too short")
    bad.write_text("nothing")
    out = ["--out", str(tmp_path / "model")]
    assert "too short: " in failed(["train", str(short), *out], capsys)
    assert "nothing.txt" in failed(["train", str(tmp_path / "nothing.txt"), *out], capsys)
    assert "is a directory" in failed(["train", text, "--out", str(tmp_path)], capsys)
    assert "multiple of heads" in failed(["train", text, *out, "--heads", "3"], capsys)
    assert "at most 1, got (3.0,)" in failed(["train", text, *out, "--decay", "3"], capsys)
    odd = ["--dim", "20", "--heads", "4"]
    assert "even length, got 5" in failed(["train", text, *out, *odd], capsys)
    assert "cannot be read as a checkpoint" in failed(
        ["train", text, "--out", str(bad), "--resume"], capsys
    )
    assert "cannot be read as a checkpoint" in failed(["generate", str(bad)], capsys)
    assert "no-such" in failed(["generate", str(tmp_path / "no-such")], capsys)
    nn.save(bad, nn.Linear(2, 2), nn.Linear(2, 2).init(np.random.default_rng(0)))
    assert "no language model of bytes" in failed(["generate", str(bad)], capsys)
    assert train(text, tmp_path / "done", "--steps", "2", "--no-baselines") == 0
    capsys.readouterr()
    again = ["train", text, "--out", str(tmp_path / "done"), *SMALL, "--steps", "2", "--resume"]
    assert "has 2 steps already" in failed(again, capsys)


def test_of_equal_paragraphs_one_is_left():
    """Those that differ in white space count as equal, and the first is the one that is left."""
    parts = [f"paragraph {' ' * (i // 300)}{i % 300}" for i in range(900)]
    learned, held_out = (part.decode().split("\n\n") for part in data.split("\n\n".join(parts)))
    assert not set(learned) & set(held_out)
    assert sorted(learned + held_out) == sorted(parts[:300])
    assert 3 < len(held_out) < 100


def test_a_tenth_is_held_out():
    learned, held_out = data.split(data.python_docs())
    assert 0.05 < len(held_out) / len(learned) < 0.2


def test_counts_of_bytes_are_chances():
    """For one next byte they add up to one, and a text that repeats costs little."""
    learned = b"abracadabra" * 5
    total = sum(
        2.0 ** -(data.ngram_bits(learned, b"abra" + bytes([c])) * 5) for c in range(256)
    ) / 2.0 ** -(data.ngram_bits(learned, b"abra") * 4)
    assert total == pytest.approx(1)
    assert data.ngram_bits(learned, b"abracadabra" * 3) < 1
    assert data.ngram_bits(b"", b"xyz") == 8


def test_xz_knows_what_came_before():
    rng = np.random.default_rng(0)
    learned = bytes(rng.integers(0, 256, 20_000, dtype=np.uint8))
    assert data.xz_bits(learned, learned[:5000]) < 0.5
    assert 7 < data.xz_bits(learned, bytes(rng.integers(0, 256, 5000, dtype=np.uint8))) < 9


def test_windows_in_order_have_every_token_but_the_first():
    text = np.arange(100)
    found = data.in_order(text, 7, 4)
    assert np.concatenate([y.ravel() for _, y in found]).tolist() == list(range(1, 99))
    assert all((x + 1 == y).all() for x, y in found)
    assert math.prod(data.in_order(text[:5], 7, 4)[0][0].shape) == 4


def test_bad_windows():
    with pytest.raises(ValueError, match="tokens must be more than the 5 of a window, got 5"):
        nn.windows(b"12345", 5, 1)
    with pytest.raises(TypeError, match="tokens must be a row of integers"):
        nn.windows(np.ones(9), 5, 1)
