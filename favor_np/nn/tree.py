"""Trees of parameters: nested dictionaries of arrays, whose leaves have dotted names.

The parameters of a model, their gradients and the optimiser's moments are one vector each, and the
leaves of their trees are views of it: what is done to all numbers alike is done to a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation

Array: TypeAlias = npt.NDArray[Any]
Params: TypeAlias = dict[str, Any]


def leaves(tree: Params, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Go through the arrays of a tree and their names.

    Parameters
    ----------
    tree : dict
        Arrays, and dictionaries of them.
    prefix : str, default ""
        What the names begin with.

    Yields
    ------
    tuple of str and ndarray
        The name, such as "blocks.0.attention.qkv.weight", and the array itself.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> [name for name, _ in nn.leaves({"up": {"weight": np.ones(2)}, "scale": np.ones(1)})]
    ['up.weight', 'scale']
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def tree_of(arrays: dict[str, Array]) -> Params:
    """Return the tree of arrays with dotted names: what `leaves` takes apart."""
    tree: Params = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node[last] = array
    return tree


def pack(tree: Params) -> Array:
    """Return one vector with all leaves of a tree, which become views of it, in place."""
    named = dict(leaves(tree))
    kinds = {name: np.asarray(array).dtype for name, array in named.items()}
    for name, kind in kinds.items():
        validation.float_dtype(name, kind)
        if kind != next(iter(kinds.values())):
            raise TypeError(f"{name} must have the dtype of the other parameters, got {kind}")
    if not named:
        raise ValueError("params must hold at least one array, got none")
    vector = np.concatenate([array.ravel() for array in named.values()])
    at = 0

    def view(node: Params) -> None:
        nonlocal at
        for name, value in node.items():
            if isinstance(value, dict):
                view(value)
            else:
                node[name] = vector[at : at + value.size].reshape(value.shape)
                at += value.size

    view(tree)
    return vector


def zeros_like(tree: Params) -> Params:
    """Return a tree of zeros of the same shapes: where pullbacks add gradients.

    Parameters
    ----------
    tree : dict
        Parameters.

    Returns
    -------
    dict
        New arrays under the same names.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> nn.zeros_like({"up": {"weight": np.ones(2)}})
    {'up': {'weight': array([0., 0.])}}
    """
    return {
        name: zeros_like(value) if isinstance(value, dict) else np.zeros_like(value)
        for name, value in tree.items()
    }


def astype(tree: Params, dtype: npt.DTypeLike) -> Params:
    """Return a copy of a tree in another precision: a model computes in that of its parameters.

    Parameters
    ----------
    tree : dict
        Parameters.
    dtype : {float32, float64}
        Of the copy.

    Returns
    -------
    dict
        New arrays under the same names.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> params = nn.Linear(2, 3).init(np.random.default_rng(0))
    >>> nn.astype(params, np.float64)["weight"].dtype
    dtype('float64')
    """
    kind = validation.float_dtype("dtype", dtype)
    return {
        name: astype(value, kind) if isinstance(value, dict) else value.astype(kind)
        for name, value in tree.items()
    }
