#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6 (Linux, x86-64)
#
# torch.set_flush_denormal(True) counts for the thread that calls it and for the threads that this one
# starts afterwards, not for threads that run already. It is not only for torch: NumPy's results in
# those threads change too, and Python prints 1e-310 as 0.0 there, so the values are compared here by
# their bits.
#
# Seen:
#   main thread, before: NumPy kept, torch kept
#   main thread, after: NumPy flushed, torch flushed
#   thread started before: NumPy kept, torch kept
#   thread started after: NumPy flushed, torch flushed
#   repr of 1e-310 in the main thread: 1e-310 before, 0.0 after
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

v/bin/python - <<'PYTHON'
import threading

import numpy as np
import torch

BITS = np.array([1e-310]).view("i8")  # the bits of a subnormal number
seen = {}


def look(name):
    by_numpy = (BITS.view("f8") * 1.0).view("i8")[0] != 0
    by_torch = (torch.from_numpy(BITS.copy()).view(torch.float64) * 1.0).view(torch.int64)[0] != 0
    kept = ["kept" if value else "flushed" for value in (by_numpy, by_torch)]
    seen[name] = kept
    print(f"{name}: NumPy {kept[0]}, torch {kept[1]}", flush=True)


running, go = threading.Event(), threading.Event()


def wait_and_look():
    running.set()
    go.wait()
    look("thread started before")


early = threading.Thread(target=wait_and_look)
early.start()
running.wait()
look("main thread, before")
number = float(BITS.view("f8")[0])
reprs = [repr(number)]
supported = torch.set_flush_denormal(True)
look("main thread, after")
reprs.append(repr(number))
go.set()
early.join()
late = threading.Thread(target=look, args=("thread started after",))
late.start()
late.join()
print(f"repr of 1e-310 in the main thread: {reprs[0]} before, {reprs[1]} after")

assert supported
assert seen == {
    "main thread, before": ["kept", "kept"],
    "main thread, after": ["flushed", "flushed"],
    "thread started before": ["kept", "kept"],
    "thread started after": ["flushed", "flushed"],
}
assert reprs == ["1e-310", "0.0"]
PYTHON
