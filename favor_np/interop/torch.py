"""FAVOR+ attention on PyTorch's CPU tensors, differentiable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NoReturn

import numpy.typing as npt

try:
    import torch
except ImportError:
    raise ImportError(
        "favor_np.interop.torch needs PyTorch: pip install 'favor_np[torch]'", name="torch"
    ) from None

from favor_np import FeatureMap, validation
from favor_np.interop import bridge

__all__ = ["favor_attention"]


def favor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: torch.Tensor | npt.ArrayLike | None = None,
    key_bias: torch.Tensor | npt.ArrayLike | None = None,
    cu_seqlens: torch.Tensor | npt.ArrayLike | None = None,
    enable_gqa: bool = False,
    decay: torch.Tensor | npt.ArrayLike | None = None,
    num_threads: int | None = None,
    projection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend as `favor_np.favor_attention` on CPU tensors, differentiable by PyTorch.

    Parameters
    ----------
    q, k, v : Tensor, shapes (..., L_q, d), (..., L_k, d) and (..., L_k, dv)
        float64, float32, float16 or bfloat16 (these two are computed in float32).
    feature_map, causal, key_mask, key_bias, cu_seqlens, enable_gqa, decay, num_threads
        As for `favor_np.favor_attention`; tensors are taken.  A `key_bias` has a gradient, and a
        `decay` of one factor a token.
    projection : Tensor, shape (m, d) or (heads, m, d), optional
        Takes the place of the map's own, and has a gradient: a parameter, say.

    Returns
    -------
    Tensor, shape (..., L_q, dv)
        The result of `favor_np.favor_attention`, in the common dtype of q, k and v.

    Raises
    ------
    ImportError
        By ``import favor_np.interop.torch``, if PyTorch is not installed.
    TypeError
        If an argument is no tensor, or lies on another device than the CPU; else as
        `favor_np.favor_attention`.
    ValueError
        As `favor_np.favor_attention`, and if a constant `decay` requires a gradient.
    RuntimeError
        By a second derivative, by forward-mode differentiation, or if a tensor was changed in place
        before the backward pass.

    See Also
    --------
    favor_np.favor_attention_vjp : The same gradients without a framework.

    Notes
    -----
    Nothing is copied but bfloat16 and tensors that are not contiguous: arrays share
    their memory with tensors on the way in and out.  For the backward pass PyTorch keeps the
    arguments, the result and two numbers a row, and frees them afterwards.

    ``torch.func.grad``, ``vjp``, ``jacrev`` and ``vmap`` work (``vmap`` is one call after another).
    ``torch.compile`` breaks its graph here, so ``fullgraph=True`` is refused.

    Examples
    --------
    >>> import torch
    >>> import favor_np
    >>> from favor_np.interop.torch import favor_attention
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> q, k, v = torch.ones(3, 10, 4, requires_grad=True)
    >>> out = favor_attention(q, k, v, fm, causal=True)
    >>> torch.autograd.grad(out.sum(), v)[0].sum()  # the weights of every row sum to one
    tensor(40.0000)
    """
    arrays = {
        "q": _checked("q", q),
        "k": _checked("k", k),
        "v": _checked("v", v),
        "projection": None if projection is None else _checked("projection", projection),
        "key_mask": key_mask,
        "key_bias": key_bias,
        "cu_seqlens": cu_seqlens,
        "decay": decay,
    }
    tensors = {n: _checked(n, x) for n, x in arrays.items() if isinstance(x, torch.Tensor)}
    constants = {n: x for n, x in arrays.items() if x is not None and n not in tensors}
    attend = bridge.Attend(
        feature_map, causal=causal, enable_gqa=enable_gqa, num_threads=num_threads, **constants
    )
    learned = isinstance(decay, torch.Tensor) and decay.requires_grad
    if learned and not attend.has_gates(q, k, v, decay=decay, key_bias=key_bias, key_mask=key_mask):
        raise ValueError("a constant decay has no gradient: pass decay.detach()")
    run = _run
    if torch.compiler.is_dynamo_compiling():  # a break in the graph: NumPy's world is not traced
        run = torch.compiler.disable(run)
    return run(_Call(attend, tuple(tensors)), tensors)


@dataclass(frozen=True, eq=False)
class _Call:
    """What is no tensor: the function, the names of its tensors, and whose gradients are wanted."""

    attend: bridge.Attend
    names: tuple[str, ...]
    wanted: tuple[str, ...] = ()


def _run(call: _Call, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = _Attend.apply(call, *tensors.values())[0]
    kinds = (tensors[name].dtype for name in "qkv")
    kinds = (x if x.is_floating_point else torch.float64 for x in kinds)
    return out.to(reduce(torch.promote_types, kinds))


class _Attend(torch.autograd.Function):
    """The result in 32 or 64 bits, and the denominators of its rows.

    PyTorch is given all that the backward pass needs.  So it frees that after the pass, has it
    computed anew by checkpoints, and notices changes in place.
    """

    @staticmethod
    def forward(call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arrays = dict(zip(call.names, map(_array, tensors), strict=True))
        return tuple(map(torch.from_numpy, call.attend.forward(**arrays)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        names = ctx.call.names
        wanted = tuple(n for n, need in zip(names, ctx.needs_input_grad[1:], strict=True) if need)
        gradients = _Pull.apply(replace(ctx.call, wanted=wanted), grad_out, *ctx.saved_tensors)
        found = dict(zip(wanted, gradients, strict=True))
        return None, *map(found.get, names)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(_Attend, info.batch_size, in_dims, arguments)


class _Pull(torch.autograd.Function):
    """The backward pass: a function of its own, for vmap, and to refuse a second derivative."""

    @staticmethod
    def forward(call: _Call, grad_out: torch.Tensor, *saved: torch.Tensor) -> Any:
        count = len(call.names)
        tensors = dict(zip(call.names, saved[:count], strict=True))
        kept = map(_array, (grad_out, *saved[count:]))
        gradients = call.attend.backward(*kept, **{n: _array(x) for n, x in tensors.items()})
        return tuple(
            torch.from_numpy(getattr(gradients, n)).to(tensors[n].dtype) for n in call.wanted
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:  # noqa: ARG004
        raise RuntimeError("trying to differentiate twice: attention has no second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(_Pull, info.batch_size, in_dims, arguments)


def _one_by_one(function: Any, size: int, dims: Any, arguments: Any) -> Any:
    """Return what vmap asks for: the results of one call after another, along a first axis."""
    calls = (
        function.apply(
            *(x if d is None else x.select(d, i) for d, x in zip(dims, arguments, strict=True))
        )
        for i in range(size)
    )
    results = tuple(map(torch.stack, zip(*calls, strict=True)))
    return results, (0,) * len(results)


def _checked(name: str, tensor: Any) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {validation.got(tensor)}")
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} must lie on the CPU, got device {tensor.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    return tensor


def _array(tensor: torch.Tensor) -> bridge.Array:
    """Return a view of the tensor; NumPy has no bfloat16, so that becomes float32."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: bridge.Array = tensor.numpy(force=True)
    return array
