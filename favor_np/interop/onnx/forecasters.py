"""Forecasters of `favor_np.forecast` in ONNX operators, from the last returns on.

What a model looks at is computed in float64, as favor_np does: rows are (batch, positions, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import nn, validation
from favor_np.forecast import HAR, PerformerForecaster
from favor_np.forecast._inputs import SCALE_DECAY, WIDEST, Memory
from favor_np.interop.onnx import forms
from favor_np.interop.onnx.graph import DOUBLE, Graph
from favor_np.interop.onnx.layers import Rows, Writer

Array: TypeAlias = npt.NDArray[Any]


def check(forecaster: Any, coverage: float) -> None:
    """TypeError if it is none that can be exported, ValueError if it is not fitted."""
    if type(forecaster) not in WRITERS:
        kinds = " or ".join(kind.__name__ for kind in WRITERS)
        raise TypeError(
            f"model must be a layer of favor_np.nn, or a {kinds}, got {validation.got(forecaster)}"
        )
    if not hasattr(forecaster, WRITERS[type(forecaster)][1]):
        raise ValueError("the forecaster must be fitted first: fit(X, y)")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, got {coverage}")


def write(w: Writer, forecaster: Any, coverage: float) -> None:
    """Write a forecaster, with its input and its outputs."""
    WRITERS[type(forecaster)][0](w, forecaster, coverage)


def performer(w: Writer, forecaster: PerformerForecaster, coverage: float) -> None:
    """Write a regression and the Performers that add to it."""
    g, horizons = w.g, len(forecaster.horizons)
    x = forms.double(g, w.takes("x", g.type, forecaster.n_features_in_))
    made = columns(w, forecaster.memory_, x)
    params = nn.astype(forecaster.params_, g.real)
    found = w.write(forecaster.model_, params, Rows(forms.real(g, made.name), made.width))
    output = forms.double(g, found.name)
    named = {}
    if forecaster.target == "return":
        named["mean"], output = g.several("Split", [output, [horizons, horizons]], 2, axis=2)
    named["variance"] = g.Exp(output)
    named["volatility"] = scale = g.Sqrt(named["variance"])
    upper = g.Mul(scale, forecaster._quantiles(coverage))
    lower = g.Neg(upper)
    if "mean" in named:
        named["mean"] = mean = g.Mul(named["mean"], scale)
        lower, upper = g.Add(mean, lower), g.Add(mean, upper)
    results(w, horizons, **named)
    interval = g.Concat(g.Unsqueeze(lower, [3]), g.Unsqueeze(upper, [3]), axis=3)
    w.output("interval", forms.real(g, interval), "batch", "positions", horizons, 2)


def har(w: Writer, forecaster: HAR, _coverage: float) -> None:
    """Write a regression on logarithms of mean squares."""
    g = w.g
    returns = forms.double(g, w.takes("x", g.type, 1))
    logs = logarithms(g, mean_squares(w, g.Mul(returns, returns), forecaster.spans), forecaster)
    intercept, *slopes = forecaster.coefficients_
    variance = g.Exp(g.Add(g.MatMul(logs, np.array(slopes)[:, None]), np.array(intercept)))
    results(w, 1, variance=variance, volatility=g.Sqrt(variance))


def results(w: Writer, horizons: int, **named: str) -> None:
    """Declare outputs (batch, positions, horizons), made of numbers of float64."""
    for name, x in named.items():
        w.output(name, forms.real(w.g, x), "batch", "positions", horizons)


def columns(w: Writer, memory: Memory, x: str) -> Rows:
    """Return the standardised columns that `Memory` makes, of float64."""
    g, floor = w.g, np.array(memory.floor_)
    returns = g.Slice(x, [0], [1], [2])
    squares = g.Mul(returns, returns)
    sizes, scale = g.several(
        "Split",
        [averages(w, squares, (*memory.decays, SCALE_DECAY)), [len(memory.decays), 1]],
        2,
        axis=2,
    )
    relative = g.Div(returns, g.Sqrt(g.Max(scale, floor)))
    relative = g.Clip(relative, np.array(-WIDEST), np.array(WIDEST))
    means = mean_squares(w, squares, memory.spans)
    parts = [logarithms(g, g.Concat(sizes, means, axis=2), memory)]
    parts += [averages(w, relative, memory.signed), g.Slice(x, [1], [2**62], [2])]
    made = g.Sub(g.Concat(*parts, axis=2), memory.centre_)
    return Rows(g.Div(made, memory.spread_), memory.centre_.size)


def averages(w: Writer, values: str, decays: tuple[float, ...]) -> str:
    """Return means of all values (batch, positions, 1) so far, a column a decay."""
    g, rates = w.g, np.array(decays)
    if not decays:
        return g.Slice(values, [0], [0], [2])
    body = Graph(g.opset, np.dtype(np.float64), g)
    total, now = body.takes("total", "now")
    total = body.Add(body.Mul(total, rates), now)
    once = body.gives("average", total, body.Identity(total))
    # One row more: a Scan over none ends onnxruntime.
    rows = g.Transpose(g.Pad(values, [0] * 4 + [1, 0], np.array(0.0)), perm=[1, 0, 2])
    rows = g.Mul(rows, 1 - rates)
    start = g.Mul(g.Gather(rows, 0), np.array(0.0))
    _, rows = g.several("Scan", [start, rows], 2, body=once, num_scan_inputs=1)
    found = g.Slice(g.Transpose(rows, perm=[1, 0, 2]), [0], w.count, [1])
    return g.Div(found, g.Sub(np.array(1.0), g.Pow(rates, numbers(w))))


def mean_squares(w: Writer, squares: str, spans: tuple[int, ...]) -> str:
    """Return means of the last squares (batch, positions, 1), a column a span.

    They are made of sums of 1, 2, 4, ... squares: differences of long sums would be wrong where a
    runtime computes in float32 whatever it is told, as OpenVINO does.
    """
    g = w.g

    def earlier(x: str, rows: int) -> str:
        return g.Slice(g.Pad(x, [0, rows, 0, 0, 0, 0], np.array(0.0)), [0], w.count, [1])

    if not spans:
        return g.Slice(squares, [0], [0], [2])
    sums = [squares]
    while 2 ** len(sums) <= max(spans):
        sums.append(g.Add(sums[-1], earlier(sums[-1], 2 ** (len(sums) - 1))))
    means = []
    for span in spans:
        bits = [bit for bit in range(len(sums)) if span >> bit & 1]
        total = g.Sum(*(earlier(sums[bit], span % 2**bit) for bit in bits))
        means.append(g.Div(total, g.Min(numbers(w), np.array(float(span)))))
    return g.Concat(*means, axis=2)


def logarithms(g: Graph, sizes: str, memory: Memory | HAR) -> str:
    """Return logarithms of sizes, small ones counting as a floor."""
    return g.Log(g.Max(sizes, np.array(memory.floor_)))


def numbers(w: Writer) -> str:
    """Return how many rows there are up to each, (positions, 1) of float64."""
    g = w.g
    count = g.Add(g.Squeeze(w.count, [0]), 1)
    return g.Unsqueeze(g.Cast(g.Range(1, count, 1), to=DOUBLE), [1])


#: How forecasters are written, and what those that are fitted have.
WRITERS: dict[type[Any], tuple[Callable[[Writer, Any, float], None], str]] = {
    HAR: (har, "coefficients_"),
    PerformerForecaster: (performer, "params_"),
}
