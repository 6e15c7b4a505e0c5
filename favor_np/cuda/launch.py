"""The seam between checked calls and CUDA kernels: the twin of `favor_np.cpu.launch`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from favor_np.call import Call, Forward, StateForm, StateParts
from favor_np.cuda import plan, runtime
from favor_np.cuda.arrays import Place
from favor_np.cuda.device import Device
from favor_np.cuda.kernels import favor as kernels
from favor_np.cuda.kernels import favor_vjp as vjp
from favor_np.cuda.kernels import step as token
from favor_np.cuda.kernels.pack import (
    change,
    convert,
    find_bad,
    join,
    lower,
    pack,
    scale,
    take,
)
from favor_np.cuda.kernels.tiles import NOTHING, TILE
from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

#: A bias exponent of 1, in fixed point.
BIAS_UNIT = 2**32

make_fold = functools.cache(kernels.make_fold)
make_read = functools.cache(kernels.make_read)
make_pull = functools.cache(vjp.make_pull)
make_step = functools.cache(token.make_step)


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
    no_tops: Any
    no_log2_bias: Any
    unmasked: Any


class States(NamedTuple):
    """States (c, S, z) on a device, a row each: of slots, or of parts of sequences."""

    c: Any
    s: Any
    z: Any


class Side(NamedTuple):
    """Rows, log-norms, vectors, shares (of size 0 if all are 1) and mask, on the device.

    The rows as well as they were before the map's matrix, and log2_bias, the log2 of what weights
    are multiplied with, as integers of `BIAS_UNIT`.
    """

    rows: Any
    centred: Any
    log_norms: Any
    log2_bias: Any
    vectors: Any
    shares: Any
    mask: Any
    bias: Any


class Problem(NamedTuple):
    """What the kernels of one call share: side `a` is folded, `b` reads, as the spans say."""

    map: Map
    a: Side
    b: Side
    causal: bool
    biased: bool
    states: States
    spans: tuple[plan.Span, ...]
    #: Whether what is multiplied is rounded to bfloat16.
    bfloat16: bool = False

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
    put = runtime.constant
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
        no_tops=put(np.zeros(0, np.int32)),
        no_log2_bias=put(np.zeros(0, np.int64)),
        unmasked=put(np.zeros(0, np.bool_)),
    )


@functools.lru_cache(maxsize=64)
def _attention(on: Device, stream: int, *args: Any, **options: Any) -> plan.Attention:
    """Plan attention for a device, its tables there, for work on a stream."""
    found: plan.Attention = _there(plan.attention(on, *args, **options), stream)
    return found


@functools.lru_cache(maxsize=64)
def _gradient(on: Device, stream: int, *args: Any, **options: Any) -> plan.Gradient:
    """Plan gradients for a device, their tables there, for work on a stream."""
    found: plan.Gradient = _there(plan.gradient(on, *args, **options), stream)
    return found


@functools.lru_cache(maxsize=64)
def _steps(on: Device, stream: int, *args: Any) -> plan.Steps:  # noqa: ARG001
    """Plan steps, their tables on the device, for work on a stream."""
    found: plan.Steps = _there(plan.steps(*args), stream)
    return found


@functools.lru_cache(maxsize=8)
def _waves(on: Device, stream: int, *args: Any) -> tuple[plan.Wave, ...]:  # noqa: ARG001
    """Plan a window, its tables on the device, for work on a stream."""
    found: tuple[plan.Wave, ...] = _there(plan.waves(*args), stream)
    return found


def forget() -> None:
    """Drop the copies of maps and tables on devices."""
    for copies in (_map, _attention, _gradient, _steps, _waves):
        copies.cache_clear()


def _there(item: Any, stream: int) -> Any:
    """Return a plan with its arrays on the device."""
    if isinstance(item, np.ndarray):
        return runtime.constant(item, stream)
    if isinstance(item, tuple):
        parts = (_there(part, stream) for part in item)
        return item._make(parts) if hasattr(item, "_make") else tuple(parts)
    return item


def _turned(factors: Array) -> Array:
    """Transpose the matrices of all heads, which stand below each other."""
    width = factors.shape[1]
    return factors.reshape(-1, width, width).swapaxes(1, 2).reshape(-1, width)


def _a_call(method: F) -> F:
    """Let a method use the scratch memory for itself."""

    @functools.wraps(method)
    def wrapped(self: Launch, *args: Any, **options: Any) -> Any:
        with self.scratch.call():
            return method(self, *args, **options)

    return cast("F", wrapped)


class Launch:
    """Launches kernels on the stream of a place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.handle = runtime.handle_of(place.stream)
        self.scratch = runtime.scratch(place.device.number, place.stream)

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Any:
        """Return a new array on the device, of whatever was there."""
        return self.place.empty(shape, dtype)

    def _put(self, array: Array) -> Any:
        return runtime.to_device(array, self.place.stream)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
        if all(grid):
            runtime.launch(kernel, grid, args, self.place.stream)

    def _taken(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Any:
        """Return memory for as long as this call is under way."""
        return self.scratch.empty(shape, dtype)

    # States

    def new_states(self, form: StateForm, count: int) -> States:
        """Return `count` states of no keys."""
        return self._put_states(form, count, None)

    def states_of(self, form: StateForm, parts: StateParts) -> States:
        """Return states on the device from what the CPU has of them."""
        return self._put_states(form, len(parts.c), parts)

    def _put_states(self, form: StateForm, count: int, parts: StateParts | None) -> States:
        layout, dim = plan.layout(form.feature_map), form.value_dim
        shape, real = (count, layout.features), layout.real
        c, z = np.full(shape, NOTHING, np.int32), np.zeros(shape, np.float32)
        s = np.zeros((*shape, -(-dim // TILE) * TILE), np.float32)
        if parts is not None:
            c[:, real], s[:, real, :dim], z[:, real] = parts.c, parts.s, parts.z
        return States(*map(self._put, (c, s, z)))

    def copy_states(self, arrays: States) -> States:
        """Return a copy of states."""
        return States(*(runtime.copy(array, self.place.stream) for array in arrays))

    def lower_states(self, _form: StateForm, arrays: States, by: Array) -> None:
        """Take so much off the exponents of each state, but leave none below `NOTHING`."""
        exponents = arrays[0]
        count, features = exponents.shape
        by = self._put(np.clip(by, NOTHING, -NOTHING).astype(np.int32))
        self._launch(lower, (count, -(-features // 256)), exponents, by)

    def scale_states(self, arrays: States, by: Array) -> None:
        """Multiply the sums of each state by a number."""
        by = self._put(by.astype(np.float32))
        for sums in arrays[1:]:
            rows = runtime.plain(sums, (len(by), math.prod(sums.shape[1:])))
            self._launch(scale, (rows.shape[0], -(-rows.shape[1] // 256)), rows, by)

    def check_finite(self, **arrays: Any) -> None:
        """Refuse device arrays, None for none, that hold NaN or infinity."""
        for name, array in arrays.items():
            if array is not None and array.size:
                found = self._put(np.zeros(1, np.int32))
                array = runtime.flat(array)
                self._launch(find_bad, (-(-array.size // 256),), array, found)
                if runtime.to_host(found, self.place.stream)[0]:
                    raise ValueError(f"{name} must be finite, got NaN or infinity")

    @_a_call
    def merge_states(self, into: States, other: States) -> None:
        """Add the states `other` to the states `into`."""
        own = self.copy_states(other)  # for the scan writes to what it adds
        numbers = np.arange(own.c.shape[0])
        table = self._put(
            np.stack([numbers, numbers, 0 * numbers + 1, 0 * numbers], 1, dtype=np.int32)
        )
        self._scan(table, own, into)

    def _scan(self, table: Any, own: States, into: States) -> States:
        """Add states `own` to those in `into`, and return in place of each what was there."""
        before = States(self._taken(own.c.shape, np.int32), own.s, own.z)
        flat = map(runtime.flat, (own.c, *before))
        self._launch(kernels.scan, (table.shape[0], into.c.shape[1] // 4), table, *flat, *into)
        return before

    def state_sums(self, form: StateForm, arrays: States) -> tuple[Array, Array, Array]:
        """Return copies of (c, S, z) in main memory, as the CPU has them."""
        real = plan.layout(form.feature_map).real
        c, s, z = (runtime.to_host(array, self.place.stream) for array in arrays)
        return c[:, real], s[:, real, : form.value_dim], z[:, real]

    def normalizers(self, out: Any) -> tuple[Any, Any]:
        """Return arrays for the denominators of the rows of `out`."""
        return self.empty(out.shape[:-1]), self.empty(out.shape[:-1], np.int32)

    # Attention

    def convert(self, source: Any, target: Any) -> None:
        """Copy float32 numbers to an array of another type, in its order."""
        source, target = (runtime.flat(x) for x in (source, target))
        self._launch(convert, (-(-target.size // 256),), source, target)

    @_a_call
    def attend(
        self, call: Call, out: Any, state: States | None, normalizers: tuple[Any, Any] | None
    ) -> None:
        """Fold keys and values, read with queries into `out`: see `Engine.attend`."""
        of = self._map(call)
        if call.window is not None:
            if normalizers is not None:
                raise ValueError("window has no gradient on a CUDA device")
            self._attend_windows(of, call, out)
        elif state is not None and normalizers is None and _is_step(call, of.layout):
            self._step(of, call, out, state)
        else:
            weights = None if normalizers is None else tuple(map(runtime.flat, normalizers))
            self._attend(of, call, runtime.rows(out), state, weights)

    def _attend(
        self, of: Map, call: Call, out: Any, state: States | None, weights: Any = None
    ) -> None:
        """Attend without a window; `weights` receive the denominators of the rows of `out`."""
        how = _attention(
            self.place.device,
            self.handle,
            call.map,
            call.shapes(stateful=state is not None),
            _offsets(call),
            fresh=state is None,
            causal=call.causal,
        )
        rows, centred, log_norms = self._pack(of, call.q, 0, how.queries)
        nothing = of.no_log2_bias, of.nothing, of.nothing, of.unmasked
        problem = Problem(
            map=of,
            a=self._keys(of, call, how.keys),
            b=Side(rows, centred, log_norms, *nothing, of.query_bias),
            causal=call.causal,
            biased=call.log2_bias is not None,
            states=state or self._room(of, how.jobs, call.v.shape[-1]),
            spans=how.spans,
            bfloat16=call.bfloat16 and self.place.device.tensor_cores,
        )
        weights = weights or (of.nothing, of.no_tops)
        self._run(problem, functools.partial(self._read, out=out, weights=weights))

    def _attend_windows(self, of: Map, call: Call, out: Any) -> None:
        """Attend within segments, and to the ends of those before; join both: `plan.waves`."""
        put, bias = self.place.put, call.log2_bias
        call = replace(
            call,
            q=put(call.q),
            k=put(call.k),
            v=put(call.v),
            mask=None if call.mask is None else put(call.mask),
            log2_bias=None
            if bias is None
            else runtime.plain(self._log2_bias(of, call), bias.shape),
        )
        shapes = call.shapes(stateful=True)
        for wave in _waves(
            self.place.device, self.handle, call.map, shapes, _offsets(call), call.window
        ):
            with self.scratch.part():
                own = self._within(of, call, wave.own)
                other = own if wave.other is None else self._within(of, call, wave.other)
                grid = (-(-own[0].shape[0] // 8),)
                places = wave.joined, wave.own.queries
                self._launch(join, grid, *own, *other, *places, runtime.rows(out))

    def _within(self, of: Map, call: Call, part: plan.Part) -> tuple[Any, Any, Any]:
        """Return the rows of a part, for all heads, and their denominators."""
        packs = np.frombuffer(part.packs, np.int64)
        part_of = replace(
            call,
            q=self._take(call.q, part.queries, 2),
            k=self._take(call.k, part.keys, 2),
            v=self._take(call.v, part.keys, 2),
            mask=self._take(call.mask, part.keys, 1),
            log2_bias=self._take(call.log2_bias, part.keys, 1),
            out_shape=(*call.out_shape[:-2], int(packs[-1]), call.out_shape[-1]),
            offsets=packs,
            window=None,
        )
        count = math.prod(part_of.out_shape[:-1])
        rows = self._taken((count, call.out_shape[-1]))
        weights = self._taken(count), self._taken(count, np.int32)
        self._attend(of, part_of, rows, None, weights)
        return rows, *weights

    def _take(self, array: Any, places: Any, axes: int) -> Any:
        """Return what an array, or None, has at positions on the first of its last axes."""
        if array is None:
            return None
        lead, (length, *width) = array.shape[:-axes], array.shape[-axes:]
        shape = math.prod(lead), math.prod(width)
        found = self._taken((shape[0] * places.size, shape[1]), array.dtype)
        source = runtime.plain(array, (shape[0] * length, shape[1]))
        self._launch(take, (-(-found.shape[0] // 8),), source, places, found)
        return runtime.plain(found, (*lead, places.size, *width))

    def _step(self, of: Map, call: Call, out: Any, state: States) -> None:
        """Take a token for each state, in one launch."""
        layout, put = of.layout, self.place.put
        how = _steps(
            self.place.device, self.handle, call.map, call.shapes(stateful=True), _offsets(call)
        )
        self._launch(
            make_step(layout.kind, layout.signs),
            (how.table.shape[0],),
            *(runtime.rows(put(x)) for x in (call.q, call.k, call.v)),
            of.unmasked if call.mask is None else runtime.flat(put(call.mask)),
            self._log2_bias(of, call),
            of.weight,
            of.query_bias,
            of.bias,
            np.float32(layout.epsilon),
            np.float32(layout.limit),
            np.float32(layout.key_norm),
            *of.centers,
            of.linear,
            of.no_linear,
            *how,
            *state,
            runtime.rows(out),
        )

    @_a_call
    def attend_vjp(
        self, call: Call, forward: Forward, grad: Any, final_state: States | None
    ) -> tuple[Any, ...]:
        """Pull `grad` back through `attend`: gradients of q, k and v.

        And of log2_bias, for every head of the result, in main memory, or None; and the cotangent
        of the first state, or None.
        """
        q, k, v = call.q, call.k, call.v
        of, biased = self._map(call), call.log2_bias is not None
        how = self._gradient(call, forward, final_state)
        by_queries, by_keys = self._problems(how, call, forward, grad, final_state)
        found = [
            self.empty(
                (how.results * x.shape[-2], x.shape[-1]),
                np.float32 if added else self.place.held(x.dtype),
            )
            for x, added in zip((q, k, v), how.sums, strict=True)
        ]
        of_log2_bias = of.nothing
        if biased:
            of_log2_bias = self.empty((math.prod(call.out_shape[:-2]), k.shape[-2]))
        pull = functools.partial(self._pull, side=0, out=found[0], of_log2_bias=of.nothing)
        self._run(by_queries, pull)
        none = of.nothing, of.no_tops

        def read_and_pull(*args: Any) -> None:
            self._read(*args, out=found[2], weights=none, divide=False)
            self._pull(*args, side=1, out=found[1], of_log2_bias=runtime.flat(of_log2_bias))

        self._run(by_keys, read_and_pull)
        summed = (
            self._summed(x, like, added)
            for x, like, added in zip(found, (q, k, v), how.sums, strict=True)
        )
        of_state = None
        if forward.state is not None:
            if final_state is not None:  # whose states for which there is no key stay as they are
                of_state = self.copy_states(final_state)
            else:
                form = StateForm(call.map, call.compute, v.shape[-1])
                of_state = self.new_states(form, forward.state.c.shape[0])
            self._scan(how.first, by_keys.states, of_state)
        return (
            *summed,
            runtime.to_host(of_log2_bias, self.place.stream) if biased else None,
            of_state,
        )

    @_a_call
    def projection_vjp(
        self, call: Call, forward: Forward, grad: Any, final_state: States | None
    ) -> tuple[Array, Array]:
        """Return the cotangents of weights and biases for each head of the map.

        First those by keys, then those by queries.
        """
        of = self._map(call)
        how = self._gradient(call, forward, final_state, of_map=True)
        by_queries, by_keys = self._problems(how, call, forward, grad, final_state)
        shape = 2, of.bias.shape[0], of.layout.lines
        weights, biases = np.zeros((*shape, of.layout.columns)), np.zeros(shape)
        for problem, *sums in zip((by_keys, by_queries), weights, biases, strict=True):
            self._run(problem, functools.partial(self._pull_map, sums=sums))
        return weights.reshape(-1, *weights.shape[2:]), biases.reshape(-1, shape[2])

    def _gradient(
        self, call: Call, forward: Forward, final_state: States | None, *, of_map: bool = False
    ) -> plan.Gradient:
        """Return how the gradients of a call are found, or that of its map."""
        fresh = forward.state is None, final_state is None
        return _gradient(
            self.place.device,
            self.handle,
            call.map,
            call.shapes(stateful=not all(fresh)),
            _offsets(call),
            causal=call.causal,
            fresh=fresh,
            of_map=of_map,
        )

    def _problems(
        self,
        how: plan.Gradient,
        call: Call,
        forward: Forward,
        grad: Any,
        final_state: States | None,
    ) -> tuple[Problem, Problem]:
        """Return what finds gradients: queries that read keys, and keys that read queries."""
        of, dim, causal = self._map(call), call.v.shape[-1], call.causal
        rows, centred, _ = self._pack(of, call.q, 0, how.queries)
        count = rows.shape[0]
        vectors, shares, log_norms = (
            self._taken((count, dim)),
            self._taken(count),
            self._taken(count),
        )
        biased = call.log2_bias is not None
        log2_bias = self._taken(count, np.int64) if biased else of.no_log2_bias
        self._launch(
            vjp.cotangents,
            (-(-count // 8),),
            runtime.rows(grad),
            runtime.rows(forward.out),
            *map(runtime.flat, forward.normalizers),
            vectors,
            shares,
            log_norms,
            log2_bias,
        )
        keys = self._keys(of, call, how.keys)
        queries = Side(
            rows, centred, log_norms, log2_bias, vectors, shares, of.unmasked, of.query_bias
        )
        of_queries, of_keys = (self._room(of, count, dim) for count in how.states)
        if forward.state is not None:
            of_queries = self.copy_states(forward.state)
        if final_state is not None:
            self._scan(how.last, self.copy_states(final_state), of_keys)
        return (
            Problem(of, keys, queries, causal, biased, of_queries, how.of_queries),
            Problem(of, queries, keys, causal, biased, of_keys, how.of_keys),
        )

    def _summed(self, found: Any, like: Any, sums: tuple[Any, Any] | None) -> Any:
        """Add the gradients of all results to those of the heads that they belong to."""
        if sums is not None:
            count, width = math.prod(like.shape[:-2]), math.prod(like.shape[-2:])
            source = runtime.plain(found, (found.size // max(width, 1), width))
            found = self.empty((count, width), self.place.held(like.dtype))
            self._launch(vjp.gather, (count, -(-width // 256)), source, *sums, found)
        return found.reshape(like.shape)

    def _room(self, of: Map, count: int, value_dim: int) -> States:
        """Return states that nothing was written to."""
        shape, columns = (count, of.layout.features), -(-value_dim // TILE) * TILE
        return States(
            self._taken(shape, np.int32), self._taken((*shape, columns)), self._taken(shape)
        )

    def _map(self, call: Call) -> Map:
        return _map(call.map, self.place.device)

    def _keys(self, of: Map, call: Call, packs: tuple[Any, int]) -> Side:
        rows, centred, log_norms = self._pack(of, call.k, 1, packs)
        seen = of.unmasked if call.mask is None else runtime.flat(self.place.put(call.mask))
        v = runtime.rows(self.place.put(call.v))
        log2_bias = self._log2_bias(of, call)
        return Side(rows, centred, log_norms, log2_bias, v, of.nothing, seen, of.bias)

    def _log2_bias(self, of: Map, call: Call) -> Any:
        if call.log2_bias is None:
            return of.no_log2_bias
        if call.log2_bias.dtype == np.int64:  # there already, a part of all
            return runtime.flat(call.log2_bias)
        return runtime.flat(self._put(np.rint(call.log2_bias * BIAS_UNIT).astype(np.int64)))

    def _pack(
        self, of: Map, source: Any, side: int, packs: tuple[Any, int]
    ) -> tuple[Any, Any, Any]:
        """Pack queries (side 0) or keys (side 1): rows, also as they are centred, and log-norms."""
        layout = of.layout
        table, count = packs
        grid = (table.shape[0],)
        rows, log_norms = self._taken((count, layout.columns)), self._taken(count)
        factored = layout.factors[0].size > 0
        norm = np.float32(layout.key_norm if side else 0)
        self._launch(
            pack,
            grid,
            runtime.rows(self.place.put(source)),
            np.float32(layout.limit),
            np.float32(0) if factored else norm,
            of.centers[side],
            of.linear if side else of.no_linear,
            table,
            rows,
            log_norms,
        )
        if not factored:
            return rows, rows, log_norms
        new = self._taken((count, layout.columns))
        self._launch(change, grid, rows, of.factors[side], norm, table, new, log_norms)
        return new, rows, log_norms

    def _run(self, p: Problem, read: Any) -> None:
        """Fold one side span by span; `read` by the other side, from the states that it needs."""
        for span in p.spans:
            with self.scratch.part():
                before = self._fold(p, span)
                read(p, span, before if p.causal else p.states)

    def _fold(self, p: Problem, span: plan.Span) -> States:
        """Fold a span of side a into the states; the sums before each of its stretches."""
        layout, (slices, columns), a = p.map.layout, p.shape, p.a
        own = self._room(p.map, span.parts, columns * TILE)
        self._launch(
            make_fold(layout.kind, layout.signs, p.biased, p.bfloat16),
            (span.parts, slices, columns),
            a.rows,
            a.log_norms,
            a.log2_bias,
            a.shares,
            a.vectors,
            a.mask,
            p.map.weight,
            a.bias,
            p.epsilon,
            span.fold,
            *own,
        )
        return self._scan(span.scan, own, p.states)

    def _read(
        self,
        p: Problem,
        span: plan.Span,
        states: States,
        *,
        out: Any,
        weights: Any,
        divide: bool = True,
    ) -> None:
        """Read states, a part of side b each."""
        layout, a, b = p.map.layout, p.a, p.b
        self._launch(
            make_read(layout.kind, layout.signs, p.causal, divide, p.biased, p.bfloat16),
            (span.read.shape[0], p.shape[1]),
            b.rows,
            b.log_norms,
            b.log2_bias,
            b.mask,
            a.rows,
            a.log_norms,
            a.log2_bias,
            a.vectors,
            a.mask,
            p.map.weight,
            b.bias,
            a.bias,
            p.epsilon,
            span.read,
            *states,
            out,
            *weights,
        )

    def _pull(
        self, p: Problem, span: plan.Span, states: States, *, side: int, out: Any, of_log2_bias: Any
    ) -> None:
        """Write the gradients of a span of side b, queries (side 0) or keys (side 1)."""
        layout, target = p.map.layout, out
        if span.change is not None:
            target = self._taken((out.shape[0], layout.columns))
        self._launch_pull(
            p,
            states,
            span.read,
            out.shape[1],
            np.float32(1 / layout.unit),
            np.float32(2 * layout.key_norm / layout.unit if side else 0),
            p.map.slope if side else p.map.no_linear,
            p.map.no_linear,
            target,
            of_log2_bias,
        )
        if span.change is not None:
            self._launch(
                change,
                (span.change.shape[0],),
                target,
                p.map.turned[side],
                np.float32(0),
                span.change,
                out,
                self._taken(out.shape[0]),
            )

    def _pull_map(self, p: Problem, span: plan.Span, states: States, *, sums: list[Array]) -> None:
        """Add the gradients of weights and biases of each head, by a span of side b, to sums."""
        layout, none = p.map.layout, np.float32(0)
        lines, columns, heads = layout.lines, layout.columns, p.map.bias.shape[0]
        for piece in span.pieces:
            with self.scratch.part():
                count = piece.read.shape[0]
                found = self._taken((count * lines, columns)), self._taken(count * lines)
                more = none, none, p.map.no_linear, p.b.centred
                self._launch_pull(p, states, piece.read, columns, *more, *found, of_map=True)
                for part, total in zip(found, sums, strict=True):
                    width = total[0].size
                    added = self.empty((heads, width))
                    self._launch(
                        vjp.gather,
                        (heads, -(-width // 256)),
                        runtime.plain(part, (count, width)),
                        piece.first,
                        piece.parts,
                        added,
                    )
                    total += runtime.to_host(added, self.place.stream).reshape(total.shape)

    def _launch_pull(
        self, p: Problem, states: States, read: Any, width: int, *more: Any, of_map: bool = False
    ) -> None:
        layout, a, b = p.map.layout, p.a, p.b
        self._launch(
            make_pull(layout.kind, layout.signs, p.causal, p.biased, of_map),
            (read.shape[0], -(-width // TILE)),
            b.rows,
            b.log_norms,
            b.log2_bias,
            b.vectors,
            b.shares,
            b.mask,
            a.rows,
            a.log_norms,
            a.log2_bias,
            a.vectors,
            a.shares,
            a.mask,
            p.map.weight,
            b.bias,
            a.bias,
            p.epsilon,
            read,
            *states,
            *more,
        )


def _is_step(call: Call, layout: plan.Layout) -> bool:
    """Whether a call takes one token for each state, and the kernel of tokens has room for it."""
    longest = call.keys if call.offsets is None else int(np.diff(call.offsets).max(initial=0))
    small = layout.features <= token.FEATURES and layout.columns <= token.COLUMNS
    return call.causal and longest == 1 and small and not layout.factors[0].size


def _offsets(call: Call) -> bytes | None:
    return None if call.offsets is None else call.offsets.tobytes()
