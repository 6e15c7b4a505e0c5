"""Synthetic queries, keys and values on which accuracy is measured: one head, d = 32, L = 128.

Queries and keys are Gaussian.  "anisotropic": where queries are large, keys are small, by factors
from 1/e to e.  "means": the same, each with a mean of the same size as its spread.
"""

import numpy as np

DIM, LENGTH, FEATURES, DRAWS = 32, 128, 256, 25

#: Name: (kind, standard deviation), and the root-mean-square error to stay below.
FAMILIES = {
    "isotropic 0.5": (("isotropic", 0.5), 0.0092),
    "anisotropic 0.5": (("anisotropic", 0.5), 0.0029),
    "means 0.5": (("means", 0.5), 0.0030),
    "means 0.8": (("means", 0.8), 0.0205),
}


def draw_family(kind, std, seed, fresh=False):
    """Queries, keys and values (LENGTH, DIM); fresh ones come from the same distribution."""
    of_family, of_tokens = (np.random.default_rng([seed, i]) for i in range(2))
    if fresh:
        of_tokens = np.random.default_rng([seed, 2])
    sizes = np.ones(DIM) if kind == "isotropic" else np.exp(np.linspace(-1, 1, DIM))
    sizes /= np.sqrt(np.mean(sizes**2))
    means = of_family.standard_normal((2, DIM)) if kind == "means" else np.zeros((2, DIM))
    tokens = of_tokens.standard_normal((3, LENGTH, DIM))
    q = std * (sizes * tokens[0] + means[0])
    k = std * (sizes[::-1] * tokens[1] + means[1])
    return q, k, tokens[2]
