"""favor_attention by the CUDA kernels, executed from PTX under the real code of the host."""

import inspect

import ml_dtypes
import numpy as np
import ptxrun
import pytest
from support import oracle
from support.tolerance import relative_error
from support.tuning import tuned

ptxrun.require()

from cases import CASES, Case, in_16_bits, same_rounded

from favor_np import AttentionState, FeatureMap, favor_attention, feature_map
from favor_np.cuda import launch
from favor_np.cuda.kernels.pack import pack
from favor_np.cuda.kernels.tiles import TILE


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_oracle(case, gpu):
    q, k, v = case.arrays()
    fm, keywords = case.feature_map(), case.keywords()
    out = favor_attention(q, k, v, fm, device="cuda", **keywords)
    assert out.dtype == np.float32
    assert relative_error(out, case.expected()) < case.tolerance()
    here = favor_attention(q, k, v, fm, **keywords)
    assert relative_error(out, here) < max(1e-6, case.tolerance())


@pytest.mark.parametrize(("cc", "seed"), [((8, 0), 1), ((9, 0), 2), ((12, 0), 3)])
def test_any_order_of_threads_gives_the_same_bits(cc, seed, gpu):
    case = Case(causal=True)
    fm = case.feature_map()
    gpu.cc = cc
    results = []
    for gpu.seed in (0, seed):
        results.append(favor_attention(*case.arrays(), fm, causal=True, device="cuda"))
    assert np.array_equal(*results)
    assert relative_error(results[0], case.expected()) < case.tolerance()


@pytest.mark.parametrize(
    ("changed", "std"), [(5, 1.0), (5, 8.0), (TILE - 1, 1.0), (TILE, 1.0), (TILE + 7, 8.0)]
)
def test_later_keys_change_no_bit(changed, std, gpu):
    case = Case(length=TILE + 9, std=std, causal=True)
    q, k, v = case.arrays()
    fm = case.feature_map()
    out = favor_attention(q, k, v, fm, causal=True, device="cuda")
    for by in (30, np.nan, 1e30, 1e-3):
        later = [x.copy() for x in (q, k, v)]
        for x in later:
            x[:, changed:] *= np.float32(by)
        found = favor_attention(*later, fm, causal=True, device="cuda")
        assert np.array_equal(found[:, :changed], out[:, :changed])
    assert not np.array_equal(found[:, changed:], out[:, changed:])


def test_tall_keys_late_in_a_chunk(gpu):
    """Rows before a key that passes them by more than float32's range keep their values."""
    case = Case(length=TILE, dim=4, value_dim=3, rows=20, lead=(), causal=True)
    q, k, v = case.arrays()
    k[::7] *= 20
    q[::3] *= 20
    fm = case.feature_map()
    expected = oracle.favor_attention(q, k, v, fm, causal=True)
    out = favor_attention(q, k, v, fm, causal=True, device="cuda")
    assert relative_error(out, expected) < 1e-3
    here = favor_attention(q, k, v, fm, causal=True)
    assert relative_error(out, here) < 1e-3


def test_what_is_not_finite_reaches_whom_it_may(gpu):
    case = Case(length=TILE + 5, lead=(), causal=True)
    q, k, v = case.arrays()
    fm = case.feature_map()
    for name, at in (("q", 3), ("k", 40), ("v", 66), ("v", 2)):
        arrays = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        arrays[name][at, 1] = np.inf
        out = favor_attention(*arrays.values(), fm, causal=True, device="cuda")
        here = favor_attention(*arrays.values(), fm, causal=True)
        assert np.array_equal(np.isfinite(out), np.isfinite(here)), name
        mask = np.arange(len(q)) != at
        if name != "q":
            out = favor_attention(*arrays.values(), fm, causal=True, key_mask=mask, device="cuda")
            assert np.isfinite(out).all()


def test_rows_without_keys_are_zero(gpu):
    q, k, v = Case(length=5, lead=()).arrays()
    fm = Case().feature_map()
    mask = np.array([False, False, True, True, False])
    out = favor_attention(q, k, v, fm, causal=True, key_mask=mask, device="cuda")
    assert not out[:2].any()
    assert np.isfinite(out).all()
    assert not favor_attention(q, k[:0], v[:0], fm, device="cuda").any()
    assert favor_attention(q[:0], k, v, fm, device="cuda").shape == (0, 70)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal, gpu):
    case = Case(length=150, causal=causal)
    q, k, v = case.arrays()
    fm, offsets = case.feature_map(), np.array([0, 3, 3, 70, 71, 150])
    out = favor_attention(q, k, v, fm, causal=causal, cu_seqlens=offsets, device="cuda")
    expected = oracle.favor_attention(q, k, v, fm, causal=causal, cu_seqlens=offsets)
    assert relative_error(out, expected) < case.tolerance()


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("method", ["oprf", "sderf", "aderf+sderf"])
def test_calibrated_maps(method, heads, gpu):
    rng = np.random.default_rng(0)
    lead = () if heads is None else (heads,)
    q, k, v = (rng.standard_normal((*lead, 70, 8)).astype(np.float32) + 0.5 for _ in range(3))
    fm = feature_map("positive", 8, 64).calibrate(q, k, method)
    here = favor_attention(q, k, v, fm, causal=True)
    out = favor_attention(q, k, v, fm, causal=True, device="cuda")
    assert relative_error(out, here) < 3e-6


def test_long_rows_are_shortened_and_others_are_not(gpu):
    """Neighbours in a warp: a long row, one whose square overflows, one that is not finite, a tiny one."""
    rng, limit, norm = np.random.default_rng(0), np.float32(100), np.float32(0.5)
    rows = rng.standard_normal((6, 20)).astype(np.float32)
    rows *= np.float32([1, 1e6, 1e30, 1, 1e-30, 1])[:, None]
    rows[3, 7] = np.inf
    packed, log_norms = gpu.empty((6, 32), np.float32), gpu.empty(6, np.float32)
    none = gpu.to_device(np.zeros((0, 1), np.float32))
    table = gpu.to_device(np.int32([[0, 6, 0, 0]]))
    gpu.launch(
        pack, (1,), (gpu.to_device(rows), limit, norm, none, none, table, packed, log_norms), 0
    )
    exact = rows.astype(float)
    for i in (1, 2):
        exact[i] *= 100 / np.linalg.norm(exact[i])
        assert np.abs(packed[i, :20] - exact[i]).max() < 1e-4
    assert packed[[0, 4, 5], :20].tobytes() == rows[[0, 4, 5]].tobytes()
    assert not packed[3].any()
    assert not packed[:, 20:].any()
    assert np.isnan(log_norms[3])
    squares = 0.5 * (exact[[0, 1, 2, 4, 5]] ** 2).sum(1)
    assert np.allclose(log_norms[[0, 1, 2, 4, 5]], squares, rtol=1e-5, atol=1e-30)


def test_spans_and_stretches(gpu):
    """Sequences that are cut into spans and stretches give what uncut ones do."""
    case = Case(length=5 * TILE + 7, lead=(), value_dim=5, rows=32, causal=True)
    q, k, v = case.arrays()
    fm = case.feature_map()
    whole = favor_attention(q, k, v, fm, causal=True, device="cuda")
    at_once = len(gpu.launches)
    with tuned(ROOM=40_000):
        launch.forget()
        assert np.array_equal(favor_attention(q, k, v, fm, causal=True, device="cuda"), whole)
        assert len(gpu.launches) > 2 * at_once
    with tuned(ROOM=40_000, SHORTEST=1):
        launch.forget()
        out = favor_attention(q, k, v, fm, device="cuda")
    expected = oracle.favor_attention(q, k, v, fm)
    assert relative_error(out, expected) < case.tolerance()


@pytest.mark.parametrize(("dtype", "causal"), [(np.float16, False), (ml_dtypes.bfloat16, True)])
def test_16_bits_are_read_and_the_result_rounded(dtype, causal, gpu):
    case = Case(masked=True, causal=causal, seed=2)
    fm, keywords = case.feature_map(), case.keywords()
    short, long = in_16_bits(case, dtype)
    whole = favor_attention(*long, fm, device="cuda", **keywords)
    gpu.launches.clear()
    out = favor_attention(*short, fm, device="cuda", **keywords)
    assert same_rounded(out, whole, dtype)
    expected = oracle.favor_attention(*long, fm, **keywords)
    half_a_step = float(ml_dtypes.finfo(dtype).eps) / 2
    assert relative_error(out.astype(float), expected) < case.tolerance() + half_a_step
    kinds = {
        (kernel.__name__, name): x.dtype.itemsize
        for kernel, _, args in gpu.launches
        for name, x in zip(inspect.signature(kernel).parameters, args, strict=True)
        if isinstance(x, np.ndarray)
    }
    ways = ("pack", "source"), ("fold", "v"), ("read", "v"), ("read", "out")
    assert [kinds[way] for way in ways] == [2, 2, 2, 2]  # nobody copies them to float32


def test_later_keys_in_bfloat16_change_no_bit(gpu):
    case = Case(length=TILE + 9, causal=True)
    arrays, _ = in_16_bits(case, ml_dtypes.bfloat16)
    fm, changed = case.feature_map(), TILE - 1
    out = favor_attention(*arrays, fm, causal=True, device="cuda")
    for by in (30, np.inf, np.nan):
        later = [x.copy() for x in arrays]
        for x in later:
            x[:, changed:] = x[:, changed:].astype(np.float32) * np.float32(by)
        found = favor_attention(*later, fm, causal=True, device="cuda")
        assert found[:, :changed].tobytes() == out[:, :changed].tobytes()
    assert np.isnan(found[:, changed:].astype(float)).all()


def test_a_state_in_bfloat16(gpu):
    case = Case(length=9, value_dim=5, rows=20, causal=True)
    (q, k, v), long = in_16_bits(case, ml_dtypes.bfloat16)
    mine, theirs = (AttentionState.zeros(case.feature_map(), 5, 2, device="cuda") for _ in range(2))
    mine.update(k[:, :8], v[:, :8])
    theirs.update(*(x[:, :8] for x in long[1:]))
    assert np.array_equal(mine.S, theirs.S)
    row = mine.step(q[:, 8], k[:, 8], v[:, 8])
    assert same_rounded(row, theirs.step(*(x[:, 8] for x in long)), v.dtype)


def test_bad_arguments_are_named(gpu):
    q, k, v = Case(length=4, lead=()).arrays()
    fm = Case().feature_map()
    with pytest.raises(TypeError, match="float32"):
        favor_attention(q.astype(float), k, v, fm, device="cuda")
    with pytest.raises(ValueError, match=r"^device must be one of"):
        favor_attention(q, k, v, fm, device="gpu")
    with pytest.raises(ValueError, match=r"^out cannot"):
        favor_attention(q, k, v, fm, device="cuda", out=v)
    with pytest.raises(
        ValueError, match=r"^precision must be one of 'full', 'bfloat16', got 'tf32x3'"
    ):
        favor_attention(q, k, v, fm, precision="tf32x3", device="cuda")
    state = AttentionState.zeros(fm, 70)
    with pytest.raises(TypeError, match="state lies in main memory"):
        favor_attention(q, k, v, fm, device="cuda", state=state)
    with pytest.raises(ValueError, match="must have shape"):
        favor_attention(q[:, :3], k, v, fm, device="cuda")


def test_a_map_with_features_that_only_pad(gpu):
    q, k, v = Case(length=9, lead=()).arrays()
    for rows in (1, 31, 32, 33):
        fm = FeatureMap.from_projection(np.random.default_rng(0).standard_normal((rows, 24)))
        out = favor_attention(q, k, v, fm, device="cuda")
        assert relative_error(out, oracle.favor_attention(q, k, v, fm)) < 1e-5
