"""Outputs of other implementations (tests/golden/README.md says which, and where from)."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from support import oracle
from support.tolerance import relative_error

import favor_np

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"f32": 2e-6, "f64": 2e-14}


def load(path):
    with np.load(path, allow_pickle=False) as archive:
        data = {name: archive[name] for name in archive.files}
    return data, json.loads(str(data.pop("meta")))


def files(*patterns):
    found = sorted(path for pattern in patterns for path in GOLDEN.glob(pattern + ".npz"))
    assert found, patterns
    return pytest.mark.parametrize("path", found, ids=[path.stem for path in found])


def feature_map(data, meta):
    """The map of a file: google's ReLU map alone takes x = q, without the scale."""
    relu = "relu" in meta["file"]
    unscaled = relu and meta["file"].startswith("google")
    return favor_np.FeatureMap.from_projection(
        data["W"],
        kind="relu" if relu else "positive",
        scale=1.0 if unscaled else float(data["scale"]),
        kernel_epsilon=1e-3,
    )


def test_folder_is_complete():
    assert len(list(GOLDEN.glob("*.npz"))) == 22


@files("google_jax_*", "performer_pytorch_attention_*", "favor_grad_*")
def test_oracle(path):
    """The tests' own reference agrees with the other systems."""
    data, meta = load(path)
    fm = feature_map(data, meta)
    out = oracle.favor_attention(
        data["q"],
        data["k"],
        data["v"],
        fm,
        causal=meta["causal"],
        key_mask=data["key_mask"][:, None, :] if "key_mask" in data else None,
        enable_gqa=data["q"].shape[1] != data["k"].shape[1],
    )
    theirs = data["out_eps0"] if "out_eps0" in data else data["out"]
    dtype = "f32" if theirs.dtype == np.float32 else "f64"
    assert relative_error(out, theirs) < TOLERANCE[dtype]


@files("google_jax_*", "performer_pytorch_attention_*")
def test_favor_attention(path):
    data, meta = load(path)
    theirs = data["out_eps0"] if "out_eps0" in data else data["out"]
    out = favor_np.favor_attention(
        data["q"], data["k"], data["v"], feature_map(data, meta), causal=meta["causal"]
    )
    assert out.dtype == data["q"].dtype
    assert relative_error(out, theirs) < TOLERANCE[meta["dtype"]]
    assert relative_error(out, data["out_dense"]) < TOLERANCE[meta["dtype"]]


@files("favor_grad_*")
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_favor_attention_with_options(path, dtype):
    data, meta = load(path)
    q, k, v = (data[name].astype(dtype.replace("f", "float")) for name in "qkv")
    mask = data["key_mask"][:, None, :] if "key_mask" in data else None
    gqa = q.shape[1] != k.shape[1]
    out = favor_np.favor_attention(
        q, k, v, feature_map(data, meta), causal=meta["causal"], key_mask=mask, enable_gqa=gqa
    )
    assert relative_error(out, data["out"]) < TOLERANCE[dtype]


@files("favor_grad_*")
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_favor_attention_vjp(path, dtype):
    data, meta = load(path)
    arrays = (data[name].astype(dtype.replace("f", "float")) for name in ("q", "k", "v", "W"))
    q, k, v, data["W"] = arrays
    out, pullback = favor_np.favor_attention_vjp(
        q, k, v, feature_map(data, meta), causal=meta["causal"],
        key_mask=data["key_mask"][:, None, :] if "key_mask" in data else None,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert relative_error(out, data["out"]) < TOLERANCE[dtype]
    grads = pullback(data["grad_out"].astype(out.dtype))
    for name, found in zip("qkvW", (grads.q, grads.k, grads.v, grads.projection), strict=True):
        assert relative_error(found, data[f"d{name}"]) < TOLERANCE[dtype]


@files("exact_attention_*")
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_exact_attention(path, dtype):
    data, meta = load(path)
    q, k, v = (data[name].astype(dtype.replace("f", "float")) for name in "qkv")
    scale = float(data["scale"])
    if meta["has_mask"]:  # one mask a query: a call a query
        masks = np.broadcast_to(data["mask"], (*q.shape[:-1], k.shape[-2]))
        rows = [
            favor_np.exact_attention(
                q[..., i : i + 1, :], k, v, scale=scale, key_mask=masks[..., i, :]
            )
            for i in range(q.shape[-2])
        ]
        out = np.concatenate(rows, axis=-2)
    else:
        gqa = q.shape[1] != k.shape[1]
        out = favor_np.exact_attention(q, k, v, causal=meta["causal"], scale=scale, enable_gqa=gqa)
    assert out.dtype == q.dtype
    assert relative_error(out, data[f"out_{dtype}"]) < TOLERANCE[dtype]
    assert relative_error(out, data["out_dense"]) < TOLERANCE[dtype]


def fold(data, fm, start, stop):
    """The state of tokens [start, stop), by way of the public functions."""
    batch_shape = data["k"].shape[:-2]
    value_dim = data["v"].shape[-1]
    state = favor_np.AttentionState.zeros(
        fm, value_dim=value_dim, batch_shape=batch_shape, dtype=np.float64
    )
    state.update(data["k"][..., start:stop, :], data["v"][..., start:stop, :])
    return state


def assert_state(state, S, z):
    assert np.issubdtype(state.c.dtype, np.integer)
    assert relative_error(np.ldexp(state.S, state.c[..., None]), S) < 2e-14
    assert relative_error(np.ldexp(state.z, state.c), z) < 2e-14


@files("streaming_*")
def test_states(path):
    data, meta = load(path)
    fm, splits = feature_map(data, meta), data["splits"]
    for i, stop in enumerate(splits):
        prefix = fold(data, fm, 0, stop)
        assert_state(prefix, data["S_prefix"][i], data["z_prefix"][i])
    segments = [fold(data, fm, a, b) for a, b in itertools.pairwise(splits)]
    for i, segment in enumerate(segments):
        assert_state(segment, data["S_segment"][i], data["z_segment"][i])
    for order in (segments, segments[::-1]):
        merged = fold(data, fm, 0, 0)
        for segment in order:
            merged.merge(segment)
        assert_state(merged, data["S_prefix"][-1], data["z_prefix"][-1])


@files("streaming_*")
def test_resumed(path):
    data, meta = load(path)
    fm = feature_map(data, meta)
    for split in data["splits"]:
        rest = {name: data[name][..., split:, :] for name in "qkv"}
        out = favor_np.favor_attention(
            *rest.values(), fm, causal=True, state=fold(data, fm, 0, split)
        )
        assert relative_error(out, data["out"][..., split:, :]) < 2e-14
    state = fold(data, fm, 0, 0)
    steps = [
        state.step(*(data[name][..., t, :] for name in "qkv")) for t in range(data["q"].shape[-2])
    ]
    assert relative_error(np.stack(steps, axis=-2), data["out"]) < 2e-14
