"""A log-weight a key, and decay that data decide: key_bias, and decay of one factor a token."""

import copy
import itertools
import pickle
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from support import oracle

from favor_np import (
    AttentionState,
    WindowState,
    exact_attention_vjp,
    favor_attention,
    favor_attention_vjp,
    feature_map,
)

LENGTH, DIM = 150, 6


def fm_of(kind="positive", **options):
    return feature_map(kind, DIM, 24, rng=1, **options)


def inputs(*lead, length=LENGTH, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, *lead, length, DIM)).astype(dtype)
    return q, k, v, rng.normal(0, 3, (*lead, length)), rng.uniform(0.001, 1, (*lead, length))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["positive", "relu", "elu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_are_multiplied_with_its_exponential(kind, causal, dtype):
    fm, (q, k, v, bias, _) = fm_of(kind), inputs(2, dtype=dtype)
    bias[0, ::7] = -np.inf
    expected = oracle.favor_attention(q, k, v, fm, causal=causal, key_bias=bias)
    found = favor_attention(q, k, v, fm, causal=causal, key_bias=bias)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=2e-6 if dtype == np.float32 else 1e-14)


@given(
    st.integers(1, 140),
    st.booleans(),
    st.booleans(),
    st.floats(0.01, 300),
    st.integers(0, 99),
)
def test_any_length_and_size(length, causal, shared, size, seed):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, 2, 2, length, 4))
    bias = rng.normal(0, size, length if shared else (2, 1, length))
    mask = rng.random((2, length)) < 0.9
    fm = feature_map("positive", 4, 16)
    more = {"causal": causal, "key_bias": bias, "key_mask": mask}
    expected = oracle.favor_attention(q, k, v, fm, **more)
    np.testing.assert_allclose(favor_attention(q, k, v, fm, **more), expected, atol=1e-11)


def test_it_is_stable_over_any_range():
    """One number for all keys changes nothing; large ones keep their differences."""
    fm, (q, k, v, bias, _) = fm_of(), inputs(2, dtype=np.float32)
    plain = favor_attention(q, k, v, fm, causal=True, key_bias=bias)
    for shift in (2.0**-20, -1e7, 1e7):
        found = favor_attention(q, k, v, fm, causal=True, key_bias=bias + shift)
        np.testing.assert_allclose(found, plain, atol=3e-6)
    rise = np.linspace(0, 1e6, LENGTH)  # each key outweighs all before it
    found = favor_attention(q, k, v, fm, causal=True, key_bias=rise)
    np.testing.assert_allclose(found, v, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_minus_infinity_masks(causal):
    fm, (q, k, v, bias, _) = fm_of(), inputs(2)
    mask = np.arange(LENGTH) % 3 > 0
    bias = np.where(mask, bias, -np.inf)
    k[:, ~mask], v[:, ~mask] = np.nan, np.inf
    expected = favor_attention(q, k, v, fm, causal=causal, key_bias=np.where(mask, bias, 0),
                               key_mask=mask)  # fmt: skip
    found = favor_attention(q, k, v, fm, causal=causal, key_bias=bias)
    assert np.isfinite(found).all()
    assert np.array_equal(found, expected)
    low = np.where(mask, bias, np.finfo(np.float64).min)  # as other libraries mask
    found = favor_attention(q, q, q, fm, causal=causal, key_bias=low)
    expected = favor_attention(q, q, q, fm, causal=causal, key_bias=bias)
    some = slice(1 if causal else 0, None)  # row 0 sees no other key
    np.testing.assert_allclose(found[:, some], expected[:, some], atol=1e-13)
    none = favor_attention(q, k, v, fm, causal=causal, key_bias=np.full(LENGTH, -np.inf))
    assert not none.any()


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.97}, {"window": 20}, {"cu_seqlens": [0, 70, 70, 150]}]
)
def test_beside_other_options(options):
    fm, (q, k, v, bias, _) = fm_of(), inputs(2, 3)
    more = dict(causal=True, key_bias=bias[:1], **options)
    expected = oracle.favor_attention(q, k, v, fm, **more)
    np.testing.assert_allclose(favor_attention(q, k, v, fm, **more), expected, atol=1e-13)


def test_grouped_heads_have_the_bias_of_their_keys():
    fm, (q, k, v, bias, gates) = fm_of(), inputs(4)
    for more in (
        {"key_bias": bias[:2]},
        {"decay": gates[:2]},
        {"key_bias": bias[:2], "decay": gates[:2]},
    ):
        options = dict(causal=True, enable_gqa=True, **more)
        expected = oracle.favor_attention(q, k[:2], v[:2], fm, **options)
        found = favor_attention(q, k[:2], v[:2], fm, **options)
        np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{}, {"window": 33}, {"cu_seqlens": [0, 1, 1, 90, 150]}, {"bias": True}]
)
def test_a_factor_a_token(options):
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2)
    more = dict(causal=True, decay=gates, **options)
    if more.pop("bias", False):
        more["key_bias"] = bias
    expected = oracle.favor_attention(q, k, v, fm, **more)
    np.testing.assert_allclose(favor_attention(q, k, v, fm, **more), expected, atol=1e-13)
    if not options:
        cumulated = favor_attention(
            q, k, v, fm, causal=True, key_bias=-np.cumsum(np.log(gates), -1)
        )
        np.testing.assert_allclose(cumulated, expected, atol=1e-12)


def test_constant_factors_are_a_constant_decay():
    fm, (q, k, v, _, _) = fm_of(), inputs(2)
    rates = np.array([0.9, 0.999])
    expected = favor_attention(q, k, v, fm, causal=True, decay=rates)
    found = favor_attention(q, k, v, fm, causal=True, decay=np.repeat(rates[:, None], LENGTH, 1))
    np.testing.assert_allclose(found, expected, atol=1e-14)
    none = favor_attention(q, k, v, fm, causal=True, decay=np.ones((2, LENGTH)))
    assert np.array_equal(none, favor_attention(q, k, v, fm, causal=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_hundred_thousand_tokens(dtype):
    """Against a recurrence in float64, which forgets as soon as its gates let it."""
    length, fm = 100_000, feature_map("positive", 4, 16, dtype=np.float64)
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, length, 4)).astype(dtype)
    gates = np.exp(rng.uniform(np.log(1e-3), 0, length) * (rng.random(length) < 0.3))
    phi_q, phi_k = fm.query_features(q), fm.key_features(k)
    expected, num, den = np.empty((length, 4)), np.zeros((16, 4)), 0
    for i in range(length):
        num = gates[i] * num + phi_k[i][:, None] * v[i]
        den = gates[i] * den + phi_k[i]
        expected[i] = phi_q[i] @ num / (phi_q[i] @ den)
    found = favor_attention(q, k, v, fm, causal=True, decay=gates)
    np.testing.assert_allclose(found, expected, atol=3e-6 if dtype == np.float32 else 3e-10)
    cumulated = favor_attention(q, k, v, fm, causal=True, key_bias=-np.cumsum(np.log(gates)))
    np.testing.assert_allclose(cumulated, expected, atol=3e-6 if dtype == np.float32 else 3e-10)


# -- States ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [None, 3])
def test_states_go_on(sequences):
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2)
    whole = None if sequences is None else [0, 40, 90, 150]
    more = {"causal": True, "decay": gates, "key_bias": bias, "cu_seqlens": whole}
    expected, after = favor_attention(q, k, v, fm, **more, return_state=True)
    _, (s, z) = oracle.favor_attention(q, k, v, fm, **more, return_state=True)
    for found, right in zip(oracle.content(after), (s, z), strict=True):
        np.testing.assert_allclose(found.astype(float), right.astype(float), rtol=1e-10)
    if sequences is not None:
        return
    state = AttentionState.zeros(fm, DIM, 2, dtype=np.float64)
    parts = [0, 1, 5, 100, LENGTH]
    for start, stop in itertools.pairwise(parts):
        at = slice(start, stop)
        more = {"key_bias": bias[:, at], "decay": gates[:, at]}
        if stop == start + 1:
            out = state.step(q[:, start], k[:, start], v[:, start], key_bias=bias[:, start],
                             decay=gates[:, start])[:, None]  # fmt: skip
        elif start == 5:
            state.update(k[:, at], v[:, at], **more)
            continue
        else:
            out, state = favor_attention(q[:, at], k[:, at], v[:, at], fm, causal=True, state=state,
                                         return_state=True, **more)  # fmt: skip
        np.testing.assert_allclose(out, expected[:, at], atol=1e-13)
    for found, right in ((state.S * 2.0 ** state.c[..., None], s), (state.z * 2.0**state.c, z)):
        np.testing.assert_allclose(found, right.astype(float), rtol=1e-10)


def test_steps_of_packed_sequences():
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2, length=5)
    state = AttentionState.zeros(fm, DIM, 2, sequences=5, dtype=np.float64)
    state.step(q, k, v)
    found = state.step(q, k, v + 1, key_bias=bias, decay=gates)
    for i in range(5):
        twice = [np.stack([x[:, i], y[:, i]], 1) for x, y in ((q, q), (k, k), (v, v + 1))]
        more = {name: np.stack([x, y[:, i]], 1) for name, x, y in (
            ("key_bias", np.zeros(2), bias), ("decay", np.ones(2), gates))}  # fmt: skip
        expected = oracle.favor_attention(*twice, fm, causal=True, **more)[:, 1]
        np.testing.assert_allclose(found[:, i], expected, atol=1e-13)


def test_as_many_tokens_as_sequences_need_not_be_one_each():
    fm, (q, k, v, _, gates) = fm_of(), inputs(length=10)
    packed = AttentionState.zeros(fm, DIM, sequences=2, dtype=np.float64)
    apart = [AttentionState.zeros(fm, DIM, dtype=np.float64) for _ in range(2)]
    for start, middle, stop in ((0, 3, 8), (8, 8, 10)):  # at last none, and two
        rows = slice(start, stop)
        bounds = np.array([start, middle, stop]) - start
        packed.update(k[rows], v[rows], cu_seqlens=bounds, decay=gates[rows])
        for state, part in zip(apart, (slice(start, middle), slice(middle, stop)), strict=True):
            state.update(k[part], v[part], decay=gates[part])
    found = packed.attend(q[:4], cu_seqlens=[0, 2, 4])
    np.testing.assert_allclose(found[:2], apart[0].attend(q[:2]), atol=1e-13)
    np.testing.assert_allclose(found[2:], apart[1].attend(q[2:4]), atol=1e-13)


def test_files_copies_and_merges(tmp_path):
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2)
    first, second = (
        AttentionState(fm, DIM, 2, dtype=np.float64),
        AttentionState(fm, DIM, 2, dtype=np.float64),
    )
    first.update(k[:, :60], v[:, :60], decay=gates[:, :60], key_bias=bias[:, :60])
    second.update(k[:, 60:], v[:, 60:], decay=gates[:, 60:], key_bias=bias[:, 60:])
    first.save(tmp_path / "state")
    twins = (
        AttentionState.load(tmp_path / "state"),
        copy.copy(first),
        pickle.loads(pickle.dumps(first)),
    )
    first.merge(second)
    _, (s, z) = oracle.favor_attention(
        q, k, v, fm, causal=True, decay=gates, key_bias=bias, return_state=True
    )
    for found, right in zip(oracle.content(first), (s, z), strict=True):
        np.testing.assert_allclose(found.astype(float), right.astype(float), rtol=1e-10)
    for twin in twins:
        twin.merge(second)
        assert all(np.array_equal(getattr(twin, n), getattr(first, n)) for n in ("c", "S", "z"))
    empty = AttentionState(fm, DIM, 2, dtype=np.float64)
    np.testing.assert_allclose(empty.merge(first).attend(q), first.attend(q), atol=1e-14)
    plain = AttentionState(fm, DIM, 2, dtype=np.float64).update(k, v)
    expected = [a + b for a, b in zip(oracle.content(first), oracle.content(plain), strict=True)]
    for found, right in zip(oracle.content(first.merge(plain)), expected, strict=True):
        np.testing.assert_allclose(found.astype(float), right.astype(float), rtol=1e-10)


def test_a_long_stream_of_gates_does_not_drift():
    fm = feature_map("positive", 2, 8)
    state, rng = AttentionState(fm, 1), np.random.default_rng(0)
    k, v = np.ones((20_000, 2), np.float32), rng.random((20_000, 1)).astype(np.float32)
    gates = rng.uniform(0.2, 1, 20_000)
    for _ in range(40):
        state.update(k, v, decay=gates)
    weights = np.exp(np.cumsum(np.log(gates[:0:-1])))
    expected = (weights @ v[-2::-1, 0] + v[-1, 0]) / (weights.sum() + 1)
    np.testing.assert_allclose(state.attend(k[:1])[0, 0], expected, rtol=3e-6)
    assert np.abs(state.c).max() < 100  # what has faded is taken off the exponents


@pytest.mark.parametrize("gated", [False, True])
def test_threads_that_share_a_fading_state(gated):
    """Each token is raised by what has faded when its turn comes, not when its call began."""
    fm, (q, k, v, *_) = fm_of(), inputs()
    state, alone = (AttentionState(fm, DIM, decay=None if gated else 0.83) for _ in range(2))
    more = {"decay": 0.83} if gated else {}

    def steps(state, count):
        for _ in range(count):
            state.step(q[0], k[0], v[0], **more)

    threads = [threading.Thread(target=steps, args=(state, 100)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps(alone, 300)
    z, expected = (s.z * 2.0**s.c for s in (state, alone))
    assert (state.lengths == alone.lengths).all()
    np.testing.assert_allclose(z, expected, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 7, 64])
def test_window_states(window):
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2)
    state = WindowState(fm, DIM, window, 2, dtype=np.float64)
    more = {"causal": True, "window": window, "decay": gates, "key_bias": bias}
    expected = favor_attention(q, k, v, fm, **more)
    state.update(k[:, :40], v[:, :40], key_bias=bias[:, :40], decay=gates[:, :40])
    for i in range(40, LENGTH):
        if i == 90:
            state = pickle.loads(pickle.dumps(state))
        out = state.step(q[:, i], k[:, i], v[:, i], key_bias=bias[:, i], decay=gates[:, i])
        np.testing.assert_allclose(out, expected[:, i], atol=1e-12)


# -- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"causal": True},
        {"causal": True, "window": 20},
        {"causal": True, "window": 20, "cu_seqlens": [0, 45, 80], "decay": 0.95},
        {"causal": True, "decay": 0.9},
        {"causal": True, "enable_gqa": True},
    ],
)
@pytest.mark.parametrize("kind", ["positive", "relu", "elu"])
def test_gradients(kind, options):
    fm, (q, k, v, bias, _) = fm_of(kind), inputs(4, length=80)
    if "enable_gqa" in options:
        k, v, bias = k[:2], v[:2], bias[:2]
    bias[:, 3] = -np.inf
    g = np.random.default_rng(5).normal(size=q.shape)
    out, pullback = favor_attention_vjp(q, k, v, fm, key_bias=bias, **options)
    np.testing.assert_array_equal(out, favor_attention(q, k, v, fm, key_bias=bias, **options))
    found = pullback(g)
    grads = oracle.favor_attention_vjp(q, k, v, fm, g, key_bias=bias, **options)
    names = ("q", "k", "v", "projection", "key_bias")
    for name, expected in zip(names, grads, strict=True):
        np.testing.assert_allclose(getattr(found, name), expected, atol=2e-11, err_msg=name)
    assert found.key_bias.shape == bias.shape
    assert not found.key_bias[:, 3].any()


@pytest.mark.parametrize(
    "options", [{}, {"window": 30}, {"cu_seqlens": [0, 25, 25, 80]}, {"state": True}]
)
def test_gradient_of_a_factor_a_token(options):
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2, length=80)
    rng = np.random.default_rng(5)
    g, direction = rng.normal(size=q.shape), rng.normal(size=gates.shape)
    more, grad_state = dict(causal=True, key_bias=bias[:1], **options), None
    if more.pop("state", False):
        more["state"] = AttentionState(fm, DIM, 2, dtype=np.float64).update(k[:, :9], v[:, 9:18])
        grad_state = rng.normal(size=(2, 24, DIM)), rng.normal(size=(2, 24))
        more["return_state"] = True

    def value(gates, bias):
        found = favor_attention(q, k, v, fm, decay=gates, **more | {"key_bias": bias})
        if grad_state is None:
            return (found * g).sum()
        sums = found[1].S * 2.0 ** found[1].c[..., None], found[1].z * 2.0 ** found[1].c
        return (found[0] * g).sum() + sum(
            (x * y).sum() for x, y in zip(sums, grad_state, strict=True)
        )

    results, pullback = favor_attention_vjp(q, k, v, fm, decay=gates, **more)
    if grad_state is None:
        found = pullback(g)
    else:
        c = results[1].c
        found = pullback(g, (grad_state[0] * 2.0 ** c[..., None], grad_state[1] * 2.0**c))
    step = 1e-6 * gates * direction
    slope = (value(gates + step, bias[:1]) - value(gates - step, bias[:1])) / 2
    np.testing.assert_allclose((found.decay * step).sum(), slope, rtol=2e-7)
    step = 1e-6 * direction[:1]
    slope = (value(gates, bias[:1] + step) - value(gates, bias[:1] - step)) / 2
    np.testing.assert_allclose((found.key_bias * step).sum(), slope, rtol=2e-7)
    assert found.decay.shape == gates.shape
    assert found.key_bias.shape == (1, 80)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_gradient_of_a_factor_that_resets(exact, dtype):
    """What rounding leaves of it is not divided by the factor."""
    q, k, v = (x.astype(dtype) for x in inputs(length=64)[:3])
    decay = np.random.default_rng(0).uniform(0.8, 1, 64).astype(dtype)
    found = []
    with np.errstate(all="raise"):
        for factor in (1e-3, 1e-5, 1e-30, np.finfo(dtype).smallest_subnormal):
            decay[40] = factor
            if exact:
                out, pull = exact_attention_vjp(q, k, v, causal=True, decay=decay)
            else:
                fm = fm_of()
                out, pull = favor_attention_vjp(q, k, v, fm, causal=True, decay=decay)
            found.append(pull(np.cos(np.arange(out.size, dtype=dtype)).reshape(out.shape)).decay)
    first, second, *rest = (x[..., 40] for x in found)
    np.testing.assert_allclose(first, second, rtol=0.2)
    assert (first != 0).all()
    for x in rest:
        np.testing.assert_array_equal(x, 0)


def test_gradients_in_bfloat16_are_those_of_float32():
    q, k, v, *_ = inputs(2, dtype=np.float32)
    g = inputs(2, seed=3, dtype=np.float32)[0]
    fm = fm_of()
    whole = favor_attention_vjp(q, k, v, fm, causal=True)[1](g)
    out, pullback = favor_attention_vjp(q, k, v, fm, causal=True, precision="bfloat16")
    np.testing.assert_array_equal(
        out, favor_attention(q, k, v, fm, causal=True, precision="bfloat16")
    )
    found = pullback(g)
    for name in "qkv":
        a, b = getattr(found, name), getattr(whole, name)
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()


# -- What must not change, and what is refused ------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window": 700}])
def test_same_bits_on_any_number_of_threads(options):
    fm, (q, k, v, bias, gates) = fm_of(), inputs(3, length=5000, dtype=np.float32)
    more = dict(causal=True, key_bias=bias, decay=np.maximum(gates, 0.9), **options)
    one, two = (favor_attention(q, k, v, fm, num_threads=n, **more) for n in (1, 2))
    assert np.array_equal(one, two)
    one, two = (favor_attention_vjp(q, k, v, fm, num_threads=n, **more)[1](q) for n in (1, 2))
    for name in ("q", "k", "v", "key_bias", "decay"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("kind", ["positive", "relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_masked_key_elsewhere_changes_no_bit(kind, dtype):
    """Nor does it change how sequences of one position are computed."""
    fm = fm_of(kind)
    for seed in range(20):
        q, k, v, bias, _ = inputs(2, length=10, seed=seed, dtype=dtype)
        alone = favor_attention(q[1, 9:], k[1, 9:], v[1, 9:], fm, causal=True, key_bias=bias[1, 9:])
        bias[:, 3] = bias[0, 9] = -np.inf  # of another sequence, and of another head
        k[:, 3] = k[0, 9] = np.nan
        packed = favor_attention(q, k, v, fm, causal=True, cu_seqlens=[0, 9, 10], key_bias=bias)
        np.testing.assert_array_equal(packed[1, 9:], alone)
        np.testing.assert_array_equal(packed[0, 9:], 0)
        same = favor_attention(
            q, k, v, fm, causal=True, cu_seqlens=[0, 9, 10], key_bias=np.maximum(bias, -1e3),
            key_mask=bias > -np.inf,
        )  # fmt: skip
        np.testing.assert_array_equal(packed, same)


def test_no_later_number_changes_an_earlier_row():
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2, length=300, dtype=np.float32)
    whole = favor_attention(q, k, v, fm, causal=True, key_bias=bias, decay=gates)
    for at in (1, 63, 64, 200):
        later, forgetful = bias.copy(), gates.copy()
        later[:, at:], forgetful[:, at:] = 1e6, 1e-300
        other = favor_attention(q, k, v, fm, causal=True, key_bias=later, decay=forgetful)
        assert np.array_equal(whole[:, :at], other[:, :at])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_numbers_that_are_no_bias(bad):
    fm, (q, k, v, bias, _) = fm_of(), inputs()
    bias[5] = bad
    state = AttentionState(fm, DIM, dtype=np.float64).update(k, v)
    before = state.S
    for use in (
        lambda: favor_attention(q, k, v, fm, key_bias=bias),
        lambda: favor_attention_vjp(q, k, v, fm, key_bias=bias),
        lambda: state.update(k, v, key_bias=bias),
        lambda: state.step(q[0], k[0], v[0], key_bias=bad),
        lambda: WindowState(fm, DIM, 9).update(k, v, key_bias=bias),
    ):
        with pytest.raises(ValueError, match="key_bias must"):
            use()
    assert np.array_equal(state.S, before)


def test_shapes_that_do_not_fit():
    fm, (q, k, v, bias, gates) = fm_of(), inputs(2)
    with pytest.raises(ValueError, match="key_bias must have shape"):
        favor_attention(q, k, v, fm, key_bias=bias[:, :-1])
    with pytest.raises(ValueError, match="key_bias"):
        favor_attention(q, k, v, fm, key_bias=np.zeros((3, LENGTH)))
    with pytest.raises(TypeError, match="key_bias"):
        favor_attention(q, k, v, fm, key_bias=["a"] * LENGTH)
    with pytest.raises(ValueError, match="a factor a token"):
        favor_attention(q, k, v, fm, causal=True, decay=gates[:, :-1])
    with pytest.raises(ValueError, match="a factor a token"):
        favor_attention(q, k, v, fm, causal=True, decay=gates[0])
    with pytest.raises(ValueError, match="needs causal"):
        favor_attention(q, k, v, fm, decay=gates)
    with pytest.raises(ValueError, match="greater than 0"):
        favor_attention(q, k, v, fm, causal=True, decay=gates - 1)
    state = AttentionState(fm, DIM, 2, decay=0.9, dtype=np.float64)
    with pytest.raises(ValueError, match="decay must be that of the state"):
        state.update(k, v, decay=gates)
    with pytest.raises(ValueError, match="must broadcast"):
        state.step(q[:, 0], k[:, 0], v[:, 0], key_bias=np.zeros(3))
    many = np.broadcast_to(k[0, 0], (250_000, DIM))
    with pytest.raises(ValueError, match="take fewer at a time"):
        favor_attention(many, many, many, fm, causal=True, decay=np.full(250_000, 5e-324))
