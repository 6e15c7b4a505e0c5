"""How far to trust a result: standard errors of outputs, from the spread between features.

Every feature gives an estimate of numerator and denominator of its own.  Groups of them that are
independent are compared: the contributions ``e_b = (num_b - den_b out) / den`` of the groups sum
to zero, and the sum of their squares estimates the variance of the output.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import Call, ErrorBars, by_groups
from favor_np.decay import set_decay
from favor_np.engine import processor
from favor_np.features import FeatureMap, checked
from favor_np.numerics import LN2
from favor_np.variance import structure

Array: TypeAlias = npt.NDArray[Any]

#: Groups that there should be, rows in one at least, and at most if it has several blocks.
GROUPS, LEAST, TILE = 4, 8, 64
#: Values whose variance says how large errors of a column are beside those of the others.
SAMPLE = 256
#: Degrees of freedom with which what all columns have in common counts beside a column's own.
COMMON = 8.0
#: Effective sample sizes below which errors are not to be trusted at all, and from which they are.
LOW, ENOUGH = 30.0, 80.0
#: Rows, of all problems together, at which the bias of maps with rows of one length is measured.
PROBES = 32
NORMAL = 1.959963984540054  # 97.5% quantile
EMPTY = -1e30  # log2 of a feature of no key


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found; ``print`` it for a verdict in words.

    Attributes
    ----------
    output : ndarray, shape (..., L, dv)
        The attention of which the errors are.
    standard_error : ndarray, shape (..., L, dv)
        Of every output: 1.96 of it are the half-width of an interval for 95%.  About as many of
        the true errors are within it where the effective sample size is at least 80; below 30
        it is too small.
    effective_sample_size : ndarray, shape (..., L)
        ``1 / sum p_r**2``, p_r being the part that feature r has in a row's denominator: at most
        the number of features.  0 for a row that sees no key.
    relative_error : float
        Root-mean-square standard error over root-mean-square output.
    warnings : tuple of str
        Reasons not to trust the errors, or the outputs; empty if there are none.
    """

    output: Array
    standard_error: Array
    effective_sample_size: Array
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
                "features (twice as many divide the error by 1.4); or exact_attention. None of it "
                "if the model was trained with this very map: the map belongs to its weights then."
            )
        return "\n".join(lines)


@validation.own_error_state
def diagnose(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: npt.ArrayLike | None = None,
    key_bias: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: npt.ArrayLike | None = None,
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
    key_bias, cu_seqlens, enable_gqa, decay : optional
        As for `favor_attention`.

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
    groups; a single block counts as independent rows, which overestimates its error.  With few
    blocks a single output says little about its own error, so what a row's outputs have in common
    counts beside it.  What all features get wrong alike cannot be seen by comparing them.  Where
    rows of one length ("spherical", "sqrt") bring such a bias, some rows are compared with exact
    attention, and all standard errors enlarged by the same factor.

    All rows share one draw of the features, so far more or fewer than 95% of the errors of one call
    may be within 1.96 standard errors; the share is right in the mean over draws.

    Errors are distances from softmax attention.  A model that was trained with FAVOR+ itself does
    not approximate that: it is tied to its own projection, see `recommend`.

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
    checked(feature_map, ("positive",))
    call = processor().check(
        q,
        k,
        v,
        feature_map,
        causal=causal,
        key_mask=key_mask,
        key_bias=key_bias,
        enable_gqa=enable_gqa,
    )
    if cu_seqlens is not None:
        call.offsets = validation.sequence_offsets(cu_seqlens, call.keys, call.q.shape[-2])
    if decay is not None:
        set_decay(call, decay)
    group, groups, biased = _groups(feature_map)
    output, error = (np.zeros(call.out_shape, call.compute) for _ in range(2))
    sizes = np.zeros(output.shape[:-1], call.compute)
    if output.size and call.keys:
        call.error_bars = _error_bars(call, error, sizes, group, groups - 1)
        call.engine.attend(call, output)
    if groups == 1:
        error[...] = np.inf
    if biased and output.size:
        error *= _bias(feature_map, call, output, error)
    scale = _mean_square(output)
    relative = math.sqrt(_mean_square(error) / scale) if scale else 0.0
    return Diagnosis(
        output.astype(call.result, copy=False),
        error,
        sizes,
        relative,
        _warnings(sizes, relative, feature_map),
    )


@functools.lru_cache(maxsize=64)
def _groups(fm: FeatureMap) -> tuple[int, int, bool]:
    """Return how many rows make an independent group, how many groups, and if all err alike.

    Whole blocks if the rows are orthogonal in blocks; at least eight groups if there are enough
    rows, and then as large ones as a tile of the kernel takes.
    """
    rows, dim = fm.projection.shape[-2:]
    cosine, length = structure(fm.projection.reshape(-1, rows, dim)[0])
    unit = dim if cosine is not None and rows > dim else 1
    units = -(-rows // unit)
    few = max(1, min(LEAST // unit, units // 2))
    group = unit * max(few, min(TILE // unit, units // GROUPS))
    return group, -(-rows // group), length is not None


def _error_bars(call: Call, errors: Array, sizes: Array, group: int, dof: int) -> ErrorBars:
    """Return where errors and sizes go, and what they are made of.

    Few groups know the variance badly; Student's t says by how much errors have to be larger.
    """
    width = call.v.shape[-1]
    sample = np.unique(np.linspace(0, call.keys - 1, min(call.keys, SAMPLE)).astype(np.int64))
    values = call.v.reshape(-1, call.keys, width)[:, sample].astype(np.float64)
    t_factor = t_quantile(dof * max(1, width)) / NORMAL
    return ErrorBars(
        errors.reshape(-1, width),
        sizes.reshape(-1),
        values.var(1).astype(call.compute),
        float(dof),
        COMMON,
        t_factor,
        group,
    )


def t_quantile(dof: int) -> float:
    """Return the 97.5% quantile of Student's t, without the tenth of a second that SciPy takes.

    Its distribution is a finite sum of powers of a cosine (Abramowitz and Stegun 26.7.3, 26.7.4);
    for many degrees of freedom the expansion around the normal one is exact (26.7.5).
    """
    if dof > 200:
        x, n = NORMAL, 1 / dof
        terms = (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96
        third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
        return x + n * (terms[0] + n * (terms[1] + n * third))
    odd, low, high = dof % 2, 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        term = math.sin(middle) * (math.cos(middle) if odd else 1.0)
        total = 0.0
        for i in range(1 + odd, dof, 2):
            total += term
            term *= math.cos(middle) ** 2 * i / (i + 1)
        inside = (middle + total) * 2 / math.pi if odd else total
        low, high = (middle, high) if inside < 0.95 else (low, middle)
    return math.sqrt(dof) * math.tan(middle)


def _mean_square(array: Array) -> float:
    flat = array.reshape(-1)
    return float(flat @ flat) / max(1, flat.size)


def _bias(fm: FeatureMap, call: Call, output: Array, error: Array) -> float:
    """Return by how much errors are larger than what differs between features, at least 1."""
    count, problems = output.shape[-2], math.prod(output.shape[:-2])
    probes = min(count, max(4, PROBES // problems))
    rows = np.unique(np.linspace(0, count - 1, probes).astype(np.int64))
    shape, places, positions = output[..., rows, :].shape, np.arange(call.keys), rows
    of = dataclasses.replace(call, q=call.q[..., rows, :], out_shape=shape)
    if call.grouped:
        of = by_groups(of)
        positions = np.tile(rows, shape[-3] // of.out_shape[-3])
    q, k, v = (x.astype(call.compute, copy=False) for x in (of.q, of.k, of.v))
    logits = fm.scale * (q @ np.swapaxes(k, -1, -2))
    if call.log2_bias is not None:
        logits = logits + (call.log2_bias * LN2).astype(call.compute)[..., None, :]
    if call.causal:
        logits = np.where(positions[:, None] >= places, logits, EMPTY)
    if call.offsets is not None:
        owners = np.searchsorted(call.offsets, places, "right")
        logits = np.where(owners[positions][:, None] == owners, logits, EMPTY)
    if call.mask is not None:
        logits = np.where(call.mask[..., None, :], logits, EMPTY)
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=EMPTY))
    exact = (weights @ v / weights.sum(-1, keepdims=True).clip(1e-30)).reshape(shape)
    predicted = error[..., rows, :]
    known = predicted > 0  # not so where a row sees no key, or but one
    found, total = ((output[..., rows, :] - exact)[known] ** 2).sum(), (predicted[known] ** 2).sum()
    return math.sqrt(max(1.0, found / total)) if total and np.isfinite(found) else 1.0


def _warnings(sizes: Array, relative: float, fm: FeatureMap) -> tuple[str, ...]:
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
