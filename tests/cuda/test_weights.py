"""Biases and decay on a device: of calls and of states, against the oracle and the CPU."""

import ml_dtypes
import numpy as np
import ptxrun
import pytest
from support import oracle
from support.pieces import STATES
from support.tolerance import relative_error

ptxrun.require()

from cases import Case, check_states

from favor_np import AttentionState, favor_attention, favor_attention_vjp

CASE = Case(length=70, value_dim=5, rows=20, lead=(2,), causal=True)


def weights(seed=0):
    """Biases, one of which masks, and factors a token."""
    rng = np.random.default_rng(seed)
    bias = rng.normal(0, 30, (2, 70))
    bias[0, ::9] = -np.inf
    return {"key_bias": bias, "decay": rng.uniform(0.001, 1, (2, 70))}


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": [0.5, 1.0], "cu_seqlens": [0, 3, 3, 70]},
        weights() | {"cu_seqlens": [0, 1, 66, 70]},
        {"key_bias": weights()["key_bias"], "key_mask": np.arange(70) % 4 > 0},
    ],
    ids=["decay", "heads", "tokens", "masked"],
)
def test_attention_and_its_gradients(options, gpu):
    q, k, v = CASE.arrays()
    fm = CASE.feature_map()
    out, pullback = favor_attention_vjp(q, k, v, fm, causal=True, device="cuda", **options)
    expected = oracle.favor_attention(q, k, v, fm, causal=True, **options)
    assert relative_error(out, expected) < CASE.tolerance()
    grad = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
    whole = [x.astype(float) for x in (q, k, v)]
    found, wanted = (
        pullback(grad), favor_attention_vjp(*whole, fm, causal=True, **options)[1](grad)
    )  # fmt: skip
    for name in ("q", "k", "v", "key_bias", "decay"):
        theirs = getattr(wanted, name)
        if theirs is None:
            assert getattr(found, name) is None
        else:
            error = relative_error(getattr(found, name), theirs)
            assert error < 10 * CASE.tolerance(), name


def test_exponents_beyond_what_float32_counts(gpu):
    """Biases of 2**25 and decay of 2**27 in all, where a float32 has no fractions left."""
    q, k, v = CASE.arrays()
    fm, rng = CASE.feature_map(), np.random.default_rng(1)
    bias = rng.normal(0, 1, 70) + np.where(rng.random(70) < 0.5, 2e7, -2e7)
    for options in (
        {"key_bias": bias},
        {"key_bias": np.full(70, -2e7)},
        {"decay": np.full((2, 70), 2.0**-1000 / 3)},
        {"decay": 2.0**-1000},
    ):
        out, pullback = favor_attention_vjp(q, k, v, fm, causal=True, device="cuda", **options)
        whole = [x.astype(float) for x in (q, k, v)]
        expected, theirs = favor_attention_vjp(*whole, fm, causal=True, **options)
        assert relative_error(out, expected) < CASE.tolerance()
        grads, others = pullback(out), theirs(expected)
        for name in "qkv":
            found, wanted = getattr(grads, name), getattr(others, name)
            size = max(np.abs(wanted).max(), 1)
            assert np.abs(found - wanted).max() < 10 * CASE.tolerance() * size


@pytest.mark.parametrize("decay", ["constant", "tokens"])
def test_states(decay, gpu):
    """In pieces, step by step and merged: as the CPU's, which the other tests compare."""
    (q, k, v), fm = CASE.arrays(), CASE.feature_map()
    options = weights()
    bias, gates = options["key_bias"], options["decay"]
    constant = [0.3, 0.9] if decay == "constant" else None

    def fold(**where):
        """Fold two parts apart, merge them, and go on."""
        first, second = (AttentionState(fm, 5, 2, decay=constant, **where) for _ in range(2))
        for state, part in ((first, slice(0, 7)), (second, slice(7, 50))):
            more = {} if constant else {"decay": gates[:, part]}
            state.update(k[:, part], v[:, part], key_bias=bias[:, part], **more)
        first.merge(second)
        for i in (50, 51):
            more = {} if constant else {"decay": gates[:, i]}
            row = first.step(q[:, i], k[:, i], v[:, i], key_bias=bias[:, i], **more)
        return row, first.attend(q[:, :3]), first

    row, read, state = fold(device="cuda")
    wanted, theirs, other = fold(dtype=np.float64)
    assert relative_error(row, wanted) < 10 * CASE.tolerance()
    assert relative_error(read, theirs) < 10 * CASE.tolerance()
    assert state.lengths.tolist() == other.lengths.tolist()
    z, expected = (np.ldexp(x.z.astype(float), x.c - other.c) for x in (state, other))
    assert relative_error(z, expected) < 10 * CASE.tolerance()


@pytest.mark.parametrize("more", ["decay", "packed, decay", "tokens"])
def test_gradients_through_states(more, gpu):
    gates = {"decay": np.random.default_rng(0).uniform(0.3, 1, (3, 70))}
    check_states({"causal": True, **STATES.get(more, gates)})


def test_exponents_of_states_stay_near_zero(gpu):
    """However far keys have faded: below all that counts they stay, and new ones are seen."""
    (q, k, v), fm = CASE.arrays(), CASE.feature_map()
    state = AttentionState(fm, 5, 2, device="cuda")
    for i in range(12):
        row = state.step(q[:, i], k[:, i], v[:, i], decay=2.0**-900)
    assert relative_error(row, v[:, 11]) < 1e-6
    assert np.abs(state.c).max() < 1000
    with_mask = np.zeros(1, bool)
    for _ in range(3):
        state.update(k[:, :1], v[:, :1], with_mask, decay=np.full((2, 1), 1e-300))
    assert relative_error(state.attend(q[:, :1]), v[:, 11:12]) < 1e-6


def test_what_is_not_finite_is_refused_where_that_is_asked_for(gpu):
    """Arguments, cotangents and words of bfloat16; and looking at them changes no bit."""
    (q, k, v), fm = CASE.arrays(), CASE.feature_map()
    plain = favor_attention(q, k, v, fm, causal=True, device="cuda")
    found = favor_attention(q, k, v, fm, causal=True, check_finite=True, device="cuda")
    assert np.array_equal(found, plain)
    out, pullback = favor_attention_vjp(q, k, v, fm, causal=True, check_finite=True, device="cuda")
    out[0, 3, 1] = np.nan
    with pytest.raises(ValueError, match=r"^grad_out must be finite"):
        pullback(out)
    k[1, 5, 2] = np.inf
    with pytest.raises(ValueError, match=r"^k must be finite"):
        favor_attention(q, k, v, fm, check_finite=True, device="cuda")
    short = [x.astype(ml_dtypes.bfloat16) for x in (q, k, v)]
    state = AttentionState(fm, 5, 2, device="cuda")
    with pytest.raises(ValueError, match=r"^k must be finite"):
        state.update(*short[1:], check_finite=True)
    assert not state.lengths.any()


def test_bad_arguments_are_named(gpu):
    (q, k, v), fm = CASE.arrays(), CASE.feature_map()
    with pytest.raises(ValueError, match=r"^key_bias must be finite"):
        favor_attention(q, k, v, fm, key_bias=np.full(70, np.nan), device="cuda")
    with pytest.raises(ValueError, match=r"^key_bias must have shape"):
        favor_attention(q, k, v, fm, key_bias=np.zeros(3), device="cuda")
    with pytest.raises(ValueError, match=r"^decay needs causal=True"):
        favor_attention(q, k, v, fm, decay=0.9, device="cuda")
    state = AttentionState(fm, 5, 2, decay=0.9, device="cuda")
    with pytest.raises(ValueError, match=r"^decay must be that of the state"):
        state.update(k, v, decay=np.full((2, 70), 0.5))
