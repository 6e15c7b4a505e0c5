"""What docs/conventions.md says, as far as no other file tests it."""

import ml_dtypes
import numpy as np
import pytest
from support.child import BEGIN, python

import favor_np

FM = favor_np.feature_map("positive", 4, 8)
X = np.arange(-6, 6).reshape(3, 4) / 4
#: All that ml_dtypes has and NumPy has not, with real numbers.
SMALL = [
    name
    for name in dir(ml_dtypes)
    if name.startswith(("float", "int", "uint")) and name != "bfloat16"
]


@pytest.mark.parametrize("name", SMALL)
def test_numbers_of_eight_bits_and_fewer_are_refused(name):
    """A result in three bits, or in whole numbers, would look right and be none."""
    x = np.zeros(X.shape, getattr(ml_dtypes, name))
    calls = (
        lambda: favor_np.favor_attention(x, X, X, FM),
        lambda: favor_np.favor_attention(X, X, x, FM),
        lambda: favor_np.exact_attention(X, x, X),
        lambda: favor_np.favor_attention_vjp(X, x, X, FM),
        lambda: favor_np.AttentionState.zeros(FM, 4).update(x, x),
        lambda: FM.query_features(x),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"must hold real numbers .*, got dtype {name}"):
            call()


def test_there_are_such_dtypes():
    assert {"float8_e4m3fn", "float8_e5m2", "int4", "uint4"} <= set(SMALL)


def test_bfloat16_is_taken():
    x = X.astype(ml_dtypes.bfloat16)
    assert favor_np.favor_attention(x, x, x, FM).dtype == ml_dtypes.bfloat16


def test_nobody_else_has_a_say_in_the_threads():
    """Nor do we in theirs: numba's own count, and what threadpoolctl limits."""
    out = python(
        BEGIN
        + """
import numba, threadpoolctl
numba.set_num_threads(1)
with threadpoolctl.threadpool_limits(1):
    check(3)
    assert helpers() == 2
    assert favor_np.cpu.threads.resolve_threads(None) == 3
assert numba.get_num_threads() == 1
print("fine")
""",
        FAVOR_NP_NUM_THREADS="3",
    )
    assert out == "fine\n"


def rows(std):
    return (std * np.random.default_rng(0).standard_normal((3, 2, 200, 16))).astype(np.float32)


def in_a_state(q, k, v, fm):
    state = favor_np.AttentionState.zeros(fm, 16, 2, decay=0.5).update(k, v)
    state.step(q[:, 0], k[:, 0], v[:, 0])
    state.merge(state.copy())
    return state.S, state.attend(q)


def in_a_window(q, k, v, fm):
    state = favor_np.WindowState(fm, 16, 20, 2).update(k, v)
    state.step(q[:, 0], k[:, 0], v[:, 0])
    return state.attend(q), favor_np.favor_attention(q, k, v, fm, causal=True, window=20)


USES = {
    "recommend": lambda q, k, v, fm: favor_np.recommend(q, k),
    "calibrate": lambda q, k, v, fm: fm.calibrate(q, k),
    "calibrate spherical": lambda q, k, v, fm: fm.calibrate(q, k, method="spherical"),
    "diagnose": favor_np.diagnose,
    "kernel_variance": lambda q, k, v, fm: favor_np.kernel_variance(q[0], k[0], fm),
    "weights": lambda q, k, v, fm: favor_np.attention_weights(q, k, fm),
    "attention": lambda q, k, v, fm: favor_np.favor_attention(q, k, v, fm, causal=True),
    "gradient": lambda q, k, v, fm: favor_np.favor_attention_vjp(q, k, v, fm)[1](v).projection,
    "exact": lambda q, k, v, fm: favor_np.exact_attention_vjp(q, k, v)[1](v).k,
    "features": lambda q, k, v, fm: (fm.query_features(q), fm.key_features(k)),
    "state": in_a_state,
    "window": in_a_window,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("std", [1, 20, 60])
def test_underflow_is_no_error_whatever_numpy_was_told(use, std):
    """Numbers too small to matter are everywhere in attention, and mean nothing."""
    q, k, v = rows(std)
    fm = favor_np.feature_map("positive", 16, 64)
    with np.errstate(all="raise"):
        use(q, k, v, fm)
        assert set(np.geterr().values()) == {"raise"}
