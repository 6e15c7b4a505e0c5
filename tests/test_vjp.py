"""favor_attention_vjp against dense gradients, and what must hold whatever the numbers are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import child, oracle
from support.inputs import MAPS, draw, random_inputs
from support.parameters import each_causal
from support.pieces import NAMES, STATES, gradients, in_pieces
from support.tolerance import relative_error

from favor_np import AttentionState, FeatureMap, favor_attention, favor_attention_vjp

MAPS = MAPS | {"relu": {"kind": "relu", "kernel_epsilon": 0.05}}  # d log phi / dy <= 1 / epsilon
each_map = pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)


def inputs(L=70, d=6, dv=5, lead=(), **options):
    """q, k, v and a cotangent."""
    return random_inputs(L, d, dv, lead, cotangent=True, **options)


def errors(found, expected):
    """Of each gradient, in units of its largest entry; one that is zero but for rounding has none."""
    largest = [np.abs(x).max(initial=0) for x in expected]
    scales = [max(x, max(largest) / 10, 1e-300) for x in largest]
    worst = [np.abs(a - b).max(initial=0) for a, b in zip(found, expected, strict=True)]
    return dict(zip(NAMES, np.divide(worst, scales).astype(float), strict=True))


def assert_close(found, expected, tolerance):
    worst = errors(found, expected)
    assert all(error < tolerance for error in worst.values()), worst


# -- The kernel and the dense gradients agree -----------------------------------------------------

sizes = st.sampled_from([1, 2, 7, 8, 9, 63, 64, 65, 129]) | st.integers(1, 70)


@st.composite
def problems(draw):
    """Lengths of queries and keys, and options of the public function that go with them."""
    L, causal = draw(sizes), draw(st.booleans())
    Lk = L if causal else draw(sizes)
    options = {"causal": causal}
    if draw(st.booleans()):
        options["key_mask"] = np.random.default_rng(draw(st.integers(0, 1000))).random(Lk) < 0.7
    if causal and draw(st.booleans()):
        options["decay"] = draw(st.sampled_from([0.5, 0.9, 0.999]))
    if Lk == L and draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, L), max_size=4))
        options["cu_seqlens"] = [0, *sorted(cuts), L]
    return L, Lk, options


@settings(max_examples=300)
@given(
    problem=problems(),
    d=st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 80]),
    dv=st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33]),
    rows=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33, 65]),
    kind=st.sampled_from(list(MAPS.values())),
    std=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 1000),
)
@example((1, 1, {"causal": True}), 1, 33, 8, {"kind": "relu", "kernel_epsilon": 0.05}, 0.1, 11)
def test_differential(problem, d, dv, rows, kind, std, seed):
    L, Lk, options = problem
    q, k, v, g = inputs(L, d, dv, Lk=Lk, std=std, seed=seed)
    fm = FeatureMap.from_projection(draw(rows, d, seed=seed + 1), **kind)
    expected = oracle.favor_attention_vjp(q, k, v, fm, g, **options)
    assert_close(gradients(q, k, v, fm, g, **options), expected, 1e-12)


@each_map
@each_causal
def test_many_features_and_wide_rows(options, causal):
    """More than one block of features, and rows longer than a vector tile."""
    q, k, v, g = inputs(40, d=130, dv=129, std=0.5)
    fm = FeatureMap.from_projection(draw(200, 130), **options)
    expected = oracle.favor_attention_vjp(q, k, v, fm, g, causal=causal)
    assert_close(gradients(q, k, v, fm, g, causal=causal), expected, 1e-12)


@each_map
@each_causal
def test_float32(options, causal):
    q, k, v, g = inputs(300, lead=(2,), d=16, dv=9, dtype=np.float32)
    fm = FeatureMap.from_projection(draw(70, 16, dtype=np.float32), **options)
    found = gradients(q, k, v, fm, g, causal=causal)
    assert {x.dtype for x in found} == {np.dtype(np.float32)}
    wide = [x.astype(float) for x in (q, k, v)]
    fm64 = FeatureMap.from_projection(fm.projection.astype(float), **options)
    expected = gradients(*wide, fm64, g.astype(float), causal=causal)
    assert_close(found, expected, 2e-5)
    if causal:  # it has one key, so no choice
        assert np.abs(found[0][:, 0]).max() < 2e-5 * np.abs(expected[0]).max()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keys_that_drift(sign, dtype):
    """By 12 nats along the sequence: the sums of early and of late positions differ by e**12."""
    q, k, v, g = inputs(1000, d=4, dv=3, seed=3)
    W = draw(4, 4)
    k += sign * np.linspace(0, 12, 1000)[:, None] * W[0] / (W[0] @ W[0]) * 4**0.25
    arrays = [x.astype(dtype) for x in (q, k, v)]
    fm = FeatureMap.from_projection(W.astype(dtype))
    for causal in (False, True):
        expected = oracle.favor_attention_vjp(*arrays, fm, g, causal=causal)
        found = gradients(*arrays, fm, g.astype(dtype), causal=causal)
        assert_close(found, expected, {np.float64: 1e-12, np.float32: 1e-4}[dtype])


@each_causal
@pytest.mark.parametrize("std", [10, 30, 100])
def test_peaked_attention(causal, std):
    """Features of one chunk that differ by more than a float can hold."""
    q, k, v, g = inputs(200, d=6, std=std)
    fm = FeatureMap.from_projection(draw(10, 6), antithetic=True)
    expected = oracle.favor_attention_vjp(q, k, v, fm, g, causal=causal)
    found = gradients(q, k, v, fm, g, causal=causal)
    assert_close(found, expected, 1e-14 * std**2)
    found = gradients(*(x.astype("f4") for x in (q, k, v)), fm, g.astype("f4"), causal=causal)
    assert all(np.isfinite(x).all() for x in found)


# -- Heads ----------------------------------------------------------------------------------------

LEADS = [
    ((2, 3), (2, 3), (2, 3)),
    ((2, 3), (3,), ()),
    ((2, 1), (3,), (1, 1)),
    ((1,), (2, 3), (3,)),
    ((), (), (4,)),
    ((2, 1, 2), (3, 1), (1, 1, 1, 1)),
    ((), (), (1,)),
]


@pytest.mark.parametrize("leads", LEADS, ids=str)
@each_causal
def test_gradients_are_summed_over_broadcast_axes(leads, causal):
    q, k, v = (
        draw(*lead, 9, n, seed=n) for lead, n in zip(leads, (6, 6, 5), strict=True)
    )  # fmt: skip
    fm = FeatureMap.from_projection(draw(7, 6))
    g = draw(*np.broadcast_shapes(*leads), 9, 5)
    expected = oracle.favor_attention_vjp(q, k, v, fm, g, causal=causal)
    assert_close(gradients(q, k, v, fm, g, causal=causal), expected, 1e-13)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@each_causal
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_queries(own, causal, masked):
    q, _, _, g = inputs(70, lead=(2, 6))
    _, k, v, _ = inputs(70, lead=(2, 3), seed=1)
    mask = np.random.default_rng(0).random((2, 3, 70)) < 0.5 if masked else None
    fm = FeatureMap.from_projection(draw(*[3] * own, 7, 6), antithetic=True)
    more = {"causal": causal, "enable_gqa": True}
    if causal:
        more["decay"] = np.array([0.9, 0.99, 1.0])
    found = gradients(q, k, v, fm, g, key_mask=mask, **more)
    expected = oracle.favor_attention_vjp(q, k, v, fm, g, key_mask=mask, **more)
    assert_close(found, expected, 1e-12)


@each_map
@each_causal
def test_a_projection_a_head(options, causal):
    q, k, v, g = inputs(33, lead=(2, 3))
    fm = FeatureMap.from_projection(draw(3, 7, 6), **options)
    expected = oracle.favor_attention_vjp(q, k, v, fm, g, causal=causal)
    assert_close(gradients(q, k, v, fm, g, causal=causal), expected, 1e-12)


@each_causal
def test_heads_that_only_the_map_has(causal):
    q, k, v, _ = inputs(33)
    g = draw(3, 33, 5)
    fm = FeatureMap.from_projection(draw(3, 7, 6))
    expected = oracle.favor_attention_vjp(q, k, v, fm, g, causal=causal)
    assert_close(gradients(q, k, v, fm, g, causal=causal), expected, 1e-12)


# -- Masks ----------------------------------------------------------------------------------------


@each_causal
@pytest.mark.parametrize("kind", ["positive", "elu"])
def test_masked_keys_have_no_gradient_and_no_influence(causal, kind):
    q, k, v, g = inputs(lead=(2,))
    mask = np.random.default_rng(0).random((2, 70)) < 0.5
    mask[0, :20] = False  # causal: rows without a key
    mask[1] = False
    fm = FeatureMap.from_projection(draw(7, 6), kind)
    clean = gradients(q, k, v, fm, g, causal=causal, key_mask=mask)
    k[~mask], v[~mask] = np.nan, np.inf
    g[1] = np.nan  # of rows that see no key
    found = gradients(q, k, v, fm, g, causal=causal, key_mask=mask)
    for a, b in zip(found, clean, strict=True):
        assert np.array_equal(a, b)
    dq, dk, dv, _ = found
    assert not dk[~mask].any()
    assert not dv[~mask].any()
    assert dk[mask].any()
    assert not dq[1].any()
    assert not causal or not dq[0, :20].any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_from_or_to(shape):
    q, k, v, g = inputs(shape[0], lead=(2,), Lk=shape[1])
    fm = FeatureMap.from_projection(draw(7, 6))
    found = gradients(q, k, v, fm, g)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape, fm.projection.shape]
    assert not any(x.any() for x in found)


def test_empty_batches_and_values():
    fm = FeatureMap.from_projection(draw(7, 6))
    for lead, dv in (((0,), 5), ((2, 0), 5), ((2,), 0)):
        q, k, v, g = inputs(4, lead=lead, dv=dv)
        found = gradients(q, k, v, fm, g, causal=True)
        assert [x.shape for x in found] == [q.shape, k.shape, v.shape, fm.projection.shape]
        assert not any(x.any() for x in found)


def test_no_queries():
    """They have no part in a gradient that comes from the state alone."""
    _, k, v, _ = inputs(lead=(2, 3))
    fm = FeatureMap.from_projection(draw(7, 6))
    before = AttentionState.zeros(fm, 5, (2, 3), dtype=float).update(
        *inputs(lead=(2, 3), seed=5)[1:3]
    )
    S, z = draw(2, 3, 7, 5), draw(2, 3, 7)
    found = []
    for rows, gqa in ((0, False), (70, False), (0, True)):
        q = np.zeros((2, 6 if gqa else 3, rows, 6))
        (out, _), pullback = favor_attention_vjp(
            q, k, v, fm, enable_gqa=gqa, state=before, return_state=True
        )
        grads = pullback(0 * out, (S, z))
        found.append((grads.k, grads.v, *grads.state, grads.projection))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert relative_error(b, a) < 1e-13


# -- States -----------------------------------------------------------------------------------------


def moved(state, S, z):
    """The state with these added to its S and z."""
    from favor_np.cpu.layout import layout

    state = state.copy()
    real = layout(state.feature_map, state.dtype, state.value_dim).real
    late = 1.0 if state._rates is None else np.exp2((state.lengths.ravel() * state._rates) % 1.0)
    late = np.reshape(late, (-1, 1)) if np.ndim(late) else late
    rows = len(state._arrays[0])
    state._arrays[2][:, real] += late * z.reshape(rows, len(real))
    late = np.reshape(late, (-1, 1, 1)) if np.ndim(late) else late
    state._arrays[1][:, real, : state.value_dim] += late * S.reshape(rows, len(real), -1)
    return state


def assert_slope(loss, gradient, *points, step=1e-6):
    """The derivative of the loss in one random direction is gradient . direction."""
    rng = np.random.default_rng(0)
    directions = [rng.standard_normal(x.shape) for x in points]
    ends = [
        loss(*(x + sign * step * d for x, d in zip(points, directions, strict=True)))
        for sign in (1, -1)
    ]
    expected = sum((a * d).sum() for a, d in zip(gradient, directions, strict=True))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-6)


@each_map
@pytest.mark.parametrize("more", STATES.values(), ids=STATES)
@each_causal
def test_states(options, more, causal):
    """The gradient of a loss of the result and of the last state, in all that goes in."""
    if not causal:
        more = {name: value for name, value in more.items() if name != "decay"}
    q, _, _, g = inputs(lead=(2, 6 if "enable_gqa" in more else 3))
    _, k, v, _ = inputs(lead=(2, 3), seed=1)
    fm = FeatureMap.from_projection(draw(7, 6), **options)
    more = {"causal": causal, **more}
    first = more | ({"cu_seqlens": [0, 20, 30, 40, 70]} if "cu_seqlens" in more else {})
    _, state = favor_attention(*inputs(lead=(2, 3), seed=2)[:3], fm, return_state=True, **first)
    S, z = draw(*state.S.shape, seed=3), draw(*state.z.shape, seed=4)

    def loss(q, k, v, W, dS, dz):
        one = dataclasses.replace(fm, projection=W)
        before = moved(state, dS, dz)
        before.feature_map = one
        out, after = favor_attention(q, k, v, one, state=before, return_state=True, **more)
        return (out * g).sum() + (after.S * S).sum() + (after.z * z).sum()

    _, pullback = favor_attention_vjp(q, k, v, fm, state=state, return_state=True, **more)
    grads = pullback(g, (S, z))
    assert_slope(loss, (grads.q, grads.k, grads.v, grads.projection, *grads.state),
                 q, k, v, fm.projection, 0 * S, 0 * z)  # fmt: skip


@pytest.mark.parametrize("cuts", [[30], [1], [64], [65, 66], [0, 70]], ids=str)
@pytest.mark.parametrize("more", [STATES[n] for n in list(STATES)[:4]], ids=list(STATES)[:4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gradient_flows_through_states(cuts, more, dtype):
    found, whole = in_pieces(cuts, more, dtype)
    assert_close(found, whole, {np.float64: 1e-12, np.float32: 5e-5}[dtype])


def test_a_state_before_keys_that_are_read_by_all():
    """Without causality too, and with no keys of its own."""
    q, k, v, g = inputs(20)
    fm = FeatureMap.from_projection(draw(7, 6))
    state = AttentionState.zeros(fm, 5, dtype=float).update(k, v)
    (_, _), pullback = favor_attention_vjp(q, k[:0], v[:0], fm, state=state, return_state=True)
    S = pullback(g).state.S
    assert_slope(lambda dS: (moved(state, dS, 0 * state.z).attend(q) * g).sum(), [S], 0 * S)


# -- To the bit -----------------------------------------------------------------------------------


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("change", [np.nan, np.inf, 1e3])
@pytest.mark.parametrize("t", [1, 63, 64, 65, 130])
@each_map
def test_nothing_flows_back_to_later_keys(change, t, options):
    q, k, v, g = inputs(150)
    fm = FeatureMap.from_projection(draw(7, 6), **options)
    pullback = favor_attention_vjp(q, k, v, fm, causal=True)[1]
    before, early = pullback(g), g.copy()
    early[:t] = change
    after = pullback(early)
    assert same((after.q[t:], after.k[t:], after.v[t:]), (before.q[t:], before.k[t:], before.v[t:]))
    assert not np.isclose(after.v[:t], before.v[:t], equal_nan=False).any()
    later = g.copy()
    later[t:] = change
    assert same([pullback(later).q[:t]], [before.q[:t]])


@each_causal
def test_a_query_of_nan_reaches_what_it_sees_only(causal):
    q, k, v, g = inputs(150)
    fm = FeatureMap.from_projection(draw(7, 6))
    before = gradients(q, k, v, fm, g, causal=causal)
    q[70, 1] = np.nan
    after = gradients(q, k, v, fm, g, causal=causal)
    others = np.arange(150) != 70
    assert same([after[0][others]], [before[0][others]])
    assert np.isnan(after[0][70]).all()
    seen = 71 if causal else 150
    for a, b in zip(after[1:3], before[1:3], strict=True):
        assert np.isnan(a[:seen]).all()
        assert np.array_equal(a[seen:], b[seen:])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_key_of_nan_leaves_earlier_queries_alone(bad):
    q, k, v, g = inputs(150)
    fm = FeatureMap.from_projection(draw(7, 6))
    before = gradients(q, k, v, fm, g, causal=True)
    k[70, 1] = bad
    after = gradients(q, k, v, fm, g, causal=True)
    assert same([after[0][:70]], [before[0][:70]])
    assert np.isnan(after[0][70:]).all()
    for grad in after[1:]:  # every key shares a later query with that one
        assert np.isnan(grad).all()


@pytest.mark.parametrize("length", [100, 20000])
@each_causal
def test_threads_change_no_bit(length, causal):
    q, k, v, g = inputs(length, lead=(2,), d=16, dv=16, dtype=np.float32)
    fm = FeatureMap.from_projection(draw(32, 16))
    once, *others = (gradients(q, k, v, fm, g, causal=causal, num_threads=n) for n in (1, 2, 3))
    assert all(same(once, other) for other in others)


@each_causal
def test_a_pullback_may_be_called_again(causal):
    q, k, v, g = inputs(lead=(2,))
    copies = [x.copy() for x in (q, k, v, g)]
    fm = FeatureMap.from_projection(draw(7, 6))
    out, pullback = favor_attention_vjp(q, k, v, fm, causal=causal)
    assert np.array_equal(out, favor_attention(q, k, v, fm, causal=causal))
    first = pullback(g)
    pullback(-g)
    second = pullback(g)
    assert same((first.q, first.k, first.v), (second.q, second.k, second.v))
    assert first.projection is first.projection
    assert np.array_equal(first.projection, second.projection)
    assert same((q, k, v, g), copies)


# -- What goes in and comes out -------------------------------------------------------------------------


def test_dtypes():
    import ml_dtypes

    for types, expected in (  # the projection's has the dtype of the computation
        (["f2"] * 4, ["f2"] * 3 + ["f4"]),
        (["f2", "f4", "f8", "f8"], ["f2", "f4", "f8", "f8"]),
        (["i4", "f4", "?", "f4"], ["f8", "f4", "f8", "f8"]),
        ([ml_dtypes.bfloat16, "f4", "f4", "f4"], [ml_dtypes.bfloat16, "f4", "f4", "f4"]),
    ):
        arrays = [np.round(2 * x).astype(t) for x, t in zip(inputs(), types, strict=True)]
        fm = FeatureMap.from_projection(draw(7, 6, dtype=np.float32))
        found = gradients(*arrays[:3], fm, arrays[3])
        assert [x.dtype for x in found] == [*map(np.dtype, expected)]
        wide = gradients(*(x.astype(float) for x in arrays[:3]), fm, arrays[3].astype(float))
        tolerance = 2e-2 if types[0] is ml_dtypes.bfloat16 else 2e-3
        assert_close([x.astype(float) for x in found], wide, tolerance)


def test_layouts_of_the_cotangent():
    q, k, v, g = inputs(lead=(2,))
    fm = FeatureMap.from_projection(draw(7, 6))
    pullback = favor_attention_vjp(q, k, v, fm)[1]
    expected = pullback(g)
    for other in (
        np.asfortranarray(g), g[:, ::-1].copy()[:, ::-1], g.astype(">f8"), g.tolist(),
        np.repeat(g, 2, -1)[..., ::2],
    ):  # fmt: skip
        found = pullback(other)
        assert same((found.q, found.k, found.v), (expected.q, expected.k, expected.v))
    ones = np.broadcast_to(1.0, g.shape)
    assert np.array_equal(pullback(ones).v, pullback(np.ones(g.shape)).v)


REFUSED = [
    ("vjp(q, k, v, FM)[1](g[:, 1:])", ValueError, r"grad_out must have shape \(2, 6, 3\), got"),
    ("vjp(q, k, v, FM)[1](g + 1j)", TypeError, "grad_out must hold real numbers"),
    ("vjp(q, k, v, FM)[1](g, (g, g))", ValueError, "grad_state needs return_state"),
    ("vjp(q, k, v, FM, return_state=True)[1](g, g[:1])", TypeError, "grad_state must be a pair"),
    ("vjp(q, k, v, FM, return_state=True)[1](g, 3)", TypeError, "grad_state must be a pair"),
    ("vjp(q, k, v, FM, return_state=True)[1](g, (g, g))", ValueError, r"grad_state.S must have"),
    ("vjp(q, k[..., 1:], v, FM)", ValueError, "k must have shape"),
    ("vjp(q, k, v, None)", TypeError, "feature_map must be a FeatureMap"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(call, error, message):
    q, k, v, g = inputs(6, lead=(2,), dv=3)
    names = {"vjp": favor_attention_vjp, "FM": FeatureMap.from_projection(draw(7, 6))}
    with pytest.raises(error, match=message):
        eval(call, names | {"q": q, "k": k, "v": v, "g": g})


@each_causal
def test_memory_is_constant(causal):
    """Beyond the arguments, the result and their gradients: less than 32 MB for 262,144 positions."""
    code = f"""
    import numpy as np
    import favor_np
    from favor_np.measure import peak_memory

    fm = favor_np.feature_map("positive", dim=64, num_features=256)
    x = np.random.default_rng(0).standard_normal((262144, 64), np.float32)
    def run(x):
        out, pullback = favor_np.favor_attention_vjp(x, x, x, fm, causal={causal})
        grads = pullback(x)
        grads.projection
        return out, grads
    run(x[:1000])
    print(peak_memory(lambda: run(x)) - 4 * x.nbytes)
    """
    assert int(child.python(code)) < 32e6
