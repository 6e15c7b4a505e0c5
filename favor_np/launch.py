"""The one seam between validated arrays and compiled kernels."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import plan
from favor_np.features import FeatureMap
from favor_np.kernels import exact as exact_kernels
from favor_np.kernels import favor as kernels
from favor_np.threads import POOL, resolve_threads
from favor_np.validation import rows_of

Array: TypeAlias = npt.NDArray[Any]

_NO_MASK = np.ones(1, np.bool_)
_NO_MASK.flags.writeable = False


def _mask_rows(mask: Array | None) -> Array:
    if mask is None:
        return _NO_MASK
    flat = mask.reshape(-1)
    flat.flags.writeable = False
    return flat


def new_state(feature_map: FeatureMap, dtype: np.dtype[Any], count: int, value_dim: int) -> Any:
    """Return the arrays (c, S, z) of `count` empty states, as the kernels lay them out."""
    layout = plan.layout(feature_map, dtype, value_dim)
    c = plan.aligned((count, layout.features), plan.integer_of(dtype))
    c[:] = -4 * int(plan.FAR[dtype.itemsize])
    s = plan.aligned((count, layout.features, layout.value_columns), dtype)
    return c, s, plan.aligned((count, layout.features), dtype)


def attend(
    feature_map: FeatureMap,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    out: Array,
    *,
    dtype: np.dtype[Any],
    causal: bool,
    grouped: bool,
    state: Any,
    state_shape: tuple[int, ...] | None,
    threads: int | None,
) -> None:
    """Fold k and v, read with q into the C-ordered `out`; with a state, on from it and into it."""
    layout = plan.layout(feature_map, dtype, v.shape[-1])
    jobs = plan.jobs(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], None if mask is None else mask.shape[:-1],
        feature_map.num_heads, state_shape, grouped, q.shape[-2], k.shape[-2], layout.blocks,
    )  # fmt: skip
    count = len(jobs.table)
    work = max(q.shape[-2], k.shape[-2]) * count * layout.features * q.shape[-1]
    workers = 1 if work < SERIAL else min(resolve_threads(threads), count)

    def make() -> Any:
        return (
            plan.aligned((workers, layout.floats), dtype),
            plan.aligned((workers, layout.ints), plan.integer_of(dtype)),
            None if state is not None else new_state(feature_map, dtype, workers, v.shape[-1]),
        )

    key = (dtype, workers, layout.floats, layout.ints, layout.features, layout.value_columns,
           state is None)  # fmt: skip
    with plan.reused(key, make) as (floats, ints, own):
        args = (
            layout.causal if causal else layout.bidirectional,
            rows_of(q, dtype), rows_of(k, dtype), rows_of(v, dtype), _mask_rows(mask),
            layout.weight, layout.bias, jobs.table, jobs.q_rows, jobs.out_rows,
            *(own if state is None else state), out.reshape(-1, out.shape[-1]), floats, ints,
        )  # fmt: skip
        POOL.call(kernels.attend, args, count, workers)


def attend_exact(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    out: Array,
    *,
    dtype: np.dtype[Any],
    causal: bool,
    scale: float,
    grouped: bool,
    threads: int | None,
) -> bool:
    """Write softmax attention to the C-ordered `out`; False if a logit may be too large for it."""
    table = plan.exact_jobs(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], None if mask is None else mask.shape[:-1],
        grouped, q.shape[-2], k.shape[-2],
    )  # fmt: skip
    work = math.prod(out.shape[:-1]) * k.shape[-2] * q.shape[-1]
    workers = 1 if work < SERIAL else min(resolve_threads(threads), len(table))
    floats, ints = plan.exact_workspace(dtype, q.shape[-1], v.shape[-1])

    def make() -> Any:
        return (
            plan.aligned((workers, floats), dtype),
            plan.aligned((workers, ints), plan.integer_of(dtype)),
        )

    with plan.reused(("exact", dtype, workers, floats, ints), make) as (float_space, int_space):
        args = (
            plan.exact_parameters(dtype, scale, causal),
            rows_of(q, dtype), rows_of(k, dtype), rows_of(v, dtype), _mask_rows(mask), table,
            out.reshape(-1, out.shape[-1]), float_space, int_space,
        )  # fmt: skip
        control = POOL.call(exact_kernels.attend_exact, args, len(table), workers)
    return not control[12]


#: Multiply-adds below which a second thread costs more than it does (about 0.3 ms).
SERIAL = 4_000_000
