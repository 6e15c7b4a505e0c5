"""Tables of the roofline page: what each kernel has to move and to compute, and how long that takes.

The launches are those of the host's real code, for arrays that take no memory; nothing is executed.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import favor_np

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "tests" / "cuda"
sys.path += map(str, (ROOT / "tests", CUDA, ROOT / "tools" / "cuda_on_cpu"))


class Gpu(NamedTuple):
    """Peaks of NVIDIA's data sheets: bytes, and operations of each precision, a second."""

    bandwidth: float
    full: float
    bfloat16: float


#: SXM modules; an operation is a multiplication or an addition.
GPUS = {"H100": Gpu(3.35e12, 67e12, 989e12), "H200": Gpu(4.8e12, 67e12, 989e12)}

#: Leading axes, positions.
WORKLOADS = {
    "32 heads, L = 4096": ((2, 16), 4096),
    "4 heads, L = 8192": ((1, 4), 8192),
    "8 heads, L = 131,072": ((1, 8), 131072),
}
DIM, FEATURES = 64, 256
TILE = 64
#: Arguments with a row for every position.
ROWS = {
    "source",
    "target",
    "k",
    "log_norm",
    "v",
    "mask",
    "q",
    "q_log_norm",
    "out",
    "dens",
    "tops_out",
}


class Cost(NamedTuple):
    """Of all launches of a kernel: bytes between it and memory, operations in its products."""

    launches: int
    bytes: int
    operations: int
    precision: str = "full"  # of the operations

    def floor(self, gpu):
        """Seconds that no program can beat which does this."""
        return max(self.bytes / gpu.bandwidth, self.operations / getattr(gpu, self.precision))


def nothing_allocated(recorder):
    """Let a recorder's arrays be one number, seen as often as the shape says."""
    recorder.empty = lambda shape, dtype, stream=None: np.broadcast_to(np.zeros((), dtype), shape)
    recorder.to_device = lambda array, stream=None: np.asarray(array)
    return recorder


def launches(lead, length, *, causal, gpu="H100", precision="full"):
    """What `favor_attention` launches."""
    import gate

    recorder = nothing_allocated(gate.Recorder())
    recorder.name = gpu
    shape = (*lead, length, DIM)
    q, k, v = (np.broadcast_to(np.zeros((), np.float32), shape) for _ in range(3))
    fm = favor_np.feature_map("positive", DIM, FEATURES, antithetic=True, rng=0)
    with recorder.installed():
        favor_np.favor_attention(q, k, v, fm, causal=causal, device="cuda", precision=precision)
    return recorder.launches


def operations(kernel, grid, args):
    """Operations of the products of one launch: a multiplication and an addition each."""
    names = inspect.signature(kernel).parameters
    given = dict(zip(names, args, strict=True))
    made_for = inspect.getclosurevars(kernel).nonlocals
    square = TILE**3
    if kernel.__name__ == "fold":
        tiles = np.sum(-(-given["table"][:, 2] // TILE))
        projection = TILE * 16 * made_for["per_sign"] * given["k"].shape[1]
        return 2 * int(tiles) * grid[1] * grid[2] * (projection + square)
    if kernel.__name__ == "read":
        projection = TILE * 16 * made_for["per_sign"] * given["q"].shape[1]
        slices = given["c"].shape[1] // TILE
        sides = 2 if made_for["causal"] else 1
        each = slices * sides * (projection + square) + (sides - 1) * square
        return 2 * len(given["table"]) * grid[1] * each
    if kernel.__name__ == "scan":
        return 2 * given["s"].size
    return 0  # pack multiplies nothing twice


def moved(kernel, args):
    """Bytes of a launch if every array passes once, of rows those that the table names.

    The scan reads and writes its states; a read that is not causal looks at no keys.
    """
    given = dict(zip(inspect.signature(kernel).parameters, args, strict=True))
    arrays = {name: x for name, x in given.items() if isinstance(x, np.ndarray) and x.size}
    if kernel.__name__ == "scan":
        return 2 * sum(array.nbytes for array in arrays.values())
    if kernel.__name__ == "read" and not inspect.getclosurevars(kernel).nonlocals["causal"]:
        for name in ("k", "log_norm", "v", "mask", "bias"):
            arrays.pop(name, None)
    rows = int(given["table"][:, {"pack": 1}.get(kernel.__name__, 2)].sum())
    return sum(
        min(rows, array.shape[0]) * array.nbytes // array.shape[0] if name in ROWS else array.nbytes
        for name, array in arrays.items()
    )


def costs(lead, length, **options):
    """The cost of each kernel of a call, in the order of the first launches."""
    found = {}
    for kernel, grid, args in launches(lead, length, **options):
        name = kernel.__name__
        # only the products of tiles are of bfloat16
        half = inspect.getclosurevars(kernel).nonlocals.get("bfloat16")
        new = Cost(1, moved(kernel, args), operations(kernel, grid, args))
        both = zip(found.get(name, (0, 0, 0)), new[:3], strict=False)
        found[name] = Cost(*(a + b for a, b in both), "bfloat16" if half else "full")
    return found


def markdown(header, rows):
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def floors(precision="full"):
    """One row for each kernel of each call."""
    rows = []
    for name, workload in WORKLOADS.items():
        for causal in (True, False):
            table = costs(*workload, causal=causal, precision=precision)
            what = f"{name}, {'causal' if causal else 'full'}"
            for kernel, cost in table.items():
                rows.append([what, kernel, cost.launches, *_cells(cost)])
                what = ""
            whole = Cost(*map(sum, zip(*(cost[:3] for cost in table.values()), strict=True)))
            seconds = [sum(c.floor(gpu) for c in table.values()) for gpu in GPUS.values()]
            rows.append(["", "**all**", whole.launches, *_cells(whole, seconds)])
    header = ["call", "kernel", "launches", "MB", "GFLOP", *(f"{gpu}, µs" for gpu in GPUS)]
    return markdown(header, rows)


def _cells(cost, seconds=None):
    seconds = seconds or [cost.floor(gpu) for gpu in GPUS.values()]
    return [f"{cost.bytes / 1e6:.1f}", f"{cost.operations / 1e9:.2f}",
            *(f"{1e6 * s:.1f}" for s in seconds)]  # fmt: skip


def figures():
    """What ptxas and nvdisasm say of every kernel: the gate's committed table."""
    rows = []
    for kernel, table in json.loads((CUDA / "gate.json").read_text()).items():
        for sm, of in table.items():
            loops = ", ".join(f"{ffma}/{of_all}" for ffma, of_all, _ in of["loops"])
            wide = sum(n for *_, n in of["loops"])
            rows.append([f"`{kernel}`", sm, of["registers"], of["shared"], of["spill_stores"],
                         of["wide_shared_loads"], loops or "–", wide])  # fmt: skip
    header = ["kernel", "target", "registers", "shared, B", "spilled, B", "ld.shared.v4",
              "products / instructions of each loop", "LDS.128 in them"]  # fmt: skip
    return markdown(header, rows)


def bfloat16_floors():
    """The same with products of bfloat16."""
    return floors("bfloat16")


TABLES = {
    "roofline_floors": floors,
    "roofline_bfloat16": bfloat16_floors,
    "roofline_figures": figures,
}

if __name__ == "__main__":
    for table in TABLES.values():
        print(table())
