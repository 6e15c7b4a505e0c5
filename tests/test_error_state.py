"""NumPy's error state is the caller's: `np.seterr` neither breaks a call nor is it changed by one."""

import numpy as np
import pytest

import favor_np
from favor_np import calibration, compare
from favor_np import forecast as prices

rng = np.random.default_rng(0)
Q, K, V = rng.standard_normal((3, 2, 120, 8), np.float32)
FM = favor_np.feature_map("positive", dim=8, num_features=32, rng=0)


def forecast(target, **options):
    """Everything of a forecast; a spike, a crash, and a series without a move for long."""
    walk = 50 * np.exp(np.cumsum(0.01 * np.random.default_rng(1).standard_normal(420)))
    walk[100:150] = walk[100]
    walk[200] = 1e-10
    result = prices.forecast(walk, target=target, num_features=16, **options)
    record, exact = prices.evaluate(result), prices.compare_with_exact(result)
    bars, replayed = prices.error_bars(result), prices.replay(result)
    prices.plot(result, record, exact, bars, replayed)
    return [result.predicted, result.next.standard_error, bars.standard_error, replayed.predicted]


def stream():
    out = np.zeros((120, 8), np.float32)
    favor_np.stream_attention(30 * Q[0], 30 * K[0], V[0], FM, out, causal=True, chunk_size=50)
    return out


CALLS = {
    "recommend": lambda: [favor_np.recommend(30 * Q, 30 * K).exact],
    "recommend causal": lambda: [bool(favor_np.recommend(Q, K, target_error=0.5, causal=True).reason)],
    "diagnose": lambda: favor_np.diagnose(30 * Q, 30 * K, V, FM, causal=True).standard_error,
    "kernel_variance": lambda: favor_np.kernel_variance(9 * Q[0], 9 * K[0], FM, relative=True),
    "attention_weights": lambda: favor_np.attention_weights(30 * Q, 30 * K, FM),
    "features": lambda: (FM.query_features(9 * Q), FM.key_features(9 * K)),
    "attention": lambda: favor_np.favor_attention(30 * Q, 30 * K, V, FM, causal=True),
    "window": lambda: favor_np.favor_attention(30 * Q, 30 * K, V, FM, causal=True, window=9),
    "exact": lambda: favor_np.exact_attention(1e4 * Q, K, V),
    "gradient": lambda: favor_np.favor_attention_vjp(30 * Q, 30 * K, V, FM)[1](V).v,
    "stream": stream,
    "returns": lambda: forecast("return"),
    "returns, sharp": lambda: forecast("return", scale=1e3, horizon=5),
    "volatility": lambda: forecast("volatility", horizon=5),
    "volatility, sharp": lambda: forecast("volatility", scale=1e3),
    "compare": lambda: [
        row.mean
        for row in compare.compare(
            compare.Setting("gaussian", dim=8, std=20.0),
            features=[16], seeds=1, error_length=64, lengths=[64], time_features=[16],
        ).errors
    ],
    **{
        f"calibrate {method}": lambda method=method: FM.calibrate(30 * Q, 30 * K, method)
        .calibration.quadratic
        for method in ("auto", *calibration.METHODS)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_callers_error_state_has_no_say_and_stays(name):
    expected = CALLS[name]()
    with np.errstate(all="raise"):
        before = np.geterr()
        found = CALLS[name]()
        assert np.geterr() == before
    if not isinstance(expected, (list, tuple)):
        expected, found = [expected], [found]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_live_forecast_among_raised_errors():
    live = prices.LiveForecast(target="volatility", num_features=16)
    with np.errstate(all="raise"):
        for price in 50 + np.cumsum(rng.standard_normal(400)) / 10:
            live.push(price)
            live.push(price)
        assert set(np.geterr().values()) == {"raise"}
