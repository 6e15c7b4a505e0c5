"""Advice: which feature map, with how many features, or exact attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.attention import favor_attention
from favor_np.exact import exact_attention
from favor_np.features import F64, FeatureMap, feature_map
from favor_np.variance import kernel_variance
from favor_np.weights import attention_weights

Array: TypeAlias = npt.NDArray[Any]

#: Numbers of features that are tried.
FEATURES = (64, 128, 256, 512, 1024, 2048, 4096)
#: Draws of the projection over which the error is averaged.
DRAWS = 3
#: Tokens and heads on which errors are measured, at most.
TOKENS, HEADS = 256, 4
#: Lengths at which times are measured, at most; they grow like L and L**2 from there.
FAVOR_LENGTH, EXACT_LENGTH = 4096, 1024
#: What a target is missed by, with all features, before a closed form says so without a try.
HOPELESS = 30.0


@dataclasses.dataclass(frozen=True, eq=False)
class Recommendation:
    """What `recommend` advises; ``print`` it for the reason.

    Attributes
    ----------
    exact : bool
        Whether to use `exact_attention`.
    feature_map : FeatureMap or None
        The calibrated map to use otherwise.
    num_features : int or None
        Its number of features.
    predicted_error : float
        Root-mean-square error of outputs over root-mean-square output, for values that are
        independent of queries and keys.  0 if `exact`.
    seconds, exact_seconds : float
        For one call with as many tokens and heads as the data, float32, of values with as many
        columns as keys: of what is advised, and of exact attention.
    reason : str
        Why.
    """

    exact: bool
    feature_map: FeatureMap | None
    num_features: int | None
    predicted_error: float
    seconds: float
    exact_seconds: float
    reason: str

    def __str__(self) -> str:
        """Say what to use, why, and for which weights."""
        what = "exact_attention" if self.exact else f"{self.num_features} features, calibrated"
        return (
            f"Use {what}: {self.reason}. That is for weights trained with softmax attention; those "
            "trained with random features keep the feature map that they were trained with."
        )


@validation.own_error_state
def recommend(
    q: npt.ArrayLike, k: npt.ArrayLike, *, target_error: float = 0.1, causal: bool = False
) -> Recommendation:
    """Choose between feature maps and exact attention for data like this.

    One half of the tokens calibrates maps, the other measures their error: every second one, or,
    if `causal`, the first half, of which the map then knows nothing but the past.

    Parameters
    ----------
    q : array_like, shape (..., L, d)
        Queries, as many as there will be.
    k : array_like, shape (..., L_k, d)
        Keys.  Axis -3 of either, where there is one, holds the heads: each is calibrated.
    target_error : float, default 0.1
        Largest root-mean-square error of the outputs over their root-mean-square.
    causal : bool, default False
        What kind of attention it is for.

    Returns
    -------
    Recommendation
        The map with the fewest features that reaches the target, or exact attention if none
        below 4096 does, or if exact attention is faster at this length.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, data are not finite, there are fewer than 4 tokens, or
        `target_error` is not positive.

    Notes
    -----
    Errors are distances from softmax attention, which is what the weights of most
    models expect. A model that was trained with FAVOR+ itself is tied to the projection it was
    trained with, and nearness to softmax is no merit there: one had a loss of 0.0003 with its own
    map, 0.19 with one of another seed, and 0.081 with exact attention.  The projection belongs to
    such weights: save it with them (`FeatureMap.projection`, `FeatureMap.from_projection`).

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> q, k = np.random.default_rng(0).standard_normal((2, 500, 16))
    >>> print(favor_np.recommend(4 * q, 4 * k, target_error=0.01))
    Use exact_attention: ...
    """
    target = validation.positive_float("target_error", target_error)
    causal = validation.flag("causal", causal)
    q, k = validation.tensor("q", q), validation.tensor("k", k)
    dim = q.shape[-1]
    validation.calibration_data(q, k, dim, None)
    count = min(q.shape[-2], k.shape[-2])
    if count < 4:
        raise ValueError(f"q and k must hold at least 4 tokens, got {count}")
    known, new = _halves(q, causal), _halves(k, causal)
    (q_old, q_new), (k_old, k_new) = known, new
    q_new, k_new = (x[..., :HEADS, :, :] if x.ndim > 2 else x for x in (q_new, k_new))
    q_new, k_new = (_thin(x).astype(np.float64) for x in (q_new, k_new))
    positions = np.arange(q_new.shape[-2]) if causal else None
    exact_seconds = _seconds(None, q, k, causal)

    def advise_exact(reason: str) -> Recommendation:
        return Recommendation(True, None, None, 0.0, exact_seconds, exact_seconds, reason)

    expected = _closed_form(q_new, k_new, q_old, k_old, max(FEATURES))
    if expected > HOPELESS * target:
        return advise_exact(
            f"with {max(FEATURES)} features the error of a weight is still {expected:.2g} of it "
            "(closed form)"
        )
    exact = _softmax(q_new, k_new, dim**-0.5, positions)
    size = math.sqrt(np.sum(exact**2))
    each = _seconds(feature_map("positive", dim, 256), q, k, causal) / 256
    needed = float(min(FEATURES))
    for features in FEATURES:
        if features < needed / 2:  # the last try says that it takes more
            continue
        if features * each > exact_seconds:
            return advise_exact(
                f"at this length it is faster than the {features} features or more that an error "
                f"of {target:.2g} needs"
            )
        maps = [
            feature_map("positive", dim, features, rng=seed).calibrate(_thin(q_old), _thin(k_old))
            for seed in range(max(1, min(DRAWS, 1024 // features)))
        ]
        squares = [
            np.sum((attention_weights(q_new, k_new, _first(fm), positions=positions) - exact) ** 2)
            for fm in maps
        ]
        measured = math.sqrt(np.mean(squares)) / size
        if measured <= target:
            break
        needed = features * (measured / target) ** 2
        if needed > 4 * max(FEATURES):
            break
    if measured > target:
        return advise_exact(
            f"{features} features leave an error of {measured:.2g}, and about {needed:.0g} would "
            f"be needed for {target:.2g}"
        )
    seconds = _seconds(maps[0], q, k, causal)
    return Recommendation(
        False,
        maps[0],
        features,
        measured,
        seconds,
        exact_seconds,
        f"an error of {measured:.2g} is expected, in {seconds:.2g} s instead of "
        f"{exact_seconds:.2g} s",
    )


def _halves(x: Array, causal: bool) -> tuple[Array, Array]:
    if causal:
        middle = x.shape[-2] // 2
        return x[..., :middle, :], x[..., middle:, :]
    return x[..., ::2, :], x[..., 1::2, :]


def _thin(x: Array) -> Array:
    """Return at most TOKENS rows, evenly spaced."""
    return x[..., :: -(-x.shape[-2] // TOKENS), :]


def _first(fm: FeatureMap) -> FeatureMap:
    """Return the map of the first HEADS heads."""
    if fm.num_heads is None or fm.num_heads <= HEADS:
        return fm
    assert fm.calibration is not None
    parts = [None if x is None else x[:HEADS] for x in fm.calibration]
    new = type(fm.calibration)(*parts)  # type: ignore[arg-type]  # the change may be None
    return dataclasses.replace(fm, calibration=new)


def _softmax(q: Array, k: Array, scale: float, positions: Array | None) -> F64:
    logits = scale * (q @ np.swapaxes(k, -1, -2))
    if positions is not None:
        logits = np.where(positions[:, None] >= np.arange(k.shape[-2]), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _closed_form(q: Array, k: Array, q_old: Array, k_old: Array, features: int) -> float:
    """Return the typical relative standard deviation of a weight, of maps that can tell it."""
    fm = feature_map("positive", q.shape[-1], features)
    q, k = (x.reshape(-1, x.shape[-2], x.shape[-1])[0] for x in (q, k))
    q_old, k_old = (x.reshape(-1, x.shape[-2], x.shape[-1])[0] for x in (q_old, k_old))
    fm = fm.calibrate(q_old, k_old, "aderf")
    with np.errstate(over="ignore", invalid="ignore"):
        variance = kernel_variance(q, k, fm, relative=True)
    return math.sqrt(float(np.median(np.nan_to_num(variance, nan=np.inf))))


def _seconds(fm: FeatureMap | None, q: Array, k: Array, causal: bool) -> float:
    """Return the time of one call on data of these shapes; of exact attention without a map."""
    from favor_np.measure import best_time  # which imports more than `import favor_np` may

    longest = EXACT_LENGTH if fm is None else FAVOR_LENGTH
    shapes = [(*x.shape[:-2], min(x.shape[-2], longest), x.shape[-1]) for x in (q, k)]
    if causal:
        shapes = [(*shape[:-2], min(s[-2] for s in shapes), shape[-1]) for shape in shapes]
    some_q, some_k = (np.zeros(shape, np.float32) for shape in shapes)

    def call() -> Array:
        if fm is None:
            return exact_attention(some_q, some_k, some_k, causal=causal)
        return favor_attention(some_q, some_k, some_k, fm, causal=causal)

    call()  # compiles
    lengths = [max(x.shape[-2], 1) / max(s[-2], 1) for x, s in zip((q, k), shapes, strict=True)]
    growth = math.prod(lengths) if fm is None else max(lengths)
    return best_time(call) * float(growth)
