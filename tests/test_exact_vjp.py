"""exact_attention_vjp against the dense oracle, finite differences, and what must always hold."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import oracle
from support.inputs import CHANGES, draw, lay_out, masks, random_inputs
from support.parameters import each_causal, each_dtype, layouts, sizes
from support.tolerance import relative_error

from favor_np import exact_attention, exact_attention_vjp, favor_attention_vjp, feature_map


def gradients(q, k, v, g, **options):
    return exact_attention_vjp(q, k, v, **options)[1](g)


def error(grads, expected, least=(0.1, 0.1, 0.1)):
    """The largest deviation, relative to each gradient, or to `least` where that is smaller."""
    floor = [np.maximum(np.abs(x).max(initial=0), y) for x, y in zip(expected, least, strict=True)]
    pairs = zip(grads, expected, floor, strict=True)
    return max(float(np.abs(x - y).max(initial=0) / size) for x, y, size in pairs)


def same(grads, others):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(grads, others, strict=True))


@settings(max_examples=150)
@example(  # one key: the gradients of q and k vanish
    L=9, Lk=1, d=1, dv=33, dtype=np.float32, causal=False, masked=False, scale=None,
    layout=("C", "C", "C", "C"), seed=0,
)  # fmt: skip
@example(
    L=31, Lk=1, d=80, dv=33, dtype=np.float32, causal=False, masked=False, scale=1.0,
    layout=("C", "C", "C", "C"), seed=33,
)  # fmt: skip
@given(
    L=sizes,
    Lk=sizes,
    d=st.sampled_from([1, 3, 8, 16, 17, 64, 80]),
    dv=st.sampled_from([1, 3, 8, 16, 17, 33]),
    dtype=st.sampled_from([np.float32, np.float64]),
    causal=st.booleans(),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.1, 1.0]),
    layout=st.tuples(layouts, layouts, layouts, layouts),
    seed=st.integers(0, 1000),
)
def test_differential(L, Lk, d, dv, dtype, causal, masked, scale, layout, seed):
    Lk = L if causal else Lk
    arrays = (
        *random_inputs(L, d, dv, Lk=Lk, seed=seed, dtype=dtype),
        draw(L, dv, seed=seed + 1, dtype=dtype),
    )
    mask = np.random.default_rng(seed).random(Lk) < 0.7 if masked else None
    options = {"causal": causal, "scale": scale, "key_mask": mask}
    q, k, v, g = (lay_out(x, how) for x, how in zip(arrays, layout, strict=True))
    out, pullback = exact_attention_vjp(q, k, v, **options)
    grads = pullback(g)
    assert np.array_equal(out, exact_attention(q, k, v, **options))
    assert [x.dtype for x in grads] == [dtype] * 3
    expected = oracle.exact_attention_vjp(*arrays, **options)
    # Those of q and k are differences of such products: where they vanish that rounding is left.
    products = max(0.1, 0.1 * np.abs(arrays[3] @ arrays[2].T).max(initial=0))
    limit = 2e-5 if dtype == np.float32 else 1e-13
    assert error(grads, expected, (products, products, 0.1)) < limit
    assert same(grads, gradients(*arrays, **options))  # the layout changes no bit
    assert same((q, k, v, g), arrays)  # inputs are untouched


@each_dtype
@each_causal
def test_every_length_around_the_tiles_and_blocks(dtype, causal):
    q, k, v = random_inputs(1030, 3, 2, dtype=dtype)
    g = draw(1030, 2, seed=1, dtype=dtype)
    for L in (1, 2, 7, 8, 9, 63, 64, 65, 127, 129, 511, 512, 513, 1030):
        arrays = [x[:L] for x in (q, k, v, g)]
        expected = oracle.exact_attention_vjp(*arrays, causal=causal)
        limit = 2e-5 if dtype == np.float32 else 1e-13
        assert error(gradients(*arrays, causal=causal), expected) < limit, L


@pytest.mark.parametrize(("L", "Lk"), [(700, 65), (64, 1100), (1, 600), (600, 1)])
def test_cross_attention_over_blocks(L, Lk):
    q, k, v = random_inputs(L, 80, 64, Lk=Lk)
    g = draw(L, 64, seed=1)
    for mask in (None, np.random.default_rng(2).random(Lk) < 0.5):
        expected = oracle.exact_attention_vjp(q, k, v, g, key_mask=mask)
        assert error(gradients(q, k, v, g, key_mask=mask), expected) < 1e-12


@each_causal
def test_finite_differences(causal):
    arrays = [*random_inputs(5, 3, 2)]
    g = draw(5, 2, seed=1)
    mask = np.array([True, True, False, True, True])
    options = {"causal": causal, "key_mask": mask, "scale": 0.8}
    grads = gradients(*arrays, g, **options)
    for which, grad in enumerate(grads):
        for at in np.ndindex(grad.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in arrays]
                moved[which][at] += step
                sides.append((exact_attention(*moved, **options) * g).sum())
            assert abs((sides[0] - sides[1]) / 2e-5 - grad[at]) < 1e-9, ("qkv"[which], at)


@pytest.mark.parametrize(
    ("lead_q", "lead_k", "lead_v", "lead_mask"),
    [((2, 1), (3,), (1, 1), (3,)), ((3,), (), (2, 1), ()), ((), (2,), (2, 1), (1,))],
)
@each_causal
def test_what_was_broadcast_is_summed(lead_q, lead_k, lead_v, lead_mask, causal):
    L = 70
    q, k, v = draw(*lead_q, L, 4), draw(*lead_k, L, 4, seed=1), draw(*lead_v, L, 5, seed=2)
    mask = np.random.default_rng(3).random((*lead_mask, L)) < 0.6
    out, pullback = exact_attention_vjp(q, k, v, causal=causal, key_mask=mask)
    g = draw(*out.shape, seed=4)
    grads = pullback(g)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
    expected = oracle.exact_attention_vjp(q, k, v, g, causal=causal, key_mask=mask)
    assert error(grads, expected) < 1e-13


@each_causal
def test_groups_of_heads_are_summed(causal):
    q, (k, v), g = draw(2, 6, 70, 4), draw(2, 1, 2, 70, 4, seed=1), draw(2, 6, 70, 4, seed=2)
    grads = gradients(q, k, v, g, causal=causal, enable_gqa=True)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
    expected = oracle.exact_attention_vjp(q, k, v, g, causal=causal, enable_gqa=True)
    assert error(grads, expected) < 1e-13


@each_causal
@pytest.mark.parametrize("d", [1, 64])
def test_float32_against_float64(d, causal):
    q, k, v = random_inputs(1024, d, 64, dtype=np.float32)
    g = draw(1024, 64, seed=1, dtype=np.float32)
    grads = gradients(q, k, v, g, causal=causal)
    wide = gradients(*(x.astype(np.float64) for x in (q, k, v, g)), causal=causal)
    for x, y in zip(grads, wide, strict=True):
        assert relative_error(x, y) < 5e-6


def test_what_the_gradient_is():
    """With q = 0 every visible key has the same weight."""
    L = 80
    _, k, v = random_inputs(L)
    g = draw(L, 5, seed=1)
    grads = gradients(np.zeros((L, 6)), k, v, g, causal=True, scale=1.0)
    each = g / np.arange(1, L + 1)[:, None]
    assert np.allclose(grads.v, np.cumsum(each[::-1], axis=0)[::-1], rtol=1e-12)
    assert not grads.k.any()
    last = (v - v.mean(0)) @ g[-1] @ (k - k.mean(0)) / L  # a covariance
    assert np.allclose(grads.q[-1], last, rtol=1e-12)
    # A vector that is added to all keys changes no weight.
    q = draw(L, 6, seed=2)
    assert np.abs(gradients(q, k, v, g).k.sum(0)).max() < 1e-13


@each_dtype
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_earlier_cotangents_change_no_bit_of_later_gradients(dtype, change):
    q, k, v = random_inputs(150, std=2.0, dtype=dtype)
    g = draw(150, 5, seed=1, dtype=dtype)
    _, pullback = exact_attention_vjp(q, k, v, causal=True)
    before = pullback(g)
    for t in (1, 5, 15, 16, 17, 40, 63, 64, 65, 100, 128, 149):
        changed = g.copy()
        changed[:t] = change(changed[:t])
        after = pullback(changed)
        assert same([x[t:] for x in after], [x[t:] for x in before]), t
        assert not np.array_equal(after.v[:t], before.v[:t])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_later_inputs_change_no_bit_of_earlier_query_gradients(change):
    q, k, v = random_inputs(150)
    g = draw(150, 5, seed=1)
    before = gradients(q, k, v, g, causal=True).q
    for t in (1, 16, 63, 64, 65, 149):
        for which in range(4):
            changed = [x.copy() for x in (q, k, v, g)]
            changed[which][t:] = change(changed[which][t:])
            after = gradients(*changed, causal=True).q
            assert np.array_equal(after[:t], before[:t]), (t, "qkvg"[which])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_causal
def test_not_finite_input_reaches_only_what_sees_it(bad, causal):
    L = 130
    q, k, v = random_inputs(L)
    g = draw(L, 5, seed=1)
    before = gradients(q, k, v, g, causal=causal)
    rows = np.arange(L)
    for t in (0, 3, 63, 64, 100):
        sees_t = rows >= t if causal else np.full(L, True)
        seen_by_t = rows <= t if causal else np.full(L, True)
        nobody, everybody = np.full(L, False), np.full(L, True)
        spoilt = {
            "q": (rows == t, seen_by_t, seen_by_t),
            "k": (sees_t, everybody, everybody),
            "v": (sees_t, everybody, nobody),  # weights and cotangents know no values
            "g": (rows == t, seen_by_t, seen_by_t),
        }
        for which, name in enumerate(spoilt):
            changed = [x.copy() for x in (q, k, v, g)]
            changed[which][t, 2] = bad
            after = gradients(*changed, causal=causal)
            for x, y, hit in zip(after, before, spoilt[name], strict=True):
                assert not np.isfinite(x[hit]).any(), (t, name)
                assert np.array_equal(x[~hit], y[~hit]), (t, name)


@pytest.mark.parametrize("name", masks(90))
@each_causal
def test_masked_keys_have_zero_gradient(name, causal):
    mask = masks(90)[name]
    q, k, v = random_inputs(90)
    g = draw(90, 5, seed=1)
    grads = gradients(q, k, v, g, causal=causal, key_mask=mask)
    expected = oracle.exact_attention_vjp(q, k, v, g, causal=causal, key_mask=mask)
    assert error(grads, expected) < 1e-13
    assert not grads.k[~mask].any()
    assert not grads.v[~mask].any()
    for poison in (np.nan, np.inf, 1e300):
        k[~mask] = v[~mask] = poison
        assert same(grads, gradients(q, k, v, g, causal=causal, key_mask=mask))
    q[80] = g[70] = np.nan
    grads = gradients(q, k, v, g, causal=causal, key_mask=mask)
    assert not grads.k[~mask].any()
    assert not grads.v[~mask].any()


@each_causal
def test_rows_without_a_key_have_zero_gradient(causal):
    q, k, v = random_inputs(90)
    g = draw(90, 5, seed=1)
    mask = np.arange(90) >= 70 if causal else np.zeros(90, bool)
    grads = gradients(q, k, v, g, causal=causal, key_mask=mask)
    lonely = np.arange(90) < 70 if causal else np.full(90, True)
    assert not grads.q[lonely].any()
    g[lonely] = np.nan
    assert same(grads, gradients(q, k, v, g, causal=causal, key_mask=mask))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 7, 3), (2, 0, 3), (2, 0, 5)),
        ((2, 0, 3), (2, 7, 3), (2, 7, 5)),
        ((7, 3), (7, 3), (7, 0)),
        ((0, 7, 3), (7, 3), (1, 7, 5)),
    ],
)
def test_empty_arrays_have_zero_gradients(q, k, v):
    q, k, v = np.ones(q), np.ones(k), np.ones(v)
    out, pullback = exact_attention_vjp(q, k, v)
    assert same(pullback(np.ones_like(out)), [np.zeros_like(x) for x in (q, k, v)])


@each_dtype
@each_causal
@pytest.mark.parametrize(("lead", "L"), [((7,), 200), ((1,), 1500)])
def test_threads_change_no_bit(lead, L, causal, dtype):
    q, k, v = random_inputs(L, 16, 16, lead, dtype=dtype)
    g = draw(*v.shape, seed=1, dtype=dtype)
    one = gradients(q, k, v, g, causal=causal, num_threads=1)
    for n in (2, 3, 8, None):
        assert same(gradients(q, k, v, g, causal=causal, num_threads=n), one)


@each_causal
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15])
def test_logits_too_large_for_float32_are_computed_in_float64(size, causal):
    q, k, v = random_inputs(80, std=size, dtype=np.float32)
    g = draw(80, 5, seed=1, dtype=np.float32)
    grads = gradients(q, k, v, g, causal=causal)
    wide = gradients(*(x.astype(np.float64) for x in (q, k, v, g)), causal=causal)
    assert all(np.isfinite(x).all() for x in grads)
    assert same(grads, [x.astype(np.float32) for x in wide])


@each_dtype
@each_causal
def test_logits_of_ten_thousand(dtype, causal):
    """Logits are rounded exactly, and the largest ones of a row are equal: none has all the weight."""
    L = 300
    k = np.stack([64.0 * (np.arange(L) % 7), np.arange(L) % 3], axis=-1).astype(dtype)
    q = np.stack([np.full(L, 32.0), np.zeros(L)], axis=-1).astype(dtype)
    v, g = draw(L, 4, dtype=dtype), draw(L, 4, seed=1, dtype=dtype)
    assert np.abs(q @ k.T).max() > 1e4
    grads = gradients(q, k, v, g, causal=causal, scale=1.0)
    expected = oracle.exact_attention_vjp(q, k, v, g, causal=causal, scale=1.0)
    assert error(grads, expected) < (1e-2 if dtype == np.float32 else 1e-11)


def test_gradients_have_the_dtypes_of_the_inputs():
    q, k, v = (x.round() for x in random_inputs(9, 4, 4))
    g = draw(9, 4, seed=1).round()
    expected = gradients(q, k, v, g)
    for dtypes in ("efe", "edf", "dff", (">f4", "<f8", ">f8"), "fff"):
        typed = [x.astype(dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)]
        grads = gradients(*typed, g.tolist())
        assert [x.dtype for x in grads] == [x.dtype.newbyteorder("=") for x in typed]
        assert error(grads, expected) < 2e-3
    grads = gradients(q.astype(int), k.tolist(), v > 0, g.astype(np.float32))
    assert [x.dtype for x in grads] == [np.float64] * 3
    assert same(grads, gradients(q, k, v > 0, g))


def test_overflow_is_silent():
    """The suite turns warnings into errors."""
    k, v = draw(2, 9, 4), draw(9, 4, seed=1)
    grads = gradients(v.astype(np.float16), k, v, np.full((2, 9, 4), 1e300))
    assert np.isinf(grads.q).any()
    for size in (1e-300, 1e300, np.inf, np.nan):
        gradients(v, size * k, v, k)
        gradients(v, k, size * v, k, causal=True)
        gradients(v, k, v, size * k)


def test_a_pullback_may_be_called_again():
    q, k, v = random_inputs(70)
    g, other = draw(2, 70, 5, seed=1)
    _, pullback = exact_attention_vjp(q, k, v)
    first = pullback(g)
    kept = [x.copy() for x in first]
    second = pullback(other)
    assert same(first, kept)
    assert same(pullback(g), kept)
    total = pullback(2 * g - other)
    assert error(total, [2 * a - b for a, b in zip(first, second, strict=True)]) < 1e-13


@pytest.mark.parametrize(
    ("g", "kind", "message"),
    [
        (np.ones((6, 4)), ValueError, r"grad_out must have shape \(2, 6, 3\), got \(6, 4\)"),
        (np.ones((6, 3)), ValueError, r"grad_out must have shape \(2, 6, 3\), got \(6, 3\)"),
        (1.0, ValueError, "grad_out must have at least 2 axes"),
        (np.ones((2, 6, 3), complex), TypeError, "grad_out must hold real numbers"),
        (np.full((2, 6, 3), np.nan), ValueError, "grad_out must be finite"),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_refused_cotangents(g, kind, message, exact):
    q, k, v = np.ones((2, 6, 4)), np.ones((2, 6, 4)), np.ones((2, 6, 3))
    if exact:
        _, pullback = exact_attention_vjp(q, k, v, check_finite=True)
    else:
        fm = feature_map("positive", 4, 8)
        _, pullback = favor_attention_vjp(q, k, v, fm, check_finite=True)
    with pytest.raises(kind, match=message):
        pullback(g)
