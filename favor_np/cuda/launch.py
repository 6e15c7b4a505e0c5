"""The twin of `favor_np.launch`: between validated arrays on a device and kernels."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import plan as host
from favor_np.cuda import plan, runtime
from favor_np.cuda.arrays import Place
from favor_np.cuda.device import Device
from favor_np.cuda.kernels import favor as kernels
from favor_np.cuda.kernels import favor_vjp as vjp
from favor_np.cuda.kernels.pack import change, convert, pack
from favor_np.cuda.kernels.tiles import FULL, NOTHING, TF32X3, TILE
from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]

make_fold = functools.cache(kernels.make_fold)
make_read = functools.cache(kernels.make_read)
make_pull = functools.cache(vjp.make_pull)


class Map(NamedTuple):
    """A feature map, with its arrays on the device."""

    layout: plan.Layout
    weight: Any
    bias: Any
    query_bias: Any
    centers: tuple[Any, Any]
    linear: Any
    factors: tuple[Any, Any]
    turned: tuple[Any, Any]
    slope: Any
    #: Arrays of size 0, which stand for no linear part, no shares of keys, and no mask.
    no_linear: Any
    nothing: Any
    unmasked: Any


class States(NamedTuple):
    """States (c, S, z) on a device, a row each: of slots, or of parts of sequences."""

    c: Any
    s: Any
    z: Any


class Side(NamedTuple):
    """Rows, their heights, vectors and shares (of size 0 if these are 1), and mask, on the device."""

    rows: Any
    heights: Any
    vectors: Any
    shares: Any
    mask: Any
    bias: Any


class Problem(NamedTuple):
    """What the kernels of one call share: side `a` is folded, `b` reads, as `sides` say."""

    map: Map
    sides: plan.Sides
    a: Side
    b: Side
    causal: bool
    backwards: bool
    states: States
    fresh: bool
    precision: int = FULL

    @property
    def shape(self) -> tuple[int, int]:
        """Slices of features and of values."""
        return self.map.layout.features // TILE, self.states.s.shape[2] // TILE

    @property
    def epsilon(self) -> np.float32:
        """The constant of "relu" features."""
        return np.float32(self.map.layout.epsilon)


@functools.lru_cache(maxsize=16)
def _map(feature_map: FeatureMap, on: Device) -> Map:  # noqa: ARG001  # a copy for each device
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
        turned=(put(_turned(layout.factors[0])), put(_turned(layout.factors[1]))),
        slope=put(layout.slope),
        no_linear=put(np.zeros((0, 1), np.float32)),
        nothing=put(np.zeros(0, np.float32)),
        unmasked=put(np.zeros(0, np.bool_)),
    )


def _turned(factors: Array) -> Array:
    """Transpose the matrices of all heads, which stand below each other."""
    width = factors.shape[1]
    return factors.reshape(-1, width, width).swapaxes(1, 2).reshape(-1, width)


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
        shape, columns = (count, features), -(-value_dim // TILE) * TILE
        return States(
            self._put(np.full(shape, NOTHING, np.int32)),
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
            np.where(seen == NOTHING, 4 * -int(host.FAR[4]), seen),
            s[:, real, :value_dim],
            z[:, real],
        )

    def new_weights(self, out: Any) -> tuple[Any, Any]:
        """Return arrays for the denominators of the rows of `out`."""
        return self.empty(out.shape[:-1]), self.empty(out.shape[:-1], np.int32)

    # Attention

    def convert(self, source: Any, target: Any) -> None:
        """Copy float32 numbers to an array of another type, in its order."""
        self._launch(convert, (-(-target.size // 256),), source.reshape(-1), target.reshape(-1))

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
        tensor: bool = False,
    ) -> None:
        """Fold k and v, read with q into `out`: see the function of this name in `favor_np.launch`.

        With `tensor` the products of both are computed by tensor cores.
        """
        of = _map(feature_map, self.place.device)
        jobs = self._jobs(feature_map, q, k, v, mask, grouped, state_shape)
        q_owners, k_owners = plan.row_heads(jobs, q.shape, k.shape, of.layout)
        if q_owners is not None:  # each job has packed rows of its own
            jobs = plan.with_own_rows(jobs, q.shape[-2], k.shape[-2])
        if offsets is not None:
            jobs = host.packed(jobs, offsets, False, 1)
        problem = Problem(
            map=of,
            sides=plan.keys_and_queries(jobs),
            a=self._keys(of, k, v, mask, k_owners),
            b=Side(*self._pack(of, q, 0, q_owners), of.nothing, of.nothing, of.unmasked, of.query_bias),
            causal=causal,
            backwards=False,
            states=state or self._room(of, len(jobs.table), v.shape[-1]),
            fresh=state is None,
            precision=TF32X3 if tensor else FULL,
        )  # fmt: skip
        flat = (of.nothing, self.empty(0, np.int32))
        if weights is not None:
            flat = tuple(x.reshape(-1) for x in weights)
        self._run(problem, functools.partial(self._read, out=_rows(out), weights=flat, divide=True))

    def attend_vjp(
        self,
        feature_map: FeatureMap,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        out: Any,
        weights: tuple[Any, Any],
        grad: Any,
        *,
        dtype: np.dtype[Any],
        causal: bool,
        grouped: bool,
        threads: int | None,
        offsets: Array | None = None,
    ) -> list[Any]:
        """Pull `grad` back through `attend`, which wrote `out` and `weights`: gradients of q, k and v."""
        of, dim = _map(feature_map, self.place.device), v.shape[-1]
        whole = self._jobs(feature_map, q, k, v, mask, grouped, None)
        _, k_owners = plan.row_heads(whole, q.shape, k.shape, of.layout)
        jobs, q_owners = plan.with_rows_of_result(whole, q.shape[-2])
        if k_owners is not None:
            own = plan.with_own_rows(jobs, q.shape[-2], k.shape[-2])
            jobs = host.Jobs(own.table, jobs.q_rows, jobs.out_rows, jobs.clocks)
        if offsets is not None:
            jobs = host.packed(jobs, offsets, False, 1)
        rows, _ = self._pack(of, q, 0, q_owners)
        count = rows.shape[0]
        vectors, shares, heights = self.empty((count, dim)), self.empty(count), self.empty(count)
        self._launch(
            vjp.cotangents, (-(-count // 8),), _rows(grad), _rows(out),
            *(x.reshape(-1) for x in weights), vectors, shares, heights,
        )  # fmt: skip
        keys = self._keys(of, k, v, mask, k_owners)
        queries = Side(rows, heights, vectors, shares, of.unmasked, of.query_bias)
        results = count // max(q.shape[-2], 1)
        # every head of the result has gradients for itself; where heads share, they are then added
        group = whole.q_rows.shape[1]
        heads = [
            whole.q_rows.ravel() // max(q.shape[-2], 1),
            np.repeat(whole.table[:, 0], group) // max(k.shape[-2], 1),
            np.repeat(whole.table[:, 1], group) // max(k.shape[-2], 1),
        ]
        numbers = whole.out_rows.ravel() // max(q.shape[-2], 1)
        sums = [
            plan.sums_over_heads(of_head, numbers, math.prod(x.shape[:-2]))
            for of_head, x in zip(heads, (q, k, v), strict=True)
        ]
        found = [
            self.empty(
                (results * x.shape[-2], x.shape[-1]),
                np.float32 if added else self.place.held(x.dtype),
            )
            for x, added in zip((q, k, v), sums, strict=True)
        ]
        problem = Problem(
            map=of,
            sides=plan.keys_and_queries(jobs),
            a=keys,
            b=queries,
            causal=causal,
            backwards=False,
            states=self._room(of, len(jobs.table), dim),
            fresh=True,
        )
        self._run(problem, functools.partial(self._pull, side=0, out=found[0]))
        sides = plan.queries_and_keys(jobs, q.shape[-2], k.shape[-2])
        problem = problem._replace(
            sides=sides, a=queries, b=keys, backwards=causal,
            states=self._room(of, len(sides.jobs.table), dim),
        )  # fmt: skip
        none = of.nothing, self.empty(0, np.int32)

        def read_and_pull(*args: Any) -> None:
            self._read(*args, out=found[2], weights=none, divide=False)
            self._pull(*args, side=1, out=found[1])

        self._run(problem, read_and_pull)
        return [
            self._summed(x, like, added)
            for x, like, added in zip(found, (q, k, v), sums, strict=True)
        ]

    def _summed(self, found: Any, like: Any, sums: tuple[Array, Array] | None) -> Any:
        """Add the gradients of all results to those of the heads that they belong to."""
        if sums is not None:
            count, width = math.prod(like.shape[:-2]), math.prod(like.shape[-2:])
            source = found.reshape(-1, width)
            found = self.empty((count, width), self.place.held(like.dtype))
            self._launch(
                vjp.gather, (count, -(-width // 256)), source, *(self._put(x) for x in sums), found
            )
        return found.reshape(like.shape)

    def _jobs(
        self, feature_map: FeatureMap, q: Any, k: Any, v: Any, mask: Any, grouped: bool,
        state_shape: tuple[int, ...] | None,
    ) -> host.Jobs:  # fmt: skip
        return host.jobs(
            q.shape[:-2], k.shape[:-2], v.shape[:-2], None if mask is None else mask.shape[:-1],
            feature_map.num_heads, state_shape, grouped, q.shape[-2], k.shape[-2], 1, 0, False,
        )  # fmt: skip

    def _room(self, of: Map, count: int, value_dim: int) -> States:
        """Return states that nothing was written to."""
        shape, columns = (count, of.layout.features), -(-value_dim // TILE) * TILE
        return States(self.empty(shape, np.int32), self.empty((*shape, columns)), self.empty(shape))

    def _keys(self, of: Map, k: Any, v: Any, mask: Any, owners: plan.Owners | None) -> Side:
        rows, heights = self._pack(of, k, 1, owners)
        seen = of.unmasked if mask is None else self.place.put(mask).reshape(-1)
        return Side(rows, heights, _rows(self.place.put(v)), of.nothing, seen, of.bias)

    def _pack(self, of: Map, source: Any, side: int, owners: plan.Owners | None) -> tuple[Any, Any]:
        """Pack queries (side 0) or keys (side 1): rows, and their heights."""
        layout = of.layout
        source = _rows(self.place.put(source))
        table, count = plan.pack_table(source.shape[0], owners)
        grid, there = (len(table),), self._put(table)
        rows, heights = self.empty((count, layout.columns)), self.empty(count)
        factored = layout.factors[0].size > 0
        norm = np.float32(layout.key_norm if side else 0)
        self._launch(
            pack, grid, source, np.float32(layout.limit), np.float32(0) if factored else norm,
            of.centers[side], of.linear if side else of.no_linear, there, rows, heights,
        )  # fmt: skip
        if not factored:
            return rows, heights
        new = self.empty((count, layout.columns))
        self._launch(change, grid, rows, of.factors[side], norm, there, new, heights)
        return new, heights

    def _run(self, p: Problem, read: Any) -> None:
        """Fold one side, and call `read` for the other with parts of it and the states for them."""
        table = p.sides.jobs.table
        longest = int(table[:, 3].max(initial=0))
        cut = plan.lengths(self.place.device, len(table), longest, *p.shape, causal=p.causal)
        for start in range(0, max(longest, 1), cut.span):
            parts = plan.stretches(table[:, 3], cut.stretch, (start, start + cut.span))
            before = self._fold(p, parts, p.fresh and start == 0)
            if p.causal:
                read(p, parts, np.arange(len(parts.owner)), before)
        if not p.causal:
            parts = plan.stretches(table[:, 6], TILE, (0, int(table[:, 6].max(initial=0))))
            read(p, parts, p.sides.slots[parts.owner], p.states)

    def _fold(self, p: Problem, parts: plan.Stretches, fresh: bool) -> States:
        """Fold parts of side a into the states; the sums before each part."""
        layout, (slices, columns), count, a = p.map.layout, p.shape, len(parts.owner), p.a
        own = self._room(p.map, count, columns * TILE)
        self._launch(
            make_fold(layout.kind, layout.signs, p.precision), (count, slices, columns), a.rows, a.heights,
            a.shares, a.vectors, a.mask, p.map.weight, a.bias, p.epsilon,
            self._put(plan.fold_table(p.sides, parts, p.backwards)), *own,
        )  # fmt: skip
        before = States(self.empty(own.c.shape, np.int32), own.s, own.z)
        self._launch(
            kernels.scan, (len(p.sides.jobs.table), layout.features // 4),
            self._put(plan.scan_table(p.sides, parts, fresh)), own.c, *before, *p.states,
        )  # fmt: skip
        return before

    def _read(
        self, p: Problem, parts: plan.Stretches, slots: Array, states: States, *, out: Any,
        weights: Any, divide: bool,
    ) -> None:  # fmt: skip
        """Read the states in the given slots, a part of side b each."""
        layout, a, b = p.map.layout, p.a, p.b
        table = plan.read_table(p.sides, parts, slots, p.backwards)
        self._launch(
            make_read(layout.kind, layout.signs, p.causal, divide, p.precision),
            (len(table), p.shape[1]), b.rows, b.heights, b.mask, a.rows, a.heights, a.vectors, a.mask, p.map.weight, b.bias, a.bias,
            p.epsilon, self._put(table), *states, out, *weights,
        )  # fmt: skip

    def _pull(
        self, p: Problem, parts: plan.Stretches, slots: Array, states: States, *, side: int, out: Any
    ) -> None:  # fmt: skip
        """Write the gradients of a part of side b each, queries (side 0) or keys (side 1)."""
        layout, a, b = p.map.layout, p.a, p.b
        table = plan.read_table(p.sides, parts, slots, p.backwards)
        factored = layout.factors[0].size > 0
        target = self.empty((out.shape[0], layout.columns)) if factored else out
        self._launch(
            make_pull(layout.kind, layout.signs, p.causal),
            (len(table), -(-out.shape[1] // TILE)), b.rows, b.heights, b.vectors, b.shares, b.mask,
            a.rows, a.heights, a.vectors, a.shares, a.mask, p.map.weight, b.bias, a.bias, p.epsilon,
            self._put(table), *states, np.float32(1 / layout.unit),
            np.float32(2 * layout.key_norm / layout.unit if side else 0),
            p.map.slope if side else p.map.no_linear, target,
        )  # fmt: skip
        if factored:
            turned = self._put(plan.change_table(table))
            self._launch(
                change, (len(table),), target, p.map.turned[side], np.float32(0), turned, out,
                self.empty(out.shape[0]),
            )  # fmt: skip


def _rows(array: Any) -> Any:
    """Return (..., L, d) as a matrix of all its rows."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
