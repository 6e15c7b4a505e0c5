"""FAVOR+ attention as a primitive of HIPS autograd."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy.typing as npt

try:
    from autograd.extend import defvjp_argnums, primitive
except ImportError:
    raise ImportError(
        "favor_np.interop.autograd needs autograd: pip install 'favor_np[autograd]'",
        name="autograd",
    ) from None

from favor_np import FeatureMap
from favor_np.interop import bridge

__all__ = ["favor_attention"]


def favor_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: npt.ArrayLike | None = None,
    key_bias: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: npt.ArrayLike | None = None,
    num_threads: int | None = None,
    projection: npt.ArrayLike | None = None,
) -> Any:
    """Attend as `favor_np.favor_attention`, differentiable by autograd in arrays and projection.

    Parameters
    ----------
    q, k, v, feature_map, causal, key_mask, key_bias, cu_seqlens, enable_gqa, decay, num_threads
        As for `favor_np.favor_attention`.  `key_bias` has a gradient, and a `decay` of one factor a
        token.
    projection : array_like, shape (m, d) or (heads, m, d), optional
        Takes the place of the map's own, and has a gradient.

    Returns
    -------
    ndarray, shape (..., L_q, dv)
        The result of `favor_np.favor_attention`.

    Raises
    ------
    ImportError
        By ``import favor_np.interop.autograd``, if autograd is not installed.
    TypeError, ValueError
        As `favor_np.favor_attention`.
    NotImplementedError
        By a second derivative.

    See Also
    --------
    favor_np.favor_attention_vjp : The same gradients without a framework.

    Examples
    --------
    >>> import numpy as np
    >>> from autograd import grad
    >>> import favor_np
    >>> from favor_np.interop.autograd import favor_attention
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> dv = grad(lambda v: favor_attention(q, k, v, fm, causal=True).sum())(v)
    >>> dv.shape, dv.sum().round(6)  # the weights of every row sum to one
    ((10, 4), np.float64(40.0))
    """
    attend = bridge.Attend(
        feature_map,
        causal=causal,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        enable_gqa=enable_gqa,
        num_threads=num_threads,
    )
    arrays = {"q": q, "k": k, "v": v, "projection": projection, "key_bias": key_bias}
    if decay is not None and attend.has_gates(q, k, v, decay=decay, key_bias=key_bias):
        arrays["decay"] = decay
    elif decay is not None:
        attend.options["decay"] = decay
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return _attend(_Call(attend, tuple(arrays)), *arrays.values())


class _Call:
    """A call, and the names of its arrays: the forward pass leaves its pullback here."""

    pullback: Any

    def __init__(self, attend: bridge.Attend, names: tuple[str, ...]) -> None:
        self.attend, self.names = attend, names


@primitive
def _attend(call: _Call, *arrays: Any) -> Any:
    out, call.pullback = call.attend(**dict(zip(call.names, arrays, strict=True)))
    return out


@primitive
def _pull(grad_out: Any, argnums: tuple[int, ...], call: _Call, *_: Any) -> Any:
    gradients = call.pullback(grad_out)
    return tuple(getattr(gradients, call.names[n - 1]) for n in argnums)


def _refuse(*_: Any) -> NoReturn:
    raise NotImplementedError("attention has no second derivative")


# _pull gets the arrays too, although it needs none: a second derivative must not seem to be zero.
defvjp_argnums(_attend, lambda argnums, _out, args, _: lambda g: _pull(g, argnums, *args))
defvjp_argnums(_pull, _refuse)
