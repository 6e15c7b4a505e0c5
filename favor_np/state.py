"""The state of attention: keys and values folded into a matrix of fixed size."""

from __future__ import annotations

import math
import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]


class AttentionState:
    """What a prefix of keys and values has left behind: (c, S, z) for each batch and head.

    ``S * 2**c = sum_j phi_k(k_j) v_j^T`` and ``z * 2**c = sum_j phi_k(k_j)``, phi_k without its
    factor ``1 / sqrt(M)``, which cancels.  Its size does not depend on how much was folded.  Make
    one with `zeros`, or with ``favor_attention(..., return_state=True)``.

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
    ) -> None:
        self.feature_map = feature_map
        self.value_dim = value_dim
        self.batch_shape = batch_shape
        self.dtype = dtype
        #: c, S, z in the layout of the kernels: one row a batch and head, features padded.
        self.arrays = arrays

    @classmethod
    def zeros(
        cls,
        feature_map: FeatureMap,
        value_dim: int,
        batch_shape: int | tuple[int, ...] = (),
        *,
        dtype: npt.DTypeLike | None = None,
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
        dtype : {float32, float64}, optional
            Default: that of the map's projection.

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
        if not isinstance(feature_map, FeatureMap):
            raise TypeError(f"feature_map must be a FeatureMap, got {validation.got(feature_map)}")
        if feature_map.kind == "trig":
            raise ValueError("feature_map must not be of kind 'trig', which attention refuses")
        value_dim = validation.integer("value_dim", value_dim)
        shape = batch_shape if isinstance(batch_shape, (tuple, list)) else (batch_shape,)
        shape = tuple(validation.integer("batch_shape", n, minimum=0) for n in shape)
        heads = feature_map.num_heads
        if heads is not None and (not shape or shape[-1] != heads):
            raise ValueError(f"batch_shape must end with the {heads} heads of the map, got {shape}")
        kind = validation.float_dtype(
            "dtype", feature_map.projection.dtype if dtype is None else dtype
        )
        from favor_np import launch

        arrays = launch.new_state(feature_map, kind, math.prod(shape), value_dim)
        return cls(feature_map, value_dim, shape, kind, arrays)

    def _real(self, array: Array) -> Array:
        """Return a copy without the kernels' padding, with the batch axes."""
        from favor_np import plan

        rows = plan.layout(self.feature_map, self.dtype, self.value_dim).real
        return array[:, rows].reshape(*self.batch_shape, len(rows), *array.shape[2:])

    @property
    def c(self) -> Array:
        """Exponents of two, integers of shape (..., M); a copy."""
        return self._real(self.arrays[0])

    @property
    def S(self) -> Array:
        """Values weighted by features over 2**c, shape (..., M, dv); a copy."""
        return self._real(self.arrays[1])[..., : self.value_dim].copy()

    @property
    def z(self) -> Array:
        """Sums of features over 2**c, shape (..., M); a copy."""
        return self._real(self.arrays[2])

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
        num_threads: int | None = None,
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
        num_threads : int, optional
            Default: see `thread_limit`.

        Returns
        -------
        AttentionState
            The state itself.

        Raises
        ------
        TypeError, ValueError
            As `favor_attention`.
        """
        k = validation.tensor("k", k)
        empty = np.empty((*self.batch_shape, 0, self.feature_map.dim), self.dtype)
        self._run(empty, k, v, key_mask, causal=False, threads=num_threads)
        return self

    def attend(self, q: npt.ArrayLike, *, num_threads: int | None = None) -> Array:
        """Read the state: attention of `q` to all keys folded so far.

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
        """
        q = validation.tensor("q", q)
        k = np.empty((*self.batch_shape, 0, self.feature_map.dim), self.dtype)
        v = np.empty((*self.batch_shape, 0, self.value_dim), self.dtype)
        return self._run(q, k, v, None, causal=False, threads=num_threads)

    def step(
        self,
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        *,
        num_threads: int | None = None,
    ) -> Array:
        """Append one token and attend from it, in place: O(M (d + dv)), whatever came before.

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

        Returns
        -------
        ndarray, shape (..., dv) or (..., 1, dv)
            In the dtype of the state.

        Raises
        ------
        TypeError, ValueError
            As `favor_attention`.
        """
        q, k, v = (validation.tensor(n, a, 1) for n, a in (("q", q), ("k", k), ("v", v)))
        axes = len(self.batch_shape)
        if q.ndim == axes + 1:
            rows = (q[..., None, :], k[..., None, :], v[..., None, :])
            return self._run(*rows, None, causal=True, threads=num_threads)[..., 0, :]
        if q.ndim != axes + 2 or q.shape[-2] != 1:
            raise ValueError(
                f"q must be one token, of shape {(*self.batch_shape, self.feature_map.dim)}, "
                f"got shape {q.shape}"
            )
        return self._run(q, k, v, None, causal=True, threads=num_threads)

    def _run(
        self, q: Any, k: Any, v: Any, mask: Any, *, causal: bool, threads: int | None
    ) -> Array:
        call = validation.attention_call(
            q, k, v, key_mask=mask, causal=causal, grouped=False, check_finite=False,
            num_threads=threads, dim=self.feature_map.dim, heads=self.feature_map.num_heads,
            state_shape=self.batch_shape,
        )  # fmt: skip
        validation.last_axis("v", call.v, self.value_dim, "the state")
        out = np.zeros(call.out_shape, self.dtype)
        if math.prod(call.state_shape) and (out.size or call.keys):
            from favor_np import launch

            launch.attend(
                self.feature_map, call.q, call.k, call.v, call.mask, out,
                dtype=self.dtype, causal=causal, grouped=False, state=self.arrays,
                state_shape=self.batch_shape, threads=call.threads,
            )  # fmt: skip
        return out

    def merge(self, other: AttentionState) -> AttentionState:
        """Add what another state has seen, in place: the fold of both sets of keys.

        Associative and commutative (within rounding).

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
        mine, theirs = ((s.batch_shape, s.value_dim) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"other must have (batch_shape, value_dim) {mine}, got {theirs}")
        from favor_np import launch

        launch.merge(self.arrays, other.arrays)
        return self

    def copy(self) -> AttentionState:
        """Return an independent copy: to continue one prefix in two ways."""
        from favor_np import plan

        arrays = tuple(plan.aligned(a.shape, a.dtype) for a in self.arrays)
        for new, old in zip(arrays, self.arrays, strict=True):
            new[...] = old
        return AttentionState(
            self.feature_map,
            self.value_dim,
            self.batch_shape,
            self.dtype,
            arrays,  # type: ignore[arg-type]
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
        return _restore, (*args, self.c, self.S, self.z, self._padding())

    def _padding(self) -> Array:
        """Exponents of the features that only pad: they can decide where a chunk of keys is cut."""
        from favor_np import plan

        layout = plan.layout(self.feature_map, self.dtype, self.value_dim)
        padding = np.delete(self.arrays[0], layout.real, axis=1)
        return padding.reshape(*self.batch_shape, layout.features - len(layout.real))

    def __repr__(self) -> str:
        """Describe the state in one line."""
        return (
            f"<AttentionState batch_shape={self.batch_shape}, value_dim={self.value_dim}, "
            f"{self.dtype}, of {self.feature_map!r}>"
        )


def _restore(
    feature_map: FeatureMap, value_dim: int, batch_shape: tuple[int, ...], dtype: str,
    c: Array, s: Array, z: Array, padding: Array,
) -> AttentionState:  # fmt: skip
    from favor_np import plan

    state = AttentionState.zeros(feature_map, value_dim, batch_shape, dtype=dtype)
    layout = plan.layout(feature_map, state.dtype, value_dim)
    rows, idle = layout.real, np.delete(np.arange(layout.features), layout.real)
    count = len(state.arrays[0])
    if padding.shape[-1] == len(idle):  # or another layout: the same numbers, rounded elsewhere
        state.arrays[0][:, idle] = padding.reshape(count, len(idle))
    state.arrays[0][:, rows] = c.reshape(count, len(rows))
    state.arrays[1][:, rows, :value_dim] = s.reshape(count, len(rows), value_dim)
    state.arrays[2][:, rows] = z.reshape(count, len(rows))
    return state
