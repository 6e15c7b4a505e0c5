"""Small calls without options take a shorter way to the kernel, and get what others get."""

import numpy as np
import pytest
from support.parameters import each_dtype

from favor_np import AttentionState, favor_attention, feature_map
from favor_np.cpu import plain

FM = feature_map("positive", 8, 16)
#: An option that changes nothing, for which calls take the long way.
LONG = {"num_threads": 1}


def arrays(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((3, *shape)).astype(dtype)


def with_one(array, value):
    array.flat[3] = value
    return array


def strided(array):
    return np.repeat(array, 2, -1)[..., ::2]


ROWS = {
    "as they are": lambda q, k, v: (q, k, v),
    "heads in common": lambda q, k, v: (q, k[:, :1], v[:, :1]),
    "strided": lambda q, k, v: (strided(q), k.swapaxes(0, 1).copy().swapaxes(0, 1), strided(v)),
    "large values": lambda q, k, v: (q, k, np.full_like(v, np.finfo(v.dtype).max / 4)),
    "NaN": lambda q, k, v: (q, with_one(k, np.nan), v),
    "one token": lambda q, k, v: (q[..., :1, :], k[..., :1, :], v[..., :1, :]),
}


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_plain_calls_have_the_bits_of_others(rows, causal, dtype):
    q, k, v = ROWS[rows](*arrays(2, 3, 20, 8, dtype=dtype))
    found = favor_attention(q, k, v, FM, causal=causal)
    assert (plain.attend_plainly(q, k, v, FM, causal) is None) == (rows == "large values")
    np.testing.assert_array_equal(found, favor_attention(q, k, v, FM, causal=causal, **LONG))
    assert np.isfinite(found).all() == (rows != "NaN")


def states(dtype, batch):
    return [AttentionState(FM, 8, batch, dtype=dtype) for _ in range(2)]


@each_dtype
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_plain_tokens_have_the_bits_of_others(batch, dtype):
    mine, other = states(dtype, batch)
    for seed in range(20):  # more than a tail
        q, k, v = arrays(*batch, 8, dtype=dtype, seed=seed)
        if seed == 5:
            v[:] = np.finfo(dtype).max / 4
        plan = plain.plan_of_token(mine._form, batch, q, k, v)
        assert plan is not None
        if seed % 2:
            q, k, v = q[..., None, :], k[..., None, :], v[..., None, :]
        found, expected = mine.step(q, k, v), other.step(q, k, v, **LONG)
        np.testing.assert_array_equal(found, expected)
        assert found.shape == v.shape
    for a, b in zip(mine._arrays, other._arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(mine.lengths, other.lengths)


def test_tokens_after_a_decay_of_one_factor_each():
    mine, other = states(np.float32, (3,))
    for seed in range(4):
        token = arrays(3, 8, seed=seed)
        decay = 0.5 if seed == 1 else None
        found, expected = mine.step(*token, decay=decay), other.step(*token, decay=decay, **LONG)
        np.testing.assert_array_equal(found, expected)


MISFITS = {
    "q": lambda q, k, v: (q[..., :7], k, v),
    "k": lambda q, k, v: (q, k[..., :7], v),
    "v": lambda q, k, v: (q, k, v[..., 1:, :]),
    "axes": lambda q, k, v: (q, k[0, 0], v),
    "dtype": lambda q, k, v: (q.astype(complex), k, v),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_in_the_same_words(name):
    given = MISFITS[name](*arrays(2, 20, 8))
    with pytest.raises((TypeError, ValueError)) as expected:
        favor_attention(*given, FM, **LONG)
    with pytest.raises(expected.type) as found:
        favor_attention(*given, FM)
    assert str(found.value) == str(expected.value)


def test_a_refused_token_leaves_the_state_as_it_was():
    state, _ = states(np.float32, (3,))
    q, k, v = arrays(3, 8)
    state.step(q, k, v)
    before = [array.copy() for array in state._arrays]
    for token in ((q, k, v[..., :7]), (q[:2], k, v), (q, k[:2], v)):
        with pytest.raises(ValueError, match=r"must|broadcast|batch_shape"):
            state.step(*token)
    for array, old in zip(state._arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)
    assert state.lengths.tolist() == [1, 1, 1]
