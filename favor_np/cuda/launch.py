"""The twin of `favor_np.launch`: between validated arrays on a device and kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import plan as host
from favor_np.cuda import plan, runtime
from favor_np.cuda.kernels import favor as kernels
from favor_np.cuda.kernels.pack import pack
from favor_np.cuda.kernels.tiles import TILE
from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]

make_fold = functools.cache(kernels.make_fold)
make_read = functools.cache(kernels.make_read)


class Map(NamedTuple):
    """The arrays of a feature map on the device."""

    layout: plan.Layout
    weight: Any
    bias: Any
    query_bias: Any
    center: tuple[Any, Any]
    linear: Any
    nothing: Any
    unmasked: Any


@functools.lru_cache(maxsize=16)
def map_on_device(feature_map: FeatureMap, stream: Any) -> Map:
    """Copy a map to the device, once."""
    layout = plan.layout(feature_map)

    def put(array: Array) -> Any:
        return runtime.to_device(array, stream)

    return Map(
        layout,
        put(layout.weight),
        put(layout.bias),
        put(layout.query_bias),
        (put(layout.center[0]), put(layout.center[1])),
        put(layout.linear),
        put(np.zeros(0, np.float32)),
        put(np.zeros(0, np.uint8)),
    )


class States(NamedTuple):
    """States (c, S, z) on a device, one row a slot; `fresh` while nothing has been written there."""

    c: Any
    s: Any
    z: Any


def new_states(features: int, count: int, value_dim: int, stream: Any) -> States:
    """Return room for `count` states."""
    columns = -(-value_dim // TILE) * TILE
    return States(
        runtime.empty((count, features), np.int32, stream),
        runtime.empty((count, features, columns), np.float32, stream),
        runtime.empty((count, features), np.float32, stream),
    )


class Rows(NamedTuple):
    """Packed rows on the device, and their heights."""

    rows: Any
    heights: Any


class Problem(NamedTuple):
    """One call: the map, packed rows of queries and keys, the values, who reads whom."""

    map: Map
    jobs: host.Jobs
    q: Rows
    k: Rows
    v: Any
    mask: Any
    causal: bool
    queries: int
    keys: int
    device: plan.Device
    stream: Any


def pack_rows(of: Map, source: Any, side: int, stream: Any) -> Rows:
    """Pack queries (side 0) or keys (side 1), an array (rows, d)."""
    layout = of.layout
    count = source.shape[0]
    target = runtime.empty((count, layout.columns), np.float32, stream)
    heights = runtime.empty(count, np.float32, stream)
    if count:
        table = runtime.to_device(plan.pack_table(count), stream)
        norm = np.float32(layout.key_norm if side else 0)
        runtime.launch(
            pack, (-(-count // TILE),),
            (source, np.float32(layout.limit), norm, of.center[side], of.linear, table, target, heights),
            stream,
        )  # fmt: skip
    return Rows(target, heights)


def attend(problem: Problem, out: Any, weights: tuple[Any, Any], states: States, fresh: bool) -> None:
    """Fold the keys into the states and write what the queries read from them to the rows `out`."""
    p = problem
    layout, stream = p.map.layout, p.stream
    jobs = p.jobs.table
    cut = plan.lengths(
        p.device, len(jobs), p.keys, layout.features, p.v.shape[1], p.causal
    )
    columns = states.s.shape[2] // TILE
    slices = layout.features // TILE
    epsilon = np.float32(layout.epsilon)
    read = make_read(layout.kind, layout.signs, p.causal, True)

    def run_read(parts: plan.Stretches, slot: Array, held: States) -> None:
        table = plan.read_table(p.jobs, parts, slot)
        if len(table):
            runtime.launch(
                read, (len(table), columns),
                (p.q.rows, p.q.heights, p.k.rows, p.k.heights, p.v, p.mask, p.map.weight,
                 p.map.query_bias, p.map.bias, epsilon, runtime.to_device(table, stream),
                 *held, out, *weights),
                stream,
            )  # fmt: skip

    for start in range(0, max(p.keys, 1), cut.span):
        span = start, start + cut.span
        parts = plan.stretches(jobs[:, 3], cut.stretch, span)
        own = new_states(layout.features, len(parts.owner), p.v.shape[1], stream)
        sums = runtime.empty(own.c.shape, np.int32, stream)
        if len(parts.owner):
            table = runtime.to_device(plan.fold_table(p.jobs, parts), stream)
            runtime.launch(
                make_fold(layout.kind, layout.signs), (len(parts.owner), slices, columns),
                (p.k.rows, p.k.heights, p.map.nothing, p.v, p.mask, p.map.weight, p.map.bias,
                 epsilon, table, *own),
                stream,
            )  # fmt: skip
        if len(jobs):
            table = runtime.to_device(plan.scan_table(p.jobs, parts, fresh and start == 0), stream)
            runtime.launch(
                kernels.scan, (len(jobs), layout.features // 4),
                (table, own.c, sums, own.s, own.z, *states), stream,
            )  # fmt: skip
        if p.causal:
            run_read(parts, np.arange(len(parts.owner)), States(sums, own.s, own.z))
    if not p.causal:
        parts = plan.stretches(jobs[:, 6], TILE, (0, p.queries))
        run_read(parts, plan.slots(p.jobs)[parts.owner], states)
