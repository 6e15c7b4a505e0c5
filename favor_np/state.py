"""The state of attention: keys and values folded into a matrix of fixed size."""

from __future__ import annotations

import math
import os
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import Call, StateForm, StateParts
from favor_np.decay import Fade, raise_by, set_decay
from favor_np.engine import Engine, engine_for, processor
from favor_np.features import ATTENTION_KINDS, FeatureMap, checked
from favor_np.guard import Guard

Array: TypeAlias = npt.NDArray[Any]

#: Keys from which on an update works on a copy, which then costs nothing beside: an interrupted one
#: leaves the state as it was.
LONG = 1024


class AttentionState:
    """What a prefix of keys and values has left behind: (c, S, z) for each batch and head.

    ``S * 2**c = sum_j phi_k(k_j) v_j^T`` and ``z * 2**c = sum_j phi_k(k_j)``, phi_k without its
    factor ``1 / sqrt(M)``, which cancels; with decay key j of n, from 0, counts ``decay**(n - j)``
    times.  Its size does not depend on how much was folded.  A new one has seen no keys, and a read
    of it gives zeros; ``favor_attention(..., return_state=True)`` returns one as well.

    Threads may share a state: calls that change it (`update`, `step`, `merge`) are made one after
    the other, and what reads or copies it finds it as it is between two of them, and goes before
    those that come later.  Whoever interrupts a call that changes it finds it as it was or, from
    then on, a RuntimeError that says that it is spoiled; so does a signal handler that uses a state
    in the midst of such a call.

    Parameters
    ----------
    feature_map : FeatureMap
        Any kind but "trig".
    value_dim : int
        Length dv of a value.
    batch_shape : int or tuple of int, default ()
        Leading axes of the keys and values to come; with a projection a head its last entry is the
        number of heads.
    sequences : int, optional
        For packed sequences (`cu_seqlens`): their number.  Each has a state of its own.
    decay : array_like of float, optional
        In (0, 1], broadcast to `batch_shape`: at every token the weight of all earlier keys is
        multiplied with it.
    dtype : {float32, float64}, optional
        Default: that of the map's projection; on a CUDA device float32.
    device : {"cpu", "cuda"}, optional
        "cuda": the state lies on a GPU.  It takes arrays that lie there, or NumPy's, and gives back
        arrays of the same kind; its c, S and z are copied to main memory.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type, a count is negative, or the map is "trig" or has heads
        that `batch_shape` does not.

    Attributes
    ----------
    feature_map, value_dim, batch_shape, dtype, sequences
        As given, `batch_shape` a tuple.
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
    nbytes : int
        Bytes that it takes.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> state = favor_np.AttentionState(fm, value_dim=2)
    >>> state.step(np.ones(4), np.ones(4), np.array([1.0, 2.0])).round(6)
    array([1., 2.], dtype=float32)
    """

    #: -log2 of the decay, a row each; None where nothing decays.
    _rates: Array | None
    #: How far factors of a token each have made the first keys fade; None where there were none.
    _fade: Fade | None
    #: Tokens folded: by every row, or an array where rows may differ, which is never changed in
    #: place.
    _tokens: int | Array
    #: The plan of the last plain token: see `cpu.plain`.
    _plan: Any

    def __init__(
        self,
        feature_map: FeatureMap,
        value_dim: int,
        batch_shape: int | tuple[int, ...] = (),
        *,
        sequences: int | None = None,
        decay: npt.ArrayLike | None = None,
        dtype: npt.DTypeLike | None = None,
        device: Literal["cpu", "cuda"] | None = None,
    ) -> None:
        engine = engine_for(device)
        fm = checked(feature_map, ATTENTION_KINDS)
        if dtype is None:
            dtype = fm.projection.dtype if engine.dtype is None else engine.dtype
        value_dim, batch_shape, kind = validation.state_arguments(
            value_dim, batch_shape, dtype, fm.num_heads
        )
        if engine.dtype not in (None, kind):
            raise TypeError(f"dtype must be {engine.dtype} {engine.home}, got {kind}")
        if sequences is not None:
            sequences = validation.integer("sequences", sequences)
        rates = validation.decay_rates(decay, batch_shape)
        if rates is not None:
            rates = np.repeat(rates, sequences or 1)
        self._set_up(engine, StateForm(fm, kind, value_dim), batch_shape, sequences)
        self._rates = rates

    def _set_up(
        self, engine: Engine, form: StateForm, batch_shape: tuple[int, ...], sequences: int | None
    ) -> None:
        """Be the state of no keys."""
        self._engine = engine
        self.feature_map, self.dtype, self.value_dim = self._form = form
        self.batch_shape = batch_shape
        self.sequences = sequences
        #: c, S, z in the layout of the engine: one row a batch and head, features padded.
        self._arrays = engine.new_states(form, math.prod(batch_shape) * (sequences or 1))
        self._rates = self._fade = None
        self._tokens = 0
        self._plan = None
        self._guard = Guard("AttentionState")

    @classmethod
    def _empty(
        cls, engine: Engine, form: StateForm, batch_shape: tuple[int, ...], sequences: int | None
    ) -> AttentionState:
        """Return the state of no keys, of arguments that were checked."""
        state = cls.__new__(cls)
        state._set_up(engine, form, batch_shape, sequences)
        return state

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
        """Make the state of no keys at all: the same as the constructor.

        Parameters
        ----------
        feature_map, value_dim, batch_shape, sequences, decay, dtype, device
            As for the constructor.

        Returns
        -------
        AttentionState
            A read of it gives zeros.

        Raises
        ------
        TypeError, ValueError
            As the constructor.
        """
        return cls(
            feature_map,
            value_dim,
            batch_shape,
            sequences=sequences,
            decay=decay,
            dtype=dtype,
            device=device,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the state's arrays."""
        return sum(int(array.nbytes) for array in self._arrays)

    @property
    def lengths(self) -> Array:
        """Tokens folded, masked ones included, in the shape of the batch; a copy."""
        return self._guard.read(self._lengths).reshape(self._slots)

    def _lengths(self) -> Array:
        return np.full(len(self._arrays[0]), self._tokens, np.int64)

    @property
    def decay(self) -> Array | None:
        """What the weight of a key is multiplied with at every later token; a copy."""
        if self._rates is None:
            return None
        rates: Array = self._rates.reshape(*self.batch_shape, self.sequences or 1)[..., 0]
        return np.asarray(np.exp2(-rates))

    @property
    def _start(self) -> Array | None:
        """By how much the next key is raised, of which exponents of the state lack the integer."""
        fade = self._raised()
        return None if fade is None else fade.fraction

    def _raised(self) -> Fade | None:
        """By how much the next key is raised, given decay."""
        if self._rates is None:
            return self._fade
        return Fade(*np.divmod(self._tokens * self._rates, 1.0))

    def _age(self, tokens: int | Array, faded: Fade | None = None) -> None:
        """Count tokens that were folded; with decay, keep the exponents near zero.

        The integer part of what the next key is raised by is taken off here, and the fraction is
        left to `_start`.
        """
        before = self._raised()
        self._tokens = self._tokens + tokens
        if faded is not None:
            self._fade = faded if self._fade is None else self._fade.plus(faded)
        now = self._raised()
        if now is not None:
            by = now.whole if before is None else now.whole - before.whole
            self._engine.lower_states(self._form, self._arrays, by)

    def _real(self) -> tuple[Array, Array, Array]:
        """Return copies of c, S and z in C order, with the batch axes and without padding."""
        sums, lead = self._engine.state_sums(self._form, self._arrays), self._slots
        c, s, z = (np.ascontiguousarray(x).reshape(*lead, *x.shape[1:]) for x in sums)
        return c, s, z

    @property
    def _slots(self) -> tuple[int, ...]:
        """The leading axes of c, S and z: with packed sequences one more than `batch_shape`."""
        return (*self.batch_shape, *(() if self.sequences is None else (self.sequences,)))

    def _now(self, array: Array) -> Array:
        """Return an array of the state without the fraction by which the last token was raised."""
        if (start := self._start) is not None:
            fraction = np.exp2(-start).astype(array.dtype)
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

    def _check_map(self, feature_map: FeatureMap) -> None:
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
        key_bias: npt.ArrayLike | None = None,
        decay: npt.ArrayLike | None = None,
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
        key_bias : array_like of float, shape (..., L), optional
            As for `favor_attention`.
        decay : array_like of float, shape (..., L), optional
            One factor per token, in (0, 1]: each multiplies the weights of all keys before it,
            those in the state included.  For states without a `decay` of their own.
        cu_seqlens : array_like of int, shape (sequences + 1,), optional
            Where the rows of each packed sequence begin; for states with `sequences`.
        num_threads : int, optional
            Default: see `thread_limit`.
        check_finite : bool, default False
            Refuse NaN and infinity, in masked keys as well, before the state is touched: one such
            key stays in it for ever.

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
        engine, (_, k, v, key_mask) = self._engine.receive(None, k, v, key_mask)
        call = engine.check(
            None,
            k,
            v,
            self.feature_map,
            self,
            key_mask=key_mask,
            key_bias=key_bias,
            num_threads=num_threads,
            check_finite=check_finite,
            dtype=self.dtype,
        )
        self._run(call, cu_seqlens, engine.to_host(decay))
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
        engine, (q, *_) = self._engine.receive(q, None, None)
        call = engine.check(
            q, None, None, self.feature_map, self, num_threads=num_threads, dtype=self.dtype
        )
        return self._run(call, cu_seqlens)

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
        key_bias : array_like of float, optional
            The weight of the key is multiplied with ``exp(key_bias)``: one number, or one for each
            row of `k`.
        decay : array_like of float, optional
            What the weights of all keys before it are multiplied with, in (0, 1]; likewise.  For
            states without a `decay` of their own.
        num_threads : int, optional
            Default: see `thread_limit`.
        check_finite : bool, default False
            Refuse NaN and infinity before the state is touched: one such key stays in it for ever.

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
        cpu = processor()
        if (
            key_bias is None and decay is None and num_threads is None and check_finite is False
        ) and (self.sequences is None and self._rates is None and self._engine is cpu):
            plan = self._plan
            if plan is None or not plan.fits(q, k, v):
                plan = self._plan = cpu.plan_of_token(self._form, self.batch_shape, q, k, v)
            if plan is not None:
                plain = self._guard.change(self._step, (plan, q, k, v))
                if plain is not None:
                    return plain
        engine, (q, k, v, _) = self._engine.receive(q, k, v)
        if key_bias is not None:
            key_bias = validation.number_a_token(
                "key_bias", engine.to_host(key_bias), self.batch_shape, self.sequences
            )
        if decay is not None:
            decay = validation.number_a_token(
                "decay", engine.to_host(decay), self.batch_shape, self.sequences
            )
        (q, k, v), flat = engine.token(
            q, k, v, self.batch_shape, self.feature_map.dim, self.sequences
        )
        call = engine.check(
            q,
            k,
            v,
            self.feature_map,
            self,
            key_bias=key_bias,
            causal=True,
            num_threads=num_threads,
            check_finite=check_finite,
            dtype=self.dtype,
        )
        ends = None if self.sequences is None else np.arange(self.sequences + 1)
        out = self._run(call, ends, decay)
        return out.reshape(*out.shape[:-2], out.shape[-1]) if flat else out

    def _step(self, given: tuple[Any, Any, Any, Any]) -> Array | None:
        """Append a plain token; None, and nothing was done, if it or the state is not plain."""
        plan, q, k, v = given
        if self._fade is not None:
            return None
        out: Array | None = plan.run(q, k, v, self._arrays)
        if out is not None:
            self._tokens = self._tokens + 1
        return out

    def _fits(
        self,
        offsets: Array | None,
        decay: object = None,
        *,
        causal: bool = True,
        gated: bool = False,
    ) -> None:
        """Refuse rows that are packed otherwise than this state, or decay otherwise."""
        found = None if offsets is None else len(offsets) - 1
        if found != self.sequences:
            raise ValueError(
                f"cu_seqlens must be that of the state: it has sequences={self.sequences}, "
                f"got {found}"
            )
        if self._rates is not None and not causal:
            raise ValueError("a state with decay needs causal=True, or its own update and attend")
        if gated and self._rates is not None:
            raise ValueError(f"decay must be that of the state, {self.decay}, got one a token")
        if decay is not None:
            rates = validation.decay_rates(decay, self.batch_shape)
            if rates is not None:
                rates = np.repeat(rates, self.sequences or 1)
            if not _same(rates, self._rates):
                raise ValueError(f"decay must be that of the state, {self.decay}, got {decay}")

    def _run(self, call: Call, cu_seqlens: Any, decay: object = None) -> Array:
        """Fold the keys of a call and read with its queries."""
        keys = call.keys
        if cu_seqlens is not None:
            call.offsets = validation.sequence_offsets(cu_seqlens, max(keys, call.q.shape[-2]))
        if call.offsets is not None or self.sequences is not None:
            self._fits(call.offsets)
        if decay is not None or (keys and self._rates is not None and not call.causal):
            set_decay(call, decay, self)  # a single token is raised by what has faded alone
        if 0 < keys < LONG:
            return self._guard.change(self._advance, call)
        if keys:
            return self._guard.change(self._advance_copy, call, spoils=False)
        if self._engine.has_tails(self._arrays):
            self._guard.change(lambda state: state._without_tail(), self)
        return self._guard.read(self._advance, call, shared=True)

    def _advance(self, call: Call) -> Any:
        """Fold and read what was checked."""
        keys, engine = call.keys, call.engine
        result, target = engine.outputs(call)
        arrays = self._arrays
        if keys:
            self._engine = engine  # what follows is work for the same stream
        if not keys and engine.has_tails(arrays):
            # A token came since `_run` looked: what only reads changes nothing.
            arrays = self._copy()._without_tail()._arrays
        fade = self._raised()
        if fade is not None:
            raise_by(call, fade.fraction)
        if len(arrays[0]) and (target.size or keys):
            engine.attend(call, target, arrays)
        if (
            keys and call.offsets is None and fade is None and call.gates is None
        ):  # a token: sooner than by `_count`
            self._tokens = self._tokens + keys
        else:
            self._count(call)
        return engine.finish(call, result, target)

    def _advance_copy(self, call: Call) -> Any:
        after = self._copy(call.engine)
        out = after._advance(call)
        # One step, so that no interrupt comes between the two.
        vars(self).update(
            _engine=after._engine, _arrays=after._arrays, _tokens=after._tokens, _fade=after._fade
        )
        return out

    def _count(self, call: Call) -> None:
        """Note that the keys of a call were folded."""
        if not call.keys:
            return
        tokens: int | Array = call.keys
        if call.offsets is not None:
            tokens = np.tile(np.diff(call.offsets), math.prod(self.batch_shape))
        faded = None
        if call.faded is not None:
            faded = Fade(*np.divmod(call.faded, 1.0))
        self._age(tokens, faded)

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
        self._check_map(other.feature_map)
        if other.dtype != self.dtype:
            raise TypeError(f"other must have dtype {self.dtype}, got {other.dtype}")
        mine, theirs = ((s.batch_shape, s.value_dim, s.sequences) for s in (self, other))
        if mine != theirs:
            raise ValueError(
                f"other must have (batch_shape, value_dim, sequences) {mine}, got {theirs}"
            )
        if not _same(self._rates, other._rates):
            raise ValueError(f"other must have decay {self.decay}, got {other.decay}")
        if self._engine.home != other._engine.home:
            raise TypeError("other must lie where the state does: in main memory, or on the device")
        self._guard.change(self._merge, other._guard.read(other._copy, self._engine))
        return self

    def _without_tail(self) -> AttentionState:
        """Fold the tokens that wait, in place."""
        if self._engine.has_tails(self._arrays):
            self._engine.fold_tails(self._form, self._arrays)
        return self

    def _merge(self, other: AttentionState) -> None:
        self._without_tail()
        c, s, z = other._without_tail()._arrays
        before, theirs = self._raised(), other._raised()
        if before is not None:
            self._engine.scale_states((c, s, z), np.exp2(before.fraction))
        self._age(other._tokens, other._fade)
        now = self._raised()
        if before is not None and theirs is not None and now is not None:
            # The sum of the integer parts may be one short of the integer part of the sum.
            by = now.whole - (before.whole + theirs.whole)
            self._engine.lower_states(self._form, (c, s, z), by)
        self._engine.merge_states(self._arrays, (c, s, z))

    def copy(self) -> AttentionState:
        """Return an independent copy: to continue one prefix in two ways."""
        return self._guard.read(self._copy)

    def _copy(self, engine: Engine | None = None) -> AttentionState:
        """Copy, by the engine of the call that goes on with it: on a device, on its stream."""
        new = AttentionState.__new__(AttentionState)
        vars(new).update(vars(self))
        new._engine = engine or self._engine
        new._arrays = new._engine.copy_states(self._arrays)
        new._guard = Guard("AttentionState")
        return new

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
            c, s, z, *rest = self._engine.state_parts(self._form, self._arrays)
            sums = (x.reshape(*self._slots, *x.shape[1:]) for x in (c, s, z))
            return *sums, self._lengths(), None if rest[0] is None else tuple(rest)

        c, s, z, lengths, rest = self._guard.read(content)
        return _restore, (*args, c, s, z, self.sequences, self._rates, lengths, rest, self._fade)

    def __repr__(self) -> str:
        """Describe the state in one line."""
        return (
            f"<AttentionState batch_shape={self.batch_shape}, value_dim={self.value_dim}, "
            f"{self.dtype}, of {self.feature_map!r}>"
        )


def _restore(*pickled: Any) -> AttentionState:
    """Return a state from what it is pickled with."""
    from favor_np.storage import Parts

    parts = Parts(*pickled)
    form = StateForm(parts.feature_map, np.dtype(parts.dtype), parts.value_dim)
    state = AttentionState._empty(processor(), form, parts.batch_shape, parts.sequences)
    rows = len(state._arrays[0]), form.feature_map.num_features
    c, s, z = parts.c.reshape(rows), parts.s.reshape(*rows, form.value_dim), parts.z.reshape(rows)
    state._arrays = state._engine.states_of(form, StateParts(c, s, z, *(parts.rest or ())))
    state._rates, state._tokens = parts.rates, np.ravel(parts.lengths)
    state._fade = None if parts.fade is None else Fade(*parts.fade)
    return state


def _same(a: Array | None, b: Array | None) -> bool:
    """Whether two decays are one, but for the rounding of ``log2(2**rate)``."""
    if a is None or b is None:
        return a is b
    return np.allclose(a, b, rtol=1e-14, atol=1e-15)
