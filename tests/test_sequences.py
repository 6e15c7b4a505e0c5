"""Packed sequences, decay and windows, alone and together, and what decodes them."""

import copy
import functools
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support import child, oracle
from support.child import python
from support.inputs import CHANGES, MAPS, draw, random_inputs
from support.parameters import each_causal, each_dtype, each_map
from support.tolerance import relative_error, state_error, tolerance
from support.tuning import tuned

import favor_np
from favor_np import AttentionState, FeatureMap, WindowState, favor_attention, feature_map

DECAYS = [1 - 1e-6, 0.99, 0.5, 1e-3]
WINDOWS = [1, 2, 63, 64, 65, 100, 300]


def small_map(options=MAPS["positive"]):
    return FeatureMap.from_projection(draw(17, 6), **options)


def offsets(lengths):
    return np.cumsum([0, *lengths])


def pieces(cuts, L):
    """The slices between sorted cuts of 0:L."""
    cuts = [0, *sorted(cuts), L]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


# -- All of it against the oracle ---------------------------------------------------------------


@st.composite
def problems(draw):
    """Options that go together, and the shapes they need."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 7, 30, 63, 64, 65, 90]), min_size=1))
    assume(sum(lengths) <= 250)
    causal = draw(st.booleans())
    groups, heads = draw(st.sampled_from([(1, 1), (1, 2), (3, 2)]))
    options = {"causal": causal, "enable_gqa": groups > 1}
    if draw(st.booleans()):
        options["cu_seqlens"] = offsets(lengths)
    if causal and draw(st.booleans()):
        some = st.sampled_from([1.0, *DECAYS])
        options["decay"] = draw(st.one_of(some, st.lists(some, min_size=heads, max_size=heads)))
    if causal and draw(st.booleans()):
        options["window"] = draw(st.one_of(st.integers(1, 20), st.sampled_from(WINDOWS)))
    return sum(lengths), groups, heads, options, draw(st.sampled_from(["", "H", "BH"]))


def key_mask(kind, rng, lead, L):
    place = np.arange(L)
    return {
        "none": None,
        "left": np.broadcast_to(place >= L // 3, (*lead, L)),
        "right": np.broadcast_to(place < L - L // 3, (L,)),
        "scattered": rng.random((*lead, L)) < 0.6,
    }[kind]


@settings(max_examples=150)
@given(
    problem=problems(),
    options=st.sampled_from(list(MAPS.values())),
    per_head=st.booleans(),
    mask=st.sampled_from(["none", "left", "right", "scattered"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_differential(problem, options, per_head, mask, dtype, seed):
    L, groups, heads, call, axes = problem
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((heads, 9, 4) if per_head else (9, 4))
    fm = FeatureMap.from_projection(W, **options)
    q = rng.standard_normal((2, heads * groups, L, 4)).astype(dtype)
    k, v = rng.standard_normal((2, 2, heads, L, 4)).astype(dtype)
    lead = {"": (), "H": (heads,), "BH": (2, heads)}[axes]
    keep = key_mask(mask, rng, lead, L)
    out = favor_attention(q, k, v, fm, key_mask=keep, **call)
    assert out.dtype == dtype
    expected = oracle.favor_attention(q, k, v, fm, key_mask=keep, **call)
    assert relative_error(out, expected) < tolerance(q, k, fm, dtype, call.get("decay"))


@settings(max_examples=60)
@given(
    problem=problems(),
    options=st.sampled_from(list(MAPS.values())),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_on_from_a_state(problem, options, dtype, seed):
    L, groups, heads, call, _ = problem
    call.pop("window", None)  # has no states
    fm = FeatureMap.from_projection(draw(9, 4, seed=seed), **options)
    before, after = (
        random_inputs(
            L, 4, 4, (2, heads * groups), kv_lead=(2, heads), seed=seed + part, dtype=dtype
        )
        for part in (1, 2)
    )
    _, state = favor_attention(*before, fm, return_state=True, **call)
    decay = call.pop("decay", None)  # that of the state from now on
    out, last = favor_attention(*after, fm, state=state, return_state=True, **call)
    expected, sums = oracle.favor_attention(*after, fm, state=state, return_state=True, **call)
    longest = [np.concatenate(pair, axis=-2) for pair in zip(before[:2], after[:2], strict=True)]
    close = tolerance(*longest, fm, dtype, decay, steps=max(64, 2 * L))
    assert relative_error(out, expected) < close
    for found, wanted in zip(oracle.content(last), sums, strict=True):
        assert relative_error(found, wanted) < close


@each_map
@each_dtype
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(options, dtype, window):
    fm, (q, k, v) = small_map(options), random_inputs(200, lead=(2,), dtype=dtype)
    out = favor_attention(q, k, v, fm, causal=True, window=window)
    expected = oracle.favor_attention(q, k, v, fm, causal=True, window=window)
    assert relative_error(out, expected) < tolerance(q, k, fm, dtype)


def test_a_window_of_one_is_the_value_and_a_long_one_is_none():
    fm, (q, k, v) = small_map(), random_inputs(150)
    alone = favor_attention(q, k, v, fm, causal=True, window=1)
    assert relative_error(alone, v) < 1e-15
    for window in (150, 10**12):
        out = favor_attention(q, k, v, fm, causal=True, window=window)
        assert np.array_equal(out, favor_attention(q, k, v, fm, causal=True))


def test_windows_of_float16_into_an_input():
    fm, (q, k, v) = small_map(), random_inputs(150, 6, 6, dtype=np.float16)
    wide = favor_attention(*(x.astype(np.float32) for x in (q, k, v)), fm, causal=True, window=20)
    assert favor_attention(q, k, v, fm, causal=True, window=20, out=v) is v
    assert np.array_equal(v, wide.astype(np.float16))


@pytest.mark.parametrize(("window", "wave"), [(7, 30), (70, 100)])
def test_windows_of_many_segments(window, wave):
    """More positions than are computed at a time."""
    fm, (q, k, v) = small_map(), random_inputs(300)
    call = functools.partial(
        favor_attention, q, k, v, fm, causal=True, window=window, cu_seqlens=[0, 3, 160, 300]
    )
    whole = call()
    with tuned(WAVE=wave):
        assert np.array_equal(call(), whole)


@pytest.mark.parametrize("window", [5, 64, 70, 140])
def test_tokens_that_follow_change_no_bit_of_a_window(window):
    """Nor whether the segment that a query is in has an end."""
    fm, (q, k, v) = small_map(), random_inputs(300)
    whole = favor_attention(q, k, v, fm, causal=True, window=window)
    for end in (1, 64, 71, 139, 141, 142, 205, 211, 280):
        part = (x[..., :end, :] for x in (q, k, v))
        out = favor_attention(*part, fm, causal=True, window=window)
        assert np.array_equal(out, whole[..., :end, :]), end


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"decay": 0.5}, {"return_state": True}])
def test_no_rows_at_all(options):
    for lead in ((), (2,), (0,)):
        q = k = v = np.zeros((*lead, 0, 6))
        out = favor_attention(q, k, v, small_map(), causal=True, cu_seqlens=[0, 0, 0], **options)
        assert (out[0] if "return_state" in options else out).shape == (*lead, 0, 6)


# -- Packed is apart ------------------------------------------------------------------------------

LENGTHS = [2, 0, 1900, 65, 1, 64, 300, 0]


@each_map
@pytest.mark.parametrize("call", [{}, {"causal": True}, {"causal": True, "decay": 0.9}])
def test_packed_is_each_alone_to_the_bit(options, call):
    fm = FeatureMap.from_projection(draw(130, 6), **options)
    rows = offsets(LENGTHS)
    q, k, v = random_inputs(rows[-1], lead=(2,))
    mask = np.random.default_rng(0).random((2, rows[-1])) < 0.8
    out, state = favor_attention(
        q, k, v, fm, cu_seqlens=rows, key_mask=mask, return_state=True, **call
    )
    for i, (a, b) in enumerate(itertools.pairwise(rows)):
        alone, last = favor_attention(
            *(x[:, a:b] for x in (q, k, v)), fm, key_mask=mask[:, a:b], return_state=True, **call
        )
        assert np.array_equal(out[:, a:b], alone)
        assert np.array_equal(state.S[:, i], last.S)
        assert np.array_equal(state.z[:, i], last.z)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_causal
def test_not_finite_input_stays_in_its_sequence(bad, causal):
    fm, rows = small_map(), offsets([70, 0, 65, 64, 3])
    arrays = random_inputs(rows[-1])
    before = favor_attention(*arrays, fm, causal=causal, cu_seqlens=rows)
    for t in (0, 69, 70, 100, 134, 135, 201):
        start, stop = rows[rows <= t].max(), rows[rows > t].min()
        place = np.arange(rows[-1])
        for which in range(3):
            changed = [x.copy() for x in arrays]
            changed[which][t, 2] = bad
            out = favor_attention(*changed, fm, causal=causal, cu_seqlens=rows)
            hit = (place >= (t if causal else start)) & (place < stop)
            if which == 0:
                hit = place == t
            assert not np.isfinite(out[hit][:, 2]).any(), (t, "qkv"[which])
            assert np.array_equal(out[~hit], before[~hit]), (t, "qkv"[which])


# -- A window forgets -----------------------------------------------------------------------------


@each_map
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("decay", [None, 0.7])
def test_what_is_outside_a_window_changes_no_bit(options, change, decay):
    fm, place = small_map(options), np.arange(150)
    arrays = random_inputs(150)
    for window in (1, 5, 64, 70):
        call = {"causal": True, "window": window, "decay": decay}
        before = favor_attention(*arrays, fm, **call)
        for t in (0, 4, 5, 63, 64, 69, 70, 149):
            changed = [x.copy() for x in arrays]
            for x in changed[1:]:
                x[t] = change(x[t])
            out = favor_attention(*changed, fm, **call)
            blind = (place < t) | (place >= t + window)
            assert np.array_equal(out[blind], before[blind]), (window, t)
            if np.isnan(change(1.0)):
                assert np.isnan(out[~blind]).all()


def test_infinite_values_on_both_sides_of_a_boundary():
    """Infinity minus infinity, and infinity times a weight that underflows, are no warnings."""
    fm, (q, k, v) = small_map(), random_inputs(40)
    v[3], v[4] = np.inf, -np.inf
    out = favor_attention(q, k, v, fm, causal=True, window=4, decay=1e-300)
    assert np.array_equal(np.isfinite(out).all(-1), (np.arange(40) < 3) | (np.arange(40) > 7))


# -- Decay ---------------------------------------------------------------------------------------


@each_map
@each_dtype
@pytest.mark.parametrize("decay", DECAYS)
def test_decay(options, dtype, decay):
    fm, (q, k, v) = small_map(options), random_inputs(200, lead=(2,), dtype=dtype)
    mask = np.random.default_rng(0).random(200) < 0.5  # a masked key counts as time
    out, state = favor_attention(
        q, k, v, fm, causal=True, decay=decay, key_mask=mask, return_state=True
    )
    expected, sums = oracle.favor_attention(
        q, k, v, fm, causal=True, decay=decay, key_mask=mask, return_state=True
    )
    assert relative_error(out, expected) < tolerance(q, k, fm, dtype, decay)
    for found, wanted in zip(oracle.content(state), sums, strict=True):
        for b in range(2):
            assert relative_error(found[b], wanted[b]) < tolerance(q, k, fm, dtype, decay)


@each_map
@each_dtype
@pytest.mark.parametrize("decay", DECAYS)
def test_decay_is_causal_to_the_bit(options, dtype, decay):
    fm, arrays = small_map(options), random_inputs(150, std=2.0, dtype=dtype)
    before = favor_attention(*arrays, fm, causal=True, decay=decay)
    for change in CHANGES.values():
        for t in (0, 1, 17, 63, 64, 65, 128):
            changed = [np.concatenate([x[:t], change(x[t:])]) for x in arrays]
            after = favor_attention(*changed, fm, causal=True, decay=decay)
            assert np.array_equal(after[:t], before[:t]), t


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"cu_seqlens": [0, 100, 150]}])
def test_a_decay_of_one_is_none(options):
    fm, (q, k, v) = small_map(), random_inputs(150, lead=(2,))
    out = favor_attention(q, k, v, fm, causal=True, decay=np.ones(2), **options)
    assert np.array_equal(out, favor_attention(q, k, v, fm, causal=True, **options))


def test_every_head_decays_by_itself():
    fm, (q, k, v) = small_map(), random_inputs(150, lead=(2, 3))
    decay = np.array([1, 0.9, 1e-3])
    out = favor_attention(q, k, v, fm, causal=True, decay=decay)
    for h in range(3):
        alone = favor_attention(*(x[:, h] for x in (q, k, v)), fm, causal=True, decay=decay[h])
        assert np.array_equal(out[:, h], alone)


@each_dtype
@pytest.mark.parametrize("decay", [0.5, 1e-3])
def test_a_long_decay_neither_overflows_nor_fades(decay, dtype):
    """The end of a hundred thousand positions is what the last few make of it."""
    fm, (q, k, v) = small_map(), random_inputs(100_000, dtype=dtype)
    out, state = favor_attention(q, k, v, fm, causal=True, decay=decay, return_state=True)
    assert np.isfinite(out).all()
    tail = oracle.favor_attention(*(x[-200:] for x in (q, k, v)), fm, causal=True, decay=decay)
    # What decay adds to a key is one number, as far from zero as all that has faded.
    rounding = 2 * np.finfo(np.float64).eps * -np.log2(decay) * len(q) ** 0.5
    assert relative_error(out[-50:], tail[-50:]) < tolerance(q, k, fm, dtype, decay) + rounding
    assert np.abs(state.c).max() < 100
    first = np.arange(100_000) == 0  # long after a single key it is still the only one
    lone = favor_attention(q, k, v, fm, causal=True, decay=decay, key_mask=first)
    assert np.abs(lone - v[0]).max() < 1e-5


# -- States: any split is the whole ------------------------------------------------------------------

cuts = st.lists(st.integers(0, 150), max_size=6)
decays = st.sampled_from([None, *DECAYS, np.array([0.9, 1.0])])


@settings(max_examples=40)
@given(cuts=cuts, decay=decays, options=st.sampled_from(list(MAPS.values())))
@example([125], 1e-3, {"kind": "positive"})
def test_prefill_in_chunks(cuts, decay, options):
    fm, (q, k, v) = small_map(options), random_inputs(150, lead=(2,))
    mask = np.random.default_rng(2).random((2, 150)) < 0.8
    whole, last = favor_attention(
        q, k, v, fm, causal=True, key_mask=mask, decay=decay, return_state=True
    )
    state = AttentionState.zeros(fm, 5, 2, decay=decay, dtype=np.float64)
    folded, out = state.copy(), []
    for part in pieces(cuts, 150):
        rows = [x[:, part] for x in (q, k, v)]
        one, state = favor_attention(
            *rows, fm, causal=True, key_mask=mask[:, part], state=state, return_state=True
        )
        out.append(one)
        folded.update(*rows[1:], mask[:, part])
    close = tolerance(q, k, fm, np.float64, decay, steps=150)
    assert relative_error(np.concatenate(out, axis=1), whole) < close
    assert state_error(state, last) < close
    assert state_error(folded, last) < close
    assert relative_error(state.attend(q), last.attend(q)) < close
    assert (state.lengths == 150).all()


@each_map
@each_dtype
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_decay(options, dtype, decay):
    fm, (q, k, v) = small_map(options), random_inputs(90, lead=(2,), dtype=dtype)
    whole, last = favor_attention(q, k, v, fm, causal=True, decay=decay, return_state=True)
    state = AttentionState.zeros(fm, 5, 2, decay=decay, dtype=dtype)
    out = np.stack([state.step(q[:, t], k[:, t], v[:, t]) for t in range(90)], axis=1)
    close = 4 * tolerance(q, k, fm, dtype, decay)
    assert relative_error(out, whole) < close
    assert state_error(state, last) < close
    _, state = favor_attention(
        *(x[:, :60] for x in (q, k, v)), fm, causal=True, decay=decay, return_state=True
    )
    out = np.stack([state.step(q[:, t], k[:, t], v[:, t]) for t in range(60, 90)], axis=1)
    assert relative_error(out, whole[:, 60:]) < close


def test_long_updates_decay():
    """Segments that are folded apart have their place in time."""
    fm, (q, k, v) = small_map(), random_inputs(20_000)
    _, last = favor_attention(q, k, v, fm, causal=True, decay=0.9999, return_state=True)
    state = AttentionState.zeros(fm, 5, decay=0.9999, dtype=np.float64).update(k, v)
    assert state_error(state, last) < 1e-12


def test_the_decay_of_a_state_is_its_own():
    """Whoever asks for it may give it back, and a state made by attention meets others."""
    fm, (q, k, v) = small_map(), random_inputs(3)
    for decay in (0.354, 0.392, 0.403, 0.416, 0.421):  # log2(2**log2(x)) is rounded differently
        _, state = favor_attention(q, k, v, fm, causal=True, decay=decay, return_state=True)
        assert np.isclose(state.decay, decay, rtol=1e-15)
        favor_attention(q, k, v, fm, causal=True, state=state, decay=state.decay)
        state.merge(AttentionState.zeros(fm, 5, decay=decay, dtype=np.float64))


@settings(max_examples=40)
@given(cuts=cuts, decay=decays, data=st.data())
def test_merge_keeps_order(cuts, decay, data):
    """Neighbours merged in any order, each one's tokens after those on its left."""
    fm, (q, k, v) = small_map(), random_inputs(150, lead=(2,))
    start = AttentionState.zeros(fm, 5, 2, decay=decay, dtype=np.float64)
    whole = start.copy().update(k, v)
    parts = [start.copy().update(k[:, part], v[:, part]) for part in pieces(cuts, 150)]
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at].merge(parts.pop(at + 1))
    close = tolerance(q, k, fm, np.float64, decay, steps=150)
    assert state_error(parts[0], whole) < close
    assert relative_error(parts[0].attend(q), whole.attend(q)) < close
    assert np.array_equal(parts[0].lengths, whole.lengths)
    steps = [s.step(q[:, 0], k[:, 0], v[:, 0]) for s in (parts[0], whole)]
    assert relative_error(*steps) < close


def test_a_prefix_is_continued_twice():
    fm, (q, k, v) = small_map(), random_inputs(150, lead=(2,))
    prefix = AttentionState.zeros(fm, 5, 2, decay=0.9, dtype=np.float64).update(k, v)
    for scale in (1, 3):
        out = prefix.copy().step(q[:, 0], scale * k[:, 0], v[:, 0])
        both = [np.concatenate([x, y], 1) for x, y in ((k, scale * k[:, :1]), (v, v[:, :1]))]
        whole = favor_attention(np.concatenate([q, q[:, :1]], 1), *both, fm, causal=True, decay=0.9)
        assert relative_error(out, whole[:, -1]) < 1e-13


def through_a_file(state, folder):
    state.save(folder / "state")
    return AttentionState.load(folder / "state")


WAYS = {
    "file": through_a_file,
    "pickle": lambda state, _: pickle.loads(pickle.dumps(state)),
    "copy": lambda state, _: copy.deepcopy(state),
}


@each_dtype
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", ["positive", "relu"])
def test_a_state_continues_with_the_same_bits(kind, way, dtype, tmp_path):
    fm = FeatureMap.from_projection(draw(17, 6), kind)
    q, k, v = random_inputs(150, lead=(2,), dtype=dtype)
    decay, rows = [0.97, 1e-3], [0, 0, 100, 150]
    _, state = favor_attention(
        q, k, v, fm, causal=True, cu_seqlens=rows, decay=decay, return_state=True
    )
    twin = way(state, tmp_path)
    assert (twin.sequences, twin.batch_shape) == (3, (2,))
    assert np.array_equal(twin.decay, state.decay)
    assert np.array_equal(twin.lengths, state.lengths)
    for _ in range(3):
        results = []
        for s in (state, twin):
            out = s.step(*(x[:, :3] for x in (q, k, v)))
            s.update(k, v, cu_seqlens=rows).merge(s.copy())
            results.append((out, s.attend(q, cu_seqlens=rows), *oracle.content(s)))
        for mine, its in zip(*results, strict=True):
            assert np.array_equal(mine, its)


@each_map
@pytest.mark.parametrize("decay", [None, 0.9])
def test_packed_states_are_states(options, decay):
    fm, rows = small_map(options), offsets([70, 0, 3, 130])
    q, k, v = random_inputs(rows[-1], lead=(2,))
    mask = np.random.default_rng(0).random(rows[-1]) < 0.7
    packed = AttentionState.zeros(fm, 5, 2, sequences=4, decay=decay, dtype=np.float64)
    apart = [AttentionState.zeros(fm, 5, 2, decay=decay, dtype=np.float64) for _ in range(4)]
    assert packed.S.shape == (2, 4, fm.num_features, 5)
    parts = [slice(a, b) for a, b in itertools.pairwise(rows)]
    close = 1e-13

    packed.update(k, v, mask, cu_seqlens=rows)
    for state, part in zip(apart, parts, strict=True):
        state.update(k[:, part], v[:, part], mask[part])
    out = packed.attend(q, cu_seqlens=rows)
    for state, part in zip(apart, parts, strict=True):
        assert np.array_equal(out[:, part], state.attend(q[:, part]))

    out = packed.step(q[:, :4], k[:, :4], v[:, :4])
    for i, state in enumerate(apart):
        assert relative_error(out[:, i], state.step(q[:, i], k[:, i], v[:, i])) < close

    out, packed = favor_attention(
        q, k, v, fm, causal=True, cu_seqlens=rows, state=packed, return_state=True
    )
    for i, part in enumerate(parts):
        one, apart[i] = favor_attention(
            *(x[:, part] for x in (q, k, v)), fm, causal=True, state=apart[i], return_state=True
        )
        assert relative_error(out[:, part], one) < close

    packed.merge(packed.copy())
    for i, state in enumerate(apart):
        state.merge(state.copy())
        for mine, its in zip(oracle.content(packed), oracle.content(state), strict=True):
            assert relative_error(mine[:, i], its) < close
        assert (packed.lengths[:, i] == state.lengths).all()


# -- Threads ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([5, 4500, 0, 1000], {"causal": True}),
        ([5, 4500, 0, 1000], {"causal": True, "decay": 0.999}),
        ([5, 4500, 0, 1000], {"causal": True, "decay": 0.1}),  # chunks are split
        ([6000], {"causal": True, "window": 4000}),
        ([3000, 9000, 1, 20_000], {}),
        ([2000] * 3, {"causal": True}),
    ],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_same_bits_for_any_number_of_threads(heads, lengths, options, dtype):
    fm = FeatureMap.from_projection(draw(80, 8), antithetic=True)
    rows = offsets(lengths)
    q, k, v = random_inputs(rows[-1], 8, 8, lead=(heads,), dtype=dtype)

    def call(threads):
        call = options | {"cu_seqlens": rows, "num_threads": threads}
        if "window" in options:
            return [favor_attention(q, k, v, fm, **call)]
        out, state = favor_attention(q, k, v, fm, return_state=True, **call)
        return [out, state.c, state.S, state.z]

    one = call(1)
    assert np.isfinite(one[0]).all()
    for number in (2, 3, 8):
        for mine, its in zip(call(number), one, strict=True):
            np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("precision", ["full", "bfloat16"])
@pytest.mark.parametrize("heads", [1, 2])
def test_same_bits_of_heads_that_share_keys(heads, precision):
    fm = FeatureMap.from_projection(draw(80, 40), antithetic=True)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3 * heads, 1500, 40)).astype(np.float32)
    k, v = rng.standard_normal((2, heads, 1500, 40)).astype(np.float32)
    options = {"causal": True, "enable_gqa": True, "key_mask": rng.random(1500) < 0.9}
    one = favor_attention(q, k, v, fm, precision=precision, num_threads=1, **options)
    for number in (2, 3, 5):
        more = favor_attention(q, k, v, fm, precision=precision, num_threads=number, **options)
        np.testing.assert_array_equal(more, one)


def test_same_error_bars_for_any_number_of_threads():
    fm = FeatureMap.from_projection(draw(80, 8))
    q, k, v = random_inputs(3000, 8, 8, lead=(1,))
    found = []
    for number in (1, 2, 3):
        with favor_np.thread_limit(number):
            found.append(favor_np.diagnose(q, k, v, fm, causal=True))
    for more in found[1:]:
        np.testing.assert_array_equal(more.standard_error, found[0].standard_error)
        np.testing.assert_array_equal(more.output, found[0].output)


def test_long_sequences_next_to_short_ones():
    """The way of parts that fold ahead, and that of segments, agree with the oracle."""
    fm = FeatureMap.from_projection(draw(80, 4))
    rows = offsets([3, 3000, 3])
    q, k, v = random_inputs(rows[-1], 4, 3)
    for options in ({}, {"decay": 0.999}):
        out = favor_attention(q, k, v, fm, causal=True, cu_seqlens=rows, num_threads=2, **options)
        weights = np.tril(fm.query_features(q[3:3003]) @ fm.key_features(k[3:3003]).T)
        age = np.subtract.outer(np.arange(3000), np.arange(3000))
        weights *= options.get("decay", 1.0) ** np.maximum(age, 0)
        expected = weights @ v[3:3003] / weights.sum(-1, keepdims=True)
        assert relative_error(out[3:3003], expected) < 1e-12
    rows = offsets([3, 9000, 3])
    q, k, v = random_inputs(rows[-1], 4, 3)
    out = favor_attention(q, k, v, fm, cu_seqlens=rows, num_threads=2)
    phi = fm.key_features(k[3:9003])
    expected = fm.query_features(q[3:9003]) @ (phi.T @ np.c_[v[3:9003], np.ones(9000)])
    assert relative_error(out[3:9003], expected[:, :3] / expected[:, 3:]) < 1e-12


# -- WindowState -------------------------------------------------------------------------------------


def steps(state, q, k, v, times):
    return np.stack([state.step(q[:, t], k[:, t], v[:, t]) for t in times], axis=1)


@each_map
@each_dtype
@pytest.mark.parametrize("window", WINDOWS)
def test_window_state_steps(options, dtype, window):
    fm, (q, k, v) = small_map(options), random_inputs(200, lead=(2,), dtype=dtype)
    whole = favor_attention(q, k, v, fm, causal=True, window=window)
    out = steps(WindowState(fm, 5, window, 2, dtype=dtype), q, k, v, range(200))
    assert out.dtype == dtype
    assert relative_error(out, whole) < 4 * tolerance(q, k, fm, dtype)


@settings(max_examples=60)
@given(
    window=st.integers(1, 40) | st.sampled_from(WINDOWS),
    cuts=cuts,
    decay=decays,
    stepped=st.booleans(),
    masked=st.booleans(),
    options=st.sampled_from(list(MAPS.values())),
)
def test_window_state_in_pieces(window, cuts, decay, stepped, masked, options):
    """After every update, and steps in between, the rows are those of the whole sequence."""
    fm, (q, k, v) = small_map(options), random_inputs(150, lead=(2,))
    mask = np.random.default_rng(1).random((2, 150)) < (0.5 if masked else 2)
    whole = favor_attention(q, k, v, fm, causal=True, window=window, decay=decay, key_mask=mask)
    state = WindowState(fm, 5, window, (2,), decay=decay, dtype=np.float64)
    close = tolerance(q, k, fm, np.float64, decay)
    for part in pieces(cuts, 150):
        last = min(part.stop, part.start + 5)
        if stepped and mask[:, part.start : last].all():
            out = [state.step(q[:, t], k[:, t], v[:, t]) for t in range(part.start, last)]
            for t, row in zip(range(part.start, last), out, strict=True):
                assert relative_error(row, whole[:, t]) < close
            part = slice(last, part.stop)
        state.update(k[:, part], v[:, part], mask[:, part])
        assert state.length == part.stop
        if part.stop:
            row = part.stop - 1
            out = state.attend(q[:, [row]])
            assert relative_error(out, whole[:, [row]]) < close


def test_window_state_reads_many_queries_of_heads():
    fm = FeatureMap.from_projection(draw(2, 9, 6))
    q, (k, v) = draw(3, 2, 9000, 6), draw(2, 2, 30, 6)
    state = WindowState(fm, 6, 20, 2, dtype=np.float64).update(k, v)
    expected = favor_attention(q, k[:, 10:], v[:, 10:], fm)
    assert relative_error(state.attend(q), expected) < 1e-13
    one = state.copy().step(q[0, :, :1], k[:, :1], v[:, :1])
    assert np.array_equal(one[:, 0], state.copy().step(q[0, :, 0], k[:, 0], v[:, 0]))


def test_not_finite_tokens_leave_the_window():
    fm, (q, k, v) = small_map(), random_inputs(120, lead=(2,))
    k[:, 30], v[:, 31] = np.nan, np.inf
    for window in (1, 8, 25):
        out = steps(WindowState(fm, 5, window, 2, dtype=np.float64), q, k, v, range(120))
        hit = ~np.isfinite(out).any((0, -1))
        assert np.array_equal(hit, (np.arange(120) >= 30) & (np.arange(120) < 31 + window))


def test_an_empty_window_state():
    fm = small_map()
    state = WindowState(fm, 3, 4, 2)
    assert np.array_equal(state.attend(draw(2, 3, 6)), np.zeros((2, 3, 3)))
    assert state.update(np.zeros((2, 0, 6)), np.zeros((2, 0, 3))).length == 0
    none = WindowState(fm, 3, 4, (0,))
    assert none.step(*np.zeros((2, 0, 6)), np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("way", ["pickle", "copy"])
def test_window_states_are_continued_twice(way):
    fm, (q, k, v) = small_map(), random_inputs(150, lead=(2,))
    state = WindowState(fm, 5, 40, 2, decay=0.9, dtype=np.float64)
    steps(state, q, k, v, range(70))
    twin, other = WAYS[way](state, None), state.copy()
    steps(other, q, 3 * k, v, range(70, 90))
    out = steps(state, q, k, v, range(70, 150))
    assert np.array_equal(steps(twin, q, k, v, range(70, 150)), out)
    whole = favor_attention(q, k, v, fm, causal=True, window=40, decay=0.9)
    assert relative_error(out, whole[:, 70:]) < 1e-13


# -- Refused ----------------------------------------------------------------------------------------

FM, TRIG = small_map(), feature_map("trig", 4, 8)
Q, K, V = random_inputs(8, lead=(2,))


def favor(**options):
    return favor_attention(Q, K, V, FM, **options)


def packed_state(**options):
    return AttentionState.zeros(FM, 5, 2, sequences=2, dtype=np.float64, **options)


def plain_state(**options):
    return AttentionState.zeros(FM, 5, 2, dtype=np.float64, **options)


REFUSED = [
    ("favor(cu_seqlens=[0.0, 8.0])", TypeError, "cu_seqlens must hold integers, got"),
    ("favor(cu_seqlens=[False, True])", TypeError, "cu_seqlens must hold integers, got"),
    ("favor(cu_seqlens=[[0, 8]])", ValueError, r"cu_seqlens must have shape .*got shape \(1, 2\)"),
    ("favor(cu_seqlens=[0])", ValueError, r"cu_seqlens must have shape .*got shape \(1,\)"),
    ("favor(cu_seqlens=8)", ValueError, r"cu_seqlens must have shape .*got shape \(\)"),
    ("favor(cu_seqlens=[0, 5, 4, 8])", ValueError, r"must rise from 0 to the 8 rows.*\[0, 5, 4, 8"),
    ("favor(cu_seqlens=[0, 7])", ValueError, "cu_seqlens must rise from 0 to the 8 rows"),
    ("favor(cu_seqlens=[1, 8])", ValueError, "cu_seqlens must rise from 0 to the 8 rows"),
    (
        "favor_attention(Q[:, :5], K, V, FM, cu_seqlens=[0, 8])",
        ValueError,
        "cu_seqlens needs as many queries as keys, got 5 rows of q and 8 of k",
    ),
    *(
        (f"favor(causal=True, decay={bad})", ValueError, "decay must be greater than 0 and at most")
        for bad in ("0", "-0.5", "1.001", "np.nan", "np.inf", "[0.5, 2]")
    ),
    ("favor(decay=0.5)", ValueError, "decay needs causal=True"),
    ("favor(causal=True, decay='0.5')", TypeError, "decay must be a real number .*got '0.5'"),
    ("favor(causal=True, decay=True)", TypeError, "decay must be a real number"),
    ("favor(causal=True, decay=0.5j)", TypeError, "decay must be a real number"),
    ("favor(causal=True, decay=[0.5] * 3)", ValueError, r"decay must broadcast .*\(2,\).*\(3,\)"),
    ("favor(causal=True, window=0)", ValueError, "window must be at least 1, got 0"),
    ("favor(causal=True, window=2.0)", TypeError, "window must be an integer, got 2.0"),
    ("favor(window=2)", ValueError, "window needs causal=True"),
    ("favor(causal=True, window=2, return_state=True)", ValueError, "window .*state.*WindowState"),
    ("WindowState(None, 5, 4)", TypeError, "feature_map must be a FeatureMap, got None"),
    ("WindowState(TRIG, 5, 4)", ValueError, "trig"),
    ("WindowState(FM, 0, 4)", ValueError, "value_dim must be at least 1, got 0"),
    ("WindowState(FM, 5, 0)", ValueError, "window must be at least 1, got 0"),
    ("WindowState(FM, 5, 4.0)", TypeError, "window must be an integer, got 4.0"),
    ("WindowState(FM, 5, 4, (-1,))", ValueError, "batch_shape must be at least 0"),
    ("WindowState(FM, 5, 4, decay=2)", ValueError, "decay must be greater than 0 and at most 1"),
    ("WindowState(FM, 5, 4, dtype=int)", TypeError, "dtype must be float32 or float64"),
    # states: what follows loads the kernels
    ("AttentionState.zeros(FM, 5, sequences=0)", ValueError, "sequences must be at least 1, got 0"),
    ("AttentionState.zeros(FM, 5, decay=0)", ValueError, "decay must be greater than 0"),
    ("AttentionState.zeros(FM, 5, 2, decay=[0.5] * 3)", ValueError, "decay must broadcast"),
    ("favor(causal=True, window=2, state=plain_state())", ValueError, "window .*state"),
    ("favor(state=packed_state())", ValueError, "cu_seqlens .*sequences=2, got None"),
    ("favor(cu_seqlens=[0, 8], state=plain_state())", ValueError, "sequences=None, got 1"),
    ("favor(cu_seqlens=[0, 8], state=packed_state())", ValueError, "sequences=2, got 1"),
    ("favor(causal=True, decay=0.5, state=plain_state())", ValueError, "decay .*None, got 0.5"),
    ("favor(causal=True, decay=0.5, state=plain_state(decay=0.6))", ValueError, "decay .*0.6.*0.5"),
    ("favor(state=plain_state(decay=0.6))", ValueError, "decay needs causal=True"),
    ("plain_state().update(K, V, cu_seqlens=[0, 8])", ValueError, "sequences=None, got 1"),
    ("packed_state().update(K, V)", ValueError, "sequences=2, got None"),
    ("packed_state().attend(Q, cu_seqlens=[0, 4, 7])", ValueError, "rise from 0 to the 8 rows"),
    ("packed_state().step(Q, K, V)", ValueError, r"one token of each of the 2 seq.*\(2, 8, 6\)"),
    ("plain_state().merge(packed_state())", ValueError, "other must have .*sequences"),
    ("plain_state().merge(plain_state(decay=0.6))", ValueError, "other must have decay None"),
    ("WindowState(FM, 5, 4, 2).step(Q, K, V)", ValueError, r"q must be one token, .*\(2, 8, 6\)"),
    ("WindowState(FM, 5, 4, 2).update(K, V[:, :5])", ValueError, "v must have one row for each"),
    ("WindowState(FM, 4, 4, 2).update(K, V)", ValueError, "v must have shape"),
    ("WindowState(FM, 5, 4, 3).update(K, V)", ValueError, "broadcast"),
    ("WindowState(FM, 5, 4, 2).attend(Q + 1j)", TypeError, "q must hold real numbers"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        eval(call)
    assert caught.type is error


def test_refused_calls_compile_nothing():
    python(
        child.names_of(__file__)
        + """
from favor_np.cpu.code import every_kernel

for call, error, _ in REFUSED:
    try:
        eval(call)
    except error:
        pass
    assert not [kernel for kernel in every_kernel() if kernel.origin], call
"""
    )


def test_a_refused_token_changes_nothing():
    state = WindowState(FM, 5, 4, 2, dtype=np.float64).update(K, V)
    before = state.attend(Q)
    for wrong in ((Q[:, 0, :5], K[:, 0], V[:, 0]), (Q[:, 0], K[:, 0], V[:, 0, :4])):
        with pytest.raises(ValueError, match="must have shape"):
            state.step(*wrong)
    assert state.length == 8
    assert np.array_equal(state.attend(Q), before)


def test_too_much_decay_for_one_call():
    """Exponents have 32 bits; nothing of 2**28 rows is allocated here."""
    x = np.broadcast_to(np.float32(1), (2**28, 1))
    fm = feature_map("positive", 1, 2)
    with pytest.raises(ValueError, match=r"decay must be larger for 268435456 positions"):
        favor_attention(x, x, x, fm, causal=True, decay=1e-2)
    state = AttentionState.zeros(fm, 1, decay=1e-2)
    with pytest.raises(ValueError, match="decay must be larger"):
        state.update(x, x)
