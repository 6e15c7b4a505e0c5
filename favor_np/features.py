"""Feature maps: what turns softmax attention into sums over features.

A feature map is a pair of functions with E[phi_q(q) . phi_k(k)] = exp(scale q.k), or the
positive features of another kernel.  Every exponential map has one affine form,

    log(sqrt(M) phi_r(q)) = query_weight_r . (q - query_center)                       + ...
    log(sqrt(M) phi_r(k)) = key_weight_r . (k - key_center) + bias_r - h(k - key_center),

where ... is common to all features of a query and cancels in attention: the kernels evaluate
that, and no map by name.  Antithetic partners turn the sign of the products, of nothing else.
``query_features`` and ``key_features`` are the readable definition, in float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.projection import KINDS as PROJECTIONS
from favor_np.projection import RNG, sample_projection

KINDS = ("positive", "relu", "elu", "trig")
#: Those whose features are positive, so that no denominator can vanish: what attention takes.
ATTENTION_KINDS = KINDS[:3]

F64: TypeAlias = npt.NDArray[np.float64]


class Calibration(NamedTuple):
    """What a "positive" map knows about the data: centres, a change of variables, a tilt.

    With c = sqrt(scale), the projection acts on x' = c V (q - query_center) and
    y' = c V**-T (k - key_center), V being `change`, and its rows are importance samples with the
    weight exp(2 w'Aw), A = diag(`quadratic`) (FAVOR#, arXiv:2302.00787).  Any values leave the
    estimator unbiased.  Each array has one more axis in front if every head has its own.

    Parameters
    ----------
    query_center, key_center : ndarray, shape (d,) or (heads, d)
        What is subtracted from queries and keys.
    change : ndarray, shape (d, d) or (heads, d, d), or None
        V, invertible; None is the identity.
    quadratic : ndarray, shape (d,) or (heads, d)
        Diagonal of A, less than 1/8: from there on the variance is infinite.
    """

    query_center: F64
    key_center: F64
    change: F64 | None
    quadratic: F64


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
    calibration : Calibration, optional
        What `calibrate` found out about the data; "positive" only.

    Attributes
    ----------
    dim : int
        Length d of queries and keys.
    num_features : int
        Number M of features, antithetic partners and both of cos and sin included.
    num_heads : int or None
        Number of heads with a projection of their own; None if all heads share one.
    query_weight, key_weight : ndarray, shape (heads or 1, m, d), float64
        What multiplies centred queries and keys: ``sqrt(scale) * projection`` for both, unless
        the map is calibrated.
    query_center, key_center : ndarray, shape (heads or 1, d), float64
        What is subtracted from queries and keys first; zero unless calibrated.
    bias : ndarray, shape (heads or 1, m), float64
        A constant added to the log-features of keys, for both antithetic partners; zero unless
        calibrated.
    key_norm : float
        For centred keys k, ``h(k) = key_norm * |k|**2``: scale/2 ("positive"), 0 ("relu", "elu"),
        -scale/2 ("trig").  Unless there is a `key_factor`, which takes its place.
    key_factor : ndarray, shape (heads or 1, d, d), float64, or None
        R, if ``h(k) = |R k|**2 / 2 - key_linear . k``: rows that a kernel may append to those of
        `key_weight`, and then sum the squares of.
    key_linear : ndarray, shape (heads or 1, d), float64
        g, subtracted as ``g . k`` from h whether or not there is a `key_factor`; zero unless
        calibrated.
    fingerprint : str
        SHA-256 (hexadecimal) of all that defines the features.
    """

    projection: npt.NDArray[np.floating[Any]]
    kind: str
    scale: float
    antithetic: bool
    kernel_epsilon: float
    calibration: Calibration | None = None
    query_weight: F64 = field(init=False)
    key_weight: F64 = field(init=False)
    query_center: F64 = field(init=False)
    key_center: F64 = field(init=False)
    bias: F64 = field(init=False)
    key_linear: F64 = field(init=False)
    query_factor: F64 | None = field(init=False)
    key_factor: F64 | None = field(init=False)

    def __post_init__(self) -> None:
        """Check and freeze the fields, and derive what kernels read from them."""
        kind = validation.choice("kind", self.kind, KINDS)
        projection = validation.projection_matrix("projection", self.projection)
        scale = validation.positive_float("scale", self.scale)
        antithetic = validation.flag("antithetic", self.antithetic)
        if antithetic and kind != "positive":
            raise ValueError(f"antithetic=True needs kind='positive', got kind={kind!r}")
        values: dict[str, Any] = {
            "kind": kind,
            "projection": projection,
            "scale": scale,
            "antithetic": antithetic,
            "kernel_epsilon": validation.positive_float("kernel_epsilon", self.kernel_epsilon),
            "calibration": None,
        }
        if self.calibration is not None:
            if kind != "positive":
                raise ValueError(f"calibration needs kind='positive', got kind={kind!r}")
            heads = projection.shape[0] if projection.ndim == 3 else None
            checked = validation.calibration(self.calibration, projection.shape[-1], heads)
            values["calibration"] = Calibration(**checked)
        rows = projection.astype(np.float64).reshape(-1, *projection.shape[-2:])
        values |= _affine(rows, scale, values["calibration"])
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            object.__setattr__(self, name, value)

    @classmethod
    def random(cls, kind: str, dim: int, num_features: int, **options: Any) -> FeatureMap:
        """Make a feature map with a random projection: the same as `feature_map`.

        Parameters
        ----------
        kind, dim, num_features, **options
            As for `feature_map`.

        Returns
        -------
        FeatureMap
            What `feature_map` returns.

        Raises
        ------
        TypeError, ValueError
            As `feature_map`.

        Examples
        --------
        >>> from favor_np import FeatureMap, feature_map
        >>> FeatureMap.random("positive", 4, 8, rng=1) == feature_map("positive", 4, 8, rng=1)
        True
        """
        return feature_map(kind, dim, num_features, **options)

    @classmethod
    def from_projection(
        cls,
        projection: npt.ArrayLike,
        kind: str = "positive",
        *,
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

    @validation.own_error_state
    def calibrate(
        self, q: npt.ArrayLike, k: npt.ArrayLike, method: str = "auto", *, center: bool = True
    ) -> FeatureMap:
        """Return a map with smaller errors on queries and keys that are like these.

        Calibrating on the very sequence that is then attended to causally lets every output
        depend on what comes after it, and no check can notice: use other data, or a prefix.

        Parameters
        ----------
        q : array_like, shape (..., L, d)
            Typical queries; a few hundred are plenty.
        k : array_like, shape (..., L_k, d)
            Typical keys.  Axis -3 of either, where there is one, holds the heads: each gets a
            calibration of its own, and the map then has `num_heads`.  Further axes are pooled.
            With fewer heads of keys than of queries (grouped queries) these are pooled too.
        method : str, default "auto"
            What is adapted, all in closed form but for the last two.

            - "oprf" (FAVOR++): the weight of rows by their length.
            - "sderf" (FAVOR#): by their direction as well.
            - "saderf", "aderf" (FAVOR#): the relative size of queries and keys, coordinate by
              coordinate or in every direction, then "oprf".
            - "saderf+sderf", "aderf+sderf": the same, then "sderf".
            - "spherical": as "aderf+sderf", with rows of one length, the one with the smallest
              error on the data.  It errs least, but is not unbiased: its limit for many features
              is not exactly exp(scale q.k).
            - "auto": "aderf+sderf", or "spherical" where its error on a sample of the data is
              smaller, with this projection.
        center : bool, default True
            Subtract the mean query and the mean key.  This changes the variance only.

        Returns
        -------
        FeatureMap
            An ordinary map with a `calibration`; an earlier calibration of this map is dropped.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If `method` is unknown, the map is not of kind "positive", or arrays are empty, hold
            NaN or infinity, or have shapes or heads that do not fit.

        Notes
        -----
        FAVOR++: Likhosherstov et al. 2022 (arXiv:2205.15317), section 3.3; FAVOR#: Likhosherstov
        et al. 2023 (arXiv:2302.00787), section 3.  For antithetic maps the closed-form weights
        are rescaled to the minimum of their own objective, which is found numerically.

        Examples
        --------
        >>> import numpy as np
        >>> import favor_np
        >>> rng = np.random.default_rng(0)
        >>> q, k, v = (0.5 * rng.standard_normal((3, 512, 16)) + 1).astype(np.float32)
        >>> plain = favor_np.feature_map("positive", dim=16, num_features=128)
        >>> fm = plain.calibrate(q[:128], k[:128])  # a prefix
        >>> exact = favor_np.exact_attention(q, k, v)
        >>> def error(fm):
        ...     return np.std(favor_np.attention_weights(q, k, fm) @ v - exact)
        >>> bool(error(fm) < 0.2 * error(plain))
        True
        """
        from favor_np import calibration as search

        validation.choice("method", method, (*search.METHODS, "auto"))
        center = validation.flag("center", center)
        if self.kind != "positive":
            raise ValueError(f"calibrate needs a map of kind 'positive', got {self.kind!r}")
        heads = len(self.projection) if self.projection.ndim == 3 else None
        queries, keys, own = validation.calibration_data(q, k, self.dim, heads)
        # Kernels subtract centres in the precision of their inputs: they get none to round.
        a, b = (
            (x.mean(-2) * center).astype(np.float32).astype(np.float64) for x in (queries, keys)
        )
        root, rows = np.sqrt(self.scale), self.projection.astype(np.float64)
        rows = rows.reshape(-1, *rows.shape[-2:])
        x, y = root * (queries - a[:, None]), root * (keys - b[:, None])
        height = root * np.einsum("hd,hld->hl", a, y)
        method, solutions = search.calibrate(method, x, y, height, rows, self.antithetic)
        change, quadratic = (np.stack(parts) for parts in zip(*solutions, strict=True))
        identity = (change == np.eye(self.dim)).all()
        arrays = [a, b, None if identity else change, quadratic]
        if not own:
            arrays = [None if x is None else x[0] for x in arrays]
        projection = self.projection
        if method == "spherical":
            projection = search.spherical(projection.astype(np.float64)).astype(np.float32)
        return FeatureMap(
            projection.astype(self.projection.dtype),
            self.kind,
            self.scale,
            self.antithetic,
            self.kernel_epsilon,
            Calibration(*arrays),
        )

    @cached_property
    def dim(self) -> int:
        """Length d of queries and keys."""
        return int(self.projection.shape[-1])

    @property
    def num_features(self) -> int:
        """Number M of features."""
        doubled = self.antithetic or self.kind == "trig"
        return int(self.projection.shape[-2]) * (2 if doubled else 1)

    @cached_property
    def num_heads(self) -> int | None:
        """Number of heads with a projection or calibration of their own, or None."""
        own = self.calibration is not None and self.calibration.quadratic.ndim == 2
        return len(self.key_weight) if own or self.projection.ndim == 3 else None

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
        arrays: list[F64 | None] = [np.sqrt(self.scale) * self.projection.astype(np.float64)]
        if self.calibration is None:
            arrays.append(self.bias)
        else:  # not what follows from it, whose last bits depend on the machine
            shapes = [None if x is None else x.shape for x in self.calibration]
            digest.update(repr(shapes).encode())
            arrays += self.calibration
        for array in arrays:
            if array is not None:
                digest.update((array + 0.0).astype("<f8").tobytes())  # + 0.0: no negative zeros
        return digest.hexdigest()

    @validation.own_error_state
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
        return self._features(*self._projections(validation.feature_input("x", x, self.dim)), 0.0)

    @validation.own_error_state
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
        y, h = self._projections(validation.feature_input("x", x, self.dim), keys=True)
        return self._features(y, h, self._of_head(self.bias))

    def _of_head(self, array: F64) -> F64:
        """Return (heads or 1, n) or (heads or 1, r, d) in a shape to compute with (..., L, n)."""
        if self.num_heads is None:
            return np.asarray(array[0])
        return array[:, None, :] if array.ndim == 2 else array

    def _projections(self, x: F64, keys: bool = False) -> tuple[F64, F64]:
        """Return the projections of x, and what is subtracted from all log-features of a row.

        Parameters
        ----------
        x : ndarray of float64, shape (..., L, d)
            Queries or keys.
        keys : bool, default False
            Which of the two.

        Returns
        -------
        projections : ndarray of float64, shape (..., L, m)
            Without the signs of antithetic partners and the `bias` of keys.
        heights : ndarray of float64, shape (..., L, 1)
            Those of queries cancel in attention.
        """
        weight, factor = self.query_weight, self.query_factor
        if keys:
            weight, factor = self.key_weight, self.key_factor
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            lift: F64 | float = 0.0
            if self.calibration is not None and keys:
                x = x - self._of_head(self.key_center)
                lift = np.sum(x * self._of_head(self.key_linear), axis=-1, keepdims=True)
            elif self.calibration is not None:
                linear = self.scale * self._of_head(self.key_center)
                lift = np.sum(x * linear, axis=-1, keepdims=True)
                x = x - self._of_head(self.query_center)
            y = x @ np.swapaxes(self._of_head(weight), -1, -2)
            if factor is None:
                return y, self.key_norm * np.sum(x * x, axis=-1, keepdims=True) - lift
            rows = x @ np.swapaxes(self._of_head(factor), -1, -2)
            return y, 0.5 * np.sum(rows * rows, axis=-1, keepdims=True) - lift

    def _features(self, y: F64, h: F64, bias: F64 | float) -> F64:
        """Return the features (..., L, M) of the projections y and h."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if self.kind == "relu":
                phi = np.maximum(y, 0.0) + self.kernel_epsilon
            elif self.kind == "elu":
                phi = np.maximum(y, 0.0) + np.exp(np.minimum(y, 0.0))  # elu(y) + 1
            elif self.kind == "trig":
                # sqrt(2): the mean is one over rows, and each row gives two features.
                phi = np.sqrt(2.0) * np.exp(-h) * np.concatenate([np.cos(y), np.sin(y)], axis=-1)
            elif self.antithetic:
                phi = np.exp(np.concatenate([bias + y, bias - y], axis=-1) - h)
            else:
                phi = np.exp(bias + y - h)
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
        if self.calibration is None:
            return FeatureMap, arguments
        return FeatureMap, (*arguments, self.calibration)

    def __repr__(self) -> str:
        """Describe the map in one line."""
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        antithetic = ", antithetic" if self.antithetic else ""
        antithetic += "" if self.calibration is None else ", calibrated"
        return (
            f"<FeatureMap {self.kind!r}{antithetic}, dim={self.dim}, "
            f"num_features={self.num_features}{heads}, scale={self.scale:.6g}, "
            f"{self.projection.dtype}, {self.fingerprint[:8]}>"
        )


def checked(value: object, kinds: tuple[str, ...] = KINDS) -> FeatureMap:
    """Return a feature map of one of these kinds."""
    if not isinstance(value, FeatureMap):
        raise TypeError(f"feature_map must be a FeatureMap, got {validation.got(value)}")
    if value.kind not in kinds:
        wanted = ", ".join(map(repr, kinds[:-1])) + " or " * (len(kinds) > 1) + repr(kinds[-1])
        raise ValueError(f"feature_map must be of kind {wanted}, got {value.kind!r}")
    return value


def _affine(projection: F64, scale: float, calibration: Calibration | None) -> dict[str, Any]:
    """Return the affine form of a map with the rows `projection` (heads or 1, m, d)."""
    dim = projection.shape[-1]
    form: dict[str, Any] = {
        n: np.zeros((1, dim)) for n in ("query_center", "key_center", "key_linear")
    }
    form["query_weight"] = form["key_weight"] = np.sqrt(scale) * projection
    form["query_factor"] = form["key_factor"] = None
    form["bias"] = np.zeros(projection.shape[:2])
    if calibration is None:
        return form
    quadratic = calibration.quadratic.reshape(-1, dim)
    for name in ("query_center", "key_center"):
        form[name] = getattr(calibration, name).reshape(-1, dim)
    form["key_linear"] = scale * form["query_center"]
    tilted = projection * np.sqrt(1 - 4 * quadratic)[:, None, :]
    form["query_weight"] = form["key_weight"] = np.sqrt(scale) * tilted
    if calibration.change is not None:
        change = calibration.change.reshape(-1, dim, dim)
        form["query_factor"] = np.sqrt(scale) * change
        form["key_factor"] = np.sqrt(scale) * np.swapaxes(np.linalg.inv(change), -1, -2)
        form["query_weight"] = tilted @ form["query_factor"]
        form["key_weight"] = tilted @ form["key_factor"]
    heads = len(form["key_weight"])
    form = {n: x if x is None else np.repeat(x, heads // len(x), axis=0) for n, x in form.items()}
    # The weights exp(2 w'Aw) have the mean det(1 - 4A)**-1/2.
    constant = 0.5 * np.log(1 - 4 * quadratic).sum(-1, keepdims=True)
    form["bias"] = constant + 2 * np.sum(projection**2 * quadratic[:, None, :], axis=-1)
    return form


@validation.own_error_state
def feature_map(
    kind: str,
    dim: int,
    num_features: int,
    *,
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
    projection : {"orthogonal", "iid", "simplex"}, default "orthogonal"
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
    return FeatureMap.from_projection(
        w, kind, scale=scale, antithetic=antithetic, kernel_epsilon=kernel_epsilon
    )
