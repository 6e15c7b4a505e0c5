"""The picture: error, time and memory, and the weights of both kinds of attention."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from favor_np.features import feature_map
from favor_np.figures import BLUE, GREEN, GREY, INK, ORANGE, RED
from favor_np.weights import attention_weights

from ._data import Array
from ._methods import DEFAULT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ._compare import Comparison, Setting

COLORS = (BLUE, ORANGE, GREEN, RED)
LINES: dict[str, dict[str, Any]] = {
    "FAVOR+ iid": {"color": GREY, "marker": "s", "ls": "--"},
    "FAVOR+": {"color": GREY, "marker": "s"},
    "antithetic": {"color": INK, "marker": "o"},
    "centred": {"color": INK, "marker": "o", "ls": "--"},
    "FAVOR++ oprf": {"color": GREEN, "marker": "^"},
    "FAVOR# sderf": {"color": ORANGE, "marker": "v"},
    "FAVOR# saderf": {"color": ORANGE, "marker": "v", "ls": "--"},
    "FAVOR# aderf": {"color": ORANGE, "marker": "v", "ls": ":"},
    "saderf+sderf": {"color": RED, "marker": "D", "ls": "--"},
    "aderf+sderf": {"color": RED, "marker": "D"},
    "spherical": {"color": BLUE, "marker": "P", "ls": "--"},
    "auto": {"color": BLUE, "marker": "*"},
    "auto uncentred": {"color": BLUE, "marker": "*", "ls": ":"},
}
POSITIONS, BEND = 96, 8.0  # of the path whose weights are drawn: its length, and that of a bend


def draw(result: Comparison) -> Figure:
    """Error by features, time and memory by length; beneath, exact and approximate weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10.8), dpi=130, layout="constrained")
    names = [
        ["error", "error", "seconds"],
        ["error", "error", "memory"],
        ["exact", "favor", "rows"],
    ]
    panels: dict[str, Any] = figure.subplot_mosaic(names)
    error, seconds, memory = (panels[name] for name in ("error", "seconds", "memory"))
    weights = [panels[name] for name in names[2]]
    _draw_weights(weights, result.setting, max(result.crossings, default=256))
    _draw_errors(error, result)
    _draw_times(seconds, result)
    _draw_memory(memory, result)
    for axes in (error, seconds, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(_plain)
        axes.yaxis.set_major_formatter(_plain)
        axes.minorticks_off()
        axes.legend(ncols=2 if axes is error else 1)
    low, high = error.get_ylim()
    error.set_ylim(top=1.5 * high)  # room for the legend
    steps = (digit * 10.0**power for power in range(-6, 2) for digit in (1, 2, 5))
    error.set_yticks([y for y in steps if low <= y <= high])
    kind = "causal" if result.setting.causal else "bidirectional"
    figure.suptitle(
        f"Random features and exact softmax attention, {kind}; times of one head, "
        f"d = {result.setting.dim}, float32, {_count(result.machine['threads'], 'thread')}, "
        f"{result.machine['processor']}",
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
    """Mean and standard deviation; what knows the data in colour, what does not in grey tones."""
    names = list(dict.fromkeys(row.method for row in result.errors))
    for name in names:
        rows = [row for row in result.errors if row.method == name]
        x = np.array([row.features for row in rows], dtype=float)
        mean, spread = np.array([(row.mean, row.spread) for row in rows]).T
        low = np.minimum(spread, 0.7 * mean)  # a logarithmic axis has no zero
        shift = 1.012 ** (names.index(name) - len(names) / 2)  # bars beside each other
        axes.errorbar(
            x * shift,
            mean,
            yerr=[low, spread],
            **LINES[name],
            ms=4,
            lw=1.2,
            elinewidth=0.7,
            label=f"{name} (default)" if name == DEFAULT.name else name,
        )
    heads, length, dim = result.tokens
    axes.set(
        title="Error against exact attention on held-out tokens: "
        f"{Path(result.setting.data).name}, L = {length:,}, d = {dim}"
        + (f", {heads} heads" if heads > 1 else ""),
        xlabel=f"features m (bars: standard deviation over {result.seeds} draws)",
        ylabel="relative root-mean-square error",
    )


def _draw_times(axes: Any, result: Comparison) -> None:
    exact = {row.length: 1e3 * row.exact_seconds for row in result.costs}
    axes.plot(exact.keys(), exact.values(), color=INK, marker="s", ms=3.5, label="exact")
    for color, (m, length) in zip(cycle(COLORS), result.crossings.items(), strict=False):
        rows = [row for row in result.costs if row.features == m]
        x, y = [row.length for row in rows], [1e3 * row.favor_seconds for row in rows]
        label = f"{DEFAULT.name}, m = {m}"
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
        axes.plot(x, y, color=color, marker="o", ms=3.5, label=f"{DEFAULT.name}, m = {m}")
    axes.set(title="Extra memory, result included", xlabel="length L", ylabel="MiB")
    axes.set_ylim(bottom=0.05)


def _path_weights(setting: Setting, m: int) -> tuple[Array, Array]:
    """Weights along one smooth random path, exact and of the default map, (POSITIONS, POSITIONS).

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
        panels, (exact, favor), ("exact", f"{DEFAULT.name}, m = {m}"), strict=False
    ):
        image = axes.imshow(weights, vmin=0, vmax=exact.max(), cmap="Blues")
        axes.grid(visible=False)
        axes.set(title=f"Weights on a smooth path, {name}", xlabel="key", ylabel="query")
    axes.figure.colorbar(image, ax=axes, label="times the mean weight", pad=0.02)
    rows, curves = range(POSITIONS // 4, POSITIONS, POSITIONS // 4), panels[2]
    for color, row in zip(COLORS, rows, strict=False):
        curves.plot(exact[row], "--", color=INK, label="exact" if row == rows[0] else None)
        curves.plot(favor[row], color=color, label=f"{DEFAULT.name}, query {row}")
    curves.set(title="Three rows of both", xlabel="key")
    curves.set_ylim(0, 1.3 * max(exact[rows].max(), favor[rows].max()))  # room for the legend
    curves.legend(ncols=2, loc="upper left")
