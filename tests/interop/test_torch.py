"""favor_attention on PyTorch's tensors."""

import gc
import threading
import weakref

import numpy as np
import pytest
from support import bridges, child
from support.bridges import FM, assert_close, each_option, inputs

torch = bridges.require("torch")

import favor_np.interop.torch
from favor_np.interop import bridge
from favor_np.interop.torch import favor_attention

NAMES = ("q", "k", "v", "projection")


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
    *arrays, g = tensors()
    seen = {}

    class Watched(bridge.Attend):
        def forward(self, **arrays):
            out, *weights = super().forward(**arrays)
            seen.update(arrays, out=out)
            return out, *weights

        def backward(self, grad_out, *kept, **arrays):
            assert kept[0].ctypes.data == seen["out"].ctypes.data
            seen.update(gradients=super().backward(grad_out, *kept, **arrays), grad_out=grad_out)
            return seen["gradients"]

    given = dict(zip(NAMES, arrays, strict=True))
    call = favor_np.interop.torch._Call(Watched(FM), NAMES)
    out = favor_np.interop.torch._run(call, given)
    found = torch.autograd.grad(out, arrays, g)
    for name, x in (given | {"out": out, "grad_out": g}).items():
        assert seen[name].ctypes.data == x.data_ptr(), name
    for name, x in zip(NAMES, found, strict=True):
        assert getattr(seen["gradients"], name).ctypes.data == x.data_ptr(), name


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


# -- Memory ---------------------------------------------------------------------------------------


@pytest.fixture
def alive(monkeypatch):
    """How many of the arrays that forward passes have made are still there."""
    made = []

    class Watched(bridge.Attend):
        def forward(self, **arrays):
            results = super().forward(**arrays)
            made.extend(map(weakref.ref, results))
            return results

    monkeypatch.setattr(bridge, "Attend", Watched)

    def count():
        gc.collect()
        return sum(array() is not None for array in made)

    return count


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_memory_is_free_after_the_backward_pass(alive, dtype):
    """Who keeps a loss keeps a number, not the arrays of the pass."""
    *arrays, g = tensors(dtype=dtype)
    loss = (attend(*arrays) * g).sum()
    assert alive() == 3  # the result, and two numbers for each of its rows
    loss.backward()
    assert alive() == 0
    assert loss.grad_fn is not None


def test_memory_of_a_call_without_gradients(alive):
    *arrays, _ = tensors()
    with torch.no_grad():
        out = attend(*arrays)
    assert alive() == 1
    del out
    assert alive() == 0


def test_a_checkpoint_keeps_nothing_of_what_it_computes_anew(alive):
    q, k, v, projection, _ = tensors()
    v = torch.cat([v, v], -1)[..., :6].detach().requires_grad_()

    def block(x):
        for _ in range(4):
            x = attend(q, k, x, projection)
        return x

    loss = block(v).sum()
    expected = torch.autograd.grad(loss, (q, v, projection), retain_graph=True)
    assert alive() == 4 * 3
    del loss
    assert alive() == 0
    loss = torch.utils.checkpoint.checkpoint(block, v, use_reentrant=False).sum()
    assert alive() == 0
    found = torch.autograd.grad(loss, (q, v, projection))
    assert alive() == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_kept_can_be_stored_elsewhere(alive):
    """Hooks for saved tensors see all of it: so can offloading to a disk."""
    *arrays, g = tensors()
    expected = gradients(attend(*arrays), arrays, g)
    stored = []

    def pack(x):
        stored.append((x.dtype, x.tolist()))
        return len(stored) - 1

    def unpack(i):
        return torch.tensor(stored[i][1], dtype=stored[i][0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = attend(*arrays)
    loss = (out * g).sum()
    del out
    assert alive() == 0
    found = [x.numpy() for x in torch.autograd.grad(loss, arrays)]
    assert all(map(np.array_equal, found, expected))


# -- Transforms ------------------------------------------------------------------------------------


@each_option
def test_func_grad(options):
    *arrays, g = tensors(grouped="enable_gqa" in options)
    expected = gradients(attend(*arrays, **options), arrays, g)

    def loss(*arrays):
        return (attend(*arrays, **options) * g).sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(x.detach() for x in arrays))
    assert all(map(np.array_equal, found, expected))
    out, pull = torch.func.vjp(lambda *x: attend(*x, **options), *(x.detach() for x in arrays))
    assert torch.equal(out, attend(*arrays, **options))
    assert all(map(np.array_equal, pull(g), expected))


BATCHED = {
    "all": (0, 0, 0, 0),
    "queries": (0, None, None, None),
    "values": (None, None, -1, None),
    "projections": (None, None, None, 0),
    "keys and values": (None, 1, 0, None),
}


@pytest.mark.parametrize("dims", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_vmap(dims, dtype):
    """Results and gradients are those of a loop."""
    *arrays, g = tensors(dtype=dtype)
    rng = torch.Generator().manual_seed(0)
    arrays = [
        x.detach() if d is None else torch.stack(
            [x.detach() + torch.randn(x.shape, generator=rng).to(dtype) / 9 for _ in range(3)], d)
        for d, x in zip(dims, arrays, strict=True)
    ]  # fmt: skip

    def each(i):
        return [x if d is None else x.select(d, i) for d, x in zip(dims, arrays, strict=True)]

    out = torch.func.vmap(attend, in_dims=dims)(*arrays)
    assert out.dtype == dtype
    assert torch.equal(out, torch.stack([attend(*each(i)) for i in range(3)]))

    def loss(*arrays):
        return (attend(*arrays) * g).sum()

    own = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    found = torch.func.vmap(own, in_dims=dims)(*arrays)
    expected = [torch.stack(x) for x in zip(*(own(*each(i)) for i in range(3)), strict=True)]
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, found, torch.func.vmap(own, in_dims=dims, chunk_size=2)(*arrays)))


def test_vmap_over_masks_and_decay():
    q, k, v, *_ = (x.detach() for x in tensors())
    masks = torch.arange(60).reshape(3, 20) % 4 > 0
    out = torch.func.vmap(lambda mask: favor_attention(q, k, v, FM, key_mask=mask))(masks)
    for found, mask in zip(out, masks, strict=True):
        assert torch.equal(found, favor_attention(q, k, v, FM, key_mask=mask))
    rates = torch.tensor([0.5, 0.9], dtype=torch.float64)
    out = torch.func.vmap(lambda x: favor_attention(q, k, v, FM, causal=True, decay=x))(rates)
    for found, rate in zip(out, rates, strict=True):
        assert torch.equal(found, favor_attention(q, k, v, FM, causal=True, decay=rate))


def test_vmap_within_vmap():
    q, k, v, *_ = (x.detach() for x in tensors())
    inner = torch.func.vmap(lambda q, k, v: favor_attention(q, k, v, FM), in_dims=(0, 0, 0))
    out = torch.func.vmap(inner, in_dims=(None, None, 0))(q, k, torch.stack([v, -v]))
    expected = favor_attention(q, k, v, FM)
    assert torch.equal(out, torch.stack([expected, -expected]))


@pytest.mark.parametrize("causal", [False, True])
def test_jacrev(causal):
    arrays = [x.detach()[:, :4] if i < 3 else x.detach() for i, x in enumerate(tensors()[:4])]
    found = torch.func.jacrev(lambda *x: attend(*x, causal=causal), argnums=(0, 1, 2, 3))(*arrays)
    dense = torch.func.jacrev(
        lambda *x: bridges.dense(torch, *x, causal=causal, einsum=torch.einsum),
        argnums=(0, 1, 2, 3),
    )(*arrays)
    assert_close(found, dense)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own
def test_forward_mode_is_refused():
    q, k, v, *_ = (x.detach() for x in tensors())
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda q: favor_attention(q, k, v, FM), (q,), (q,))


def test_a_hessian_is_refused():
    q, k, v, *_ = (x.detach() for x in tensors())

    def loss(q):
        return favor_attention(q, k, v, FM).square().sum()

    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.func.jacrev(torch.func.grad(loss))(q)


COMPILED = """
import torch
import favor_np
from favor_np.interop.torch import favor_attention

fm = favor_np.feature_map("positive", dim=8, num_features=64)
q, k, v = torch.randn(3, 2, 50, 8)
W = torch.nn.Parameter(torch.tensor(fm.projection))

def model(q, W):
    out = favor_attention(q + 1, k, v, fm, projection=W, key_mask=torch.arange(50) % 3 > 0)
    return out * 2

graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

compiled = torch.compile(model, backend=backend)
found = compiled(q, W)  # nothing has run before
(grad,) = torch.autograd.grad(found.sum(), W)
expected = model(q, W)
assert torch.equal(found, expected)
assert torch.equal(grad, torch.autograd.grad(expected.sum(), W)[0])
print(len(graphs))
try:
    torch.compile(model, backend="eager", fullgraph=True)(q, W)
except torch._dynamo.exc.Unsupported as error:
    print("refused")
"""


def test_compile_breaks_its_graph_in_the_first_call_of_a_process():
    assert child.python(COMPILED) == "2\nrefused\n"


FLUSHED = """
import sys
import numpy as np
import torch
import favor_np

rng = np.random.default_rng(0)
fm = favor_np.feature_map("positive", dim=32, num_features=128)
q, k, v = (s * rng.standard_normal((4, 2048, 32), np.float32) for s in (1, 1, 1e-38))

def check(flushed):
    assert torch.set_flush_denormal(flushed)
    for causal in (False, True) * 3:
        one, two = (
            favor_np.favor_attention(q, k, v, fm, causal=causal, num_threads=n) for n in (1, 2)
        )
        assert np.array_equal(one, two), (flushed, causal)
        assert (torch.tensor(1e-40) * 1 == 0) == flushed  # the caller's mode is as it was

# Threads are born with the mode of the one that starts them.
for flushed in (False, True, False) if sys.argv[1:] else (True, False, True):
    check(flushed)
"""


@pytest.mark.parametrize("first", ["", "import sys; sys.argv[1:] = ['x']\n"])
def test_numbers_flushed_to_zero_are_flushed_on_all_threads(first):
    """By set_flush_denormal here; by loading a library that was built with -ffast-math elsewhere."""
    child.python(first + FLUSHED)


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
    ("f(q, k, v.to_sparse(), FM)", TypeError, "v must be a dense tensor, got layout torch.sparse"),
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
        "a constant decay has no gradient",
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


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_of_bias_and_factors(alone):
    (*arrays, g), expected = bridges.weights_of_keys(alone)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    q, k, v, bias, gates = tensors
    out = favor_attention(q, k, v, FM, causal=True, key_bias=bias, decay=gates)
    found = torch.autograd.grad((out * torch.tensor(g)).sum(), tensors)
    bridges.assert_close(found, expected)
