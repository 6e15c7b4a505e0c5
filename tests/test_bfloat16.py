"""precision="bfloat16": the error it adds is small beside the estimate's own, all else is as ever."""

import functools
import platform

import numpy as np
import pytest
from support import child
from support.inputs import OPTIONS, random_inputs
from support.tolerance import relative_rms
from support.tuning import tuned
from support.workspaces import poison_workspaces

from favor_np import (
    AttentionState,
    FeatureMap,
    exact_attention,
    exact_attention_vjp,
    favor_attention,
    feature_map,
    stream_attention,
)
from favor_np.cpu.layout import worth_bfloat16
from favor_np.cpu.processor import TARGET, amx_unavailable, features_here

UNIT = not amx_unavailable()  # asks the system for the matrix unit

#: Of the root mean square: 2**-9 a number, over some hundred of them.
TOLERANCE = 6e-3


@pytest.fixture(autouse=True)
def _by_pairs():
    """Compute products of bfloat16 also where that is slow."""
    with tuned(USE_BFLOAT16=True):
        yield


inputs = functools.partial(random_inputs, std=0.5, dtype=np.float32)


def both(q, k, v, fm, **options):
    """The result in full precision and the one in bfloat16, from the same float32 inputs."""
    full = favor_attention(q, k, v, fm, **options)
    return full, favor_attention(q, k, v, fm, precision="bfloat16", **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 2100])
@pytest.mark.parametrize(
    ("dim", "width", "rows"), [(64, 64, 128), (7, 3, 40), (40, 17, 70), (1, 1, 16)]
)
def test_any_size(causal, antithetic, length, dim, width, rows):
    """Odd sizes cost padding only, whatever was in the workspace before."""
    fm = feature_map("positive", dim, rows * (2 if antithetic else 1), antithetic=antithetic, rng=0)
    for before in (1e30, np.nan):
        q = np.full((80, dim), before, np.float32)
        favor_attention(q, q, q[:, :1].repeat(width, 1), fm, precision="bfloat16", causal=causal)
    q, k, v = inputs(length, dim, width, (2,))
    full = favor_attention(q, k, v, fm, causal=causal)
    poison_workspaces()
    half = favor_attention(q, k, v, fm, causal=causal, precision="bfloat16")
    assert half.dtype == np.float32
    assert relative_rms(half, full) < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
def test_the_added_error_is_below_a_tenth_of_the_estimates_own(causal):
    q, k, v = inputs(1024, 64, 64, (4,), std=1.0)
    exact = exact_attention(q, k, v, causal=causal)
    for features in (64, 256, 1024):
        fm = feature_map("positive", 64, features, rng=0)
        full, half = both(q, k, v, fm, causal=causal)
        assert np.std(half - full) < 0.1 * np.std(full - exact)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["positive", "relu", "elu", "calibrated", "heads"])
def test_with_everything_else(options, kind):
    q, k, v = inputs(300, 24, 20, (3,), seed=1)
    if kind == "calibrated":
        fm = feature_map("positive", 24, 128, rng=0).calibrate(q, k, "aderf+sderf")
    elif kind == "heads":
        W = np.stack([feature_map("positive", 24, 48, rng=h).projection for h in range(3)])
        fm = FeatureMap.from_projection(W)
    else:
        fm = feature_map(kind, 24, 96, rng=0)
    full, half = both(q, k, v, fm, **options)
    assert relative_rms(half, full) < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
def test_a_later_block_of_the_map_may_hold_far_larger_features(causal, antithetic):
    """What was summed of earlier ones is then rescaled, for each query that needs it."""
    W = np.random.default_rng(0).standard_normal((128, 16))
    W[:64] *= 0.01
    fm = FeatureMap.from_projection(W, antithetic=antithetic)
    q, k, v = inputs(200, 16, 24, (2,))
    q[:, ::2] *= 20  # log2-features of 50 and more in the second block, of 1 in the first
    full, half = both(q, k, v, fm, causal=causal)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert relative_rms(half[:, rows], full[:, rows]) < 0.03


def test_heads_that_share_keys():
    q, k, v = inputs(150, 32, 32, (8,))
    fm = feature_map("positive", 32, 128, rng=0)
    for causal in (False, True):
        full, half = both(q, k[:2], v[:2], fm, causal=causal, enable_gqa=True)
        assert relative_rms(half, full) < TOLERANCE


def test_16_bits_in_16_bits_out():
    q, k, v = (x.astype(np.float16) for x in inputs(100, 16, 16))
    fm = feature_map("positive", 16, 64, rng=0)
    full, half = both(q, k, v, fm)
    assert half.dtype == np.float16
    assert relative_rms(half, full) < TOLERANCE


def test_a_state_goes_on_in_either_precision():
    q, k, v = inputs(500, 24, 16, (2,))
    fm = feature_map("positive", 24, 96, rng=0)
    whole = favor_attention(q, k, v, fm, causal=True)
    for first, second in (("bfloat16", "full"), ("full", "bfloat16")):
        state = None
        for rows, precision in ((slice(0, 230), first), (slice(230, 500), second)):
            out, state = favor_attention(
                q[:, rows], k[:, rows], v[:, rows], fm, causal=True, state=state,
                return_state=True, precision=precision,
            )  # fmt: skip
        assert relative_rms(out, whole[:, 230:]) < TOLERANCE
        assert isinstance(state, AttentionState)


@pytest.mark.parametrize("antithetic", [False, True])
def test_it_is_attention_of_the_rounded_queries_and_keys(antithetic):
    """The log-norm of a key too: to the bit, however long the key is."""
    q, k, v = inputs(200, 32, 16, std=3.0)
    fm = feature_map("positive", 32, 128, antithetic=antithetic, rng=0)
    short = [
        ((x.view(np.uint32) + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32) for x in (q, k)
    ]
    assert not np.array_equal(short[1], k)
    for causal in (False, True):
        options = {"causal": causal, "precision": "bfloat16"}
        half = favor_attention(q, k, v, fm, **options)
        assert np.array_equal(half, favor_attention(*short, v, fm, **options))


@pytest.mark.parametrize("length", [300, 5000])
def test_no_bit_depends_on_later_tokens_or_on_threads(length):
    q, k, v = inputs(length, 32, 32, std=1.0)
    fm = feature_map("positive", 32, 256, rng=0)
    options = {"causal": True, "precision": "bfloat16"}
    out = favor_attention(q, k, v, fm, num_threads=1, **options)
    assert np.array_equal(out, favor_attention(q, k, v, fm, num_threads=2, **options))
    later = length - 37
    for change in (20.0, np.nan, np.inf):
        q2, k2, v2 = q.copy(), k.copy(), v.copy()
        q2[later:], k2[later:], v2[later:] = -q[later:], change * k[later:], change
        changed = favor_attention(q2, k2, v2, fm, **options)
        assert np.array_equal(changed[:later], out[:later])
        assert not np.array_equal(changed[later:], out[later:])
    again = favor_attention(q, k, v, fm, num_threads=1, **options)
    assert np.array_equal(again, out)  # whatever those calls have left in the workspace


def test_nan_of_any_bits_stays_nan():
    q, k, v = inputs(200, 16, 16)
    v[100] = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    fm = feature_map("positive", 16, 64, rng=0)
    out = favor_attention(q, k, v, fm, causal=True, precision="bfloat16")
    assert np.isfinite(out[:100]).all()
    assert np.isnan(out[100:]).all()


def test_large_norms_and_drift():
    """Exponents are those of float32: log-features hundreds of nats apart are no matter."""
    q, k, v = inputs(600, 16, 16, (2,))
    k += np.linspace(-30, 30, 600, dtype=np.float32)[:, None]
    fm = feature_map("positive", 16, 64, rng=0)
    for causal in (False, True):
        half = favor_attention(q, k, v, fm, causal=causal, precision="bfloat16")
        assert np.isfinite(half).all()
        assert abs(half).max() <= 1.01 * abs(v).max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 700])
@pytest.mark.parametrize(("dim", "width"), [(64, 64), (7, 3), (40, 17), (1, 1)])
def test_exact_attention(causal, length, dim, width):
    exact_attention(*(1e30 * np.ones((3, 80, dim), np.float32)), precision="bfloat16")
    q, k, v = inputs(length, dim, width, (2,), std=1.0)
    full = exact_attention(q, k, v, causal=causal)
    poison_workspaces()
    half = exact_attention(q, k, v, causal=causal, precision="bfloat16")
    assert half.dtype == np.float32
    # One dimension: all logits of a row err alike.
    assert relative_rms(half, full) < (TOLERANCE if dim > 1 else 0.02)


def test_exact_attention_with_everything_else():
    q, k, v = inputs(300, 24, 20, (8,), seed=1)
    mask = np.arange(300) % 3 > 0
    for options in ({}, {"causal": True}):
        pair = [
            exact_attention(
                q, k[:2], v[:2], key_mask=mask, enable_gqa=True, scale=0.3, precision=precision,
                **options,
            )
            for precision in ("full", "bfloat16")
        ]  # fmt: skip
        assert relative_rms(pair[1], pair[0]) < TOLERANCE


def test_no_bit_of_exact_attention_depends_on_later_tokens_or_on_threads():
    q, k, v = inputs(700, 32, 32, std=1.0)
    options = {"causal": True, "precision": "bfloat16"}
    out = exact_attention(q, k, v, num_threads=1, **options)
    assert np.array_equal(out, exact_attention(q, k, v, num_threads=2, **options))
    later = 650
    nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
    for change in (20.0, nan, np.inf):
        q2, k2, v2 = q.copy(), k.copy(), v.copy()
        q2[later:], k2[later:], v2[later:] = -q[later:], change * k[later:], change
        changed = exact_attention(q2, k2, v2, **options)
        assert np.array_equal(changed[:later], out[:later])
        assert not np.array_equal(changed[later:], out[later:])
        if change != 20.0:
            assert not np.isfinite(changed[later:]).any()
    assert np.array_equal(exact_attention(q, k, v, num_threads=1, **options), out)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 70}])
def test_the_gradient_of_exact_attention(options):
    q, k, v = inputs(200, 40, 17, (2,))
    g = inputs(200, 40, 17, (2,))[2]
    half, pullback = exact_attention_vjp(q, k, v, precision="bfloat16", **options)
    assert np.array_equal(half, exact_attention(q, k, v, precision="bfloat16", **options))
    full, expected = exact_attention_vjp(q, k, v, **options)
    assert not np.array_equal(half, full)
    for mine, right in zip(pullback(g), expected(g), strict=True):
        assert relative_rms(mine, right) < TOLERANCE


@pytest.mark.parametrize("window", [1, 5, 64, 70, 140])
def test_a_window(window):
    fm = feature_map("positive", 40, 140, rng=0)
    q, k, v = inputs(300, 40, 17, (2,))
    full, half = both(q, k, v, fm, causal=True, window=window)
    assert relative_rms(half, full) < TOLERANCE
    assert window == 1 or not np.array_equal(half, full)
    alone = (x[:, :211] for x in (q, k, v))
    part = favor_attention(*alone, fm, causal=True, window=window, precision="bfloat16")
    assert np.array_equal(part, half[:, :211])


@pytest.mark.parametrize("causal", [False, True])
def test_a_stream(causal):
    fm = feature_map("positive", 40, 140, rng=0)
    q, k, v = inputs(300, 40, 17, (2,))
    out = {}
    for precision in ("full", "bfloat16"):
        out[precision] = np.empty_like(v)
        stream_attention(
            q, k, v, fm, out[precision], causal=causal, precision=precision, chunk_size=128
        )
    assert 0 < relative_rms(out["bfloat16"], out["full"]) < TOLERANCE


def test_large_logits_are_computed_in_full():
    q, k, v = inputs(100, 16, 16, std=2000.0)
    full = exact_attention(q, k, v)
    assert np.array_equal(exact_attention(q, k, v, precision="bfloat16"), full)


def results():
    """Both kernels on sizes that fill no tile."""
    rng = np.random.default_rng(0)
    q, k, v = 0.5 * rng.standard_normal((3, 2, 300, 40)).astype(np.float32)
    fm = feature_map("positive", 40, 192, rng=0)
    half = {"precision": "bfloat16"}
    found = [favor_attention(q, k, v, fm, causal=causal, **half) for causal in (False, True)]
    return found + [exact_attention(q, k, v, causal=causal, **half) for causal in (False, True)]


#: What a process of another target does.
PROCESS = """
from favor_np.cpu import code, tuning
from favor_np.cpu.kernels import jit
from favor_np.cpu.processor import TARGET

class Kernel(jit._Kernel):
    def emit_native_object(self):
        assembly.append(self.get_asm_str())
        return super().emit_native_object()

assembly, jit._Kernel = [], Kernel
tuning.USE_BFLOAT16 = True
np.save({path!r}, results())
code.kernel("attend_exact", np.dtype(np.float32), frozenset(["pairs"])).compile()
print(TARGET.way, assembly[-1].count("vdpbf16ps") >= 28)
"""


@pytest.mark.parametrize(
    ("name", "features", "needs", "printed"),
    [
        ("x86-64-v3", "", "fma", "plain False"),
        ("x86-64-v4", "", "avx512f", "plain False"),
        ("x86-64-v4", "+avx512bf16", "avx512bf16", "dots True"),
    ],
)
def test_other_instructions_give_the_same(name, features, needs, printed, tmp_path):
    """Sums in another order: now and then a number of 8 bits is rounded the other way."""
    if platform.machine().lower() not in ("x86_64", "amd64") or needs not in features_here()[0]:
        pytest.skip("this machine cannot run its code")
    path = tmp_path / "found.npy"
    code = child.names_of(__file__) + PROCESS.format(path=str(path))
    environ = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    assert child.python(code, **environ) == printed + "\n"
    assert relative_rms(np.load(path), np.array(results())) < 1e-3


def test_pairs_are_multiplied_where_that_is_faster():
    with tuned(USE_BFLOAT16=None):
        assert worth_bfloat16() == (TARGET.dots or UNIT)


@tuned(amx_unavailable=lambda: "Operation not permitted")
def test_a_refused_matrix_unit_is_none():
    with tuned(USE_BFLOAT16=None):
        assert worth_bfloat16() == TARGET.dots


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_without_a_faster_way_it_is_full_precision_to_the_bit(options, dtype):
    q, k, v = (x.astype(dtype) for x in inputs(300, 24, 20, (3,), seed=1))
    fm = feature_map("positive", 24, 96, rng=0)
    exactly = {name: value for name, value in options.items() if name in ("causal", "key_mask")}
    with tuned(USE_BFLOAT16=False):
        full, half = both(q, k, v, fm, **options)
        assert np.array_equal(full, half)
        full, half = (
            exact_attention(q, k, v, precision=precision, **exactly)
            for precision in ("full", "bfloat16")
        )
        assert np.array_equal(full, half)
    assert not np.array_equal(*both(q, k, v, fm, **options))  # as it can be otherwise


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"precision": "float16"}, ValueError, "precision must be one of 'full', 'bfloat16'"),
        ({"precision": 16}, TypeError, "precision must be one of"),
        ({"q": np.ones((5, 8))}, ValueError, "needs arrays of at most 32 bits"),
    ],
)
def test_errors(change, error, message):
    q, k, v = inputs(5, 8, 8)
    good = {"q": q, "k": k, "v": v, "precision": "bfloat16"}
    with pytest.raises(error, match=message):
        favor_attention(feature_map=feature_map("positive", 8, 16), **(good | change))
    for attention in (exact_attention, exact_attention_vjp):
        with pytest.raises(error, match=message):
            attention(**(good | change))


@pytest.mark.parametrize("causal", [False, True])
def test_values_that_are_not_finite_spoil_the_rows_that_see_them(causal):
    q, k, v = inputs(300, 16, 20)
    v[5, 3], v[150, 7], v[299, 0] = np.nan, np.inf, -np.inf
    for attention in (exact_attention, favor_attention):
        fm = [feature_map("positive", 16, 64, rng=0)] if attention is favor_attention else []
        full = attention(q, k, v, *fm, causal=causal)
        half = attention(q, k, v, *fm, causal=causal, precision="bfloat16")
        spoiled = np.isnan(v) | np.isinf(v)
        if causal:
            spoiled = np.logical_or.accumulate(spoiled)
        else:
            spoiled = np.broadcast_to(spoiled.any(0), full.shape)
        for out in (full, half):
            assert np.array_equal(~np.isfinite(out), spoiled)
