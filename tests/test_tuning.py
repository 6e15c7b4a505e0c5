"""Thresholds can be changed for a while, and what was made with them is forgotten."""

import numpy as np
import pytest

from favor_np import feature_map
from favor_np.cpu import tuning
from favor_np.cpu.layout import layout
from favor_np.cpu.schedule import exact_jobs, exact_vjp_jobs
from favor_np.jobs import Shapes


def test_thresholds_are_afterwards_what_they_were():
    before = tuning.MIN_SHARED_LENGTH, tuning.MAX_SPARE
    seen = []

    @tuning.tuned(MIN_SHARED_LENGTH=7, MAX_SPARE=3)
    def fails():
        seen.append((tuning.MIN_SHARED_LENGTH, tuning.MAX_SPARE))
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert seen == [(7, 3)]
    assert before == (tuning.MIN_SHARED_LENGTH, tuning.MAX_SPARE)


@pytest.mark.parametrize("name", ["MIN_SHARED", "tuned", "_TABLES", "np"])
def test_what_is_no_threshold_is_not_changed(name):
    with (
        pytest.raises(AttributeError, match=f"no thresholds: \\['{name}'\\]"),
        tuning.tuned(MAX_SPARE=3, **{name: 3}),
    ):
        pass
    assert tuning.MAX_SPARE != 3


FM, HEAD = feature_map("positive", 8, 16), Shapes(*3 * [(1, 4096, 8)])


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        (
            lambda: layout(FM, np.dtype(np.float32), 8).parts is not None,
            "USE_BF16X3",
            True,
        ),
        (lambda: len(exact_jobs(HEAD)), "MIN_EXACT_JOBS", 8),
        (lambda: len(exact_vjp_jobs(HEAD).table), "EXACT_VJP_JOBS", 1),
    ],
)
def test_what_was_made_with_other_thresholds_is_made_anew(call, name, value):
    before = call()
    with tuning.tuned(**{name: value}):
        assert call() == value != before
    assert call() == before
