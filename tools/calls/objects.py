"""Calls of feature maps, states, streams, and of what tells errors."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import favor_np
from favor_np import AttentionState, FeatureMap, WindowState

from .attention import BOTH, MAPS, Cases, attend, content, make, mask_of, take, tensors

METHODS = [
    "oprf", "sderf", "saderf", "aderf", "saderf+sderf", "aderf+sderf", "spherical", "auto",
]  # fmt: skip
OLD_STATES = Path(__file__).parents[2] / "tests" / "data" / "states"


def described(fm: FeatureMap) -> Any:
    """Return what a map is, and what it computes."""
    q, k, _ = tensors(30, heads=(2,), dtype="f8")
    settings = "dim num_features num_heads kind scale antithetic kernel_epsilon fingerprint"
    same = pickle.loads(pickle.dumps(fm)) == fm
    return [fm.query_features(q), fm.key_features(k), fm.projection, same, take(fm, settings)]


def maps() -> Cases:
    """Give calls of projections, of maps of all kinds and calibrations, and of their variance."""
    sizes = (1, 3), (40, 16), (7, 65)
    draw = favor_np.sample_projection
    for kind, norms, size in product(("orthogonal", "iid", "simplex"), ("chi", "sqrt"), sizes):
        yield f"rows {kind} {norms} {size}", partial(draw, *size, kind=kind, norms=norms, rng=11)
    bits = np.random.MT19937(5)
    for rng in (np.random.SeedSequence(5), bits, np.random.Generator(np.random.Philox(5))):
        yield f"rows {type(rng).__name__}", partial(draw, 9, 4, rng=rng, dtype=np.float64)
    calibrated = [f"{method}{own} pair" for method in METHODS for own in ("", "/")]
    named = {name: make(name) for name in (*MAPS, *calibrated, "auto plain", "sderf/ iid")}
    named |= {f"{name} where it is": make(name, center=False) for name in calibrated}
    rows = np.stack([draw(24, 16, rng=seed) for seed in (1, 2)])
    for kind, pair in (("positive", True), ("positive", False), ("relu", False), ("elu", False)):
        fm = FeatureMap.from_projection(rows, kind=kind, antithetic=pair, scale=0.2)
        named[f"heads {kind} {pair}"] = fm
    for name, fm in named.items():
        yield f"map {name}", partial(described, fm)
        for causal, vjp in product(BOTH, BOTH):
            call = partial(attend, fm, {"causal": causal}, vjp=vjp, heads=(3, 2))
            yield f"attention {name} causal={causal} vjp={vjp}", call
    q, k, _ = tensors(30, heads=(2,), dtype="f8")
    for name in ("pair", "plain", "iid", "sqrt", "aderf pair", "oprf/ plain", "sderf/ iid"):
        variance = partial(favor_np.kernel_variance, feature_map=make(name), q=q, k=k)
        yield f"variance {name}", variance
        yield f"relative variance {name}", partial(variance, relative=True)


def through_a_file(state: AttentionState) -> AttentionState:
    """Save, and load."""
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder, "a"))
        return AttentionState.load(Path(folder, "a"))


WAYS: dict[str, Callable[[Any], Any]] = {
    "same": lambda state: state,
    "copy": lambda state: state.copy(),
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "file": through_a_file,
}


def saved() -> bytes:
    """Return the file of a state."""
    with tempfile.TemporaryDirectory() as folder:
        _, k, v = tensors()
        state = AttentionState.zeros(make("auto/ pair"), value_dim=12, batch_shape=(2,))
        state.update(k, v).save(Path(folder, "a"))
        return Path(folder, "a").read_bytes()


def steps(state: Any, arrays: Any, start: int, stop: int) -> list[Any]:
    """Append tokens one by one."""
    return [state.step(*(x[..., i, :] for x in arrays)) for i in range(start, stop)]


def grown(name: str, dtype: str, way: str, count: int, decay: Any) -> Any:
    """Fold, step, read, leave by some way, go on, and merge."""
    arrays = q, k, v = tensors(dtype=dtype)
    state = AttentionState.zeros(
        make(name), value_dim=12, batch_shape=(2,), decay=decay, dtype=q.dtype
    )
    later = state.copy().update(k[:, 100:], v[:, 100:], key_mask=mask_of(2, 50))
    found: list[Any] = [state.attend(q), state.update(k[:, :40], v[:, :40]).attend(q)]
    found += [steps(state, arrays, 40, 40 + count), content(state)]
    state = WAYS[way](state)
    found += [content(state), steps(state, arrays, 60, 63), state.attend(q), state.attend(q[:, :1])]
    found += [content(state.update(k[:, 63:64], v[:, 63:64], num_threads=2).merge(later))]
    return [*found, content(later), steps(state, arrays, 90, 92), content(state)]


def packed(dtype: str, decay: Any) -> Any:
    """Do the same with packed sequences."""
    q, k, v = tensors(dtype=dtype)
    state = AttentionState.zeros(
        make("pair"), value_dim=12, batch_shape=2, sequences=3, decay=decay, dtype=q.dtype
    )
    state.update(k, v, cu_seqlens=[0, 60, 60, 150])
    found = [content(state), state.attend(q, cu_seqlens=[0, 1, 50, 150])]
    found += [state.step(q[:, :3], k[:, :3], v[:, :3]), content(state)]
    return [*found, content(state.merge(through_a_file(state)))]


def split(dtype: str) -> Any:
    """Attend in parts of a sequence, each from the state after the one before."""
    found: list[Any] = []
    state, arrays = None, tensors(1300, heads=(1,), dtype=dtype)
    for part in map(slice, (0, 1, 3, 66, 200), (1, 3, 66, 200, 1300)):
        q, k, v = (x[:, part] for x in arrays)
        out, state = favor_np.favor_attention(
            q, k, v, make("pair"), causal=True, state=state, return_state=True
        )
        found += [out, content(state)]
    return found


def old(name: str) -> Any:
    """Go on from the file of an earlier version."""
    data = np.load(OLD_STATES / "answers.npz")
    state, again = (AttentionState.load(OLD_STATES / f"{name}.state") for _ in range(2))
    arrays = q, k, v = [data[x] for x in "qkv"]
    if name == "packed":
        read = state.attend(q[0, :4], cu_seqlens=[0, 2, 4])
        return [read, content(state), state.step(q[0, :2], k[0, :2], v[0, :2]), content(state)]
    found = [content(state), state.attend(q), steps(state, arrays, 30, 40), content(state)]
    return [*found, content(state.merge(again))]


def windowed(dtype: str, window: int, decay: Any, way: str) -> Any:
    """Step, fold, read, leave by some way, and go on with a window."""
    arrays = q, k, v = tensors(dtype=dtype)
    state: Any = WindowState(
        make("pair"), value_dim=12, window=window, batch_shape=(2,), decay=decay, dtype=q.dtype
    )
    found = [steps(state, arrays, 0, 30)]
    state.update(k[:, 30:90], v[:, 30:90], key_mask=mask_of(2, 60))
    found += [state.attend(q[:, :5])]
    state = WAYS[way](state)
    return [*found, steps(state, arrays, 90, 130), state.attend(q, num_threads=2)]


def states() -> Cases:
    """Give lives of states."""
    for name, dtype in product(("pair", "plain", "relu", "aderf/ pair"), ("f4", "f8")):
        for decay, way, count in product((None, [0.9, 1.0]), WAYS, (1, 16, 19)):
            life = partial(grown, name, dtype, way, count, decay)
            yield f"{name} {dtype} decay={decay} {way} {count}", life
    for dtype, decay in product(("f4", "f8"), (None, 0.9)):
        yield f"packed {dtype} decay={decay}", partial(packed, dtype, decay)
        for window, way in product((1, 2, 7, 64, 200), ("same", "copy", "pickle")):
            life = partial(windowed, dtype, window, decay, way)
            yield f"window {window} {dtype} decay={decay} {way}", life
    for dtype in ("f4", "f8", "b2"):
        yield f"split {dtype}", partial(split, dtype)
    for path in sorted(OLD_STATES.glob("*.state")):
        yield f"file of an earlier version, {path.stem}", partial(old, path.stem)
    yield "bytes of a file", saved


def streamed(dtype: str, **options: Any) -> Any:
    """Attend from and to a file."""
    with tempfile.TemporaryDirectory() as folder:
        q, k, v = tensors(700, dtype=dtype)
        out = np.memmap(Path(folder, "out"), v.dtype, "w+", shape=v.shape)
        options["checkpoint"] = Path(folder, "checkpoint")
        return np.array(favor_np.stream_attention(q, k, v, make("pair"), out=out, **options))


def advice(length: int, dim: int, **options: Any) -> Any:
    """Take advice that does not hang on what was timed."""
    q, k, _ = tensors(length, dim, std=0.5)
    found = favor_np.recommend(q, k, **options)
    fingerprint = getattr(found.feature_map, "fingerprint", None)
    return [*take(found, "exact num_features predicted_error"), fingerprint]


def diagnosed(name: str, dtype: str, **options: Any) -> Any:
    """Return outputs and errors."""
    q, k, v = tensors(300, dtype=dtype)
    found = favor_np.diagnose(q, k, v, make(name, 16, 256), **options)
    return take(found, "output standard_error effective_sample_size relative_error warnings")


def limited(count: int) -> Any:
    """Attend with a limit on threads."""
    with favor_np.thread_limit(count):
        return attend(make("pair"), {"causal": True}, vjp=True, length=3000)


def studies() -> Cases:
    """Give calls of streams, error bars, weights and advice."""
    for dtype, causal, size in product(("f4", "f8", "f2"), BOTH, (1, 100, 256, 1000)):
        call = partial(streamed, dtype, causal=causal, chunk_size=size, num_threads=2)
        yield f"stream {dtype} causal={causal} {size}", call
    maps = "pair", "plain", "iid", "sqrt", "aderf/ pair", "spherical pair"
    for name, dtype, causal, mask in product(maps, ("f4", "f8"), BOTH, (None, mask_of(2, 300))):
        call = partial(diagnosed, name, dtype, causal=causal, key_mask=mask)
        yield f"diagnose {name} {dtype} causal={causal} mask={mask is not None}", call
    q, k, _ = tensors(1100)
    places = None, [0, 5, 1050, 1099]
    for name, at, mask in product((*MAPS, "aderf/ pair"), places, (None, mask_of(2, 1100))):
        call = partial(favor_np.attention_weights, q[:, -4:], k, make(name), key_mask=mask)
        yield f"weights {name} {at} mask={mask is not None}", partial(call, positions=at)
    for causal in BOTH:
        few = partial(advice, 20_000, 16, target_error=0.3, causal=causal)
        yield f"advice features causal={causal}", few
        none = partial(advice, 400, 64, target_error=1e-6, causal=causal)
        yield f"advice exact causal={causal}", none
    for count in (1, 2, 5):
        yield f"thread limit {count}", partial(limited, count)
