"""Calls of forecasts, and of the bridges to other libraries."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from favor_np import cli, compare, forecast

from .attention import BOTH, GROUPED, MIXED, Cases, content, make, take, tensors
from .objects import METHODS, WAYS

RECORD = {
    "volatility": "start stop rmse r2 z rmse_constant rmse_ewma r2_ewma constant ewma",
    "return": "start stop rmse r2 z moves hits hit_low hit_high up_share rmse_zero coverage signals "
    "threshold base_rate z_hits z_thinned steps_per_year year hit_rate",
}
TRADING = "equity turnover trades sharpe sharpe_error"
RESULT = "index predicted spread chance chance_down outcome mean_s scale warm_up weight_error"
NEXT = "time price move spread chance chance_down exact standard_error precedents"


def told(prices: Any, **options: Any) -> Any:
    """Return all that a forecast has, and what is made of it."""
    result = forecast.forecast(prices, **options)
    similar = [take(x, "time weight move") for x in result.next.similar]
    bars, exact = forecast.error_bars(result), forecast.compare_with_exact(result)
    record = forecast.evaluate(result, cost=1e-4)
    ways = [getattr(record, way) for way in ("strategy", "hold", "steady") if hasattr(record, way)]
    return [
        take(result, RESULT),
        [take(result.next, NEXT), similar],
        take(record, RECORD[result.target]),
        [take(way, TRADING) for way in ways],
        take(bars, "standard_error effective_sample_size warnings"),
        take(exact, "predicted rows correlation rmse spread"),
        take(forecast.replay(result), "predicted signals difference"),
    ]


def lived(prices: list[float], way: str, **options: Any) -> Any:
    """Push prices, and leave by some way in their midst."""
    live: Any = forecast.LiveForecast(**options)
    found: list[Any] = []
    for number, price in enumerate(prices):
        tick = live.push(price)
        found.append(tick and take(tick, "price move spread chance chance_down signal"))
        if number in (20, 350):
            live = WAYS[way](live)
            found.append(live.calibrate())
    return [found, content(live.state)]


def program() -> Any:
    """Run the program; return the table that it wrote."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        table = Path(folder, "table.csv")
        status = cli.main(["forecast", "--features", "64", "--window", "8", "--csv", str(table)])
        return status, table.read_bytes()


def compared() -> Any:
    """Return the errors of all kinds of maps."""
    setting = compare.Setting(causal=True)
    sizes = {"features": [16, 64], "lengths": [64], "time_features": [16]}
    found = compare.compare(setting, error_length=200, seeds=2, **sizes)  # type: ignore[arg-type]
    return [take(row, "features method mean spread") for row in found.errors]


def forecasts() -> Cases:
    """Give forecasts of the bundled prices, their records, and live ones."""
    known = forecast.read_prices()
    yield "prices", partial(take, known, "values times name column rows order note step")
    assert known.times is not None
    series = forecast.Prices(known.values[-900:], known.times[-900:])
    targets = "return", "volatility"
    for target, method, threads in product(targets, ("none", *METHODS), (1, 2)):
        options = {"target": target, "calibration": method, "num_threads": threads}
        call = partial(told, series, num_features=128, **options)
        yield f"forecast {target} {method} {threads}", call
    for target, window, horizon in product(targets, (4, 33), (1, 5)):
        options = {"target": target, "window": window, "horizon": horizon, "num_features": 64}
        call = partial(told, known.values[:1500], scale=0.1, seed=2, **options)
        yield f"forecast {target} {window} {horizon}", call
        for way in ("same", "pickle"):
            call = partial(lived, known.values[:500].tolist(), way, seed=3, **options)
            yield f"live {target} {window} {horizon} {way}", call
    yield "program", program
    yield "comparison", compared


def bridge(library: str, causal: bool, dtype: str, grouped: bool) -> Any:
    """Attend, and pull back where that can be done, with the arrays of another library."""
    module = importlib.import_module(f"favor_np.interop.{library}")
    shape: dict[str, Any] = GROUPED if grouped else {}
    arrays = tensors(dtype=dtype, **shape)
    options: dict[str, Any] = {"causal": causal} | (MIXED if grouped else {})
    run = partial(module.favor_attention, feature_map=make("pair"), **options)
    if library == "dask":
        import dask.array as da

        chunks = *(-1 for _ in arrays[0].shape[:-2]), 40, -1
        return run(*(da.from_array(x, chunks=chunks) for x in arrays)).compute()
    if library == "torch":
        import torch

        leaves = [torch.from_numpy(x).requires_grad_() for x in arrays]
        out = run(*leaves)
        return [x.detach().numpy() for x in (out, *torch.autograd.grad(out, leaves, out.detach()))]
    if library == "jax":
        import jax

        out, pull = jax.vjp(run, *map(jax.numpy.asarray, arrays))
        return [np.asarray(x) for x in (out, *pull(out))]
    from autograd import elementwise_grad

    return [run(*arrays), *(elementwise_grad(run, i)(*arrays) for i in range(3))]


def bridges() -> Cases:
    """Give calls of other libraries; where one is missing, its digests differ."""
    libraries = "autograd", "dask", "jax", "torch"
    for library, causal, dtype, grouped in product(libraries, BOTH, ("f4", "f8"), BOTH):
        call = partial(bridge, library, causal, dtype, grouped)
        yield f"{library} {dtype} causal={causal} grouped={grouped}", call
