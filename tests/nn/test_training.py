"""Training: the same bits on any number of threads and after a resume, and nothing that is not finite."""

import copy
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.child import TESTS

import favor_np
from favor_np import nn

MODEL = nn.PerformerLM(vocab=17, dim=16, depth=2, heads=2, num_features=16, dropout=0.1)
TEXT = np.random.default_rng(0).integers(0, 17, 3000)
TEXT[1::2] = (TEXT[::2] + 1) % 17  # every second token can be known


def batches(step):
    at = np.random.default_rng((1, step)).integers(0, 1400, 4)[:, None] * 2 + np.arange(41)
    return TEXT[at[:, :-1]], TEXT[at[:, 1:]]


def fresh(model=MODEL, dtype=np.float32):
    params = nn.astype(model.init(np.random.default_rng(0)), dtype)
    return params, nn.AdamW(params)


def same(a, b):
    return all((x == y).all() for (_, x), (_, y) in zip(nn.leaves(a), nn.leaves(b), strict=True))


def trained(steps, threads=2, **options):
    params, optimizer = fresh()
    with favor_np.thread_limit(threads):
        history = nn.train(
            MODEL, params, batches, steps=steps, rate=0.01, optimizer=optimizer, redraw=7, **options
        )
    return params, optimizer, history


def test_it_learns():
    _, _, history = trained(150)
    assert np.mean(history.losses[-5:]) < 0.75 * history.losses[0]
    assert history.steps == list(range(150))
    assert history.tokens == 150 * 160
    assert "150 steps" in repr(history)


def test_a_loop_of_ones_own_is_what_train_does():
    params, optimizer = fresh()
    for step in range(9):
        if step == 7:
            MODEL.redraw(params, (0, step))
        x, targets = batches(step)
        logits, pullback = MODEL.vjp(params, x, key=(0, step))
        _, grad = nn.cross_entropy(logits, targets)
        pullback(grad, optimizer.grads)
        optimizer.step(0.01, clip=1.0)
    assert same(params, trained(9)[0])


def test_threads_change_no_bit():
    assert same(trained(12, threads=1)[0], trained(12, threads=2)[0])


def test_a_run_that_was_saved_goes_on_bit_for_bit(tmp_path):
    """Saved by one thread, resumed by two, across a redraw of the projections."""
    path = tmp_path / "run.safetensors"
    whole, _, history = trained(12)
    trained(5, threads=1, path=path)
    found = nn.load(path)
    assert (found.model, found.step, found.optimizer.count) == (MODEL, 5, 5)
    again = nn.train(
        found.model, found.params, batches, steps=12, rate=0.01, optimizer=found.optimizer,
        start=found.step, redraw=7,
    )  # fmt: skip
    assert again.losses == history.losses[5:]
    assert same(found.params, whole)


def process(path, steps):
    code = f"""
import os, sys
import numpy as np
from favor_np import nn

model = nn.PerformerLM(vocab=17, dim=16, depth=1, heads=2, num_features=16)

def batches(step):
    x = np.random.default_rng((1, step)).integers(0, 17, (2, 33))
    return x[:, :-1], x[:, 1:]

path, steps = {str(path)!r}, {steps}
if os.path.exists(path):
    found = nn.load(path)
    params, optimizer, start = found.params, found.optimizer, found.step
else:
    params = model.init(np.random.default_rng(0))
    optimizer, start = nn.AdamW(params), 0
print("ready", flush=True)
nn.train(model, params, batches, steps=steps, rate=0.01, optimizer=optimizer, start=start,
         every=1, path=path)
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=TESTS.parent, stdout=subprocess.PIPE)


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path):
    """Whenever it is killed there is a whole checkpoint."""
    once, often = tmp_path / "once.safetensors", tmp_path / "often.safetensors"
    with process(once, 30) as child:
        assert child.wait() == 0
    for _ in range(3):
        with process(often, 100_000) as child:
            child.stdout.readline()
            before = os.stat(often).st_mtime_ns if often.exists() else 0
            while not often.exists() or os.stat(often).st_mtime_ns == before:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
        reached = nn.load(often).step
        assert reached > 0
    with process(once, reached) as child:
        assert child.wait() == 0
    whole, killed = nn.load(once), nn.load(often)
    assert (whole.step, killed.step) == (max(reached, 30), reached)
    if reached >= 30:
        assert same(whole.params, killed.params)
        assert (whole.optimizer.m == killed.optimizer.m).all()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are raised in another way")
def test_an_interrupt_saves_and_returns(tmp_path):
    path = tmp_path / "run.safetensors"

    def interrupting(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step)

    params, optimizer = fresh()
    history = nn.train(
        MODEL, params, interrupting, steps=100, rate=0.01, optimizer=optimizer, path=path
    )
    assert (history.stopped, history.step, nn.load(path).step) == ("interrupted", 5, 5)
    assert same(params, nn.load(path).params)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_accumulated_batches_are_one_large_batch():
    def half(part):
        x, targets = batches(part // 2)
        return x[part % 2 :: 2], targets[part % 2 :: 2]

    model = MODEL.replace(dropout=0.0)
    losses = []
    for function, accumulate in ((batches, 1), (half, 2)):
        params, optimizer = fresh(model, np.float64)
        history = nn.train(
            model, params, function, steps=3, rate=0.01, optimizer=optimizer, accumulate=accumulate
        )
        losses.append(history.losses)
    np.testing.assert_allclose(*losses, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:step .* these heads:RuntimeWarning")
def test_validation_keeps_the_best_and_stops():
    """A rate that is far too large: the loss rises, and training ends."""
    params, _ = fresh()
    held_out = [batches(1000), batches(1001)]
    history = nn.train(
        MODEL, params, batches, steps=500, rate=lambda step: 0.01 if step < 20 else 1.0,
        validation_batches=held_out, every=10, patience=3,
    )  # fmt: skip
    steps, values = zip(*history.validation, strict=True)
    assert history.stopped == "no improvement"
    assert history.best == (steps[np.argmin(values)], min(values))
    assert len(values) == np.argmin(values) + 4
    best = [nn.cross_entropy(MODEL.apply(history.best_params, x), t)[0] for x, t in held_out]
    assert np.mean(best) == history.best[1]


@pytest.mark.filterwarnings("ignore:step .* these heads:RuntimeWarning")
@pytest.mark.parametrize("ends", [[30], [25, 37]], ids=str)
def test_patience_and_the_best_loss_outlive_a_resume(tmp_path, ends):
    """Also where a run ended between two looks, and was looked at one time more."""
    path, options = tmp_path / "run.safetensors", {
        "rate": lambda step: 0.01 if step < 20 else 1.0, "patience": 3, "every": 10,
        "validation_batches": [batches(1000)],
    }  # fmt: skip
    whole = nn.train(MODEL, fresh()[0], batches, steps=500, **options)
    params, optimizer = fresh()
    nn.train(MODEL, params, batches, steps=ends[0], optimizer=optimizer, path=path, **options)
    for end in (*ends[1:], 500):
        found = nn.load(path)
        again = nn.train(
            MODEL, found.params, batches, steps=end, optimizer=found.optimizer, path=path,
            start=found.step, best=found.info["best"], **options,
        )  # fmt: skip
    assert (again.best, again.step, again.stopped) == (whole.best, whole.step, "no improvement")
    assert nn.load(path).info["best"] == list(whole.best)
    assert whole.best[0] < ends[-1]


def test_batches_may_end_with_the_last_step(tmp_path):
    params, _ = fresh()
    few = [batches(step) for step in range(3)]
    history = nn.train(
        MODEL, params, few.__getitem__, steps=3, rate=0.01, path=tmp_path / "run", every=3
    )
    assert history.step == nn.load(tmp_path / "run").step == 3
    assert history.attention


def test_a_validation_loss_that_is_nan_is_not_the_best():
    params = SQUARE.init(np.random.default_rng(0))
    found = iter([math.nan, 3.0, math.nan, 2.0])

    def loss(y, targets):
        value, grad = nn.mean_squared(y, targets)
        return (value if len(y) == 64 else next(found)), grad

    few = [tuple(x[:5] for x in squares(100))]
    history = nn.train(
        SQUARE, params, squares, steps=4, rate=0.01, loss=loss, validation_batches=few, every=1
    )
    assert history.best == (4, 2.0)
    np.testing.assert_array_equal(history.best_params["0"]["weight"], params["0"]["weight"])


@pytest.mark.parametrize("wrong", [{"clip": -1.0}, {"clip": math.nan}, {"rate": lambda _: -0.1}])
def test_gradients_are_not_turned_round(wrong):
    params = SQUARE.init(np.random.default_rng(0))
    before = copy.deepcopy(params)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be finite and"):
        nn.train(
            SQUARE, params, squares, steps=2, **({"rate": 0.1, "loss": nn.mean_squared} | wrong)
        )
    assert same(params, before)


def test_attention_is_watched():
    """A head whose queries and keys have grown is named."""
    model = MODEL.replace(qk=None, dropout=0.0, num_features=64)
    params = model.init(np.random.default_rng(0))
    for block in params["blocks"].values():
        block["attention"]["branch"]["qkv"]["weight"] /= 2
    history = nn.train(model, params, batches, steps=1, rate=1e-9)
    assert [each[:3] for each in history.attention] == [
        (1, layer, head) for layer in (0, 1) for head in (0, 1)
    ]
    assert all(6.4 < size <= 64 for *_, size in history.attention)
    params["blocks"]["1"]["attention"]["branch"]["qkv"]["weight"][8:16] *= 30  # queries, head 1
    params["blocks"]["1"]["attention"]["branch"]["qkv"]["weight"][24:32] *= 30
    with pytest.warns(RuntimeWarning, match=r"\(layer\.head\).*: 1\.1 \(\d\.\d of 64\)$"):
        nn.train(model, params, batches, steps=1, rate=1e-9)


def test_attention_that_fades_is_diagnosed_as_such():
    model = nn.PerformerLM(vocab=17, dim=16, depth=1, heads=2, num_features=16, decay=0.5)
    params = model.init(np.random.default_rng(0))
    (fading,) = nn.diagnose_attention(model, params, TEXT[:200])
    (lasting,) = nn.diagnose_attention(model.replace(decay=None), params, TEXT[:200])
    last = np.s_[:, 100:]
    assert fading.standard_error[last].mean() > 1.3 * lasting.standard_error[last].mean()


def test_progress_has_loss_and_speed(capsys):
    trained(3, progress=True)
    assert "training: 100%" in capsys.readouterr().err
    told = []
    trained(3, progress=lambda *step: told.append(step))
    assert told == [("training", 1, 3), ("training", 2, 3), ("training", 3, 3)]


def test_the_history_draws_itself(tmp_path):
    _, _, history = trained(4, validation_batches=[batches(99)], every=2)
    history.plot().savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_loss_that_is_nan_changes_nothing():
    params, optimizer = fresh()
    before = optimizer.vector.copy()

    def loss(logits, targets):
        value, grad = nn.cross_entropy(logits, targets)
        return (np.nan if optimizer.count == 2 else value), grad

    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan; the parameters are"):
        nn.train(MODEL, params, batches, steps=5, rate=1e-300, optimizer=optimizer, loss=loss)
    assert optimizer.count == 2
    np.testing.assert_allclose(optimizer.vector, before, atol=1e-30)
    assert not optimizer.gradient.any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_named_and_refused(value):
    _, optimizer = fresh()
    optimizer.grads["blocks"]["1"]["feedforward"]["branch"]["up"]["weight"][3, 2] = value
    before = [x.copy() for x in (optimizer.vector, optimizer.m, optimizer.v)]
    with pytest.raises(
        FloatingPointError,
        match=r"gradient of blocks\.1\.feedforward\.branch\.up\.weight is not finite; the param",
    ):
        optimizer.step(0.1)
    for was, now in zip(before, (optimizer.vector, optimizer.m, optimizer.v), strict=True):
        assert (was == now).all()
    assert optimizer.count == 0
    assert not optimizer.gradient.any()
    optimizer.step(0.1)  # goes on


def fitted(optimizer):
    """The first and the last loss of training the parameters of an optimiser."""
    losses = nn.train(
        SQUARE, optimizer.params, squares, steps=60, rate=0.02, loss=nn.mean_squared,
        optimizer=optimizer,
    ).losses  # fmt: skip
    return losses[0], losses[-1]


SQUARE = nn.Chain((nn.Linear(1, 16), nn.RMSNorm(16), nn.Linear(16, 1)))


def squares(step):
    x = np.random.default_rng((0, step)).uniform(-1, 1, (64, 1))
    return x, x**2


def test_parameters_that_are_no_views_any_more_are_packed_again():
    params = SQUARE.init(np.random.default_rng(0))
    optimizer = nn.AdamW(params)
    nn.AdamW(params)  # takes them over
    copies = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    params["0"]["weight"] = params["0"]["weight"].copy()
    first, last = fitted(optimizer)
    assert last < first / 5
    for other in copies:
        assert fitted(other) == (first, last)
        np.testing.assert_array_equal(other.vector, optimizer.vector)
    params["0"]["weight"] = np.ones((2, 16), np.float32)
    with pytest.raises(ValueError, match=r"params: 0\.weight must be \(16, 1\) of float32, got"):
        optimizer.step(0.1)


def test_an_error_within_a_step_leaves_no_gradients():
    broken = {11}  # the second batch of a step

    def batches(step):
        if step in broken:
            raise OSError("disk")
        return squares(step)

    def train(optimizer):
        nn.train(
            SQUARE, optimizer.params, batches, steps=20, rate=0.01, loss=nn.mean_squared,
            optimizer=optimizer, start=optimizer.count, accumulate=2,
        )  # fmt: skip

    stopped, whole = (nn.AdamW(SQUARE.init(np.random.default_rng(0))) for _ in range(2))
    with pytest.raises(OSError, match="disk"):
        train(stopped)
    assert not stopped.gradient.any()
    broken.clear()
    train(stopped)
    train(whole)
    np.testing.assert_array_equal(stopped.vector, whole.vector)


def test_what_is_frozen_stays_and_what_is_not_decayed_does_not_shrink():
    params, _ = fresh()
    optimizer = nn.AdamW(params, weight_decay=0.5, undecayed=("embedding",), frozen=("blocks.0",))
    before = {name: x.copy() for name, x in nn.leaves(params)}
    for _, gradient in nn.leaves(optimizer.grads):
        gradient[...] = 1e-3
    frozen = sum(x.size for n, x in nn.leaves(params) if n.startswith("blocks.0."))
    norm = optimizer.step(0.1)
    assert norm == pytest.approx(1e-3 * (optimizer.vector.size - frozen) ** 0.5)
    for name, x in nn.leaves(params):
        shrunk = before[name] * (0.95 if x.ndim > 1 and name != "embedding.weight" else 1)
        wanted = before[name] if name.startswith("blocks.0.") else shrunk - 0.1
        np.testing.assert_allclose(x, wanted, atol=2e-5, err_msg=name)


def test_projections_are_not_learned_but_redrawn():
    params, optimizer = fresh()
    projection = params["blocks"]["0"]["attention"]["branch"]["projection"].copy()
    nn.train(MODEL, params, batches, steps=3, rate=0.1, optimizer=optimizer)
    now = params["blocks"]["0"]["attention"]["branch"]["projection"]
    assert (now == projection).all()
    MODEL.redraw(params, (5, 3))
    first = now.copy()
    assert (first != projection).any()
    assert (first != params["blocks"]["1"]["attention"]["branch"]["projection"]).any()
    MODEL.redraw(params, (5, 3))
    assert (now == first).all()


def test_the_same_weights_with_exact_attention():
    """In the good regime the approximation costs little, and less with more features."""
    few, many = (nn.PerformerLM(vocab=17, dim=32, depth=1, heads=2, num_features=m, layers="F")
                 for m in (32, 4096))  # fmt: skip
    rng, costs = np.random.default_rng(0), []
    for model in (few, many):
        params = model.init(rng)
        for name, array in nn.leaves(params):
            if "output" in name:
                array[...] = rng.standard_normal(array.shape)
        x = batches(0)[0]
        ours, exact = model.apply(params, x), model.replace(exact=True).apply(params, x)
        costs.append(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))
    assert 0 < costs[1] < 0.3 * costs[0] < 0.3
