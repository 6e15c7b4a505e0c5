"""Damaged files of every format: each has to be read, or refused with a plain error.

    python tools/fuzz_files.py --seconds 600       # that long for each format

What is read from files of anyone is damaged in five ways, by a generator whose seed is printed with
whatever goes wrong.
"""

import argparse
import contextlib
import gzip
import io
import os
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np

import favor_np
from favor_np import nn
from favor_np.compare._data import tokens
from favor_np.forecast import read_prices

REFUSED = (ValueError, OSError)  # what the documentation promises


def read_tokens(path):
    return tokens(str(path), 16, 8, 0.0, 0)


def samples(folder):
    """One good file of each format, and what reads it."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 40, 8))
    fm = favor_np.feature_map("positive", dim=8, num_features=16)
    states = {
        "state": favor_np.AttentionState.zeros(fm, value_dim=8, batch_shape=2),
        "window": favor_np.WindowState(fm, window=16, value_dim=8, batch_shape=2),
    }
    for name, state in states.items():
        for t in range(20):
            state.step(q[:, t], k[:, t], v[:, t])
        state.save(folder / name)
        yield name, (folder / name).read_bytes(), ".npz", type(state).load
    model = nn.PerformerLM(vocab=8, dim=8, depth=1, heads=1, num_features=8)
    params = model.init(np.random.default_rng(0))
    nn.save(folder / "model", model, params, nn.AdamW(params), step=3)
    yield "model", (folder / "model").read_bytes(), ".safetensors", nn.load
    np.savez(folder / "data.npz", q=q, k=k)
    yield "queries and keys", (folder / "data.npz").read_bytes(), ".npz", read_tokens
    days = np.arange("2024-01-01", "2024-03-01", dtype="datetime64[D]")
    prices = 50 + rng.standard_normal(len(days)).cumsum()
    rows = "".join(f"{day},{price:.2f}\n" for day, price in zip(days, prices, strict=True))
    text = f"Date,Close\n{rows}".encode()
    yield "text", text, ".csv", read_prices
    yield "gzip", gzip.compress(text), ".csv.gz", read_prices
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("prices.csv", text)
    yield "zip", packed.getvalue(), ".zip", read_prices
    with contextlib.suppress(ImportError):
        import pandas as pd

        frame = pd.DataFrame({"Date": days, "Close": prices})
        for name, write in (("xlsx", frame.to_excel), ("parquet", frame.to_parquet),
                            ("feather", frame.to_feather)):  # fmt: skip
            write(folder / f"frame.{name}")
            yield name, (folder / f"frame.{name}").read_bytes(), f".{name}", read_prices


def damaged(rng, data):
    """Return a copy with bits turned, bytes exchanged, or parts lost, doubled or moved."""
    bytes_ = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, width = rng.integers(len(bytes_) or 1), rng.integers(1, 64)
        match rng.integers(5):
            case 0 if bytes_:
                bytes_[at] ^= 1 << rng.integers(8)
            case 1:
                bytes_[at : at + 4] = rng.bytes(4)
            case 2:
                del bytes_[at : at + width]
            case 3:
                bytes_[at:at] = bytes_[at : at + width]
            case 4:
                del bytes_[at:]
    return bytes(bytes_)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="for each format")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, data, suffix, read in samples(folder):
            path, seed, read_well = folder / f"damaged{suffix}", args.seed, 0
            end = time.monotonic() + args.seconds
            while time.monotonic() < end:
                seed += 1
                path.write_bytes(damaged(np.random.default_rng(seed), data))
                try:
                    read(path)
                    read_well += 1
                except REFUSED:
                    pass
                except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                    wrong += 1
                    print(f"{kind}, seed {seed}: {type(error).__name__}: {error}", flush=True)
                os.unlink(path)
            print(f"{kind}: {seed - args.seed:,} files, {read_well:,} of them read", flush=True)
    if wrong:
        raise SystemExit(f"{wrong} files were refused with an error that is not promised")


if __name__ == "__main__":
    main()
