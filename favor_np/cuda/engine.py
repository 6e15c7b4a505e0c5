"""The engine of NVIDIA GPUs: see `favor_np.engine.Engine`."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import (
    Arrays,
    Call,
    Cotangents,
    Forward,
    Options,
    StateForm,
    StateParts,
    StateShape,
    check_call,
    sum_heads,
)
from favor_np.cuda.arrays import Place, place, stand_in
from favor_np.cuda.launch import Launch, States
from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]


class CUDA:
    """Attention on a GPU, in float32, on the stream of the caller's arrays."""

    home = "on a CUDA device"
    dtype: np.dtype[Any] | None = np.dtype(np.float32)

    def __init__(self, where: Place) -> None:
        self.place = where
        self._launch = Launch(where)
        self.new_states = self._launch.new_states
        self.copy_states = self._launch.copy_states
        self.lower_states = self._launch.lower_states
        self.scale_states = self._launch.scale_states
        self.merge_states = self._launch.merge_states
        self.states_of = self._launch.states_of
        self.state_sums = self._launch.state_sums
        self.normalizers = self._launch.normalizers
        self.to_host = where.host

    # Arrays of the caller

    def receive(self, q: Any, k: Any, v: Any, key_mask: Any = None) -> tuple[CUDA, Arrays]:
        where = place("cuda", q=q, k=k, v=v, key_mask=key_mask)
        assert where is not None
        if where.device != self.place.device:
            raise ValueError(
                f"the state lies on CUDA device {self.place.device.number}, "
                f"but the current device is {where.device.number}"
            )
        if where.kind == "numpy":
            q, k, v = (
                None if array is None else validation.tensor(name, array, 1)
                for name, array in zip("qkv", (q, k, v), strict=True)
            )
        engine = CUDA(where)
        return engine, engine.views(q, k, v, key_mask)

    def views(self, q: Any, k: Any, v: Any, key_mask: Any) -> Arrays:
        q, k, v, key_mask = self.place.views(q=q, k=k, v=v, key_mask=key_mask)
        return q, k, v, key_mask

    def check(
        self,
        q: Any,
        k: Any,
        v: Any,
        feature_map: FeatureMap | None = None,
        state: StateShape | None = None,
        **options: Unpack[Options],
    ) -> Call:
        mask: Any = options.get("key_mask")
        options["key_mask"] = stand_in(mask)
        if options.get("key_bias") is not None:  # -inf of it masks a key, too
            options["key_bias"] = self.to_host(options["key_bias"])
            options["key_mask"] = self.to_host(mask)
        options["dtype"] = None  # states are float32, as all that is computed
        call = check_call(
            self, stand_in(q), stand_in(k), stand_in(v), feature_map, state, **options
        )
        if call.compute != np.float32:
            raise TypeError(
                "q, k and v must be float32 or 16-bit floats on a CUDA device, which computes in"
                f" float32: got {call.compute}"
            )
        if self.place.kind == "numpy":
            return call
        if call.check_finite:
            self._launch.check_finite(q=q, k=k, v=v)
        given = [array for array in (q, k, v) if array is not None]
        result = given[0].dtype if len({array.dtype for array in given}) == 1 else call.compute
        q, k, v = (
            self._launch.empty(getattr(call, name).shape, given[0].dtype)
            if array is None
            else array
            for name, array in zip("qkv", (q, k, v), strict=True)
        )
        if call.key_bias is not None:
            mask = call.mask
        return dataclasses.replace(call, q=q, k=k, v=v, mask=mask, result=result)

    def token(
        self,
        q: Any,
        k: Any,
        v: Any,
        batch: tuple[int, ...],
        _dim: int,
        sequences: int | None = None,
        /,
    ) -> tuple[tuple[Any, Any, Any], bool]:
        if sequences is not None or len(q.shape) != len(batch) + 1:
            return (q, k, v), False
        q, k, v = (x.reshape(*x.shape[:-1], 1, x.shape[-1]) for x in (q, k, v))
        return (q, k, v), True

    def cotangent(self, call: Call, grad_out: Any) -> Any:
        grad = self.place.taken("grad_out", grad_out)
        if grad.shape != call.out_shape:
            raise ValueError(f"grad_out must have shape {call.out_shape}, got {grad.shape}")
        if call.check_finite:
            self._launch.check_finite(grad_out=grad)
        return grad

    def new_output(self, call: Call) -> Any:
        return self._launch.empty(call.out_shape)

    def outputs(self, call: Call, out: Any = None) -> tuple[Any, Any]:
        result = self.place.room(call, out)
        return result, result

    def finish(self, call: Call, result: Any, target: Any, out: Any = None, /) -> Any:
        if target is not result:
            self._launch.convert(target, result)
        return self.place.give(result, call.result) if out is None else out

    # States: no tokens that wait

    def has_tails(self, _arrays: States, /) -> bool:
        return False

    def fold_tails(self, _form: StateForm, _arrays: States, /) -> None:
        pass

    def state_parts(self, form: StateForm, arrays: States) -> StateParts:
        return StateParts(*self.state_sums(form, arrays))

    # Attention

    def attend(
        self, call: Call, out: Any, state: Any = None, normalizers: tuple[Any, Any] | None = None
    ) -> None:
        self._launch.attend(call, out, state, normalizers)

    def attend_vjp(
        self, call: Call, forward: Forward, grad: Any, final_state: Any = None
    ) -> Cotangents:
        *found, of_log2_bias, of_state = self._launch.attend_vjp(call, forward, grad, final_state)
        like = (call.q.dtype, call.k.dtype, call.v.dtype)
        q, k, v = (self.place.give(x, dtype) for x, dtype in zip(found, like, strict=True))
        if call.log2_bias is None:
            return Cotangents(q, k, v, state=of_state)
        rows = of_log2_bias.astype(np.float64).reshape(*call.out_shape[:-2], call.keys, 1)
        heads = call.state_shape if call.grouped else None
        bias = sum_heads(rows, call.log2_bias[..., None], heads)[..., 0]
        return Cotangents(q, k, v, bias, of_state)

    def projection_vjp(
        self, call: Call, forward: Forward, grad: Any, final_state: Any = None
    ) -> tuple[Array, Array, Array]:
        weights, biases = self._launch.projection_vjp(call, forward, grad, final_state)
        return weights, biases, np.tile(np.arange(len(biases) // 2), 2)
