"""favor_np beside JAX, PyTorch, a C++ loop and performer-pytorch: same inputs, same run.

    pip install jax jaxlib torch performer-pytorch     # what is missing is named and left out
    python tools/peers.py --threads 1,2 --publish amx       # a part of docs/peers-tables.md

Every number of threads has a process of its own, in which all libraries are held to it. All peers
get the same arrays and the same projection, and must agree with favor_np before the clock runs.
Calls are interleaved in rounds: what disturbs the machine meets everyone.
"""

import argparse
import contextlib
import dataclasses
import datetime as dt
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import publish
from rivals import DIM, FEATURES, HEADS, PEERS, WINDOW, Case, sdpa_peer

from favor_np.compare import crossing
from favor_np.cpu.layout import worth_bfloat16

CROSSING_LENGTHS = [48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
CROSSING_FEATURES = (64, 128, 256)
PACKAGES = ["favor_np", "numpy", "numba", "jax", "torch", "performer-pytorch"]
TOLERANCE, HALF = 1e-3, 1e-2  # between outputs in float32, and if products are in bfloat16
TASKS = (
    "causal", "bidirectional", "causal gradient", "causal exact", "full exact",
    f"causal exact, window {WINDOW}",
)  # fmt: skip
BFLOAT16 = worth_bfloat16()  # else it is float32
PINS = ["FAVOR_NP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
PINS += ["NPROC"]  # XLA's


@dataclasses.dataclass
class Entry:
    """A call and what it took."""

    name: str
    call: Callable[[], object]
    seconds: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)

    def time(self):
        start, cpu = time.perf_counter(), time.process_time()
        self.call()
        self.seconds.append(time.perf_counter() - start)
        self.processor.append(time.process_time() - cpu)
        return self.seconds[-1]

    @property
    def median(self):
        return statistics.median(self.seconds)


# --- measuring ---------------------------------------------------------------------------------


def agree(name, result, expected):
    tolerance = HALF if "bfloat16" in name else TOLERANCE
    error = np.linalg.norm(np.asarray(result) - expected) / np.linalg.norm(expected)
    if not error < tolerance:
        raise SystemExit(f"{name} differs from favor_np by {error:.1e} (relative): nothing timed")


def entries(case, missing):
    """favor_np first, then the peers that are installed, each in its fastest form."""
    kind = next((kind for kind in ("exact", "gradient") if kind in case.task), "favor")
    if kind == "exact":
        result = [Entry("favor_np", case.exact())]
    else:
        make = case.gradient if kind == "gradient" else case.favor
        half = case.projection[: FEATURES // 2]
        pairs = Entry("favor_np, antithetic (default)", make(half, True))
        agree(pairs.name, pairs.call(), make(np.concatenate([half, -half]), False)())
        result = [Entry("favor_np", make(case.projection, False)), pairs]
    expected = result[0].call()
    if kind != "gradient" and BFLOAT16:
        call = (
            case.favor(case.projection, False, "bfloat16")
            if kind == "favor"
            else case.exact("bfloat16")
        )
        result.append(Entry("favor_np, bfloat16", call))
        agree(result[-1].name, call(), expected)
    for name, (peer, package, serves) in PEERS.items():
        if serves != kind or ("bfloat16" in name and not BFLOAT16):
            continue
        try:
            calls = peer(case)
        except ImportError as error:
            missing[name] = f"{name} is left out ({error}): pip install {package}"
            continue
        tried = [Entry(form, call) for form, call in calls.items()]
        for entry in tried:
            agree(entry.name, entry.call(), expected)
        if len(tried) > 1:
            interleave(tried, rounds=3)
            tried.sort(key=lambda entry: entry.median)
        result += [Entry(best.name, best.call) for best in tried[:1]]
    return result


def interleave(group, rounds, budget=0.1, pause=0.05):
    """Time the calls in turn; one not counted before each turn, unless it takes long.

    The pause lets the threads of the one before fall asleep: OpenBLAS's spin for 25 ms.
    """
    for turn in range(rounds):
        for entry in group:
            last = entry.seconds[-1] if entry.seconds else 0.0
            if last > 1.0 and turn >= 3:
                continue
            time.sleep(pause)
            if last < 0.3:
                entry.call()
            spent = entry.time()
            while spent < budget:
                spent += entry.time()


def sgemm_entry():
    a, b = np.random.default_rng(0).standard_normal((2, 1024, 1024), np.float32)
    return Entry("NumPy SGEMM", lambda: a @ b)


def measure(threads, lengths, rounds, missing):
    """Time every task at every length."""
    rows = []
    for length, task in itertools.product(lengths, TASKS):
        case = Case(task, length, threads)
        print(f"{count(threads)}, {task}, L = {length:,} ...", file=sys.stderr, flush=True)
        sgemm = sgemm_entry()
        group = [sgemm, *entries(case, missing)]
        interleave(group, rounds)
        rate = 2 * 1024**3 / sgemm.median / 1e9
        for entry in group[1:]:
            useful = case.operations / entry.median / 1e9
            rows.append({
                "task": task, "length": length, "name": entry.name, "median_ms": entry.median * 1e3,
                "min_ms": min(entry.seconds) * 1e3, "ratio": entry.median / group[1].median,
                "gflops": useful, "of_sgemm": useful / rate, "sgemm_gflops": rate,
                "cpus": sum(entry.processor) / sum(entry.seconds), "calls": len(entry.seconds),
            })  # fmt: skip
    return rows


def crossings(threads, rounds):
    """Return the length from which favor_np is faster than the better of two exact attentions."""
    gains = {}
    for length, causal in itertools.product(CROSSING_LENGTHS, (True, False)):
        case = Case("causal exact" if causal else "full exact", length, threads)
        rivals = [Entry("exact", case.exact())]
        with contextlib.suppress(ImportError):
            rivals += [Entry(name, call) for name, call in sdpa_peer(case).items()]
        ours = {
            (m, antithetic): Entry(
                "", case.favor(case.projection[: m // (1 + antithetic)], antithetic)
            )
            for m, antithetic in itertools.product(CROSSING_FEATURES, (True, False))
        }
        interleave([*rivals, *ours.values()], rounds, budget=0.01, pause=0.01)
        best = min(entry.median for entry in rivals)
        for (m, antithetic), entry in ours.items():
            gains.setdefault((m, antithetic, causal), []).append(best / entry.median)
    return [
        {"features": m, "antithetic": antithetic, "causal": causal,
         "length": crossing(CROSSING_LENGTHS, speedups)}
        for (m, antithetic, causal), speedups in gains.items()
    ]  # fmt: skip


def worker(threads, lengths, rounds):
    """Measure in this process and write JSON to standard output."""
    warnings.filterwarnings("ignore")
    missing = {}
    result = {
        "threads": threads,
        "rows": measure(threads, lengths, rounds, missing),
        "crossings": crossings(threads, rounds),
        "missing": list(missing.values()),
    }
    json.dump(result, sys.stdout)


# --- reporting ---------------------------------------------------------------------------------


def setting():
    """Machine, versions and date."""
    name, flags, info = platform.processor() or platform.machine(), "", Path("/proc/cpuinfo")
    if info.exists():
        pairs = (line.partition(":") for line in info.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        name, flags = fields.get("model name", name), fields.get("flags", "")
    units = [unit for flag, unit in (("avx512f", "AVX-512"), ("amx_tile", "AMX")) if flag in flags]
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return {
        "machine": ", ".join([name, *units, f"{os.cpu_count()} CPUs", platform.system()]),
        "versions": ", ".join(versions),
        "date": dt.date.today().isoformat(),
    }


def crossing_cells(result):
    """Rows of text: the map, m, and the lengths for causal and bidirectional attention."""
    for antithetic, features in itertools.product((True, False), CROSSING_FEATURES):
        found = [
            next(row["length"] for row in result["crossings"]
                 if (row["antithetic"], row["features"], row["causal"])
                 == (antithetic, features, causal))
            for causal in (True, False)
        ]  # fmt: skip
        ends = {
            None: f"> {CROSSING_LENGTHS[-1]:,}",
            CROSSING_LENGTHS[0]: f"< {CROSSING_LENGTHS[0]}",
        }
        cells = [ends.get(length) or f"{length:,.0f}" for length in found]
        yield ["antithetic (default)" if antithetic else "plain", str(features), *cells]


def cells(row):
    """What a table shows of a row, as text."""
    shown = [f"{row['median_ms']:.2f}", f"{row['min_ms']:.2f}", f"{row['ratio']:.2f}"]
    return [*shown, f"{row['gflops']:.1f}", f"{row['of_sgemm']:.2f}", f"{row['cpus']:.2f}"]


HEADER = ["median ms", "min ms", "ratio", "GFLOP/s", "/SGEMM", "CPUs"]
CROSSING_HEADER = ["FAVOR+ faster than exact from L =", "m", "causal", "bidirectional"]


def count(threads):
    return "One thread" if threads == 1 else f"{threads} threads"


def console(result):
    """Print a result within 80 columns."""
    line = "{:<31}{:>10}{:>9}{:>7}{:>9}{:>8}{:>6}".format
    print(f"\n{count(result['threads'])}; H = {HEADS}, d = {DIM}, m = {FEATURES}, float32")
    for (length, task), rows in itertools.groupby(
        result["rows"], lambda r: (r["length"], r["task"])
    ):
        print("\n" + line(f"{task}, L = {length:,}", *HEADER))
        for row in rows:
            print(line(row["name"], *cells(row)))
    line = "{:<36}{:>6}{:>12}{:>16}".format
    print("\n" + line(*CROSSING_HEADER))
    for texts in crossing_cells(result):
        print(line(*texts))
    print("\n".join(["", *result["missing"]]))


def markdown(report):
    """Return the part of the documentation's page that is about this machine.

    What the page says of all machines, sizes and tolerances too, stands in it.
    """
    text = "Measured {date} on {machine}; {versions}.\n".format_map(report["setting"])
    for result in report["results"]:
        text += f"\n### {count(result['threads'])}\n"
        rates = [row["sgemm_gflops"] for row in result["rows"]]
        text += f"\nSGEMM ran at {min(rates):.0f} to {max(rates):.0f} GFLOP/s.\n"
        for task in TASKS:
            rows = [row for row in result["rows"] if row["task"] == task]
            text += table([task, "L", *HEADER], [
                [row["name"], f"{row['length']:,}", *cells(row)] for row in rows
            ])  # fmt: skip
        text += table(CROSSING_HEADER, crossing_cells(result))
    return text


def table(header, rows):
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=numbers, default=[1], help="such as 1,2")
    parser.add_argument("--lengths", type=numbers, default=[1024, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--publish", metavar="PART", help="write that part of docs/peers-tables.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.threads[0], args.lengths, args.rounds)
        return
    report = {"setting": setting(), "results": []}
    for threads in args.threads:
        lengths = ",".join(map(str, args.lengths))
        command = [sys.executable, __file__, "--worker", f"--threads={threads}"]
        command += [f"--lengths={lengths}", f"--rounds={args.rounds}"]
        pinned = os.environ | dict.fromkeys(PINS, str(threads))
        done = subprocess.run(command, env=pinned, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        report["results"].append(json.loads(done.stdout))
        console(report["results"][-1])
    print("{machine}; {versions}; {date}".format_map(report["setting"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.publish:
        publish.put("peers-tables.md", args.publish, markdown(report))


if __name__ == "__main__":
    main()
