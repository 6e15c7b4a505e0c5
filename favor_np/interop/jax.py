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

from favor_np import FeatureMap, validation
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
    key_bias: jax.Array | npt.ArrayLike | None = None,
    cu_seqlens: jax.Array | npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: jax.Array | npt.ArrayLike | None = None,
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
    feature_map, causal, key_mask, key_bias, cu_seqlens, enable_gqa, decay, num_threads
        As for `favor_np.favor_attention`.  `key_mask`, `key_bias` and `cu_seqlens` may be traced,
        and a `decay` of one factor a token; one a head is a constant.  Bias and factors have a
        gradient.  What they hold is checked when the call runs.
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
        If a `decay` of one factor a head is traced.

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
    attend = bridge.Attend(feature_map, **options)
    arrays = {"q": _real(q), "k": _real(k), "v": _real(v)}
    constants: dict[str, Any] = {}
    if decay is not None and attend.has_gates(
        *arrays.values(), decay=decay, key_bias=key_bias, key_mask=key_mask
    ):
        arrays["decay"] = _real(decay)
    elif decay is not None:
        options["decay"] = attend.options["decay"] = np.asarray(decay)
    if key_bias is not None:
        arrays["key_bias"] = _real(key_bias)
    if key_mask is not None:
        constants["key_mask"] = jnp.asarray(key_mask)
        options["key_mask"] = _outline(constants["key_mask"])
    if cu_seqlens is not None:
        constants["cu_seqlens"] = jnp.asarray(cu_seqlens)
        if not isinstance(cu_seqlens, jax.core.Tracer):
            options["cu_seqlens"] = cu_seqlens
    if projection is not None:
        arrays["projection"] = _real(projection)
        projection = _outline(arrays["projection"])
        feature_map = dataclasses.replace(feature_map, projection=projection)
    outlines: dict[str, Any] = {n: _outline(x) for n, x in arrays.items() if n != "projection"}
    checked = check(**outlines, feature_map=feature_map, **options)
    return _run(attend, checked, arrays, constants)


def _run(
    attend: bridge.Attend, checked: Call, arrays: dict[str, Any], constants: dict[str, Any]
) -> jax.Array:
    """Attend to the arrays, which have gradients."""
    # One more axis in front must be one for all: leading axes are matched from the right.
    lead = len(checked.out_shape) - 2
    for named in (arrays, constants):
        for name, axes in _AXES.items():
            if name in named:
                named[name] = _lift(named[name], lead + axes)
    one_call = not {"projection", "cu_seqlens"} & {*arrays, *constants}
    call = _Call(
        attend,
        jax.ShapeDtypeStruct(checked.out_shape, checked.result),
        "broadcast_all" if one_call else "sequential",
    )
    result: jax.Array = _attend(call, arrays, constants)
    return result


#: The axes of each array, but for those in front.
_AXES = {"q": 2, "k": 2, "v": 2, "key_mask": 1, "key_bias": 1, "decay": 1}


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
        return self.attend(**arrays, **constants)[0]

    def backward(self, grad_out: Any, arrays: Any, constants: Any) -> Any:
        grad_out, arrays, constants = jax.tree.map(np.asarray, (grad_out, arrays, constants))
        gradients = self.attend(**arrays, **constants)[1](grad_out)
        return {n: getattr(gradients, n).astype(x.dtype, copy=False) for n, x in arrays.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, arrays: Any, constants: Any) -> Any:
    return call.host(call.forward, call.result, arrays, constants)


def _forward(call: _Call, arrays: Any, constants: Any) -> Any:
    return _attend(call, arrays, constants), (arrays, constants)


def _backward(call: _Call, kept: Any, grad_out: Any) -> Any:
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in kept[0].items()}
    return call.host(call.backward, like, grad_out, *kept), None


_attend.defvjp(_forward, _backward)


def _real(x: Any) -> Any:
    x = jnp.asarray(x)
    return x.astype(float) if x.dtype.kind in "biu" else x


def _lift(x: Any, axes: int) -> Any:
    return x.reshape(*[1] * (axes - x.ndim), *x.shape)


def _outline(x: Any) -> bridge.Array:
    return validation.outline(x.shape, x.dtype)
