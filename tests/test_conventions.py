"""What docs/conventions.md says, as far as no other file tests it."""

import ml_dtypes
import numpy as np
import pytest
from child import BEGIN, python

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
    x = X.astype(getattr(ml_dtypes, name))
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
    assert favor_np.threads.resolve_threads(None) == 3
assert numba.get_num_threads() == 1
print("fine")
""",
        FAVOR_NP_NUM_THREADS="3",
    )
    assert out == "fine\n"
