"""Losses: each returns the mean over all targets, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from favor_np import validation
from favor_np.nn import fused
from favor_np.nn.tree import Array


def _pair(output: Any, targets: Any) -> tuple[Array, Array]:
    """Return output and targets of one shape, which is not empty."""
    output, targets = (
        validation.tensor("output", output, 0),
        validation.tensor("targets", targets, 0),
    )
    if output.shape != targets.shape or not output.size:
        raise ValueError(
            f"targets must have the shape {output.shape} of output, not empty, got {targets.shape}"
        )
    return output, targets


def cross_entropy(logits: Any, targets: Any, *, ignore: int | None = None) -> tuple[float, Array]:
    """Return the mean of ``-log softmax(logits)[target]``, in nats, and its gradient.

    Parameters
    ----------
    logits : array_like, shape (..., classes)
        Scores of the classes.
    targets : array_like of int, shape (...)
        The right classes.
    ignore : int, optional
        A target that does not count.

    Returns
    -------
    loss : float
        Mean over the targets that count.
    grad : ndarray
        Its gradient, of the shape of `logits`.

    Raises
    ------
    TypeError, ValueError
        If targets are no integers, out of range, of another shape, or none of them counts.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> loss, grad = nn.cross_entropy(np.zeros((1, 2)), [0])
    >>> round(loss, 4), grad
    (0.6931, array([[-0.5,  0.5]]))
    """
    logits, targets = (
        validation.tensor("logits", logits, 1),
        validation.array_of("targets", targets),
    )
    classes = logits.shape[-1]
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets must hold integers, got {validation.got(targets)}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have shape {logits.shape[:-1]}, got {targets.shape}")
    right = targets.ravel().astype(np.int64)
    counted = np.ones(right.shape, bool) if ignore is None else right != ignore
    total = int(counted.sum())
    if not total:
        raise ValueError("targets must hold at least one that counts, got none")
    wrong = right[counted & ((right < 0) | (right >= classes))]
    if wrong.size:
        raise ValueError(f"targets must be from 0 to {classes - 1}, got {wrong[0]}")
    kind = np.float64 if logits.dtype == np.float64 else np.float32
    scores = validation.contiguous(logits.reshape(-1, classes), np.dtype(kind))
    losses, grad = fused.cross_entropy(scores, np.where(counted, right, -1), 1 / total)
    return float(losses.sum()) / total, grad.reshape(logits.shape)


def mean_squared(output: Any, targets: Any) -> tuple[float, Array]:
    """Return the mean of ``(output - targets) ** 2`` and its gradient.

    Parameters
    ----------
    output, targets : array_like
        Of one shape.

    Returns
    -------
    loss : float
        The mean.
    grad : ndarray
        Its gradient, like `output`.

    Raises
    ------
    TypeError, ValueError
        If shapes differ or are empty.

    Examples
    --------
    >>> from favor_np import nn
    >>> nn.mean_squared([1.0, 2.0], [1.0, 4.0])
    (2.0, array([ 0., -2.]))
    """
    output, targets = _pair(output, targets)
    error = output - targets
    loss = float(np.square(error).mean(dtype=np.float64))
    return loss, (2 / error.size * error).astype(output.dtype)


def gaussian(output: Any, targets: Any) -> tuple[float, Array]:
    """Return minus the mean log-likelihood of normal distributions, and its gradient.

    Parameters
    ----------
    output : array_like, shape (..., 2)
        Means, and logarithms of standard deviations.
    targets : array_like, shape (...)
        What came.

    Returns
    -------
    loss : float
        The mean, with the constant ``log(2 pi) / 2``.
    grad : ndarray
        Its gradient, like `output`.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or are empty.

    Examples
    --------
    >>> from favor_np import nn
    >>> loss, grad = nn.gaussian([[0.0, 0.0]], [1.0])
    >>> round(loss, 4), grad
    (1.4189, array([[-1.,  0.]]))
    """
    output = validation.tensor("output", output, 1)
    if output.shape[-1] != 2:
        raise ValueError(f"output must have shape (..., 2), got {output.shape}")
    mean, targets = _pair(output[..., 0], targets)
    log_scale = output[..., 1]
    z = (targets - mean) * np.exp(-log_scale)
    loss = np.mean(z * z / 2 + log_scale, dtype=np.float64) + np.log(2 * np.pi) / 2
    grad = np.stack([-z * np.exp(-log_scale), 1 - z * z], -1) / z.size
    return float(loss), grad.astype(output.dtype)


def quantile(output: Any, targets: Any, levels: Sequence[float]) -> tuple[float, Array]:
    """Return the mean pinball loss of quantiles and its gradient.

    Parameters
    ----------
    output : array_like, shape (..., n)
        Predicted quantiles.
    targets : array_like, shape (...)
        What came.
    levels : sequence of float, length n
        Which quantiles they are, in (0, 1).

    Returns
    -------
    loss : float
        Mean over all quantiles.
    grad : ndarray
        Its gradient, like `output`.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or are empty, or a level is not between 0 and 1.

    Examples
    --------
    >>> from favor_np import nn
    >>> loss, grad = nn.quantile([[0.0]], [2.0], [0.9])
    >>> round(loss, 4), grad
    (1.8, array([[-0.9]]))
    """
    output, tau = validation.tensor("output", output, 1), np.asarray(levels, np.float64)
    if tau.ndim != 1 or not ((tau > 0) & (tau < 1)).all():
        raise ValueError(f"levels must be between 0 and 1, got {levels!r}")
    if output.shape[-1] != len(tau):
        raise ValueError(f"output must have shape (..., {len(tau)}), got {output.shape}")
    output, wanted = _pair(output, np.broadcast_to(np.asarray(targets)[..., None], output.shape))
    error = wanted - output
    slope = np.where(error > 0, tau, tau - 1)
    loss = float(np.mean(slope * error, dtype=np.float64))
    return loss, (-slope / error.size).astype(output.dtype)


def qlike(output: Any, targets: Any) -> tuple[float, Array]:
    """Return the mean of ``variance / h + log(h)`` for predicted log-variances, and its gradient.

    The loss by which forecasts of volatility are ranked as by the true variance, even if the
    targets are noisy measurements of it (Patton 2011).

    Parameters
    ----------
    output : array_like
        Predicted ``log(h)``.
    targets : array_like
        Measured variances, such as squared returns; zeros are welcome.

    Returns
    -------
    loss : float
        The mean.
    grad : ndarray
        Its gradient, like `output`.

    Raises
    ------
    TypeError, ValueError
        If shapes differ or are empty, or a target is negative.

    Examples
    --------
    >>> from favor_np import nn
    >>> nn.qlike([0.0], [3.0])
    (3.0, array([-2.]))
    """
    output, targets = _pair(output, targets)
    if (targets < 0).any():
        raise ValueError(f"targets must be at least 0, got {targets.min()}")
    ratio = targets * np.exp(-output)
    loss = float(np.mean(ratio + output, dtype=np.float64))
    return loss, ((1 - ratio) / ratio.size).astype(output.dtype)
