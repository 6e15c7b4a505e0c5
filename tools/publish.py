"""Tables and pictures of docs/benchmarks-tables.md from results that asv has saved.

    FAVOR_NP_BENCH=full asv run -E existing --set-commit-hash $(git rev-parse HEAD)
    python tools/publish.py amx --cpu "what the machine calls its processor"

The first argument names the part of the page, between comments: there is one for each machine.  Run it
where the suite ran: versions are those of this environment.  The suite records what is better when it is
lower, as asv wants it; rates and speed-ups are inverses of that.
"""

import argparse
import ast
import datetime as dt
import importlib.metadata
import itertools
import json
import math
import platform
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
KINDS = {"causal": "causal", "full": "bidirectional"}


class Results:
    """The newest file of results, or those given: of a benchmark in several the last counts."""

    def __init__(self, paths=()):
        if not paths:
            found = ROOT.glob("asv_benchmarks/results/*/*-*.json")
            paths = [max(found, key=lambda file: file.stat().st_mtime)]
        self.values, self.commits, started = {}, [], 0
        for path in map(Path, paths):
            data = json.loads(path.read_text(encoding="utf-8"))
            self.commits.append(data["commit_hash"][:8])
            self.machine = data["params"]
            for name, result in data["results"].items():
                row = dict(zip(data["result_columns"], result, strict=False))  # short where empty
                axes = ([ast.literal_eval(p) for p in axis] for axis in row["params"])
                pairs = zip(itertools.product(*axes), row["result"] or [], strict=False)
                self.values[name] = {key: math.nan if v is None else v for key, v in pairs}
                started = max(started, row.get("started_at") or 0)
        self.date = dt.datetime.fromtimestamp(started / 1000, dt.UTC).date()

    def get(self, name, *key):
        return self.values.get(name, {}).get(key, math.nan)

    def inverse(self, name, *key):
        """What is better when it is higher, of what is recorded the other way round."""
        value = self.get(name, *key)
        return 1 / value if value else math.nan


def text(value, form="{:.2f}"):
    return "–" if math.isnan(value) else form.format(value)


def table(header, rows):
    """A table in Markdown; all columns but the first to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = [header, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], *rows]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def rates(results):
    """Rates as shares of the matrix product's, and as numbers."""
    rows = []
    limit = {
        t: 1000 * results.inverse("bench_figures.Gemm.track_picoseconds", t)
        for t in ("float32", "float64")
    }
    sizes = dict.fromkeys(size for _, size in results.values["bench_figures.Rate.track_over_gemm"])
    for size in sizes:
        shares = [
            results.inverse("bench_figures.Rate.track_over_gemm", kind, size) for kind in KINDS
        ]
        peak = limit[size.rsplit(" ", 1)[1]]
        rows.append(
            [f"FAVOR+, {size}", *(f"{text(s)} ({text(s * peak, '{:.0f}')})" for s in shares)]
        )
    for length in (1024, 8192):
        shares = [
            results.inverse("bench_figures.ExactRate.track_over_gemm", length, kind)
            for kind in KINDS
        ]
        rows.append(
            [
                f"exact, L={length} d=64 float32",
                *(f"{text(s)} ({text(s * limit['float32'], '{:.0f}')})" for s in shares),
            ]
        )
    head = "; ".join(f"{text(peak, '{:.0f}')} in {dtype}" for dtype, peak in limit.items())
    note = (
        "Useful rate over that of NumPy's matrix product, 1024 × 1024 × 1024, on one thread in the "
        f"same process (in brackets times the product's own GFLOP/s: {head}). Four heads, plain "
        "features; $4dm + 4md$ operations per token, and $64(m + d)$ more if causal, whatever the "
        "kernels take."
    )
    return f"{note}\n\n{table(['share of GEMM', *KINDS.values()], rows)}"


def others(results):
    rows = []

    def add(label, name, *, unit="", form="{:.2f}", factor=1.0, key=(), kinds=True, inverse=False):
        keys = [(kind, *key) for kind in KINDS] if kinds else [key]
        get = results.inverse if inverse else results.get
        values = [text(get(name, *k) * factor, form) for k in keys]
        rows.append([label, *(f"{v} {unit}".strip() for v in values), *[""] * (2 - len(values))])

    figures = "bench_figures."
    size = "L=8192 d=64 m=256"
    add(
        "antithetic over plain features",
        f"{figures}Antithetic.track_over_plain",
        unit="×",
        key=(size,),
        inverse=True,
    )
    for signs in ("plain", "antithetic"):
        add(f"bfloat16 over float32, {signs} features", f"{figures}Bfloat16.track_over_float32",
            unit="×", key=(signs,), inverse=True)  # fmt: skip
    add("bfloat16 over float32, exact, L = 8,192", f"{figures}ExactBfloat16.track_over_float32",
        unit="×", key=(8192,), inverse=True)  # fmt: skip
    for what in ("plain", "antithetic", "gradient", "exact"):
        name = f"{figures}MatrixUnit.track_over_vectors"
        if all(abs(results.get(name, kind, what) - 1) < 0.01 for kind in KINDS):
            continue  # there is no matrix unit
        label = {"plain": "plain features", "antithetic": "antithetic features"}.get(what, what)
        label = f"float32 with the matrix unit over without, {label}"
        add(label, name, unit="×", key=(what,), inverse=True)
    add("error bars and output over output alone", f"{figures}ErrorBars.track_ratio",
        unit="×", key=(size,))  # fmt: skip
    for size in ("H=4 L=8192 d=64 m=256", "H=1 L=65536 d=64 m=256"):
        add(
            f"two threads over one, {size}",
            f"{figures}Threads.track_over_one",
            unit="×",
            key=(size,),
            inverse=True,
        )
        add("… CPU time over wall time", f"{figures}Threads.track_wall_over_cpu", key=(size,),
            inverse=True)  # fmt: skip
    add(
        "time per token, L = 1k to 1M, greatest over least",
        f"{figures}Growth.track_ratio",
        key=(1048576,),
    )
    for m in (64, 128, 256):
        add(f"faster than exact from L, m = {m}, H = 1", f"{figures}Crossing.track_length",
            form="{:.0f}", key=(m,))  # fmt: skip
    for heads in (1, 4):
        add(f"extra memory, L = 262,144, m = 256, H = {heads}", "bench_memory.Memory.track_extra_bytes",
            unit="MB", factor=1e-6, key=(heads,))  # fmt: skip
    add("a whole call, L = 64, d = m = 32, H = 1", "bench_attention.Small.time_call", unit="µs",
        form="{:.1f}", factor=1e6)  # fmt: skip
    single = {"kinds": False, "form": "{:.1f}"}
    add(
        "`state.step`, H = 8, d = 64, m = 256", "bench_state.Decode.track_step", unit="µs", **single
    )
    add(
        "… of it outside the kernel", "bench_state.Decode.track_outside_kernel", unit="µs", **single
    )
    start = "bench_startup."
    add("`import favor_np` after NumPy", f"{start}Startup.timeraw_import_over_numpy", unit="ms",
        factor=1e3, **single)  # fmt: skip
    add("imports and first call, cache warm", f"{start}Startup.timeraw_first_call", unit="ms",
        factor=1e3, kinds=False, form="{:.0f}")  # fmt: skip
    add("imports and first call, cache cold", f"{start}Cold.timeraw_first_call", unit="s", **single)
    return table(["float32", *KINDS.values()], rows)


def pictures(results, part):
    """Time a token by length; rates as shares of the matrix product's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"causal": "#c2410c", "full": "#1d4ed8"}
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    made = []
    with plt.rc_context(style):
        points = results.values.get("bench_figures.Token.track_nanoseconds", {})
        if any(not math.isnan(v) for v in points.values()):
            figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
            for kind, name in KINDS.items():
                line = [(n, v) for (k, n), v in points.items() if k == kind]
                axes.plot(*zip(*line, strict=True), "o-", color=colors[kind], label=name)
            axes.set(xlabel="tokens L", ylabel="ns per token")
            axes.set_ylim(0, 1.1 * max(points.values()))
            axes.set_xscale("log", base=2)
            axes.set_title("One head, d = 64, m = 256, float32, one thread", loc="left")
            axes.legend(frameon=False, loc="lower right")
            made.append(
                (f"bench_token_{part}.png", figure, "Time per token against the number of tokens")
            )
        name = "bench_figures.Rate.track_over_gemm"
        shares = {key: results.inverse(name, *key) for key in results.values[name]}
        sizes = list(dict.fromkeys(size for _, size in shares))
        figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
        for i, (kind, name) in enumerate(KINDS.items()):
            at = [j + 0.36 * (i - 0.5) for j in range(len(sizes))]
            bars = axes.barh(
                at, [shares[kind, s] for s in sizes], 0.34, color=colors[kind], label=name
            )
            axes.bar_label(bars, fmt="%.2f", padding=-30, color="white")
        axes.axvline(1, color="0.3", lw=1, ls="--")
        axes.set_yticks(range(len(sizes)), sizes)
        axes.invert_yaxis()
        axes.set_xlabel("useful rate over that of NumPy's matrix product")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        made.append((f"bench_rate_{part}.png", figure, "Useful rate over that of a matrix product"))
        for name, figure, _ in made:
            figure.savefig(DOCS / "_static" / name, dpi=150)
            plt.close(figure)
    return "\n\n".join(f"![{alt}](_static/{name})" for name, _, alt in made)


def put(page, part, text):
    """Write what is between two comments of a page of the documentation."""
    path = DOCS / page
    begin, end = (f"<!-- {edge}: {part} -->" for edge in ("begin", "end"))
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", help="the part of the page to write")
    parser.add_argument("results", nargs="*", help="files of asv's results; default: the newest")
    parser.add_argument("--cpu", help="name of the processor; default: what asv noted")
    parser.add_argument("--threads", type=int, default=1, help="FAVOR_NP_NUM_THREADS of that run")
    parser.add_argument("--note", default="", help="a sentence on what else went on")
    args = parser.parse_args()
    results = Results(args.results)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "numba", "favor_np")
    )
    machine = results.machine
    head = (
        f"Measured {results.date} at {' and '.join(results.commits)}: {machine['num_cpu']} cores of an "
        f"{args.cpu or machine['cpu']}, {machine['os'].split()[0]}, Python {platform.python_version()}, "
        f"{versions}; {args.threads} thread{'s'[: args.threads > 1]} unless the row says otherwise. "
        "Medians; figures that are ratios come from calls made in turns, on one thread in "
        f"processor time. {args.note}".rstrip()
    )
    parts = [head, rates(results), others(results), pictures(results, args.part)]
    put("benchmarks-tables.md", args.part, "\n\n".join(parts))
    print(head)


if __name__ == "__main__":
    main()
