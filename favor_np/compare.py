"""FAVOR+ beside exact softmax attention: error, time and memory, measured on this machine."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.attention import favor_attention
from favor_np.exact import exact_attention
from favor_np.features import FeatureMap, feature_map
from favor_np.figures import BLUE, GREEN, INK, ORANGE, RED, STYLE, require_matplotlib
from favor_np.measure import best_time, peak_memory
from favor_np.threads import resolve_threads
from favor_np.weights import attention_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "CostRow", "ErrorRow", "Setting", "compare", "crossing"]

COLORS = (BLUE, ORANGE, GREEN, RED)
POSITIONS, BEND = 96, 8.0  # of the path whose weights are drawn: its length, and that of a bend
VARIANTS = (("iid", False), ("iid", True), ("orthogonal", False), ("orthogonal", True))

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One head of Gaussian queries, keys and values, and how attention to them is computed.

    Parameters
    ----------
    dim : int
        Size of a query, key and value.
    std : float
        Standard deviation of queries and keys; the error grows steeply with it.
    causal : bool
        Causal or bidirectional attention.
    seed : int
        Seed of the data, and the first one of the projections.
    num_threads : int, optional
        Threads of both sides; None leaves it to the library. One is the fair measure: with
        several heads both sides gain alike from more.
    """

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

    def inputs(self, length: int) -> list[Array]:
        """Queries, keys and values, each (length, dim), float32."""
        rng = np.random.default_rng(self.seed)
        scales = (self.std, self.std, 1.0)
        return [s * rng.standard_normal((length, self.dim), np.float32) for s in scales]

    def exact(self, inputs: Sequence[Array]) -> Array:
        """Softmax attention."""
        return exact_attention(*inputs, causal=self.causal, num_threads=self.num_threads)

    def favor(self, inputs: Sequence[Array], fm: FeatureMap) -> Array:
        """Its estimate by random features."""
        q, k, v = inputs
        return favor_attention(q, k, v, fm, causal=self.causal, num_threads=self.num_threads)


@dataclasses.dataclass(frozen=True)
class ErrorRow:
    """Error of one kind of projection at one number of features, over several seeds.

    ``mean`` and ``spread`` are the mean and the standard deviation, over the seeds, of the
    root-mean-square error of the output divided by the root-mean-square of the exact output.
    """

    features: int
    projection: str
    antithetic: bool
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
        """How many times faster FAVOR+ was."""
        return self.exact_seconds / self.favor_seconds

    @property
    def matrix_bytes(self) -> int:
        """What the L x L matrix of weights takes, which neither side ever stores."""
        return 4 * self.length**2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` measured: ``crossings`` has, for each m, the length where FAVOR+ wins."""

    setting: Setting
    machine: dict[str, Any]
    error_length: int
    seeds: int
    errors: list[ErrorRow]
    costs: list[CostRow]
    crossings: dict[int, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, ready for JSON."""
        result = dataclasses.asdict(self)
        for row, cost in zip(result["costs"], self.costs, strict=True):
            row |= {"speedup": cost.speedup, "matrix_bytes": cost.matrix_bytes}
        result["crossings"] = {str(m): length for m, length in self.crossings.items()}
        return result

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
        require_matplotlib()
        from matplotlib import rc_context

        with rc_context(STYLE):
            return _draw(self)


def compare(
    setting: Setting | None = None,
    *,
    features: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    error_length: int = 1024,
    seeds: int = 8,
    lengths: Sequence[int] = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    time_features: Sequence[int] = (64, 256),
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measure FAVOR+ against exact attention: error by features, time and memory by length.

    Parameters
    ----------
    setting : Setting, optional
        Data and kind of attention.
    features : sequence of int
        Numbers of features whose error is measured; even, for the antithetic maps.
    error_length : int
        Length of the sequence on which it is measured.
    seeds : int
        How many projections are drawn for each error.
    lengths : sequence of int
        Lengths whose time and memory are measured.
    time_features : sequence of int
        Numbers of features of the timed maps (orthogonal, antithetic).
    progress : callable, optional
        Called as ``progress(stage, done, total)`` after each step.

    Returns
    -------
    Comparison
        Errors, costs and crossing points.

    Raises
    ------
    TypeError, ValueError
        If a count is not a positive integer, or a number of features is odd.

    Examples
    --------
    >>> from favor_np.compare import Setting, compare
    >>> result = compare(Setting(dim=8), features=[32, 512], lengths=[64], time_features=[32])
    >>> error = {(row.features, row.projection, row.antithetic): row.mean for row in result.errors}
    >>> error[512, "orthogonal", True] < error[32, "orthogonal", True]
    True
    """
    setting = setting or Setting()
    for name, counts in {"features": features, "time_features": time_features}.items():
        odd = [m for m in counts if validation.integer(name, m) % 2]
        if odd:
            raise ValueError(f"{name} must be even, got {odd[0]}")
    for length in (*lengths, error_length):
        validation.integer("length", length)
    validation.integer("seeds", seeds)

    total = len(features) + len(lengths) * (1 + len(time_features))
    work = _measure(setting, features, error_length, seeds, lengths, time_features)
    errors: list[ErrorRow] = []
    costs: list[CostRow] = []
    for done, rows in enumerate(work, start=1):
        errors += [row for row in rows if isinstance(row, ErrorRow)]
        costs += [row for row in rows if isinstance(row, CostRow)]
        if progress is not None:
            progress("comparing", done, total)
    crossings = {}
    for m in time_features:
        rows_of_m = [row for row in costs if row.features == m]
        crossings[m] = crossing([r.length for r in rows_of_m], [r.speedup for r in rows_of_m])
    machine = _machine(resolve_threads(setting.num_threads))
    return Comparison(setting, machine, error_length, seeds, errors, costs, crossings)


def crossing(lengths: Sequence[int], speedups: Sequence[float]) -> float | None:
    """Return the length from which the speed-up stays above 1, interpolated in logarithms.

    Parameters
    ----------
    lengths : sequence of int
        Lengths.
    speedups : sequence of float
        How many times faster FAVOR+ was at each.

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


def _measure(
    setting: Setting,
    features: Sequence[int],
    error_length: int,
    seeds: int,
    lengths: Sequence[int],
    time_features: Sequence[int],
) -> Iterator[Sequence[ErrorRow | CostRow]]:
    """Yield rows step by step."""
    if features:
        inputs = setting.inputs(error_length)
        exact = setting.exact([x.astype(np.float64) for x in inputs])
    for count in features:
        yield [
            _error(setting, inputs, exact, count, kind, antithetic, seeds)
            for kind, antithetic in VARIANTS
        ]
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


def _error(
    setting: Setting,
    inputs: Sequence[Array],
    exact: Array,
    count: int,
    kind: str,
    antithetic: bool,
    seeds: int,
) -> ErrorRow:
    errors = []
    for seed in range(setting.seed, setting.seed + seeds):
        fm = feature_map(
            "positive",
            dim=setting.dim,
            num_features=count,
            projection=kind,
            antithetic=antithetic,
            rng=seed,
        )
        difference = setting.favor(inputs, fm) - exact
        errors.append(math.sqrt(np.mean(difference**2) / np.mean(exact**2)))
    return ErrorRow(count, kind, antithetic, float(np.mean(errors)), float(np.std(errors)))


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


def _draw(result: Comparison) -> Figure:
    """Error by features, time and memory by length; beneath, exact and approximate weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.8), dpi=150, layout="constrained")
    (error, seconds, memory), panels = figure.subplots(2, 3)
    _draw_weights(panels, result.setting, max(result.crossings, default=256))
    _draw_errors(error, result)
    _draw_times(seconds, result)
    _draw_memory(memory, result)
    for axes in (error, seconds, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(_plain)
        axes.yaxis.set_major_formatter(_plain)
        axes.minorticks_off()
        axes.legend()
    low, high = error.get_ylim()
    steps = (digit * 10.0**power for power in range(-6, 2) for digit in (1, 2, 5))
    error.set_yticks([y for y in steps if low <= y <= high])
    kind = "causal" if result.setting.causal else "bidirectional"
    figure.suptitle(
        f"FAVOR+ and exact softmax attention, {kind}, one head, d = {result.setting.dim}, "
        f"float32, {_count(result.machine['threads'], 'thread')}, {result.machine['processor']}",
        fontsize=10,
    )
    return figure


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _plain(value: float, _: object) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:,.0f}k"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _draw_errors(axes: Any, result: Comparison) -> None:
    for kind, antithetic in VARIANTS:
        rows = [r for r in result.errors if (r.projection, r.antithetic) == (kind, antithetic)]
        x = [row.features for row in rows]
        mean, spread = np.array([(row.mean, row.spread) for row in rows]).reshape(-1, 2).T
        color = {"iid": ORANGE, "orthogonal": BLUE}[kind]
        line = "-" if antithetic else "--"
        label = f"{kind}, antithetic" if antithetic else kind
        axes.plot(x, mean, line, color=color, marker="o", ms=3.5, label=label)
        if antithetic:
            low = np.maximum(mean - spread, mean / 4)  # a logarithmic axis has no zero
            axes.fill_between(x, low, mean + spread, color=color, alpha=0.15, linewidth=0)
    axes.set(
        title=f"Error against exact (L = {result.error_length:,}, {result.seeds} seeds)",
        xlabel="features m",
        ylabel="relative root-mean-square error",
    )


def _draw_times(axes: Any, result: Comparison) -> None:
    exact = {row.length: 1e3 * row.exact_seconds for row in result.costs}
    axes.plot(exact.keys(), exact.values(), color=INK, marker="s", ms=3.5, label="exact")
    for color, (m, length) in zip(cycle(COLORS), result.crossings.items(), strict=False):
        rows = [row for row in result.costs if row.features == m]
        x, y = [row.length for row in rows], [1e3 * row.favor_seconds for row in rows]
        label = f"FAVOR+, m = {m}"
        if length is not None and length > min(x):
            label += f", wins from {length:,.0f}"
            height = np.exp(np.interp(np.log(length), np.log(x), np.log(y)))
            axes.plot(length, height, "o", color=color, ms=11, mfc="none", mew=1.5)
        axes.plot(x, y, color=color, marker="o", ms=3.5, label=label)
    axes.set(title="Time of one call", xlabel="length L", ylabel="milliseconds")


def _draw_memory(axes: Any, result: Comparison) -> None:
    matrix = {row.length: row.matrix_bytes / 2**20 for row in result.costs}
    axes.plot(matrix.keys(), matrix.values(), ":", color=INK, label="a stored L x L matrix")
    exact = {row.length: row.exact_bytes / 2**20 for row in result.costs}
    axes.plot(exact.keys(), exact.values(), color=INK, marker="s", ms=3.5, label="exact, tiled")
    for color, m in zip(cycle(COLORS), result.crossings, strict=False):
        rows = [row for row in result.costs if row.features == m]
        x, y = [row.length for row in rows], [row.favor_bytes / 2**20 for row in rows]
        axes.plot(x, y, color=color, marker="o", ms=3.5, label=f"FAVOR+, m = {m}")
    axes.set(title="Extra memory, result included", xlabel="length L", ylabel="MiB")
    axes.set_ylim(bottom=0.05)


def _path_weights(setting: Setting, m: int) -> tuple[Array, Array]:
    """Weights along one smooth random path, exact and of FAVOR+: (POSITIONS, POSITIONS) each.

    Queries and keys are the same path, of the setting's size; weights of independent ones look
    like noise.  Each weight is in units of the row's mean weight.
    """
    rng = np.random.default_rng(setting.seed)
    positions = np.arange(POSITIONS)
    distances = np.subtract.outer(positions, positions) / BEND
    path = np.exp(-(distances**2)) @ rng.standard_normal((POSITIONS, setting.dim))
    path *= setting.std / np.sqrt(np.mean(path**2))
    fm = feature_map("positive", dim=setting.dim, num_features=m, rng=setting.seed)
    last = positions if setting.causal else np.full(POSITIONS, POSITIONS - 1)
    exact = setting.exact([path, path, np.eye(POSITIONS)])
    favor = attention_weights(path, path, fm, positions=last)
    keys = last[:, None] + 1
    return keys * exact, keys * favor


def _draw_weights(panels: Any, setting: Setting, m: int) -> None:
    """Heat maps of both on one scale, and some of their rows."""
    exact, favor = _path_weights(setting, m)
    for axes, weights, name in zip(
        panels, (exact, favor), ("exact", f"FAVOR+, m = {m}"), strict=False
    ):
        image = axes.imshow(weights, vmin=0, vmax=exact.max(), cmap="Blues")
        axes.grid(visible=False)
        axes.set(title=f"Weights on a smooth path, {name}", xlabel="key", ylabel="query")
    axes.figure.colorbar(image, ax=axes, label="times the mean weight", pad=0.02)
    rows, curves = range(POSITIONS // 4, POSITIONS, POSITIONS // 4), panels[2]
    for color, row in zip(COLORS, rows, strict=False):
        curves.plot(exact[row], "--", color=INK, label="exact" if row == rows[0] else None)
        curves.plot(favor[row], color=color, label=f"FAVOR+, query {row}")
    curves.set(title="Three rows of both", xlabel="key")
    curves.set_ylim(0, 1.3 * max(exact[rows].max(), favor[rows].max()))  # room for the legend
    curves.legend(ncols=2, loc="upper left")
