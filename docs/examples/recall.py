"""Recall: pairs of a key and a value, and later keys again, whose values have to be known.

    python docs/examples/recall.py              # 64 pairs among 2,048 tokens
    python docs/examples/recall.py --no-shift   # where no token sees the one before it

Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927). A text begins with the pairs;
after them come keys at random places, and nothing between. A model learns from texts that ask
often, of few pairs first and of twice as many whenever it knows nine in ten; it is tested on others
that ask for each pair once.
"""

import argparse
import time

import numpy as np

from favor_np import nn

KEYS, VALUES = 128, 64
VOCAB = 1 + KEYS + VALUES  # token 0 is nothing
TOKENS = 4096  # of a step


def texts(rng, batch, length, pairs, asked):
    """Return tokens (batch, length) and targets: values where a key is asked for, else -1."""
    tokens = np.zeros((batch, length), np.int64)
    targets = np.full_like(tokens, -1)
    for row, wanted in zip(tokens, targets, strict=True):
        keys = 1 + rng.choice(KEYS, pairs, replace=False)
        values = 1 + KEYS + rng.integers(0, VALUES, pairs)
        row[: 2 * pairs : 2], row[1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + rng.choice(length - 2 * pairs, asked, replace=False)
        which = rng.permutation(np.arange(asked) % pairs)
        row[places], wanted[places] = keys[which], values[which]
    return tokens, targets


def known(logits, targets):
    """Return the share of the keys asked for whose value is the most likely token."""
    return float((logits.argmax(-1) == targets)[targets >= 0].mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--length", type=int, default=2048)
    add("--pairs", type=int, default=64)
    add("--layers", default="E", help="F: random features, E: exact attention (E)")
    add("--depth", type=int, default=1)
    add("--features", type=int, default=64)
    add("--steps", type=int, default=300)
    add("--rate", type=float, default=5e-3)
    add("--no-shift", action="store_true", help="no token sees the one before it")
    add("--every", type=int, default=25, help="steps between looks")
    options = parser.parse_args()
    model = nn.PerformerLM(
        vocab=VOCAB, dim=64, depth=options.depth, heads=2, layers=options.layers,
        num_features=options.features, shift=not options.no_shift,
        rotary="adjacent" if options.no_shift else None,  # or nothing tells what is next to what
    )  # fmt: skip
    params = model.init(np.random.default_rng(0))
    optimizer = nn.AdamW(params)
    rate = nn.warmup_stable_decay(
        options.rate, steps=options.steps, warmup=20, decay=options.steps // 4
    )
    tests = [
        texts(np.random.default_rng((1, i)), 2, options.length, options.pairs, options.pairs)
        for i in range(8)
    ]
    pairs, mean, began = min(4, options.pairs), 0.0, time.process_time()
    for step in range(options.steps):
        length = options.length * pairs // options.pairs
        rng = np.random.default_rng((0, step))
        x, targets = texts(rng, max(TOKENS // length, 1), length, pairs, length // 2 - pairs)
        logits, pullback = model.vjp(params, x, key=(0, step))
        loss, grad = nn.cross_entropy(logits, targets, ignore=-1)
        pullback(grad, optimizer.grads)
        optimizer.step(rate(step), clip=1.0)
        mean += (known(logits, targets) - mean) / 5
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            print(f"step {step + 1}: {pairs} pairs, loss {loss:.3f}, {mean:.1%} known", flush=True)
        if mean > 0.9 and pairs < options.pairs:
            pairs, mean = min(2 * pairs, options.pairs), 0.0
    found = np.mean([known(model.apply(params, x), targets) for x, targets in tests])
    print(
        f"{found:.1%} of {options.pairs} values known among {options.length} tokens, after "
        f"{time.process_time() - began:.0f} s of processors"
    )


if __name__ == "__main__":
    main()
