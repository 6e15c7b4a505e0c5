"""Digits of scikit-learn, read pixel by pixel, and told apart.

    pip install scikit-learn
    python docs/examples/digits.py

An image is a sequence of 64 pixels, each one of 17 shades. What a Performer makes of them is
averaged, and a linear layer tells which digit it was. A fifth of the images is for the test.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

from favor_np import nn


@dataclass(frozen=True)
class Mean(nn.Layer):
    """The mean row of each sequence."""

    def vjp(self, params, x, *, key=None):
        length = x.shape[-2]
        return x.mean(-2), lambda grad, grads: np.repeat(grad[..., None, :] / length, length, -2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = images.astype(np.int64)[order], digits[order]
    tested = len(x) // 5
    model = nn.Chain((
        nn.Embedding(17, 64),
        nn.LearnedPositions(64, 64, std=0.1),
        nn.Performer(dim=64, depth=2, heads=2, num_features=64, dropout=0.1),
        Mean(),
        nn.Linear(64, 10),
    ))  # fmt: skip
    params = model.init(np.random.default_rng(0))
    count = len(x) - tested
    steps = options.epochs * count // options.batch

    def batches(step):
        these = tested + np.random.default_rng((0, step)).choice(count, options.batch, False)
        return x[these], y[these]

    began = time.process_time()
    history = nn.train(
        model, params, batches, steps=steps, every=steps,
        rate=nn.cosine(options.rate, steps=steps, warmup=steps // 10),
    )  # fmt: skip
    found = {
        "random features": model,
        "exact attention": nn.Chain(
            tuple(
                layer.replace(exact=True) if isinstance(layer, nn.Performer) else layer
                for layer in model.layers
            )
        ),
    }
    print(f"{history}, {time.process_time() - began:.0f} s of processors")
    for name, each in found.items():
        right = (each.apply(params, x[:tested]).argmax(-1) == y[:tested]).mean()
        print(f"{right:.1%} of {tested} digits, with {name}")


if __name__ == "__main__":
    main()
