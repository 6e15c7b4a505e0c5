"""The calls that every check of the kernels makes: shapes at and around the tiles, and options.

Nothing here needs a device or numba-cuda: tests/gpu makes the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support import oracle
from support.inputs import MAPS, random_inputs
from support.tolerance import relative_error, tolerance

from favor_np import (
    AttentionState,
    FeatureMap,
    favor_attention,
    favor_attention_vjp,
    feature_map,
)
from favor_np.cuda.plan import TILE

LENGTHS = (1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 3)


@dataclass(frozen=True)
class Case:
    """One call: its arrays, its map, and the options of `favor_attention`."""

    length: int = 2 * TILE + 3
    keys: int | None = None
    dim: int = 24
    value_dim: int = 70
    rows: int = 70
    lead: tuple[int, ...] = (2,)
    kv_lead: tuple[int, ...] | None = None
    kind: str = "antithetic"
    heads: int | None = None
    std: float = 1.0
    masked: bool = False
    causal: bool = False
    biased: bool = False
    gated: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def feature_map(self) -> FeatureMap:
        rng = np.random.default_rng(self.seed + 1)
        shape = (self.rows, self.dim) if self.heads is None else (self.heads, self.rows, self.dim)
        return FeatureMap.from_projection(rng.standard_normal(shape), **MAPS[self.kind])

    def arrays(self) -> tuple[Any, Any, Any]:
        """q, k and v in float32."""
        return random_inputs(
            self.length, self.dim, self.value_dim, self.lead, Lk=self.keys, kv_lead=self.kv_lead,
            std=self.std, seed=self.seed, dtype=np.float32,
        )  # fmt: skip

    def keywords(self) -> dict[str, Any]:
        """The options, with the mask."""
        options = {"causal": self.causal, **self.options}
        if self.masked:
            keys = self.length if self.keys is None else self.keys
            options["key_mask"] = np.random.default_rng(self.seed + 2).random(keys) < 0.7
        if self.biased:
            options["key_bias"] = np.random.default_rng(self.seed + 3).normal(0, 30, self.length)
        if self.gated:
            rng = np.random.default_rng(self.seed + 4)
            options["decay"] = rng.uniform(0.01, 1, (*self.lead, self.length))
        return options

    def expected(self) -> Any:
        """The dense oracle's result."""
        return oracle.favor_attention(*self.arrays(), self.feature_map(), **self.keywords())

    def tolerance(self) -> float:
        """What rounding the log-features costs."""
        q, k, _ = self.arrays()
        return tolerance(q, k, self.feature_map(), np.float32)


def step_errors(cuda: Any) -> Iterator[tuple[str, float, float]]:
    """Errors of states on a device, token by token, against states in main memory."""
    fm, rng = feature_map("positive", 64, 256), np.random.default_rng(0)
    tokens = rng.standard_normal((9, 3, 8, 64)).astype(np.float32)
    for decay in (None, 0.9):
        there = AttentionState(fm, 64, 8, decay=decay, device="cuda")
        here = AttentionState(fm, 64, 8, decay=decay, dtype=np.float64)
        for token in tokens:
            found = there.step(*map(cuda.to_device, token)).copy_to_host()
            wanted = here.step(*token)
        yield f"steps, decay {decay}", relative_error(found, wanted), 1e-5


def check_states(options: dict[str, Any]) -> None:
    """Gradients through a state on a device, and the state's own, against those of the CPU."""
    case = Case(70, dim=6, value_dim=5, rows=20, lead=(3,), seed=5)
    fm, (_, k, v) = case.feature_map(), case.arrays()
    q, *_ = random_inputs(70, 6, 5, (6,) if "enable_gqa" in options else (3,), dtype=np.float32)
    first = random_inputs(70, 6, 5, (3,), seed=1, dtype=np.float32)
    found, of_last = [], None
    for device, dtype in (("cuda", np.float32), (None, np.float64)):
        before = {name: x for name, x in options.items() if name != "enable_gqa"}
        _, state = favor_attention(
            *(x.astype(dtype) for x in first), fm, return_state=True, device=device, **before
        )
        (out, after), pullback = favor_attention_vjp(
            *(x.astype(dtype) for x in (q, k, v)), fm, state=state, return_state=True,
            device=device, **options,
        )  # fmt: skip
        if of_last is None:
            rng = np.random.default_rng(9)
            of_last = [rng.standard_normal(x.shape) for x in (after.S, after.z)]
        # both by the numbers that S and z stand for: the exponents c of the two may differ
        by, own = (np.ldexp(1.0, np.clip(x, -500, 500)) for x in (after.c, -state.c))
        S, z = of_last
        grads = pullback(out, (S * by[..., None], z * by))
        found.append({name: getattr(grads, name) for name in (*"qkv", "projection", "decay")})
        found[-1] |= {"S": grads.state.S * own[..., None], "z": grads.state.z * own}
    for name, wanted in found[1].items():
        if wanted is not None:
            assert relative_error(found[0][name], wanted) < 1e-5, name


def in_16_bits(case: Case, dtype: Any) -> tuple[list[Any], list[Any]]:
    """The arrays of a case in a type of 16 bits, and the same numbers in float32."""
    short = [x.astype(dtype) for x in case.arrays()]
    return short, [x.astype(np.float32) for x in short]


def same_rounded(found: Any, whole: Any, dtype: Any) -> bool:
    """Whether an array is another one, rounded to a type."""
    with np.errstate(over="ignore"):
        expected = whole.astype(dtype)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


CASES = {
    **{
        f"{name}-{length}": Case(length, causal=causal)
        for name, causal in (("causal", True), ("full", False))
        for length in LENGTHS
    },
    **{
        f"{kind}-{'causal' if causal else 'full'}": Case(kind=kind, causal=causal, seed=1)
        for kind in MAPS
        for causal in (True, False)
        if kind != "antithetic"
    },
    "other-length": Case(70, keys=200),
    "narrow": Case(dim=1, value_dim=1, rows=1, causal=True),
    "wide": Case(TILE + 1, dim=130, value_dim=129, rows=33, lead=(), causal=True),
    "masked-full": Case(masked=True),
    "masked-causal": Case(masked=True, causal=True, seed=2),
    "grouped": Case(
        lead=(1, 4), kv_lead=(1, 2), causal=True, options={"enable_gqa": True}, length=TILE + 6
    ),
    "heads": Case(lead=(2, 2), heads=2, causal=True, length=TILE + 6),
    "shared-keys": Case(lead=(2,), kv_lead=(), length=40),
    "far": Case(std=6.0, causal=True, seed=3),
    "huge": Case(std=100.0, causal=True, seed=3),
    "masked-window": Case(TILE + 6, masked=True, causal=True, options={"window": 20}),
    "biased-full": Case(TILE + 6, biased=True, masked=True),
    **{
        f"weighed-{kind}": Case(TILE + 6, kind=kind, causal=True, biased=True, gated=True)
        for kind in ("antithetic", "relu")
    },
}
