"""precision="bfloat16" on a GPU: products by tensor cores, whose PTX is executed on the CPU."""

import ptxrun

ptxrun.require()

import dataclasses

import gate
import numpy as np
import pytest
from cases import CASES, Case
from support.tolerance import relative_rms

from favor_np import exact_attention, favor_attention, favor_attention_vjp, feature_map
from favor_np.cuda.kernels.tiles import TILE


def in_bfloat16(case, *arrays, **options):
    arrays = arrays or case.arrays()
    options = case.keywords() | options
    return favor_attention(
        *arrays, case.feature_map(), device="cuda", precision="bfloat16", **options
    )


@pytest.mark.parametrize("name", ["causal-131", "full-131", "narrow", "wide"])
def test_against_the_oracle(name, gpu):
    case = CASES[name]
    error = relative_rms(in_bfloat16(case), case.expected())
    assert 1e-4 < error < 2e-2  # it is rounded, and no more than that


@pytest.mark.parametrize("causal", [False, True])
def test_the_added_error_is_below_a_tenth_of_the_estimates_own(causal, gpu):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 192, 64)).astype(np.float32)
    exact = exact_attention(*(x.astype(float) for x in (q, k, v)), causal=causal)
    fm = feature_map("positive", 64, 256, antithetic=True, rng=0)
    full = favor_attention(*(x.astype(float) for x in (q, k, v)), fm, causal=causal)
    half = favor_attention(q, k, v, fm, causal=causal, device="cuda", precision="bfloat16")
    assert np.std(half - full) < 0.1 * np.std(full - exact)


def test_any_order_of_threads_gives_the_same_bits(gpu):
    """Of keys that are tall, so that a chunk is read in several parts."""
    case = dataclasses.replace(CASES["causal-131"], std=6.0)
    first = in_bfloat16(case)
    gpu.seed = 1
    assert np.array_equal(in_bfloat16(case), first)


def test_later_keys_change_no_bit(gpu):
    case = Case(length=TILE + 9, causal=True)
    arrays, changed = case.arrays(), TILE - 1
    out = in_bfloat16(case, *arrays)
    for by in (30, np.inf):  # zero times infinity must not reach the rows before it
        later = [x.copy() for x in arrays]
        for x in later:
            x[:, changed:] *= np.float32(by)
        found = in_bfloat16(case, *later)
        assert np.array_equal(found[:, :changed], out[:, :changed])
        assert not np.array_equal(found[:, changed:], out[:, changed:])
    assert np.isnan(found[:, changed:]).all()


@pytest.mark.parametrize("value", [np.inf, np.finfo(np.float32).max])  # of which infinity is made
def test_infinite_values_reach_the_rows_after_them(value, gpu):
    case = Case(length=TILE + 9, causal=True)
    q, k, v = case.arrays()
    clean = in_bfloat16(case, q, k, v)
    v[:, 5, 1] = value
    found = in_bfloat16(case, q, k, v)
    assert not np.isfinite(found[:, 5:, 1]).any()
    assert np.array_equal(found[:, :5], clean[:, :5])
    assert relative_rms(found[:, 5:, 2:], clean[:, 5:, 2:]) < 1e-6


def kernels(gpu_name, **options):
    """Names of the kernels that attention and its gradient launch."""
    recorder, case = gate.Recorder(), CASES["causal-131"]
    recorder.name = gpu_name
    with recorder.installed():
        out, pullback = favor_attention_vjp(
            *case.arrays(), case.feature_map(), causal=True, device="cuda", **options
        )
        forward = set(recorder.kernels)
        recorder.kernels.clear()
        pullback(out)
    return forward, set(recorder.kernels)


def test_gradients_and_older_gpus_compute_in_float32():
    forward, backward = kernels("A100", precision="bfloat16")
    assert sum("bfloat16=1" in name for name in forward) == 2
    assert kernels("A100")[1] == backward
    assert kernels("T4", precision="bfloat16") == kernels("T4")
