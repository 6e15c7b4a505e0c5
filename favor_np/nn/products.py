"""Matrix products of rows."""

from __future__ import annotations

from favor_np.nn.tree import Array


def multiply(x: Array, weight: Array) -> Array:
    """Return x @ weight.T for rows x (..., inputs) and a weight (outputs, inputs)."""
    return x @ weight.T


def multiply_back(grad: Array, weight: Array) -> Array:
    """Return grad @ weight: the gradient of the rows."""
    return grad @ weight


def add_product(to: Array, grad: Array, x: Array) -> None:
    """Add grad.T @ x, summed over all rows: the gradient of the weight."""
    to += grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def add_sum(to: Array, grad: Array) -> None:
    """Add the sum of rows: the gradient of a bias."""
    to += grad.reshape(-1, grad.shape[-1]).sum(0)
