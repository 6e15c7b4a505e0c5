"""favor_attention on PyTorch's tensors."""

import threading

import bridges
import numpy as np
import pytest
from bridges import FM, assert_close, each_option, inputs

torch = bridges.require("torch")

import favor_np.interop.torch
from favor_np.interop.torch import favor_attention


def tensors(*, grouped=False, dtype=torch.float64):
    *arrays, g = inputs(grouped=grouped)
    arrays = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in arrays]
    return *arrays, torch.tensor(g, dtype=dtype)


def attend(q, k, v, projection, **options):
    return favor_attention(q, k, v, FM, projection=projection, **options)


def gradients(out, arrays, g):
    return [x.numpy() for x in torch.autograd.grad(out, arrays, g)]


@each_option
@pytest.mark.parametrize("as_tensors", [False, True])
def test_gradients(options, as_tensors):
    *arrays, g = inputs(grouped="enable_gqa" in options)
    result, expected = bridges.expected(*arrays, g, **options)
    *arrays, g = tensors(grouped="enable_gqa" in options)
    if as_tensors:
        options = {n: torch.tensor(x) if n != "causal" and n != "enable_gqa" else x
                   for n, x in options.items()}  # fmt: skip
    out = attend(*arrays, **options)
    assert np.array_equal(out.detach().numpy(), result)
    assert_close(gradients(out, arrays, g), expected, 1e-15)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_finds_the_same(causal):
    *arrays, g = tensors()
    dense = bridges.dense(torch, *arrays, causal=causal, einsum=torch.einsum)
    expected = gradients(dense, arrays, g)
    assert_close(gradients(attend(*arrays, causal=causal), arrays, g), expected)


@each_option
def test_gradcheck(options):
    *arrays, _ = tensors(grouped="enable_gqa" in options)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, **options), arrays, fast_mode=True)


@pytest.mark.parametrize("missing", range(4))
def test_some_of_the_arrays_require_a_gradient(missing):
    *arrays, g = tensors()
    expected = gradients(attend(*arrays), arrays, g)
    arrays[missing].requires_grad_(False)
    attend(*arrays).backward(g)
    for i, (x, grad) in enumerate(zip(arrays, expected, strict=True)):
        if i == missing:
            assert x.grad is None
        else:
            assert np.array_equal(x.grad.numpy(), grad)
    assert not attend(*(x.detach() for x in arrays)).requires_grad


def test_a_parameter_is_trained():
    q, k, v, projection, g = tensors()
    parameter = torch.nn.Parameter(projection.detach().clone())
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (attend(q, k, v, parameter) * g).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_any_strides():
    *arrays, g = tensors()
    expected = gradients(attend(*arrays), arrays, g)
    wide = [x.detach().mT.contiguous().mT.requires_grad_() for x in arrays]
    assert not any(x.is_contiguous() for x in wide)
    assert_close(gradients(attend(*wide), wide, g.mT.contiguous().mT), expected, 1e-15)
    out = attend(*arrays)
    ones = gradients(out, arrays, torch.ones_like(g))
    assert_close(gradients(attend(*arrays).sum(), arrays, None), ones, 1e-15)  # strides of zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    *arrays, g = tensors(dtype=dtype)
    out = attend(*arrays, causal=True)
    found = torch.autograd.grad(out, arrays, g)
    assert {x.dtype for x in (out, *found)} == {dtype}
    wide = [x.detach().double().requires_grad_() for x in arrays]
    reference = attend(*wide, causal=True)
    expected = torch.autograd.grad(reference, wide, g.double())
    tolerance = 4 * torch.finfo(dtype).eps
    pairs = ((out, reference), *zip(found, expected, strict=True))
    for a, b in pairs:
        assert (a - b).abs().max() < tolerance * b.abs().max()


def test_mixed_dtypes_are_promoted():
    q, k, v, *_ = tensors(dtype=torch.bfloat16)
    assert favor_attention(q, k.float(), v, FM).dtype == torch.float32
    assert favor_attention(q, k.half(), v, FM).dtype == torch.float32
    assert favor_attention(q, k, v.double(), FM).dtype == torch.float64


def test_arrays_share_memory_with_tensors():
    q, k, v, *_ = tensors()
    for x in (q, k, v):
        array = favor_np.interop.torch._array("q", x)
        assert array.ctypes.data == x.data_ptr()
    seen = []

    def attend(q, k, v):
        out, pullback = favor_np.favor_attention_vjp(q, k, v, FM)
        seen.append(out)

        def pull(g):
            seen.append(pullback(g))
            return seen[-1]

        return out, pull

    out = favor_np.interop.torch._Attend.apply(attend, q, k, v)
    assert out.data_ptr() == seen[0].ctypes.data
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for x, name in zip(found, "qkv", strict=True):
        assert x.data_ptr() == getattr(seen[1], name).ctypes.data


def test_a_change_in_place_is_noticed():
    for changed in ("k", "out"):
        *arrays, g = tensors()
        out = attend(*arrays)
        with torch.no_grad():
            (out if changed == "out" else arrays[1]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(g)


def test_backward_twice():
    *arrays, g = tensors()
    out = attend(*arrays)
    first = torch.autograd.grad(out, arrays, g, retain_graph=True)
    second = torch.autograd.grad(out, arrays, g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward(g)


def test_a_second_derivative_is_refused():
    q, k, v, *_ = tensors()
    (grad,) = torch.autograd.grad((favor_attention(q, k, v, FM) ** 2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_threads():
    """Backward passes run on PyTorch's threads or on the caller's; calls at once do not mix."""
    *arrays, g = tensors()
    expected = gradients(attend(*arrays, num_threads=1), arrays, g)
    wrong = []

    def work():
        for _ in range(20):
            found = gradients(attend(*arrays), arrays, g)
            wrong.extend(i for i in range(4) if not np.array_equal(found[i], expected[i]))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


REFUSED = [
    ("f(q.to('meta'), k, v, FM)", TypeError, "q must lie on the CPU, got device meta"),
    ("f(q, k, v, FM, projection=W.to('meta'))", TypeError, "projection must lie on the CPU"),
    (
        "f(q, k, v, FM, causal=True, decay=W.detach().to('meta'))",
        TypeError,
        "decay must lie on the CPU",
    ),
    ("f(q, k.detach().numpy(), v, FM)", TypeError, "k must be a torch.Tensor, got an array"),
    ("f(q, k[..., 1:], v, FM)", ValueError, "k must have shape"),
    ("f(q, k, v, FM, projection=W[:, 1:])", ValueError, "q must have shape"),
    ("f(q, k, v + 1j, FM)", TypeError, "v must hold real numbers"),
    ("f(q, k, v, None)", TypeError, "feature_map must be a FeatureMap, got None"),
    (
        "f(q, k, v, FM, causal=True, decay=torch.tensor(0.9, requires_grad=True))",
        ValueError,
        "decay has no gradient",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(call, error, message):
    q, k, v, W, _ = tensors()
    with pytest.raises(error, match=message):
        eval(call, globals() | {"f": favor_attention, "q": q, "k": k, "v": v, "W": W})


def test_examples():
    bridges.assert_examples_are_right(favor_np.interop.torch)


def test_without_torch_the_error_names_the_extra():
    bridges.assert_error_names_the_extra("torch", "PyTorch")
