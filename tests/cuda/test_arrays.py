"""Arrays that lie on a device, under numba-cuda's own runtime: they stay there, and so does the result."""

import ptxrun
import stub_driver
from support import child

ptxrun.require()

CODE = r"""
stub_driver.install(devices=2)
import ctypes
import ml_dtypes
import numpy as np
import pytest
from numba import cuda
from cuda.core.utils import StridedMemoryView
from favor_np import AttentionState, favor_attention, favor_attention_vjp, feature_map
from favor_np.cuda import runtime

rng = np.random.default_rng(0)
here = [rng.standard_normal((2, 5, 8)).astype(np.float32) for _ in range(3)]
stream = cuda.stream()
q, k, v = (cuda.to_device(x, stream) for x in here)
fm = feature_map("positive", 8, 64)
mask = np.array([True, True, False, True, True])


def same(x, y):
    assert cuda.is_cuda_array(x)
    assert np.abs(x.copy_to_host() - y).max() < 1e-5


wanted, pull = favor_attention_vjp(*here, fm, causal=True, key_mask=mask)
out, pullback = favor_attention_vjp(q, k, v, fm, causal=True, key_mask=cuda.to_device(mask))
same(out, wanted)
for name in "qkv":
    same(getattr(pullback(out), name), getattr(pull(wanted), name))
offsets = cuda.to_device(np.array([0, 2, 5]))
same(
    favor_attention(q, k, v, fm, cu_seqlens=offsets),
    favor_attention(*here, fm, cu_seqlens=[0, 2, 5]),
)
state = AttentionState.zeros(fm, 8, 2, device="cuda")
mine = AttentionState.zeros(fm, 8, 2, dtype=np.float32)
same(state.update(k, v).merge(state.copy()).attend(q), mine.update(*here[1:]).attend(here[0]))
token = [cuda.to_device(np.ascontiguousarray(x[:, 0])) for x in here]
mine.merge(mine.copy())
same(state.step(*token), mine.step(*(x[:, 0] for x in here)))
assert isinstance(favor_attention(*here, fm, device="cuda"), np.ndarray)
bias = np.array([0.5, -np.inf, 3, 0, -2])
there = {"key_mask": cuda.to_device(mask), "key_bias": cuda.to_device(bias)}
same(
    favor_attention(q, k, v, fm, causal=True, check_finite=True, **there),
    favor_attention(*here, fm, causal=True, key_mask=mask, key_bias=bias),
)
with pytest.raises(ValueError, match="^v must be finite"):
    favor_attention(q, k, cuda.to_device(np.full_like(here[2], np.nan)), fm, check_finite=True)
state, mine = (
    AttentionState(fm, 8, 2, decay=0.3, dtype=np.float32, device=where) for where in ("cuda", None)
)
state.step(*token), state.merge(state.copy()), state.step(*token)
rows = [x[:, 0] for x in here]
mine.step(*rows), mine.merge(mine.copy())
same(state.attend(q), (mine.step(*rows), mine.attend(here[0]))[1])


class Foreign:  # as any library shows its arrays
    def __init__(self, array):
        self.dtype, self.shape = array.dtype, array.shape
        self.__cuda_array_interface__ = array.__cuda_array_interface__


same(favor_attention(*map(Foreign, (q, k, v)), fm), favor_attention(*here, fm))
with pytest.raises(TypeError, match="lies in host memory"):
    favor_attention(q, here[1], v, fm)
with pytest.raises(TypeError, match="^device='cpu' needs"):
    favor_attention(q, k, v, fm, device="cpu")
with pytest.raises(ValueError, match="^k must be C-contiguous"):
    favor_attention(q, cuda.to_device(np.asfortranarray(here[1])), v, fm)
words = [x.astype(ml_dtypes.bfloat16) for x in here]
short = [cuda.to_device(x.view(np.int16)).view(ml_dtypes.bfloat16) for x in words]
out = favor_attention(*short, fm, causal=True)
assert out.dtype == state.attend(short[0]).dtype == ml_dtypes.bfloat16
numbers = favor_attention(*(x.astype(np.float32) for x in words), fm, causal=True, device="cuda")
rounded = numbers.astype(ml_dtypes.bfloat16)
assert out.view(np.int16).copy_to_host().tobytes() == rounded.tobytes()
class Exchanged:  # as a library that knows DLPack only: no dtype, no shape
    def __init__(self, array, code=None):
        self.view, self.code = StridedMemoryView.from_any_interface(array, stream_ptr=-1), code

    def __dlpack_device__(self):
        return self.view.__dlpack_device__()

    def __dlpack__(self, *, stream=None, max_version=None):
        capsule = self.view.__dlpack__()
        if self.code is not None:  # in its struct after data, device and ndim
            pointer = ctypes.pythonapi.PyCapsule_GetPointer
            pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + 20).value = self.code
        return capsule


mine = [cuda.to_device(x) for x in here]
found = favor_attention(*map(Exchanged, mine), fm, causal=True, key_mask=cuda.to_device(mask))
same(found, wanted)
found = favor_attention(q, k, v, fm, cu_seqlens=Exchanged(offsets))
same(found, favor_attention(*here, fm, cu_seqlens=[0, 2, 5]))
found = favor_attention(*(Exchanged(x.view(np.int16), 4) for x in short), fm, causal=True)
assert found.view(np.int16).copy_to_host().tobytes() == rounded.tobytes()
before, taken = sys.getrefcount(mine[0]), runtime.view(Exchanged(mine[0]))
assert taken.gpu_data.owner is not None and sys.getrefcount(mine[0]) > before
del taken
assert sys.getrefcount(mine[0]) == before  # the producer was told
with pytest.raises(ValueError, match="^q must be C-contiguous"):
    fortran = cuda.to_device(np.asfortranarray(here[0]))
    favor_attention(Exchanged(fortran), *map(Exchanged, mine[1:]), fm)
with pytest.raises(TypeError, match="^v cannot be read where it lies: .*dtype"):
    favor_attention(*map(Exchanged, mine[:2]), Exchanged(mine[2], 77), fm)
room = cuda.device_array((3, 2, 5, 8), np.float32)
out = room[1]
assert favor_attention(*mine, fm, causal=True, key_mask=cuda.to_device(mask), out=out) is out
same(room[1], wanted)
target = cuda.device_array((2, 5, 8), np.int16).view(ml_dtypes.bfloat16)
assert favor_attention(*short, fm, causal=True, out=target) is target
assert target.view(np.int16).copy_to_host().tobytes() == rounded.tobytes()
kept = [x.copy_to_host() for x in mine]
for out, error, text in (
    (np.empty((2, 5, 8), np.float32), TypeError, "^out must be an array of numba on the CUDA"),
    (Exchanged(room[0]), TypeError, "^out must be an array of numba on the CUDA device"),
    (target, TypeError, "^out must have dtype float32, got bfloat16"),
    (room, ValueError, r"^out must have shape \(2, 5, 8\), got \(3, 2, 5, 8\)"),
    (room[:, 0, :2], ValueError, "^out must be C-contiguous"),
    (mine[1], ValueError, "^out must not overlap k"),
):
    with pytest.raises(error, match=text):
        favor_attention(*mine, fm, out=out)
both = cuda.to_device(np.concatenate([here[2], here[2][:1]]))
with pytest.raises(ValueError, match="^out must not overlap v"):  # by half
    favor_attention(*mine[:2], both[:2], fm, out=both[1:])
assert all(np.array_equal(x.copy_to_host(), y) for x, y in zip(mine, kept))
with pytest.raises(ValueError, match="^out cannot be used with arrays of __main__"):
    favor_attention(*map(Exchanged, mine), fm, out=Exchanged(room[0]))
for wrong in (float, np.int16):  # whose words are no bfloat16
    with pytest.raises(TypeError, match=f"^k must be float32 or .* got {np.dtype(wrong)}"):
        favor_attention(q, cuda.to_device(here[1].astype(wrong)), v, fm)
with pytest.raises(TypeError, match="^grad_out lies in main memory"):
    pullback(wanted)
with cuda.gpus[1]:  # a map is copied to each device, and a state stays where it is
    there = [cuda.to_device(x) for x in here]
    same(favor_attention(*there, fm, causal=True, key_mask=cuda.to_device(mask)), wanted)
    with pytest.raises(ValueError, match="^the state lies on CUDA device 0, but the current"):
        state.update(*there[1:])
print("done")
"""


def test_arrays_of_numba_and_of_others():
    assert child.python(stub_driver.CHILD + CODE) == "done\n"
