"""Feature maps: what turns softmax attention into sums over features.

A feature map is a pair of functions with E[phi_q(q) . phi_k(k)] = exp(scale q.k), or the
positive features of another kernel.  Every exponential map has one affine form,

    log(sqrt(M) phi_r(x)) = u_r . x + b_r - h(x),        h(x) = key_norm |x|**2,

with ``u = FeatureMap.weight`` and ``b = FeatureMap.bias``: the kernels evaluate that, and no
map by name.  ``query_features`` and ``key_features`` are the readable definition, in float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.projection import KINDS as PROJECTIONS
from favor_np.projection import RNG, sample_projection

KINDS = ("positive", "relu", "elu", "trig")

F64: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class FeatureMap:
    """A feature map: a projection and the function applied to it.  Immutable.

    Make one with `feature_map`, or `from_projection` for a given projection.  Two maps are
    equal, and have the same hash, when they compute the same features; a map can be pickled.

    Parameters
    ----------
    projection : ndarray, shape (m, d) or (heads, m, d)
        The rows w_r, float32 or float64 (other real types become float64); copied, read-only.
    kind : {"positive", "relu", "elu", "trig"}
        The function: see `feature_map`.
    scale : float
        The s of exp(s q.k); rows act on x' = sqrt(scale) x.
    antithetic : bool
        True: the features are those of the rows W followed by the rows -W.
    kernel_epsilon : float
        Added to every "relu" feature before the division by sqrt(M).

    Attributes
    ----------
    dim : int
        Length d of queries and keys.
    num_features : int
        Number M of features, antithetic partners and both of cos and sin included.
    num_heads : int or None
        Number of heads with a projection of their own; None if all heads share one.
    weight : ndarray, shape (heads or 1, m, d), float64
        u: ``sqrt(scale) * projection``.
    bias : ndarray, shape (heads or 1, m), float64
        b: a constant added to the log-features of keys; zero for every map so far.
    key_norm : float
        ``h(k) = key_norm * |k|**2``: scale/2 ("positive"), 0 ("relu", "elu"), -scale/2 ("trig").
    fingerprint : str
        SHA-256 (hexadecimal) of all that defines the features.
    """

    projection: npt.NDArray[np.floating[Any]]
    kind: str
    scale: float
    antithetic: bool
    kernel_epsilon: float
    weight: F64 = field(init=False)
    bias: F64 = field(init=False)

    def __post_init__(self) -> None:
        """Check and freeze the fields, and derive `weight` and `bias` from them."""
        kind = validation.choice("kind", self.kind, KINDS)
        projection = validation.projection_matrix("projection", self.projection)
        scale = validation.positive_float("scale", self.scale)
        antithetic = validation.flag("antithetic", self.antithetic)
        if antithetic and kind != "positive":
            raise ValueError(f"antithetic=True needs kind='positive', got kind={kind!r}")
        weight = np.sqrt(scale) * projection.astype(np.float64)
        weight = weight.reshape(-1, *projection.shape[-2:])
        bias = np.zeros(weight.shape[:2])
        weight.setflags(write=False)
        bias.setflags(write=False)
        values = {
            "projection": projection,
            "scale": scale,
            "antithetic": antithetic,
            "kernel_epsilon": validation.positive_float("kernel_epsilon", self.kernel_epsilon),
            "weight": weight,
            "bias": bias,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_projection(
        cls,
        projection: npt.ArrayLike,
        kind: str = "positive",
        scale: float | None = None,
        antithetic: bool = False,
        kernel_epsilon: float = 1e-3,
    ) -> FeatureMap:
        """Make a feature map with the given projection.

        Parameters
        ----------
        projection : array_like, shape (m, d) or (heads, m, d)
            One feature a row.  Three axes: one projection a head, matched with axis -3 of
            queries and keys.  float32 and float64 are kept, other real types become float64.
        kind : {"positive", "relu", "elu", "trig"}, default "positive"
            The function: see `feature_map`.
        scale : float, optional
            The s of exp(s q.k); default d ** -0.5.
        antithetic : bool, default False
            True ("positive" only): 2 m features, those of the rows W and then of -W.
        kernel_epsilon : float, default 1e-3
            Added to every "relu" feature; greater than 0.

        Returns
        -------
        FeatureMap
            With m features; 2 m if `antithetic`, and for "trig".

        Raises
        ------
        TypeError
            If an argument has the wrong type; for the projection: complex, object, str.
        ValueError
            If the projection is empty, not finite or has not 2 or 3 axes, if `scale` or
            `kernel_epsilon` is not finite and positive, if `kind` is unknown, or if
            `antithetic` is True for another kind than "positive".

        Examples
        --------
        >>> import numpy as np
        >>> from favor_np import FeatureMap
        >>> fm = FeatureMap.from_projection(np.eye(3), scale=1.0)
        >>> fm.num_features, fm.dim
        (3, 3)
        >>> fm.key_features([[1.0, 0.0, 0.0]]).round(4)  # exp(w.x - |x|**2 / 2) / sqrt(3)
        array([[0.9519, 0.3502, 0.3502]])
        """
        w = validation.projection_matrix("projection", projection)
        if scale is None:
            scale = w.shape[-1] ** -0.5
        return cls(w, kind, scale, antithetic, kernel_epsilon)

    @property
    def dim(self) -> int:
        """Length d of queries and keys."""
        return int(self.projection.shape[-1])

    @property
    def num_features(self) -> int:
        """Number M of features."""
        doubled = self.antithetic or self.kind == "trig"
        return int(self.projection.shape[-2]) * (2 if doubled else 1)

    @property
    def num_heads(self) -> int | None:
        """Number of heads with a projection of their own, or None."""
        return int(self.projection.shape[0]) if self.projection.ndim == 3 else None

    @property
    def key_norm(self) -> float:
        """The factor of ``|k|**2`` that is subtracted from the log-features of a key."""
        return {"positive": 0.5, "trig": -0.5}.get(self.kind, 0.0) * self.scale

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of all that defines the features.

        The dtype of the projection and the byte order of the machine are no part of it.
        """
        epsilon = self.kernel_epsilon if self.kind == "relu" else None
        head = (self.kind, self.antithetic, self.scale.hex(), epsilon, self.projection.shape)
        digest = hashlib.sha256(repr(head).encode())
        for array in (self.weight, self.bias):
            digest.update((array + 0.0).astype("<f8").tobytes())  # + 0.0: no negative zeros
        return digest.hexdigest()

    def query_features(self, x: npt.ArrayLike) -> F64:
        """Compute the features of queries, in float64 and without any stabiliser.

        Parameters
        ----------
        x : array_like, shape (..., L, d)
            Queries; with a projection a head: (..., heads, L, d).

        Returns
        -------
        ndarray of float64, shape (..., L, M)
            phi_q(x).  ``phi_q(q) @ phi_k(k)`` has the expectation exp(scale q.k) for "positive"
            and "trig".  Large inputs overflow to infinity: this is the definition, not the
            computation that attention makes.

        Raises
        ------
        TypeError
            If `x` does not hold real numbers.
        ValueError
            If the last axis of `x` is not d, or there are fewer than two axes.

        Examples
        --------
        >>> import numpy as np
        >>> from favor_np import feature_map
        >>> fm = feature_map("positive", dim=4, num_features=64)
        >>> q, k = np.full((1, 4), 0.5), np.full((1, 4), 0.3)
        >>> estimate = (fm.query_features(q) * fm.key_features(k)).sum()
        >>> bool(abs(estimate - np.exp(0.5 * 0.6)) < 0.05)  # exp(scale q.k), scale = 4 ** -0.5
        True
        """
        return self._features(validation.feature_input("x", x, self.dim), np.zeros(()))

    def key_features(self, x: npt.ArrayLike) -> F64:
        """Compute the features of keys: as `query_features`, with the keys' `bias` added.

        Parameters
        ----------
        x : array_like, shape (..., L, d)
            Keys; with a projection a head: (..., heads, L, d).

        Returns
        -------
        ndarray of float64, shape (..., L, M)
            phi_k(x).

        Raises
        ------
        TypeError
            If `x` does not hold real numbers.
        ValueError
            If the last axis of `x` is not d, or there are fewer than two axes.
        """
        return self._features(validation.feature_input("x", x, self.dim), self.bias[:, None, :])

    def _features(self, x: F64, bias: F64) -> F64:
        """Return the features of x (..., L, d), with `bias` added to the projections."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            y = x @ np.swapaxes(self.weight, -1, -2) + bias  # (..., heads or 1, L, m)
            if self.num_heads is None:
                y = y.reshape(*x.shape[:-1], y.shape[-1])
            h = self.key_norm * np.sum(x * x, axis=-1, keepdims=True)
            if self.kind == "relu":
                phi = np.maximum(y, 0.0) + self.kernel_epsilon
            elif self.kind == "elu":
                phi = np.maximum(y, 0.0) + np.exp(np.minimum(y, 0.0))  # elu(y) + 1
            elif self.kind == "trig":
                # sqrt(2): the mean is one over rows, and each row gives two features.
                phi = np.sqrt(2.0) * np.exp(-h) * np.concatenate([np.cos(y), np.sin(y)], axis=-1)
            elif self.antithetic:
                phi = np.exp(np.concatenate([y, -y], axis=-1) - h)
            else:
                phi = np.exp(y - h)
            result: F64 = phi / np.sqrt(self.num_features)
            return result

    def __eq__(self, other: object) -> bool:
        """Compare by content."""
        if not isinstance(other, FeatureMap):
            return NotImplemented
        return self is other or self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        """Hash by content."""
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: loading checks and freezes them again."""
        arguments = (self.projection, self.kind, self.scale, self.antithetic, self.kernel_epsilon)
        return FeatureMap, arguments

    def __repr__(self) -> str:
        """Describe the map in one line."""
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        antithetic = ", antithetic" if self.antithetic else ""
        return (
            f"<FeatureMap {self.kind!r}{antithetic}, dim={self.dim}, "
            f"num_features={self.num_features}{heads}, scale={self.scale:.6g}, "
            f"{self.projection.dtype}, {self.fingerprint[:8]}>"
        )


def feature_map(
    kind: str,
    dim: int,
    num_features: int,
    projection: str = "orthogonal",
    norms: str = "chi",
    antithetic: bool = True,
    scale: float | None = None,
    rng: RNG = 0,
    dtype: npt.DTypeLike = np.float32,
    kernel_epsilon: float = 1e-3,
) -> FeatureMap:
    """Make a feature map with a random projection.

    Parameters
    ----------
    kind : {"positive", "relu", "elu", "trig"}
        The function of y = w_r . x', with x' = sqrt(scale) x; all are divided by sqrt(M).

        - "positive" (FAVOR+): exp(y - abs(x')**2 / 2), an unbiased estimate of exp(scale q.k).
        - "relu" (generalised attention): max(y, 0) + kernel_epsilon.
        - "elu": elu(y) + 1.
        - "trig": exp(abs(x')**2 / 2) (cos y, sin y), unbiased as well, for studies of the
          kernel: its estimates can be negative, so attention refuses it.
    dim : int
        Length d of queries and keys.
    num_features : int
        Number M of all features.  Even for "trig" (cos and sin) and with `antithetic`.
    projection : {"orthogonal", "iid"}, default "orthogonal"
        How the rows w_r are drawn: see `sample_projection`.
    norms : {"chi", "sqrt"}, default "chi"
        Lengths of the rows: see `sample_projection`.
    antithetic : bool, default True
        Use M/2 rows W and their negatives -W ("positive" only, ignored for the other kinds,
        which have no such pairs).  Smaller variance and half the work for equal M.
    scale : float, optional
        The s of exp(s q.k); default d ** -0.5.
    rng : int, SeedSequence, BitGenerator, Generator or None, default 0
        Source of randomness: see `sample_projection`.
    dtype : {float32, float64}, default float32
        Type in which the projection is kept; its numbers are the same in both.
    kernel_epsilon : float, default 1e-3
        Constant of the "relu" features, greater than 0: with it no denominator is zero.

    Returns
    -------
    FeatureMap
        Immutable, hashable by content, picklable.

    Raises
    ------
    TypeError
        If an argument has the wrong type: a count that is not an integer, a seed that is not
        one, a dtype other than float32 and float64.
    ValueError
        If a count is below 1 or odd where it must be even, `scale` or `kernel_epsilon` is not
        finite and positive, or `kind`, `projection` or `norms` is unknown.

    Notes
    -----
    Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv:2009.14794): positive
    features are lemma 1 and section 2.3, the antithetic map is the hyperbolic one (SM-hyp+) of
    the same section, orthogonal rows are section 2.4, "relu" is the generalised attention of
    section 2.2.

    Examples
    --------
    >>> from favor_np import feature_map
    >>> fm = feature_map("positive", dim=16, num_features=64, rng=7)
    >>> fm
    <FeatureMap 'positive', antithetic, dim=16, num_features=64, scale=0.25, float32, ...>
    >>> fm.projection.shape
    (32, 16)
    """
    validation.choice("kind", kind, KINDS)
    dim = validation.integer("dim", dim)
    rows = num_features = validation.integer("num_features", num_features)
    antithetic = validation.flag("antithetic", antithetic) and kind == "positive"
    if antithetic or kind == "trig":
        if num_features % 2:
            reason = "with antithetic=True" if antithetic else "for kind='trig'"
            raise ValueError(f"num_features must be even {reason}, got {num_features}")
        rows = num_features // 2
    if scale is not None:
        scale = validation.positive_float("scale", scale)
    validation.positive_float("kernel_epsilon", kernel_epsilon)
    validation.choice("projection", projection, PROJECTIONS)
    w = sample_projection(rows, dim, projection, norms, rng=rng, dtype=dtype)
    return FeatureMap.from_projection(w, kind, scale, antithetic, kernel_epsilon)
