"""The case table of tests/cuda on a device: every call is held against the dense oracle in float64."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import numpy as np
import pytest
from support import oracle
from support.tolerance import relative_error

import favor_np
from favor_np.cuda import code

each_case = pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)


@pytest.fixture
def cuda():
    from favor_np.cuda import device

    return device.numba_cuda()


def assert_right(case, out):
    assert relative_error(out, case.expected()) < case.tolerance()


def on_device(cuda, case, stream=0):
    """The arrays of a case, and its options, on the device."""
    options = case.keywords()
    if "key_mask" in options:
        options["key_mask"] = cuda.to_device(options["key_mask"], stream)
    return [cuda.to_device(x, stream) for x in case.arrays()], options


def test_what_runs_here_is_what_was_asked_for(cuda):
    from favor_np.cuda import device

    assert cuda.implementation == "NVIDIA"
    assert device.problem() is None
    print(device.current())


@pytest.mark.parametrize("name", ["causal-131", "full-65", "masked-full"])
def test_host_arrays(name):
    case = cases.CASES[name]
    out = favor_np.favor_attention(
        *case.arrays(), case.feature_map(), device="cuda", **case.keywords()
    )
    assert type(out) is np.ndarray
    assert_right(case, out)


@each_case
def test_device_arrays(case, cuda):
    arrays, options = on_device(cuda, case)
    out = favor_np.favor_attention(*arrays, case.feature_map(), **options)
    assert cuda.is_cuda_array(out)
    assert_right(case, out.copy_to_host())


def test_the_callers_stream(cuda):
    case, stream = cases.CASES["causal-131"], cuda.stream()
    arrays, options = on_device(cuda, case, stream)
    out = favor_np.favor_attention(*arrays, case.feature_map(), **options)
    host = out.copy_to_host(stream=stream)
    stream.synchronize()
    assert_right(case, host)


def test_the_same_bits_again(cuda):
    case = cases.CASES["causal-131"]
    arrays, options = on_device(cuda, case)
    first, second = (
        favor_np.favor_attention(*arrays, case.feature_map(), **options).copy_to_host()
        for _ in range(2)
    )
    assert np.array_equal(first, second)
    for array, host in zip(arrays, case.arrays(), strict=True):
        assert np.array_equal(array.copy_to_host(), host)


@pytest.mark.parametrize("library", ["cupy", "torch", "jax.numpy"])
def test_arrays_of_other_libraries(library, cuda):
    module = pytest.importorskip(library)
    case = cases.CASES["causal-131"]
    if library == "torch":
        if not module.cuda.is_available():
            pytest.skip("a PyTorch without CUDA")
        arrays = [module.from_numpy(x).to("cuda") for x in case.arrays()]
    else:
        arrays = [module.asarray(x) for x in case.arrays()]
    if library == "jax.numpy" and arrays[0].device.platform != "gpu":
        pytest.skip("a JAX without CUDA")
    out = favor_np.favor_attention(*arrays, case.feature_map(), **case.keywords())
    assert type(out) is type(arrays[0])
    host = out.get() if library == "cupy" else np.asarray(out.cpu() if library == "torch" else out)
    assert_right(case, host)


def test_calibrated_maps(cuda):
    rng = np.random.default_rng(0)
    q, k, v, grad = (rng.standard_normal((2, 70, 8)).astype(np.float32) + 0.5 for _ in range(4))
    fm = favor_np.feature_map("positive", 8, 64).calibrate(q, k, "aderf+sderf")
    out, pullback = favor_np.favor_attention_vjp(*map(cuda.to_device, (q, k, v)), fm, causal=True)
    whole = (x.astype(float) for x in (q, k, v))
    wanted, theirs = favor_np.favor_attention_vjp(*whole, fm, causal=True)
    assert relative_error(out.copy_to_host(), wanted) < 1e-5
    found, expected = pullback(cuda.to_device(grad)), theirs(grad)
    for name in "qkv":
        mine = getattr(found, name).copy_to_host()
        assert relative_error(mine, getattr(expected, name)) < 1e-5


def test_packed_sequences(cuda):
    case, offsets = cases.CASES["causal-131"], [0, 3, 3, 70, 131]
    arrays, options = on_device(cuda, case)
    fm = case.feature_map()
    out = favor_np.favor_attention(*arrays, fm, cu_seqlens=offsets, **options).copy_to_host()
    parts = [
        oracle.favor_attention(*(x[:, i:j] for x in case.arrays()), fm, **options)
        for i, j in itertools.pairwise(offsets)
        if j > i
    ]
    assert relative_error(out, np.concatenate(parts, axis=1)) < case.tolerance()


def test_calls_on_several_streams_and_threads_do_not_meet(cuda):
    """Each thread and stream has scratch memory of its own, which grows; none waits for another."""
    picked = [cases.CASES[name] for name in ("causal-2", "causal-65", "full-2")]
    alone = []
    for case in picked:
        arrays, options = on_device(cuda, case)
        out = favor_np.favor_attention(*arrays, case.feature_map(), **options)
        alone.append(out.copy_to_host())

    def work(_):
        made = []
        for stream in (cuda.stream(), 0):
            for case, wanted in zip(picked, alone, strict=True):
                arrays, options = on_device(cuda, case, stream)
                out = favor_np.favor_attention(*arrays, case.feature_map(), **options)
                made.append((arrays, stream, out, wanted))  # kept, for it is not done yet
        cuda.synchronize()
        return all(np.array_equal(out.copy_to_host(), wanted) for *_, out, wanted in made)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_16_bits_are_read_and_the_result_rounded(cuda):
    case = cases.CASES["causal-131"]
    short, long = cases.in_16_bits(case, np.float16)
    found, whole = (
        favor_np.favor_attention(
            *map(cuda.to_device, arrays), case.feature_map(), **case.keywords()
        ).copy_to_host()
        for arrays in (short, long)
    )
    assert cases.same_rounded(found, whole, np.float16)


def test_arrays_of_a_library_that_knows_dlpack_only(cuda):
    from cuda.core.utils import StridedMemoryView

    case = cases.CASES["causal-131"]
    arrays, options = on_device(cuda, case)
    shown = [StridedMemoryView.from_any_interface(x, stream_ptr=-1) for x in arrays]
    out = favor_np.favor_attention(*shown, case.feature_map(), **options)
    assert_right(case, out.copy_to_host())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_of_torch(dtype, cuda):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("a PyTorch without CUDA")
    case = cases.CASES["causal-131"]
    short = [torch.from_numpy(x).to("cuda", getattr(torch, dtype)) for x in case.arrays()]
    found, whole = (
        favor_np.favor_attention(*arrays, case.feature_map(), **case.keywords())
        for arrays in (short, [x.float() for x in short])
    )
    assert found.dtype == short[0].dtype
    assert torch.equal(found, whole.to(found.dtype))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients(causal, cuda):
    case = cases.Case(cases.TILE + 2, value_dim=5, rows=20, causal=causal)
    fm, arrays = case.feature_map(), case.arrays()
    grad = np.random.default_rng(9).standard_normal(arrays[2].shape).astype(np.float32)
    there = [cuda.to_device(x) for x in arrays]
    out, pullback = favor_np.favor_attention_vjp(*there, fm, causal=causal)
    found = pullback(cuda.to_device(grad))
    *expected, _ = oracle.favor_attention_vjp(*arrays, fm, grad, causal=causal)
    assert_right(case, out.copy_to_host())
    for name, wanted in zip("qkv", expected, strict=True):
        error = np.abs(getattr(found, name).copy_to_host() - wanted).max()
        assert error < 10 * case.tolerance() * max(np.abs(wanted).max(), 1)


def test_gradients_through_states(cuda):
    """Of two pieces on the device, and of the projection, against those of the whole."""
    case = cases.Case(70, value_dim=5, rows=20, causal=True)
    fm, arrays = case.feature_map(), case.arrays()
    grad = np.random.default_rng(9).standard_normal(arrays[2].shape).astype(np.float32)
    state, pieces = None, []
    for part in (slice(0, 66), slice(66, 70)):
        *there, g = (cuda.to_device(np.ascontiguousarray(x[:, part])) for x in (*arrays, grad))
        (_, state), pullback = favor_np.favor_attention_vjp(
            *there, fm, causal=True, state=state, return_state=True
        )
        pieces.append((pullback, g))
    (first, g), (second, h) = pieces
    late = second(h)
    early = first(g, [cuda.to_device(x) for x in late.state])
    *expected, projection = oracle.favor_attention_vjp(*arrays, fm, grad, causal=True)
    for name, wanted in zip("qkv", expected, strict=True):
        found = np.concatenate([getattr(x, name).copy_to_host() for x in (early, late)], axis=1)
        error = np.abs(found - wanted).max()
        assert error < 10 * case.tolerance() * max(np.abs(wanted).max(), 1), name
    assert relative_error(early.projection + late.projection, projection) < 10 * case.tolerance()


def test_a_state(cuda):
    case = cases.Case(70, value_dim=5, rows=20, causal=True)
    fm, expected = case.feature_map(), case.expected()
    first = [cuda.to_device(np.ascontiguousarray(x[:, :66])) for x in case.arrays()]
    out, state = favor_np.favor_attention(*first, fm, causal=True, return_state=True)
    assert relative_error(out.copy_to_host(), expected[:, :66]) < case.tolerance()
    for i in range(66, 70):
        token = [cuda.to_device(np.ascontiguousarray(x[:, i])) for x in case.arrays()]
        row = state.step(*token).copy_to_host()
        assert relative_error(row, expected[:, i]) < case.tolerance()


def test_steps_of_states_that_decay(cuda):
    for name, error, allowed in cases.step_errors(cuda):
        assert error < allowed, name


def test_compiled_kernels_are_kept(cuda, tmp_path, monkeypatch):
    """And what is loaded from there gives the same bits."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    case = cases.CASES["causal-65"]
    arrays, options = on_device(cuda, case)
    found = []
    for name in ("compiled", "stored"):
        monkeypatch.setattr(code, "_functions", {})
        before = code.counts[name]
        out = favor_np.favor_attention(*arrays, case.feature_map(), **options)
        found.append(out.copy_to_host())
        assert code.counts[name] > before
    assert np.array_equal(*found)


def test_the_benchmarks_run(cuda, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "asv_benchmarks")
    from benchmarks import bench_cuda

    for kind in (bench_cuda.Forward, bench_cuda.Gradient, bench_cuda.RoundTrip, bench_cuda.Decode):
        benchmark = kind()
        values = (2,) if kind is bench_cuda.Decode else ("causal", "L=70 d=16 m=32 H=2")
        benchmark.setup(*values)
        (name,) = (name for name in dir(kind) if name.startswith("time_"))
        getattr(benchmark, name)(*values)


def test_host_and_device_arrays_are_not_mixed(cuda):
    case = cases.CASES["causal-2"]
    q, k, v = case.arrays()
    with pytest.raises(TypeError, match="lies in host memory"):
        favor_np.favor_attention(cuda.to_device(q), k, v, case.feature_map(), causal=True)


def test_out_of_memory_is_one_line(cuda):
    free = cuda.current_context().get_memory_info().free
    kept = cuda.device_array(free - (96 << 20), np.uint8)
    x = np.zeros((1 << 20, 32), np.float32)
    with pytest.raises(MemoryError, match=r"^out of memory on .* GiB .* are free$"):
        favor_np.favor_attention(x, x, x, cases.Case(dim=32).feature_map(), device="cuda")
    del kept
