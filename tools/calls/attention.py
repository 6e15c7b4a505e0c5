"""Calls of attention and its gradients: every option, kind of map, dtype, odd sizes, threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

import favor_np
from favor_np import AttentionState, FeatureMap, feature_map

Cases = Iterator[tuple[str, Callable[[], Any]]]
DTYPES = {"f4": np.float32, "f8": np.float64, "f2": np.float16, "b2": ml_dtypes.bfloat16}
BOTH = (True, False)


def take(result: Any, names: str) -> list[Any]:
    """Return some fields of a result."""
    return [getattr(result, name) for name in names.split()]


def content(state: AttentionState) -> list[Any]:
    """Return all that a state holds."""
    return take(state, "c S z lengths decay")


def numbers(*shape: int, seed: int = 0, std: float = 1.0) -> Any:
    """Draw normal numbers."""
    return std * np.random.Generator(np.random.Philox(seed)).standard_normal(shape)


def mask_of(*shape: int) -> Any:
    """Draw a mask, with about two thirds of the keys."""
    return numbers(*shape, seed=4) < 0.5


def tensors(
    length: int = 150, dim: int = 16, width: int = 12, *, heads: tuple[int, ...] = (2,),
    own: tuple[int, ...] | None = None, keys: int | None = None, dtype: str = "f4", std: float = 0.7,
) -> list[Any]:  # fmt: skip
    """Draw q, k and v; `own` are the leading axes of k and v where they are not those of q."""
    own, keys = heads if own is None else own, length if keys is None else keys
    q = numbers(*heads, length, dim, seed=1, std=std)
    k = numbers(*own, keys, dim, seed=2, std=std)
    return [x.astype(DTYPES[dtype]) for x in (q, k, numbers(*own, keys, width, seed=3))]


MAPS: dict[str, dict[str, Any]] = {
    "pair": {"antithetic": True},
    "plain": {"antithetic": False},
    "iid": {"projection": "iid", "antithetic": True, "scale": 0.3, "rng": 3},
    "sqrt": {"norms": "sqrt", "antithetic": True, "dtype": np.float64},
    "relu": {"kind": "relu", "antithetic": False, "kernel_epsilon": 0.01},
    "elu": {"kind": "elu", "antithetic": False},
}


@functools.cache
def make(name: str, dim: int = 16, features: int = 70, *, center: bool = True) -> FeatureMap:
    """Return a map of MAPS; or "METHOD MAP", calibrated, or "METHOD/ MAP", head by head."""
    *method, base = name.split()
    options = {"kind": "positive"} | MAPS[base]
    fm = feature_map(options.pop("kind"), dim=dim, num_features=features, **options)
    if not method:
        return fm
    q, k, _ = tensors(100, dim, heads=(2,) if "/" in name else (), std=1.0)
    return fm.calibrate(q + 0.3, k - 0.2, method=method[0].strip("/"), center=center)


def attend(fm: FeatureMap | None, options: dict[str, Any], *, vjp: bool, **shape: Any) -> Any:
    """Attend, exactly if there is no map; the gradients, too, of `vjp`.

    Two options are none of the call: "before" holds those of a state, "inputs" makes other arrays.
    """
    options = dict(options)
    q, k, v = options.pop("inputs", lambda *arrays: arrays)(*tensors(**shape))
    if (before := options.pop("before", None)) is not None:
        assert fm is not None
        kind = np.float64 if v.dtype == np.float64 else np.float32
        state = AttentionState.zeros(
            fm, value_dim=v.shape[-1], batch_shape=k.shape[:-2], dtype=kind, **before
        )
        state.update(k[..., ::-1, :] / 2, v, cu_seqlens=options.get("cu_seqlens"))
        options["state"] = state
    if "out" in options:
        options["out"] = options["out"](q, v)
    call = ("exact" if fm is None else "favor") + "_attention" + "_vjp" * vjp
    arguments = (q, k, v) if fm is None else (q, k, v, fm)
    result, pullback = getattr(favor_np, call)(*arguments, **options), None
    if vjp:
        result, pullback = result
    found, after = [result], []
    if options.get("return_state"):
        found = [result[0], content(result[1])]
        after = [[numbers(*x.shape, seed=6) for x in found[1][1:3]]]
    if pullback is not None:
        grads = pullback(numbers(*found[0].shape, seed=5).astype(found[0].dtype), *after)
        found += take(grads, "q k v")
        found += [x for x in (grads.key_bias, grads.decay) if x is not None]
        if fm is not None:
            found += [grads.projection, grads.state and take(grads.state, "S z")]
    return found


def spoiled(q: Any, k: Any, v: Any) -> Any:
    """Put NaN and infinity into some rows."""
    q[..., 5, 0], k[..., 70, 1], v[..., 90, 2] = np.nan, np.nan, np.inf
    return q, k, v


def turned(q: Any, k: Any, v: Any) -> Any:
    """Give arrays that are not in C order, read-only, or byte-swapped."""
    k.setflags(write=False)
    swapped = v if v.dtype == DTYPES["b2"] else v.astype(v.dtype.newbyteorder())
    return np.asfortranarray(q), k[..., ::-1, :], swapped


def rounded(*arrays: Any) -> Any:
    """Give integers."""
    return [array.astype(np.int16) for array in arrays]


GROUPED = {"heads": (2, 4), "own": (2, 2)}
MIXED: dict[str, Any] = {"enable_gqa": True, "key_mask": mask_of(2, 2, 150)}
PACKED: dict[str, Any] = {"cu_seqlens": [0, 1, 1, 66, 150]}
Options = dict[str, tuple[dict[str, Any], dict[str, Any]]]  # of `tensors`, and of the call
EXACT: Options = {
    "default": ({}, {}),
    "mask": ({}, {"key_mask": mask_of(2, 150)}),
    "no key": ({}, {"key_mask": np.arange(150) > np.array([[200], [100]])}),
    "grouped": (GROUPED, {"enable_gqa": True}),
    "grouped mask": (GROUPED, MIXED),
    "broadcast": ({"heads": (3, 2), "own": (1, 2)}, {}),
    "strong": ({"std": 4.0}, {}),
    "huge": ({"std": 3000.0}, {}),
    "nan": ({}, {"inputs": spoiled}),
    "layout": ({}, {"inputs": turned}),
    "integers": ({"std": 3.0, "dtype": "f8"}, {"inputs": rounded}),
    "finite": ({}, {"check_finite": True}),
    "keys": ({"keys": 77}, {}),
    "no keys": ({"keys": 0}, {}),
}
BIAS = numbers(2, 150, seed=7, std=300.0)
GATES = 1 / (1 + numbers(2, 150, seed=8) ** 2)
#: What only exact attention takes, or differentiates.
WEIGHED: dict[str, dict[str, Any]] = {
    "window": {"causal": True, "window": 40},
    "window packed": {"causal": True, "window": 9, "key_mask": mask_of(150)} | PACKED,
    "window pair": {"causal": False, "window": (30, 7)},
    "one side": {"causal": False, "window": (None, 7)} | PACKED,
    "bias": {"causal": False, "key_bias": BIAS},
    "bias causal": {"causal": True, "key_bias": np.where(mask_of(150), BIAS, -np.inf)},
    "gates": {"causal": True, "decay": GATES},
    "decay": {"causal": True, "decay": [0.9, 1.0], "key_bias": BIAS[:1]} | PACKED,
    "all": {"causal": True, "decay": GATES, "key_bias": BIAS, "window": 20} | PACKED,
}
FAVOR: Options = EXACT | {
    "packed": ({}, {"key_mask": mask_of(150)} | PACKED),
    "state": ({}, {"before": {}, "return_state": True}),
    "packed state": ({}, {"before": {"sequences": 4}, "return_state": True} | PACKED),
    "new state": (GROUPED, {"return_state": True} | MIXED),
    "decay": ({}, {"decay": 0.9, "return_state": True}),
    "decay heads": (GROUPED, {"decay": [0.5, 1.0]} | MIXED),
    "decay packed": ({}, {"decay": [0.99, 0.01]} | PACKED),
    "decay state": ({}, {"before": {"decay": [0.9, 0.97]}, "return_state": True}),
    "out": ({}, {"out": lambda _, v: np.zeros_like(v)}),
    "out overlaps": ({"width": 16}, {"out": lambda q, _: q}),
    "window 1": ({}, {"window": 1}),
    "window 40": (GROUPED, {"window": 40} | MIXED),
    "window packed": ({}, {"window": 9, "decay": 0.95} | PACKED),
}
SIZES = [  # length, dim, width, features
    (0, 4, 3, 8), (1, 1, 1, 2), (1, 16, 16, 64), (2, 3, 5, 10), (17, 7, 5, 24), (63, 8, 1, 16), (64, 64, 64, 128),
    (65, 33, 20, 300), (129, 16, 16, 70), (200, 64, 64, 256), (70, 1, 3, 2), (90, 130, 70, 34),
]  # fmt: skip
MEDIUM = [(1023, 64, 64, 128), (1025, 64, 64, 128), (3000, 33, 20, 300)]  # threads share these
LONG = [(9000, 16, 16, 64), (270_000, 4, 3, 8)]  # these are cut into segments
SIZED: dict[str, Callable[[int], dict[str, Any]]] = {
    "default": lambda _: {},
    "mask": lambda length: {"key_mask": mask_of(length)},
    "packed": lambda length: {"cu_seqlens": [0, 5, length // 3, length]},
    "state": lambda _: {"before": {}, "return_state": True},
    "decay": lambda _: {"decay": 0.999, "return_state": True},
    "window": lambda _: {"window": 700},
    "bfloat16": lambda _: {"precision": "bfloat16"},
}


def fits(options: dict[str, Any], *, vjp: bool, dtype: str, **shape: Any) -> bool:
    """Whether a call may have all that together."""
    names = options.keys() | options.get("before", {}).keys()
    return not (
        ({"decay", "window"} & names and not options["causal"])
        or ("keys" in shape and options["causal"])
        or ({"out", "window", "precision"} & names and vjp)
        or ("precision" in names and ("window" in names or dtype == "f8"))
    )


def crossed(maps: Any, table: Options, dtypes: Any, vjps: Any = BOTH, **always: Any) -> Cases:
    """Give all that fits together of a table of options, for ordinary sizes."""
    for name, dtype, causal, vjp in product(maps, dtypes, BOTH, vjps):
        for title, (shape, options) in table.items():
            shape = {"dtype": dtype, "vjp": vjp} | shape
            options = options | always | {"causal": causal}
            if fits(options, **shape) and shape["dtype"] == dtype:
                fm = None if name == "exact" else make(name)
                text = [title, *(f"{n}={x}" for n, x in always.items())]
                yield (
                    title_of(name, dtype, causal, vjp, *text),
                    partial(attend, fm, options, **shape),
                )


def sized(
    maps: Any, sizes: Any, titles: Any, dtypes: Any = ("f4",), vjps: Any = BOTH, threads: Any = (None,)
) -> Cases:  # fmt: skip
    """Give all that fits together, for one head of several sizes."""
    for name, size, title, dtype, causal, vjp in product(maps, sizes, titles, dtypes, BOTH, vjps):
        length, dim, width, features = size
        shape = {"length": length, "dim": dim, "width": width, "dtype": dtype, "vjp": vjp}
        for count in threads:
            options = SIZED[title](length) | {"causal": causal, "num_threads": count}
            if fits(options, **shape):
                fm = None if name == "exact" else make(name, dim, features)
                call = partial(attend, fm, options, heads=(1,), **shape)
                yield title_of(name, dtype, causal, vjp, title, size, f"threads={count}"), call


def title_of(name: str, dtype: str, causal: bool, vjp: bool, *more: Any) -> str:
    """Return the name of a call."""
    way = "causal" if causal else "whole"
    return " ".join(map(str, ("vjp" if vjp else "out", name, dtype, way, *more)))


def favor() -> Cases:
    """Give calls of `favor_attention` and `favor_attention_vjp`."""
    maps = "pair", "plain", "relu", "aderf+sderf/ pair"
    yield from crossed(maps, FAVOR, ("f4", "f8"))
    yield from crossed(("pair",), FAVOR, ("f2", "b2"))
    yield from crossed(maps, FAVOR, ("f4",), (False,), precision="bfloat16")
    yield from crossed(("pair",), FAVOR, ("b2",), (False,), precision="bfloat16")
    yield from sized(MAPS, SIZES, ["default"], ("f4", "f8"), (False,))
    yield from sized(("pair", "relu"), SIZES, ["default"], ("f8",), (True,))
    yield from sized(("pair", "aderf pair"), MEDIUM, SIZED, threads=(1, 2, 3))
    yield from sized(("plain", "elu"), MEDIUM, ["default", "state"], ("f4", "f8"), threads=(2,))
    yield from sized(("pair",), LONG, SIZED, threads=(1, 2))
    yield "one feature", partial(attend, make("plain", 16, 1), {"causal": True}, vjp=True)


def exact() -> Cases:
    """Give calls of `exact_attention` and `exact_attention_vjp`."""
    yield from crossed(("exact",), EXACT, DTYPES)
    yield from crossed(("exact",), EXACT, ("f4", "f8"), scale=0.3)
    yield from crossed(("exact",), EXACT, ("f4", "b2"), (False,), precision="bfloat16")
    yield from sized(("exact",), SIZES, ["default"], ("f4", "f8"))
    yield from sized(("exact",), MEDIUM, ["default", "mask", "bfloat16"], threads=(1, 2, 3))
    for (title, options), dtype, vjp in product(WEIGHED.items(), ("f4", "f8", "b2"), BOTH):
        call = partial(attend, None, options, dtype=dtype, vjp=vjp)
        yield title_of("exact", dtype, options["causal"], vjp, title), call
