"""``favor-np compare``: the classic demonstration, measured here and now."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import _options as options
from ._options import integer, real
from ._text import WIDTH, figures, memory, printed, seconds

if TYPE_CHECKING:
    from favor_np.compare import Comparison, ErrorRow

NAME, CELL, COLUMNS = 14, 11, 6  # widths of the table of errors, and its columns

DESCRIPTION = """\
Compare FAVOR+ with exact softmax attention on this machine: the error of every kind of
feature map as the number of features grows, on real queries and keys that no map has seen;
time and memory as the sequence grows, and the length where they cross; time with a window;
and when to prefer exact attention. Compilation is not timed; a time is the best of several calls.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    add, even = parser.add_argument, _list(integer(2, even=True))
    add(
        "--features",
        type=even,
        default=[32, 64, 128, 256, 512, 1024],
        metavar="M,M,...",
        help="numbers of features whose error is measured (32,64,128,...,1024)",
    )
    add(
        "--data",
        default="prices",
        metavar="DATA",
        help="queries and keys of the errors: prices or volatility (windows of the bundled oil "
        "prices), gaussian, or FILE.npz with arrays q and k (..., L, d). Maps know the first half "
        "of the tokens, or known_q and known_k of the file; the rest is attended (prices)",
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
        help="numbers of features of the timed maps, of the default kind (64,256)",
    )
    add(
        "--windows",
        type=_list(integer()),
        default=[64, 256, 1024, 4096],
        metavar="W,W,...",
        help="windows whose time is measured at the greatest length (64,256,1024,4096)",
    )
    add(
        "--dim",
        type=integer(),
        default=64,
        metavar="N",
        help="size of a timed or Gaussian head (64)",
    )
    add(
        "--std",
        type=real(positive=True),
        default=0.35,
        metavar="S",
        help="standard deviation of Gaussian queries and keys; errors grow steeply with it (0.35)",
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
    from favor_np.compare._compare import ERROR_LENGTH

    picture = options.picture_format(args.plot)
    setting = Setting(args.data, args.dim, args.std, args.causal, args.seed, args.threads)
    with options.output_file(args.plot) as figure, options.compilation_told():
        try:
            setting.tokens(ERROR_LENGTH)
        except ValueError as error:
            raise options.CommandError(str(error)) from None
        result = compare(
            setting,
            features=args.features,
            seeds=args.seeds,
            lengths=args.lengths,
            time_features=args.time_features,
            windows=args.windows,
        )
        if figure is not None:
            result.plot().savefig(figure, format=picture)
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    lines = _report(result)
    lines += ["", f"Wrote {args.plot}"] if args.plot else []
    print(printed(lines))
    return 0


def _report(result: Comparison) -> list[str]:
    """Tables, as wide as a report may be."""
    setting, machine = result.setting, result.machine
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    kind = "causal" if setting.causal else "bidirectional"
    lines = [
        f"Random features against exact softmax attention, {kind}",
        f"{machine['processor']}, {machine['cpus']} CPUs, {machine['system']}"[:WIDTH],
        f"Python {machine['python']}, numpy {machine['numpy']}, numba {machine['numba']}; "
        f"float32, {threads}",
    ]
    if result.errors:
        lines += _error_table(result)
    for m in result.crossings:
        lines += _cost_table(result, m)
    if result.windows:
        lines += _window_table(result)
    advice = [line for text in result.advice() for line in textwrap.wrap(text, WIDTH)]
    return [*lines, "", *advice] if advice else lines


def _error_table(result: Comparison) -> list[str]:
    """Methods by numbers of features, COLUMNS of these at a time."""
    heads, length, dim = result.tokens
    of_heads = f"{heads} heads, " if heads > 1 else ""
    title = (
        f"Error in % of the exact output (root mean square; mean ± sd of {result.seeds} draws) on "
        f"held-out tokens: {result.setting.data}, {of_heads}L = {length:,}, d = {dim}"
    )
    lines = ["", *textwrap.wrap(title, WIDTH, break_on_hyphens=False)]
    methods = list(dict.fromkeys(row.method for row in result.errors))
    features = list(dict.fromkeys(row.features for row in result.errors))
    for start in range(0, len(features), COLUMNS):
        part = features[start : start + COLUMNS]
        lines.append(f"{'m':<{NAME}}" + "".join(f"{m:>{CELL}}" for m in part))
        for name in methods:
            cells = (f"{in_percent(result.error(name, m)):>{CELL}}" for m in part)
            lines.append(f"{_marked(name):<{NAME}}" + "".join(cells))
    return [*lines, "* the default of feature_map"]


def _marked(name: str) -> str:
    from favor_np.compare._methods import DEFAULT

    return f"{name} *" if name == DEFAULT.name else name


def in_percent(row: ErrorRow) -> str:
    """Mean and standard deviation, with as many digits as a table has room for."""
    mean, spread = 100 * row.mean, 100 * row.spread
    if mean >= 1000:
        return ">1000"
    digits = 2 if mean < 10 else 1 if mean < 100 else 0
    return f"{mean:.{digits}f}±{min(spread, 999):.{digits}f}"


def _cost_table(result: Comparison, m: int) -> list[str]:
    from favor_np.compare._methods import DEFAULT

    name = DEFAULT.name
    lines = [
        "",
        f"Time, and extra memory with the result: {_marked(name)}, m = {m}, one head, "
        f"d = {result.setting.dim}",
        f"{'L':>8}{name:>12}{'exact':>12}{'faster':>10}{name:>12}{'exact':>12}{'L x L':>12}",
    ]
    rows = [row for row in result.costs if row.features == m]
    for row in rows:
        lines.append(
            f"{row.length:>8}"
            f"{seconds(row.favor_seconds):>12}{seconds(row.exact_seconds):>12}"
            f"{figures(row.speedup):>8} x"
            f"{memory(row.favor_bytes):>12}{memory(row.exact_bytes):>12}"
            f"{memory(row.matrix_bytes):>12}"
        )
    if not rows:
        return []
    length, last = result.crossings[m], rows[-1]
    if length is None:
        lines.append(f"Exact attention is faster up to L = {last.length:,}, the longest measured.")
    elif length <= rows[0].length:
        lines.append(f"{name} is faster from L = {rows[0].length:,}, the shortest measured.")
    else:
        lines.append(f"{name} is faster from L = {length:,.0f} (interpolated).")
    sentence = (
        f"At L = {last.length:,}, L²d is {last.length / m:,.4g} times Lmd in operations; "
        f"measured: {figures(last.speedup)} times faster."
    )
    return lines + textwrap.wrap(sentence, WIDTH)


def _window_table(result: Comparison) -> list[str]:
    """Exact attention and, for each number of features, the default map, by window."""
    from favor_np.compare._methods import DEFAULT

    features = list(dict.fromkeys(row.features for row in result.windows))
    name, shown = DEFAULT.name, features[:4]  # as many as a line has room for
    lines = [
        "",
        *textwrap.wrap(
            f"Time with a window, causal, L = {result.windows[0].length:,}: exact attention and "
            f"{_marked(name)} with m features",
            WIDTH,
        ),
        f"{'window':>8}{'exact':>12}" + "".join(f"{f'm = {m}':>14}" for m in shown),
    ]
    for window in dict.fromkeys(row.window for row in result.windows):
        rows = [row for row in result.windows if row.window == window and row.features in shown]
        cells = "".join(f"{seconds(row.favor_seconds):>14}" for row in rows)
        lines.append(f"{window:>8}{seconds(rows[0].exact_seconds):>12}{cells}")
    whole = {row.features: seconds(row.whole_seconds) for row in result.windows}
    return [*lines, f"{'none':>8}{'':>12}" + "".join(f"{whole[m]:>14}" for m in shown)]


def _list(convert: Callable[[str], int]) -> Callable[[str], list[int]]:
    """Make the type of an option: numbers with commas between them."""
    return lambda text: [convert(part) for part in text.split(",")]
