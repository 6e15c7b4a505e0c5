"""Random queries, keys and values, what is done to them, and the maps and options that go with them."""

import numpy as np

MAPS = {
    "positive": {"kind": "positive"},
    "antithetic": {"kind": "positive", "antithetic": True},
    "relu": {"kind": "relu"},
    "elu": {"kind": "elu"},
}

#: What attention over 300 positions goes together with.
OPTIONS = {
    "decay": {"causal": True, "decay": 0.9},
    "packed": {"causal": True, "cu_seqlens": [0, 5, 5, 6, 130, 300]},
    "packed full": {"cu_seqlens": [0, 5, 5, 6, 130, 300]},
    "mask": {"key_mask": np.arange(300) % 3 > 0},
    "mask causal": {"key_mask": np.arange(300) % 3 > 0, "causal": True},
    "threads": {"causal": True, "num_threads": 2},
}

#: What inputs that a result must not depend on are changed to.
CHANGES = {
    "times 3": lambda x: 3 * x,
    "1e4": lambda x: 0 * x + 1e4,
    "-1e4": lambda x: 0 * x - 1e4,
    "zero": lambda x: 0 * x,
    "NaN": lambda x: np.nan * x,
    "inf": lambda x: 0 * x + np.inf,
}


def draw(*shape, seed=0, dtype=np.float64):
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def random_inputs(
    L, d=6, dv=5, lead=(), *, Lk=None, kv_lead=None, std=1.0, seed=0, dtype=np.float64,
    cotangent=False,
):  # fmt: skip
    """q, k and v, and a cotangent if it is wanted: normal, q and k with this standard deviation.

    Lk and kv_lead are the length and the leading axes of k and v, where they have others.
    """
    rng = np.random.default_rng(seed)
    Lk = L if Lk is None else Lk
    kv_lead = lead if kv_lead is None else kv_lead
    shapes = [(*lead, L, d), (*kv_lead, Lk, d), (*kv_lead, Lk, dv), (*lead, L, dv)]
    q, k, *others = (rng.standard_normal(shape).astype(dtype) for shape in shapes[: 3 + cotangent])
    return (q.dtype.type(std) * q, k.dtype.type(std) * k, *others)


def anisotropic_inputs(*lead, length=60, dim=8, seed=0):
    """Queries and keys with means, of different sizes in different directions."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((2, dim, dim)) / dim**0.5
    mean = 0.5 * rng.standard_normal((2, dim))
    x = rng.standard_normal((2, *lead, length, dim))
    return x[0] @ mix[0] + mean[0], x[1] @ mix[1] + mean[1]


def masks(L):
    rng = np.random.default_rng(5)
    return {
        "left": np.arange(L) >= 20,
        "right": np.arange(L) < 50,
        "both": (np.arange(L) >= 20) & (np.arange(L) < 70),
        "random": rng.random(L) < 0.5,
        "all": np.full(L, True),
        "none": np.full(L, False),
        "one": np.arange(L) == 66,
    }


def lay_out(x, layout):
    """The same numbers, in another place in memory."""
    if layout == "F":
        return np.asfortranarray(x)
    if layout == "strided":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if layout == "swapped":
        return x.astype(x.dtype.newbyteorder())
    if layout == "unaligned":
        raw = np.zeros(x.nbytes + 1, np.uint8)
        raw[1:] = np.frombuffer(x.tobytes(), np.uint8)
        return raw[1:].view(x.dtype).reshape(x.shape)
    x = x.copy()
    x.setflags(write=layout != "read-only")
    return x
