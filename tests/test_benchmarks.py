"""The suite for asv: what it records is better when it is lower, and the page is made of that."""

import ast
import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITE, PUBLISH = ROOT / "asv_benchmarks", ROOT / "tools" / "publish.py"


def recorded():
    """``module.Class.method`` of all benchmarks, inherited ones as well."""
    found = set()
    for path in SUITE.glob("benchmarks/bench_*.py"):
        methods = {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                own = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                methods[node.name] = own.union(*(methods.get(base, ()) for base in bases))
        found |= {f"{path.stem}.{name}.{x}" for name, own in methods.items() for x in own}
    return found


def published():
    spec = importlib.util.spec_from_file_location("publish", PUBLISH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_recorded_that_is_better_when_it_is_higher():
    names = {name for name in recorded() if re.search(r"\.track_", name)}
    assert len(names) > 15
    for name in names:
        assert not re.search(r"speed|flops|rate$|per_second|of_gemm|faster|cpu_over_wall", name)


def test_the_page_is_made_of_what_is_recorded(tmp_path):
    """Rates and speed-ups are the inverses of what asv compares, the rest is what it is."""
    size, threads = "L=8192 d=64 m=256", "H=4 L=8192 d=64 m=256"
    values = {
        "bench_figures.Rate.track_over_gemm": {("causal", f"{size} float32"): 1.25},
        "bench_figures.ExactRate.track_over_gemm": {(8192, "causal"): 0.8},
        "bench_figures.Gemm.track_picoseconds": {("float32",): 10.0},
        "bench_figures.Antithetic.track_over_plain": {("causal", size): 0.8},
        "bench_figures.Bfloat16.track_over_float32": {("causal", "plain"): 0.5},
        "bench_figures.ExactBfloat16.track_over_float32": {("causal", 8192): 0.4},
        "bench_figures.MatrixUnit.track_over_vectors": {("causal", "exact"): 0.625},
        "bench_figures.Threads.track_over_one": {("causal", threads): 0.55},
        "bench_figures.Threads.track_wall_over_cpu": {("causal", threads): 0.51},
        "bench_figures.ErrorBars.track_ratio": {("causal", size): 1.5},
        "bench_figures.Growth.track_ratio": {("causal", 1048576): 1.1},
    }
    assert set(values) <= recorded()
    results = {}
    for name, figures in values.items():
        (key, value), = figures.items()  # fmt: skip
        results[name] = [[value], [[repr(part)] for part in key]]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({
        "commit_hash": "0123456789", "params": {}, "result_columns": ["result", "params"],
        "results": results,
    }))  # fmt: skip
    publish = published()
    found = publish.Results([path])
    page = re.sub(" +", " ", publish.rates(found) + publish.others(found))
    for row in (
        "| FAVOR+, L=8192 d=64 m=256 float32 | 0.80 (80) |",
        "| exact, L=8192 d=64 float32 | 1.25 (125) |",
        "| antithetic over plain features | 1.25 × |",
        "| bfloat16 over float32, plain features | 2.00 × |",
        "| bfloat16 over float32, exact, L = 8,192 | 2.50 × |",
        "| float32 with the matrix unit over without, exact | 1.60 × |",
        f"| two threads over one, {threads} | 1.82 × |",
        "| … CPU time over wall time | 1.96 |",
        "| error bars and output over output alone | 1.50 × |",
        "| time per token, L = 1k to 1M, greatest over least | 1.10 |",
    ):
        assert row in page, row


def test_the_page_asks_for_nothing_that_is_not_recorded():
    text = PUBLISH.read_text(encoding="utf-8")
    text = text.replace("{figures}", "bench_figures.").replace("{start}", "bench_startup.")
    names = set(re.findall(r"bench_\w+\.\w+\.\w+", text))
    assert len(names) > 15
    assert names <= recorded()
