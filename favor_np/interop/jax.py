"""FAVOR+ attention in JAX: a callback to NumPy with gradients, under jit, grad and vmap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    raise ImportError(
        "favor_np.interop.jax needs JAX: pip install 'favor_np[jax]'", name="jax"
    ) from None

from favor_np import FeatureMap
from favor_np.attention import check
from favor_np.call import Call
from favor_np.interop import bridge

__all__ = ["favor_attention"]


def favor_attention(
    q: jax.Array | npt.ArrayLike,
    k: jax.Array | npt.ArrayLike,
    v: jax.Array | npt.ArrayLike,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: jax.Array | npt.ArrayLike | None = None,
    cu_seqlens: jax.Array | npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: npt.ArrayLike | None = None,
    num_threads: int | None = None,
    projection: jax.Array | npt.ArrayLike | None = None,
) -> jax.Array:
    """Attend as `favor_np.favor_attention`, by a callback that JAX can differentiate and compile.

    Parameters
    ----------
    q, k, v : array_like, shapes (..., L_q, d), (..., L_k, d) and (..., L_k, dv)
        float64 (if JAX has been told ``jax_enable_x64``), float32, float16 or bfloat16.
        Integers become JAX's default float.  Heads come before the length, other than in
        `jax.nn.dot_product_attention`: see the notes.
    feature_map, causal, key_mask, cu_seqlens, enable_gqa, decay, num_threads
        As for `favor_np.favor_attention`.  `key_mask` and `cu_seqlens` may be traced, `decay` is a
        constant.
    projection : array_like, shape (m, d) or (heads, m, d), optional
        Takes the place of the map's own, and has a gradient.

    Returns
    -------
    jax.Array, shape (..., L_q, dv)
        The result of `favor_np.favor_attention`.

    Raises
    ------
    ImportError
        By ``import favor_np.interop.jax``, if JAX is not installed.
    TypeError, ValueError
        As `favor_np.favor_attention`, when the call is traced.  A traced `cu_seqlens` is checked
        when the call runs.
    jax.errors.TracerArrayConversionError
        If `decay` is traced.

    See Also
    --------
    favor_np.favor_attention_vjp : The same gradients without a framework.

    Notes
    -----
    JAX's own attention, `jax.nn.dot_product_attention`, and Flax have the axes (batch, length,
    heads, dim).  Arrays made for these fit here as well, but positions would then attend to nothing
    but their own heads: swap axes 1 and 2.

    The backward pass computes the result anew: nothing but the arguments is kept.  ``vmap`` is one
    call with one more leading axis; with `projection` or `cu_seqlens`, one call an element.
    Second derivatives are refused by JAX.  On an accelerator the arrays travel to the host and
    back.

    Examples
    --------
    >>> import jax
    >>> import favor_np
    >>> from favor_np.interop.jax import favor_attention
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 10, 4))
    >>> loss = jax.jit(lambda v: favor_attention(q, k, v, fm, causal=True).sum())
    >>> dv = jax.grad(loss)(v)
    >>> dv.shape, float(dv.sum().round(3))  # the weights of every row sum to one
    ((10, 4), 40.0)
    """
    options: dict[str, Any] = {
        "causal": causal,
        "enable_gqa": enable_gqa,
        "num_threads": num_threads,
    }
    if decay is not None:
        options["decay"] = np.asarray(decay)
    attend = bridge.Attend(feature_map, **options)
    arrays = [_real(x) for x in (q, k, v)]
    constants: dict[str, Any] = {}
    if key_mask is not None:
        constants["key_mask"] = jnp.asarray(key_mask)
        options["key_mask"] = _stand_in(constants["key_mask"])
    if cu_seqlens is not None:
        constants["cu_seqlens"] = jnp.asarray(cu_seqlens)
        if not isinstance(cu_seqlens, jax.core.Tracer):
            options["cu_seqlens"] = cu_seqlens
    if projection is not None:
        arrays.append(_real(projection))
        feature_map = dataclasses.replace(feature_map, projection=_stand_in(arrays[3]))
    stand_ins: list[Any] = [*map(_stand_in, arrays[:3]), feature_map]
    return _run(attend, check(*stand_ins, **options), arrays, constants)


def _run(
    attend: bridge.Attend, checked: Call, arrays: list[Any], constants: dict[str, Any]
) -> jax.Array:
    """Attend to arrays q, k, v and perhaps a projection."""
    # One more axis in front must be one for all: leading axes are matched from the right.
    axes = len(checked.out_shape)
    arrays[:3] = [_lift(x, axes) for x in arrays[:3]]
    if "key_mask" in constants:
        constants["key_mask"] = _lift(constants["key_mask"], axes - 1)
    one_call = len(arrays) == 3 and "cu_seqlens" not in constants
    call = _Call(
        attend,
        jax.ShapeDtypeStruct(checked.out_shape, checked.result),
        "broadcast_all" if one_call else "sequential",
    )
    result: jax.Array = _attend(call, arrays, constants)
    return result


class _Call(NamedTuple):
    """What is no array: the function, its result, and what vmap makes of it."""

    attend: bridge.Attend
    result: jax.ShapeDtypeStruct
    vmap_method: str

    def host(self, function: Callable[..., Any], result: Any, *arguments: Any) -> Any:
        """Run a function of NumPy arrays."""
        return jax.pure_callback(function, result, *arguments, vmap_method=self.vmap_method)

    def forward(self, arrays: Any, constants: Any) -> Any:
        arrays, constants = jax.tree.map(np.asarray, (arrays, constants))
        return self.attend(*arrays, **constants)[0]

    def backward(self, grad_out: Any, arrays: Any, constants: Any) -> Any:
        grad_out, arrays, constants = jax.tree.map(np.asarray, (grad_out, arrays, constants))
        gradients = self.attend(*arrays, **constants)[1](grad_out)
        named = zip(bridge.NAMES, arrays, strict=False)
        return [getattr(gradients, name).astype(x.dtype, copy=False) for name, x in named]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, arrays: Any, constants: Any) -> Any:
    return call.host(call.forward, call.result, arrays, constants)


def _forward(call: _Call, arrays: Any, constants: Any) -> Any:
    return _attend(call, arrays, constants), (arrays, constants)


def _backward(call: _Call, kept: Any, grad_out: Any) -> Any:
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept[0]]
    return call.host(call.backward, like, grad_out, *kept), None


_attend.defvjp(_forward, _backward)


def _real(x: Any) -> Any:
    x = jnp.asarray(x)
    return x.astype(float) if x.dtype.kind in "biu" else x


def _lift(x: Any, axes: int) -> Any:
    return x.reshape(*[1] * (axes - x.ndim), *x.shape)


def _stand_in(x: Any) -> bridge.Array:
    """Return an array of x's shape and dtype that takes no memory, to be checked in x's place."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)
