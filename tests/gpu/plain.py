"""The case table on a GPU without pytest: python tests/gpu/plain.py [part of a case's name]."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "cuda")]

import cases
import naive

import favor_np
from favor_np.cuda import device


def error(case, cuda):
    """Of a call with arrays on the device, against the dense oracle."""
    options = case.keywords()
    if "key_mask" in options:
        options["key_mask"] = cuda.to_device(options["key_mask"])
    arrays = [cuda.to_device(x) for x in case.arrays()]
    out = favor_np.favor_attention(*arrays, case.feature_map(), **options)
    return naive.relative_error(out.copy_to_host(), case.expected())


def main(part=""):
    """Run the cases whose names have `part`; the number of those that are wrong."""
    device.current()  # raises what is missing
    cuda, wrong = device.numba_cuda(), 0
    for name, case in cases.CASES.items():
        if part in name:
            found, allowed = error(case, cuda), case.tolerance()
            wrong += not found < allowed
            print(f"{'ok' if found < allowed else 'WRONG':6}{name:24}{found:.2e} < {allowed:.2e}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
