"""Arrays of other libraries as arguments: read as they are, or refused; shared where they can be."""

import ctypes
import io

import numpy as np
import pytest
import scipy.sparse
from support import bridges

import favor_np
from favor_np import validation

torch, jnp = bridges.require("torch"), bridges.require("jax.numpy")
pd, pl, pa = (pytest.importorskip(name) for name in ("pandas", "polars", "pyarrow"))
h5py, zarr, xr = (pytest.importorskip(name) for name in ("h5py", "zarr", "xarray"))
ts = pytest.importorskip("tensorstore")

FM = favor_np.feature_map("positive", 4, 16)
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
COLUMNS = {str(i): X[:, i] for i in range(4)}
SOME = pd.DataFrame(COLUMNS) > 1
assert SOME.to_numpy().any()


class Exporter:
    """What shows its memory by DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Interface:
    """What shows its memory by NumPy's interface alone."""

    def __init__(self, array):
        self.__array_interface__, self.array = array.__array_interface__, array


def in_file():
    file = h5py.File(io.BytesIO(), "w")
    file["x"] = X
    return file["x"]


SHARED = {
    "torch": lambda: torch.from_numpy(X),
    "polars array": lambda: pl.Series(X, dtype=pl.Array(pl.Float32, 4)),
    "arrow tensor": lambda: pa.Tensor.from_numpy(X),
    "arrow fixed shape tensors": lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(X),
    "arrow fixed size lists": lambda: pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4),
    "xarray": lambda: xr.DataArray(X),
    "memoryview": lambda: memoryview(X),
    "DLPack": lambda: Exporter(X),
    "interface": lambda: Interface(X),
}
COPIED = {
    "torch turned": lambda: torch.from_numpy(np.ascontiguousarray(X.T)).T,
    "jax": lambda: jnp.asarray(X),
    "pandas": lambda: pd.DataFrame(COLUMNS),
    "pandas with masks": lambda: pd.DataFrame(COLUMNS).astype("Float32"),
    "pandas on Arrow": lambda: pd.DataFrame(COLUMNS).astype("float[pyarrow]"),
    "pandas of several kinds": lambda: pd.DataFrame(COLUMNS).astype({"1": "Float32"}),
    "polars": lambda: pl.DataFrame(COLUMNS),
    "arrow table": lambda: pa.table(COLUMNS),
    "arrow batch": lambda: pa.record_batch(COLUMNS),
    "arrow chunks": lambda: pa.chunked_array(
        [pa.FixedSizeListArray.from_arrays(pa.array(X[i : i + 3].ravel()), 4) for i in (0, 3)]
    ),
    "arrow slice": lambda: pa.FixedSizeListArray.from_arrays(
        pa.array(np.concatenate([X[:1], X]).ravel()), 4
    )[1:],
    "ctypes": lambda: (ctypes.c_float * 4 * 6).from_buffer_copy(X.tobytes()),
    "h5py": in_file,
    "zarr": lambda: zarr.array(X),
    "tensorstore": lambda: ts.array(X),
    "list": X.tolist,
}
REFUSED = {
    "torch on meta": (lambda: torch.empty(6, 4, device="meta"), "cannot be read as an array"),
    "torch sparse": (lambda: torch.from_numpy(X).to_sparse(), "cannot be read as an array"),
    "torch that learns": (lambda: torch.from_numpy(X.copy()).requires_grad_(), "requires grad"),
    "scipy sparse": (lambda: scipy.sparse.csr_array(X), "sparse; use its method toarray"),
    "pandas with masks": (
        lambda: pd.DataFrame(COLUMNS).astype("Float32").mask(SOME),
        "missing values",
    ),
    "pandas on Arrow": (
        lambda: pd.DataFrame(COLUMNS).astype("float[pyarrow]").mask(SOME),
        "missing values",
    ),
    "polars": (
        lambda: pl.DataFrame(COLUMNS).with_columns(pl.when(pl.col("0") > 0).then(pl.col("0"))),
        "missing values",
    ),
    "arrow table": (lambda: pa.table({"a": [1.0, None], "b": [1.0, 2.0]}), "missing values"),
    "arrow lists": (
        lambda: pa.FixedSizeListArray.from_arrays(pa.array([1.0, None, 2.0, 3.0]), 2),
        "missing values",
    ),
    "polars lists": (lambda: pl.Series(X.tolist()), "must hold real numbers"),
    "bytes": (X.tobytes, "must hold real numbers"),
}


@pytest.mark.parametrize("make", [*SHARED.values(), *COPIED.values()], ids=[*SHARED, *COPIED])
def test_read_as_they_are(make):
    given = make()
    expected = favor_np.favor_attention(X, X, X, FM)
    found = favor_np.favor_attention(given, make(), make(), FM)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    state = favor_np.AttentionState(FM, 4).update(make(), make())
    np.testing.assert_allclose(state.attend(make()), expected, atol=1e-6)
    found = favor_np.exact_attention(make(), make(), make())
    np.testing.assert_allclose(found, favor_np.exact_attention(X, X, X), atol=1e-6)


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_not_copied(make):
    given = make()
    assert np.shares_memory(validation.tensor("q", given), validation.tensor("q", given))


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, message):
    given = make()
    with pytest.raises(TypeError, match=f"q .*{message}"):
        favor_np.favor_attention(given, X, X, FM)


def test_bfloat16():
    half = torch.from_numpy(X).bfloat16()
    expected = favor_np.favor_attention(*3 * [half.float().numpy()], FM)
    assert np.array_equal(favor_np.favor_attention(half, half, half, FM), expected)


def test_masks_biases_and_factors():
    mask, bias, gates = X[:, 0] > 0, X[:, 1], 1 / (1 + np.exp(X[:, 2]))
    expected = favor_np.favor_attention(
        X, X, X, FM, causal=True, key_mask=mask, key_bias=bias, decay=gates
    )
    for make in (torch.from_numpy, jnp.asarray, pd.Series, pl.Series, pa.array, xr.DataArray):
        more = {"key_mask": make(mask), "key_bias": make(bias), "decay": make(gates)}
        found = favor_np.favor_attention(X, X, X, FM, causal=True, **more)
        np.testing.assert_allclose(found, expected, atol=1e-6)
