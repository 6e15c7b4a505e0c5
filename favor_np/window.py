"""Attention to the last positions only, by two folds and no subtraction.

A sequence is cut into segments as long as the window.  What a query may see is then the beginning
of its own segment up to itself, and the end of the segment before (van Herk 1992; Gil and Werman
1993). Each of the two gives a row and its denominator; their weighted mean is the result.  For
whole sequences both are causal attention within segments, the second with rows numbered downwards:
the kernel does that (``favor_np.jobs``), but for gradients rows are turned round here.  A decoder
keeps a state that grows, and states of the ends of the segment before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import Call, Cotangents, Forward, Options, StateForm, StateParts, sum_to
from favor_np.decay import set_decay
from favor_np.engine import processor
from favor_np.features import ATTENTION_KINDS, FeatureMap, checked
from favor_np.guard import Guard
from favor_np.jobs import segments

Array: TypeAlias = npt.NDArray[Any]
#: Rows of a result, and their denominators w * 2**top.
Rows: TypeAlias = tuple[Array, Array, Array]


class _Part(NamedTuple):
    """Causal attention within packs: of segments to themselves, or to the ends of those before.

    The rows of `call` are those at positions `queries` and `keys` of the whole; those of queries
    that are not `real`, if not all are, only fill packs up.
    """

    call: Call
    queries: Any
    keys: Any
    real: Array | None = None

    def places(self) -> Any:
        """Return the positions of its queries that are real."""
        return self.queries if self.real is None else self.queries[self.real]


def _at(array: Any, places: Any, axis: int) -> Any:
    """Return what an array, or None, has at positions on its last axis, or the one before it."""
    if array is None:
        return None
    if not isinstance(places, slice):
        return array.take(places, axis)
    return array[..., places, :] if axis == -2 else array[..., places]


def _part(call: Call, queries: Any, keys: Any, packs: Array, real: Array | None = None) -> _Part:
    q = _at(call.q, queries, -2)
    return _Part(
        replace(
            call,
            q=q,
            k=_at(call.k, keys, -2),
            v=_at(call.v, keys, -2),
            mask=_at(call.mask, keys, -1),
            log2_bias=_at(call.log2_bias, keys, -1),
            out_shape=(*call.out_shape[:-2], q.shape[-2], call.out_shape[-1]),
            offsets=packs,
            window=None,
        ),
        queries,
        keys,
        real,
    )


def _waves(call: Call) -> Iterator[tuple[_Part, _Part | None]]:
    """Go through the whole: some segments, and what they see of those before, at a time."""
    assert call.window is not None
    window, offsets = call.window, call.offsets
    if offsets is None:
        offsets = np.array([0, call.keys])
    back = np.arange(window - 1, 0, -1)
    for begin, end, later in segments(offsets, window):
        piece, packs = slice(begin[0], end[-1]), np.append(begin, end[-1]) - begin[0]
        own, other = _part(call, piece, piece, packs), None
        if later.any():
            begin, end = begin[later, None], end[later, None]
            queries, keys = begin + back - 1, begin - window + back
            real = (queries < end).ravel()
            packs = np.arange(len(begin) + 1) * (window - 1)
            queries = np.minimum(queries, end - 1).ravel()
            other = _part(call, queries, keys.ravel(), packs, real)
        yield own, other


def _pulled(call: Call, forward: Forward, grad: Array) -> Iterator[tuple[_Part, Forward, Array]]:
    """Go through all parts, with what is known of their rows, and their cotangents."""
    for wave in _waves(call):
        for part in wave:
            if part is None:
                continue
            rows = _at(forward.out, part.queries, -2)
            w, top = (_at(x, part.queries, -1) for x in forward.normalizers)
            of_rows = _at(grad, part.queries, -2)
            if part.real is not None:
                of_rows[..., ~part.real, :] = 0
            yield part, Forward(rows, (w, top)), of_rows


def attend_vjp(call: Call, forward: Forward, grad: Array) -> Cotangents:
    """Pull `grad` back through `attend`.

    The rows of a part have a share in the numerators and denominators of the whole: with these its
    pullback is that of causal attention.
    """
    q, k, v = (np.zeros(x.shape, call.compute) for x in (call.q, call.k, call.v))
    bias = None if call.log2_bias is None else np.zeros(call.log2_bias.shape)
    for part, of_part, of_rows in _pulled(call, forward, grad):
        found = call.engine.attend_vjp(part.call, of_part, of_rows)
        of_queries = found.q if part.real is None else found.q.compress(part.real, -2)
        q[..., part.places(), :] += of_queries
        k[..., part.keys, :] += found.k
        v[..., part.keys, :] += found.v
        if bias is not None:
            bias[..., part.keys] += found.key_bias
    return Cotangents(sum_to(q, call.q), sum_to(k, call.k), sum_to(v, call.v), bias)


def projection_vjp(
    call: Call, forward: Forward, grad: Array
) -> Iterator[tuple[Array, Array, Array]]:
    """Go through the parts' cotangents of weights and biases: see `Engine.projection_vjp`."""
    for part, of_part, of_rows in _pulled(call, forward, grad):
        yield call.engine.projection_vjp(part.call, of_part, of_rows)


@validation.own_error_state
def _joined(a: Rows, b: Rows) -> Rows:
    """Return attention to the keys of both; their own rows are used up."""
    highest = np.maximum(a[2], b[2])
    weights = [
        w * np.exp2(np.maximum(top - highest, -2000).astype(w.dtype)) for _, w, top in (a, b)
    ]
    total = weights[0] + weights[1]
    divisor = np.where(total == 0, 1, total)  # no key at all: both are zero
    rows, others = a[0], b[0]
    try:
        with np.errstate(invalid="ignore", over="raise"):  # values may be infinite
            rows *= (weights[0] / divisor)[..., None]
            others *= (weights[1] / divisor)[..., None]
            joined = rows + others
    except FloatingPointError:
        from favor_np.cpu.scaling import means

        joined = means(rows / 2 + others / 2, 1)  # only rounding makes them infinite
    return joined, total, highest


class WindowState:
    """Decoding with a window: what attention to the last `window` positions has to remember.

    The result is that of ``favor_attention(..., causal=True, window=window)`` within rounding, for
    any split of the sequence into calls.  A token costs the folding of three keys and the reading
    of two states, on average and whatever the window is; the first in ``sqrt(window)`` takes
    longer, and the first in `window` as long as that many keys.

    Memory does not grow with the sequence: for each batch and head the last `window` keys and
    values, ``window * (d + dv)`` numbers, and at most ``2 + 2 * sqrt(window)`` states of about ``M
    * (dv + 2)`` numbers of 4 bytes, or of 8 with float64.

    Threads may share a state, as an `AttentionState`: calls are made one after the other, and an
    interrupted `update` or `step` spoils it.

    Parameters
    ----------
    feature_map : FeatureMap
        Any kind but "trig".
    value_dim : int
        Length dv of a value.
    window : int
        Number of positions that a query sees, its own among them.
    batch_shape : int or tuple of int, default ()
        Leading axes of the keys and values to come; with a projection a head its last entry
        is the number of heads.
    decay : array_like of float, optional
        In (0, 1], broadcast to `batch_shape`: at every token the weight of all earlier keys
        is multiplied with it.
    dtype : {float32, float64}, optional
        Default: that of the map's projection.  All input is converted to it.

    Attributes
    ----------
    length : int
        Number of tokens seen.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type, a count is too small, `decay` is not in (0, 1], or the
        map is "trig" or has heads that `batch_shape` does not.

    See Also
    --------
    favor_attention : The same for whole sequences.
    AttentionState : Decoding without a window.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> state = favor_np.WindowState(fm, value_dim=1, window=2)
    >>> x = np.ones(4)
    >>> [state.step(x, x, [value]).item() for value in (1.0, 2.0, 4.0)]
    [1.0, 1.5, 3.0]
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        value_dim: int,
        window: int,
        batch_shape: int | tuple[int, ...] = (),
        *,
        decay: npt.ArrayLike | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        self.feature_map = checked(feature_map, ATTENTION_KINDS)
        self.value_dim, self.batch_shape, self.dtype = validation.state_arguments(
            value_dim,
            batch_shape,
            feature_map.projection.dtype if dtype is None else dtype,
            feature_map.num_heads,
        )
        self.window = validation.integer("window", window)
        self.rates = validation.decay_rates(decay, self.batch_shape)
        self.length = 0
        rows = (*self.batch_shape, self.window)
        #: The last tokens, that of position t in row ``t % window``.
        self._k = np.zeros((*rows, feature_map.dim), self.dtype)
        self._v = np.zeros((*rows, self.value_dim), self.dtype)
        self._mask = np.zeros(rows, np.bool_)
        #: By how much they are raised, and how far the first keys have faded; None where none was.
        self._log2_bias: Any = None
        self._faded: Any = None
        self._own = self._empty()
        self._forget()
        self._guard = Guard("WindowState")

    @property
    def _form(self) -> StateForm:
        """What decides how states are laid out."""
        return StateForm(self.feature_map, self.dtype, self.value_dim)

    def _empty(self) -> Any:
        return processor().new_states(self._form, math.prod(self.batch_shape))

    #: States of the last 0, r, 2 r, ... keys of the segment before, r the root of the window; and
    #: of the last ``n * r`` and 1, 2, ... more.  They are made, and filled, when they are needed.
    _wholes: Any = None
    _parts: Any = None

    def _forget(self) -> None:
        #: The n of `_parts`; -1 while no state is filled.
        self._latest = -1

    def _stack(self, count: int) -> list[tuple[Array, ...]]:
        """Return so many states of no keys."""
        each = math.prod(self.batch_shape)
        arrays = processor().new_states(self._form, count * each)
        return [tuple(a[i * each : (i + 1) * each] for a in arrays) for i in range(count)]

    @property
    def _begin(self) -> int:
        """Where the segment of the latest position begins."""
        return max(self.length - 1, 0) // self.window * self.window

    def _fold(self, call: Call, state: Any, start: int, stop: int) -> None:
        """Fold the tokens start:stop into `state`."""
        rows = np.arange(start, stop) % self.window
        bias = None if self._log2_bias is None else self._log2_bias.take(rows, -1)
        out = np.empty((*self.batch_shape, 0, self.value_dim), self.dtype)
        of = replace(
            call,
            q=self._k[..., :0, :],
            k=self._k.take(rows, -2),
            v=self._v.take(rows, -2),
            mask=self._mask.take(rows, -1),
            log2_bias=bias,
            causal=False,
            out_shape=out.shape,
        )
        call.engine.attend(of, out, state)

    def _read(self, call: Call, state: Any) -> Rows:
        none = self._k[..., :0, :], self._v[..., :0, :]
        of = replace(call, k=none[0], v=none[1], mask=None, log2_bias=None, causal=False)
        out = np.zeros(call.out_shape, self.dtype)
        w, top = call.engine.normalizers(out)
        call.engine.attend(of, out, state, (w, top))
        return out, w, top

    def _append(self, call: Call) -> None:
        """Remember the keys of a call, and fold them."""
        last, mask, log2_bias = slice(-self.window, None), call.mask, self._raised(call)
        tokens = (
            call.k[..., last, :],
            call.v[..., last, :],
            True if mask is None else mask[..., last],
            None if log2_bias is None else log2_bias[..., last],
        )
        self._remember(call, tokens, call.keys)

    def _remember(self, call: Call, tokens: tuple[Any, ...], count: int) -> None:
        """Take the last of `count` new tokens: their keys, values, mask and log2_bias."""
        new, before = min(count, self.window), self._begin
        start, self.length = self.length, self.length + count
        rows = np.arange(self.length - new, self.length) % self.window
        self._k[..., rows, :], self._v[..., rows, :], self._mask[..., rows], log2_bias = tokens
        if log2_bias is not None:
            self._log2_bias[..., rows] = log2_bias
        if self._begin > before:
            if self._log2_bias is not None:  # exponents begin at the raise of the latest key
                self._log2_bias -= self._faded[..., None]
                self._faded = np.zeros(self.batch_shape)
            self._own = self._empty()
            self._forget()
        self._fold(call, self._own, max(start, self._begin), self.length)

    def _raised(self, call: Call) -> Array | None:
        """Return by how much new keys are raised, in log2; None if none ever was."""
        if self._log2_bias is None:
            if self.rates is None and call.log2_bias is None:
                return None
            self._be_raised()
        raised: Array = np.repeat(self._faded[..., None], call.keys, -1)
        if self.rates is not None:
            rates = self.rates.reshape(*self.batch_shape, 1)
            raised += np.cumsum(np.broadcast_to(rates, raised.shape), -1)
            self._faded = raised[..., -1].copy()
        elif call.faded is not None:
            self._faded = self._faded + call.faded.reshape(self.batch_shape)
        return raised if call.log2_bias is None else raised + call.log2_bias

    def _be_raised(self) -> None:
        self._log2_bias, self._faded = np.zeros(self._mask.shape), np.zeros(self.batch_shape)

    def _before(self, call: Call) -> Any:
        """Return the state of the keys before the latest segment that its position sees."""

        def fill(states: list[Any], stop: int, step: int) -> None:
            for before, state in pairwise(states):
                for array, source in zip(state, before, strict=True):
                    array[...] = source
                self._fold(call, state, stop - step, stop)
                stop -= step

        begin, root = self._begin, math.isqrt(self.window)
        seen = min(begin, begin + self.window - self.length)
        whole, rest = divmod(seen, root)
        if self._wholes is None:
            self._wholes, self._parts = self._stack(root + 2), self._stack(root - 1)
        if self._latest < 0:
            fill(self._wholes[: whole + 1], begin, root)
        parts = [self._wholes[whole], *self._parts[:rest]]
        if self._latest != whole:
            fill(parts, begin - whole * root, 1)
            self._latest = whole
        return parts[rest]

    def _run(
        self, q: Any, k: Any, v: Any, decay: object = None, **options: Unpack[Options]
    ) -> Array:
        options["dtype"] = self.dtype
        call = processor().check(q, k, v, self.feature_map, self, **options)
        if decay is not None:
            if self.rates is not None:
                raise ValueError("decay must be that of the state, got one a token")
            set_decay(call, decay)
            if call.gates is None:
                raise ValueError(
                    f"decay must have a factor a token, of shape {(*self.batch_shape, call.keys)}, "
                    f"got shape {validation.array_of('decay', decay).shape}"
                )
        self._check_span(call)
        return self._guard.change(self._advance, call, spoils=call.keys > 0)

    def _check_span(self, call: Call) -> None:
        """Refuse keys that would fade by more, within a segment, than an exponent can say."""
        if self._faded is None or not call.keys:
            return
        more: Any = call.faded if self.rates is None else self.rates * call.keys
        span = self._faded.max(initial=0.0) + (0.0 if more is None else np.max(more, initial=0.0))
        if span > 2 * validation.LONGEST_DECAY:
            raise ValueError(
                f"decay must be larger for a window of {self.window} positions: its keys would "
                f"fade to 2**-{span:.3g}"
            )

    def _advance(self, call: Call) -> Array:
        """Append tokens, if there are any, and read; what is made for reading is kept."""
        if call.keys and math.prod(self.batch_shape):
            self._append(call)
        if not math.prod(call.out_shape):
            return np.zeros(call.out_shape, self.dtype)
        rows: Array = _joined(self._read(call, self._own), self._read(call, self._before(call)))[0]
        return rows

    def update(
        self,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        key_mask: npt.ArrayLike | None = None,
        *,
        key_bias: npt.ArrayLike | None = None,
        decay: npt.ArrayLike | None = None,
        num_threads: int | None = None,
        check_finite: bool = False,
    ) -> WindowState:
        """Append tokens, in place.

        Parameters
        ----------
        k : array_like, shape (..., L, d)
            Keys; leading axes broadcast to `batch_shape`.
        v : array_like, shape (..., L, dv)
            Values.
        key_mask : array_like of bool, shape (..., L), optional
            True where a key takes part; others count as positions all the same.
        key_bias : array_like of float, shape (..., L), optional
            As for `favor_attention`.
        decay : array_like of float, shape (..., L), optional
            One factor per token, as for `AttentionState.update`.
        num_threads : int, optional
            Default: see `thread_limit`.
        check_finite : bool, default False
            Refuse NaN and infinity, in masked keys as well, before the state is touched.

        Returns
        -------
        WindowState
            The state itself.

        Raises
        ------
        TypeError, ValueError
            As `favor_attention`; with `check_finite` a ValueError that names `k` or `v`.
        RuntimeError
            If an `update` or a `step` was interrupted, and spoiled the state.
        """
        validation.given(k=k, v=v)
        self._run(
            None,
            k,
            v,
            decay,
            key_mask=key_mask,
            key_bias=key_bias,
            num_threads=num_threads,
            check_finite=check_finite,
        )
        return self

    def attend(self, q: npt.ArrayLike, *, num_threads: int | None = None) -> Array:
        """Attend to the last `window` positions, as a query at the latest one does.

        Parameters
        ----------
        q : array_like, shape (..., L, d)
            Queries; leading axes broadcast with `batch_shape`.
        num_threads : int, optional
            Default: see `thread_limit`.

        Returns
        -------
        ndarray, shape (..., L, dv)
            In the dtype of the state.

        Raises
        ------
        TypeError, ValueError
            As `favor_attention`.
        RuntimeError
            If an `update` or a `step` was interrupted, and spoiled the state.
        """
        validation.given(q=q)
        return self._run(q, None, None, num_threads=num_threads)

    def step(
        self,
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        *,
        key_bias: npt.ArrayLike | None = None,
        decay: npt.ArrayLike | None = None,
        num_threads: int | None = None,
        check_finite: bool = False,
    ) -> Array:
        """Append one token and attend from it, in place.

        Parameters
        ----------
        q : array_like, shape (..., d) or (..., 1, d)
            The token's query.
        k : array_like, like `q`
            Its key.
        v : array_like, shape (..., dv) or (..., 1, dv)
            Its value.
        key_bias, decay : array_like of float, optional
            As for `AttentionState.step`.
        num_threads : int, optional
            Default: see `thread_limit`.
        check_finite : bool, default False
            Refuse NaN and infinity before the state is touched.

        Returns
        -------
        ndarray, shape (..., dv) or (..., 1, dv)
            In the dtype of the state.

        Raises
        ------
        TypeError, ValueError
            As `favor_attention`; with `check_finite` a ValueError that names `q`, `k` or `v`.
        RuntimeError
            If an `update` or a `step` was interrupted, and spoiled the state.
        """
        rows, flat = validation.token(q, k, v, self.batch_shape, self.feature_map.dim)
        if key_bias is not None:
            key_bias = validation.number_a_token("key_bias", key_bias, self.batch_shape)
        if decay is not None:
            decay = validation.number_a_token("decay", decay, self.batch_shape)
        out = self._run(
            *rows,
            decay,
            key_bias=key_bias,
            causal=True,
            num_threads=num_threads,
            check_finite=check_finite,
        )
        return out[..., 0, :] if flat else out

    @validation.own_error_state
    def merge(self, other: WindowState) -> WindowState:
        """Append what another state has seen, in place: its tokens come after the state's own.

        Parameters
        ----------
        other : WindowState
            Of the same map, window, dtype, `value_dim`, `batch_shape` and `decay`; it is not
            changed.

        Returns
        -------
        WindowState
            The state itself.

        Raises
        ------
        TypeError
            If `other` is no WindowState.
        ValueError
            If it differs in one of these.
        """
        if not isinstance(other, WindowState):
            raise TypeError(f"other must be a WindowState, got {validation.got(other)}")
        if other.feature_map != self.feature_map:
            raise ValueError("other must have the feature map of the state")
        for name in ("window", "dtype", "value_dim", "batch_shape"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other must have {name} {mine}, got {theirs}")
        mine, theirs = (s.rates if s.rates is not None else np.zeros(1) for s in (self, other))
        if not np.array_equal(mine, theirs):
            raise ValueError("other must have the decay of the state")
        self._guard.change(self._merge, other.copy())
        return self

    def _merge(self, other: WindowState) -> None:
        new = min(other.length, self.window)
        if not new:
            return
        rows = np.arange(other.length - new, other.length) % self.window
        log2_bias = None
        if self._log2_bias is not None or other._log2_bias is not None:
            for state in (self, other):
                if state._log2_bias is None:
                    state._be_raised()
            log2_bias = other._log2_bias.take(rows, -1) + self._faded[..., None]
            self._faded = self._faded + other._faded
        tokens = (
            other._k.take(rows, -2),
            other._v.take(rows, -2),
            other._mask.take(rows, -1),
            log2_bias,
        )
        call = processor().check(None, None, None, self.feature_map, self, dtype=self.dtype)
        self._remember(call, tokens, other.length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, as `AttentionState.save` does: whole or not at all.

        Parameters
        ----------
        path : str or os.PathLike
            The file; it is replaced if it exists.  No suffix is added.

        Raises
        ------
        TypeError, ValueError, OSError
            As `AttentionState.save`.
        """
        from favor_np import storage

        kept = self.__getstate__()
        (c, s, z), rest = kept["_own"]
        form, batch = self._form, self.batch_shape
        count = math.prod(batch)
        c, s, z = (x.reshape(*batch, *x.shape[1:]) for x in (c, s, z))
        lengths = np.full(count, kept["length"])
        parts = storage.Parts(
            form.feature_map,
            form.value_dim,
            batch,
            form.dtype.str,
            c,
            s,
            z,
            None,
            self.rates,
            lengths,
            None if rest[0] is None else rest,
        )
        tokens = {
            name: kept[name.removeprefix("window")]
            for name in storage.WINDOW
            if kept[name.removeprefix("window")] is not None
        }
        storage.write(path, parts, {"window": self.window, "length": kept["length"]}, tokens)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WindowState:
        """Read a state that `save` wrote, its feature map included; nothing in it is executed.

        Parameters
        ----------
        path : str or os.PathLike
            The file.

        Returns
        -------
        WindowState
            It continues with the same bits.

        Raises
        ------
        OSError, ValueError
            As `AttentionState.load`.
        """
        from favor_np import storage

        parts, extra, tokens = storage.read_window(path)
        state = cls(
            parts.feature_map,
            parts.value_dim,
            extra["window"],
            parts.batch_shape,
            dtype=parts.dtype,
        )
        rows = math.prod(parts.batch_shape), parts.feature_map.num_features
        sums = parts.c.reshape(rows), parts.s.reshape(*rows, -1), parts.z.reshape(rows)
        kept = {name.removeprefix("window"): array for name, array in tokens.items()}
        state.__setstate__(
            state.__getstate__()
            | kept
            | {"rates": parts.rates, "length": extra["length"], "_own": (sums, parts.rest or ())}
        )
        return state

    def copy(self) -> WindowState:
        """Return an independent copy: to continue one prefix in two ways.

        Returns
        -------
        WindowState
            It continues with the same bits.
        """
        new = WindowState.__new__(WindowState)
        new.__setstate__(self.__getstate__())
        return new

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> WindowState:
        """Copy; the feature map is immutable and shared."""
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        """Return what any machine can lay out anew; copies of what changes."""
        return self._guard.read(self._kept)

    def _kept(self) -> dict[str, Any]:
        c, s, z, *rest = processor().state_parts(self._form, self._own)
        made = ("_wholes", "_parts", "_latest", "_guard")
        kept = {name: array for name, array in vars(self).items() if name not in made}
        names = ("_k", "_v", "_mask", "_log2_bias", "_faded")
        rows = {name: kept[name].copy() for name in names if kept[name] is not None}
        return kept | rows | {"_own": ((c, s, z), tuple(rest))}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, now or when states were (c, S, z) alone."""
        vars(self).update(kept)
        sums, rest = self._own if len(self._own) == 2 else (self._own, ())
        self._own = processor().states_of(self._form, StateParts(*sums, *rest))
        self._forget()
        self._guard = Guard("WindowState")

    def __repr__(self) -> str:
        """Describe the state in one line."""
        return (
            f"<WindowState window={self.window}, batch_shape={self.batch_shape}, "
            f"value_dim={self.value_dim}, {self.dtype}, of {self.feature_map!r}>"
        )
