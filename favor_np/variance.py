"""Closed forms of the variance of a kernel estimate, over the draws of the projection."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.calibration import log_relative_variance
from favor_np.features import F64, FeatureMap, checked

#: Nodes of the integral over the angle between the lengths of two simplex rows.
NODES = 64
#: Rows are taken for orthogonal, or of one length, if they are to this accuracy.
TOLERANCE = 1e-4


@validation.own_error_state
def kernel_variance(
    q: npt.ArrayLike, k: npt.ArrayLike, feature_map: FeatureMap, *, relative: bool = False
) -> F64:
    """Compute the variance of a map's estimate of the kernel, over the draws of its projection.

    The estimate is ``phi_q(q) . phi_k(k)``.  How the rows of the map were drawn is recognised from
    the rows: "iid", "orthogonal" or "simplex", with "chi" norms or all of one length.

    Parameters
    ----------
    q : array_like, shape (..., L, d)
        Queries; with a map that has heads: (..., heads, L, d).
    k : array_like, shape (..., L_k, d)
        Keys.
    feature_map : FeatureMap
        "positive" or "trig", calibrated or not.
    relative : bool, default False
        Divide by the squared kernel, ``exp(2 scale q.k)``: this cannot overflow where the
        kernel does.

    Returns
    -------
    ndarray of float64, shape (..., L, L_k)
        The variance.  It is that around the mean of the estimate, which is the kernel unless
        the rows are all of one length.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, or no closed form is known: for "relu" and "elu", and for blocks of
        orthogonal or simplex rows whose calibration treats directions differently ("sderf").

    Notes
    -----
    Positive and antithetic rows: arXiv:2009.14794, lemma 2 and theorem 2; with weights
    exp(2 A w.w): arXiv:2205.15317, theorem 3.3; simplex blocks: arXiv:2301.13856.  With
    z = x + y, s = z.z and two rows of one block that enclose an angle of cosine c,
    E exp((w + w').z) is the mean of 1F1(d; d/2; s (1 + c sin 2t) / 2) over the angle t with
    tan t = abs(w) / abs(w'); for c = 0 there is nothing to average.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> fm = favor_np.feature_map("positive", dim=16, num_features=64)
    >>> q, k = np.full((2, 1, 16), 0.3)
    >>> favor_np.kernel_variance(q, k, fm, relative=True).round(5)
    array([[0.01528]])
    """
    if isinstance(q, FeatureMap):
        warnings.warn(  # type: ignore[unreachable]
            "kernel_variance(feature_map, q, k) is now kernel_variance(q, k, feature_map)",
            DeprecationWarning,
            stacklevel=3,
        )
        q, k, feature_map = k, feature_map, q
    checked(feature_map, ("positive", "trig"))  # of others no closed form is known
    relative = validation.flag("relative", relative)
    fm, dim = feature_map, feature_map.dim
    q, k = (validation.feature_input(n, a, dim) for n, a in (("q", q), ("k", k)))
    x = _variables(fm, q - fm._of_head(fm.query_center), fm.query_factor)
    y = _variables(fm, k - fm._of_head(fm.key_center), fm.key_factor)
    cosine, length = structure(fm.projection.reshape(-1, *fm.projection.shape[-2:])[0])
    with np.errstate(over="ignore", invalid="ignore"):
        result = _relative(fm, x, y, cosine, length)
        if not relative:
            result = result * np.exp(2 * fm.scale * (q @ np.swapaxes(k, -1, -2)))
    return result


def structure(rows: npt.NDArray[np.floating]) -> tuple[float | None, float | None]:
    """Return the cosine between two rows of a block, and the length of all rows.

    None where rows are independent, and where lengths differ.
    """
    lengths = np.linalg.norm(rows, axis=-1)
    same = len(rows) > 1 and np.ptp(lengths) < TOLERANCE * lengths.max()
    length = float(lengths.mean()) if same else None
    dim = rows.shape[-1]
    block = rows[:dim] / lengths[:dim, None]
    cosines = (block @ block.T)[np.triu_indices(len(block), 1)]
    for cosine in (0.0, -1.0 / (dim - 1)) if cosines.size else ():
        if np.abs(cosines - cosine).max() < TOLERANCE:
            return cosine, length
    return None, length


def _variables(fm: FeatureMap, x: F64, factor: F64 | None) -> F64:
    """Return what the rows of the projection act on."""
    if factor is None:
        return np.asarray(np.sqrt(fm.scale) * x)
    return np.asarray(x @ np.swapaxes(fm._of_head(factor), -1, -2))


def _relative(fm: FeatureMap, x: F64, y: F64, cosine: float | None, length: float | None) -> F64:
    """Return the variance over the squared kernel, for all pairs of rows of x and y."""
    from scipy.special import hyp0f1, hyp1f1

    rows, dim = fm.projection.shape[-2:]
    tilt = np.zeros((1, dim)) if fm.calibration is None else fm.calibration.quadratic
    tilt = tilt.reshape(-1, dim)
    isotropic = np.ptp(tilt, axis=-1).max() == 0
    blocks, rest = divmod(rows, dim)
    pairs = 0 if cosine is None else blocks * dim * (dim - 1) + rest * (rest - 1)
    if not isotropic:
        if pairs or length is not None:
            raise ValueError(
                "feature_map must have independent Gaussian rows if its calibration treats "
                "directions differently: no closed form is known for blocks"
            )
        z = x[..., :, None, :] + y[..., None, :, :]
        if len(tilt) == 1:
            shared = np.exp(log_relative_variance(z, tilt[0], fm.antithetic)) / rows
            return np.asarray(shared)
        heads = [
            log_relative_variance(z[..., h, :, :, :], a, fm.antithetic) for h, a in enumerate(tilt)
        ]
        return np.asarray(np.exp(np.stack(heads, axis=-3)) / rows)
    sign = -1.0 if fm.kind == "trig" else 1.0  # exp(iw.(x - y)) instead of exp(w.(x + y))
    squares = np.sum(x * x, -1)[..., :, None] + np.sum(y * y, -1)[..., None, :]
    s = sign * squares + 2 * (x @ np.swapaxes(y, -1, -2))
    a = tilt[:, :1, None] if fm.num_heads else tilt[0, 0]
    if length is None:
        moment = np.exp(
            dim * np.log1p(-4 * a) - dim / 2 * np.log1p(-8 * a) + 2 * s * (1 - 4 * a) / (1 - 8 * a)
        )
        partner = np.exp(dim * np.log1p(-4 * a) - dim / 2 * np.log1p(-8 * a))
        mean = np.exp(s / 2)

        def product(c: float) -> F64:
            if c == 0:
                return np.asarray(hyp1f1(dim, dim / 2, s / 2))
            from scipy.special import roots_gegenbauer

            nodes, weights = roots_gegenbauer(NODES, (dim - 1) / 2)
            parts = (
                weight * hyp1f1(dim, dim / 2, s / 2 * (1 + c * np.sqrt(1 - node**2)))
                for node, weight in zip(nodes, weights / weights.sum(), strict=True)
            )
            return np.asarray(sum(parts))
    else:
        stretched = length**2 * (1 - 4 * a)
        # Of rows of one length, exp(2 A w.w) is a constant, not made to have the mean 1.
        level = np.exp(2 * a * length**2 + dim / 2 * np.log1p(-4 * a))
        moment = level**2 * hyp0f1(dim / 2, stretched * s)
        partner = level**2
        mean = level * hyp0f1(dim / 2, stretched * s / 4)

        def product(c: float) -> F64:
            return np.asarray(level**2 * hyp0f1(dim / 2, stretched * (1 + c) * s / 2))

    pair = fm.antithetic or fm.kind == "trig"
    if pair:
        moment = (moment + partner) / 2
    total = rows * (moment - mean**2)
    if pairs:
        assert cosine is not None
        together = product(cosine)
        if pair and cosine:
            together = (together + product(-cosine)) / 2
        total = total + pairs * (together - mean**2)
    return np.asarray(np.maximum(total, 0.0) * np.exp(-s) / rows**2)
