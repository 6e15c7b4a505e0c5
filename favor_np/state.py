"""The state of attention: keys and values folded into a matrix of fixed size."""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.features import FeatureMap
from favor_np.guard import Guard

if TYPE_CHECKING:
    from favor_np.cuda.arrays import Place

Array: TypeAlias = npt.NDArray[Any]

#: Keys from which on an update works on a copy, which then costs nothing beside: an interrupted one
#: leaves the state as it was.
LONG = 1024


class AttentionState:
    """What a prefix of keys and values has left behind: (c, S, z) for each batch and head.

    ``S * 2**c = sum_j phi_k(k_j) v_j^T`` and ``z * 2**c = sum_j phi_k(k_j)``, phi_k without its
    factor ``1 / sqrt(M)``, which cancels; with decay key j of n, from 0, counts ``decay**(n - j)``
    times.  Its size does not depend on how much was folded.  Make one with `zeros`, or with
    ``favor_attention(..., return_state=True)``.

    Threads may share a state: calls that change it (`update`, `step`, `merge`) are made one after the
    other, and what reads or copies it finds it as it is between two of them.  Whoever interrupts a
    call that changes it finds it as it was or, from then on, a RuntimeError that says that it is
    spoiled; so does a signal handler that uses a state in the midst of such a call.

    Attributes
    ----------
    feature_map : FeatureMap
        The map of the features.
    value_dim : int
        Length dv of a value.
    batch_shape : tuple of int
        Leading axes of keys and values.
    dtype : dtype
        float32 or float64.
    sequences : int or None
        Number of packed sequences, each with a state of its own.
    decay : ndarray of float64, shape `batch_shape`, or None
        What the weight of a key is multiplied with at every later token.
    lengths : ndarray of int, shape `batch_shape`, with packed sequences one axis more
        Tokens folded, masked ones included.
    c : ndarray of int, shape (..., M)
        Exponents of two; far below any exponent met in practice where nothing was folded.
    S : ndarray, shape (..., M, dv)
        Values, weighted by features, over ``2**c``.
    z : ndarray, shape (..., M)
        Sums of features over ``2**c``.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> state = favor_np.AttentionState.zeros(fm, value_dim=2)
    >>> state.step(np.ones(4), np.ones(4), np.array([1.0, 2.0])).round(6)
    array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        value_dim: int,
        batch_shape: tuple[int, ...],
        dtype: np.dtype[Any],
        arrays: tuple[Array, Array, Array],
        sequences: int | None = None,
        rates: Array | None = None,
        tokens: int | Array = 0,
        place: Place | None = None,
    ) -> None:
        self.feature_map = feature_map
        self.value_dim = value_dim
        self.batch_shape = batch_shape
        self.dtype = dtype
        #: c, S, z in the layout of the kernels: one row a batch and head, features padded.
        self.arrays = arrays
        self.sequences = sequences
        #: -log2 of the decay and the tokens seen, a row each; None where nothing decays.
        self.rates = rates
        #: Tokens folded: by every row, or an array where rows may differ, which is never changed in place.
        self.tokens = tokens
        #: The CUDA device that the arrays lie on; None: in main memory.
        self.place = place
        self._guard = Guard("AttentionState")

    @classmethod
    def zeros(
        cls,
        feature_map: FeatureMap,
        value_dim: int,
        batch_shape: int | tuple[int, ...] = (),
        *,
        sequences: int | None = None,
        decay: npt.ArrayLike | None = None,
        dtype: npt.DTypeLike | None = None,
        device: Literal["cpu", "cuda"] | None = None,
    ) -> AttentionState:
        """Make the state of no keys at all.

        Parameters
        ----------
        feature_map : FeatureMap
            Any kind but "trig".
        value_dim : int
            Length dv of a value.
        batch_shape : int or tuple of int, default ()
            Leading axes of the keys and values to come; with a projection a head its last entry
            is the number of heads.
        sequences : int, optional
            For packed sequences (`cu_seqlens`): their number.  Each has a state of its own.
        decay : array_like of float, optional
            In (0, 1], broadcast to `batch_shape`: at every token the weight of all earlier keys
            is multiplied with it.
        dtype : {float32, float64}, optional
            Default: that of the map's projection; on a CUDA device float32.
        device : {"cpu", "cuda"}, optional
            "cuda": the state lies on a GPU.  It takes arrays that lie there, or NumPy's, and gives
            back arrays of the same kind; its c, S and z are copied to main memory.  No decay.

        Returns
        -------
        AttentionState
            A read of it gives zeros.

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong type, a count is negative, or the map is "trig" or has
            heads that `batch_shape` does not.
        """
        place = None
        if device is not None:
            from favor_np.cuda import arrays

            place = arrays.place(device)
        return cls._zeros(feature_map, value_dim, batch_shape, sequences, decay, dtype, place)

    @classmethod
    def _zeros(
        cls, feature_map: FeatureMap, value_dim: int, batch_shape: int | tuple[int, ...],
        sequences: int | None, decay: npt.ArrayLike | None, dtype: npt.DTypeLike | None,
        place: Place | None,
    ) -> AttentionState:  # fmt: skip
        if not isinstance(feature_map, FeatureMap):
            raise TypeError(f"feature_map must be a FeatureMap, got {validation.got(feature_map)}")
        if dtype is None:
            dtype = feature_map.projection.dtype if place is None else np.float32
        value_dim, shape, kind = validation.state_arguments(
            value_dim, batch_shape, dtype, kind=feature_map.kind, heads=feature_map.num_heads
        )
        if place is not None:
            place.refuse(decay=decay)
            if kind != np.float32:
                raise TypeError(f"dtype must be float32 on a CUDA device, got {kind}")
        if sequences is not None:
            sequences = validation.integer("sequences", sequences)
        rates = validation.decay_rates(decay, shape)
        if rates is not None and sequences is not None:
            rates = np.repeat(rates, sequences)
        launch = launcher(place)
        arrays = launch.new_state(feature_map, kind, math.prod(shape) * (sequences or 1), value_dim)
        return cls(feature_map, value_dim, shape, kind, arrays, sequences, rates, place=place)

    @property
    def lengths(self) -> Array:
        """Tokens folded, masked ones included, in the shape of the batch; a copy."""
        return self._guard.read(self._lengths).reshape(self._slots)

    def _lengths(self) -> Array:
        return np.full(len(self.arrays[0]), self.tokens, np.int64)

    @property
    def decay(self) -> Array | None:
        """What the weight of a key is multiplied with at every later token; a copy."""
        if self.rates is None:
            return None
        rates: Array = self.rates.reshape(*self.batch_shape, self.sequences or 1)[..., 0]
        return np.asarray(np.exp2(-rates))

    @property
    def _clock(self) -> Any:
        """How the kernels raise the keys to come, so that those before them decay."""
        if self.rates is None:
            return None
        from favor_np.cpu.launch import Clock

        return Clock(self._raised()[1], self.rates)

    def _raised(self) -> Any:
        """By how much a key folded now is raised, given decay: the whole part and the fraction."""
        assert self.rates is not None
        return np.divmod(self.tokens * self.rates, 1.0)

    def _advance(self, tokens: int | Array) -> None:
        """Count tokens that were folded; with decay, keep the exponents near zero.

        Key j is raised by ``j * rate``; the integer part of what the last one had is taken off again
        here, and the fraction is left to `_clock`.
        """
        if self.rates is None:
            self.tokens = self.tokens + tokens
            return
        from favor_np.cpu import plan

        before, _ = self._raised()
        self.tokens = self.tokens + tokens
        ahead = self._raised()[0] - before
        c = self.arrays[0]
        layout = plan.layout(self.feature_map, self.dtype, self.value_dim)
        rows: Any = slice(layout.features)
        if self.feature_map.kind == "positive":  # padding is out of reach, and stays there
            rows = layout.real
        # What is below all that a key can reach stays there, its features side by side.
        within = np.minimum(ahead, np.maximum(c[:, rows].min(1) + validation.LONGEST_DECAY, 0))
        c[:, rows] -= within[:, None].astype(c.dtype)

    def _real(self) -> tuple[Array, Array, Array]:
        """Return copies of c, S and z in C order, without the kernels' padding, with the batch axes."""
        c, s, z = launcher(self.place).without_padding(
            self.feature_map, self.dtype, self.value_dim, self.arrays
        )
        lead = self._slots
        c, s, z = (np.ascontiguousarray(x).reshape(*lead, *x.shape[1:]) for x in (c, s, z))
        return c, s, z

    @property
    def _slots(self) -> tuple[int, ...]:
        """The leading axes of c, S and z: with packed sequences one more than `batch_shape`."""
        return (*self.batch_shape, *(() if self.sequences is None else (self.sequences,)))

    def _now(self, array: Array) -> Array:
        """Return an array of the state without the fraction by which the last token was raised."""
        if self.rates is not None:
            fraction = np.exp2(-self._raised()[1]).astype(array.dtype)
            lead = self._slots
            array = array * fraction.reshape(*lead, *[1] * (array.ndim - len(lead)))
        return array

    @property
    def c(self) -> Array:
        """Exponents of two, integers of shape (..., M); a copy."""
        return self._guard.read(self._real)[0]

    @property
    def S(self) -> Array:
        """Values weighted by features over 2**c, shape (..., M, dv); a copy."""
        return self._guard.read(lambda: self._now(self._real()[1]))

    @property
    def z(self) -> Array:
        """Sums of features over 2**c, shape (..., M); a copy."""
        return self._guard.read(lambda: self._now(self._real()[2]))

    def same_map(self, feature_map: FeatureMap) -> None:
        """Refuse another feature map than the state's own."""
        if feature_map != self.feature_map:
            raise ValueError(
                f"the state belongs to another feature map: it has {self.feature_map!r}, "
                f"got {feature_map!r}"
            )

    def update(
        self,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        key_mask: npt.ArrayLike | None = None,
        *,
        cu_seqlens: npt.ArrayLike | None = None,
        num_threads: int | None = None,
        check_finite: bool = False,
    ) -> AttentionState:
        """Fold keys and values into the state, in place.

        Parameters
        ----------
        k : array_like, shape (..., L, d)
            Keys; leading axes broadcast to `batch_shape`.  All input is converted to `dtype`.
        v : array_like, shape (..., L, dv)
            Values.
        key_mask : array_like of bool, shape (..., L), optional
            True where a key takes part.
        cu_seqlens : array_like of int, shape (sequences + 1,), optional
            Where the rows of each packed sequence begin; for states with `sequences`.
        num_threads : int, optional
            Default: see `thread_limit`.
        check_finite : bool, default False
            Refuse NaN and infinity, in masked keys as well, before the state is touched: one such
            key stays in it for ever.  For the CPU only.

        Returns
        -------
        AttentionState
            The state itself.

        Raises
        ------
        TypeError, ValueError
            As `favor_attention`; with `check_finite` a ValueError that names `k` or `v`.
        RuntimeError
            If a call that changed the state was interrupted, and spoiled it.
        """
        validation.given(k=k, v=v)
        self._run(
            None,
            k,
            v,
            key_mask,
            cu_seqlens,
            causal=False,
            threads=num_threads,
            check_finite=check_finite,
        )
        return self

    def attend(
        self,
        q: npt.ArrayLike,
        *,
        cu_seqlens: npt.ArrayLike | None = None,
        num_threads: int | None = None,
    ) -> Array:
        """Read the state: attention of `q` to all keys folded so far.

        Parameters
        ----------
        q : array_like, shape (..., L, d)
            Queries; leading axes broadcast with `batch_shape`.
        cu_seqlens : array_like of int, shape (sequences + 1,), optional
            Where the rows of each packed sequence begin; for states with `sequences`.
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
            If a call that changed the state was interrupted, and spoiled it.
        """
        validation.given(q=q)
        return self._run(q, None, None, None, cu_seqlens, causal=False, threads=num_threads)

    def step(
        self,
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        *,
        num_threads: int | None = None,
        check_finite: bool = False,
    ) -> Array:
        """Append one token and attend from it, in place: O(M (d + dv)), whatever came before.

        Parameters
        ----------
        q : array_like, shape (..., d) or (..., 1, d)
            The token's query.  For a state with `sequences`: (..., sequences, d), one token of
            each.
        k : array_like, like `q`
            Its key.
        v : array_like, shape (..., dv) or (..., 1, dv)
            Its value.
        num_threads : int, optional
            Default: see `thread_limit`.
        check_finite : bool, default False
            Refuse NaN and infinity before the state is touched: one such key stays in it for ever.
            For the CPU only.

        Returns
        -------
        ndarray, shape (..., dv) or (..., 1, dv)
            In the dtype of the state.

        Raises
        ------
        TypeError, ValueError
            As `favor_attention`; with `check_finite` a ValueError that names `q`, `k` or `v`.
        RuntimeError
            If a call that changed the state was interrupted, and spoiled it.
        """
        if self.place is not None:
            return self._step_there(q, k, v, check_finite)
        if self.sequences is None:
            rows, flat = validation.token(q, k, v, self.batch_shape, self.feature_map.dim)
            out = self._run(
                *rows, None, None, causal=True, threads=num_threads, check_finite=check_finite
            )
            return out[..., 0, :] if flat else out
        q, k, v = (validation.tensor(n, a, 1) for n, a in (("q", q), ("k", k), ("v", v)))
        if q.ndim < 2 or q.shape[-2] != self.sequences:
            raise ValueError(
                f"q must be one token of each of the {self.sequences} sequences, got shape {q.shape}"
            )
        ends = np.arange(self.sequences + 1)
        return self._run(
            q, k, v, None, ends, causal=True, threads=num_threads, check_finite=check_finite
        )

    def _step_there(self, q: Any, k: Any, v: Any, check_finite: object) -> Array:
        """Append one token on a device."""
        where, arrays = self._taken(q=q, k=k, v=v)
        lead, ends = arrays[0].shape[:-1], None
        if self.sequences is not None:
            ends = np.arange(self.sequences + 1)
        elif len(lead) == len(self.batch_shape):
            arrays = [x.reshape(*x.shape[:-1], 1, x.shape[-1]) for x in arrays]
        q, k, v = arrays
        out: Array = self._run(
            q, k, v, None, ends, causal=True, threads=None, check_finite=check_finite, where=where
        )
        return out.reshape(*lead, self.value_dim)

    def _fits(self, offsets: Array | None, decay: object = None, *, causal: bool = True) -> None:
        """Refuse rows that are packed otherwise than this state, or decay otherwise."""
        found = None if offsets is None else len(offsets) - 1
        if found != self.sequences:
            raise ValueError(
                f"cu_seqlens must be that of the state: it has sequences={self.sequences}, "
                f"got {found}"
            )
        if self.rates is not None and not causal:
            raise ValueError("a state with decay needs causal=True, or its own update and attend")
        if decay is not None:
            rates = validation.decay_rates(decay, self.batch_shape)
            if rates is not None:
                rates = np.repeat(rates, self.sequences or 1)
            if not _same(rates, self.rates):
                raise ValueError(f"decay must be that of the state, {self.decay}, got {decay}")

    def _run(
        self, q: Any, k: Any, v: Any, mask: Any, cu_seqlens: Any, *, causal: bool,
        threads: int | None, check_finite: object = False, where: Place | None = None,
    ) -> Array:  # fmt: skip
        """Fold keys and read with queries, None being none of them."""
        if self.place is not None and where is None:
            where, (q, k, v, mask) = self._taken(q=q, k=k, v=v, key_mask=mask)
        if q is None or k is None:
            none = functools.partial(np.empty, dtype=self.dtype)
            if where is not None and where.kind != "numpy":
                none = functools.partial(where.launch.empty, dtype=(k if q is None else q).dtype)
            shape, dim = (*self.batch_shape, 0), self.feature_map.dim
            q = none((*shape, dim)) if q is None else q
            if k is None:
                k, v = none((*shape, dim)), none((*shape, self.value_dim))
        check = validation.attention_call if where is None else where.attention_call
        call = check(
            q, k, v, key_mask=mask, causal=causal, grouped=False, check_finite=False,
            num_threads=threads, dim=self.feature_map.dim, heads=self.feature_map.num_heads,
            state_shape=self.batch_shape, value_dim=self.value_dim,
        )  # fmt: skip
        offsets = None
        if cu_seqlens is not None:
            rows = max(call.keys, call.q.shape[-2])
            offsets = validation.sequence_offsets(cu_seqlens, rows)
        if offsets is not None or self.sequences is not None:
            self._fits(offsets)
        if self.rates is not None:
            validation.decay_span(self.rates, call.keys)
        if check_finite is not False:
            if where is not None:
                where.refuse(check_finite=check_finite)
            validation.finite_as(self.dtype, check_finite, q=call.q, k=call.k, v=call.v)
        out: Array
        keys, given = call.k.shape[-2], (call, offsets, where)
        if 0 < keys < LONG:
            out = self._guard.change(self._attend, given)
        elif keys:
            out = self._guard.change(self._fold_copy, given, spoils=False)
        else:
            if self._has_tail():
                self._guard.change(lambda state: state._without_tail(), self)
            out = self._guard.read(self._attend, given, shared=True)
        if where is not None:
            out = where.give(out, call.result)
        return out

    def _attend(self, given: tuple[Any, Array | None, Place | None]) -> Any:
        """Fold and read what was checked."""
        call, offsets, where = given
        keys, launch = call.k.shape[-2], _launch() if where is None else where.launch
        out = np.zeros(call.out_shape, self.dtype) if where is None else where.room(call)
        arrays = self.arrays
        if (
            not keys and self._has_tail()
        ):  # a token came since `_run` looked: what only reads changes nothing
            arrays = self._copy()._without_tail().arrays
        if len(self.arrays[0]) and (out.size or keys):
            launch.attend(
                self.feature_map, call.q, call.k, call.v, call.mask, out,
                dtype=self.dtype, causal=call.causal, grouped=False, state=arrays,
                state_shape=self.batch_shape, threads=call.threads, offsets=offsets,
                clock=None if self.rates is None else self._clock,
            )  # fmt: skip
        if keys and offsets is None and self.rates is None:  # a token: sooner than by `_count`
            self.tokens = self.tokens + keys
        else:
            self._count(keys, offsets)
        return out

    def _fold_copy(self, given: tuple[Any, Array | None, Place | None]) -> Any:
        after = self._copy()
        out = after._attend(given)
        # One step, so that no interrupt comes between the two.
        vars(self).update(arrays=after.arrays, tokens=after.tokens)
        return out

    def _taken(self, **arrays: Any) -> tuple[Place, list[Any]]:
        """Return where arrays for this state, which lies on a device, are; and them, as views."""
        from favor_np.cuda.arrays import place

        where = place("cuda", **arrays)
        assert where is not None
        assert self.place is not None
        if where.device != self.place.device:
            raise ValueError(
                f"the state lies on CUDA device {self.place.device.number}, but the current device is "
                f"{where.device.number}"
            )
        views = where.views(**arrays)
        if where.kind == "numpy":
            views = [None if x is None else validation.tensor(n, x, 1) if n != "key_mask" else x
                     for n, x in zip(arrays, views, strict=True)]  # fmt: skip
        return where, views

    def _count(self, keys: int, offsets: Array | None) -> None:
        """Note that so many keys were folded, or those of packed sequences."""
        if keys and offsets is not None:
            self._advance(np.tile(np.diff(offsets), math.prod(self.batch_shape)))
        elif keys:
            self._advance(keys)

    @validation.own_error_state
    def merge(self, other: AttentionState) -> AttentionState:
        """Add what another state has seen, in place: the fold of both sets of keys.

        Associative and, without decay, commutative (within rounding).  With decay the other's
        tokens come after the state's own.

        Parameters
        ----------
        other : AttentionState
            Of the same map, dtype, `value_dim` and `batch_shape`; it is not changed.

        Returns
        -------
        AttentionState
            The state itself.

        Raises
        ------
        TypeError
            If `other` is not a state, or of another dtype.
        ValueError
            If it has another map or shape.
        """
        if not isinstance(other, AttentionState):
            raise TypeError(f"other must be an AttentionState, got {validation.got(other)}")
        self.same_map(other.feature_map)
        if other.dtype != self.dtype:
            raise TypeError(f"other must have dtype {self.dtype}, got {other.dtype}")
        mine, theirs = ((s.batch_shape, s.value_dim, s.sequences) for s in (self, other))
        if mine != theirs:
            raise ValueError(
                f"other must have (batch_shape, value_dim, sequences) {mine}, got {theirs}"
            )
        if not _same(self.rates, other.rates):
            raise ValueError(f"other must have decay {self.decay}, got {other.decay}")
        if (self.place is None) != (other.place is None):
            raise TypeError("other must lie where the state does: in main memory, or on the device")
        self._guard.change(self._merge, other.copy())
        return self

    def _has_tail(self) -> bool:
        """Whether tokens wait to be folded: see ``kernels.state``."""
        return self.place is None and bool(self.arrays[0][:, -_launch().PAD].any())

    def _without_tail(self) -> AttentionState:
        """Fold the tokens that wait, in place."""
        if self._has_tail():
            _launch().without_tail(self.feature_map, self.dtype, self.value_dim, self.arrays)
        return self

    def _merge(self, other: AttentionState) -> None:
        launch = launcher(self.place)
        self._without_tail()
        arrays = other._without_tail().arrays
        if self.rates is not None:
            from favor_np.cpu.kernels.state import PAD

            before, fraction = self._raised()
            before, arrays = before + other._raised()[0], launch.raised(arrays, fraction)
            self._advance(other.tokens)
            # The sum of the integer parts may be one short of the integer part of the sum.
            short = self._raised()[0] - before
            arrays[0][:, :-PAD] -= short[:, None].astype(arrays[0].dtype)
        else:
            self._advance(other.tokens)
        launch.merge(self.arrays, arrays)

    def copy(self) -> AttentionState:
        """Return an independent copy: to continue one prefix in two ways."""
        return self._guard.read(self._copy)

    def _copy(self) -> AttentionState:
        return AttentionState(
            self.feature_map,
            self.value_dim,
            self.batch_shape,
            self.dtype,
            launcher(self.place).copied(self.arrays),
            self.sequences,
            self.rates,
            self.tokens,
            self.place,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, from which `load` continues with the same bits.

        The file is an npz archive without pickled objects.  It appears whole or not at all: if
        writing fails, or the machine does, `path` holds what it held before.

        Parameters
        ----------
        path : str or os.PathLike
            The file; it is replaced if it exists.  No suffix is added.

        Raises
        ------
        TypeError
            If `path` is no path.
        ValueError
            If `path` is a directory, a device or a pipe.
        OSError
            If the file cannot be written.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from favor_np import AttentionState, feature_map
        >>> state = AttentionState.zeros(feature_map("positive", 4, 64), value_dim=2)
        >>> x = np.ones((3, 4), np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state.update(x, x[:, :2]).save(Path(folder, "prefix.state"))
        ...     loaded = AttentionState.load(Path(folder, "prefix.state"))
        >>> np.array_equal(loaded.attend(x), state.attend(x))
        True
        """
        from favor_np import storage

        storage.write(path, storage.Parts(*self.__reduce__()[1]))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionState:
        """Read a state that `save` wrote, its feature map included.

        A file can come from any machine, and from anyone: nothing in it is executed.

        Parameters
        ----------
        path : str or os.PathLike
            The file.

        Returns
        -------
        AttentionState
            What it is given next, it answers with the same bits as the state that was saved.

        Raises
        ------
        OSError
            If the file cannot be opened or read; FileNotFoundError and PermissionError are such.
        ValueError
            If it is damaged, not the file of a state, or of a newer version of favor_np.

        Examples
        --------
        See `save`.
        """
        from favor_np import storage

        parts, _ = storage.read(path)
        return _restore(*parts)

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> AttentionState:
        """Copy; the feature map is immutable and shared."""
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what any machine can lay out anew."""
        args = (self.feature_map, self.value_dim, self.batch_shape, self.dtype.str)

        def content() -> tuple[Any, ...]:
            if self.place is not None:
                return *self._real(), self._lengths(), None
            how = self.feature_map, self.dtype, self.value_dim
            raw, rest = launcher(None).all_parts(*how, self.arrays)
            return (
                *(x.reshape(*self._slots, *x.shape[1:]) for x in raw),
                self._lengths(),
                tuple(rest),
            )

        c, s, z, lengths, rest = self._guard.read(content)
        return _restore, (*args, c, s, z, self.sequences, self.rates, lengths, rest)

    def __repr__(self) -> str:
        """Describe the state in one line."""
        return (
            f"<AttentionState batch_shape={self.batch_shape}, value_dim={self.value_dim}, "
            f"{self.dtype}, of {self.feature_map!r}>"
        )


def launcher(place: Place | None) -> Any:
    """Return what launches kernels: `favor_np.cpu.launch`, or its twin on a device."""
    return _launch() if place is None else place.launch


@functools.cache
def _launch() -> Any:
    """Load Numba, with the first call."""
    from favor_np.cpu import launch

    return launch


def _restore(
    feature_map: FeatureMap, value_dim: int, batch_shape: tuple[int, ...], dtype: str,
    c: Array, s: Array, z: Array, sequences: int | None, rates: Array | None, lengths: Array,
    rest: tuple[Array, ...] | None = None,
) -> AttentionState:  # fmt: skip
    from favor_np.cpu import launch

    count, features = math.prod(batch_shape) * (sequences or 1), feature_map.num_features
    raw = (
        c.reshape(count, features),
        s.reshape(count, features, value_dim),
        z.reshape(count, features),
    )
    kind = np.dtype(dtype)
    more = None if rest is None else launch.Rest(*rest)
    arrays = launch.with_padding(feature_map, kind, value_dim, raw, more)
    return AttentionState(
        feature_map, value_dim, batch_shape, kind, arrays, sequences, rates, np.ravel(lengths)
    )


def _same(a: Array | None, b: Array | None) -> bool:
    """Whether two decays are one, but for the rounding of ``log2(2**rate)``."""
    if a is None or b is None:
        return a is b
    return np.allclose(a, b, rtol=1e-14, atol=1e-15)
