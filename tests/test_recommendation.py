"""recommend: keeps its promise on other data, and says when not to use random features."""

import numpy as np
import pytest

from favor_np import exact_attention, favor_attention, recommend

LENGTH, DIM = 8192, 16


def data(std, length=LENGTH, seed=0, heads=2):
    """Queries and keys of one distribution, whatever the seed."""
    mix = np.random.default_rng(99).standard_normal((2, heads, DIM, DIM)) / DIM**0.5
    x = np.random.default_rng(seed).standard_normal((2, heads, length, DIM))
    return std * (x @ mix + 0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("std", "target"), [(0.4, 0.1), (0.8, 0.2)])
def test_the_error_on_new_data_is_the_predicted_one(std, target, causal):
    advice = recommend(*data(std), target_error=target, causal=causal)
    assert not advice.exact
    assert advice.predicted_error <= target
    assert advice.feature_map.num_heads == 2
    assert advice.feature_map.num_features == advice.num_features
    q, k = data(std, 1000, seed=1)
    v = np.random.default_rng(2).standard_normal((2, 1000, 32))
    exact = exact_attention(q, k, v, causal=causal)
    difference = favor_attention(q, k, v, advice.feature_map, causal=causal) - exact
    achieved = np.sqrt(np.mean(difference**2) / np.mean(exact**2))
    assert achieved < 1.5 * advice.predicted_error
    assert f"Use {advice.num_features} features, calibrated" in str(advice)


@pytest.mark.parametrize(
    ("std", "reason"), [(2.0, "would be needed|is faster"), (6.0, "closed form")]
)
def test_peaked_attention_needs_the_exact_one(std, reason):
    advice = recommend(*data(std), target_error=0.1)
    assert advice.exact
    assert advice.feature_map is None
    assert advice.predicted_error == 0
    assert str(advice).startswith("Use exact_attention: ")
    assert "keep the feature map that they were trained with" in str(advice)
    assert any(part in advice.reason for part in reason.split("|"))


def test_short_sequences_are_faster_exactly():
    advice = recommend(*data(0.4, length=16), target_error=0.001)
    assert advice.exact
    assert advice.seconds == advice.exact_seconds > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_error": 0}, ValueError, "target_error must be finite and greater than 0"),
        ({"causal": None}, TypeError, "causal must be True or False"),
        ({"q": np.ones((3, 5))}, ValueError, "k must have shape"),
        ({"k": np.full((9, 4), np.nan)}, ValueError, "k must be finite"),
        ({"q": np.ones((3, 4)), "k": np.ones((3, 4))}, ValueError, "at least 4 tokens, got 3"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        recommend(**({"q": np.ones((9, 4)), "k": np.ones((9, 4))} | change))
