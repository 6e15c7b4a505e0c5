"""Values and cotangents up to the largest float: their sums overflow, the right answers do not."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from support import oracle

from favor_np import (
    AttentionState,
    FeatureMap,
    WindowState,
    exact_attention,
    exact_attention_vjp,
    favor_attention,
    favor_attention_vjp,
)
from favor_np.features import Calibration

KINDS = [np.float32, np.float64]
W = np.random.default_rng(5).standard_normal((20, 6))

each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
each_size = pytest.mark.parametrize("size", ["equal", "random", "one"])
each_map = pytest.mark.parametrize(
    "options", [{}, {"antithetic": True}, {"kind": "relu"}, {"kind": "elu"}], ids=str
)


def data(kind, length=150, size="random", heads=2):
    rng = np.random.default_rng(0)
    q, k = 0.5 * rng.standard_normal((2, heads, length, 6))
    v = rng.uniform(-1, 1, (heads, length, 3))
    most = np.finfo(kind).max
    if size == "equal":
        v = np.full_like(v, most)
    elif size == "random":
        v = v * most
    else:
        v[:, length // 2] = -most
    return q.astype(kind), k.astype(kind), v.astype(kind)


def close(got, want, kind, units=60):
    """Whether all is finite and right, as seen from the largest of each row's values."""
    want = np.asarray(want, oracle.REAL)
    scale = np.maximum(abs(want), abs(want).max())
    return np.isfinite(got).all() and (abs(got - want) <= units * np.finfo(kind).eps * scale).all()


@each_kind
@each_map
@each_mode
@each_size
def test_favor_attention(size, causal, options, kind):
    q, k, v = data(kind, size=size)
    fm = FeatureMap.from_projection(W, **options)
    want = oracle.favor_attention(q, k, v, fm, causal=causal)
    for threads in (1, 2):
        assert close(favor_attention(q, k, v, fm, causal=causal, num_threads=threads), want, kind)


@each_kind
@pytest.mark.parametrize("how", ["mask", "grouped", "decay", "packed", "window", "long"])
def test_favor_attention_of_every_sort(how, kind):
    q, k, v = data(kind, length=150 if how != "long" else 5000, heads=2 if how != "long" else 1)
    fm = FeatureMap.from_projection(W)
    more = {
        "mask": {"key_mask": np.random.default_rng(1).random((2, 150)) < 0.5},
        "grouped": {"enable_gqa": True},
        "decay": {"decay": np.array([0.9, 0.999])},
        "packed": {"cu_seqlens": np.array([0, 1, 40, 41, 41, 150])},
        "window": {"window": 11},
        "long": {},
    }[how]
    if how == "grouped":
        k, v = k[:1], v[:1]
    if how == "long":  # folded in segments, which are merged
        most = float(np.finfo(kind).max)
        want = (
            favor_attention(*(x.astype(float) for x in (q, k)), v.astype(float) / most, fm) * most
        )
    else:
        want = oracle.favor_attention(q, k, v, fm, causal=True, **more)
    assert close(favor_attention(q, k, v, fm, causal=how != "long", **more), want, kind)


def test_products_in_bfloat16():
    q, k, v = data(np.float32, size="equal")
    fm = FeatureMap.from_projection(W)
    for out in (
        favor_attention(q, k, v, fm, causal=True, precision="bfloat16"),
        exact_attention(q, k, v, precision="bfloat16"),
    ):
        assert close(out, v, np.float32, units=2.0**16)


@each_kind
@each_mode
@each_size
def test_exact_attention(size, causal, kind):
    q, k, v = data(kind, size=size)
    want = oracle.exact_attention(q, k, v, causal=causal)
    assert close(exact_attention(q, k, v, causal=causal), want, kind)


@each_kind
def test_rows_beyond_the_kernels(kind):
    """Logits of 2**50: such rows are computed one by one."""
    q, k, v = data(kind, size="equal")
    q[0, 5] *= 2.0**50
    out, pull = exact_attention_vjp(q, k, v)
    assert close(out, v, kind)
    g = np.zeros_like(v)
    g[0, 5] = 1
    want = oracle.exact_attention_vjp(q, k, v, g)
    assert all(close(*pair, kind) for pair in zip(pull(g), want, strict=True))


@each_kind
@pytest.mark.parametrize("attend", ["favor", "exact", "window", "state"])
def test_only_what_overflows_is_computed_anew(attend, kind):
    """Other rows, and other columns, have the bits that they have without the large values."""
    q, k, v = data(kind, size="one")
    v[..., 2] = 2.0 ** -(100 if kind == np.float32 else 1000)
    fm = FeatureMap.from_projection(W)

    def run(v):
        if attend == "exact":
            return exact_attention(q, k, v, causal=True)
        if attend == "window":
            return favor_attention(q, k, v, fm, causal=True, window=50)
        state = AttentionState(fm, 3, 2, dtype=kind) if attend == "state" else None
        return favor_attention(
            q, k, v, fm, causal=True, state=state, return_state=state is not None
        )

    large, small = run(v), run(np.where(abs(v) > 2, 1, v).astype(kind))
    if attend == "state":
        large, small = large[0], small[0]
    assert np.array_equal(large[:, :75], small[:, :75])
    assert np.array_equal(large[..., 2], small[..., 2])
    assert np.isfinite(large).all()


@each_kind
@pytest.mark.parametrize("attend", [favor_attention, exact_attention])
def test_what_is_not_finite_stays_so(attend, kind):
    q, k, v = data(kind, size="equal")
    q[0, 3] = v[0, 80, 1] = np.nan
    v[0, 90, 0] = np.inf
    more = {"feature_map": FeatureMap.from_projection(W)} if attend is favor_attention else {}
    out = attend(q, k, v, causal=True, **more)
    bad = np.zeros(out.shape, bool)
    bad[0, 3] = bad[0, 80:, 1] = bad[0, 90:, 0] = True
    assert np.array_equal(~np.isfinite(out), bad)


@each_kind
@each_size
@pytest.mark.parametrize("decay", [None, 0.95])
def test_states(size, decay, kind):
    """Steps, updates in place and on a copy, merges and files: what they hold is in range."""
    q, k, v = data(kind, 1400, size)
    fm, most = FeatureMap.from_projection(W), float(np.finfo(kind).max)
    state = AttentionState(fm, 3, 2, decay=decay, dtype=kind)
    plain = AttentionState(fm, 3, 2, decay=decay, dtype=float)
    u = np.asarray(v / oracle.REAL(most), float)
    for i in range(40):
        out = state.step(q[:, i], k[:, i], v[:, i])
        want = plain.step(q[:, i], k[:, i], u[:, i])
        assert close(out / most, want, kind)
    for start, stop in ((40, 41), (41, 200), (200, 1400)):
        state.update(k[:, start:stop], v[:, start:stop])
        plain.update(k[:, start:stop], u[:, start:stop])
        assert close(state.attend(q) / most, plain.attend(q.astype(float)), kind)
    state = pickle.loads(pickle.dumps(state.merge(state)))
    plain.merge(plain)
    assert close(state.attend(q) / most, plain.attend(q.astype(float)), kind)
    assert np.isfinite(state.S).all()
    out, state = favor_attention(q, k, v, fm, causal=True, state=state, return_state=True)
    want = favor_attention(
        q.astype(float), k.astype(float), u, fm, causal=True, state=plain, return_state=True
    )
    assert close(out / most, want[0], kind)
    assert close(state.attend(q) / most, want[1].attend(q.astype(float)), kind)


@each_kind
@each_size
def test_window_states(size, kind):
    q, k, v = data(kind, 60, size)
    fm = FeatureMap.from_projection(W)
    want = oracle.favor_attention(q, k, v, fm, causal=True, window=9)
    state = WindowState(fm, value_dim=3, window=9, batch_shape=2, dtype=kind)
    out = [state.step(q[:, i], k[:, i], v[:, i]) for i in range(60)]
    assert close(np.stack(out, 1), want, kind)


def test_ordinary_tokens_after_large_ones():
    """A state that has seen large values goes on from there, and is finite whatever comes next."""
    q, k, v = data(np.float32, 64, "equal")
    fm = FeatureMap.from_projection(W)
    state = AttentionState(fm, 3, 2, dtype=np.float32).update(k, v)
    rest = np.random.default_rng(1).standard_normal((2, 64, 3)).astype(np.float32)
    state.update(k, rest)
    want = oracle.favor_attention(q, np.tile(k, (1, 2, 1)), np.concatenate([v, rest], 1), fm)
    assert close(state.attend(q), want, np.float32)


@each_kind
@each_mode
@pytest.mark.parametrize("large", ["values", "cotangents", "both"])
@pytest.mark.parametrize("attend", ["favor", "exact"])
def test_gradients(attend, large, causal, kind):
    """Where the gradient is finite it is right, though sums on the way to it are not."""
    q, k, v = data(kind, 90, "random")
    g = data(kind, 90, "random")[2][:, ::-1]
    span = np.finfo(kind).maxexp
    small = {"values": (0, -span), "cotangents": (-span, 0), "both": (-span // 2, -span // 2 - 8)}
    v, g = (np.ldexp(x, power) for x, power in zip((v, g), small[large], strict=True))
    how = {"causal": causal}
    if attend == "favor":
        fm = FeatureMap.from_projection(W)
        _, pull = favor_attention_vjp(q, k, v, fm, **how)
        want = oracle.favor_attention_vjp(q, k, v, fm, g, **how)
    else:
        _, pull = exact_attention_vjp(q, k, v, **how)
        want = oracle.exact_attention_vjp(q, k, v, g, **how)
    found = pull(g)
    arrays = [found.q, found.k, found.v, *([found.projection] if attend == "favor" else [])]
    for got, expected in zip(arrays, want, strict=True):
        finite = abs(expected) < np.finfo(kind).max  # of equal weights many cotangents are added
        assert finite.mean() > 0.9
        assert close(got[finite], expected[finite], kind, units=400)


def test_gradients_through_a_state():
    q, k, v = data(np.float32, 90, "random")
    rest = np.random.default_rng(1).standard_normal((2, 90, 3)).astype(np.float32)
    g = (np.random.default_rng(2).standard_normal((2, 90, 3)) / 1e4).astype(np.float32)
    fm, found = FeatureMap.from_projection(W), []
    for kind in KINDS:
        state = AttentionState(fm, 3, 2, dtype=kind).update(k, v)
        arrays = (x.astype(kind) for x in (q, k, rest))
        _, pull = favor_attention_vjp(*arrays, fm, causal=True, state=state)
        found.append((pull(g.astype(kind)), state.c))
    (single, c), (double, before) = found
    for name in "qkv":
        assert close(getattr(single, name), getattr(double, name), np.float32, 400)
    assert close(np.ldexp(single.state.S, (before - c)[..., None]), double.state.S, np.float32, 400)


@each_kind
def test_a_state_merged_with_itself_again_and_again(kind):
    """2**1500 times the same keys: sums went to infinity after 128 or 1024 doublings."""
    q, k, _ = data(kind)
    v = np.random.default_rng(1).standard_normal((2, 150, 3)).astype(kind)
    state = AttentionState(FeatureMap.from_projection(W), 3, 2, dtype=kind).update(k, v)
    want = state.attend(q)
    for _ in range(1500):
        state.merge(state)
    assert np.isfinite(state.z).all()
    assert close(state.attend(q), want, kind)


@each_kind
@each_mode
def test_keys_in_the_direction_of_a_far_centre(causal, kind):
    """Log-features saturate above as they do below: of keys beyond that none outweighs the others."""
    middle = np.zeros(6)
    middle[0] = 2.0**23 if kind == np.float32 else 2.0**31
    of_map = Calibration(middle, np.zeros(6), None, np.zeros(6))
    fm = replace(FeatureMap.from_projection(W * (np.arange(6) > 0)), calibration=of_map)
    q, k, v = (np.zeros((4, n), kind) for n in (6, 6, 2))
    q[:, 0], k[:, 0] = middle[0], [1, 2, 4, 3]
    v[:] = np.arange(8).reshape(4, 2)
    want = np.cumsum(v, 0) / np.arange(1, 5)[:, None]
    state = AttentionState(fm, 2, dtype=kind)
    steps = np.stack([state.step(*rows) for rows in zip(q, k, v, strict=True)])
    assert np.allclose(steps, want, rtol=1e-6)
    assert np.allclose(state.attend(q), want[-1], rtol=1e-6)
    out = favor_attention(q, k, v, fm, causal=causal)
    assert np.allclose(out, want if causal else want[-1], rtol=1e-6)
