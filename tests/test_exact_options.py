"""Windows, packed sequences, biases and decay of exact attention: values, bits, and bad input."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.inputs import CHANGES, draw, random_inputs
from support.parameters import each_causal, each_dtype, sizes
from support.tolerance import relative_error

from favor_np import exact_attention, exact_attention_vjp
from favor_np.cpu.tuning import tuned

sides = st.sampled_from([None, 0, 1, 5, 63, 64, 65]) | st.integers(0, 150)


@st.composite
def options(draw_from):
    """Sizes, and options that go together with them."""
    L, causal = draw_from(sizes), draw_from(st.booleans())
    Lk = L if causal or draw_from(st.booleans()) else draw_from(sizes)
    rng = np.random.default_rng(draw_from(st.integers(0, 1000)))
    chosen = {"causal": causal, "window": (draw_from(sides), draw_from(sides))}
    if causal:
        chosen["window"] = draw_from(st.none() | st.integers(1, 150))
    if draw_from(st.booleans()):
        chosen["key_mask"] = rng.random(Lk) < 0.7
    if Lk == L and draw_from(st.booleans()):
        chosen["cu_seqlens"] = [0, *sorted(rng.integers(0, L + 1, 3).tolist()), L]
    if draw_from(st.booleans()):
        bias = rng.standard_normal((draw_from(st.sampled_from([1, 2])), Lk))
        bias *= draw_from(st.sampled_from([0.1, 10.0, 1e5]))
        bias[rng.random(bias.shape) < draw_from(st.sampled_from([0, 0.2]))] = -np.inf
        chosen["key_bias"] = bias
    if causal and draw_from(st.booleans()):
        chosen["decay"] = rng.uniform(1e-3, 1, (draw_from(st.sampled_from([1, 2])), L))
    return L, Lk, chosen


def all_gradients(arrays, g, chosen, **more):
    """Those of the arrays and, behind them, of the options that have one."""
    found = exact_attention_vjp(*arrays, **chosen, **more)[1](g)
    return [*found, *(x for x in (found.key_bias, found.decay) if x is not None)]


@settings(max_examples=150)
@given(of=options(), dtype=st.sampled_from([np.float32, np.float64]), seed=st.integers(0, 1000))
def test_differential(of, dtype, seed):
    L, Lk, chosen = of
    arrays = random_inputs(L, 5, 9, (2,), Lk=Lk, seed=seed, dtype=dtype)
    out, pullback = exact_attention_vjp(*arrays, **chosen)
    assert np.array_equal(out, exact_attention(*arrays, **chosen))
    expected = oracle.exact_attention(*arrays, **chosen)
    bias = np.nan_to_num(chosen.get("key_bias", 0.0), neginf=0)
    eps = np.finfo(dtype).eps + np.finfo(np.float64).eps * np.abs(bias).max(initial=0) / 100
    assert np.abs(out - expected).max() < 100 * eps * max(np.abs(expected).max(), 0.1)
    g = draw(2, L, 9, seed=seed + 1, dtype=dtype)
    found = all_gradients(arrays, g, chosen)
    wanted = oracle.exact_attention_vjp(*arrays, g, **chosen)
    for x, y in zip(found, wanted, strict=True):
        # A small factor has a large gradient, of what hardly counts.
        size = 1e3 if x.ndim == 2 and chosen.get("decay") is not None else 1
        assert np.abs(x - y).max() < 3000 * eps * size * max(np.abs(y).max(), 1)
    assert pullback(g).k.dtype == dtype


@each_causal
def test_grouped_heads_and_leading_axes(causal):
    q, (k, v) = draw(2, 6, 70, 4), draw(2, 2, 2, 70, 4, seed=1)
    bias = draw(3, 1, 2, 70, seed=2)  # has an axis that nothing else has
    chosen = {"key_bias": bias, "causal": causal, "window": 20 if causal else (3, 20)}
    out, pullback = exact_attention_vjp(q, k, v, enable_gqa=True, **chosen)
    assert out.shape == (3, 2, 6, 70, 4)
    g = draw(*out.shape, seed=3)
    expected = oracle.exact_attention(q, k, v, enable_gqa=True, **chosen)
    assert relative_error(out, expected) < 1e-14
    found = pullback(g)
    wanted = oracle.exact_attention_vjp(q, k, v, g, enable_gqa=True, **chosen)
    for x, y in zip((*found, found.key_bias), wanted, strict=True):
        assert relative_error(x, y) < 1e-12


@pytest.mark.parametrize("name", ["key_bias", "decay"])
def test_finite_differences(name):
    arrays, g = random_inputs(9, 3, 2, (2,)), draw(2, 9, 2, seed=1)
    chosen = {
        "key_bias": draw(2, 9, seed=2), "decay": np.random.default_rng(3).uniform(0.2, 1, (1, 9)),
        "causal": True, "window": 5, "cu_seqlens": [0, 7, 9], "key_mask": np.arange(9) != 3,
    }  # fmt: skip
    grad = getattr(exact_attention_vjp(*arrays, **chosen)[1](g), name)
    assert grad.shape == chosen[name].shape
    for at in np.ndindex(grad.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = chosen[name].copy()
            moved[at] += step
            moved = np.minimum(moved, 1) if name == "decay" else moved
            sides.append((exact_attention(*arrays, **chosen | {name: moved}) * g).sum())
        assert abs((sides[0] - sides[1]) / 2e-6 - grad[at]) < 1e-8, at


def test_decay_is_a_bias():
    """One a head is one a token that does not change, and both are minus its sum of logarithms."""
    arrays, L = random_inputs(90, 4, 4, (2,)), 90
    a_head = np.array([0.9, 0.5])
    a_token = np.broadcast_to(a_head[:, None], (2, L))
    bias = -np.arange(L) * np.log(a_token)
    for more in ({}, {"window": 7}, {"cu_seqlens": [0, 20, 90]}):
        out = exact_attention(*arrays, causal=True, key_bias=bias, **more)
        for decay in (a_head, a_token):
            other = exact_attention(*arrays, causal=True, decay=decay, **more)
            assert relative_error(other, out) < 1e-13
    grads = exact_attention_vjp(*arrays, causal=True, decay=a_head)[1](arrays[2])
    assert grads.decay is grads.key_bias is None
    plain = exact_attention(*arrays, causal=True)
    assert np.array_equal(exact_attention(*arrays, causal=True, decay=1.0), plain)


@each_dtype
@pytest.mark.parametrize("window", [None, 100])
def test_gates_over_a_long_sequence(dtype, window):
    """Their logarithms add up to -1e5; what is 100 tokens back weighs less than rounding."""
    L, reach = (100_000 if window else 20_000), 100
    q, k, v = random_inputs(L, 3, 2, dtype=dtype)
    gates = np.random.default_rng(1).uniform(1e-3, 1, L)
    out = exact_attention(q, k, v, causal=True, decay=gates, window=window)
    seen = np.arange(L)[:, None] - np.arange(reach)[::-1]
    logs = np.log(gates)[np.maximum(seen, 0)]
    faded = logs[:, ::-1].cumsum(1)[:, ::-1] - logs  # of the tokens behind each
    logits = np.einsum("id,ijd->ij", q.astype(float), k.astype(float)[seen]) / 3**0.5 + faded
    logits[seen < 0] = -np.inf
    weights = np.exp(logits - logits.max(1, keepdims=True))
    expected = np.einsum("ij,ijd->id", weights, v.astype(float)[seen])
    expected /= weights.sum(1, keepdims=True)
    assert relative_error(out, expected) < (1e-6 if dtype == np.float32 else 1e-9)


@each_dtype
def test_large_biases_keep_their_differences(dtype):
    """Those of size 1e5 and more are powers of two and their halves, so that differences are exact."""
    L = 200
    q, k, v = random_inputs(L, 4, 3, dtype=dtype)
    small = np.round(draw(L, seed=1), 2)
    for base in (2.0**17, -(2.0**24), 2.0**24):
        for causal in (False, True):
            bias = base + small
            out = exact_attention(q, k, v, key_bias=bias, causal=causal)
            expected = oracle.exact_attention(q, k, v, key_bias=bias, causal=causal)
            assert relative_error(out, expected) < (1e-6 if dtype == np.float32 else 1e-7)


@each_dtype
@each_causal
def test_biases_as_masks(dtype, causal):
    q, k, v = random_inputs(90, dtype=dtype)
    mask = np.arange(90) % 3 > 0
    masked = exact_attention(q, k, v, causal=causal, key_mask=mask)
    some = np.cumsum(mask) > 0 if causal else np.full(90, True)
    for low in (-np.inf, np.finfo(dtype).min, -1e9, -1e4):
        bias = np.where(mask, 0, low).astype(dtype)
        out, pullback = exact_attention_vjp(q, k, v, causal=causal, key_bias=bias)
        assert np.array_equal(out[some], masked[some])
        grad = pullback(v).key_bias
        assert grad.dtype == dtype
        assert np.isfinite(grad).all()
        assert not grad[~mask][1:].any()
    # Where nothing else is seen, numbers are not minus infinity.
    everything = exact_attention(q, k, v, causal=causal, key_bias=np.full(90, -1e7))
    assert relative_error(everything, exact_attention(q, k, v, causal=causal)) < 1e-6
    hidden = np.full(90, -np.inf)
    assert not exact_attention(q, k, v, causal=causal, key_bias=hidden).any()
    k[:] = np.nan
    assert not exact_attention(q, k, v, causal=causal, key_bias=hidden).any()


def test_a_window_of_everything_changes_no_bit():
    q, k, v = random_inputs(300)
    for causal, whole in ((True, 300), (True, 10**9), (False, (299, 299)), (False, (None, 400))):
        wide = exact_attention(q, k, v, causal=causal, window=whole)
        assert np.array_equal(wide, exact_attention(q, k, v, causal=causal))


@each_dtype
@each_causal
def test_packed_sequences_have_the_bits_of_single_ones(dtype, causal):
    cuts = [0, 5, 5, 6, 130, 300]
    q, k, v = random_inputs(300, lead=(2,), dtype=dtype)
    g, bias = draw(2, 300, 5, seed=1, dtype=dtype), 1e4 * draw(2, 300, seed=2)
    for window in (None, 20 if causal else (7, 20)):
        same = {"causal": causal, "window": window}
        out, pullback = exact_attention_vjp(q, k, v, key_bias=bias, cu_seqlens=cuts, **same)
        grads = pullback(g)
        grads = (*grads, grads.key_bias[..., None])
        for start, stop in itertools.pairwise(cuts):
            of = slice(start, stop)
            arrays, part = [x[:, of] for x in (q, k, v)], bias[:, of]
            single, pull = exact_attention_vjp(*arrays, key_bias=part, **same)
            assert np.array_equal(out[:, of], single)
            found = pull(g[:, of])
            for x, y in zip(grads, (*found, found.key_bias[..., None]), strict=True):
                assert np.allclose(x[:, of], y, rtol=0, atol=1e-5 if dtype == np.float32 else 1e-12)


@each_dtype
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("causal", "window"), [(True, 70), (False, (30, 5))])
def test_what_a_row_does_not_see_changes_none_of_its_bits(dtype, change, causal, window):
    L = 200
    q, k, v = random_inputs(L, std=2.0, dtype=dtype)
    bias, g = draw(L, seed=1), draw(L, 5, seed=2, dtype=dtype)
    left, right = (window - 1, 0) if causal else window
    chosen = {"causal": causal, "window": window}
    before, pullback = exact_attention_vjp(q, k, v, key_bias=bias, **chosen)
    grads = pullback(g)
    rows = np.arange(L)
    for t in (0, 17, 64, 100, 150):
        hit = (rows >= t - right) & (rows <= t + left)
        seen_by_t = (rows >= t - left) & (rows <= t + right)
        for which in range(5):
            changed = [x.copy() for x in (q, k, v, bias, g)]
            changed[which][t] = change(changed[which][t])
            if which == 3 and not np.isfinite(changed[3]).all():
                changed[3][t] = 2e7
            *arrays, bias_now, g_now = changed
            after, pullback = exact_attention_vjp(*arrays, key_bias=bias_now, **chosen)
            found = pullback(g_now)
            if which < 4:
                mine = rows == t if which == 0 else hit
                assert np.array_equal(after[~mine], before[~mine]), (t, which)
            if which in (0, 4):
                for name in ("k", "v", "key_bias"):
                    x, y = getattr(found, name), getattr(grads, name)
                    assert np.array_equal(x[~seen_by_t], y[~seen_by_t]), (t, which, name)
            if which > 0:
                mine = rows == t if which == 4 else hit
                assert np.array_equal(found.q[~mine], grads.q[~mine]), (t, which)


def test_earlier_cotangents_change_no_bit_of_later_gradients():
    q, k, v = random_inputs(150)
    g, gates = draw(150, 5, seed=1), np.random.default_rng(2).uniform(0.1, 1, 150)
    _, pullback = exact_attention_vjp(q, k, v, causal=True, decay=gates)
    before = pullback(g)
    for t in (1, 63, 64, 100):
        changed = g.copy()
        changed[:t] = np.nan
        after = pullback(changed)
        for x, y in zip((*before, before.decay), (*after, after.decay), strict=True):
            if x is not before.q:
                assert np.array_equal(x[t:], y[t:]), t


@pytest.mark.parametrize("t", [0, 50, 120])
def test_logits_that_are_too_large_stay_in_their_window(t):
    """Rows that see one are computed in float64, or one by one: no other row is."""
    q, k, v = random_inputs(200, dtype=np.float32)
    g, bias = draw(200, 5, seed=1, dtype=np.float32), draw(200, seed=2)
    for cuts in (None, [0, 130, 200]):
        chosen = {"causal": True, "window": 40, "key_bias": bias, "cu_seqlens": cuts}
        before, pullback = exact_attention_vjp(q, k, v, **chosen)
        large = k.copy()
        for size in (1e7, 1e20):
            large[t] = size
            after, pullback = exact_attention_vjp(q, large, v, **chosen)
            expected = oracle.exact_attention(q, large, v, **chosen)
            assert relative_error(after, expected) < 1e-6
            rows = np.arange(200)
            hit = (rows >= t) & (rows < t + 40)
            assert np.array_equal(after[~hit], before[~hit])
            found = pullback(g)
            wanted = oracle.exact_attention_vjp(q, large, v, g, **chosen)
            for x, y in zip((*found, found.key_bias), wanted, strict=True):
                assert relative_error(x, y) < 1e-5


def test_rows_without_a_key_are_zero():
    q, k, v = random_inputs(300, Lk=100)
    out, pullback = exact_attention_vjp(q, k, v, window=(20, 3), key_bias=draw(100))
    assert out[:120].any(1).all()
    assert not out[120:].any()
    grads = pullback(np.where(np.arange(300)[:, None] < 120, 1.0, np.nan) * draw(300, 5))
    assert not grads.q[120:].any()
    assert all(np.isfinite(x).all() for x in (*grads, grads.key_bias))


@each_dtype
@each_causal
def test_threads_change_no_bit(dtype, causal):
    q, k, v = random_inputs(1500, 16, 16, (1,), dtype=dtype)
    chosen = {
        "causal": causal, "window": 100 if causal else (100, 30), "key_bias": draw(1500, seed=1),
        "cu_seqlens": [0, 70, 1500],
    }  # fmt: skip
    out = exact_attention(q, k, v, num_threads=1, **chosen)
    grads = all_gradients((q, k, v), v, chosen, num_threads=1)
    for n in (2, 3, 8, None):
        assert np.array_equal(exact_attention(q, k, v, num_threads=n, **chosen), out)
        again = all_gradients((q, k, v), v, chosen, num_threads=n)
        assert all(np.array_equal(x, y) for x, y in zip(again, grads, strict=True))


@each_causal
@pytest.mark.parametrize(("name", "limit"), [("USE_BF16X3", 1e-5), ("USE_BFLOAT16", 0.03)])
def test_products_of_bfloat16(name, limit, causal):
    q, k, v = random_inputs(300, 16, 16, dtype=np.float32)
    bias = 1e5 + np.round(draw(300, seed=1), 2)
    v[200] = np.inf
    chosen = {"causal": causal, "window": 50 if causal else (50, 9), "key_bias": bias}
    precision = "bfloat16" if name == "USE_BFLOAT16" else "full"
    with tuned(**{name: True}):
        out = exact_attention(q, k, v, precision=precision, **chosen)
    rows = np.arange(300)
    hit = (rows >= 200 - (0 if causal else 9)) & (rows < 250 + (not causal))
    assert np.isinf(out[hit]).all()
    v[200] = 0
    expected = oracle.exact_attention(q, k, v, **chosen)
    assert relative_error(out[~hit], expected[~hit]) < limit


def test_gradients_have_the_dtypes_and_shapes_of_the_options():
    q, k, v = random_inputs(20, lead=(2,), dtype=np.float32)
    for bias in (np.zeros((1, 20), ">f4"), np.zeros(20, np.float16), [0] * 20):
        grads = exact_attention_vjp(q, k, v, key_bias=bias)[1](v)
        given = np.asarray(bias)
        wanted = given.dtype.newbyteorder("=") if given.dtype.kind == "f" else np.float64
        assert (grads.key_bias.dtype, grads.key_bias.shape) == (wanted, given.shape)
    gates = np.full((1, 20), 0.5, np.float32)
    grads = exact_attention_vjp(q, k, v, causal=True, decay=gates)[1](v)
    assert (grads.decay.dtype, grads.decay.shape) == (np.float32, (1, 20))
    assert grads.key_bias is None
    empty = np.zeros((2, 0, 3))
    grads = exact_attention_vjp(empty, empty, empty, key_bias=np.zeros(0))[1](empty)
    assert grads.key_bias.shape == (0,)


@pytest.mark.parametrize(
    ("chosen", "kind", "message"),
    [
        ({"key_bias": np.full(6, np.nan)}, ValueError, "key_bias must be finite, or -inf"),
        ({"key_bias": np.full(6, np.inf)}, ValueError, "key_bias must be finite, or -inf"),
        ({"key_bias": np.full(6, 3e7)}, ValueError, "key_bias must be at most 2.3e"),
        ({"key_bias": np.zeros(5)}, ValueError, r"key_bias must have shape \(\.\.\., 6\)"),
        ({"key_bias": 0.5}, ValueError, "key_bias must have at least 1 axes"),
        ({"key_bias": np.zeros((3, 6))}, ValueError, "do not broadcast: .*key_bias"),
        (
            {"key_bias": np.full((2, 6), -np.inf), "key_mask": np.ones((3, 6), bool)},
            ValueError,
            "do not broadcast: .*key_mask .*key_bias",
        ),
        ({"key_bias": np.full(6, True)}, TypeError, "key_bias must hold log-weights.*key_mask"),
        ({"key_bias": np.zeros(6, complex)}, TypeError, "key_bias must hold real numbers"),
        ({"key_bias": "no"}, TypeError, "key_bias must hold real numbers"),
        ({"window": 3, "causal": False}, ValueError, "window needs causal=True, or must be a pair"),
        ({"window": (3, 1)}, TypeError, "window must be an integer"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": (1, -1), "causal": False}, ValueError, "window must be at least 0"),
        ({"window": (1, 0.5), "causal": False}, TypeError, "window must be an integer"),
        ({"window": (1, 2, 3), "causal": False}, ValueError, "must be a pair"),
        ({"decay": 0.5, "causal": False}, ValueError, "decay needs causal=True"),
        ({"decay": np.full((2, 6), 0.5), "causal": False}, ValueError, "decay needs causal=True"),
        ({"decay": 0.0}, ValueError, "decay must be greater than 0 and at most 1"),
        ({"decay": np.zeros((2, 6))}, ValueError, "decay must be greater than 0 and at most 1"),
        ({"decay": np.full((2, 6), np.nan)}, ValueError, "decay must be greater than 0"),
        ({"decay": np.full((2, 6), 1.5)}, ValueError, "decay must be greater than 0"),
        ({"decay": np.ones((2, 5))}, ValueError, r"a factor a token, of shape \(2, 6\)"),
        ({"decay": np.ones((3, 6))}, ValueError, r"a factor a token, of shape \(2, 6\)"),
        ({"decay": np.ones((2, 6), bool)}, TypeError, "decay must be a real number"),
        ({"decay": np.ones(3)}, ValueError, "decay must broadcast to the leading axes"),
        ({"cu_seqlens": [0, 5]}, ValueError, "cu_seqlens must rise from 0 to the 6 rows"),
        ({"cu_seqlens": [0.0, 6.0]}, TypeError, "cu_seqlens must hold integers"),
    ],
)
def test_refused(chosen, kind, message):
    x = np.ones((2, 6, 4))
    for function in (exact_attention, exact_attention_vjp):
        with pytest.raises(kind, match=message):
            function(x, x, x, **{"causal": True} | chosen)


def test_decay_beyond_any_exponent_is_refused():
    x = np.ones((300_000, 1), np.float32)
    for decay in (np.full(300_000, 1e-300), 1e-300):
        with pytest.raises(ValueError, match="decay must be larger for 300000 positions"):
            exact_attention(x, x, x, causal=True, window=1, decay=decay)
