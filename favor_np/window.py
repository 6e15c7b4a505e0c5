"""Attention to the last positions only, by two folds and no subtraction.

A sequence is cut into segments as long as the window.  What a query may see is then the beginning
of its own segment up to itself, and the end of the segment before (van Herk 1992; Gil and Werman
1993). Each of the two gives a row and its denominator; their weighted mean is the result.  For
whole sequences both are causal attention within segments, the second with the rows turned round; a
decoder keeps a state that grows, and states of the ends of the segment before.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import (
    Call,
    DecayOffsets,
    Options,
    StateForm,
    StateParts,
    decay_offsets,
)
from favor_np.engine import processor
from favor_np.features import ATTENTION_KINDS, FeatureMap, checked
from favor_np.guard import Guard

Array: TypeAlias = npt.NDArray[Any]
#: Rows of a result, and their denominators w * 2**top.
Rows: TypeAlias = tuple[Array, Array, Array]
#: Queries, keys, values, and mask.
Part: TypeAlias = tuple[Array, Array, Array, Array | None]

#: Positions that are computed at a time, or one segment: as much extra memory.
WAVE = 16_384


def attend(call: Call, out: Array) -> None:
    """Write causal attention to the last `window` positions to the C-ordered `out`, in pieces."""
    assert call.window is not None
    window, offsets = call.window, call.offsets

    def run(part: Part, packs: Array, back: bool) -> Rows:
        """Attend causally within `packs`, whose rows are turned round or not."""
        q, k, v, mask = part
        shape = (*call.out_shape[:-2], q.shape[-2], call.out_shape[-1])
        decay = decay_offsets(call.decay_rates, len(packs) - 1)
        if back and decay is not None:  # by the distance to the beginning of the queries' segment
            decay = DecayOffsets(-decay.rate, -decay.rate)
        of = replace(call, q=q, k=k, v=v, mask=mask, out_shape=shape, offsets=packs, decay=decay)
        out = np.empty(shape, call.compute)
        w, top = call.engine.normalizers(out)
        call.engine.attend(of, out, normalizers=(w, top))
        return out, w, top

    def turned(queries: Array, keys: Array) -> Part:
        q, k, v = call.q.take(queries, -2), call.k.take(keys, -2), call.v.take(keys, -2)
        return q, k, v, None if call.mask is None else call.mask.take(keys, -1)

    if offsets is None:
        offsets = np.array([0, call.keys])
    firsts = np.cumsum([0, *-(-np.diff(offsets) // window)])  # segments before each sequence
    step, back = max(1, WAVE // max(window, 8)), np.arange(window - 1, 0, -1)
    for first in range(0, firsts[-1], step):
        segment = np.arange(first, min(first + step, firsts[-1]))
        owner = np.searchsorted(firsts, segment, side="right") - 1
        begin = offsets[owner] + (segment - firsts[owner]) * window
        end = np.minimum(begin + window, offsets[owner + 1])
        piece = slice(begin[0], end[-1])
        q, k, v = (x[..., piece, :] for x in (call.q, call.k, call.v))
        mask = None if call.mask is None else call.mask[..., piece]
        rows, w, top = run((q, k, v, mask), np.append(begin, end[-1]) - begin[0], False)
        later = (segment > firsts[owner]) & (window > 1)  # those with a segment before them
        if later.any():
            begin, end = begin[later, None], end[later, None]
            queries, keys = begin + back - 1, begin - window + back
            real = (queries < end).ravel()
            packs = np.arange(len(begin) + 1) * (window - 1)
            other, other_w, other_top = run(
                turned(np.minimum(queries, end - 1).ravel(), keys.ravel()), packs, True
            )
            at = queries.ravel()[real] - piece.start
            rows[..., at, :] = _joined(
                (rows.take(at, -2), w.take(at, -1), top.take(at, -1)),
                (
                    other.compress(real, -2),
                    other_w.compress(real, -1),
                    other_top.compress(real, -1),
                ),
            )
        out[..., piece, :] = rows


@validation.own_error_state
def _joined(a: Rows, b: Rows) -> Array:
    """Return the rows of attention to the keys of both; their own are used up."""
    highest = np.maximum(a[2], b[2])
    weights = [
        w * np.exp2(np.maximum(top - highest, -2000).astype(w.dtype)) for _, w, top in (a, b)
    ]
    total = weights[0] + weights[1]
    total[total == 0] = 1  # no key at all: both are zero
    rows, others = a[0], b[0]
    try:
        with np.errstate(invalid="ignore", over="raise"):  # values may be infinite
            rows *= (weights[0] / total)[..., None]
            others *= (weights[1] / total)[..., None]
            joined: Array = rows + others
    except FloatingPointError:
        from favor_np.cpu.scaling import means

        joined = means(rows / 2 + others / 2, 1)  # only rounding makes them infinite
    return joined


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
        self._own = self._empty()
        self._forget()
        self._guard = Guard("WindowState")

    @property
    def _form(self) -> StateForm:
        """What decides how states are laid out."""
        return StateForm(self.feature_map, self.dtype, self.value_dim)

    def _empty(self) -> Any:
        return processor().new_states(self._form, math.prod(self.batch_shape))

    def _forget(self) -> None:
        #: States of the last 0, r, 2 r, ... keys of the segment before, r the root of the window,
        #: and, beside their number n, of the last ``n * r`` and 0, 1, 2, ... more; made when they
        #: are needed.
        self._wholes: list[Any] = []
        self._parts: tuple[int, list[Any]] = (-1, [])

    @property
    def _begin(self) -> int:
        """Where the segment of the latest position begins."""
        return max(self.length - 1, 0) // self.window * self.window

    def _fold(self, call: Call, state: Any, start: int, stop: int) -> None:
        """Fold the tokens start:stop into `state`.

        They are raised by their distance to the beginning of the latest segment.
        """
        rows = np.arange(start, stop) % self.window
        decay = None
        if self.rates is not None:
            decay = DecayOffsets((start - self._begin) * self.rates, self.rates)
        out = np.empty((*self.batch_shape, 0, self.value_dim), self.dtype)
        of = replace(
            call, q=self._k[..., :0, :], k=self._k.take(rows, -2), v=self._v.take(rows, -2),
            mask=self._mask.take(rows, -1), causal=False, out_shape=out.shape, decay=decay,
        )  # fmt: skip
        call.engine.attend(of, out, state)

    def _read(self, call: Call, state: Any) -> Rows:
        of = replace(call, k=self._k[..., :0, :], v=self._v[..., :0, :], mask=None, causal=False)
        out = np.zeros(call.out_shape, self.dtype)
        w, top = call.engine.normalizers(out)
        call.engine.attend(of, out, state, (w, top))
        return out, w, top

    def _append(self, call: Call) -> None:
        new, before = min(call.keys, self.window), self._begin
        start, self.length = self.length, self.length + call.keys
        rows, last = np.arange(self.length - new, self.length) % self.window, call.keys - new
        self._k[..., rows, :] = call.k[..., last:, :]
        self._v[..., rows, :] = call.v[..., last:, :]
        self._mask[..., rows] = True if call.mask is None else call.mask[..., last:]
        if self._begin > before:
            self._own = self._empty()
            self._forget()
        self._fold(call, self._own, max(start, self._begin), self.length)

    def _before(self, call: Call) -> Any:
        """Return the state of the keys before the latest segment that its position sees."""

        def backwards(state: Any, stop: int, step: int, count: int) -> list[Any]:
            states = [state]
            for end in range(stop, stop - step * count, -step):
                state = call.engine.copy_states(state)
                self._fold(call, state, end - step, end)
                states.append(state)
            return states

        begin, root = self._begin, math.isqrt(self.window)
        seen = min(begin, begin + self.window - self.length)
        whole, rest = divmod(seen, root)
        if not self._wholes:
            self._wholes = backwards(self._empty(), begin, root, whole)
        if self._parts[0] != whole:
            start = begin - whole * root
            self._parts = whole, backwards(self._wholes[whole], start, 1, rest)
        return self._parts[1][rest]

    def _run(self, q: Any, k: Any, v: Any, **options: Unpack[Options]) -> Array:
        options["dtype"] = self.dtype
        call = processor().check(q, k, v, self.feature_map, self, **options)
        return self._guard.change(self._advance, call, spoils=call.keys > 0)

    def _advance(self, call: Call) -> Array:
        """Append tokens, if there are any, and read; what is made for reading is kept."""
        if call.keys and math.prod(self.batch_shape):
            self._append(call)
        if not math.prod(call.out_shape):
            return np.zeros(call.out_shape, self.dtype)
        return _joined(self._read(call, self._own), self._read(call, self._before(call)))

    def update(
        self,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        key_mask: npt.ArrayLike | None = None,
        *,
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
        self._run(None, k, v, key_mask=key_mask, num_threads=num_threads, check_finite=check_finite)
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
        out = self._run(*rows, causal=True, num_threads=num_threads, check_finite=check_finite)
        return out[..., 0, :] if flat else out

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
        kept = {n: a for n, a in vars(self).items() if n not in ("_wholes", "_parts", "_guard")}
        rows = {name: kept[name].copy() for name in ("_k", "_v", "_mask")}
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
