"""Tables of the accuracy page, computed from the closed forms of the mathematics page."""

import numpy as np
from scipy.special import hyp1f1

MAPS = {
    "iid": (False, False),
    "iid, antithetic": (False, True),
    "orthogonal": (True, False),
    "orthogonal, antithetic": (True, True),
}
SUMS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)


def relative_variance(s, features, dim, *, orthogonal, antithetic):
    """Var(estimate) / exp(2 x.y) of the softmax kernel, where s = |x + y|**2."""
    rows = features // 2 if antithetic else features
    own = (np.exp(2 * s) + 1) / 2 if antithetic else np.exp(2 * s)
    pairs = 0.0
    if orthogonal:
        blocks, rest = divmod(rows, dim)
        same_block = blocks * dim * (dim - 1) + rest * (rest - 1)
        pairs = same_block * (hyp1f1(dim, dim / 2, s / 2) - np.exp(s))
    return float(np.exp(-s) * (rows * (own - np.exp(s)) + pairs) / rows**2)


def variance(features=256, dim=64):
    """Relative variance by s and map."""
    rows = []
    for s in SUMS:
        values = [
            relative_variance(s, features, dim, orthogonal=orthogonal, antithetic=antithetic)
            for orthogonal, antithetic in MAPS.values()
        ]
        rows.append([f"{s:g}", *map(_number, values)])
    return _table(["s", *MAPS], rows)


def features_needed(error=0.1, dim=64):
    """Features (orthogonal, antithetic) with which one weight has the given relative error."""
    rows = []
    for s in SUMS:
        kernel = relative_variance(s, 256, dim, orthogonal=True, antithetic=True) ** 0.5
        rows.append([f"{s:g}", _percent(kernel), _count(_need(s, error, dim))])
    return _table(["s", "relative error of a weight, M = 256", f"M for {error:.0%} error"], rows)


def _need(s, error, dim):
    block = 2 * dim
    for features in range(2, block + 1, 2):
        if relative_variance(s, features, dim, orthogonal=True, antithetic=True) <= error**2:
            return features
    # From whole blocks on the variance falls as 1 / M.
    return block * relative_variance(s, block, dim, orthogonal=True, antithetic=True) / error**2


def _percent(x):
    return f"{100 * x:.2g} %" if x < 1 else f"{100 * x:,.0f} %"


def _count(x):
    return f"{x:,.0f}" if x < 1e6 else f"{x:.0e}"


def _number(x):
    return f"{x:.2g}" if 1e-2 < x < 100 else f"{x:.1e}"


def _table(head, rows):
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


TABLES = {"relative_variance": variance, "features_needed": features_needed}

if __name__ == "__main__":
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}")
