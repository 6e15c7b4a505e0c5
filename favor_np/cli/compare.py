"""``favor-np compare``: the classic demonstration, measured here and now."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._options import ProgressBar, integer, output_file, picture_format, real

if TYPE_CHECKING:
    from favor_np.compare import Comparison

DESCRIPTION = """\
Compare FAVOR+ with exact softmax attention on this machine: the error as the number of
features grows, time and memory as the sequence grows, and the length where they cross.
Compilation is not timed; a time is the best of several calls.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    add, even = parser.add_argument, _list(integer(2, even=True))
    add(
        "--features",
        type=even,
        default=[16, 32, 64, 128, 256, 512, 1024],
        metavar="M,M,...",
        help="numbers of features whose error is measured (16,32,64,...,1024)",
    )
    add(
        "--lengths",
        type=_list(integer()),
        default=[64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
        metavar="L,L,...",
        help="lengths whose time and memory are measured (64,128,256,...,16384)",
    )
    add(
        "--time-features",
        type=even,
        default=[64, 256],
        metavar="M,M,...",
        help="numbers of features of the timed maps (64,256)",
    )
    add("--dim", type=integer(), default=64, metavar="N", help="size of a head (64)")
    add(
        "--std",
        type=real(positive=True),
        default=0.35,
        metavar="S",
        help="standard deviation of queries and keys; errors grow steeply with it (0.35)",
    )
    add("--causal", action="store_true", help="causal attention (default: bidirectional)")
    add("--seeds", type=integer(), default=8, metavar="N", help="projections drawn (8)")
    add("--seed", type=integer(0), default=0, metavar="N", help="first seed (0)")
    add("--threads", type=integer(), default=1, metavar="N", help="threads of both sides (1)")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--plot", metavar="OUT.png", help="draw it, and weights of both (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw; return the exit status."""
    from favor_np.compare import Setting, compare

    picture = picture_format(args.plot)
    setting = Setting(args.dim, args.std, args.causal, args.seed, args.threads)
    with output_file(args.plot) as figure, ProgressBar() as progress:
        result = compare(
            setting,
            features=args.features,
            seeds=args.seeds,
            lengths=args.lengths,
            time_features=args.time_features,
            progress=progress,
        )
        if figure is not None:
            result.plot().savefig(figure, format=picture)
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    lines = _report(result)
    lines += ["", f"Wrote {args.plot}"] if args.plot else []
    print("\n".join(lines))
    return 0


def _report(result: Comparison) -> list[str]:
    """Tables of at most 80 columns."""
    setting, machine = result.setting, result.machine
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    kind = "causal" if setting.causal else "bidirectional"
    lines = [
        f"FAVOR+ against exact softmax attention, {kind}",
        f"{machine['processor']}, {machine['cpus']} CPUs, {machine['system']}"[:80],
        f"Python {machine['python']}, numpy {machine['numpy']}, numba {machine['numba']}; "
        f"float32, {threads}",
        f"one head, d = {setting.dim}, queries and keys of standard deviation {setting.std:g}",
    ]
    if result.errors:
        lines += _error_table(result)
    for m in result.crossings:
        lines += _cost_table(result, m)
    return lines


def _error_table(result: Comparison) -> list[str]:
    lines = [
        "",
        f"Error relative to exact (root mean square, L = {result.error_length}; "
        f"mean ± sd of {result.seeds} seeds)",
        f"{'m':>6}{'iid':>18}{'orthogonal':>18}{'iid':>18}{'orthogonal':>18}",
        f"{'':6}{'':36}{'antithetic':>18}{'antithetic':>18}",
    ]
    order = [("iid", False), ("orthogonal", False), ("iid", True), ("orthogonal", True)]
    for m in dict.fromkeys(row.features for row in result.errors):
        rows = {(r.projection, r.antithetic): r for r in result.errors if r.features == m}
        cells = [f"{rows[key].mean:.4f} ± {rows[key].spread:.4f}" for key in order]
        lines.append(f"{m:>6}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def _cost_table(result: Comparison, m: int) -> list[str]:
    lines = [
        "",
        f"Time, and extra memory of a call with its result, m = {m}",
        f"{'L':>8}{'FAVOR+':>12}{'exact':>12}{'faster':>10}"
        f"{'FAVOR+':>12}{'exact':>12}{'L x L':>12}",
    ]
    rows = [row for row in result.costs if row.features == m]
    for row in rows:
        lines.append(
            f"{row.length:>8}"
            f"{_seconds(row.favor_seconds):>12}{_seconds(row.exact_seconds):>12}"
            f"{_figures(row.speedup):>8} x"
            f"{_bytes(row.favor_bytes):>12}{_bytes(row.exact_bytes):>12}"
            f"{_bytes(row.matrix_bytes):>12}"
        )
    if not rows:
        return []
    length, last = result.crossings[m], rows[-1]
    if length is None:
        lines.append(f"Exact attention is faster up to L = {last.length:,}, the longest measured.")
    elif length <= rows[0].length:
        lines.append(f"FAVOR+ is faster from L = {rows[0].length:,}, the shortest measured.")
    else:
        lines.append(f"FAVOR+ is faster from L = {length:,.0f} (interpolated).")
    sentence = (
        f"At L = {last.length:,}, L²d is {last.length / m:,.4g} times Lmd in operations; "
        f"measured: {_figures(last.speedup)} times faster."
    )
    return lines + textwrap.wrap(sentence, 80)


def _figures(value: float) -> str:
    """Three significant figures, never an exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(digits, 0)}f}"


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{_figures(value * 1e6)} µs"
    return f"{_figures(value * 1e3)} ms" if value < 1 else f"{_figures(value)} s"


def _bytes(value: int) -> str:
    if value < 2**16:
        return "< 64 KiB"
    return f"{_figures(value / 2**20)} MiB" if value < 2**30 else f"{_figures(value / 2**30)} GiB"


def _list(convert: Callable[[str], int]) -> Callable[[str], list[int]]:
    """Make the type of an option: numbers with commas between them."""
    return lambda text: [convert(part) for part in text.split(",")]
