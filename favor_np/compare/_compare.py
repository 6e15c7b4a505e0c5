"""What `favor-np compare` measures: errors of every method, time and memory by length."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from favor_np import validation
from favor_np.attention import favor_attention
from favor_np.cpu.threads import resolve_threads
from favor_np.exact import exact_attention
from favor_np.features import FeatureMap, feature_map
from favor_np.figures import style
from favor_np.measure import best_time, peak_memory
from favor_np.progress import Progress, reporting

from ._data import Array, Tokens, tokens
from ._methods import DEFAULT, METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERROR_LENGTH = 1024  # tokens on which errors are measured
TARGET = 0.1  # the error that the advice counts features for
HOPELESS = 0.3  # error of the best map above which the advice is exact attention at any length


@dataclasses.dataclass(frozen=True)
class Setting:
    """Queries, keys and values, and how attention to them is computed.

    Parameters
    ----------
    data : str
        Queries and keys whose errors are measured: the windows of returns ("prices") or of log
        absolute returns ("volatility") that `favor_np.forecast` makes of the bundled prices,
        "gaussian" ones, or an .npz file with arrays ``q`` and ``k`` (..., L, d).  Maps are
        calibrated on the first half of the tokens, or on ``known_q`` and ``known_k`` of the file,
        and attention is computed for the rest.  Values are Gaussian.
    dim : int
        Size of a Gaussian query, key and value, and of those of the timed calls.
    std : float
        Standard deviation of Gaussian queries and keys; the error grows steeply with it.
    causal : bool
        Causal or bidirectional attention.
    seed : int
        Seed of the data, and the first one of the projections.
    num_threads : int, optional
        Threads of both sides; None leaves it to the library. One is the fair measure: with
        several heads both sides gain alike from more.
    """

    data: str = "prices"
    dim: int = 64
    std: float = 0.35
    causal: bool = False
    seed: int = 0
    num_threads: int | None = 1

    def __post_init__(self) -> None:
        """Check the values."""
        validation.integer("dim", self.dim)
        validation.positive_float("std", self.std)
        validation.flag("causal", self.causal)
        validation.integer("seed", self.seed, minimum=0)
        if self.num_threads is not None:
            validation.integer("num_threads", self.num_threads)

    def tokens(self, length: int) -> Tokens:
        """Queries and keys whose errors are measured, and those that maps may know."""
        found = tokens(self.data, length, self.dim, self.std, self.seed)
        if self.causal and found.q.shape != found.k.shape:
            raise ValueError(
                f"{self.data}: causal attention needs as many queries as keys, got "
                f"{found.q.shape[1]} and {found.k.shape[1]}"
            )
        return found

    def inputs(self, length: int) -> list[Array]:
        """Gaussian queries, keys and values, each (length, dim), float32, for the timed calls."""
        rng = np.random.default_rng(self.seed)
        scales = (self.std, self.std, 1.0)
        return [s * rng.standard_normal((length, self.dim), np.float32) for s in scales]

    def exact(
        self, inputs: Sequence[Array], scale: float | None = None, window: int | None = None
    ) -> Array:
        """Softmax attention; with a window it is causal."""
        q, k, v = inputs
        causal = self.causal or window is not None
        return exact_attention(
            q, k, v, causal=causal, window=window, scale=scale, num_threads=self.num_threads
        )

    def favor(self, inputs: Sequence[Array], fm: FeatureMap, window: int | None = None) -> Array:
        """Its estimate by random features."""
        q, k, v = inputs
        causal = self.causal or window is not None
        return favor_attention(
            q, k, v, fm, causal=causal, window=window, num_threads=self.num_threads
        )


@dataclasses.dataclass(frozen=True)
class ErrorRow:
    """Error of one method at one number of features, over several draws of the projection.

    ``mean`` and ``spread`` are the mean and the standard deviation, over the draws, of the
    root-mean-square error of the output divided by the root-mean-square of the exact output.
    """

    features: int
    method: str
    mean: float
    spread: float


@dataclasses.dataclass(frozen=True)
class CostRow:
    """Seconds, and extra bytes with the result included, of one call at one length."""

    length: int
    features: int
    favor_seconds: float
    exact_seconds: float
    favor_bytes: int
    exact_bytes: int

    @property
    def speedup(self) -> float:
        """How many times faster the default map was."""
        return self.exact_seconds / self.favor_seconds

    @property
    def matrix_bytes(self) -> int:
        """What the L x L matrix of weights takes, which neither side ever stores."""
        return 4 * self.length**2


@dataclasses.dataclass(frozen=True)
class WindowRow:
    """Seconds of one causal call with a window: of exact attention and of the default map.

    ``whole_seconds`` are those of the map without a window.
    """

    window: int
    length: int
    features: int
    favor_seconds: float
    whole_seconds: float
    exact_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster exact attention was."""
        return self.favor_seconds / self.exact_seconds


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` measured: ``crossings`` has the length where the default map wins.

    ``tokens`` has the shape (heads, L, d) of the queries whose errors were measured.
    """

    setting: Setting
    machine: dict[str, Any]
    tokens: tuple[int, ...]
    seeds: int
    errors: list[ErrorRow]
    costs: list[CostRow]
    crossings: dict[int, float | None]
    windows: list[WindowRow]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, ready for JSON."""
        result = dataclasses.asdict(self)
        for row, cost in zip(result["costs"], self.costs, strict=True):
            row |= {"speedup": cost.speedup, "matrix_bytes": cost.matrix_bytes}
        for row, timed in zip(result["windows"], self.windows, strict=True):
            row["speedup"] = timed.speedup
        result["crossings"] = {str(m): length for m, length in self.crossings.items()}
        return result | {"default": DEFAULT.name, "advice": self.advice()}

    def error(self, method: str, features: int) -> ErrorRow:
        """Return the error of a method with a number of features."""
        return next(r for r in self.errors if (r.method, r.features) == (method, features))

    def advice(self) -> list[str]:
        """Say in sentences when exact attention is to be preferred."""
        return [*_advice_on_time(self), *_advice_on_windows(self), *_advice_on_error(self)]

    @validation.own_error_state
    def plot(self) -> Figure:
        """Draw error, time and memory, and beneath them the weights of both kinds of attention.

        Returns
        -------
        matplotlib.figure.Figure
            Ready for ``savefig``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        with style():
            from ._plot import draw

            return draw(self)


@validation.own_error_state
def compare(
    setting: Setting | None = None,
    *,
    features: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    error_length: int = ERROR_LENGTH,
    seeds: int = 8,
    lengths: Sequence[int] = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    time_features: Sequence[int] = (64, 256),
    windows: Sequence[int] = (64, 256, 1024, 4096),
    progress: bool | Progress | None = None,
) -> Comparison:
    """Measure FAVOR+ against exact attention: error by features, time and memory by length.

    Time also by window, at the greatest length.

    Parameters
    ----------
    setting : Setting, optional
        Data and kind of attention.
    features : sequence of int
        Numbers of features whose error is measured; even, for the antithetic maps.
    error_length : int
        Length of the sequence on which it is measured, where the data has as much.
    seeds : int
        How many projections are drawn for each error.
    lengths : sequence of int
        Lengths whose time and memory are measured.
    time_features : sequence of int
        Numbers of features of the timed maps, which are those that `feature_map` makes by default:
        "antithetic" among the methods.
    windows : sequence of int
        Windows whose time is measured, those that are shorter than the greatest length.
    progress : bool or callable, optional
        As `stream_attention`.

    Returns
    -------
    Comparison
        Errors, costs and crossing points.

    Raises
    ------
    TypeError, ValueError
        If a count is not a positive integer, a number of features is odd, or the data of the
        setting is no file of queries and keys.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> from favor_np.compare import compare
    >>> result = compare(features=[256], lengths=[64], time_features=[32])
    >>> result.error("auto", 256).mean < 0.7 * result.error("FAVOR+", 256).mean
    True
    """
    setting, reported = setting or Setting(), reporting(progress)
    for name, counts in {"features": features, "time_features": time_features}.items():
        odd = [m for m in counts if validation.integer(name, m) % 2]
        if odd:
            raise ValueError(f"{name} must be even, got {odd[0]}")
    for name, counts in {"length": (*lengths, error_length), "window": windows}.items():
        for count in counts:
            validation.integer(name, count)
    validation.integer("seeds", seeds)

    longest = max(lengths, default=0)
    windows = [window for window in windows if window < longest]
    total = len(features) * len(METHODS) + len(lengths) * (1 + len(time_features))
    total += len(windows) * len(time_features)
    data = setting.tokens(error_length)
    work = chain(
        _errors(setting, data, features, seeds),
        _costs(setting, lengths, time_features),
        _window_costs(setting, longest, windows, time_features),
    )
    errors: list[ErrorRow] = []
    costs: list[CostRow] = []
    by_window: list[WindowRow] = []
    with reported as report:
        for done, rows in enumerate(work, start=1):
            errors += [row for row in rows if isinstance(row, ErrorRow)]
            costs += [row for row in rows if isinstance(row, CostRow)]
            by_window += [row for row in rows if isinstance(row, WindowRow)]
            report("comparing", done, total)
    crossings = {}
    for m in time_features:
        rows_of_m = [row for row in costs if row.features == m]
        crossings[m] = crossing([r.length for r in rows_of_m], [r.speedup for r in rows_of_m])
    machine = _machine(resolve_threads(setting.num_threads))
    return Comparison(setting, machine, data.q.shape, seeds, errors, costs, crossings, by_window)


#: What is measured step by step.
Row: TypeAlias = ErrorRow | CostRow | WindowRow


def crossing(lengths: Sequence[int], speedups: Sequence[float]) -> float | None:
    """Return the length from which the speed-up stays above 1, interpolated in logarithms.

    Parameters
    ----------
    lengths : sequence of int
        Lengths.
    speedups : sequence of float
        How many times faster random features were at each.

    Returns
    -------
    float or None
        None when it is slower at the greatest length; the least length when it never is.

    Examples
    --------
    >>> from favor_np.compare import crossing
    >>> round(crossing([100, 400], [0.5, 2.0]))
    200
    """
    pairs = sorted(zip(lengths, speedups, strict=True))
    points = [(math.log(x), math.log(gain)) for x, gain in pairs]
    slower = [i for i, (_, gain) in enumerate(points) if gain < 0]
    if not points or (slower and slower[-1] == len(points) - 1):
        return None
    if not slower:
        return float(min(lengths))
    (x0, y0), (x1, y1) = points[slower[-1] : slower[-1] + 2]
    return math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))


def _errors(
    setting: Setting, data: Tokens, features: Sequence[int], seeds: int
) -> Iterator[Sequence[Row]]:
    """Yield the errors row by row."""
    values = np.random.default_rng(setting.seed).standard_normal(data.k.shape)
    exact = setting.exact([data.q.astype(np.float64), data.k, values], data.scale)
    inputs = [data.q, data.k, values.astype(np.float32)]
    size = np.mean(exact**2)
    draws = range(setting.seed, setting.seed + seeds)
    for count in features:
        for method in METHODS:
            errors = []
            for seed in draws:
                out = setting.favor(inputs, method.feature_map(data, count, seed))
                errors.append(math.sqrt(np.mean((out - exact) ** 2) / size))
            mean, spread = float(np.mean(errors)), float(np.std(errors))
            yield [ErrorRow(count, method.name, mean, spread)]


def _costs(
    setting: Setting, lengths: Sequence[int], time_features: Sequence[int]
) -> Iterator[Sequence[Row]]:
    """Yield time and memory, length by length."""
    for length in lengths:
        inputs = setting.inputs(length)
        setting.exact(inputs)  # compiles
        exact_bytes, exact_seconds = _cost(partial(setting.exact, inputs))
        yield []
        for count in time_features:
            fm = feature_map("positive", dim=setting.dim, num_features=count, rng=setting.seed)
            setting.favor(inputs, fm)
            favor_bytes, favor_seconds = _cost(partial(setting.favor, inputs, fm))
            yield [CostRow(length, count, favor_seconds, exact_seconds, favor_bytes, exact_bytes)]


def _window_costs(
    setting: Setting, length: int, windows: Sequence[int], time_features: Sequence[int]
) -> Iterator[Sequence[Row]]:
    """Yield the time of causal calls with a window, map by map."""
    inputs = setting.inputs(length)
    causal = dataclasses.replace(setting, causal=True)
    exact = {window: _seconds(partial(causal.exact, inputs, window=window)) for window in windows}
    for count in time_features:
        fm = feature_map("positive", dim=setting.dim, num_features=count, rng=setting.seed)
        whole = _seconds(partial(causal.favor, inputs, fm)) if windows else 0.0
        for window in windows:
            seconds = _seconds(partial(causal.favor, inputs, fm, window))
            yield [WindowRow(window, length, count, seconds, whole, exact[window])]


def _advice_on_time(result: Comparison) -> list[str]:
    """Where exact attention is faster."""
    if not result.costs:
        return []
    longest = max(row.length for row in result.costs)
    lengths = " and ".join(
        f"{f'{longest:,} at least' if length is None else f'{length:,.0f}'} (m = {m:,})"
        for m, length in result.crossings.items()
    )
    return [f"Prefer exact attention for lengths below {lengths}: there it is faster."]


def _advice_on_windows(result: Comparison) -> list[str]:
    """Up to which window exact attention is faster."""
    if not result.windows:
        return []
    limits = {"favor_seconds": [], "whole_seconds": []}  # type: dict[str, list[str]]
    for name, parts in limits.items():
        for m in dict.fromkeys(row.features for row in result.windows):
            rows = [row for row in result.windows if row.features == m]
            gains = [row.exact_seconds / getattr(row, name) for row in rows]
            window = crossing([row.window for row in rows], gains)
            most = max(row.window for row in rows)
            parts.append(
                f"{f'{most:,} at least' if window is None else f'{window:,.0f}'} (m = {m:,})"
            )
    same, whole = (" and ".join(parts) for parts in limits.values())
    return [
        f"With a window, prefer it up to {same} positions: there it is faster than random features "
        f"with the same window, and up to {whole} faster than those that see everything."
    ]


def _advice_on_error(result: Comparison) -> list[str]:
    """What errors are to be expected, and how many features it takes to have fewer."""
    if not result.errors:
        return []
    most = max(row.features for row in result.errors)
    best = min((row for row in result.errors if row.features == most), key=lambda row: row.mean)
    if best.mean > HOPELESS:
        return [
            f"Prefer it at any length for queries and keys like these: with {most:,} features the "
            f"best map, {best.method}, is still off by {best.mean:.0%} of the output."
        ]
    advice = (
        f"Prefer it where an error of {best.mean:.1%} of the output is too much: that is what the "
        f"best map here, {best.method}, has with {most:,} features."
    )
    if best.mean > TARGET:
        return [advice]
    least = {
        name: min(
            (row.features for row in result.errors if row.method == name and row.mean <= TARGET),
            default=None,
        )
        for name in (DEFAULT.name, best.method)
    }
    marked = {DEFAULT.name: f"{DEFAULT.name} (the default)"}
    needs = " and ".join(
        f"{f'over {most:,}' if m is None else f'{m:,}'} with {marked.get(name, name)}"
        for name, m in least.items()
    )
    return [f"{advice} An error of {TARGET:.0%} takes {needs}."]


def _seconds(call: Callable[[], object]) -> float:
    call()  # compiles
    return best_time(call)


def _cost(call: Callable[[], object]) -> tuple[int, float]:
    return peak_memory(call), best_time(call)


def _machine(threads: int) -> dict[str, Any]:
    """Name the processor and the versions that a measured number depends on."""
    from numba import __version__ as numba_version

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "processor": name,
        "cpus": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba_version,
    }
