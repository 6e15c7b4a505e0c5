"""How far the next forecast is to be trusted: the standard error of moves that overlap."""

import math
import sys
import time
import tracemalloc

import numpy as np
import pytest

from favor_np import measure
from favor_np.forecast import compare_with_exact, forecast
from favor_np.forecast._next import error_of_mean_return, error_of_mean_size

WALKS = 250


def walks(count):
    rng = np.random.default_rng(5)
    return 100 * np.exp(np.cumsum(0.006 * rng.standard_normal((WALKS, count)), axis=1))


@pytest.mark.parametrize("horizon", [1, 5, 24, 48])
def test_the_next_move_of_a_random_walk_is_within_its_standard_errors(horizon):
    """Their z has a standard deviation of 1, although the moves of 48 steps overlap 48-fold."""
    z, bold = [], 0
    for prices in walks(1500):
        step = forecast(prices, horizon=horizon, num_features=16, calibration="none").next
        z.append(step.exact / step.standard_error)
        bold += abs(z[-1]) > 2
    assert 0.9 < np.std(z) < 1.15
    assert abs(np.mean(z)) < 0.25
    assert bold < 0.09 * WALKS


@pytest.mark.parametrize("horizon", [1, 5, 24, 48])
def test_the_next_size_of_a_random_walk_is_within_its_standard_errors(horizon):
    truth = 0.006 * math.sqrt(2 / math.pi * horizon)
    options = {"target": "volatility", "horizon": horizon, "num_features": 16}
    steps = [forecast(prices, calibration="none", **options).next for prices in walks(800)]
    z = [(step.exact - truth) / step.standard_error for step in steps]
    assert 0.85 < np.std(z) < 1.2


def test_the_error_of_a_mean_of_returns_is_the_sum_of_all_covariances():
    """Over many draws of uncorrelated steps of uneven size, against the definition."""
    rng, horizon, count = np.random.default_rng(0), 4, 30
    weights = rng.random(count)
    weights /= weights.sum()
    ratio, size = np.exp(rng.standard_normal(count)), np.exp(rng.standard_normal(count + 3))
    variance = 0.0
    for j in range(count):
        for k in range(max(0, j - 3), min(count, j + 4)):
            both = np.arange(max(j, k), min(j, k) + horizon)
            variance += weights[j] * weights[k] * ratio[j] * ratio[k] * (size[both] ** 2).sum()
    found = [
        error_of_mean_return(weights, ratio, size * rng.standard_normal(count + 3), horizon)[0]
        for _ in range(4000)
    ]
    assert np.mean(np.square(found)) == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("horizon", [1, 3])
def test_the_variance_of_a_mean_of_returns_has_no_bias(horizon):
    """It is a quadratic form of the steps: over unit vectors it adds up to its expectation."""
    weights = np.array([0.6, 0.3, 0.1])
    steps = np.eye(len(weights) + horizon - 1)
    found = [error_of_mean_return(weights, np.ones(3), step, horizon)[0] for step in steps]
    counted = np.convolve(weights, np.ones(horizon))
    assert np.square(found).sum() == pytest.approx(np.square(counted).sum())


def test_the_effective_number_of_windows():
    """Equal weights: as many as fit side by side; without overlap 1 / sum of squares."""
    rng = np.random.default_rng(0)
    weights = rng.random(50)
    weights /= weights.sum()
    steps = rng.standard_normal(99)
    expected = 1 / (weights @ weights)
    for found in (
        error_of_mean_return(weights, np.ones(50), steps[:50], 1),
        error_of_mean_size(weights, abs(steps[:50]), 1),
    ):
        assert found[1] == pytest.approx(expected)
    apart = np.where(np.arange(46) % 5 == 0, 0.1, 0.0)  # ten moves of five steps, side by side
    assert error_of_mean_return(apart, np.ones(46), steps[:50], 5)[1] == pytest.approx(10)
    assert error_of_mean_size(apart, abs(steps[:46]), 5)[1] == pytest.approx(10)
    equal = np.full(2000, 1 / 2000)
    assert error_of_mean_return(equal, equal, np.ones(2019), 20)[1] == pytest.approx(100, rel=0.02)


def test_sizes_that_overlap_correlate_as_gaussian_ones_do():
    rng, horizon = np.random.default_rng(0), 6
    sums = np.lib.stride_tricks.sliding_window_view(rng.standard_normal(400_000), horizon).sum(1)
    sizes = abs(sums)
    for lag in range(1, horizon):
        weights = np.zeros(horizon + 1)
        weights[[0, lag]] = 0.5
        expected = np.corrcoef(sizes[lag:], sizes[:-lag])[0, 1]
        number = error_of_mean_size(weights, np.arange(horizon + 1.0), horizon)[1]
        assert 2 / number - 1 == pytest.approx(expected, abs=0.01)


def test_one_window_alone_says_nothing_of_its_error():
    prices = walks(300)[0]
    for target in ("return", "volatility"):
        step = forecast(prices, target=target, scale=1e4, num_features=16).next
        assert step.precedents == pytest.approx(1)
        assert step.standard_error == math.inf


def test_a_forecast_measures_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("measured")

    prices = walks(400)[0]
    expected = forecast(prices, num_features=16)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "peak_memory", refuse)
        patch.setattr(measure, "best_time", refuse)
        patch.setattr(tracemalloc, "start", refuse)
        patch.setattr(time, "perf_counter", refuse)
        runs = []
        forecast(prices, num_features=16, progress=lambda *step: runs.append(step))
    assert runs == [("FAVOR+ attention", 256, 367), ("FAVOR+ attention", 367, 367)]
    compared = compare_with_exact(expected)
    assert compared.favor_seconds > 0
    assert compared.favor_peak_bytes > 0
    assert compared.calibration_seconds > 0
    plain = compare_with_exact(forecast(prices, num_features=16, calibration="none"))
    assert plain.calibration_seconds == 0
    assert "favor_np.measure" in sys.modules
