"""Windows on a device: two passes over packs of segments, and rows that are joined."""

import ptxrun

ptxrun.require()

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from cases import Case, in_16_bits, same_rounded
from support.tolerance import relative_error
from support.tuning import tuned

from favor_np import favor_attention
from favor_np.cuda import launch

CASE = Case(70, dim=6, value_dim=5, rows=20, lead=(2,), causal=True, seed=4)
PACKED = dataclasses.replace(CASE, options={"cu_seqlens": [0, 0, 33, 34, 70]})
GROUPED = dataclasses.replace(CASE, lead=(1, 4), kv_lead=(1, 2), options={"enable_gqa": True})
WEIGHED = dataclasses.replace(CASE, masked=True, biased=True, gated=True)
FAR = dataclasses.replace(CASE, std=20.0)


def attended(case, **options):
    return favor_attention(*case.arrays(), case.feature_map(), **case.keywords(), **options)


@pytest.mark.parametrize(
    ("case", "window"),
    [
        (CASE, 1),
        (CASE, 2),
        (CASE, 69),
        (CASE, 70),
        (PACKED, 8),
        (GROUPED, 16),
        (WEIGHED, 9),
        (FAR, 33),
    ],
)
def test_against_the_oracle(case, window, gpu):
    wanted = dataclasses.replace(case, options=case.options | {"window": window}).expected()
    found = attended(case, window=window, device="cuda")
    assert found.dtype == np.float32
    assert relative_error(found, wanted) < case.tolerance()


def test_however_few_segments_at_a_time(gpu):
    whole = attended(PACKED, window=8, device="cuda")
    launch.forget()
    with tuned(ROOM=1):
        assert np.array_equal(attended(PACKED, window=8, device="cuda"), whole)


def test_what_a_row_does_not_see_changes_no_bit(gpu):
    (q, k, v), fm = CASE.arrays(), CASE.feature_map()
    plain = favor_attention(q, k, v, fm, causal=True, window=9, device="cuda")
    k[:, 20:40], v[:, 20:40] = np.nan, np.inf
    found = favor_attention(q, k, v, fm, causal=True, window=9, device="cuda")
    sees = np.zeros(70, bool)
    sees[20:48] = True
    assert np.array_equal(found[:, ~sees], plain[:, ~sees])
    assert np.isnan(found[:, sees]).all()


def test_16_bits(gpu):
    short, whole = in_16_bits(CASE, ml_dtypes.bfloat16)
    found, wanted = (
        favor_attention(*x, CASE.feature_map(), causal=True, window=9, device="cuda")
        for x in (short, whole)
    )
    assert same_rounded(found, wanted, ml_dtypes.bfloat16)


def test_products_of_bfloat16(gpu):
    exact, rounded = (
        attended(CASE, window=9, precision=precision, device="cuda")
        for precision in ("full", "bfloat16")
    )
    assert 0 < relative_error(rounded, exact) < 2e-2
