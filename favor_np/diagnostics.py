"""How far to trust a result: standard errors of outputs, from the spread between features.

Every feature gives an estimate of numerator and denominator of its own.  Groups of them that are
independent are compared: the contributions ``e_b = (num_b - den_b out) / den`` of the groups sum
to zero, and the sum of their squares estimates the variance of the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.features import F64, FeatureMap
from favor_np.variance import structure

Array: TypeAlias = npt.NDArray[Any]

CHUNK = 128  # positions whose features are held at once
GROUPS = 16  # that independent rows are compared in
#: Degrees of freedom with which what all columns have in common counts beside a column's own.
COMMON = 8.0
#: Effective sample sizes below which errors are not to be trusted at all, and from which they are.
LOW, ENOUGH = 30.0, 80.0
#: Rows at which the bias of maps with rows of one length is measured.
PROBES = 32
EMPTY = -1e30  # log2 of a feature of no key


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found; ``print`` it for a verdict in words.

    Attributes
    ----------
    output : ndarray, shape (..., L, dv)
        The attention of which the errors are.
    standard_error : ndarray of float64, shape (..., L, dv)
        Of every output: 1.96 of it are the half-width of an interval for 95%.  About as many of
        the true errors are within it where the effective sample size is at least 80; below 30
        it is too small.
    effective_sample_size : ndarray of float64, shape (..., L)
        ``1 / sum p_r**2``, p_r being the part that feature r has in a row's denominator: at most
        the number of features.  0 for a row that sees no key.
    relative_error : float
        Root-mean-square standard error over root-mean-square output.
    warnings : tuple of str
        Reasons not to trust the errors, or the outputs; empty if there are none.
    """

    output: Array
    standard_error: F64
    effective_sample_size: F64
    relative_error: float
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Say in words whether to trust the result, and what to do."""
        sizes = self.effective_sample_size
        seen = sizes[sizes > 0]
        if not seen.size:
            return "There is no row that sees a key, so there is nothing to estimate."
        low, middle = np.quantile(seen, [0.05, 0.5])
        lines = [
            f"Standard error {self.relative_error:.2g} of the output (root mean square); effective "
            f"sample size {middle:.0f} in the median row, {low:.0f} at the 5% quantile."
        ]
        if not self.warnings and low >= ENOUGH:
            lines.append(
                "The error bars can be trusted: about 95% of errors are within 1.96 of them."
            )
        elif not self.warnings:
            lines.append("The error bars are about right, and too small in rows of small size.")
        else:
            lines += [f"Warning: {text}." for text in self.warnings]
            lines.append(
                "What helps: calibrate the map on data like this (FeatureMap.calibrate); more "
                "features (twice as many divide the error by 1.4); or exact_attention."
            )
        return "\n".join(lines)


def diagnose(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: npt.ArrayLike | None = None,
) -> Diagnosis:
    """Estimate the errors of FAVOR+ attention, without computing exact attention.

    Parameters
    ----------
    q : array_like, shape (..., L, d)
        Queries: all of them, or a sample.
    k : array_like, shape (..., L_k, d)
        Keys.
    v : array_like, shape (..., L_k, dv)
        Values.
    feature_map : FeatureMap
        Of kind "positive", calibrated or not.
    causal : bool, default False
        Each row sees the keys up to its own.
    key_mask : array_like of bool, shape (..., L_k), optional
        True where a key takes part.

    Returns
    -------
    Diagnosis
        Outputs, standard errors and effective sample sizes, and a verdict.

    Raises
    ------
    TypeError, ValueError
        As `favor_attention`, and for a map that is not of kind "positive".

    Notes
    -----
    Rows of orthogonal and simplex projections are compared by whole blocks of d, others in
    16 groups; a single block counts as independent rows, which overestimates its error.  With few
    blocks a single output says little about its own error, so what a row's outputs have in common
    counts beside it.  Errors that all features share are in no difference between them.  Where
    rows of one length ("spherical", "sqrt") bring such a bias, 32 rows are compared with exact
    attention, and all standard errors enlarged by the same factor.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 200, 16))
    >>> fm = favor_np.feature_map("positive", dim=16, num_features=512)
    >>> print(favor_np.diagnose(0.3 * q, 0.3 * k, v, fm))
    Standard error 0.01... of the output (root mean square); effective sample size ...
    The error bars can be trusted: about 95% of errors are within 1.96 of them.
    """
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"feature_map must be a FeatureMap, got {validation.got(feature_map)}")
    if feature_map.kind != "positive":
        raise ValueError(f"feature_map must be of kind 'positive', got {feature_map.kind!r}")
    call = validation.attention_call(
        q, k, v, key_mask=key_mask, causal=causal, grouped=False, check_finite=False,
        num_threads=None, dim=feature_map.dim, heads=feature_map.num_heads,
    )  # fmt: skip
    groups = _groups(feature_map)
    shape = call.out_shape
    output, variance = np.zeros(shape), np.zeros(shape)
    sizes = np.zeros(shape[:-1])
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for rows, parts, shares in _rows(feature_map, call, groups):
            den = shares.sum(-1, keepdims=True)
            seen = den > 0
            safe = np.where(seen, den, 1.0)
            here = sum(num for num, _ in parts) / safe
            square = sum(((num - part * here) / safe) ** 2 for num, part in parts)
            output[..., rows, :] = here
            variance[..., rows, :] = square * (len(groups) / (len(groups) - 1))
            sizes[..., rows] = (seen[..., 0]) / np.sum((shares / safe) ** 2, -1).clip(1e-300)
    error = _with_common(variance, call, len(groups) - 1)
    rows_of_map = feature_map.projection.reshape(-1, *feature_map.projection.shape[-2:])
    if structure(rows_of_map[0])[1] is not None:
        error *= _bias(feature_map, call, output, error)
    scale = math.sqrt(np.mean(output**2)) if output.size else 0.0
    relative = math.sqrt(np.mean(error**2)) / scale if scale else 0.0
    return Diagnosis(
        output.astype(call.result), error, sizes, relative, _warnings(sizes, relative, feature_map)
    )


def _groups(fm: FeatureMap) -> list[npt.NDArray[np.int64]]:
    """Return the features of each group: rows that are independent of all others, and partners."""
    rows, dim = fm.projection.shape[-2:]
    cosine, _ = structure(fm.projection.reshape(-1, rows, dim)[0])
    if cosine is not None and rows > dim:
        parts = np.array_split(np.arange(rows), np.arange(dim, rows, dim))
    else:
        parts = np.array_split(np.arange(rows), max(2, min(GROUPS, rows)))
    return [np.concatenate([part, part + rows]) if fm.antithetic else part for part in parts]


def _rows(
    fm: FeatureMap, call: validation.AttentionCall, groups: list[npt.NDArray[np.int64]]
) -> Iterator[tuple[slice, list[tuple[F64, F64]], F64]]:
    """Yield, chunk by chunk, numerators and denominators of the groups, and those of all features.

    The state (c, S, z) is that of `AttentionState`, in float64 and with c in nats.
    """
    batch = call.state_shape
    c = np.full((*batch, 1, fm.num_features), EMPTY)
    z = np.zeros((*batch, 1, fm.num_features))
    S = np.zeros((*batch, fm.num_features, call.v.shape[-1]))
    starts = range(0, call.keys, CHUNK)
    for start in starts:
        rows = slice(start, start + CHUNK)
        log_k, value = _log_keys(fm, call, rows), call.v[..., rows, :].astype(np.float64)
        top = np.maximum(c, log_k.max(-2, keepdims=True))
        keep, phi_k = np.exp(c - top), np.exp(log_k - top)
        c, z, S = top, z * keep, S * np.swapaxes(keep, -1, -2)
        if call.causal:
            phi_q = _phi_queries(fm, call, rows, c)
            shares = phi_q * (z + np.cumsum(phi_k, axis=-2))
            parts = []
            for group in groups:
                mine = phi_q[..., group]
                scores = np.tril(mine @ np.swapaxes(phi_k[..., group], -1, -2))
                num = mine @ S[..., group, :] + scores @ value
                parts.append((num, shares[..., group].sum(-1, keepdims=True)))
            yield rows, parts, shares
        z = z + phi_k.sum(-2, keepdims=True)
        S = S + np.swapaxes(phi_k, -1, -2) @ value
    for start in range(0, 0 if call.causal else call.q.shape[-2], CHUNK):
        rows = slice(start, start + CHUNK)
        phi_q = _phi_queries(fm, call, rows, c)
        shares = phi_q * z
        yield (
            rows,
            [
                (phi_q[..., group] @ S[..., group, :], shares[..., group].sum(-1, keepdims=True))
                for group in groups
            ],
            shares,
        )


def _log_keys(fm: FeatureMap, call: validation.AttentionCall, rows: slice) -> F64:
    y, h = fm._projections(call.k[..., rows, :].astype(np.float64), keys=True)
    bias = fm._of_head(fm.bias)
    logs = np.concatenate([bias + y, bias - y], -1) - h if fm.antithetic else bias + y - h
    if call.mask is not None:
        logs = np.where(call.mask[..., rows, None], logs, EMPTY)
    return np.broadcast_to(logs, (*call.state_shape, *logs.shape[-2:]))


def _phi_queries(fm: FeatureMap, call: validation.AttentionCall, rows: slice, c: F64) -> F64:
    """Return the features of queries in units of those of keys, the largest of a row being 1."""
    y, _ = fm._projections(call.q[..., rows, :].astype(np.float64))
    logs = (np.concatenate([y, -y], -1) if fm.antithetic else y) + c
    return np.asarray(np.exp(logs - logs.max(-1, keepdims=True)))


def _with_common(variance: F64, call: validation.AttentionCall, freedom: int) -> F64:
    """Return standard errors: of each column its own and, scaled to it, what all have in common.

    Few groups know the variance badly; Student's t says by how much errors have to be larger.
    """
    from scipy.special import stdtrit

    sizes = call.v.astype(np.float64).var(-2, keepdims=True) if call.keys else np.ones(1)
    scaled = np.divide(variance, sizes, out=np.zeros_like(variance), where=sizes > 0)
    common = sizes * scaled.mean(-1, keepdims=True)
    wider = stdtrit(freedom * max(1, call.v.shape[-1]), 0.975) / stdtrit(np.inf, 0.975)
    mean = (freedom * variance + COMMON * common) / (freedom + COMMON)
    return np.asarray(wider * np.sqrt(mean))


def _bias(fm: FeatureMap, call: validation.AttentionCall, output: F64, error: F64) -> float:
    """Return by how much errors are larger than what differs between features, at least 1."""
    count = output.shape[-2]
    rows = np.unique(np.linspace(0, count - 1, min(count, PROBES)).astype(np.int64))
    q, k, v = (x.astype(np.float64) for x in (call.q[..., rows, :], call.k, call.v))
    logits = fm.scale * (q @ np.swapaxes(k, -1, -2))
    if call.causal:
        logits = np.where(rows[:, None] >= np.arange(call.keys), logits, EMPTY)
    if call.mask is not None:
        logits = np.where(call.mask[..., None, :], logits, EMPTY)
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=EMPTY))
    exact = weights @ v / weights.sum(-1, keepdims=True).clip(1e-300)
    predicted = error[..., rows, :]
    known = predicted > 0  # not so where a row sees no key, or but one
    found, total = ((output[..., rows, :] - exact)[known] ** 2).sum(), (predicted[known] ** 2).sum()
    return math.sqrt(max(1.0, found / total)) if total and np.isfinite(found) else 1.0


def _warnings(sizes: F64, relative: float, fm: FeatureMap) -> tuple[str, ...]:
    found = []
    seen = sizes[sizes > 0]
    low = np.mean(seen < LOW) if seen.size else 0.0
    if low > 0.05:
        found.append(
            f"{low:.0%} of the rows have an effective sample size below {LOW:.0f} (of "
            f"{fm.num_features} features): their errors are larger than they seem"
        )
    if relative > 0.3:
        found.append(f"the standard error is {relative:.0%} of the output")
    return tuple(found)
