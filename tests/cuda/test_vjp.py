"""Gradients by the CUDA kernels, executed from PTX under the real code of the host."""

import inspect
import re

import ml_dtypes
import numpy as np
import ptxrun
import pytest
from support import oracle
from support.tolerance import relative_error

ptxrun.require()

from cases import MAPS, Case, in_16_bits, same_rounded
from mutants import mutate

from favor_np import favor_attention_vjp, feature_map
from favor_np.cuda.code import THREADS, bounds
from favor_np.cuda.kernels.tiles import TILE


def check(case, gpu, factor=10, **more):
    """Compare with the dense oracle."""
    q, k, v = case.arrays()
    fm, keywords = case.feature_map(), case.keywords() | more
    out, pullback = favor_attention_vjp(q, k, v, fm, device="cuda", **keywords)
    grad = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
    found = pullback(grad)
    *expected, _ = oracle.favor_attention_vjp(q, k, v, fm, grad, **keywords)
    for name, wanted in zip("qkv", expected, strict=True):
        assert getattr(found, name).shape == wanted.shape
        error = float(np.abs(getattr(found, name) - wanted).max() / max(np.abs(wanted).max(), 1))
        assert error < factor * case.tolerance(), (name, error)
    return out, found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 3])
def test_against_the_oracle(length, causal, gpu):
    check(Case(length, value_dim=5, rows=20, lead=(), causal=causal), gpu)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in MAPS if kind != "antithetic"])
def test_every_map(kind, causal, gpu):
    check(Case(TILE + 2, value_dim=5, rows=20, lead=(), kind=kind, causal=causal), gpu)


def test_wide(gpu):
    check(Case(20, dim=70, value_dim=70, rows=70, lead=(), causal=True), gpu)


@pytest.mark.parametrize("causal", [True, False])
def test_masked(causal, gpu):
    case = Case(TILE + 2, value_dim=5, rows=20, masked=True, causal=causal, seed=2)
    q, k, v = case.arrays()
    mask = case.keywords()["key_mask"]
    _, found = check(case, gpu)
    assert not found.k[:, ~mask].any()
    k[:, ~mask] = v[:, ~mask] = np.nan
    out, pullback = favor_attention_vjp(
        q, k, v, case.feature_map(), device="cuda", **case.keywords()
    )
    again = pullback(np.random.default_rng(9).standard_normal(out.shape).astype(np.float32))
    for name in "qkv":
        assert np.array_equal(getattr(again, name), getattr(found, name)), name


@pytest.mark.parametrize(
    "case",
    [
        Case(20, lead=(1, 4), kv_lead=(1, 2), value_dim=5, rows=20, causal=True,
             options={"enable_gqa": True}),
        Case(20, lead=(3,), kv_lead=(), value_dim=5, rows=20, causal=True),
        Case(20, lead=(), kv_lead=(3,), value_dim=5, rows=20),
        Case(20, lead=(2, 2), heads=2, value_dim=5, rows=20, causal=True),
    ],
    ids=["grouped", "shared-keys", "shared-queries", "heads"],
)  # fmt: skip
def test_shared_heads(case, gpu):
    check(case, gpu)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(causal, gpu):
    case = Case(75, value_dim=5, rows=20, causal=causal)
    check(case, gpu, cu_seqlens=np.array([0, 3, 3, 70, 71, 75]))


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("method", ["sderf", "aderf+sderf"])
def test_calibrated_maps(method, heads, gpu):
    rng = np.random.default_rng(0)
    lead = () if heads is None else (heads,)
    q, k, v, grad = (rng.standard_normal((*lead, 70, 8)).astype(np.float32) + 0.5 for _ in range(4))
    fm = feature_map("positive", 8, 64).calibrate(q, k, method)
    _, pullback = favor_attention_vjp(q, k, v, fm, causal=True, device="cuda")
    _, wanted = favor_attention_vjp(*(x.astype(float) for x in (q, k, v)), fm, causal=True)
    found, expected = pullback(grad), wanted(grad)
    for name in "qkv":
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-5


def test_large_queries_and_keys(gpu):
    check(Case(TILE + 2, value_dim=5, rows=20, causal=True, std=5.0), gpu)


def test_in_bfloat16(gpu):
    """What float32 finds, rounded: the pullback goes on from the result before it was."""
    case = Case(70, value_dim=5, rows=20)
    short, long = in_16_bits(case, ml_dtypes.bfloat16)
    fm = case.feature_map()
    whole, wanted = favor_attention_vjp(*long, fm, device="cuda")
    out, pullback = favor_attention_vjp(*short, fm, device="cuda")
    assert same_rounded(out, whole, ml_dtypes.bfloat16)
    grad = np.random.default_rng(9).standard_normal(out.shape).astype(ml_dtypes.bfloat16)
    found, expected = pullback(grad), wanted(grad.astype(np.float32))
    for name in "qkv":
        assert same_rounded(getattr(found, name), getattr(expected, name), ml_dtypes.bfloat16), name


def test_each_gradient_has_the_type_of_its_array(gpu):
    """Those of keys and values are added for three heads in float32 before they are rounded."""
    case = Case(20, lead=(3,), kv_lead=(), value_dim=5, rows=20)
    (_, k, v), (q, *long) = in_16_bits(case, ml_dtypes.bfloat16)
    fm = case.feature_map()
    whole, wanted = favor_attention_vjp(q, *long, fm, device="cuda")
    out, pullback = favor_attention_vjp(q, k, v, fm, device="cuda")
    assert same_rounded(out, whole, np.float32)
    found, expected = pullback(out), wanted(whole)
    for name, dtype in (("q", np.float32), ("k", k.dtype), ("v", v.dtype)):
        assert same_rounded(getattr(found, name), getattr(expected, name), dtype), name


#: Bugs in the kernel of the gradient: what is planted where, and the line at which it is found.
BARRIERS = [
    ("            cuda.syncthreads()\n            for i", "            for i", "keys[p * STRIDE + tx"),
    ("                cuda.syncthreads()\n                multiply(", "                multiply(",
     "] = numbers[u]"),
    ("    cuda.syncthreads()\n    i, x =", "    i, x =", "rounded(keys"),
]  # fmt: skip
GUARDS = [
    ("if x < weight.shape[1]:", "if True:", "four(weight"),
    ("and x < out.shape[1] and own", "and own", "* q[row, uint32(x)]"),
    ("and i < job[COUNT]:", "and i < TILE:", "rounded(keys"),
]


@pytest.mark.parametrize(
    ("planted", "kinds"), [(BARRIERS, {"race", "uninitialised"}), (GUARDS, {"out of bounds"})],
    ids=["barriers", "guards"],
)  # fmt: skip
def test_planted_bugs_are_found(planted, kinds, gpu):
    """Three in one kernel, for it takes seconds to compile: each is found at its own line."""
    check(Case(TILE + 2, value_dim=5, rows=33, lead=(), causal=True), gpu)
    pull, grid, args = next(x for x in gpu.launches if x[0].__name__ == "pull")
    mutant = pull
    for old, new, _ in planted:
        mutant = mutate(mutant, old, new)
    options = {"launch_bounds": bounds(pull)}
    report = ptxrun.run(mutant, grid, THREADS, args, options=options)
    # what is written beyond an array may race with another one that lies there
    assert {finding.split(":")[0] for finding in report.findings} >= kinds
    lines, _ = inspect.getsourcelines(mutant)
    for *_, text in planted:
        (line,) = (n for n, code in enumerate(lines, 1) if text in code)
        assert any(re.search(rf"<source \d+>:{line}\b", x) for x in report.findings), (text, report)


def test_bad_arguments_are_named(gpu):
    q, k, v = Case(length=4, lead=()).arrays()
    fm = Case().feature_map()
    with pytest.raises(ValueError, match=r"^return_state cannot"):
        favor_attention_vjp(q, k, v, fm, device="cuda", return_state=True)
    out, pullback = favor_attention_vjp(q, k, v, fm, device="cuda")
    with pytest.raises(ValueError, match=r"^grad_out must have shape"):
        pullback(out[:2])
    with pytest.raises(ValueError, match=r"^the gradient of the projection"):
        pullback(out).projection  # noqa: B018 (it is computed when it is asked for)
