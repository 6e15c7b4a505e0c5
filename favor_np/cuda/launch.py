"""The twin of `favor_np.launch`: between validated arrays on a device and kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import plan as host
from favor_np.cuda import plan, runtime
from favor_np.cuda.arrays import Place
from favor_np.cuda.kernels import favor as kernels
from favor_np.cuda.kernels.pack import change, pack
from favor_np.cuda.kernels.tiles import TILE
from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]

make_fold = functools.cache(kernels.make_fold)
make_read = functools.cache(kernels.make_read)


class Map(NamedTuple):
    """A feature map, with its arrays on the device."""

    layout: plan.Layout
    weight: Any
    bias: Any
    query_bias: Any
    centers: tuple[Any, Any]
    linear: Any
    factors: tuple[Any, Any]
    #: Arrays of size 0, which stand for no shares of keys, and no mask.
    nothing: Any
    unmasked: Any


class States(NamedTuple):
    """States (c, S, z) on a device, a row each: of slots, or of parts of sequences."""

    c: Any
    s: Any
    z: Any


class Rows(NamedTuple):
    """Packed rows on the device, and their heights."""

    rows: Any
    heights: Any


class Problem(NamedTuple):
    """What the kernels of one call share."""

    map: Map
    jobs: host.Jobs
    q: Rows
    k: Rows
    v: Any
    mask: Any
    causal: bool
    queries: int
    keys: int
    states: States
    fresh: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Slices of features and of values."""
        return self.map.layout.features // TILE, self.states.s.shape[2] // TILE


@functools.lru_cache(maxsize=16)
def _map(feature_map: FeatureMap) -> Map:
    """Copy a map to the device, once."""
    layout = plan.layout(feature_map)
    put = functools.partial(runtime.to_device, stream=0)
    return Map(
        layout=layout,
        weight=put(layout.weight),
        bias=put(layout.bias),
        query_bias=put(layout.query_bias),
        centers=(put(layout.centers[0]), put(layout.centers[1])),
        linear=put(layout.linear),
        factors=(put(layout.factors[0]), put(layout.factors[1])),
        nothing=put(np.zeros(0, np.float32)),
        unmasked=put(np.zeros(0, np.bool_)),
    )


class Launch:
    """Launches kernels at a place: the same functions as the module `favor_np.launch`."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Any:
        """Return a new array on the device, of whatever was there."""
        return runtime.empty(shape, dtype, self.place.stream)

    def _put(self, array: Array) -> Any:
        return runtime.to_device(array, self.place.stream)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
        if all(grid):
            runtime.launch(kernel, grid, args, self.place.stream)

    # States

    def new_state(
        self, feature_map: FeatureMap, dtype: np.dtype[Any], count: int, value_dim: int
    ) -> States:
        """Return `count` empty states."""
        features = plan.layout(feature_map).features
        columns = -(-value_dim // TILE) * TILE
        return States(
            self._put(np.full((count, features), kernels.NOTHING, np.int32)),
            self._put(np.zeros((count, features, columns), np.float32)),
            self._put(np.zeros((count, features), np.float32)),
        )

    def copied(self, arrays: States) -> States:
        """Return a copy of states."""
        return States(*(runtime.copy(array, self.place.stream) for array in arrays))

    def merge(self, into: States, other: States) -> None:
        """Add the states `other` to the states `into`."""
        own = self.copied(other)  # for the scan writes to what it adds
        count, features = own.c.shape
        numbers = np.arange(count)
        table = self._put(
            np.stack([numbers, numbers, 0 * numbers + 1, 0 * numbers], 1, dtype=np.int32)
        )
        sums = self.empty(own.c.shape, np.int32)
        self._launch(kernels.scan, (count, features // 4), table, own.c, sums, own.s, own.z, *into)

    def without_padding(
        self, feature_map: FeatureMap, dtype: np.dtype[Any], value_dim: int, arrays: States
    ) -> tuple[Array, Array, Array]:
        """Return a copy of states in main memory, as the CPU has them."""
        real = plan.layout(feature_map).real
        c, s, z = (runtime.to_host(array, self.place.stream) for array in arrays)
        seen = c[:, real]
        return (
            np.where(seen == kernels.NOTHING, 4 * -int(host.FAR[4]), seen),
            s[:, real, :value_dim],
            z[:, real],
        )

    # Attention

    def attend(
        self,
        feature_map: FeatureMap,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        out: Any,
        *,
        dtype: np.dtype[Any],
        causal: bool,
        grouped: bool,
        state: States | None,
        state_shape: tuple[int, ...] | None,
        threads: int | None,
        offsets: Array | None = None,
        clock: None = None,
        weights: tuple[Any, Any] | None = None,
    ) -> None:
        """Fold k and v, read with q into `out`: see the function of this name in `favor_np.launch`."""
        problem = self._problem(
            feature_map, q, k, v, mask, causal, grouped, state, state_shape, offsets
        )
        weights = weights or (problem.map.nothing, self.empty(0, np.int32))
        self._attend(problem, out.reshape(-1, out.shape[-1]), weights)

    def _problem(
        self, feature_map: FeatureMap, q: Any, k: Any, v: Any, mask: Any, causal: bool, grouped: bool,
        state: States | None, state_shape: tuple[int, ...] | None, offsets: Array | None,
    ) -> Problem:  # fmt: skip
        of, dim = _map(feature_map), v.shape[-1]
        jobs = host.jobs(
            q.shape[:-2], k.shape[:-2], v.shape[:-2], None if mask is None else mask.shape[:-1],
            feature_map.num_heads, state_shape, grouped, q.shape[-2], k.shape[-2], 1, 0, False,
        )  # fmt: skip
        q_heads, k_heads = plan.row_heads(jobs, q.shape, k.shape, of.layout)
        if q_heads is not None and k_heads is not None:  # each job has packed rows of its own
            jobs = plan.with_own_rows(jobs, q.shape[-2], k.shape[-2])
        if offsets is not None:
            jobs = host.packed(jobs, offsets, False, 1)
        fresh = state is None
        if state is None:
            shape = len(jobs.table), of.layout.features
            columns = -(-dim // TILE) * TILE
            state = States(
                self.empty(shape, np.int32), self.empty((*shape, columns)), self.empty(shape)
            )
        return Problem(
            map=of,
            jobs=jobs,
            q=self._pack(of, q, 0, q_heads),
            k=self._pack(of, k, 1, k_heads),
            v=self.place.put(v).reshape(-1, dim),
            mask=of.unmasked if mask is None else self.place.put(mask, np.bool_).reshape(-1),
            causal=causal,
            queries=q.shape[-2],
            keys=k.shape[-2],
            states=state,
            fresh=fresh,
        )

    def _pack(self, of: Map, source: Any, side: int, owners: plan.Owners | None) -> Rows:
        """Pack queries (side 0) or keys (side 1)."""
        layout = of.layout
        source = self.place.put(source).reshape(-1, source.shape[-1])
        table, count = plan.pack_table(source.shape[0], owners)
        grid, there = (len(table),), self._put(table)
        rows = Rows(self.empty((count, layout.columns)), self.empty(count))
        factored = layout.factors[0].size > 0
        norm = np.float32(layout.key_norm if side else 0)
        self._launch(
            pack, grid, source, np.float32(layout.limit), np.float32(0) if factored else norm,
            of.centers[side], of.linear, there, *rows,
        )  # fmt: skip
        if factored:
            new = self.empty((count, layout.columns))
            self._launch(change, grid, rows.rows, of.factors[side], norm, there, new, rows.heights)
            rows = Rows(new, rows.heights)
        return rows

    def _attend(self, p: Problem, out: Any, weights: tuple[Any, Any]) -> None:
        table = p.jobs.table
        cut = plan.lengths(self.place.device, len(table), p.keys, *p.shape, causal=p.causal)
        for start in range(0, max(p.keys, 1), cut.span):
            parts = plan.stretches(table[:, 3], cut.stretch, (start, start + cut.span))
            before = self._fold(p, parts, p.fresh and start == 0)
            if p.causal:
                self._read(p, parts, np.arange(len(parts.owner)), before, out, weights)
        if not p.causal:
            parts = plan.stretches(table[:, 6], TILE, (0, p.queries))
            self._read(p, parts, plan.slots(p.jobs)[parts.owner], p.states, out, weights)

    def _fold(self, p: Problem, parts: plan.Stretches, fresh: bool) -> States:
        """Fold parts of the keys into the states; the sums before each part."""
        layout, (slices, columns), count = p.map.layout, p.shape, len(parts.owner)
        shape = count, layout.features
        own = States(
            self.empty(shape, np.int32), self.empty((*shape, columns * TILE)), self.empty(shape)
        )
        self._launch(
            make_fold(layout.kind, layout.signs), (count, slices, columns), p.k.rows, p.k.heights,
            p.map.nothing, p.v, p.mask, p.map.weight, p.map.bias, np.float32(layout.epsilon),
            self._put(plan.fold_table(p.jobs, parts)), *own,
        )  # fmt: skip
        before = States(self.empty(shape, np.int32), own.s, own.z)
        self._launch(
            kernels.scan, (len(p.jobs.table), layout.features // 4),
            self._put(plan.scan_table(p.jobs, parts, fresh)), own.c, *before, *p.states,
        )  # fmt: skip
        return before

    def _read(
        self, p: Problem, parts: plan.Stretches, slots: Array, states: States, out: Any,
        weights: tuple[Any, Any],
    ) -> None:  # fmt: skip
        """Read the states in the given slots, a part of the queries each."""
        layout, table = p.map.layout, plan.read_table(p.jobs, parts, slots)
        self._launch(
            make_read(layout.kind, layout.signs, p.causal, True), (len(table), p.shape[1]), *p.q, *p.k,
            p.v, p.mask, p.map.weight, p.map.query_bias, p.map.bias, np.float32(layout.epsilon),
            self._put(table), *states, out, *weights,
        )  # fmt: skip
