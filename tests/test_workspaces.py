"""Workspaces are as large as the kernels' own code cuts them."""

import inspect
import re
from collections import Counter

import numpy as np
import pytest

from favor_np.cpu.kernels import chunk, exact, exact_vjp, favor_vjp, products, spread
from favor_np.cpu.memory import measure

FLOATS, INTS = np.zeros(0, np.float32), np.zeros(0, np.int32)
ROOM = np.zeros((1, 0), np.float32)
#: Each function that cuts a workspace, and arguments that make it cut all that it can.
CARVES = {
    "attention": (chunk.carve, (FLOATS, INTS, 2, None, None, 17, 48, 32, 3)),
    "its gradient": (favor_vjp.carve, (FLOATS, INTS, 2, None, 17, 48, 32, 3)),
    "error bars": (spread.carve_groups, ((), ROOM, 0, 3, 48, 32)),
    "exact attention": (exact.carve_exact, (FLOATS, INTS, None, None, 17, 48)),
    "the gradient of exact attention": (exact_vjp.carve_gradient, (FLOATS, INTS, 17, 48)),
}
#: What these call: where it is called, and how that must be called for it.
PARTS = {
    "pairs": (products.carve_pairs, chunk, "carve", (2, True, None, 17, 48, 32, 3)),
    "parts": (products.carve_parts, chunk, "carve", (2, True, True, 17, 48, 32, 3)),
    "parts of gradients": (products.carve_parts, favor_vjp, "carve", (2, True, 17, 48, 32, 3)),
    "exact pairs": (exact.carve_exact_pairs, exact, "carve_exact", (True, None, 17, 48)),
    "exact parts": (exact.carve_exact_parts, exact, "carve_exact", (None, True, 17, 48)),
}


def asking_for_more(carve):
    """The same function, with three rows of 32 floats more behind its first matrix."""
    source = inspect.getsource(carve.py_func)
    (first,) = re.findall(r"^ +\w+, at = cut\(floats, .*\n", source, re.MULTILINE)[:1]
    names = dict(carve.py_func.__globals__)
    exec(source.replace(first, f"{first}    more, at = cut(floats, at, 3, 32)\n"), names)
    return names[carve.__name__]


MORE = Counter({FLOATS.dtype: 3 * 32})


@pytest.mark.parametrize(("carve", "args"), CARVES.values(), ids=CARVES)
def test_a_carve_that_asks_for_more_gets_more(carve, args):
    assert measure(asking_for_more(carve), *args) == measure(carve, *args) + MORE


@pytest.mark.parametrize(("part", "module", "name", "args"), PARTS.values(), ids=PARTS)
def test_so_do_the_parts_that_a_carve_calls(part, module, name, args, monkeypatch):
    carve = getattr(module, name)
    before = measure(carve, FLOATS, INTS, *args)
    monkeypatch.setattr(module, part.__name__, asking_for_more(part))
    assert measure(carve, FLOATS, INTS, *args) == before + MORE
