"""Attention over ten million positions in files, by a process of a few hundred megabytes.

    python ten_million.py [--length N] [--causal]

Three files of random queries, keys and values are written to a temporary directory (at ten million
positions 640 MB each, and as much for the result), and removed at the end.
"""

import argparse
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import favor_np

DIM = 16
CHUNK = 65_536


def write_random(path, length, std, rng):
    """Write a matrix (length, DIM) of float32, a chunk at a time."""
    with path.open("wb") as file:
        for start in range(0, length, CHUNK):
            rows = min(CHUNK, length - start)
            (std * rng.standard_normal((rows, DIM), np.float32)).tofile(file)


class AnonymousMemory(threading.Thread):
    """The most memory that is not a copy of a file, looked up ten times a second (Linux)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.status = Path("/proc/self/status")
        self.peak = 0
        self.stopped = threading.Event()

    def run(self):
        while self.status.exists() and not self.stopped.wait(0.1):
            lines = self.status.read_text().splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, now * 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=10_000_000, help="positions")
    parser.add_argument("--causal", action="store_true", help="query i sees keys up to i only")
    parser.add_argument("--features", type=int, default=64, help="features of the map")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    fm = favor_np.feature_map("positive", dim=DIM, num_features=args.features)
    with tempfile.TemporaryDirectory() as folder:
        shape = (args.length, DIM)
        inputs = []
        for name, std in (("q", 0.5), ("k", 0.5), ("v", 1.0)):
            path = Path(folder, name)
            write_random(path, args.length, std, rng)
            inputs.append(np.memmap(path, np.float32, "r", shape=shape))
        out = np.memmap(Path(folder, "out"), np.float32, "w+", shape=shape)
        checkpoint = Path(folder, "checkpoint")
        memory = AnonymousMemory()
        memory.start()
        start = time.perf_counter()
        favor_np.stream_attention(
            *inputs, fm, out, causal=args.causal, chunk_size=CHUNK, checkpoint=checkpoint
        )
        seconds = time.perf_counter() - start
        memory.stopped.set()
        memory.join()
        unit = 1 if sys.platform == "darwin" else 1024
        total = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        first = out[:1000].astype(np.float64)
        del inputs, out  # Windows removes no file that is open
    print(f"{args.length:,} positions, {'causal' if args.causal else 'bidirectional'}")
    print(f"{seconds:.1f} s, {args.length / seconds:,.0f} positions a second")
    print(f"peak resident memory: {total / 1e6:.0f} MB, of it anonymous {memory.peak / 1e6:.0f} MB")
    print(f"standard deviation of the first 1,000 rows: {first.std():.4f}")


if __name__ == "__main__":
    main()
