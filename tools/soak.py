"""A hundred thousand calls of every kind: memory has to stay flat, and results the same.

python tools/soak.py --calls 100000
python tools/soak.py --calls 16000 --threads 16
"""

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import favor_np

GROWTH = 4e6  # bytes, between the second tenth of the calls and the last


def resident():
    """Bytes of memory that are this process's own."""
    pages = Path("/proc/self/statm").read_text().split()
    return 4096 * (int(pages[1]) - int(pages[2]))


def calls():
    """Functions without arguments, each of which returns an array."""
    rng = np.random.default_rng(0)
    for dtype, length in itertools.product((np.float32, np.float64), (1, 63, 300)):
        q, k, v = rng.standard_normal((3, 2, length, 16)).astype(dtype)
        fm = favor_np.feature_map("positive", dim=16, num_features=32, dtype=dtype)
        state = favor_np.AttentionState.zeros(fm, value_dim=16, batch_shape=2)
        state.update(k, v)

        def steps(q=q, k=k, v=v, state=state):
            own = state.copy()
            return own.step(q[:, 0], k[:, 0], v[:, 0])

        def gradient(q=q, k=k, v=v, fm=fm):
            out, pullback = favor_np.favor_attention_vjp(q, k, v, fm, causal=True)
            return pullback(out).k

        yield lambda q=q, k=k, v=v, fm=fm: favor_np.favor_attention(q, k, v, fm)
        yield lambda q=q, k=k, v=v, fm=fm: favor_np.favor_attention(q, k, v, fm, causal=True)
        yield lambda q=q, k=k, v=v: favor_np.exact_attention(q, k, v, causal=True)
        yield lambda q=q, state=state: state.attend(q)
        yield steps
        yield gradient


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1, help="how many share the calls")
    args = parser.parse_args()
    count, kinds = args.calls // args.threads, list(calls())
    first, sizes = [call() for call in kinds], []

    def share(thread):
        for number in range(count):
            at = (number + thread) % len(kinds)
            if not (kinds[at]() == first[at]).all():
                raise SystemExit(f"call {number:,} has another result than the first of its kind")
            if thread == 0 and number % max(1, count // 100) == 0:
                sizes.append(resident())

    start = time.perf_counter()
    with ThreadPoolExecutor(args.threads) as pool:
        list(pool.map(share, range(args.threads)))  # raises what a thread has raised
    seconds = time.perf_counter() - start
    tenth = max(1, len(sizes) // 10)
    growth = max(sizes[-tenth:]) - max(sizes[tenth : 2 * tenth])
    print(f"{args.calls:,} calls in {seconds:.0f} s, memory {sizes[-1] / 1e6:.0f} MB")
    print(f"the last tenth has {growth / 1e6:+.2f} MB beside the second")
    if growth > GROWTH:
        raise SystemExit("memory grows")


if __name__ == "__main__":
    main()
