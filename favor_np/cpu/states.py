"""States of the processor's engine: arrays (c, S, z), laid out by ``kernels.state``."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import StateForm, StateParts
from favor_np.cpu import memory, scaling
from favor_np.cpu.code import kernel
from favor_np.cpu.layout import Layout, layout
from favor_np.cpu.threads import POOL
from favor_np.cpu.tiles import PAD, TAIL

Array: TypeAlias = npt.NDArray[Any]


def layout_of(form: StateForm) -> Layout:
    """Return the layout of states of this form."""
    return layout(form.feature_map, form.dtype, form.value_dim)


def new_states(form: StateForm, count: int) -> tuple[Array, ...]:
    """Return `count` states of no keys."""
    return empty(layout_of(form), count)


def empty(of: Layout, count: int) -> tuple[Array, ...]:
    """Return `count` states of no keys, laid out like this."""
    arrays = memory.state_arrays(count, of.features, of.value_columns, of.dtype)
    arrays[0][:, : of.features] = of.fresh
    return arrays


def copy_states(arrays: Any) -> tuple[Array, ...]:
    """Return a copy of states."""
    return tuple(memory.aligned_copy(array) for array in arrays)


def has_tails(arrays: Any) -> bool:
    """Whether tokens wait in the states to be folded together."""
    return bool(arrays[0][:, -PAD].any())


def tail(of: Layout, s: Array, z: Array) -> tuple[Array, Array]:
    """Return views of tails: features (slots, TAIL, F) and values (slots, TAIL, X)."""
    return z[:, 2 * of.features :].reshape(len(z), TAIL, of.features), s[:, 2 * of.features :]


def lower_states(form: StateForm, arrays: Any, by: Array) -> None:
    """Take so much off the exponents of each state, in place."""
    layout, c = layout_of(form), arrays[0]
    rows: Any = slice(layout.features)
    if form.feature_map.kind == "positive":  # padding is out of reach, and stays there
        rows = layout.real
    # What is below all that a key can reach stays there, its features side by side.
    within = np.minimum(by, np.maximum(c[:, rows].min(1) + validation.LONGEST_DECAY, 0))
    c[:, rows] -= within[:, None].astype(c.dtype)


def scale_states(arrays: Any, by: Array) -> None:
    """Multiply the sums of each state, which has no tail, by a number, in place."""
    _, s, z = arrays
    factor = by.astype(z.dtype)[:, None]
    s *= factor[..., None]
    z *= factor


def state_parts(form: StateForm, arrays: Any) -> StateParts:
    """Return copies of all that states hold, as any machine would have it."""
    layout = layout_of(form)
    (c, s, z), real, low = arrays, layout.real, layout.features + layout.real
    count = c[:, layout.features].copy()
    alive = np.arange(count.max(initial=0)) < count[:, None]
    keys, values = tail(layout, s, z)
    keys = keys[:, : alive.shape[1], real]
    values = values[:, : alive.shape[1], : form.value_dim].copy()
    keys[~alive], values[~alive] = 0, 0
    width = form.value_dim
    return StateParts(
        c[:, real],
        s[:, real, :width],
        z[:, real],
        s[:, low, :width],
        z[:, low],
        count,
        keys,
        values,
    )


def states_of(form: StateForm, parts: StateParts) -> tuple[Array, ...]:
    """Return states from their parts."""
    layout, width = layout_of(form), form.value_dim
    c, s, z = arrays = empty(layout, len(parts.c))
    if form.feature_map.kind != "positive":  # padding is lowered with the other features
        c[:, : layout.features] = parts.c.max(1, keepdims=True)
    real, low = layout.real, layout.features + layout.real
    c[:, real], s[:, real, :width], z[:, real] = parts.c, parts.s, parts.z
    if parts.tail is not None:
        assert parts.tail_features is not None
        assert parts.tail_values is not None
        s[:, low, :width], z[:, low], c[:, layout.features] = parts.s_rest, parts.z_rest, parts.tail
        keys, values = tail(layout, s, z)
        keys[:, : parts.tail_features.shape[1], real] = parts.tail_features
        values[:, : parts.tail_values.shape[1], :width] = parts.tail_values
    scaling.keep_in_range(arrays)
    return arrays


def merge_states(into: Any, other: Any) -> None:
    """Add the states `other` to the states `into`, of equal shapes and without tails."""
    c, s, z = into
    POOL.call(kernel("merge", z.dtype), (c, s, z, *other), (), len(c), 1)
    scaling.keep_in_range(into)
