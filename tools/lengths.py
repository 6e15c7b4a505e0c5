"""The README's picture and table: time against length, beside exact attention and PyTorch.

    pip install torch matplotlib
    python tools/lengths.py         # writes docs/_static/lengths.png, prints the table

Causal attention of 4 heads, d = 64, float32, one thread.  All get the same arrays and must agree
before the clock runs.  Calls are made in turns, and what counts is the median of their processor
time, which other programs disturb less than that on the wall.
"""

import statistics
from pathlib import Path

import matplotlib as mpl
from looks import EXACT, FAVOR, LOOKS, PEER
from peers import Entry, agree, interleave, setting
from rivals import Case, sdpa_peer, torch_peer

from favor_np.compare import crossing

PICTURE = Path(__file__).parents[1] / "docs/_static/lengths.png"
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384]
SHOWN = [1024, 4096, 16384]
LINES = {
    "FAVOR+, 64 features": {"color": FAVOR, "linestyle": "--"},
    "FAVOR+, 256 features": {"color": FAVOR},
    "exact attention": {"color": EXACT},
    "PyTorch, exact (SDPA)": {"color": PEER},
    "PyTorch, FAVOR+, 256 features": {"color": PEER, "linestyle": "--"},
}


def entries(length):
    """What is timed at a length, in the order of `LINES`."""
    exact, favor = (Case(task, length, threads=1) for task in ("causal exact", "causal"))
    calls = [
        favor.favor(favor.projection[:32], True),
        favor.favor(favor.projection[:128], True),
        exact.exact(),
        *sdpa_peer(exact).values(),
        torch_peer(favor)["PyTorch, C = 128"],
    ]
    agree("PyTorch's exact attention", calls[3](), calls[2]())
    agree("PyTorch's FAVOR+", calls[4](), favor.favor(favor.projection, False)())
    return [Entry(name, call) for name, call in zip(LINES, calls, strict=True)]


def measure():
    """Milliseconds of every line at every length."""
    times = {name: [] for name in LINES}
    for length in LENGTHS:
        group = entries(length)
        interleave(group, rounds=5)
        for entry in group:
            times[entry.name].append(1e3 * statistics.median(entry.processor))
    return times


def table(times):
    """Return the table, and from which length on FAVOR+ is faster than the faster exact one."""
    rivals = zip(times["exact attention"], times["PyTorch, exact (SDPA)"], strict=True)
    best = [min(pair) for pair in rivals]
    lines = [["ms", *(f"L = {n:,}" for n in SHOWN)], ["---", *["---:"] * len(SHOWN)]]
    for name, found in times.items():
        shown = [found[LENGTHS.index(n)] for n in SHOWN]
        lines.append([name, *(f"{ms:.1f}" for ms in shown)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for name in list(LINES)[:2]:
        gains = [rival / ours for rival, ours in zip(best, times[name], strict=True)]
        text += f"\n{name}: faster than both from L = {crossing(LENGTHS, gains):.0f}, "
        text += f"{gains[-1]:.1f} times as fast at {LENGTHS[-1]:,}"
    return text


def draw(times):
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(LOOKS):
        figure, axes = plt.subplots(figsize=(6.4, 3.4))
        for name, looks in LINES.items():
            axes.loglog(LENGTHS, times[name], marker="o", markersize=3, label=name, **looks)
        axes.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
        axes.minorticks_off()
        axes.set(xlabel="length of the sequence", ylabel="milliseconds")
        axes.set_title("Causal attention, 4 heads of 64, float32, one thread")
        axes.legend()
        figure.savefig(PICTURE, dpi=150)


def main():
    times = measure()
    draw(times)
    print(table(times))
    print("{date}; {machine}; {versions}".format_map(setting()))


if __name__ == "__main__":
    main()
