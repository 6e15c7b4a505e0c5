"""Bias and decay: what the weight of a key is multiplied with, as one number a key, in log2.

Only ratios of weights count.  So instead of making all earlier keys fall at each token, decay
raises each key above those before it.
"""

from __future__ import annotations

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

    @property
    def _start(self) -> Array | None: ...

    def _fits(
        self, offsets: Array | None, decay: object = None, *, causal: bool = ..., gated: bool = ...
    ) -> None: ...


class Fade(NamedTuple):
    """By how much, in log2, the first keys of states have faded: a whole part, and a fraction."""

    whole: Array
    fraction: Array

    def plus(self, more: Array | float) -> Fade:
        """Return what it is after more of it."""
        carry, fraction = np.divmod(self.fraction + more, 1.0)
        return Fade(self.whole + carry, fraction)


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


def totals(gates: Array, offsets: Array | None) -> Array:
    """Return by how much each sequence makes the keys before it fade: (..., sequences)."""
    begin, end = bounds(offsets, gates.shape[-1])
    last: Array = faded(gates, offsets)[..., np.maximum(end - 1, 0)]
    return np.where(end > begin, last, 0)


def raised(
    rates: Array | None,
    gates: Array | None,
    start: Array | None,
    length: int,
    offsets: Array | None = None,
) -> Array | None:
    """Return by how much decay raises each key: (..., length); None if it raises none.

    `rates` (...) are log2 of a constant decay, `gates` (..., length) those of one a token, `start`
    (..., sequences) what the first key of each sequence is raised by.
    """
    begin, end = bounds(offsets, length)
    lengths, found = end - begin, None
    if gates is not None:
        found = faded(gates, offsets)
    elif rates is not None:
        found = rates[..., None] * (np.arange(length) - np.repeat(begin, lengths))
    if start is not None:
        start = np.repeat(start, lengths, -1) if len(lengths) > 1 or length != 1 else start
        found = start if found is None else found + start
    return found


def together(bias: Array | None, lifted: Array | None) -> Array | None:
    """Return in log2 what a bias, which is finite, and decay make of the weights together."""
    if bias is None:
        return None if lifted is None else np.ascontiguousarray(lifted)
    bias = bias.astype(np.float64) * LOG2E
    return np.ascontiguousarray(bias if lifted is None else bias + lifted)


def gradient_of(of_bias: Array, gates: Array, offsets: Array | None) -> Array:
    """Return the gradient of factors a token from that of the bias: both (..., L).

    A factor lowers its own key's bias and all after it, which only later queries see: its gradient
    depends on no cotangent before it.
    """
    total = of_bias.astype(np.float64)
    for begin, end in zip(*bounds(offsets, total.shape[-1]), strict=True):
        own = total[..., begin:end]
        np.cumsum(own[..., ::-1], -1, out=own[..., ::-1])
    result: Array = -total / gates
    return result


def set_decay(call: Call, value: object, before: Fading | None = None) -> None:
    """Check what of a call makes earlier keys fade, and raise its keys by it."""
    batch, start, rates = call.state_shape, None, None
    ordered = call.causal or call.q.shape[-2] == 0  # or keys are folded only
    if value is not None:
        found = validation.decay_of(value, causal=ordered)
        if found.ndim == len(batch) + 1:
            call.gates, value = found, None
        else:
            rates = validation.decay_rates(found, batch)
    if before is not None:
        before._fits(call.offsets, value, causal=ordered, gated=call.gates is not None)
        rates, start = before._rates, before._start
    if rates is None and call.gates is None and start is None:
        return
    slots = 1 if call.offsets is None else len(call.offsets) - 1
    if rates is not None and before is not None:
        rates = rates.reshape(-1, slots)[:, 0]
    call.decay_rates = rates
    if rates is not None:
        rates = rates.reshape(batch)
        validation.decay_span(rates.max(initial=0.0) * call.keys, call.keys)
    gates = None
    if call.gates is not None:
        gates = validation.gates_of(call.gates, batch, call.keys)
        validation.decay_span(gates.sum(-1).max(initial=0.0), call.keys)
    if start is not None:
        start = start.reshape(*batch, slots)
    lifted = raised(rates, gates, start, call.keys, call.offsets)
    call.lifts = together(call.key_bias, lifted)
