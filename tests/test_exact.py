"""exact_attention against the dense oracle, and what must hold whatever the numbers are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.inputs import CHANGES, draw, lay_out, masks, random_inputs
from support.parameters import EDGES, each_causal, each_dtype, layouts, sizes
from support.tolerance import relative_error

from favor_np import exact_attention


def logit_tolerance(q, k, scale, dtype):
    """Rounding of the logits: eps times the largest of them, and a little more."""
    longest = [np.sqrt(np.max(np.sum(x.astype(float) ** 2, -1), initial=0)) for x in (q, k)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return np.finfo(dtype).eps * (8 + 4 * scale * longest[0] * longest[1])


@settings(max_examples=200)
@given(
    L=sizes,
    Lk=sizes,
    d=st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64]),
    dv=st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33]),
    dtype=st.sampled_from([np.float32, np.float64]),
    causal=st.booleans(),
    masked=st.booleans(),
    scale=st.sampled_from([None, 1.0, 0.1, 3]),
    std=st.sampled_from([0.1, 1.0, 4.0]),
    layout=st.tuples(layouts, layouts, layouts),
    seed=st.integers(0, 1000),
)
def test_differential(L, Lk, d, dv, dtype, causal, masked, scale, std, layout, seed):
    Lk = L if causal else Lk
    q, k, v = random_inputs(L, d, dv, Lk=Lk, std=std, seed=seed, dtype=dtype)
    mask = np.random.default_rng(seed).random(Lk) < 0.7 if masked else None
    arguments = [lay_out(x, how) for x, how in zip((q, k, v), layout, strict=True)]
    out = exact_attention(*arguments, causal=causal, scale=scale, key_mask=mask)
    assert out.dtype == dtype
    options = {"causal": causal, "scale": scale, "key_mask": mask}
    expected = oracle.exact_attention(q, k, v, **options)
    # Values of opposite signs may cancel, and rounding is relative to what they were before.
    before = oracle.exact_attention(q, k, np.abs(v), **options)
    error = relative_error(out, expected) * np.max(np.abs(expected), initial=0)
    assert error <= logit_tolerance(q, k, scale, dtype) * np.max(before, initial=0)
    assert np.array_equal(out, exact_attention(q, k, v, causal=causal, scale=scale, key_mask=mask))
    for x, y in zip(arguments, (q, k, v), strict=True):
        assert np.array_equal(x, y)


@each_dtype
@each_causal
def test_every_length_around_the_tiles(dtype, causal):
    q, k, v = random_inputs(1100, 3, 2, dtype=dtype)
    for L in [*EDGES, 511, 512, 513, 1030]:
        out = exact_attention(q[:L], k[:L], v[:L], causal=causal)
        expected = oracle.exact_attention(q[:L], k[:L], v[:L], causal=causal)
        assert relative_error(out, expected) < logit_tolerance(q, k, None, dtype), L


@each_causal
def test_leading_axes_and_grouped_heads(causal):
    L = 20
    q, k, v = draw(2, 1, L, 4), draw(3, L, 4, seed=1), draw(1, 1, L, 5, seed=2)
    mask = np.random.default_rng(3).random((3, L)) < 0.6
    out = exact_attention(q, k, v, causal=causal, key_mask=mask)
    expected = oracle.exact_attention(q, k, v, causal=causal, key_mask=mask)
    assert relative_error(out, expected) < 1e-14
    q, (k, v) = draw(2, 6, 70, 4), draw(2, 2, 2, 70, 4, seed=1)
    out = exact_attention(q, k, v, causal=causal, enable_gqa=True)
    expected = oracle.exact_attention(q, k, v, causal=causal, enable_gqa=True)
    assert relative_error(out, expected) < 1e-14


@each_causal
@pytest.mark.parametrize(("std", "limit"), [(0.5, 2e-6), (1, 2e-6), (2, 2e-6), (4, 1e-5)])
def test_float32_against_float64(std, limit, causal):
    q, k, v = random_inputs(512, 64, 64, std=std, dtype=np.float32)
    out = exact_attention(q, k, v, causal=causal)
    wide = exact_attention(*(x.astype(np.float64) for x in (q, k, v)), causal=causal)
    assert relative_error(out, wide) < limit


@each_dtype
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e15, 1e30])
@each_causal
def test_huge_inputs_are_finite(dtype, size, causal):
    q, k, v = random_inputs(80, std=size, dtype=dtype)
    small_q, small_k, _ = random_inputs(80, dtype=dtype, seed=1)
    for a, b in ((q, k), (q, small_k), (small_q, k)):
        out = exact_attention(a, b, v, causal=causal)
        assert np.isfinite(out).all()
        assert np.abs(out).max() <= np.abs(v).max() * 1.001


@each_dtype
@pytest.mark.parametrize("path", ["rise", "fall", "zigzag"])
@each_causal
def test_logits_of_ten_thousand(dtype, path, causal):
    """Logits that span 1e4 along the keys, but are rounded exactly: only exp is tested."""
    L = 300
    steps = {"rise": np.arange(L), "fall": -np.arange(L), "zigzag": np.arange(L) % 7}[path]
    k = np.stack([64.0 * steps, steps % 3], axis=-1).astype(dtype)
    q = np.stack([np.full(L, 1.0), np.arange(L) % 5], axis=-1).astype(dtype)
    v = draw(L, 4, dtype=dtype)
    assert path == "zigzag" or np.abs(q @ k.T).max() > 1e4
    out = exact_attention(q, k, v, causal=causal, scale=1.0)
    expected = oracle.exact_attention(q, k, v, causal=causal, scale=1.0)
    # In units of log 2 a logit of 2e4 has an error of eps * 2e4 in the dtype it is kept in.
    assert relative_error(out, expected) < (1e-2 if dtype == np.float32 else 1e-11)


def test_what_attention_is():
    ones = np.ones((3, 1))
    out = exact_attention(ones, ones, np.array([[1.0], [0], [0]]), causal=True)
    assert np.allclose(out[:, 0], [1, 1 / 2, 1 / 3], rtol=1e-15)
    q, k, _ = random_inputs(80)
    weights = exact_attention(q, k, np.eye(80), causal=True)
    assert np.allclose(weights.sum(-1), 1, rtol=1e-14)
    assert np.array_equal(weights > 0, np.tri(80, dtype=bool))


@each_dtype
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_future_changes_no_bit_of_the_past(dtype, change):
    q, k, v = random_inputs(150, std=2.0, dtype=dtype)
    before = exact_attention(q, k, v, causal=True)
    for t in (0, 1, 5, 15, 16, 17, 40, 63, 64, 65, 100, 128, 149):
        for which in range(3):
            changed = [x.copy() for x in (q, k, v)]
            changed[which][t:] = change(changed[which][t:])
            after = exact_attention(*changed, causal=True)
            assert np.array_equal(after[:t], before[:t]), (t, "qkv"[which])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_causal
def test_not_finite_input_reaches_only_the_rows_that_see_it(bad, causal):
    q, k, v = random_inputs(130)
    before = exact_attention(q, k, v, causal=causal)
    for t in (0, 3, 63, 64, 100):
        for which in range(3):
            changed = [x.copy() for x in (q, k, v)]
            changed[which][t, 2] = bad
            out = exact_attention(*changed, causal=causal)
            if which == 0:
                hit = np.arange(130) == t
            else:
                hit = np.arange(130) >= t if causal else np.full(130, True)
            columns = slice(None) if which < 2 else [2]
            assert not np.isfinite(out[hit][:, columns]).any(), (t, "qkv"[which])
            if which < 2:
                assert np.isnan(out[hit]).all()
            assert np.array_equal(out[~hit], before[~hit]), (t, "qkv"[which])


@pytest.mark.parametrize("name", masks(90))
@each_causal
def test_masked_keys_vanish(name, causal):
    mask = masks(90)[name]
    q, k, v = random_inputs(90)
    out = exact_attention(q, k, v, causal=causal, key_mask=mask)
    expected = oracle.exact_attention(q, k, v, causal=causal, key_mask=mask)
    assert relative_error(out, expected) < 1e-14
    if not mask.any():
        assert np.array_equal(out, np.zeros_like(v))
    for poison in (np.nan, np.inf, 1e300):
        k[~mask] = v[~mask] = poison
        again = exact_attention(q, k, v, causal=causal, key_mask=mask)
        assert np.array_equal(out, again)


def test_no_keys_give_zeros():
    q, k, v = random_inputs(7, lead=(2,))
    assert np.array_equal(exact_attention(q, k[:, :0], v[:, :0]), np.zeros((2, 7, 5)))


@each_dtype
@each_causal
@pytest.mark.parametrize(("lead", "L"), [((7,), 200), ((1,), 1500)])
def test_threads_change_no_bit(lead, L, causal, dtype):
    q, k, v = random_inputs(L, 16, 16, lead, dtype=dtype)
    one = exact_attention(q, k, v, causal=causal, num_threads=1)
    for n in (2, 3, 8, None):
        assert np.array_equal(exact_attention(q, k, v, causal=causal, num_threads=n), one)
