"""Forward and backward through causal attention over a hundred million positions in a file.

    python hundred_million.py [--length N] [--folder F] [--check]

A series x of random vectors attends to itself, queries, keys and values being x, and the gradient
of ``(attention(x)**2).sum() / 2`` by x is written to a second file.  The series is read twice: once
forwards, to fold keys and values, of which the states between pieces are kept (some kilobytes
each); then from the last piece to the first, each of which gets the state before it and the
gradient of the state behind it.

Both files lie in the folder (at a hundred million positions 26 GB each), with the progress: if the
program is stopped, by kill -9 as well, the same command goes on.  With --check the gradient is
compared with that of one call in memory.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import favor_np

DIM = FEATURES = 64
STD = 0.5


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=100_000_000, help="positions")
    parser.add_argument("--piece", type=int, default=262_144, help="positions in memory at a time")
    parser.add_argument("--folder", type=Path, default=Path("hundred_million"), help="for files")
    parser.add_argument("--check", action="store_true", help="compare with one call in memory")
    return parser.parse_args()


class Run:
    """The files of a run, and how far it has come."""

    def __init__(self, args):
        self.folder, self.length, self.memory = args.folder, args.length, 0
        cuts = [*range(0, args.length, args.piece), args.length]
        self.pieces = [slice(*cut) for cut in itertools.pairwise(cuts)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.map = favor_np.feature_map("positive", dim=DIM, num_features=FEATURES)
        self.x, self.dx = (self.file(name) for name in ("x", "dx"))

    def file(self, name):
        path, shape = self.folder / name, (self.length, DIM)
        mode = "r+" if path.exists() else "w+"
        return np.memmap(path, np.float32, mode, shape=shape)

    def bar(self, label, pieces):
        """Go through pieces, with a bar that counts positions."""
        with tqdm(total=self.length, unit="pos", unit_scale=True, desc=label, ncols=79) as bar:
            bar.update(self.length - sum(p.stop - p.start for _, p in pieces))
            for number, piece in pieces:
                yield number, piece
                bar.update(piece.stop - piece.start)
                self.memory = max(self.memory, anonymous_memory())

    def numbered(self):
        return list(enumerate(self.pieces))

    def write_series(self):
        """Write what is missing of x: every piece has random numbers of its own."""
        done = self.folder / "written"
        first = int(done.read_text()) if done.exists() else 0
        for number, piece in self.bar("series  ", self.numbered()[first:]):
            rng = np.random.default_rng((0, number))
            shape = (piece.stop - piece.start, DIM)
            self.x[piece] = STD * rng.standard_normal(shape, np.float32)
            self.x.flush()
            replace(done, str(number + 1))
            release(self.x)

    def state_before(self, number):
        return self.folder / f"state-{number}"

    def fold(self):
        """Keep the state before each piece."""
        missing = [n for n, _ in self.numbered() if not self.state_before(n).exists()]
        if not missing:
            return
        first = max(missing[0] - 1, 0)
        state = favor_np.AttentionState(self.map, DIM)
        if missing[0] > 0:
            state = favor_np.AttentionState.load(self.state_before(first))
        else:
            state.save(self.state_before(0))
        for number, piece in self.bar("forward ", self.numbered()[first:-1]):
            state.update(self.x[piece], self.x[piece])
            state.save(self.state_before(number + 1))
            release(self.x)

    def pull(self):
        """Write the gradient, piece by piece from the last one; return the loss."""
        saved = self.folder / "gradient.npz"
        pieces, loss, behind = self.numbered()[::-1], 0.0, None
        if saved.exists():
            with np.load(saved) as found:
                pieces = pieces[int(found["done"]) :]
                loss, behind = float(found["loss"]), (found["S"], found["z"], found["c"])
        for number, piece in self.bar("backward", pieces):
            x = np.array(self.x[piece])
            state = favor_np.AttentionState.load(self.state_before(number))
            (out, after), pullback = favor_np.favor_attention_vjp(
                x, x, x, self.map, causal=True, state=state, return_state=True
            )
            grads = pullback(out, None if behind is None else relative(behind, after.c))
            self.dx[piece] = grads.q + grads.k + grads.v
            self.dx.flush()  # before the progress says so
            loss += float(np.square(out, dtype=np.float64).sum()) / 2
            behind = (*grads.state, state.c)
            s, z, c = behind
            temporary = self.folder / "gradient.tmp.npz"
            np.savez(temporary, done=len(self.pieces) - number, loss=loss, S=s, z=z, c=c)
            temporary.replace(saved)
            release(self.x)
            release(self.dx)
        return loss


def relative(gradient, c):
    """Return the gradient of a state whose sums are relative to 2**c, from one of other exponents."""
    s, z, before = gradient
    by = np.where((z != 0) & (before > -(2**20)) & (c > -(2**20)), c - before, 0)
    return np.ldexp(s, by[:, None]), np.ldexp(z, by)


def anonymous_memory():
    """Return how much memory is no copy of a file (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
    return sum(found)


def replace(path, text):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def release(array):
    """Leave the pages of a file to the system's cache."""
    if hasattr(array._mmap, "madvise"):
        import mmap

        array._mmap.madvise(mmap.MADV_DONTNEED)


def main():
    args = parsed()
    run = Run(args)
    run.write_series()
    start = time.perf_counter()
    run.fold()
    middle = time.perf_counter()
    loss = run.pull()
    end = time.perf_counter()
    print(f"{args.length:,} positions, loss {loss:.6g}")
    print(f"forward fold {middle - start:.1f} s, forward and backward {end - middle:.1f} s")
    print(f"{args.length / (end - start):,.0f} positions a second (of what this run did)")
    if run.memory:
        print(f"resident memory beside the pages of files: {run.memory / 1e6:.0f} MB")
    if args.check:
        x = np.array(run.x)
        out, pullback = favor_np.favor_attention_vjp(x, x, x, run.map, causal=True)
        grads = pullback(out)
        expected = grads.q + grads.k + grads.v
        error = np.abs(run.dx - expected).max() / np.abs(expected).max()
        print(f"largest difference to one call in memory: {error:.1e} of the largest gradient")


if __name__ == "__main__":
    main()
