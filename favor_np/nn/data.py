"""Batches of text, a text that every Python has, and what a model of it should beat."""

from __future__ import annotations

import hashlib
import lzma
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from favor_np import validation
from favor_np.nn.layer import generator
from favor_np.nn.tree import Array

#: Of 256 values of the first byte of a digest, those that hold a run of paragraphs out; and the
#: characters of a run.
HELD_OUT, RUN, FEW = 26, 4096, 64


def windows(
    tokens: Any, length: int, batch: int, *, seed: int = 0
) -> Callable[[int], tuple[Array, Array]]:
    """Return batches of windows of a text, as a function of the step.

    Parameters
    ----------
    tokens : bytes or array_like of int, shape (n,)
        The text.
    length : int
        Tokens of a window.
    batch : int
        Windows of a batch.
    seed : int, default 0
        Of the places where they begin.

    Returns
    -------
    callable
        ``tokens, targets = batches(step)``, each of shape (batch, length): the targets are the
        tokens that follow.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type, or the text is no longer than a window.

    Examples
    --------
    >>> from favor_np import nn
    >>> tokens, targets = nn.windows(b"to be or not to be", 5, 2)(0)
    >>> tokens.shape, bool((tokens[:, 1:] == targets[:, :-1]).all())
    ((2, 5), True)
    """
    if isinstance(tokens, (bytes, bytearray)):
        tokens = np.frombuffer(tokens, np.uint8)
    text = validation.array_of("tokens", tokens)
    if text.ndim != 1 or text.dtype.kind not in "iu":
        raise TypeError(f"tokens must be a row of integers, got {validation.got(text)}")
    length, batch = validation.integer("length", length), validation.integer("batch", batch)
    if len(text) <= length:
        raise ValueError(f"tokens must be more than the {length} of a window, got {len(text)}")
    seed = validation.integer("seed", seed, minimum=0)

    def batches(step: int) -> tuple[Array, Array]:
        places = generator((seed, step)).integers(0, len(text) - length, batch)
        found = text[places[:, None] + np.arange(length + 1)]
        return found[:, :-1], found[:, 1:]

    return batches


def in_order(tokens: Array, length: int, batch: int) -> list[tuple[Array, Array]]:
    """Return all whole windows of a text, one after the other, in batches."""
    length = min(length, len(tokens) - 1)
    count = (len(tokens) - 1) // length
    x, y = (tokens[i : i + count * length].reshape(count, length) for i in (0, 1))
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, count, batch)]


def split(text: str) -> tuple[bytes, bytes]:
    """Return the parts of a text to learn from, and a tenth that is held out.

    Of paragraphs that differ in white space alone one is left; where there are hardly any, lines
    are taken for paragraphs. What is held out are runs of them, some four thousand characters each:
    the digest of the first decides. Bytes that are no UTF-8 come as surrogates, and stay.
    """
    apart = "\n\n"
    kept = _distinct(re.split(r"\n[ \t\r]*\n", text))
    if len(kept) < FEW:
        apart, kept = "\n", _distinct(text.splitlines())
    length = min(RUN, sum(map(len, kept)) // 64)
    parts: tuple[list[str], list[str]] = ([], [])
    room, held_out = 0, False
    for paragraph in kept:
        if room <= 0:
            held_out = hashlib.sha256(_bytes(paragraph)).digest()[0] < HELD_OUT
            room = length
        parts[held_out].append(paragraph)
        room -= len(paragraph)
    learned, rest = (_bytes(apart.join(part)) for part in parts)
    return learned, rest


def _distinct(parts: list[str]) -> list[str]:
    """Return the first of those that differ in white space alone."""
    found = {" ".join(part.split()): part for part in reversed(parts)}
    found.pop("", None)
    return list(found.values())[::-1]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def python_docs() -> str:
    """Return the language reference that comes with Python; its size depends on the version."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def ngram_bits(learned: bytes, held_out: bytes, order: int = 5) -> float:
    """Return the bits a byte that counts of `order` bytes need, smoothed (Witten and Bell 1991)."""
    counts: Counter[bytes] = Counter()
    for size in range(1, order + 1):
        counts.update(learned[i : i + size] for i in range(len(learned) - size + 1))
    totals: Counter[bytes] = Counter()
    kinds: Counter[bytes] = Counter()
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    bits = 0.0
    for i in range(len(held_out)):
        chance = 1 / 256
        for size in range(min(order, i + 1)):
            context = held_out[i - size : i]
            if not totals[context]:
                break
            seen = counts[held_out[i - size : i + 1]] + kinds[context] * chance
            chance = seen / (totals[context] + kinds[context])
        bits -= math.log2(chance)
    return bits / len(held_out)


def xz_bits(learned: bytes, held_out: bytes) -> float:
    """Return the bits a byte by which xz grows when the rest comes behind what was learned from."""
    both, alone = (len(lzma.compress(x, preset=9)) for x in (learned + held_out, learned))
    return 8 * (both - alone) / len(held_out)
