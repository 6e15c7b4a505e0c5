"""FAVOR+ attention on PyTorch's CPU tensors, differentiable."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy.typing as npt

try:
    import torch
    from torch.autograd.function import once_differentiable
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
    feature_map, causal, key_mask, cu_seqlens, enable_gqa, decay, num_threads
        As for `favor_np.favor_attention`; tensors are taken, but have no gradient.
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
        As `favor_np.favor_attention`, and if `decay` requires a gradient.
    RuntimeError
        By a second derivative, or if a tensor was changed in place before the backward pass.

    See Also
    --------
    favor_np.favor_attention_vjp : The same gradients without a framework.

    Notes
    -----
    Nothing is copied but bfloat16 and tensors that are not contiguous: arrays share their memory
    with tensors on the way in and out.

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
    if isinstance(decay, torch.Tensor) and decay.requires_grad:
        raise ValueError("decay has no gradient: pass decay.detach()")
    attend = bridge.favor(
        feature_map, causal=causal, key_mask=_constant("key_mask", key_mask),
        cu_seqlens=_constant("cu_seqlens", cu_seqlens), enable_gqa=enable_gqa,
        decay=_constant("decay", decay), num_threads=num_threads,
    )  # fmt: skip
    result: torch.Tensor = _Attend.apply(attend, q, k, v, projection)
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attend: bridge.Attend, *tensors: Any) -> torch.Tensor:
        names = zip(bridge.NAMES, tensors, strict=False)
        result, ctx.pullback = attend(*(_array(n, x) for n, x in names if x is not None))
        out = torch.from_numpy(result)
        if reduce(torch.promote_types, (x.dtype for x in tensors[:3])) == torch.bfloat16:
            out = out.bfloat16()
        ctx.save_for_backward(*tensors, out)  # for PyTorch's check that nobody has changed them
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients = ctx.pullback(_array("grad_out", grad_out))
        return None, *(
            torch.from_numpy(getattr(gradients, name)).to(x.dtype) if needed else None
            for name, x, needed in zip(bridge.NAMES, tensors, ctx.needs_input_grad[1:], strict=False)
        )  # fmt: skip


def _array(name: str, tensor: Any) -> bridge.Array:
    """Return a view of the tensor; NumPy has no bfloat16, so that becomes float32."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {validation.got(tensor)}")
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} must lie on the CPU, got device {tensor.device}")
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: bridge.Array = tensor.numpy(force=True)
    return array


def _constant(name: str, value: Any) -> Any:
    return _array(name, value) if isinstance(value, torch.Tensor) else value
