"""Attention on dask arrays: the result of favor_attention in blocks that exchange states only."""

import itertools
import os
import pickle
import signal
import time

import h5py
import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from support import child
from support.inputs import draw, random_inputs
from support.parameters import each_causal
from support.tolerance import relative_error
from support.tuning import tuned

import favor_np
from favor_np import AttentionState, FeatureMap

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

from dask.callbacks import Callback
from dask.core import flatten
from dask.sizeof import sizeof

from favor_np.interop.dask import favor_attention

D, DV, M = 4, 3, 10
EPS = {np.float16: 2e-3, np.float32: 2e-5, np.float64: 1e-13}


def inputs(*lead, length=30, keys=None, dtype=np.float64):
    return random_inputs(length, D, DV, lead, Lk=keys, dtype=dtype)


def feature_map(*heads, **options):
    return FeatureMap.from_projection(draw(*heads, M // 2, D, seed=9), antithetic=True, **options)


FM = feature_map()


def chunked(arrays, *chunks):
    """Dask arrays of these chunks along the leading axes and the sequence."""
    return [da.from_array(x, chunks=(*chunks, -1)) for x in arrays]


def compute(array, scheduler="sync"):
    assert isinstance(array, da.Array)
    result = array.compute(scheduler=scheduler)
    assert (result.shape, result.dtype) == (array.shape, array.dtype)
    return result


# -- The same result as favor_attention ---------------------------------------------------------------

CHUNKS = [
    (-1, -1, -1),
    (1, 1, 10),
    (1, 2, (1, 29)),
    (2, 1, (29, 1)),
    (-1, (1, 2), (7, 9, 2, 12)),
    ((1, 1), (2, 1), 1),
    (-1, -1, (0, 10, 0, 20, 0)),
    ((0, 2), (3, 0), 8),
]


@each_causal
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=lambda dtype: dtype.__name__)
def test_chunks(causal, chunks, dtype):
    q, k, v = inputs(2, 3, dtype=dtype)
    mask = np.random.default_rng(1).random((2, 3, 30)) < 0.7
    mask[:, :, :9] = False  # a block without a key
    out = favor_attention(
        *chunked((q, k, v), *chunks), FM, causal=causal, key_mask=da.from_array(mask, chunks=chunks)
    )
    assert out.chunks[:3] == tuple(
        tuple(n for n in c if n) for c in chunked((q,), *chunks)[0].chunks[:3]
    )
    expected = favor_np.favor_attention(q, k, v, FM, causal=causal, key_mask=mask)
    assert expected.dtype == out.dtype == dtype
    assert relative_error(compute(out), expected) < EPS[dtype]


@each_causal
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_bias_and_decay(causal, chunks):
    q, k, v = inputs(2, 3)
    rng = np.random.default_rng(1)
    bias, gates = rng.normal(size=(2, 3, 30)), rng.uniform(0.01, 1, (3, 30))
    bias[0, 0, ::4] = -np.inf
    arrays = chunked((q, k, v), *chunks)
    for decay in (None, 0.9, [0.5, 0.9, 1.0], gates[None], da.from_array(gates[None], chunks=7)):
        if decay is not None and not causal:
            with pytest.raises(ValueError, match="needs causal"):
                favor_attention(*arrays, FM, decay=decay)
            continue
        more = {"causal": causal, "decay": decay}
        out = favor_attention(*arrays, FM, key_bias=da.from_array(bias, chunks=chunks), **more)
        if isinstance(decay, da.Array):
            more["decay"] = gates[None]
        expected = favor_np.favor_attention(q, k, v, FM, key_bias=bias, **more)
        assert relative_error(compute(out), expected) < 1e-13


@each_causal
def test_products_of_bfloat16(causal):
    arrays = inputs(2, 3, dtype=np.float32)
    with tuned(USE_BFLOAT16=True):
        full, half = (
            compute(favor_attention(*chunked(arrays, 1, 1, 10), FM, causal=causal, precision=p))
            for p in ("full", "bfloat16")
        )
    assert 0 < relative_error(half, full) < 2e-2


def test_bias_and_decay_that_do_not_fit():
    q, k, v = chunked(inputs(2, 3), 1, 1, 10)
    with pytest.raises(ValueError, match="key_bias must have shape"):
        favor_attention(q, k, v, FM, key_bias=np.zeros(29))
    with pytest.raises(ValueError, match="factor a token"):
        favor_attention(q, k, v, FM, causal=True, decay=np.ones((2, 3, 29)))
    with pytest.raises(ValueError, match="factor a token"):
        favor_attention(q, k, v, FM, causal=True, decay=np.ones(2))
    with pytest.raises(ValueError, match="key_bias must be finite"):
        favor_attention(q, k, v, FM, key_bias=np.full(30, np.nan)).compute(scheduler="sync")


def partitions(n):
    """Chunks of an axis of length n."""
    cuts = st.lists(st.integers(0, n), max_size=6).map(lambda cuts: sorted({0, *cuts, n}))
    return cuts.map(lambda c: tuple(b - a for a, b in itertools.pairwise(c)) or (0,))


@each_causal
@given(data=st.data())
def test_any_chunks(causal, data):
    """Each array in its own chunks, masked or not, of any kind of map."""
    batch, heads, length = (data.draw(st.integers(0, n)) for n in (2, 3, 40))
    keys = length if causal else data.draw(st.integers(0, 40))
    q, k, v = inputs(batch, heads, length=length, keys=keys)
    arrays = [
        da.from_array(x, chunks=tuple(data.draw(partitions(n)) for n in x.shape)) for x in (q, k, v)
    ]
    mask = np.random.default_rng(0).random((batch, heads, keys)) < 0.6
    mask = data.draw(st.sampled_from([None, mask]))
    dims = [(), (heads,)] if heads else [()]
    fm = feature_map(*data.draw(st.sampled_from(dims)))
    out = favor_attention(*arrays, fm, causal=causal, key_mask=mask)
    expected = favor_np.favor_attention(q, k, v, fm, causal=causal, key_mask=mask)
    assert relative_error(compute(out), expected) < 1e-13


@pytest.mark.parametrize("kind", ["positive", "relu", "elu"])
@each_causal
def test_maps_with_a_projection_a_head(causal, kind):
    fm = FeatureMap.from_projection(draw(3, M, D), kind, kernel_epsilon=0.01)
    q, k, v = inputs(2, 3)
    expected = favor_np.favor_attention(q, k, v, fm, causal=causal)
    for heads in (3, 1, (2, 1)):
        out = favor_attention(*chunked((q, k, v), 1, heads, 12), fm, causal=causal)
        assert relative_error(compute(out), expected) < 1e-13


@each_causal
@pytest.mark.parametrize("one", [draw(1, M, D), draw(3, M, D)], ids=["one", "three"])
def test_heads_that_only_the_map_or_the_mask_has(causal, one):
    q, k, v = inputs()
    fm, mask = FeatureMap.from_projection(one), np.arange(2 * 3 * 30).reshape(2, 3, 30) % 4 > 0
    for options in ({}, {"key_mask": mask}):
        out = favor_attention(*chunked((q, k, v), 8), fm, causal=causal, **options)
        expected = favor_np.favor_attention(q, k, v, fm, causal=causal, **options)
        assert relative_error(compute(out), expected) < 1e-13


LEADS = [
    ((2, 3), (3,), (3,)),
    ((3,), (2, 3), (2, 3)),
    ((2, 3), (1, 3), (2, 1)),
    ((1, 1), (2, 3), ()),
    ((), (2, 1), (3,)),
]


@each_causal
@pytest.mark.parametrize("leads", LEADS, ids=str)
def test_leading_axes_broadcast(causal, leads):
    arrays = [inputs(*lead)[i] for i, lead in enumerate(leads)]
    lazy = [da.from_array(x, chunks=(*[1] * (x.ndim - 2), 9, -1)) for x in arrays]
    out = favor_attention(*lazy, FM, causal=causal)
    expected = favor_np.favor_attention(*arrays, FM, causal=causal)
    assert relative_error(compute(out), expected) < 1e-13


@each_causal
@pytest.mark.parametrize("heads", [-1, 2, (4, 2)], ids=str)
@pytest.mark.parametrize("fm", [FM, feature_map(3)], ids=["shared", "own"])
def test_grouped_queries(causal, heads, fm):
    _, k, v = inputs(2, 3)
    q = draw(2, 6, 30, D, seed=5)
    (lazy,) = chunked((q,), 1, heads, 12)
    out = favor_attention(lazy, *chunked((k, v), 2, 1, 7), fm, causal=causal, enable_gqa=True)
    expected = favor_np.favor_attention(q, k, v, fm, causal=causal, enable_gqa=True)
    assert out.chunks[:3] == lazy.chunks[:3]
    assert relative_error(compute(out), expected) < 1e-13


@each_causal
def test_numpy_arrays_and_other_dtypes_are_taken(causal):
    q, k, v = (np.round(8 * x) / 8 for x in inputs(2))
    lazy = chunked((q, k, v), 1, 8)
    mask = [True, False] * 15
    expected = favor_np.favor_attention(q, k, v, FM, causal=causal, key_mask=mask)
    for arrays in ((lazy[0], k, v), (q, lazy[1], v.tolist()), (q, k, lazy[2])):
        out = favor_attention(*arrays, FM, causal=causal, key_mask=mask)
        assert relative_error(compute(out), expected) < 1e-13
    for types in (
        "f2 f2 f4",
        "f4 f2 f2",
        "f4 f4 f8",
        "i4 f4 f4",
        "f2 f2 i1",
        "? ? ?",
        ">f4 >f4 >f4",
    ):
        arrays = [x.astype(t) for x, t in zip((q, k, v), types.split(), strict=True)]
        out = favor_attention(*chunked(arrays, 1, 8), FM, causal=causal)
        expected = favor_np.favor_attention(*arrays, FM, causal=causal)
        assert out.dtype == expected.dtype, types
        assert relative_error(compute(out), expected) < 2e-5, types


@each_causal
@pytest.mark.parametrize("shapes", [
    ((0, 6, D), (0, 6, D), (0, 6, DV)), ((2, 0, D), (2, 0, D), (2, 0, DV)),
    ((2, 6, D), (2, 6, D), (2, 6, 0)), ((6, D), (0, 6, D), (6, DV)),
])  # fmt: skip
def test_empty_arrays(causal, shapes):
    arrays = [da.zeros(shape) for shape in shapes]
    out = compute(favor_attention(*arrays, FM, causal=causal))
    assert np.array_equal(out, favor_np.favor_attention(*map(np.zeros, shapes), FM, causal=causal))


def test_no_keys():
    assert not compute(
        favor_attention(da.ones((6, D)), da.ones((0, D)), da.ones((0, DV)), FM)
    ).any()


# -- Lazy, named after its arguments, refused at once ------------------------------------------------


def never(block):
    raise RuntimeError("computed")


@each_causal
def test_nothing_is_computed_before_the_result_is(causal):
    lazy = [x.map_blocks(never, meta=np.empty((0, 0, 0))) for x in chunked(inputs(2), 1, 10)]
    mask = da.ones((2, 30), chunks=10).map_blocks(never, meta=np.empty((0, 0), bool))
    out = favor_attention(*lazy, FM, causal=causal, key_mask=mask)
    with pytest.raises(RuntimeError, match="computed"):
        compute(out)


@each_causal
def test_arrays_of_xarray_stay_lazy(causal):
    arrays = inputs(2)
    lazy = [
        xarray.DataArray(x.map_blocks(never, meta=np.empty((0, 0, 0))))
        for x in chunked(arrays, 1, 10)
    ]
    mask = xarray.DataArray(
        da.ones((2, 30), chunks=10).map_blocks(never, meta=np.empty((0, 0), bool))
    )
    out = favor_attention(*lazy, FM, causal=causal, key_mask=mask)
    assert out.chunks == ((1, 1), (10, 10, 10), (DV,))
    with pytest.raises(RuntimeError, match="computed"):
        compute(out)
    expected = favor_np.favor_attention(*arrays, FM, causal=causal)
    for lazy in (
        [xarray.DataArray(x) for x in chunked(arrays, 1, 10)],
        [xarray.Variable(tuple("hld"), x) for x in chunked(arrays, 1, 10)],
        [xarray.DataArray(x) for x in arrays],
    ):
        assert relative_error(compute(favor_attention(*lazy, FM, causal=causal)), expected) < 1e-13


@each_causal
@pytest.mark.parametrize("library", ["zarr", "h5py"])
def test_arrays_in_files_stay_there(causal, library, tmp_path, monkeypatch):
    """In the chunks that they are stored in; and nothing is read before the result is asked for."""
    arrays = inputs(2)
    if library == "zarr":
        group = zarr.open_group(tmp_path / "zarr")
        stored = [group.create_array(n, data=x, chunks=(1, 10, x.shape[-1]))
                  for n, x in zip("qkv", arrays, strict=True)]  # fmt: skip
    else:
        group = h5py.File(tmp_path / "hdf5", "w")
        stored = [group.create_dataset(n, data=x, chunks=(1, 10, x.shape[-1]))
                  for n, x in zip("qkv", arrays, strict=True)]  # fmt: skip
    kind, sizes = type(stored[0]), []
    read = kind.__getitem__

    def watched(array, at, *args):
        part = read(array, at, *args)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(kind, "__getitem__", watched)
    out = favor_attention(*stored, FM, causal=causal)
    assert out.chunks == ((1, 1), (10, 10, 10), (DV,))
    assert sum(sizes) == 0
    expected = favor_np.favor_attention(*arrays, FM, causal=causal)
    assert relative_error(compute(out, "threads"), expected) < 1e-13
    assert sum(sizes) >= sum(x.size for x in arrays)


def test_shards_and_what_is_not_chunked(tmp_path):
    x = draw(2, 30, D)
    group = zarr.open_group(tmp_path / "zarr")
    sharded = group.create_array("x", data=x, chunks=(1, 5, D), shards=(1, 15, D))
    assert favor_attention(sharded, sharded, sharded, FM).chunks == ((1, 1), (15, 15), (D,))
    with h5py.File(tmp_path / "hdf5", "w") as file:
        whole = file.create_dataset("x", data=x)
        assert favor_attention(whole, whole, whole, FM).chunks == ((2,), (30,), (D,))


@pytest.mark.parametrize("dtype", ["i1", "?", "f4"])
def test_a_graph_takes_no_memory_of_the_arrays_length(dtype):
    q, k, v = (da.zeros((10**12, n), chunks=(10**11, n), dtype=dtype) for n in (D, D, DV))
    mask = da.ones(10**12, chunks=10**11, dtype=bool)
    out = favor_attention(q, k, v, FM, causal=True, key_mask=mask)
    assert out.shape == (10**12, DV)


def test_a_graph_is_named_after_its_arguments():
    q, k, v = chunked(inputs(2, 3), 1, 1, 10)
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        name = favor_attention(q, k, v, FM).name
    assert favor_attention(q, k, v, pickle.loads(pickle.dumps(FM))).name == name
    others = [
        favor_attention(q, k, v, FM, causal=True),
        favor_attention(q, k, v, FM, enable_gqa=True),
        favor_attention(q, k, v, FM, num_threads=2),
        favor_attention(q, k, v, FM, key_mask=np.ones(30, bool)),
        favor_attention(q, k, v, feature_map(scale=1.0)),
        favor_attention(q, k + 1, v, FM),
        favor_attention(q.rechunk({-2: 15}), k, v, FM),
    ]
    assert len({name, *(out.name for out in others)}) == 1 + len(others)


def test_the_name_is_the_same_in_another_process():
    code = """
    import dask.array as da, favor_np
    from favor_np.interop.dask import favor_attention
    x = da.ones((2, 30, 4), chunks=(1, 10, 4))
    fm = favor_np.feature_map("positive", dim=4, num_features=8)
    print(favor_attention(x, x, x, fm, causal=True).name)
    """
    x = da.ones((2, 30, 4), chunks=(1, 10, 4))
    fm = favor_np.feature_map("positive", dim=4, num_features=8)
    name = favor_attention(x, x, x, fm, causal=True).name
    assert child.python(code, unset=["PYTHONHASHSEED"]).strip() == name


def test_the_package_does_not_import_dask():
    code = "import favor_np.interop, sys; print({'dask', 'numba'} & set(sys.modules))"
    assert child.python(code) == "set()\n"


def test_without_dask_the_error_names_the_extra():
    code = """
    import sys
    sys.modules["dask"] = None
    try:
        import favor_np.interop.dask
    except ImportError as error:
        print(error.name, error)
    """
    text = "dask favor_np.interop.dask needs dask: pip install 'favor_np[dask]'\n"
    assert child.python(code) == text


def unknown(x):
    return x[x[:, 0] > 0]


REFUSED = [
    ("f(q[..., :2], k, v, FM)", ValueError, r"q must have shape \(..., L, 4\).*\(2, 6, 2\)"),
    ("f(q, k[..., :2], v, FM)", ValueError, r"k must have shape \(..., L, 4\).*\(2, 6, 2\)"),
    ("f(q, k, v[:, :5], FM)", ValueError, r"v must have one row .* 5 rows .*\(2, 5, 3\)"),
    ("f(q[0, 0], k, v, FM)", ValueError, r"q must have at least 2 axes, got shape \(4,\)"),
    ("f(q[:, :5], k, v, FM, causal=True)", ValueError, "causal=True.*5 rows of q and 6 of k"),
    ("f(da.ones((3, 6, 4)), k, v, FM)", ValueError, r"broadcast: q \(3,\), keys \(2,\)"),
    ("f(da.ones((3, 6, 4)), k, v, FM, enable_gqa=True)", ValueError, "multiple.* got 3 and 2"),
    (
        "f(q, k, v, FM, key_mask=da.ones(5, dtype=bool))",
        ValueError,
        r"key_mask .* got shape \(5,\)",
    ),
    ("f(q, k, v, FM, key_mask=da.ones((), dtype=bool))", ValueError, r"key_mask .* got shape \(\)"),
    ("f(q, k, v, FM, key_mask=da.ones((3, 6), dtype=bool))", ValueError, r"key_mask \(3,\)"),
    ("f(q, k, v, FM, key_mask=da.ones(6))", TypeError, "key_mask must be boolean.*float64"),
    ("f(q, k, v, FM, key_mask=[1] * 6)", TypeError, "key_mask must be boolean.*int64"),
    ("f(unknown(q[0]), k, v, FM)", ValueError, r"q must have chunks of known size, got .*\(nan, 4"),
    ("f(q, unknown(k[0]), v, FM)", ValueError, "k must have chunks of known size"),
    ("f(q, k, v, FM, key_mask=unknown(k[0])[:, 0] > 0)", ValueError, "key_mask must have chunks"),
    ("f(q + 1j, k, v, FM)", TypeError, "q must hold real numbers .* complex128"),
    ("f(q, k.astype(object), v, FM)", TypeError, "k must hold real numbers .* object"),
    ("f(q, k, [['a'] * 3] * 6, FM)", TypeError, "v must hold real numbers"),
    ("f(q, da.ma.masked_less(k, 0), v, FM)", TypeError, "k must have blocks of numpy.ndarray.*Mas"),
    ("f(q, k, v, None)", TypeError, "feature_map must be a FeatureMap, got None"),
    ("f(q, k, v, favor_np.feature_map('trig', 4, 8))", ValueError, "trig"),
    ("f(q, k, v, feature_map(3))", ValueError, r"broadcast.*feature_map \(3,\)"),
    ("f(q, k, v, FM, causal=1)", TypeError, "causal must be True or False, got 1"),
    ("f(q, k, v, FM, precision='half')", ValueError, "precision must be one of"),
    ("f(q, k, v, FM, precision='bfloat16')", ValueError, "needs arrays of at most 32 bits"),
    ("f(q, k, v, FM, num_threads=0)", ValueError, "num_threads must be at least 1, got 0"),
    (
        "f(da.ones((4, 6, 4), chunks=(3, -1, -1)), k, v, FM, enable_gqa=True)",
        ValueError,
        r"chunks of the heads of q must be multiples of 2, .* got \(3, 1\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(call, error, message):
    q, k, v = chunked(inputs(2, length=6), 1, 3)
    with pytest.raises(error, match=message):
        eval(call, globals() | {"f": favor_attention, "q": q, "k": k, "v": v})


# -- Causality ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [np.nan, 100.0])
def test_later_blocks_leave_earlier_bits_alone(change):
    q, k, v = inputs(2, length=90)
    before = compute(favor_attention(*chunked((q, k, v), 1, 10), FM, causal=True))
    for first in range(10, 90, 10):
        later_k, later_v = k.copy(), v.copy()
        later_k[:, first:] = later_v[:, first:] = change
        after = compute(favor_attention(*chunked((q, later_k, later_v), 1, 10), FM, causal=True))
        assert np.array_equal(after[:, :first], before[:, :first])
        assert not np.array_equal(after[:, first:], before[:, first:])
        fewer = (x[:, :first] for x in (q, k, v))
        short = compute(favor_attention(*chunked(fewer, 1, 10), FM, causal=True))
        assert np.array_equal(short, before[:, :first])


# -- What moves --------------------------------------------------------------------------------------


class Trace(Callback):
    """What every task returned, as it was then, and on what it depended."""

    def __init__(self):
        super().__init__()
        self.results, self.pickles, self.dependencies = {}, {}, {}

    def _start_state(self, graph, state):
        self.dependencies.update(state["dependencies"])

    def _posttask(self, key, result, graph, state, worker):
        self.results[key] = result
        if isinstance(result, AttentionState):
            self.pickles[key] = pickle.dumps(result)


def traced(causal, blocks, masked):
    """Run a graph of one batch block; its trace, its output, and the inputs it was made of."""
    q, k, v = chunked(inputs(2, length=10 * blocks, dtype=np.float32), -1, 10)
    mask = da.ones((2, 10 * blocks), chunks=(-1, 10), dtype=bool) if masked else None
    out = favor_attention(q, k, v, FM, causal=causal, key_mask=mask)
    with Trace() as trace:
        out.compute(scheduler="sync", optimize_graph=False)
    return trace, out, [q, k, v, *([mask] if masked else [])]


def is_merge(key):
    return "pair" in key


def depth(key, dependencies):
    """Merges on the longest way to a key."""
    return is_merge(key) + max(
        (depth(other, dependencies) for other in dependencies[key]), default=0
    )


#: By causal and the number of blocks: merges, and how many of them one after the other.
MERGES = {
    (False, 1): (0, 0),
    (False, 2): (1, 1),
    (False, 3): (2, 2),
    (False, 16): (15, 4),
    (True, 1): (0, 0),
    (True, 2): (0, 0),
    (True, 3): (1, 1),
    (True, 16): (22, 6),
}


@pytest.mark.parametrize(("causal", "blocks"), MERGES)
@pytest.mark.parametrize("masked", [False, True])
def test_only_states_pass_between_blocks(causal, blocks, masked):
    trace, out, arrays = traced(causal, blocks, masked)
    tokens = {x.name for x in arrays} | {key[0] for key in trace.results if "-tokens-" in key[0]}
    moved = []
    for key, needed in trace.dependencies.items():
        alias = "-merge-" in key[0] and not is_merge(key)  # a second name of a state
        for other in needed if key[0].startswith("favor_attention") else ():
            if other[0] in tokens:
                assert other[2] == key[2]  # of its own block
            else:
                assert isinstance(trace.results[other], AttentionState)
                moved += [] if alias else [other]
    merges = sum(map(is_merge, trace.results))
    folds = sum("-fold-" in key[0] for key in trace.results)
    levels = max(depth(key, trace.dependencies) for key in flatten(out.__dask_keys__()))
    assert (merges, levels) == MERGES[causal, blocks]
    assert folds == blocks - causal
    assert len(moved) == folds + 2 * merges + blocks  # a fold starts from the empty state
    state = 2 * M * (DV + 2) * 4
    for key in moved:
        assert state < len(trace.pickles[key]) < state + FM.projection.nbytes + 1500


def test_dask_knows_what_a_state_weighs():
    state = AttentionState.zeros(FM, DV, (2, 3), dtype=np.float32)
    assert sizeof(state) >= 2 * 3 * M * (DV + 2) * 4


@each_causal
def test_no_task_changes_what_another_returned(causal):
    trace, _, _ = traced(causal, 8, masked=True)
    assert len(trace.pickles) > 10
    for key, content in trace.pickles.items():
        assert pickle.dumps(trace.results[key]) == content


def test_the_scan_of_1024_blocks():
    """The numbers in docs/dask.md."""
    x = da.ones((1024, D), chunks=(1, D))
    graph = dict(favor_attention(x, x, x, FM, causal=True).__dask_graph__())
    levels = {}
    for key, task in graph.items():
        if is_merge(key):  # in the order in which they were made
            levels[key] = 1 + max(levels.get(part, 0) for part in task[1:])
    assert len(levels) == 2026
    assert max(levels.values()) == 18


class Peak(Callback):
    """The greatest number of blocks of keys, and of states, held at a time."""

    def __init__(self):
        super().__init__()
        self.blocks = self.states = 0

    def _posttask(self, key, result, graph, state, worker):
        held = state["cache"].values()
        self.blocks = max(self.blocks, sum(type(value) is tuple for value in held))
        self.states = max(self.states, sum(isinstance(value, AttentionState) for value in held))


@each_causal
def test_few_blocks_are_held_at_a_time(causal):
    """Where blocks are asked for; causal keys are all held where the whole array is."""
    q, k, v = (da.ones(shape, chunks=(10, -1)) for shape in ((640, D), (640, D), (640, DV)))
    out = favor_attention(q, k, v, FM, causal=causal).map_blocks(np.sum, keepdims=True)
    with Peak() as peak:
        out.persist(scheduler="sync")
    assert peak.blocks <= 2
    assert peak.states <= 10


# -- Schedulers --------------------------------------------------------------------------------------


@each_causal
def test_threads(causal):
    q, k, v = chunked(inputs(2, 3, length=500, dtype=np.float32), 1, 1, 50)
    out = favor_attention(q, k, v, FM, causal=causal)
    assert np.array_equal(compute(out, "threads"), compute(out, "sync"))


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_worker_that_is_killed(tmp_path):
    """One of two worker processes dies in the middle: others do its work, with the same bits."""
    distributed = pytest.importorskip("distributed")
    q, k, v = chunked(inputs(2, length=640, dtype=np.float32), -1, 40)
    expected = compute(favor_attention(q, k, v, FM, causal=True))
    folder = str(tmp_path)

    def load(block, block_id):
        """The first worker to come to its third block waits there for its death."""
        import os
        import pathlib
        import signal

        here, me = pathlib.Path(folder), str(os.getpid())
        (here / f"{block_id[1]}-{me}").touch()
        if len(list(here.glob(f"*-{me}"))) == 3:
            (here / f"third.{me}").write_text(me)
            try:
                os.link(here / f"third.{me}", here / "victim")
            except FileExistsError:
                return block
            signal.pause()
        return block

    slow = k.map_blocks(load, meta=np.empty((0, 0, 0), np.float32))
    out = favor_attention(q, slow, v, FM, causal=True)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "memory_limit": 0}
    with (
        distributed.LocalCluster(**options, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = client.run(os.getpid)
        result = client.compute(out)
        victim = wait_for(lambda: (tmp_path / "victim").exists() and (tmp_path / "victim"))
        address = {str(pid): address for address, pid in pids.items()}[victim.read_text()]
        held = wait_for(lambda: client.has_what()[address])
        assert result.status == "pending"
        os.kill(int(victim.read_text()), signal.SIGKILL)
        assert np.array_equal(result.result(timeout=child.HANG), expected)
        assert set(client.run(os.getpid).values()) != set(pids.values())
    assert held
    loads = [path.name.split("-")[0] for path in tmp_path.glob("*-*")]
    assert len(loads) > len(set(loads)) == 16  # what was lost was made again


def wait_for(condition):
    """Return what `condition` returns as soon as it is true."""
    end = time.monotonic() + child.HANG
    while not (value := condition()):
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.02)
    return value


@pytest.mark.parametrize("own", [False, True])
def test_calibrated_maps(own):
    """Every block of heads gets the centres and changes of variables of its own heads."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 4, 90, 6)) + np.arange(4)[:, None, None]
    fm = favor_np.feature_map("positive", 6, 32)
    fm = fm.calibrate(*(x if own else x.reshape(-1, 6) for x in (q, k)), method="aderf+sderf")
    blocks = [da.from_array(x, chunks=(3, 40, -1)) for x in (q, k, v)]
    for causal in (False, True):
        out = favor_attention(*blocks, fm, causal=causal).compute(scheduler="sync")
        assert np.allclose(out, favor_np.favor_attention(q, k, v, fm, causal=causal), atol=1e-12)
