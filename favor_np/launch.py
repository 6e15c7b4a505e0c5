"""The one seam between validated arrays and compiled kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import plan, scaling
from favor_np.features import FeatureMap
from favor_np.kernels import bfloat16, exact_vjp
from favor_np.kernels import exact as exact_kernels
from favor_np.kernels import favor as kernels
from favor_np.kernels import favor_vjp as vjp
from favor_np.kernels.jobs import OVERFLOW, TROUBLE
from favor_np.kernels.pack import CHUNK
from favor_np.kernels.spread import Spread
from favor_np.kernels.state import PAD
from favor_np.threads import POOL, resolve_threads
from favor_np.validation import rows_of

Array: TypeAlias = npt.NDArray[Any]

_NO_MASK = np.ones(1, np.bool_)
_NO_MASK.flags.writeable = False
_NO_WEIGHTS = {
    np.dtype(kind): (np.zeros(0, kind), np.zeros(0, plan.integer_of(np.dtype(kind))))
    for kind in (np.float32, np.float64)
}


def _mask_rows(mask: Array | None) -> Array:
    if mask is None:
        return _NO_MASK
    flat = mask.reshape(-1)
    flat.flags.writeable = False
    return flat


def new_state(feature_map: FeatureMap, dtype: np.dtype[Any], count: int, value_dim: int) -> Any:
    """Return the arrays (c, S, z) of `count` empty states, as the kernels lay them out."""
    return _empty(plan.layout(feature_map, dtype, value_dim), count)


def _empty(layout: plan.Layout, count: int) -> Any:
    arrays = plan.state_arrays(count, layout.features, layout.value_columns, layout.dtype)
    arrays[0][:, : layout.features] = layout.fresh
    return arrays


def copied(arrays: Any) -> Any:
    """Return a copy of states."""
    return tuple(plan.aligned_copy(array) for array in arrays)


def without_padding(
    feature_map: FeatureMap, dtype: np.dtype[Any], value_dim: int, arrays: Any
) -> tuple[Array, Array, Array]:
    """Return a copy of states (c, S, z) as any machine would have them."""
    layout = plan.layout(feature_map, dtype, value_dim)
    c, s, z = arrays
    if c[:, layout.features].any():
        c, s, z = without_tail(feature_map, dtype, value_dim, copied(arrays))
    return c[:, layout.real], s[:, layout.real, :value_dim], z[:, layout.real]


def without_tail(feature_map: FeatureMap, dtype: np.dtype[Any], value_dim: int, arrays: Any) -> Any:
    """Return the states, in which the tokens of their tails are folded now."""
    layout = plan.layout(feature_map, dtype, value_dim)
    keys, values = np.empty((0, feature_map.dim), dtype), np.empty((0, value_dim), dtype)
    rows = (rows_of(keys, dtype), rows_of(keys, dtype), rows_of(values, dtype))
    call = _Call(layout, (*rows, _NO_MASK, *layout.arrays), _result(values, None), 1, None, False)
    call.fold_tails(arrays)
    return arrays


class Rest(NamedTuple):
    """What states hold beside (c, S, z): see ``kernels.state``."""

    s_rest: Array  # what rounding has taken from S and z
    z_rest: Array
    tail: Array  # how many tokens are in the tail; their features and values
    tail_features: Array
    tail_values: Array


def all_parts(
    feature_map: FeatureMap, dtype: np.dtype[Any], value_dim: int, arrays: Any
) -> tuple[tuple[Array, Array, Array], Rest]:
    """Return a copy of everything that states hold, as any machine would have it."""
    layout = plan.layout(feature_map, dtype, value_dim)
    (c, s, z), real, low = arrays, layout.real, layout.features + layout.real
    count = c[:, layout.features].copy()
    alive = np.arange(count.max(initial=0)) < count[:, None]
    keys, values = plan.tail(layout, s, z)
    keys = keys[:, : alive.shape[1], real]
    values = values[:, : alive.shape[1], :value_dim].copy()
    keys[~alive], values[~alive] = 0, 0
    rest = Rest(s[:, low, :value_dim], z[:, low], count, keys, values)
    return (c[:, real], s[:, real, :value_dim], z[:, real]), rest


def with_padding(
    feature_map: FeatureMap, dtype: np.dtype[Any], value_dim: int, raw: tuple[Array, Array, Array],
    rest: Rest | None = None,
) -> Any:  # fmt: skip
    """Return states as the kernels lay them out from what `without_padding` or `all_parts` returned."""
    layout = plan.layout(feature_map, dtype, value_dim)
    c, s, z = arrays = _empty(layout, len(raw[0]))
    real, low = layout.real, layout.features + layout.real
    c[:, real], s[:, real, :value_dim], z[:, real] = raw
    if rest is not None:
        s[:, low, :value_dim], z[:, low], c[:, layout.features] = (
            rest.s_rest,
            rest.z_rest,
            rest.tail,
        )
        keys, values = plan.tail(layout, s, z)
        keys[:, : rest.tail_features.shape[1], real] = rest.tail_features
        values[:, : rest.tail_values.shape[1], :value_dim] = rest.tail_values
    scaling.keep_in_range(arrays)
    return arrays


def merge(into: Any, other: Any) -> None:
    """Add the states `other` to the states `into`: arrays (c, S, z) of equal shapes, without tails."""
    (c, s, z), (other_c, other_s, other_z) = into, other
    features = c.shape[-1] - PAD
    mine, theirs = c[..., :features], other_c[..., :features]
    top = np.maximum(mine, theirs)
    with np.errstate(all="ignore"):  # what is much smaller vanishes; values may be infinite
        keep, add = (np.ldexp(1.0, x - top).astype(z.dtype) for x in (mine, theirs))
        _add_pairs(z[..., None], other_z[..., None], keep[..., None], add[..., None])
        _add_pairs(s, other_s, keep[..., None], add[..., None])
    mine[...] = top
    scaling.keep_in_range(into)


def _add_pairs(sums: Array, other: Array, keep: Array, add: Array) -> None:
    """Scale sums and add others, each with what rounding has taken from it, as the kernels do."""
    features = keep.shape[-2]
    high, low = sums[..., :features, :], sums[..., features : 2 * features, :]
    more, rest = other[..., :features, :], other[..., features : 2 * features, :]
    high *= keep
    value = add * more + (add * rest + keep * low)
    total = high + value
    moved = total - high
    low[...] = (high - (total - moved)) + (value - moved)
    high[...] = total


class Clock(NamedTuple):
    """Decay: log2 by which the first key of each slot is raised, and each further one more."""

    start: Array
    rate: Array


def clock(rates: Array | None, offsets: Array | None) -> Clock | None:
    """Return the clock of new states, or of none: their first keys are not raised."""
    if rates is None:
        return None
    if offsets is not None:
        rates = np.repeat(rates, len(offsets) - 1)
    return Clock(np.zeros(len(rates)), rates)


def raised(arrays: Any, by: Array) -> Any:
    """Return states whose features are 2**by times as large, 0 <= by < 1 for each slot."""
    c, s, z = arrays
    factor = np.exp2(by).astype(z.dtype)[:, None]
    return c.copy(), s * factor[..., None], z * factor


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
    offsets: Array | None = None,
    clock: Clock | None = None,
    weights: tuple[Array, Array] | None = None,
    spread: Spread | None = None,
    group: int | None = None,
    fast: bool = False,
) -> None:
    """Fold k and v, read with q into the C-ordered `out`; with a state, on from it and into it.

    With `offsets` every sequence offsets[i]:offsets[i + 1] has a slot of its own.  `weights` receive
    the denominators of the rows as (w, top), w * 2**top, and `spread` how far groups of `group` rows
    of the projection are apart.  With `fast` products are in bfloat16.
    """
    layout, constants, jobs, longest, work = plan.schedule(
        feature_map, dtype, q.shape, k.shape, v.shape, None if mask is None else mask.shape,
        causal, grouped, state_shape, group, fast,
    )  # fmt: skip
    if clock is not None or offsets is not None:
        jobs = _adapted(jobs, offsets, clock)
    arrays = (rows_of(q, dtype), rows_of(k, dtype), rows_of(v, dtype), _mask_rows(mask),
              *layout.arrays)  # fmt: skip
    call = _Call(layout, arrays, _result(out, weights), _threads(work * len(jobs.table), threads),
                 spread, fast)  # fmt: skip
    tokens = causal and (longest == 1 or offsets is not None)
    tokens = tokens and mask is None and spread is None and not fast and jobs.q_rows.shape[1] == 1
    # What a state has taken in cannot be taken back.  The kernel of single tokens looks at them itself.
    large = state is not None and not (tokens and longest == 1) and scaling.holds_large(arrays[2])
    if not large:
        call.attend(constants, jobs, longest, state, causal, tokens)
        large = call.overflow and scaling.holds_large(arrays[2])
    if not large:
        return
    power = scaling.POWER[dtype.itemsize]
    after: Any = None
    if state is not None:
        out[...] = np.nan
        call.attend(constants, jobs, longest, copied(state), causal, tokens)
        after = without_tail(feature_map, dtype, v.shape[-1], copied(state))
        after[1][...] = scaling.scaled(after[1], -power)
    values, rows = scaling.scaled(arrays[2], -power).reshape(v.shape), np.empty_like(out)
    attend(
        feature_map, q, k, values, mask, rows, dtype=dtype, causal=causal, grouped=grouped, state=after,
        state_shape=state_shape, threads=threads, offsets=offsets, clock=clock, group=group, fast=fast,
    )  # fmt: skip
    scaling.fill(out, scaling.means(rows, power))
    if state is not None:
        scaling.keep_in_range(without_tail(feature_map, dtype, v.shape[-1], after), power)
        for array, new in zip(state, after, strict=True):
            array[...] = new


def _adapted(jobs: plan.Jobs, offsets: Array | None, clock: Clock | None) -> plan.Jobs:
    """Return the jobs of packed sequences, and of keys that decay."""
    if clock is not None:
        clocks = np.stack([clock.start, clock.rate], axis=1)
        jobs = plan.Jobs(jobs.table, jobs.q_rows, jobs.out_rows, clocks)
    if offsets is not None:
        jobs = plan.packed(jobs, offsets)
    return jobs


def attend_vjp(
    feature_map: FeatureMap,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    out: Array,
    weights: tuple[Array, Array],
    grad: Array,
    *,
    dtype: np.dtype[Any],
    causal: bool,
    grouped: bool,
    state: Any,
    suffix: Any,
    state_shape: tuple[int, ...] | None,
    threads: int | None,
    offsets: Array | None = None,
    clock: Clock | None = None,
    projection: bool = False,
) -> Any:
    """Pull `grad` back through `attend`, which wrote `out` and `weights`.

    Returns gradients of rows for every query head, q, k and v, and the cotangents of the first states;
    with `projection` instead one of u for every job, and the job's head.

    `state` is the one that attention began with and `suffix` the cotangent of the one it ended with,
    both (c, S, z) of all slots or None.
    """
    own = None if state is None and suffix is None else state_shape
    layout, constants, jobs, _, work = plan.schedule(
        feature_map, dtype, q.shape, k.shape, v.shape, None if mask is None else mask.shape,
        causal, grouped, own,
    )  # fmt: skip
    jobs = _adapted(jobs, offsets, clock)
    group = jobs.q_rows.shape[1]
    slots = np.repeat(jobs.table[:, 5], group)
    jobs = plan.vjp_jobs(jobs, q.shape[-2], k.shape[-2])
    count = len(jobs.table)
    batch = out.shape[:-2]
    heads = 0 if projection else math.prod(batch)
    rows = [np.zeros((heads * x.shape[-2], x.shape[-1]), dtype) for x in (q, k, v)]
    weight = plan.aligned(
        (count if projection else 0, layout.half, layout.natural.key.shape[-1]), np.float64
    )
    bias = plan.aligned((count if projection else 0, layout.half), np.float64)
    to = vjp.Gradients(rows[0], rows[1], rows[2], weight, bias)
    states = None
    if own is not None:  # first those of the keys' sides, then those of the queries'
        states = _empty(layout, count)
        jobs.table[:, 5] = np.arange(count)
        for mine, theirs, held in zip(states, suffix or states, state or states, strict=True):
            if suffix is not None:
                mine[: count // 2 : max(group, 1)] = theirs[slots[:: max(group, 1)]]
            if state is not None:
                mine[count // 2 :] = held[slots]
    inputs = vjp.Inputs(
        rows_of(q, dtype), rows_of(k, dtype), rows_of(v, dtype), _mask_rows(mask),
        rows_of(grad, dtype), rows_of(out, dtype), *(array.reshape(-1) for array in weights),
    )  # fmt: skip
    args = (
        constants, inputs, layout.map, np.zeros_like(layout.map.bias),
        layout.natural, jobs.table, jobs.clocks, to,
        *(states or ()),
    )  # fmt: skip
    overflow = False
    if count and (out.size or suffix is not None):
        workers = min(_threads(work * count, threads), count)
        space = plan.vjp_workspace(layout, stateful=states is None)
        overflow = bool(_run(vjp.pull, args, count, workers, space)[OVERFLOW])
    powers = None
    if overflow or not all(np.isfinite(x).all() for x in (weight, bias, *(states or ())[1:])):
        powers = scaling.powers_of((inputs.v, inputs.out), (inputs.grad,))
    if powers is not None:  # both factors of the products that overflow, values and cotangents
        values, cotangents = powers
        again = attend_vjp(
            feature_map, q, k, scaling.scaled(inputs.v, -values).reshape(v.shape), mask,
            scaling.scaled(inputs.out, -values).reshape(out.shape), weights,
            scaling.scaled(inputs.grad, -cotangents).reshape(grad.shape), dtype=dtype, causal=causal,
            grouped=grouped, state=_scaled(state, -values, 0),
            suffix=_scaled(suffix, -cotangents, -values - cotangents), state_shape=state_shape,
            threads=threads, offsets=offsets, clock=clock, projection=projection,
        )  # fmt: skip
        both = values + cotangents
    if projection:
        if powers is not None:
            scaling.fill(weight, scaling.scaled(again[0], both))
            scaling.fill(bias, scaling.scaled(again[1], both))
        return weight, bias, jobs.table[:, 4] // layout.blocks
    if powers is not None:
        for mine, small, power in zip(rows, again, (both, both, cotangents), strict=False):
            scaling.fill(mine, scaling.scaled(small.reshape(mine.shape), power))
    first = None
    if states is not None:  # query heads that share a state have each seen a part of its cotangent
        parts = [array[: count // 2] for array in states]
        first = _empty(layout, math.prod(own or ()) * (1 if offsets is None else len(offsets) - 1))
        if suffix is not None:  # without a job (an empty sequence) it is what it was
            idle = np.setdiff1d(np.arange(len(first[0])), slots)
            for array, theirs in zip(first, suffix, strict=True):
                array[idle] = theirs[idle]
        for i in range(count // 2):
            merge([a[slots[i]] for a in first], [a[i] for a in parts])
        if powers is not None:
            first = again[3]
            scaling.keep_in_range(first, cotangents, both)
    pairs = zip(rows, (q, k, v), strict=True)
    return *(grad.reshape(*batch, *x.shape[-2:]) for grad, x in pairs), first


def _scaled(arrays: Any, s_power: int, z_power: int) -> Any:
    """Return states, or none, whose S and z are multiplied with powers of two."""
    if arrays is None:
        return None
    c, s, z = arrays
    return c.copy(), scaling.scaled(s, s_power), scaling.scaled(z, z_power)


@dataclass(slots=True, eq=False)
class _Call:
    """What all kernel calls of one attention call share."""

    layout: plan.Layout
    arrays: tuple[Array, ...]
    result: tuple[Array, ...]
    threads: int
    spread: Spread | None
    words: bool
    #: Whether something that was written is not finite, or large tokens were refused.
    overflow: bool = False

    def attend(
        self,
        constants: Array,
        jobs: plan.Jobs,
        longest: int,
        state: Any,
        causal: bool,
        tokens: bool,
    ) -> None:
        """Run all jobs of a call; those of one token apart."""
        if tokens:
            if longest == 1:
                self.run(constants, jobs, state, tokens=True)
                return
            longer = np.count_nonzero(jobs.table[:, 3] > 1)  # these come first
            self.run(constants, jobs.take(slice(longer, None)), state, tokens=True)
            jobs = jobs.take(slice(longer))
        if causal and self.threads > 1:
            jobs = self.share(constants, jobs, state)
        if causal or longest <= plan.SEGMENT:
            self.run(constants, jobs, state)
            return
        long = jobs.table[:, [3, 6]].max(1) > plan.SEGMENT
        self.run(constants, jobs.take(~long), state)
        jobs = jobs.take(long)
        for first in range(0, len(jobs.table), plan.WAVE):
            wave = jobs.take(slice(first, first + plan.WAVE))
            slots = wave.table[:, 5]
            if state is None:
                totals = _empty(self.layout, len(slots))
            else:
                totals = tuple(array[slots] for array in state)
                self.fold_tails(totals)
            folds, reads = plan.segments(wave)
            self.fold(constants, folds, totals)
            self.run(constants, reads, totals)
            if state is not None and wave.table[:, 3].any():
                for array, total in zip(state, totals, strict=True):
                    array[slots] = total

    def run(self, constants: Array, jobs: plan.Jobs, state: Any, *, tokens: bool = False) -> None:
        """Run jobs, or jobs of one token; without a state each begins with an empty one of its own."""
        count = len(jobs.table)
        if not count:
            return
        workers = min(self.threads, count)
        kernel, args = (
            self._step(constants, jobs) if tokens else self._kernel(constants, jobs, None, workers)
        )
        space = self.layout.stateful if state is None else self.layout.stateless
        if _run(kernel, (*args, *(state or ())), count, workers, space)[OVERFLOW]:
            self.overflow = True

    def share(self, constants: Array, jobs: plan.Jobs, state: Any) -> plan.Jobs:
        """Run the long causal jobs that are fewer than threads, each on all of them; return the others."""
        few, space = plan.few(jobs, self.threads), self.layout.stateful
        if few and state is not None:
            self.fold_tails(state)
        for i in range(few):
            job = jobs.take(slice(i, i + 1))
            slot = int(job.table[0, 5])
            relay = plan.relay(self.layout, int(job.table[0, 3]), self.threads)
            total = relay.states
            arrays = plan.borrow(space, relay.rows)
            try:
                c, s, z = arrays[:3]
                new = _empty(self.layout, 1) if state is None else [a[slot, None] for a in state]
                for array, mine in zip(arrays, new, strict=False):
                    array[total] = mine[0]
                kernel, args = self._kernel(constants, job, relay.words, self.threads)
                if POOL.call(kernel, (*args, *arrays), relay.count, self.threads)[OVERFLOW]:
                    self.overflow = True
                if state is not None:
                    after = c[relay.last], s[total], z[total]
                    for array, mine in zip(state, after, strict=True):
                        array[slot] = mine
            finally:
                plan.give_back(space, relay.rows, arrays)
        return jobs.take(slice(few, None))

    def fold_tails(self, state: Any) -> None:
        """Fold the tokens that states keep in their tails."""
        if state[0][:, self.layout.features].any():
            jobs = plan.jobs_without_rows(len(state[0]), self.layout.rows)
            self.run(self.layout.bidirectional, jobs, state)

    def _kernel(
        self, constants: Array, jobs: plan.Jobs, relay: Array | None, workers: int
    ) -> tuple[Any, tuple[Any, ...]]:
        """Return the kernel for jobs, or for a relay of the first, and its arguments up to the states."""
        layout, kernel = self.layout, kernels.attend
        more: tuple[Any, ...] = ()
        if self.spread is not None:
            room = plan.aligned((workers, plan.spread_room(layout)), layout.dtype)
            kernel, more = kernels.attend_spread, (room, self.spread)
        if self.words:
            bfloat16.allow()
            kernel = kernels.attend_words
        if layout.map.key_planes is not None:
            kernel = kernels.attend_planes
        args = (constants, *self.arrays, jobs.table, jobs.q_rows, jobs.out_rows, jobs.clocks, relay,
                *self.result, *more)  # fmt: skip
        return kernel, args

    def _step(self, constants: Array, jobs: plan.Jobs) -> tuple[Any, tuple[Any, ...]]:
        """Return the kernel for jobs of one token, and its arguments up to the states."""
        args = (constants, *self.arrays[:3], *self.layout.map[:4], jobs.table, jobs.q_rows, jobs.out_rows,
                jobs.clocks, *self.result)  # fmt: skip
        return kernels.attend_tokens, args

    def fold(self, constants: Array, folds: plan.Jobs, totals: Any) -> None:
        """Fold segments into states of their own, then merge these in order into their totals."""
        for first in range(0, len(folds.table), plan.WAVE):
            batch = folds.take(slice(first, first + plan.WAVE))
            owners = batch.table[:, 5].copy()
            batch.table[:, 5] = np.arange(len(owners))
            parts = _empty(self.layout, len(owners))
            self.run(constants, batch, parts)
            for i, owner in enumerate(owners):
                merge([a[owner] for a in totals], [a[i] for a in parts])


def new_weights(out: Array) -> tuple[Array, Array]:
    """Return arrays for the denominators of the rows of `out`: zeros, as of rows without keys."""
    rows = out.shape[:-1]
    return np.zeros(rows, out.dtype), np.zeros(rows, plan.integer_of(out.dtype))


def _result(out: Array, weights: tuple[Array, Array] | None) -> tuple[Array, ...]:
    """Return what a kernel writes to: the arrays of a Result; the weights may be left out."""
    rows = out.reshape(-1, out.shape[-1])
    if weights is None:
        return (rows, *_NO_WEIGHTS[out.dtype])
    return (rows, *(w.reshape(-1) for w in weights))


def _threads(work: int, threads: int | None) -> int:
    """Return how many threads that many multiply-adds deserve."""
    return 1 if work < SERIAL else resolve_threads(threads)


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
    weights: tuple[Array, Array] | None = None,
    words: bool = False,
) -> bool:
    """Write softmax attention to the C-ordered `out`; False if a logit may be too large for it.

    `weights` receive the denominators of the rows as (w, top), w * 2**top.  With `words` products
    are in bfloat16.
    """
    table = plan.exact_jobs(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], None if mask is None else mask.shape[:-1],
        grouped, q.shape[-2], k.shape[-2],
    )  # fmt: skip
    work = math.prod(out.shape[:-1]) * k.shape[-2] * q.shape[-1]
    args = (
        plan.exact_parameters(dtype, scale, causal),
        rows_of(q, dtype), rows_of(k, dtype), rows_of(v, dtype), _mask_rows(mask), table,
        *_result(out, weights),
    )  # fmt: skip
    kernel = exact_kernels.attend_exact
    if words:
        bfloat16.allow()
        kernel, args = exact_kernels.attend_exact_words, (*args, bfloat16.UNIT)
    planes = not words and plan.worth_planes(dtype, CHUNK, q.shape[-1])
    if planes:
        kernel, args = exact_kernels.attend_exact_planes, (*args, bfloat16.UNIT)
    space = plan.exact_workspace(dtype, q.shape[-1], v.shape[-1], words=words, planes=planes)
    workers = min(_threads(work, threads), len(table))
    control = _run(kernel, args, len(table), workers, space)
    if control[OVERFLOW] and scaling.holds_large(args[3]):
        power, rows = scaling.POWER[dtype.itemsize], np.empty_like(out)
        values = scaling.scaled(args[3], -power).reshape(v.shape)
        attend_exact(
            q, k, values, mask, rows, dtype=dtype, causal=causal, scale=scale, grouped=grouped,
            threads=threads, words=words,
        )  # fmt: skip
        scaling.fill(out, scaling.means(rows, power))
    return not control[TROUBLE]


def differentiate_exact(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    out: Array,
    weights: tuple[Array, Array],
    grad_out: Array,
    grads: list[Array],
    *,
    dtype: np.dtype[Any],
    causal: bool,
    scale: float,
    grouped: bool,
    threads: int | None,
) -> None:
    """Write the gradients to C-ordered arrays over all leading axes: of `out`, of the keys' problems.

    `out` and `weights` are what `attend_exact` wrote, in the same dtype.
    """
    jobs = plan.exact_vjp_jobs(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], None if mask is None else mask.shape[:-1],
        grouped, q.shape[-2], k.shape[-2],
    )  # fmt: skip
    g, rows = _cotangents(out, weights, rows_of(grad_out, dtype))
    queries, dim = q.shape[-2:]
    dq, dk, dv = (x.reshape(-1, x.shape[-1]) for x in grads)
    columns = plan.padded(dim, dtype.itemsize)
    sums = plan.aligned((jobs.parts, jobs.out_rows.size, jobs.rows, columns), dtype)
    args = (
        plan.exact_parameters(dtype, scale, causal),
        rows_of(q, dtype), rows_of(k, dtype), rows_of(v, dtype), g, rows, _mask_rows(mask),
        jobs.table, jobs.q_rows, jobs.out_rows, jobs.dq_rows,
        exact_vjp.Gradients(sums.reshape(-1, columns), dk, dv),
    )  # fmt: skip
    work = 4 * math.prod(out.shape[:-1]) * k.shape[-2] * dim
    workers = min(_threads(work, threads), len(jobs.table))
    space = plan.exact_vjp_workspace(dtype, dim, v.shape[-1])
    _run(exact_vjp.differentiate_exact, args, len(jobs.table), workers, space)
    for part in sums[1:]:
        sums[0] += part
    np.multiply(sums[0, :, :queries, :dim], dtype.type(scale), out=dq.reshape(-1, queries, dim))


def _cotangents(out: Array, weights: tuple[Array, Array], g: Array) -> tuple[Array, Any]:
    """Return the rows of g without NaN and infinity, and what else the kernel knows of a row.

    What is not finite in a row stands in its two numbers, which the kernel keeps from the keys that
    the row may not see.
    """
    w, tops = (array.reshape(-1) for array in weights)
    delta = np.einsum("ix,ix->i", g, out.reshape(g.shape))
    inverse = np.divide(1, w, where=w != 0, out=np.zeros_like(w))
    suspects = np.flatnonzero(~np.isfinite(delta))
    if suspects.size:
        bad = suspects[~np.isfinite(g[suspects]).all(-1)]
        g = g.copy()
        g[bad] = 0
        inverse[bad] = delta[bad] = np.nan
        inverse[w == 0] = delta[w == 0] = 0
        g.flags.writeable = False
    return g, exact_vjp.Rows(inverse, delta, tops)


def _run(
    kernel: Any, args: tuple[Any, ...], count: int, workers: int, space: plan.Workspace
) -> Array:
    """Run jobs on threads with such a workspace each; the control words."""
    arrays = plan.borrow(space, workers)
    try:
        return POOL.call(kernel, (*args, *arrays), count, workers)
    finally:
        plan.give_back(space, workers, arrays)


#: Multiply-adds below which a second thread costs more than it does (about 0.3 ms).
SERIAL = 4_000_000
