"""Copies of the package, as they are and with machine code for this processor beside them."""

import runpy
import shutil
from pathlib import Path

import numpy as np

import favor_np
from favor_np.cpu import code
from favor_np.cpu.processor import TARGET

PACKAGE = Path(favor_np.__file__).parent
PREBUILD = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "prebuild.py"))

#: What tests call in float32, without bfloat16.
KERNELS = {
    "holds_large": [""],
    "attend": ["", "pipeline"],
    "attend_tokens": [""],
    "pull": [""],
    "attend_exact": [""],
    "differentiate_exact": [""],
}

#: What calls all these kernels, and leaves the results in a list.
CALLS = """
import numpy as np
import favor_np

rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 1, 4096, 32)).astype(np.float32)
fm = favor_np.feature_map("positive", dim=32, num_features=64)
results = [favor_np.favor_attention(q, k, v, fm)]
for threads in (1, 3):
    results.append(favor_np.favor_attention(q, k, v, fm, causal=True, num_threads=threads))
results.append(favor_np.exact_attention(q, k, v))
for out, pull in (
    favor_np.favor_attention_vjp(q, k, v, fm, causal=True),
    favor_np.favor_attention_vjp(q, k, v, fm),
    favor_np.exact_attention_vjp(q, k, v),
):
    grads = pull(v)
    results += [out, grads.q, grads.k, grads.v]
state = favor_np.AttentionState.zeros(fm, 32, 1).update(k, v)
results.append(state.step(q[:, 0], k[:, 0], v[:, 0]))
results += [state.attend(q), state.S]
"""


def copy(place):
    """Copy the package to a folder from which a process may import it; return the folder."""
    ignored = shutil.ignore_patterns("__pycache__", "libraries")
    shutil.copytree(PACKAGE, place / "favor_np", ignore=ignored)
    return place


def folder(place):
    """Where the libraries of such a copy lie."""
    return place / "favor_np" / "cpu" / "libraries"


def objects(work):
    """Write the object code of `KERNELS` for this processor to a folder; return their symbols."""
    symbols = []
    for name, variants in KERNELS.items():
        for variant in variants:
            kernel = code.Kernel(name, np.dtype(np.float32), frozenset(variant.split()))
            (work / f"{kernel.symbol}.o").write_bytes(kernel.object_code())
            symbols.append(kernel.symbol)
    return symbols


def ship(place, work):
    """Give a copy of the package the libraries of `KERNELS`; `work` is a folder for drafts."""
    target, found = folder(place), {}
    target.mkdir()
    makers = {TARGET.level: objects, "processor": PREBUILD["compile_processor"]}
    for name, make in makers.items():
        if name != "processor" or PREBUILD["X86"]:
            (work / name).mkdir()
            path = target / f"{name}.{PREBUILD['SUFFIX']}"
            found[name] = PREBUILD["link"](work / name, make(work / name), path)
    PREBUILD["write_manifest"](target, found)
    return place
