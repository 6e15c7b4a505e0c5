"""Gradients by the CUDA kernels, executed from PTX under the real code of the host."""

import inspect
import re

import ml_dtypes
import numpy as np
import ptxrun
import pytest
from support import oracle
from support.pieces import NAMES, STATES, in_pieces
from support.tolerance import relative_error
from support.tuning import tuned

ptxrun.require()

from cases import MAPS, Case, check_states, in_16_bits, same_rounded
from gate import name_of
from mutants import mutate

from favor_np import AttentionState, favor_attention_vjp, feature_map
from favor_np.cuda import launch
from favor_np.cuda.code import THREADS, bounds
from favor_np.cuda.kernels.tiles import TILE


def check(case, gpu, factor=10, names=NAMES, **more):
    """Compare with the dense oracle."""
    q, k, v = case.arrays()
    fm, keywords = case.feature_map(), case.keywords() | more
    out, pullback = favor_attention_vjp(q, k, v, fm, device="cuda", **keywords)
    grad = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
    found = pullback(grad)
    expected = oracle.favor_attention_vjp(q, k, v, fm, grad, **keywords)
    for name, wanted in zip(names, expected, strict=False):
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
    """That of the projection where kernels differ most, for each takes seconds to compile."""
    names = "qkv" if (kind, causal) not in {("relu", True), ("positive", False)} else NAMES
    case = Case(TILE + 2, value_dim=5, rows=20, lead=(), kind=kind, causal=causal)
    check(case, gpu, names=names)


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
    for name in NAMES:
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
    for name in NAMES:
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_the_projection_in_parts(causal, gpu):
    """Where a call keeps the sums of two tiles at a time, of maps of each head."""
    case = Case(2 * TILE + 3, value_dim=5, rows=20, lead=(2, 2), heads=2, causal=causal)
    _, pullback = favor_attention_vjp(
        *case.arrays(), case.feature_map(), causal=causal, device="cuda"
    )
    grad = case.arrays()[2]
    whole = pullback(grad).projection
    launch.forget()
    gpu.launches.clear()
    with tuned(ROOM=2 * 4 * 32 * (32 + 1)):
        assert relative_error(pullback(grad).projection, whole) < 1e-6
    grids = [grid for kernel, grid, _ in gpu.launches if "of_map=1" in name_of(kernel)]
    assert max(blocks for blocks, _ in grids) == 2
    assert sum(blocks for blocks, _ in grids) == 2 * 4 * 3


@pytest.mark.parametrize("more", [STATES["plain"], STATES["grouped"]], ids=["plain", "grouped"])
def test_the_gradient_flows_through_states(more, gpu):
    found, whole = in_pieces([0, 65, 66], more, np.float32, device="cuda")
    for one, other in zip(found, whole, strict=True):
        assert relative_error(one, other) < 5e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["plain", "grouped", "packed"])
def test_states(name, causal, gpu):
    check_states(STATES[name] | {"causal": causal})


def test_a_state_alone_has_a_gradient(gpu):
    """Where no key follows it; and where it is empty."""
    (q, k, v), fm = Case(20, value_dim=5, rows=20, lead=()).arrays(), Case(rows=20).feature_map()
    found = []
    for options in ({"device": "cuda"}, {"dtype": np.float64}):
        empty = AttentionState.zeros(fm, 5, **options)
        for state in (empty, empty.copy().update(k, v)):
            (_, after), pullback = favor_attention_vjp(
                q.astype(empty.dtype), k[:0], v[:0], fm, state=state, return_state=True,
                device=options.get("device"),
            )  # fmt: skip
            grads = pullback(v, (0 * after.S + 1, after.z))
            found.append([*grads.state, grads.q])
    for i in (0, 1):
        for one, other in zip(found[i], found[i + 2], strict=True):
            assert relative_error(one, other) < 1e-5


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
    ("                    cuda.syncthreads()\n                    multiply(",
     "                    multiply(", "put_rows(weight"),
    ("    cuda.syncthreads()\n    i, x =", "    i, x =", "rounded(keys"),
]  # fmt: skip
GUARDS = [
    ("tid, tid < job[COUNT])", "tid, True)", "share_of(q_share"),
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
    with pytest.raises(ValueError, match=r"^window has no gradient on a CUDA device"):
        favor_attention_vjp(q, k, v, fm, device="cuda", causal=True, window=2)
    out, pullback = favor_attention_vjp(q, k, v, fm, device="cuda")
    with pytest.raises(ValueError, match=r"^grad_out must have shape"):
        pullback(out[:2])
    with pytest.raises(ValueError, match=r"^grad_state needs return_state"):
        pullback(out, (out, out))
    (out, state), pullback = favor_attention_vjp(q, k, v, fm, device="cuda", return_state=True)
    with pytest.raises(ValueError, match=r"^grad_state.S must have shape"):
        pullback(out, (state.z, state.z))
