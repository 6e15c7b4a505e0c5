"""The case table, and steps, on a GPU without pytest: python tests/gpu/plain.py [part of a name]."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "cuda")]

import cases
import numpy as np
from support import oracle
from support.tolerance import relative_error, relative_rms

import favor_np
from favor_np.cuda import device


def errors(case, cuda):
    """Of a call with arrays on the device, and of its gradients, against the dense oracle."""
    options = case.keywords()
    if "key_mask" in options:
        options["key_mask"] = cuda.to_device(options["key_mask"])
    arrays, fm = [cuda.to_device(x) for x in case.arrays()], case.feature_map()
    out = favor_np.favor_attention(*arrays, fm, **options).copy_to_host()
    yield "", relative_error(out, case.expected()), case.tolerance()
    grad = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
    _, pullback = favor_np.favor_attention_vjp(*arrays, fm, **options)
    found = pullback(cuda.to_device(grad))
    q, k, v, _, *bias = oracle.favor_attention_vjp(*case.arrays(), fm, grad, **case.keywords())
    for name, wanted in zip(("q", "k", "v", "key_bias"), (q, k, v, *bias), strict=False):
        gradient = getattr(found, name)
        host = gradient if name == "key_bias" else gradient.copy_to_host()
        error = np.abs(host - wanted).max()
        yield f" d{name}", error / max(np.abs(wanted).max(), 1), 10 * case.tolerance()


def bfloat16_errors(cuda):
    """Of products of bfloat16; and how far later keys change an earlier row, which is not at all."""
    for name in ("causal-131", "full-131", "wide", "narrow"):
        case = cases.CASES[name]
        options = case.keywords() | {"precision": "bfloat16"}
        arrays, fm = case.arrays(), case.feature_map()
        out = favor_np.favor_attention(*map(cuda.to_device, arrays), fm, **options).copy_to_host()
        yield f"{name} bfloat16", relative_rms(out, case.expected()), 2e-2
        if case.causal:
            half = case.length // 2
            for x in arrays:
                x[..., half:, :] *= 1e6
            found = favor_np.favor_attention(*map(cuda.to_device, arrays), fm, **options)
            changed = found.copy_to_host()[..., :half, :] != out[..., :half, :]
            yield f"{name} bfloat16, later keys", float(changed.sum()), 0.5


def main(part=""):
    """Run the cases whose names have `part`; the number of results that are wrong."""
    device.current()  # raises what is missing
    cuda, wrong = device.numba_cuda(), 0
    for name, found, allowed in checks(cuda, part):
        wrong += not found < allowed
        said = "ok" if found < allowed else "WRONG"
        print(f"{said:6}{name:24}{found:.2e} < {allowed:.2e}", flush=True)
    return wrong


def checks(cuda, part):
    """Go through names, errors and what is allowed."""
    for name, case in cases.CASES.items():
        if part in name:
            for text, *numbers in errors(case, cuda):
                yield name + text, *numbers
    if part in "bfloat16":
        yield from bfloat16_errors(cuda)
    if part in "steps":
        yield from cases.step_errors(cuda)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
