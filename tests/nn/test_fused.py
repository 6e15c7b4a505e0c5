"""Compiled passes of layers: values against NumPy and SciPy in float64, at ordinary numbers and far ones."""

import os
import time

import numpy as np
import pytest
from scipy import special
from support.child import python

import favor_np
from favor_np import nn
from favor_np.nn import fused, memory, products

TOLERANCE = {np.float32: 2e-6, np.float64: 2e-14}
TANH = (2 / np.pi) ** 0.5


def gelu(x):
    return x * special.ndtr(x), special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def gelu_tanh(x):
    t = np.tanh(TANH * (x + 0.044715 * x**3))
    return x * (1 + t) / 2, (1 + t + x * (1 - t * t) * TANH * (1 + 0.134145 * x * x)) / 2


FUNCTIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: (np.maximum(x, 0), 1.0 * (x > 0)),
    "relu2": lambda x: (np.maximum(x, 0) ** 2, 2 * np.maximum(x, 0)),
    "silu": lambda x: (x * special.expit(x), special.expit(x) * (1 + x * special.expit(-x))),
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def close(found, wanted, dtype):
    assert found.dtype == dtype
    error = abs(found - wanted).max()
    assert error <= TOLERANCE[dtype] * max(abs(wanted).max(), 1)


@dtypes
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 70, 40)])
def test_functions(name, shape, dtype):
    rng = np.random.default_rng(0)
    x, grad = (3 * rng.standard_normal((2, *shape))).astype(dtype)
    value, slope = FUNCTIONS[name](x.astype(np.float64))
    close(fused.activate(name, x), value, dtype)
    close(fused.activate_back(name, x, grad), grad * slope, dtype)


@dtypes
@pytest.mark.parametrize(("name", "of"), [("geglu", "gelu"), ("swiglu", "silu")])
def test_gated_functions(name, of, dtype):
    rng = np.random.default_rng(0)
    x, grad = rng.standard_normal((9, 14)).astype(dtype), rng.standard_normal((9, 7)).astype(dtype)
    value, slope = FUNCTIONS[of](x[:, :7].astype(np.float64))
    close(fused.activate(name, x), value * x[:, 7:], dtype)
    both = np.concatenate([grad * x[:, 7:] * slope, grad * value], 1)
    close(fused.activate_back(name, x, grad), both, dtype)


@dtypes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_far_numbers(name, dtype):
    """Nothing overflows on the way, and NaN stays NaN."""
    x = np.array([[-1e30, -700, -90, -40, 0.0, 1e-30, 40, 90, 700, 1e15, np.nan]], dtype)
    value = fused.activate(name, x)[0]
    slope = fused.activate_back(name, x, np.ones_like(x))[0]
    with np.errstate(over="ignore", invalid="ignore"):
        right, right_slope = FUNCTIONS[name](x[0].astype(np.float64))
    assert np.isnan(value[-1])
    assert np.isnan(slope[-1]) or name.startswith("relu")
    np.testing.assert_allclose(value[:-1], right[:-1], rtol=1e-6, atol=1e-14)
    far = slice(1, -1) if name == "gelu_tanh" else slice(0, -1)  # there NumPy's overflows
    np.testing.assert_allclose(slope[far], right_slope[far], rtol=1e-6, atol=1e-14)


@dtypes
def test_cross_entropy(dtype):
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((130, 37))).astype(dtype)
    logits[0] = -1e4
    logits[0, 3] = 1e4
    targets = rng.integers(0, 37, 130)
    targets[7] = 36
    loss, grad = nn.cross_entropy(logits, targets, ignore=36)
    x, counted = logits.astype(np.float64), targets != 36
    right = special.logsumexp(x, axis=1) - x[np.arange(130), targets]
    assert loss == pytest.approx(right[counted].mean(), rel=10 * TOLERANCE[dtype])
    wanted = special.softmax(x, axis=1)
    wanted[np.arange(130), targets] -= 1
    wanted[~counted] = 0
    np.testing.assert_allclose(grad, wanted / counted.sum(), atol=TOLERANCE[dtype] / 100)


@pytest.mark.parametrize("place", [0, 5, 36])
def test_a_nan_among_logits_is_a_nan_loss(place):
    logits = np.zeros((3, 37))
    logits[1, place] = np.nan
    assert np.isnan(nn.cross_entropy(logits, [0, 1, 2])[0])


def test_adam_is_the_formula():
    rng = np.random.default_rng(0)
    params = {"a": {"weight": rng.standard_normal((130, 257))}, "b": rng.standard_normal(11)}
    optimizer = nn.AdamW(params, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    x, m, v = (
        np.concatenate([t.ravel(), params["b"]]) for t in (params["a"]["weight"],) for _ in "xmv"
    )
    m, v = 0 * m, 0 * v
    decay = np.repeat([1 - 0.01 * 0.3, 1], [130 * 257, 11])
    for step in range(1, 4):
        g = rng.standard_normal(x.shape)
        optimizer.gradient[:] = g
        norm = optimizer.step(0.01, clip=2.0)
        assert norm == pytest.approx(np.linalg.norm(g), rel=1e-12)
        g *= 2 / np.linalg.norm(g)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x = decay * x - 0.01 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3)
        np.testing.assert_allclose(optimizer.vector, x, rtol=1e-12)
        assert not optimizer.gradient.any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (700, 96, 130), (2100, 64, 64)], ids=str)
@dtypes
def test_products(shape, dtype):
    """Of any size, and the same bits on one thread and on two."""
    rows, inputs, outputs = shape
    rng = np.random.default_rng(0)
    x, grad = rng.standard_normal((rows, inputs)), rng.standard_normal((rows, outputs))
    weight, to = rng.standard_normal((outputs, inputs)), rng.standard_normal((outputs, inputs))
    x, grad, weight, to = (a.astype(dtype) for a in (x, grad, weight, to))
    found = []
    for threads in (1, 2):
        with favor_np.thread_limit(threads):
            total = to.copy()
            products.add_product(total, grad, x)
            found.append(
                (products.multiply(x, weight), products.multiply_back(grad, weight), total)
            )
    wanted = x @ weight.T, grad @ weight, to + grad.T @ x
    for one, two, right in zip(*found, wanted, strict=True):
        assert (one == two).all()
        np.testing.assert_allclose(
            one, right, rtol=0, atol=100 * TOLERANCE[dtype] * abs(right).max()
        )


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_jobs_in_python_are_done_once(threads):
    for count in (1, 2, 3, 50):
        done = []
        with favor_np.thread_limit(threads):
            products.share(done.append, count)
        assert sorted(done) == list(range(count))


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("wrong", [0, 1, 7])
def test_an_interrupt_of_a_job_reaches_the_caller(threads, wrong):
    """Whichever thread it meets, and nobody works on the arrays any more."""
    for _ in range(50):
        working = []

        def job(number, working=working):
            working.append(number)
            if number == wrong:
                raise KeyboardInterrupt
            time.sleep(1e-4)
            working.remove(number)

        with favor_np.thread_limit(threads), pytest.raises(KeyboardInterrupt):
            products.share(job, 8)
        assert working == [wrong]


def test_the_threads_of_blas_are_put_back():
    import threadpoolctl

    def counts():
        return [each["num_threads"] for each in threadpoolctl.threadpool_info()]

    before = counts()
    products.multiply(np.ones((3000, 64)), np.ones((64, 64)))
    assert counts() == before
    with threadpoolctl.threadpool_limits(1):
        products.multiply(np.ones((3000, 64)), np.ones((64, 64)))
        assert set(counts()) == {1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_in_the_midst_of_products():
    """The child multiplies as if nobody else had been there."""
    code = """
import os, threading
import numpy as np, threadpoolctl
from favor_np.nn import blas, products

def counts():
    return [each["num_threads"] for each in threadpoolctl.threadpool_info()]

before, hold, ready = counts(), threading.Event(), threading.Event()

def multiply():
    with blas.one_thread(), blas._lock:
        ready.set()
        hold.wait()

thread = threading.Thread(target=multiply)
thread.start()
ready.wait()
child = os.fork()
if not child:
    products.multiply(np.ones((3000, 64)), np.ones((64, 64)))
    os._exit(counts() != before)
print(os.waitpid(child, 0)[1])
hold.set()
"""
    assert python(code) == "0\n"


def test_memory_is_used_again_while_an_optimizer_lives():
    params = nn.Linear(4, 4).init(np.random.default_rng(0))
    optimizer = nn.AdamW(params)
    first = memory.empty((300, 300), np.float64)
    place = first.ctypes.data
    part = first[3:, :7]
    del first
    second = memory.empty((300, 300), np.float64)
    assert second.ctypes.data != place  # a view still lives
    del part
    assert memory.empty((299, 301), np.float32).ctypes.data != place  # of another size
    third = memory.empty((300, 300), np.float64)
    assert third.ctypes.data == place
    del second, third
    assert memory.held() > 300 * 300 * 8
    for _ in range(2):
        optimizer.step(0.1)
    assert memory.held() == 0  # two steps have not used it
    del optimizer
    kept = memory.empty((300, 300), np.float64)
    del kept
    assert memory.held() == 0


def test_no_more_memory_is_kept_than_was_used_at_a_time():
    optimizer = nn.AdamW({"weight": np.ones(3, np.float32)})
    for size in range(200):
        memory.empty((300 + size, 300), np.float64)
    assert 300 * 300 * 8 <= memory.held() < 2 * 500 * 300 * 8
    del optimizer
    assert memory.held() == 0
