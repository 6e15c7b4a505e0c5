"""favor_attention against the dense oracle, and what must hold whatever the numbers are."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import oracle
from support.inputs import CHANGES, MAPS, draw, lay_out, masks, random_inputs
from support.parameters import EDGES, each_causal, each_dtype, each_map, layouts, sizes
from support.tolerance import relative_error, tolerance

from favor_np import FeatureMap, exact_attention, favor_attention, feature_map

# -- The kernel, the readable features and the oracle agree -------------------------------------


def numpy_reference(q, k, v, fm, causal):
    """Attention written with the public features: only for moderate inputs."""
    weights = fm.query_features(q) @ np.swapaxes(fm.key_features(k), -1, -2)
    if causal:
        weights = np.tril(weights)
    return weights @ v / weights.sum(-1, keepdims=True)


@each_map
@each_dtype
@each_causal
def test_three_ways(options, dtype, causal):
    fm = FeatureMap.from_projection(draw(20, 6), **options)
    q, k, v = random_inputs(90, lead=(2,), std=0.7, dtype=dtype)
    out = favor_attention(q, k, v, fm, causal=causal)
    expected = oracle.favor_attention(q, k, v, fm, causal=causal)
    assert relative_error(numpy_reference(q, k, v, fm, causal), expected) < 1e-13
    assert relative_error(out, expected) < tolerance(q, k, fm, dtype)


@settings(max_examples=200)
@given(
    L=sizes,
    Lk=sizes,
    d=st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64]),
    dv=st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33]),
    rows=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33, 63, 64, 65]),
    options=st.sampled_from(list(MAPS.values())),
    dtype=st.sampled_from([np.float32, np.float64]),
    causal=st.booleans(),
    masked=st.booleans(),
    std=st.sampled_from([0.1, 1.0, 3.0]),
    layout=st.tuples(layouts, layouts, layouts),
    seed=st.integers(0, 1000),
)
@example(  # values that cancel
    *(83, 43, 15, 1, 1, {"kind": "positive"}, np.float32), False, False, 0.1, ("C",) * 3, 102
)
def test_differential(L, Lk, d, dv, rows, options, dtype, causal, masked, std, layout, seed):
    Lk = L if causal else Lk
    fm = FeatureMap.from_projection(draw(rows, d, seed=seed + 1), **options)
    q, k, v = random_inputs(L, d, dv, Lk=Lk, std=std, seed=seed, dtype=dtype)
    mask = np.random.default_rng(seed).random(Lk) < 0.7 if masked else None
    arguments = [lay_out(x, how) for x, how in zip((q, k, v), layout, strict=True)]
    out = favor_attention(*arguments, fm, causal=causal, key_mask=mask)
    assert out.dtype == dtype
    expected = oracle.favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    uncancelled = oracle.favor_attention(q, k, np.abs(v), fm, causal=causal, key_mask=mask)
    assert np.abs(out - expected).max() <= tolerance(q, k, fm, dtype) * uncancelled.max()
    plain = favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    assert np.array_equal(out, plain)  # the layout changes no bit
    for x, y in zip(arguments, (q, k, v), strict=True):
        assert np.array_equal(x, y)  # inputs are untouched


@each_dtype
@each_causal
def test_every_length_around_the_tiles(dtype, causal):
    fm = FeatureMap.from_projection(draw(5, 3), antithetic=True)
    q, k, v = random_inputs(130, 3, 2, dtype=dtype)
    for L in EDGES:
        out = favor_attention(q[:L], k[:L], v[:L], fm, causal=causal)
        expected = oracle.favor_attention(q[:L], k[:L], v[:L], fm, causal=causal)
        assert relative_error(out, expected) < tolerance(q, k, fm, dtype), L


@pytest.mark.parametrize(
    ("lead_q", "lead_k", "lead_v"),
    [
        ((2, 3), (2, 3), (2, 3)),
        ((2, 3), (3,), ()),
        ((2, 1), (3,), (1, 1)),
        ((1,), (2, 3), (3,)),
        ((), (), (4,)),
        ((2, 1, 2), (3, 1), (1, 1, 1, 1)),
    ],
)
@each_causal
def test_leading_axes_broadcast(lead_q, lead_k, lead_v, causal):
    fm = FeatureMap.from_projection(draw(7, 4))
    Lq, Lk = (11, 11) if causal else (9, 11)
    q, k, v = draw(*lead_q, Lq, 4), draw(*lead_k, Lk, 4, seed=1), draw(*lead_v, Lk, 3, seed=2)
    out = favor_attention(q, k, v, fm, causal=causal)
    expected = oracle.favor_attention(q, k, v, fm, causal=causal)
    assert relative_error(out, expected) < 1e-14
    mask = np.random.default_rng(3).random((*lead_k, Lk)) < 0.6
    out = favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    expected = oracle.favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    assert relative_error(out, expected) < 1e-14


@each_map
@each_causal
def test_grouped_heads(options, causal):
    q, (k, v) = draw(2, 6, 70, 4), draw(2, 2, 2, 70, 4, seed=1)
    for W in (draw(9, 4, seed=2), draw(2, 9, 4, seed=2)):  # one for all, one a head of keys
        fm = FeatureMap.from_projection(W, **options)
        out = favor_attention(q, k, v, fm, causal=causal, enable_gqa=True)
        expected = oracle.favor_attention(q, k, v, fm, causal=causal, enable_gqa=True)
        assert relative_error(out, expected) < 1e-14


@each_map
@each_causal
def test_a_projection_for_each_head(options, causal):
    W = draw(3, 9, 4, seed=2)
    fm = FeatureMap.from_projection(W, **options)
    q, k, v = random_inputs(70, 4, 5, (2, 3))
    out = favor_attention(q, k, v, fm, causal=causal)
    expected = oracle.favor_attention(q, k, v, fm, causal=causal)
    assert relative_error(out, expected) < 1e-14
    shared = favor_attention(q, k[:, :1], v[:, :1], fm, causal=causal)  # broadcast over heads
    expected = oracle.favor_attention(q, k[:, :1], v[:, :1], fm, causal=causal)
    assert relative_error(shared, expected) < 1e-14


# -- Precision --------------------------------------------------------------------------------


@each_causal
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("std", "limit"), [(0.5, 2e-6), (1, 2e-6), (2, 2e-6), (4, 1e-5)])
def test_float32_against_float64(std, limit, antithetic, causal):
    fm = feature_map("positive", dim=64, num_features=256, antithetic=antithetic)
    q, k, v = random_inputs(512, 64, 64, std=std, dtype=np.float32)
    out = favor_attention(q, k, v, fm, causal=causal)
    wide = favor_attention(*(x.astype(np.float64) for x in (q, k, v)), fm, causal=causal)
    assert relative_error(out, wide) < limit


@each_dtype
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("path", ["rise", "fall", "zigzag", "one tall", "one tall first"])
@pytest.mark.parametrize("nats", [50, 200, 2000])
def test_drift_inside_a_chunk(nats, path, antithetic, dtype):
    """Log-features that differ by far more than the range of the dtype, next to each other."""
    L = 70
    steps = {
        "rise": np.linspace(0, 1, L),
        "fall": np.linspace(1, 0, L),
        "zigzag": np.arange(L) % 2,
        "one tall": np.arange(L) == 40,
        "one tall first": np.arange(L) == 0,
    }[path]
    W = np.array([[4.0, 0, 0], [3.5, 2, 0], [-4, 0, 1], [1, -1, 3]])
    fm = FeatureMap.from_projection(W, scale=1.0, antithetic=antithetic)
    q, k, v = random_inputs(L, 3, 4, std=0.5, dtype=dtype)
    # w.k - |k|**2 / 2 falls by up to `nats` along the way.
    k[:, 0] -= (np.sqrt(2 * nats + 16) - 4) * steps
    for causal in (True, False):
        out = favor_attention(q, k, v, fm, causal=causal)
        expected = oracle.favor_attention(q, k, v, fm, causal=causal)
        assert relative_error(out, expected) < tolerance(q, k, fm, dtype)


@each_dtype
@each_map
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e15, 1e30])
def test_huge_inputs_are_finite(options, dtype, size):
    fm = FeatureMap.from_projection(draw(9, 6), **options)
    q, k, v = random_inputs(80, std=size, dtype=dtype)
    small_q, small_k, _ = random_inputs(80, dtype=dtype, seed=1)
    for causal in (False, True):
        for a, b in ((q, k), (q, small_k), (small_q, k)):
            out = favor_attention(a, b, v, fm, causal=causal)
            assert np.isfinite(out).all()
            assert np.abs(out).max() <= np.abs(v).max() * 1.001


@each_dtype
@pytest.mark.parametrize("kind", ["relu", "elu"])
@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e9])
def test_large_inputs_of_maps_that_do_not_grow_exponentially(kind, size, dtype):
    fm = FeatureMap.from_projection(draw(30, 6), kind)
    q, k, v = random_inputs(80, std=size, dtype=dtype)
    for causal in (False, True):
        out = favor_attention(q, k, v, fm, causal=causal)
        expected = oracle.favor_attention(q, k, v, fm, causal=causal)
        assert relative_error(out, expected) < 100 * np.finfo(dtype).eps


@each_dtype
@each_causal
def test_logits_of_ten_thousand(dtype, causal):
    fm = FeatureMap.from_projection(np.eye(4) * 10, scale=1.0)
    q, k, v = random_inputs(70, 4, 3, std=30.0, dtype=dtype)
    assert np.abs(10 * q).max() > 700
    out = favor_attention(q, k, v, fm, causal=causal)
    expected = oracle.favor_attention(q, k, v, fm, causal=causal)
    assert relative_error(out, expected) < (0.01 if dtype == np.float32 else 1e-9)


@each_dtype
def test_tiny_and_zero_inputs(dtype):
    fm = FeatureMap.from_projection(draw(9, 6), antithetic=True)
    q, k, v = random_inputs(70, dtype=dtype)
    mean = np.cumsum(v, 0) / np.arange(1, 71)[:, None]
    for size in (0.0, 1e-30, 5e-324):
        out = favor_attention(dtype(size) * q, dtype(size) * k, v, fm, causal=True)
        assert relative_error(out, mean) < 10 * np.finfo(dtype).eps
    out = favor_attention(q, k, 0 * v, fm)
    assert np.array_equal(out, 0 * out)


# -- What attention is ---------------------------------------------------------------------------


@each_map
def test_equal_keys_average_the_past(options):
    fm = FeatureMap.from_projection(draw(9, 1), **options)
    ones = np.ones((3, 1))
    out = favor_attention(ones, ones, np.array([[1.0], [0], [0]]), fm, causal=True)
    assert np.allclose(out[:, 0], [1, 1 / 2, 1 / 3], rtol=1e-15)


@each_map
@each_dtype
@each_causal
def test_identity_values_give_weights(options, dtype, causal):
    fm = FeatureMap.from_projection(draw(16, 6), **options)
    q, k, _ = random_inputs(80, dtype=dtype)
    weights = favor_attention(q, k, np.eye(80, dtype=dtype), fm, causal=causal)
    assert np.abs(weights.sum(-1) - 1).max() < 20 * np.finfo(dtype).eps
    assert (weights >= 0).all()
    if causal:
        assert np.array_equal(weights, np.tril(weights))
    assert (weights[np.tri(80, dtype=bool)] > 0).all()


@each_map
@each_dtype
def test_order_of_keys_does_not_matter(options, dtype):
    fm = FeatureMap.from_projection(draw(16, 6), **options)
    q, k, v = random_inputs(150, dtype=dtype)
    order = np.random.default_rng(0).permutation(150)
    out = favor_attention(q, k[order], v[order], fm)
    assert relative_error(out, favor_attention(q, k, v, fm)) < 30 * np.finfo(dtype).eps


def test_it_converges_to_exact_attention():
    """Error against exact attention falls like one over the root of the number of features."""
    q, k, v = random_inputs(100, 8, 8, std=0.5)
    exact = exact_attention(q, k, v)

    def rms(num_features):
        errors = [
            favor_attention(q, k, v, feature_map("positive", 8, num_features, rng=seed)) - exact
            for seed in range(12)
        ]
        return np.sqrt(np.mean(np.square(errors)))

    assert 5.5 < rms(64) / rms(4096) < 12  # 8 expected
    assert rms(4096) < 0.02


# -- Causality -------------------------------------------------------------------------------------


@each_map
@each_dtype
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_future_changes_no_bit_of_the_past(options, dtype, change):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(150, std=2.0, dtype=dtype)
    before = favor_attention(q, k, v, fm, causal=True)
    for t in (0, 1, 5, 15, 16, 17, 40, 63, 64, 65, 100, 128, 149):
        for which in range(3):
            changed = [x.copy() for x in (q, k, v)]
            changed[which][t:] = change(changed[which][t:])
            after = favor_attention(*changed, fm, causal=True)
            assert np.array_equal(after[:t], before[:t]), (t, "qkv"[which])


@each_map
@each_causal
def test_outputs_depend_on_every_input_they_may_see(options, causal):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(130)
    before = favor_attention(q, k, v, fm, causal=causal)
    for t in (0, 3, 63, 64, 100):
        for which in range(3):
            changed = [x.copy() for x in (q, k, v)]
            changed[which][t] += 0.5
            moved = (favor_attention(*changed, fm, causal=causal) != before).any(-1)
            if which == 0:
                expected = np.arange(130) == t
            else:
                expected = np.arange(130) >= t if causal else np.full(130, True)
            # With one key all weights are 1, whatever the key.
            start = 1 if causal and which < 2 else 0
            assert np.array_equal(moved[start:], expected[start:]), (t, "qkv"[which])


@each_map
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_causal
def test_not_finite_input_reaches_only_the_rows_that_see_it(options, bad, causal):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(130)
    before = favor_attention(q, k, v, fm, causal=causal)
    for t in (0, 3, 63, 64, 100):
        for which in range(3):
            changed = [x.copy() for x in (q, k, v)]
            changed[which][t, 2] = bad
            out = favor_attention(*changed, fm, causal=causal)
            if which == 0:
                hit = np.arange(130) == t
            else:
                hit = np.arange(130) >= t if causal else np.full(130, True)
            columns = slice(None) if which < 2 else [2]
            assert not np.isfinite(out[hit][:, columns]).any(), (t, "qkv"[which])
            if which < 2:
                assert np.isnan(out[hit]).all()
            assert np.array_equal(out[~hit], before[~hit]), (t, "qkv"[which])


# -- Masks -----------------------------------------------------------------------------------------


@each_map
@pytest.mark.parametrize("name", masks(90))
@each_causal
def test_masked_keys_vanish(options, name, causal):
    mask = masks(90)[name]
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(90)
    out = favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    expected = oracle.favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    assert relative_error(out, expected) < 1e-14
    if not mask.any():
        assert np.array_equal(out, np.zeros_like(v))
    if not causal and mask.any():
        gone = favor_attention(q, k[mask], v[mask], fm)
        assert relative_error(out, gone) < 1e-14
    for poison in (np.nan, np.inf, 1e300):
        k[~mask] = v[~mask] = poison
        again = favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
        assert np.array_equal(out, again)


def test_a_mask_for_each_head():
    fm = FeatureMap.from_projection(draw(9, 6))
    q, k, v = random_inputs(40, lead=(2, 3))
    mask = np.random.default_rng(0).random((2, 1, 40)) < 0.5
    mask[1] = False
    out = favor_attention(q, k, v, fm, key_mask=mask)
    expected = oracle.favor_attention(q, k, v, fm, key_mask=mask)
    assert relative_error(out, expected) < 1e-14
    assert np.array_equal(out[1], 0 * out[1])
    q4 = draw(2, 6, 40, 6, seed=9)
    out = favor_attention(q4, k, v, fm, key_mask=mask, enable_gqa=True, causal=True)
    expected = oracle.favor_attention(q4, k, v, fm, causal=True, key_mask=mask, enable_gqa=True)
    assert relative_error(out, expected) < 1e-14


def test_no_keys_give_zeros():
    fm = FeatureMap.from_projection(draw(9, 6))
    q, k, v = random_inputs(7, lead=(2,))
    out = favor_attention(q, k[:, :0], v[:, :0], fm)
    assert np.array_equal(out, np.zeros((2, 7, 5)))


# -- States ----------------------------------------------------------------------------------------


@each_map
@each_dtype
@pytest.mark.parametrize("splits", [[64], [1, 2, 3], [63, 65], [50, 50, 128], [0, 150], [37, 110]])
def test_resumed_is_whole(options, dtype, splits):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(150, lead=(2,), dtype=dtype)
    mask = np.random.default_rng(0).random((2, 150)) < 0.8
    whole, last = favor_attention(q, k, v, fm, causal=True, key_mask=mask, return_state=True)
    state, parts = None, []
    for start, stop in zip([0, *splits], [*splits, 150], strict=True):
        part = np.s_[:, start:stop]
        out, state = favor_attention(
            q[part], k[part], v[part], fm, causal=True, key_mask=mask[part], state=state,
            return_state=True,
        )  # fmt: skip
        parts.append(out)
    error = 20 * np.finfo(dtype).eps
    assert relative_error(np.concatenate(parts, axis=1), whole) < error
    for name in ("S", "z"):
        a = np.ldexp(getattr(state, name), state.c[..., None] if name == "S" else state.c)
        b = np.ldexp(getattr(last, name), last.c[..., None] if name == "S" else last.c)
        assert relative_error(a, b) < error


@each_map
def test_bidirectional_with_a_state_sees_both(options):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(90, Lk=150)
    _, state = favor_attention(q, k[:70], v[:70], fm, return_state=True)
    out, both = favor_attention(q, k[70:], v[70:], fm, state=state, return_state=True)
    whole = favor_attention(q, k, v, fm)
    assert relative_error(out, whole) < 1e-14
    assert relative_error(both.attend(q), whole) < 1e-14


# -- Threads ---------------------------------------------------------------------------------------


@each_dtype
@each_causal
@pytest.mark.parametrize(("lead", "L"), [((7,), 200), ((1,), 5000), ((3,), 1500)])
def test_threads_change_no_bit(lead, L, causal, dtype):
    fm = feature_map("positive", dim=16, num_features=64)
    q, k, v = random_inputs(L, 16, 16, lead, dtype=dtype)
    one = favor_attention(q, k, v, fm, causal=causal, num_threads=1)
    for n in (2, 3, 8, None):
        assert np.array_equal(favor_attention(q, k, v, fm, causal=causal, num_threads=n), one)


def test_repeated_calls_give_the_same_bits():
    fm = feature_map("positive", dim=16, num_features=64)
    q, k, v = random_inputs(300, 16, 16, (2,))
    first = favor_attention(q, k, v, fm, causal=True)
    for seed in range(1, 4):  # other work in between, in the same workspaces
        favor_attention(*random_inputs(200, 16, 16, (2,), std=np.nan, seed=seed), fm)
        assert np.array_equal(favor_attention(q, k, v, fm, causal=True), first)
