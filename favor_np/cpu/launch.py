"""The seam between checked calls and compiled kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.call import Call, Cotangents, ErrorBars, Forward, StateForm, sum_heads
from favor_np.cpu import memory, scaling, schedule, tuning
from favor_np.cpu.code import kernel
from favor_np.cpu.layout import (
    Layout,
    exact_parameters,
    exact_vjp_workspace,
    exact_workspace,
    vjp_workspace,
    worth_bf16x3,
    worth_bfloat16,
)
from favor_np.cpu.pairs import TILE_CONFIG
from favor_np.cpu.plain import NO_BIAS, NO_MASK, NO_NORMALIZERS
from favor_np.cpu.records import OVERFLOW, TROUBLE
from favor_np.cpu.scaling import holds_large
from favor_np.cpu.states import copy_states, empty, has_tails, layout_of, merge_states
from favor_np.cpu.threads import POOL, resolve_threads
from favor_np.cpu.tiles import CHUNK, padded
from favor_np.jobs import (
    BLOCK,
    KEYS,
    QUERIES,
    SLOT,
    WAVE,
    Jobs,
    Shapes,
    before,
    cut,
    jobs_without_rows,
    packed,
    segments,
)
from favor_np.validation import contiguous

Array: TypeAlias = npt.NDArray[Any]

_PLAIN, _PAIRS, _PARTS = frozenset[str](), frozenset(["pairs"]), frozenset(["parts"])


def state_sums(form: StateForm, arrays: Any) -> tuple[Array, Array, Array]:
    """Return copies of (c, S, z) as any machine would have them."""
    if has_tails(arrays):
        arrays = copy_states(arrays)
        fold_tails(form, arrays)
    layout = layout_of(form)
    c, s, z = arrays
    return c[:, layout.real], s[:, layout.real, : form.value_dim], z[:, layout.real]


def fold_tails(form: StateForm, arrays: Any) -> None:
    """Fold the tokens that wait in the tails of states, in place."""
    layout = layout_of(form)
    nothing = np.empty((0, form.value_dim), form.dtype)
    keys = np.empty((0, form.feature_map.dim), form.dtype)
    arrays_of_call = (
        keys,
        keys,
        nothing,
        NO_MASK,
        NO_BIAS,
        nothing,
        *NO_NORMALIZERS[form.dtype],
    )
    _Launch(layout, arrays_of_call, 1).fold_tails(arrays)


def attend(
    call: Call, out: Array, state: Any = None, normalizers: tuple[Array, Array] | None = None
) -> None:
    """Fold keys and values, into `state` if there is one, and read with queries into `out`.

    Packed sequences have a slot of the state each.  `normalizers` receive the denominators of the
    rows as (w, top), w * 2**top.
    """
    bars, dtype = call.error_bars, call.compute
    shapes, group = call.shapes(stateful=state is not None), None if bars is None else bars.group
    bfloat16 = call.bfloat16 and worth_bfloat16()
    plan = schedule.schedule(call.map, dtype, shapes, call.causal, group, bfloat16)
    jobs, longest, v = plan.jobs, plan.longest, contiguous(call.v, dtype)
    if call.offsets is not None and call.window is None:
        jobs = packed(jobs, call.offsets)
    arrays = (
        contiguous(call.q, dtype),
        contiguous(call.k, dtype),
        v,
        _mask(call),
        _log2_bias(call),
        out,
        *_flat(normalizers, dtype),
    )
    threads = _threads(plan.work * len(jobs.table), call.num_threads)
    launch = _Launch(plan.layout, arrays, threads, bars, plan)
    if call.window is not None:
        _attend_windows(launch, plan, call, normalizers)
        if launch.overflow and holds_large(v):
            _attend_scaled(call, v, out, None)
        return
    tokens = call.causal and (longest == 1 or call.offsets is not None)
    if tokens:
        tokens = bars is None and not bfloat16 and jobs.q_rows.shape[1] == 1
    # What a state has taken in cannot be taken back.  The kernel of tokens looks at them itself.
    large = state is not None and not (tokens and longest == 1) and holds_large(v)
    if not large:
        launch.attend(plan.constants, jobs, longest, state, call.causal, tokens)
        large = launch.overflow and holds_large(v)
    if large and state is not None:  # for the rows that do not overflow
        out[...] = np.nan
        launch.attend(plan.constants, jobs, longest, copy_states(state), call.causal, tokens)
    if large:
        _attend_scaled(call, v, out, state)


def _attend_windows(
    launch: _Launch, plan: schedule.Schedule, call: Call, given: tuple[Array, Array] | None
) -> None:
    """Attend within segments as long as the window, then to what is seen of those before.

    Both are causal attention; the second goes backwards, and joins its rows with the first's.
    """
    assert call.window is not None
    *inputs, out, _, _ = launch.arrays
    offsets = np.array([0, call.keys]) if call.offsets is None else call.offsets
    rows, found, jobs = out, given, plan.jobs
    # Some rows at a time, if these take less memory than the denominators of all.
    most = min(max(WAVE, call.window), call.keys)
    apart = given is None and most * out.shape[-1] < 2 * call.keys
    if found is None and not apart:
        found = normalizers(out)
    for run in segments(offsets, call.window):
        if apart:
            count = run.last - run.first
            rows = np.empty((*call.out_shape[:-2], count, out.shape[-1]), out.dtype)
            found = normalizers(rows)
            here = plan.jobs.out_rows // call.keys * count - run.first
            jobs = Jobs(plan.jobs.table, plan.jobs.q_rows, here)
        launch.arrays = (*inputs, rows, *_flat(found, out.dtype))
        own = cut(jobs, run.begin, run.end - run.begin)
        for part in (own, before(jobs, run, call.window)):
            launch.attend(plan.constants, part, call.window, None, causal=True, tokens=False)
        if apart:
            out[..., run.first : run.last, :] = rows


def _mask(call: Call) -> Array:
    return NO_MASK if call.mask is None else call.mask


def _log2_bias(call: Call) -> Array:
    return NO_BIAS if call.log2_bias is None else call.log2_bias


def _attend_scaled(call: Call, v: Array, out: Array, state: Any) -> None:
    """Fill in the rows that have overflowed, and fold into the state, by smaller values."""
    power, rows = scaling.POWER[v.itemsize], np.empty_like(out)
    form, after = StateForm(call.map, v.dtype, v.shape[-1]), None
    if state is not None:
        after = copy_states(state)
        fold_tails(form, after)
        after[1][...] = scaling.scaled(after[1], -power)
    attend(replace(call, v=scaling.scaled(v, -power), error_bars=None), rows, after)
    scaling.fill(out, scaling.means(rows, power))
    if after is not None:
        fold_tails(form, after)
        scaling.keep_in_range(after, power)
        for array, new in zip(state, after, strict=True):
            array[...] = new


def attend_vjp(call: Call, forward: Forward, grad: Array, final_state: Any = None) -> Cotangents:
    """Pull `grad`, and the cotangent of the last state, back through `attend`."""
    pulled = _pull(call, forward, grad, final_state, projection=False)
    batch, inputs = call.out_shape[:-2], (call.q, call.k, call.v)
    kept = None, *2 * [call.state_shape if call.grouped else None]
    q, k, v = (
        sum_heads(rows.reshape(*batch, *x.shape[-2:]), x, heads)
        for rows, x, heads in zip(pulled.to[:3], inputs, kept, strict=True)
    )
    bias = None
    if call.log2_bias is not None:
        rows = pulled.to.key_bias.reshape(*batch, -1, 1)
        bias = sum_heads(rows, call.log2_bias[..., None], kept[1])[..., 0]
    if pulled.states is None:
        return Cotangents(q, k, v, bias)
    # Query heads that share a state have each seen a part of its cotangent.
    count, slots = len(pulled.slots), pulled.slots
    parts = [array[:count] for array in pulled.states]
    sequences = 1 if call.offsets is None else len(call.offsets) - 1
    first = empty(pulled.layout, math.prod(call.state_shape) * sequences)
    if final_state is not None:  # without a job (an empty sequence) it is what it was
        idle = np.setdiff1d(np.arange(len(first[0])), slots)
        for array, theirs in zip(first, final_state, strict=True):
            array[idle] = theirs[idle]
    for i in range(count):
        merge_states([a[slots[i], None] for a in first], [a[i, None] for a in parts])
    return Cotangents(q, k, v, bias, first)


def projection_vjp(
    call: Call, forward: Forward, grad: Array, final_state: Any = None
) -> tuple[Array, Array, Array]:
    """Return the cotangents of weights and biases for each job, and the head of each job."""
    pulled = _pull(call, forward, grad, final_state, projection=True)
    return pulled.to.projection, pulled.to.bias, pulled.jobs.table[:, BLOCK] // pulled.layout.blocks


class _Gradients(NamedTuple):
    """Rows or, if these are not empty, for each job sums over its rows, in float64."""

    q: Array
    k: Array
    v: Array
    key_bias: Array  # none if there was no bias
    projection: Array
    bias: Array


class _Pulled(NamedTuple):
    """What the kernel of the gradient wrote, for every query head: rows, or sums of each job."""

    layout: Layout
    jobs: Jobs
    slots: Array  # of each job of one side
    to: _Gradients
    states: Any  # cotangents of states: those of the keys' sides, then those of the queries'


def _pull(
    call: Call, forward: Forward, grad: Array, final_state: Any, *, projection: bool
) -> _Pulled:
    """Run the kernel of the gradient: by the inputs or, with `projection`, by the weights."""
    q, k, v, dtype, state = call.q, call.k, call.v, call.compute, forward.state
    stateful = state is not None or final_state is not None
    layout, constants, jobs, _, work, _ = schedule.schedule(
        call.map, dtype, call.shapes(stateful=stateful), call.causal
    )
    if call.offsets is not None:
        jobs = packed(jobs, call.offsets)
    group = max(jobs.q_rows.shape[1], 1)
    slots = np.repeat(jobs.table[:, SLOT], jobs.q_rows.shape[1])
    jobs = schedule.vjp_jobs(jobs, q.shape[-2], k.shape[-2])
    count = len(jobs.table)
    heads, sums = (0, count) if projection else (math.prod(call.out_shape[:-2]), 0)
    dq, dk, dv = (np.zeros((heads * x.shape[-2], x.shape[-1]), dtype) for x in (q, k, v))
    biases = 0 if call.log2_bias is None else heads * k.shape[-2]
    to = _Gradients(
        dq,
        dk,
        dv,
        np.zeros(biases),
        memory.aligned((sums, layout.half, layout.natural.key_rows.shape[-1]), np.float64),
        memory.aligned((sums, layout.half), np.float64),
    )
    states = None
    if stateful:  # first those of the keys' sides, then those of the queries'
        states = empty(layout, count)
        jobs.table[:, SLOT] = np.arange(count)
        for mine, last, first in zip(states, final_state or states, state or states, strict=True):
            if final_state is not None:
                mine[: count // 2 : group] = last[slots[::group]]
            if state is not None:
                mine[count // 2 :] = first[slots]
    overflow = False
    if count and (forward.out.size or final_state is not None):
        workers = _threads(work * count, call.num_threads)
        space = vjp_workspace(layout, stateful=not stateful)
        arrays = (
            contiguous(q, dtype),
            contiguous(k, dtype),
            contiguous(v, dtype),
            _mask(call),
            _log2_bias(call),
            contiguous(grad, dtype),
            contiguous(forward.out, dtype),
            *_flat(forward.normalizers, dtype),
            *to,
            *(states or ()),
        )
        more = () if layout.parts is None else (*layout.parts, TILE_CONFIG)
        fields = constants, jobs.table, *layout.weights, *layout.natural, *more
        known = kernel("pull", dtype, layout.variant & {"parts"})
        overflow = bool(space.run(known, arrays, fields, count, min(workers, count))[OVERFLOW])
    pulled = _Pulled(layout, jobs, slots, to, states)
    unseen = (*(to[4:] if projection else ()), *(() if states is None else states[1:]))
    if overflow or not all(np.isfinite(x).all() for x in unseen):  # the kernel looks at rows only
        return _pull_scaled(call, forward, grad, final_state, pulled)
    return pulled


def _pull_scaled(
    call: Call, forward: Forward, grad: Array, final_state: Any, pulled: _Pulled
) -> _Pulled:
    """Fill in what has overflowed, from smaller values and cotangents."""
    v, out, g = (contiguous(x, call.compute) for x in (call.v, forward.out, grad))
    values, cotangents = scaling.power_of(v, out), scaling.power_of(g)
    both = values + cotangents
    if not both:
        return pulled
    small = _pull(
        replace(call, v=scaling.scaled(v, -values)),
        Forward(
            scaling.scaled(out, -values),
            forward.normalizers,
            scaling.scaled_states(forward.state, -values, 0),
        ),
        scaling.scaled(g, -cotangents),
        scaling.scaled_states(final_state, -cotangents, -both),
        projection=pulled.to.projection.size > 0,
    )
    powers = both, both, cotangents, both, both, both
    for mine, other, power in zip(pulled.to, small.to, powers, strict=True):
        scaling.fill(mine, scaling.scaled(other, power))
    if small.states is not None:
        scaling.keep_in_range(small.states, cotangents, both)
    return pulled._replace(states=small.states)


@dataclass(slots=True, eq=False)
class _Launch:
    """What all kernel calls of one attention call share."""

    layout: Layout
    arrays: tuple[Array, ...]  # the fields of `Attend` up to the states
    threads: int
    bars: ErrorBars | None = None
    plan: schedule.Schedule | None = None
    #: Whether something was written that is not finite, or a large token refused.
    overflow: bool = False

    def attend(
        self, constants: Array, jobs: Jobs, longest: int, state: Any, causal: bool, tokens: bool
    ) -> None:
        """Run all jobs of a call: those of one token by their own kernel, long ones in parts."""
        if tokens:
            if longest == 1:
                self.run(constants, jobs, state, tokens=True)
                return
            longer = np.count_nonzero(jobs.table[:, KEYS] > 1)  # these come first
            self.run(constants, jobs.take(slice(longer, None)), state, tokens=True)
            jobs = jobs.take(slice(longer))
        if causal and self.threads > 1:
            jobs = self.share(constants, jobs, state)
        if causal or longest <= tuning.SEGMENT_LENGTH:
            self.run(constants, jobs, state)
            return
        long = jobs.table[:, [KEYS, QUERIES]].max(1) > tuning.SEGMENT_LENGTH
        self.run(constants, jobs.take(~long), state)
        jobs = jobs.take(long)
        for first in range(0, len(jobs.table), tuning.MAX_LIVE_STATES):
            wave = jobs.take(slice(first, first + tuning.MAX_LIVE_STATES))
            slots = wave.table[:, SLOT]
            if state is None:
                totals = empty(self.layout, len(slots))
            else:
                totals = tuple(array[slots] for array in state)
                self.fold_tails(totals)
            folds, reads = schedule.segments(wave)
            self.fold(constants, folds, totals)
            self.run(constants, reads, totals)
            if state is not None and wave.table[:, KEYS].any():
                for array, total in zip(state, totals, strict=True):
                    array[slots] = total

    def run(self, constants: Array, jobs: Jobs, state: Any, *, tokens: bool = False) -> None:
        """Run jobs, or jobs of one token; without a state each begins with an empty one."""
        count = len(jobs.table)
        if not count:
            return
        layout = self.layout
        space, arrays = layout.stateful, self.arrays
        if state is not None:
            space, arrays = layout.stateless, (*arrays, *state)
        known = layout.attend_tokens if tokens else layout.attend
        if self.plan is not None and jobs is self.plan.jobs and self.bars is None:
            rest = self.plan.fixed
        else:
            rest = schedule.fixed_of(layout, constants, jobs, self._more())
        control = space.run(known, arrays, rest, count, min(self.threads, count))
        if control[OVERFLOW]:
            self.overflow = True

    def share(self, constants: Array, jobs: Jobs, state: Any) -> Jobs:
        """Run the few long causal jobs, each on all threads; return the others."""
        layout, threads = self.layout, self.threads
        few, space = schedule.shared_count(jobs, threads), layout.stateful
        if few and state is not None:
            self.fold_tails(state)
        known = kernel("attend", layout.dtype, layout.variant | {"pipeline"})
        for i in range(few):
            job = jobs.take(slice(i, i + 1))
            slot = int(job.table[0, SLOT])
            pipeline = schedule.pipeline(layout, int(job.table[0, KEYS]), threads)
            total = pipeline.states
            arrays = memory.borrow(space, threads, total + 1)
            try:
                c, s, z, room, keys = arrays
                new = empty(layout, 1) if state is None else [a[slot, None] for a in state]
                for array, mine in zip(arrays, new, strict=False):
                    array[total] = mine[0]
                more = self._more(pipeline.words, keys)
                rest = schedule.fixed_of(layout, constants, job, more)
                fields = (*self.arrays, c, s, z, room)
                if POOL.call(known, fields, rest, pipeline.count, threads)[OVERFLOW]:
                    self.overflow = True
                if state is not None:
                    after = c[pipeline.last], s[total], z[total]
                    for array, mine in zip(state, after, strict=True):
                        array[slot] = mine
            finally:
                memory.give_back(space, threads, arrays, total + 1)
        return jobs.take(slice(few, None))

    def fold_tails(self, state: Any) -> None:
        """Fold the tokens that states keep in their tails."""
        if state[0][:, self.layout.features].any():
            jobs = jobs_without_rows(len(state[0]), self.layout.rows)
            self.run(self.layout.bidirectional, jobs, state)

    def _more(self, words: Array | None = None, keys: Array | None = None) -> tuple[Any, ...]:
        """Return the fields of `Attend` of which there are variants."""
        bars, more = self.bars, self.layout.more
        error_bars = more[2:6]
        if bars is not None:
            v = self.arrays[2]
            rows = v.size // v.shape[-1] // len(bars.variances)
            numbers = np.array([bars.dof, bars.prior_dof, bars.t_factor, rows])
            variances = np.ascontiguousarray(bars.variances)
            error_bars = (bars.errors, bars.sizes, variances, numbers)
        return words, keys, *error_bars, *more[6:]

    def fold(self, constants: Array, folds: Jobs, totals: Any) -> None:
        """Fold segments into states of their own, then merge these in order into their totals."""
        for first in range(0, len(folds.table), tuning.MAX_LIVE_STATES):
            batch = folds.take(slice(first, first + tuning.MAX_LIVE_STATES))
            owners = batch.table[:, SLOT].copy()
            batch.table[:, SLOT] = np.arange(len(owners))
            parts = empty(self.layout, len(owners))
            self.run(constants, batch, parts)
            for i, owner in enumerate(owners):
                merge_states([a[owner, None] for a in totals], [a[i, None] for a in parts])


def normalizers(out: Array) -> tuple[Array, Array]:
    """Return arrays for the denominators of the rows of `out`: zeros, as of rows without keys."""
    rows = out.shape[:-1]
    return np.zeros(rows, out.dtype), np.zeros(rows, memory.integer_of(out.dtype))


def _flat(normalizers: tuple[Array, Array] | None, dtype: np.dtype[Any]) -> tuple[Array, ...]:
    """Return the denominators of rows, one after the other; none if there are none."""
    if normalizers is None:
        return NO_NORMALIZERS[dtype]
    return tuple(w.reshape(-1) for w in normalizers)


def _threads(work: int, threads: int | None) -> int:
    """Return how many threads that many multiply-adds deserve."""
    return 1 if work < tuning.MIN_PARALLEL_WORK else resolve_threads(threads)


def attend_exact(call: Call, out: Array, normalizers: tuple[Array, Array] | None = None) -> bool:
    """Write softmax attention to `out`, in its dtype; False if a logit may be too large.

    `normalizers` receive the denominators of the rows as (w, top), w * 2**top.
    """
    q, k, v, dtype = call.q, call.k, call.v, out.dtype
    table = schedule.exact_jobs(*_exact_shapes(call))
    values = contiguous(v, dtype)
    arrays = (
        contiguous(q, dtype),
        contiguous(k, dtype),
        values,
        _mask(call),
        out,
        *_flat(normalizers, dtype),
        *_factors(call, dtype),
    )
    fields: tuple[Array, ...] = (exact_parameters(dtype, call.scale, *call.band), table)
    variant = _PLAIN
    if call.bfloat16 and dtype == np.float32 and worth_bfloat16():
        variant, fields = _PAIRS, (*fields, TILE_CONFIG)
    elif worth_bf16x3(dtype, CHUNK, q.shape[-1]):
        variant, fields = _PARTS, (*fields, TILE_CONFIG)
    space = exact_workspace(dtype, q.shape[-1], v.shape[-1], variant)
    workers = _threads(_exact_work(call), call.num_threads)
    known = kernel("attend_exact", dtype, variant)
    control = space.run(known, arrays, fields, len(table), min(workers, len(table)))
    if control[OVERFLOW] and holds_large(values):
        power, rows = scaling.POWER[dtype.itemsize], np.empty_like(out)
        attend_exact(replace(call, v=scaling.scaled(values, -power)), rows)
        scaling.fill(out, scaling.means(rows, power))
    return not control[TROUBLE]


def _exact_shapes(call: Call) -> tuple[Shapes, tuple[int, ...] | None]:
    """Return what the jobs of exact attention depend on."""
    offsets = None if call.offsets is None else tuple(call.offsets.tolist())
    return call.shapes(stateful=True), offsets


def _exact_work(call: Call) -> int:
    """Return the multiply-adds of the logits."""
    keys, dim = min(call.keys, sum(call.band) + 1), int(call.q.shape[-1])
    return math.prod(call.out_shape[:-1]) * keys * dim


def _factors(call: Call, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return what the weights of keys are multiplied with, as exponents and shares of 1/2 to 1."""
    if call.log2_bias is None:
        return NO_NORMALIZERS[dtype][::-1]
    whole = np.ceil(call.log2_bias)
    shares = np.exp2((call.log2_bias - whole).astype(dtype))
    return whole.astype(memory.integer_of(dtype)).reshape(-1), shares.reshape(-1)


def exact_vjp(call: Call, forward: Forward, grad_out: Array, grads: list[Array]) -> None:
    """Write gradients over all leading axes: those of `out`, and of the keys' problems.

    `grads` are those of q, k, v and, if there is one, of the bias, in float64.
    `forward` is what `attend_exact` wrote, in the dtype of the gradients.
    """
    q, k, v, dtype = call.q, call.k, call.v, forward.out.dtype
    jobs = schedule.exact_vjp_jobs(*_exact_shapes(call))
    values, cotangents = contiguous(v, dtype), contiguous(grad_out, dtype)
    g, inverse, delta, tops = _cotangents(forward, cotangents)
    queries, dim = q.shape[-2:]
    dq, dk, dv = (x.reshape(-1, x.shape[-1]) for x in grads[:3])
    dbias = grads[3].reshape(-1) if len(grads) > 3 else np.empty(0)
    columns = padded(dim, dtype.itemsize)
    sums = memory.aligned((jobs.parts, jobs.heads, jobs.rows, columns), dtype)
    arrays = (
        contiguous(q, dtype),
        contiguous(k, dtype),
        values,
        _mask(call),
        g,
        inverse,
        delta,
        tops,
        sums.reshape(-1, columns),
        dk,
        dv,
        *_factors(call, dtype),
        dbias,
    )
    constants = exact_parameters(dtype, call.scale, *call.band)
    fields = (constants, jobs.table, jobs.q_rows, jobs.out_rows, jobs.dq_rows)
    workers = _threads(4 * _exact_work(call), call.num_threads)
    space = exact_vjp_workspace(dtype, dim, v.shape[-1])
    known = kernel("differentiate_exact", dtype)
    space.run(known, arrays, fields, len(jobs.table), min(workers, len(jobs.table)))
    for part in sums[1:]:
        sums[0] += part
    rows = sums[0, :, :queries] if call.offsets is None else sums[0].take(jobs.places, 1)
    np.multiply(rows[..., :dim], dtype.type(call.scale), out=dq.reshape(-1, queries, dim))
    by_values, by_cotangents = scaling.power_of(values), scaling.power_of(cotangents)
    both = by_values + by_cotangents
    if both and not all(np.isfinite(grad).all() for grad in grads):
        small = [np.empty_like(grad) for grad in grads]
        out, normalizers, _ = forward
        exact_vjp(
            replace(call, v=scaling.scaled(values, -by_values)),
            Forward(scaling.scaled(out, -by_values), normalizers),
            scaling.scaled(cotangents, -by_cotangents),
            small,
        )
        powers = both, both, by_cotangents, both
        for grad, other, power in zip(grads, small, powers, strict=False):
            scaling.fill(grad, scaling.scaled(other, power))


def _cotangents(forward: Forward, g: Array) -> tuple[Array, ...]:
    """Return the rows of g without NaN and infinity, and what else the kernel knows of a row.

    What is not finite in a row stands in its two numbers, which the kernel keeps from the keys that
    the row may not see.
    """
    w, tops = (array.reshape(-1) for array in forward.normalizers)
    g = g.reshape(-1, g.shape[-1])
    delta = np.einsum("ix,ix->i", g, forward.out.reshape(g.shape))
    inverse = np.divide(1, w, where=w != 0, out=np.zeros_like(w))
    suspects = np.flatnonzero(~np.isfinite(delta))
    if suspects.size:
        bad = suspects[~np.isfinite(g[suspects]).all(-1)]
        g = g.copy()
        g[bad] = 0
        inverse[bad] = delta[bad] = np.nan
        inverse[w == 0] = delta[w == 0] = 0
    return g, inverse, delta, tops
