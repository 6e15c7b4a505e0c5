"""Text from a language model, token by token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from favor_np import validation
from favor_np.nn.layer import generator
from favor_np.nn.linear import tokens_of
from favor_np.nn.tree import Array, Params

if TYPE_CHECKING:
    from favor_np.nn.models import PerformerLM

#: Rows of a prompt that are read at a time: it may be longer than memory has logits for.
PIECE = 1024


def generate(
    model: PerformerLM,
    params: Params,
    prompt: Any,
    length: int,
    choice: tuple[float, int | None, int],
) -> Array:
    """Return the tokens that follow a prompt; `choice` is temperature, top_k and seed."""
    temperature, top_k, seed = choice
    if isinstance(prompt, (bytes, bytearray)):
        prompt = np.frombuffer(prompt, np.uint8)
    tokens = tokens_of("prompt", prompt, model.vocab)
    if tokens.ndim not in (1, 2):
        raise ValueError(f"prompt must have shape (L,) or (batch, L), got {tokens.shape}")
    length = validation.integer("length", length, minimum=0)
    most = model.length - tokens.shape[-1] + 1  # the last token is not read
    if model.positions == "learned" and length > most:
        raise ValueError(
            f"length must be at most {most} after {tokens.shape[-1]} tokens: the model has learned "
            f"{model.length} positions, got {length}"
        )
    seed = validation.integer("seed", seed, minimum=0)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None:
        top_k = min(validation.integer("top_k", top_k), model.vocab)
    batch, state = np.atleast_2d(tokens), dict[str, Any]()
    for start in range(0, batch.shape[1], PIECE):
        logits = model.extend(params, state, batch[:, start : start + PIECE])
    found = np.empty((len(batch), length), np.min_scalar_type(model.vocab - 1))
    step = model.prepare(params)
    for i in range(length):
        chance = generator((seed, i)).random(len(batch))
        found[:, i] = choose(logits[:, -1], temperature, top_k, chance)
        if i + 1 < length:
            logits = step(state, found[:, i, None])
    return found.reshape(*tokens.shape[:-1], length)


def choose(logits: Array, temperature: float, top_k: int | None, chance: Array) -> Array:
    """Return a token for each row of logits, by a number from [0, 1) each."""
    if not np.isfinite(logits).all():
        raise FloatingPointError("the logits are not finite")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.astype(np.float64)
    if top_k is not None:
        least = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits[logits < least] = -np.inf
    with np.errstate(over="ignore", under="ignore"):
        below = (logits - logits.max(-1, keepdims=True)) / temperature
        weights = np.exp(below).cumsum(-1)
    reached = weights > chance[:, None] * weights[:, -1:]
    return reached.argmax(-1)
