"""AttentionState: fold, merge, read."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.child import python
from support.inputs import draw, random_inputs
from support.parameters import each_dtype, each_map
from support.tolerance import relative_error, state_error

from favor_np import AttentionState, FeatureMap, favor_attention, feature_map

L = 150


def folded(fm, k, v, mask=None):
    state = AttentionState.zeros(fm, value_dim=v.shape[-1], batch_shape=k.shape[:-2], dtype=k.dtype)
    state.update(k, v, key_mask=mask)
    return state


@each_map
@each_dtype
def test_fold_and_read(options, dtype):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(L, lead=(2,), dtype=dtype)
    mask = np.random.default_rng(0).random((2, L)) < 0.7
    state = folded(fm, k, v, mask)
    assert state.c.shape == state.z.shape == (2, fm.num_features)
    assert state.S.shape == (2, fm.num_features, 5)
    assert np.issubdtype(state.c.dtype, np.integer)
    assert state.S.dtype == state.z.dtype == dtype
    out, (S, z) = oracle.favor_attention(q, k, v, fm, key_mask=mask, return_state=True)
    limit = 100 * np.finfo(dtype).eps
    for found, expected in zip(oracle.content(state), (S, z), strict=True):
        for b in range(2):
            assert relative_error(found[b], expected[b]) < limit
    assert relative_error(state.attend(q), out) < limit
    assert state.attend(q).dtype == dtype


@each_map
@pytest.mark.parametrize("cuts", [[], [1], [64], [63, 65], [10, 20, 100], [0, 150], range(1, 150)])
def test_update_in_pieces(options, cuts):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    _, k, v = random_inputs(L, lead=(2,))
    whole, state = folded(fm, k, v), folded(fm, k[:, :0], v[:, :0])
    for start, stop in zip([0, *cuts], [*cuts, L], strict=True):
        state.update(k[:, start:stop], v[:, start:stop])
    assert state_error(state, whole) < 1e-14


@each_map
@each_dtype
def test_steps_are_causal_attention(options, dtype):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(90, lead=(2,), dtype=dtype)
    whole, last = favor_attention(q, k, v, fm, causal=True, return_state=True)
    state = folded(fm, k[:, :0], v[:, :0])
    outputs = [state.step(q[:, t], k[:, t], v[:, t]) for t in range(90)]
    limit = 100 * np.finfo(dtype).eps
    assert outputs[0].dtype == dtype
    assert relative_error(np.stack(outputs, axis=1), whole) < limit
    assert state_error(state, last) < limit


def test_steps_take_lists():
    fm = FeatureMap.from_projection(draw(17, 6))
    q, k, v = random_inputs(3)
    steps, lists = folded(fm, k[:0], v[:0]), folded(fm, k[:0], v[:0])
    for token in zip(q, k, v, strict=True):
        expected = steps.step(*token)
        np.testing.assert_array_equal(lists.step(*(row.tolist() for row in token)), expected)


def assert_holds(state, index, k, v):
    """What the state holds there is what these tokens are folded to."""
    alone = folded(state.feature_map, k, v)
    limit = 20 * np.finfo(k.dtype).eps
    for found, expected in zip(oracle.content(state), oracle.content(alone), strict=True):
        assert np.allclose(found[index], expected, rtol=limit, atol=0)


# Whole calls of one token do without chunks, unless it is masked or several query heads share it.


def one_token(dtype, **options):
    """A call of one token for each of six heads: its result and state, and what went in."""
    fm = FeatureMap.from_projection(draw(17, 6))
    kv_lead = (2,) if "enable_gqa" in options else (6,)
    q, k, v = random_inputs(1, lead=(6,), kv_lead=kv_lead, dtype=dtype)
    out, state = favor_attention(q, k, v, fm, causal=True, return_state=True, **options)
    assert out.dtype == dtype
    assert np.array_equal(state.lengths, np.ones(kv_lead))
    return out, state, k, v


@each_dtype
def test_a_call_of_one_token_gives_its_value(dtype):
    out, state, k, v = one_token(dtype)
    assert np.allclose(out, v, rtol=20 * np.finfo(dtype).eps, atol=0)
    for head in range(6):
        assert_holds(state, head, k[head], v[head])


@each_dtype
def test_a_call_of_one_masked_token_gives_zero(dtype):
    mask = np.arange(6)[:, None] % 2 == 0
    out, _, _, v = one_token(dtype, key_mask=mask)
    assert np.allclose(out, v * mask[..., None], rtol=20 * np.finfo(dtype).eps, atol=0)


@each_dtype
def test_a_call_of_one_token_that_query_heads_share(dtype):
    out, state, k, v = one_token(dtype, enable_gqa=True)
    assert np.allclose(out, np.repeat(v, 3, axis=0), rtol=20 * np.finfo(dtype).eps, atol=0)
    for head in range(2):
        assert_holds(state, head, k[head], v[head])


@each_dtype
def test_packed_sequences_of_one_token_and_of_none(dtype):
    fm = FeatureMap.from_projection(draw(17, 6))
    q, k, v = random_inputs(6, lead=(1,), dtype=dtype)
    ends = [0, 1, 2, 2, 3, 4, 5, 6]
    out, state = favor_attention(q, k, v, fm, causal=True, cu_seqlens=ends, return_state=True)
    assert out.dtype == dtype
    assert np.allclose(out, v, rtol=20 * np.finfo(dtype).eps, atol=0)
    assert np.array_equal(state.lengths, [[1, 1, 0, 1, 1, 1, 1]])
    for n, (start, stop) in enumerate(itertools.pairwise(ends)):
        assert_holds(state, (0, n), k[0, start:stop], v[0, start:stop])


def test_who_only_steps_compiles_no_chunks():
    python(
        """
        import numpy as np
        from favor_np import AttentionState, feature_map
        from favor_np.cpu.code import every_kernel

        state = AttentionState.zeros(feature_map("positive", 4, 16), 4, sequences=3)
        for _ in range(2):
            state.step(*np.ones((3, 3, 4), np.float32))
        AttentionState.zeros(state.feature_map, 4).step(*np.ones((3, 4), np.float32))
        used = {kernel.name for kernel in every_kernel() if kernel.origin}
        assert used == {"attend_tokens", "holds_large"}, used  # the second looks for overflows
        """
    )


@each_map
@each_dtype
@pytest.mark.parametrize("path", ["rise", "fall", "zigzag"])
def test_steps_with_keys_far_apart(options, dtype, path):
    """Keys that outweigh each other by hundreds of nats, then one that is not finite."""
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(40, lead=(2,), dtype=dtype)
    size = {"rise": np.arange(40), "fall": np.arange(40)[::-1], "zigzag": np.arange(40) % 3 * 20}
    k *= (1 + size[path][:, None]).astype(dtype)
    expected = oracle.favor_attention(q, k, v, fm, causal=True)
    k[1, 30] = np.nan
    state = folded(fm, k[:, :0], v[:, :0])
    out = np.stack([state.step(q[:, t], k[:, t], v[:, t]) for t in range(40)], axis=1)
    # Log-features of a thousand are rounded to a thousand eps.
    limit = 2e4 * np.finfo(dtype).eps
    assert relative_error(out[:, :30], expected[:, :30]) < limit
    assert relative_error(out[0], expected[0]) < limit
    assert np.isnan(out[1, 30:]).all()


@each_map
def test_merge(options):
    """Associative and commutative, with the empty state as its neutral element."""
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    _, k, v = random_inputs(L, lead=(2,))
    k[:, 50:] *= 3  # the parts have different exponents c
    cuts = [slice(0, 20), slice(20, 100), slice(100, 100), slice(100, L)]
    whole = folded(fm, k, v)

    def parts(order):
        return [folded(fm, k[:, cuts[i]], v[:, cuts[i]]) for i in order]

    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        first, *rest = parts(order)
        for part in rest:
            first.merge(part)
        assert state_error(first, whole) < 1e-14
    a, b, c, d = parts(range(4))
    c.merge(d)
    b.merge(c)
    a.merge(b)
    assert state_error(a, whole) < 1e-14
    ab, ba = parts((0, 1)), parts((1, 0))
    ab[0].merge(ab[1])
    ba[0].merge(ba[1])
    assert state_error(ab[0], ba[0]) < 1e-15
    before = oracle.content(ab[1])
    for x, y in zip(before, oracle.content(parts((1,))[0]), strict=True):
        assert np.array_equal(x, y)  # the argument is left alone


@each_dtype
@pytest.mark.parametrize("far", [300, 3000])
def test_merge_of_parts_far_apart(far, dtype):
    """One part outweighs the other by e**far: nothing overflows, nothing becomes NaN."""
    W = np.array([[4.0, 0], [3, 1], [-1, 2]])
    fm = FeatureMap.from_projection(W, scale=1.0)
    q, k, v = random_inputs(20, 2, 3, std=0.1, dtype=dtype)
    low = k - dtype(np.sqrt(2 * far)) * np.array([1, 0], dtype)
    for first, second in ((k, low), (low, k)):
        state = folded(fm, first, v)
        state.merge(folded(fm, second, v))
        both = np.concatenate([first, second]), np.concatenate([v, v])
        expected = oracle.favor_attention(q, *both, fm)
        assert relative_error(state.attend(q), expected) < 1e4 * np.finfo(dtype).eps


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize(
    ("batch", "sequences", "shape"),
    [
        ((), None, ()),
        (3, None, (3,)),
        ((2, 3), 4, (2, 3, 4)),
        ((), 1, (1,)),
        ((0, 2), None, (0, 2)),
    ],
)
def test_lengths_have_the_shape_of_the_batch(batch, sequences, shape, decay):
    fm = FeatureMap.from_projection(draw(17, 6))
    state = AttentionState.zeros(fm, 5, batch, sequences=sequences, decay=decay, dtype=np.float64)
    assert np.array_equal(state.lengths, np.zeros(shape, np.int64))
    ends = None if sequences is None else [0, *range(3, 3 + sequences)]
    _, k, v = random_inputs(2 + (sequences or 5), lead=state.batch_shape)
    state.update(k, v, cu_seqlens=ends)
    expected = np.full(shape, 7 if sequences is None else 1)
    if sequences is not None:
        expected[..., 0] = 3
    assert np.array_equal(state.lengths, expected)
    state.lengths[...] = 0  # a copy
    for twin in (state.copy(), pickle.loads(pickle.dumps(state)), state.merge(state)):
        assert twin.lengths.shape == shape
    assert np.array_equal(state.lengths, 2 * expected)


def test_states_pickled_before_lengths_had_a_shape_load():
    fm = FeatureMap.from_projection(draw(17, 6))
    _, k, v = random_inputs(7, lead=(2, 3))
    state = AttentionState.zeros(fm, 5, (2, 3), dtype=np.float64).update(k, v)
    restore, (*args, lengths, _, _) = state.__reduce__()
    old, shaped = restore(*args, lengths.ravel()), restore(*args, state.lengths)
    for twin in (old, shaped):
        assert np.array_equal(twin.lengths, np.full((2, 3), 7))
        assert np.array_equal(twin.step(k[..., 0, :], k[..., 0, :], v[..., 0, :]),
                              state.copy().step(k[..., 0, :], k[..., 0, :], v[..., 0, :]))  # fmt: skip


def test_copy_is_independent():
    fm = FeatureMap.from_projection(draw(17, 6))
    q, k, v = random_inputs(L)
    state = folded(fm, k, v)
    twin = state.copy()
    out = state.attend(q)
    assert np.array_equal(twin.attend(q), out)
    twin.update(3 * k, v)
    twin.step(q[0], k[0], v[0])
    assert np.array_equal(state.attend(q), out)
    assert not np.array_equal(twin.attend(q), out)


def test_attention_does_not_change_the_state_it_starts_from():
    fm = FeatureMap.from_projection(draw(17, 6))
    q, k, v = random_inputs(L)
    state = folded(fm, k, v)
    before = oracle.content(state)
    _, after = favor_attention(q, 3 * k, v, fm, causal=True, state=state, return_state=True)
    for x, y in zip(before, oracle.content(state), strict=True):
        assert np.array_equal(x, y)
    assert state_error(after, state) > 0.01


def test_an_empty_state_reads_zeros():
    fm = FeatureMap.from_projection(draw(17, 6))
    state = AttentionState.zeros(fm, value_dim=3, batch_shape=(2,))
    assert np.array_equal(state.attend(draw(2, 4, 6)), np.zeros((2, 4, 3)))
    for S_or_z in oracle.content(state):
        assert not S_or_z.any()


@each_map
def test_masked_and_not_finite_tokens(options):
    fm = FeatureMap.from_projection(draw(17, 6), **options)
    q, k, v = random_inputs(90)
    mask = np.random.default_rng(1).random(90) < 0.5
    expected = folded(fm, k, v, mask).attend(q)
    k[~mask] = v[~mask] = np.nan
    assert np.array_equal(folded(fm, k, v, mask).attend(q), expected)
    state = folded(fm, k[mask], v[mask])
    state.update(np.full((1, 6), np.nan), np.ones((1, 5)))
    assert np.isnan(state.attend(q)).all()


def test_a_state_lives_for_a_million_tokens():
    """Neither the mean nor the exponents drift: all values equal, so every output is it too."""
    fm = FeatureMap.from_projection(draw(8, 2).astype(np.float32))
    state = AttentionState.zeros(fm, value_dim=1, batch_shape=())
    k = draw(50_000, 2, dtype=np.float32)
    v = np.full((50_000, 1), 3, np.float32)
    for _ in range(20):
        state.update(k, v)
    assert relative_error(state.attend(k[:9]), np.full((9, 1), 3.0)) < 1e-5


@each_map
def test_grouped_heads_and_heads_of_their_own(options):
    W = draw(2, 9, 6)
    fm = FeatureMap.from_projection(W, **options)
    _, k, v = random_inputs(40, lead=(3, 2))
    q = draw(3, 6, 40, 6, seed=4)
    state = folded(fm, k, v)
    whole = favor_attention(q, k, v, fm, enable_gqa=True)
    expected = oracle.favor_attention(q, k, v, fm, enable_gqa=True)
    assert relative_error(whole, expected) < 1e-14
    mine = state.attend(q[:, ::3])
    assert relative_error(mine, expected[:, ::3]) < 1e-14


@pytest.mark.parametrize("decay", [0.9, 0.999999, 1e-300])
def test_a_decay_is_that_of_a_state_within_rounding_only(decay):
    """A state tells its decay; what differs from that by more than rounding is another decay."""
    fm, (q, k, v) = FeatureMap.from_projection(draw(17, 6)), random_inputs(20)
    state = AttentionState.zeros(fm, 5, decay=decay, dtype=np.float64).update(k, v)
    other = AttentionState.zeros(fm, 5, decay=float(state.decay), dtype=np.float64)
    state.copy().merge(other)
    favor_attention(q, k, v, fm, causal=True, state=state, decay=state.decay)
    rate = -np.log2(decay)
    for off in (1e-12, -1e-12):
        near = 2.0 ** -(rate * (1 + off) + off)
        if near == decay:
            continue
        near_state = AttentionState.zeros(fm, 5, decay=near, dtype=np.float64)
        with pytest.raises(ValueError, match="other must have decay"):
            state.merge(near_state)
        with pytest.raises(ValueError, match="decay must be that of the state"):
            favor_attention(q, k, v, fm, causal=True, state=state, decay=near)


def test_the_constructor_makes_the_state_of_no_keys():
    fm = feature_map("positive", 4, 8)
    state = AttentionState(fm, value_dim=3, batch_shape=(2, 5), dtype=np.float64)
    zeros = AttentionState.zeros(fm, 3, (2, 5), dtype=np.float64)
    assert (state.batch_shape, state.value_dim, state.dtype) == ((2, 5), 3, np.dtype(np.float64))
    assert not state.attend(np.ones((2, 5, 1, 4))).any()
    assert np.array_equal(state.c, zeros.c)
    assert state.lengths.shape == (2, 5)


def test_nbytes_is_what_the_arrays_take():
    fm = feature_map("positive", 4, 8)
    small, large = (AttentionState(fm, 16, heads) for heads in (1, 10))
    assert 10 * small.nbytes == large.nbytes
    assert small.nbytes >= small.c.nbytes + small.S.nbytes + small.z.nbytes


@settings(max_examples=25)
@given(st.data())
def test_merges_over_random_trees(data):
    """Parts of any size, merged pair by pair in any order and grouping, are the whole."""
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    k, v, q = (rng.standard_normal((2, 150, n)) for n in (6, 4, 6))
    k[:, rng.integers(150)] *= 5  # the parts have different exponents
    fm = feature_map("positive", 6, 24)
    cuts = sorted(data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=8)))
    states = [
        AttentionState.zeros(fm, 4, 2, dtype=float).update(k[:, a:b], v[:, a:b])
        for a, b in itertools.pairwise([0, *cuts, 150])
    ]
    while len(states) > 1:
        one = states.pop(data.draw(st.integers(0, len(states) - 1)))
        states[data.draw(st.integers(0, len(states) - 1))].merge(one)
    whole = favor_attention(q, k, v, fm)
    assert np.allclose(states[0].attend(q), whole, rtol=1e-12, atol=1e-13)
