"""Bias and decay: what the weight of a key is multiplied with, as one number a key, in log2.

Only ratios of weights count.  So instead of making all earlier keys fall at each token, decay
raises each key above those before it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.numerics import LOG2E

if TYPE_CHECKING:
    from favor_np.call import Call

Array: TypeAlias = npt.NDArray[Any]


class Fading(Protocol):
    """What a state says of how its keys fade."""

    @property
    def _rates(self) -> Array | None: ...

    def _fits(
        self, offsets: Array | None, decay: object = None, *, causal: bool = ..., gated: bool = ...
    ) -> None: ...


class Fade(NamedTuple):
    """By how much, in log2, the first keys of states have faded: a whole part, and a fraction."""

    whole: Array
    fraction: Array

    def plus(self, more: Fade) -> Fade:
        """Return what it is after more of it."""
        carry, fraction = np.divmod(self.fraction + more.fraction, 1.0)
        return Fade(self.whole + more.whole + carry, fraction)


def bounds(offsets: Array | None, length: int) -> tuple[Array, Array]:
    """Return where sequences begin and end: packed ones, or the only one."""
    if offsets is None:
        return np.array([0]), np.array([length])
    return offsets[:-1], offsets[1:]


def faded(gates: Array, offsets: Array | None) -> Array:
    """Return by how much each token has made the keys before its sequence fade; gates in log2."""
    total = gates.copy()
    for begin, end in zip(*bounds(offsets, gates.shape[-1]), strict=True):
        np.cumsum(total[..., begin:end], -1, out=total[..., begin:end])
    return total


def raise_by(call: Call, start: Array | None) -> None:
    """Raise the keys of a call by what those before them have faded: a number for each slot."""
    if start is None or not call.keys:
        return
    begin, end = bounds(call.offsets, call.keys)
    first = start.reshape(*call.state_shape, len(begin))
    if len(begin) != call.keys or (end - begin).max() > 1:
        first = np.repeat(first, end - begin, -1)
    _add(call, first)


def _add(call: Call, by: Array) -> None:
    """Raise the keys of a call by so much more."""
    call.log2_bias = np.ascontiguousarray(by if call.log2_bias is None else call.log2_bias + by)


def in_log2(bias: Array) -> Array:
    """Return a bias, which is finite, in log2; what is too low to matter is raised to a limit."""
    bias = np.maximum(bias.astype(np.float64), -validation.LARGEST_BIAS / LOG2E) * LOG2E
    return np.ascontiguousarray(bias)


def gradient_of(
    call: Call, of_bias: Array, *, state: bool = False, of_after: Array | None = None
) -> Array:
    """Return the gradient of factors a token from that of the bias: both (..., L).

    A factor lowers its own key's bias and all after it, which only later queries see: its gradient
    depends on no cotangent before it.  The first multiplies nothing but a `state`, if there is one.
    It lowers the state at the end, too: `of_after` is the gradient of that by its logarithm, one a
    sequence.

    These sums cancel all but what passes the token.  Where its factor is so small that only their
    rounding is left, which divided by the factor would be huge, the gradient is 0.
    """
    assert call.gates is not None
    total = -of_bias.astype(np.float64)
    rounding = np.square(total)
    begin, end = bounds(call.offsets, total.shape[-1])
    for first, last in zip(begin, end, strict=True):
        for x in (total[..., first:last], rounding[..., first:last]):
            np.cumsum(x[..., ::-1], -1, out=x[..., ::-1])
        if not state:
            total[..., first : min(first + 1, last)] = 0
    if of_after is not None:
        total += np.repeat(of_after.reshape(*total.shape[:-1], len(begin)), end - begin, -1)
    total[np.abs(total) <= 16 * np.finfo(call.compute).eps * np.sqrt(rounding)] = 0
    with np.errstate(over="ignore"):
        result: Array = total / call.gates.astype(np.float64)
    return result


def set_decay(call: Call, value: object, before: Fading | None = None) -> None:
    """Check what of a call makes earlier keys fade, and raise its keys by it."""
    batch, rates = call.state_shape, None
    ordered = call.causal or call.q.shape[-2] == 0  # or keys are folded only
    if value is not None:
        found = validation.decay_of(value, causal=ordered)
        if found.ndim == len(batch) + 1:
            call.gates, value = found, None
        else:
            rates = validation.decay_rates(found, batch)
    if before is not None:
        before._fits(call.offsets, value, causal=ordered, gated=call.gates is not None)
        rates = before._rates
        if rates is not None:  # of every sequence the same
            rates = rates.reshape(math.prod(batch), -1)[:, 0] if rates.size else rates[:0]
    call.decay_rates = rates
    begin, end = bounds(call.offsets, call.keys)
    if rates is not None:
        validation.decay_span(rates.max(initial=0.0) * call.keys, call.keys)
        position = np.arange(call.keys) - np.repeat(begin, end - begin)
        _add(call, rates.reshape(*batch, 1) * position)
    if call.gates is not None:
        gates = validation.gates_of(call.gates, batch, call.keys)
        validation.decay_span(gates.sum(-1).max(initial=0.0), call.keys)
        found = faded(gates, call.offsets)
        _add(call, found)
        if call.keys:
            call.faded = np.where(end > begin, found[..., np.maximum(end - 1, 0)], 0).ravel()
