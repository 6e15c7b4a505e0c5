"""The engine of the processor: see `favor_np.engine.Engine`.  What computes is imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import Arrays, Call, check_call

if TYPE_CHECKING:
    from favor_np.cpu import launch, plain, states

Array: TypeAlias = npt.NDArray[Any]


class CPU:
    """Attention on NumPy arrays by compiled code, on as many processors as there are."""

    home = "in main memory"
    dtype: np.dtype[Any] | None = None

    # Arrays of the caller: they are what they are

    check = check_call
    token = staticmethod(validation.token)

    def receive(self, q: Any, k: Any, v: Any, key_mask: Any = None) -> tuple[CPU, Arrays]:
        return self, (q, k, v, key_mask)

    def views(self, q: Any, k: Any, v: Any, key_mask: Any) -> Arrays:
        return q, k, v, key_mask

    def to_host(self, array: Any) -> Any:
        return array

    def cotangent(self, call: Call, grad_out: object) -> Array:
        grad = validation.cotangent(grad_out, call.out_shape)
        if call.check_finite:
            validation.finite(grad_out=grad)
        return grad

    def new_output(self, call: Call) -> Array:
        return np.empty(call.out_shape, call.compute)

    def outputs(self, call: Call, out: object = None) -> tuple[Array, Array]:
        direct = call.result == call.compute
        if out is None:
            result: Array = np.empty(call.out_shape, call.result)
        else:
            result = validation.output(out, call.out_shape, call.result)
            direct &= result.flags.c_contiguous and result.flags.aligned
            inputs = (call.q, call.k, call.v, *(() if call.mask is None else (call.mask,)))
            direct &= not any(np.may_share_memory(result, array) for array in inputs)
        return result, result if direct else np.empty(call.out_shape, call.compute)

    def finish(self, _call: Call, result: Array, target: Array, out: Any = None, /) -> Any:
        if target is not result:
            result[...] = target
        return result if out is None else out

    if TYPE_CHECKING:
        new_states = staticmethod(states.new_states)
        copy_states = staticmethod(states.copy_states)
        merge_states = staticmethod(states.merge_states)
        has_tails = staticmethod(states.has_tails)
        lower_states = staticmethod(states.lower_states)
        scale_states = staticmethod(states.scale_states)
        state_sums = staticmethod(launch.state_sums)
        state_parts = staticmethod(states.state_parts)
        states_of = staticmethod(states.states_of)
        fold_tails = staticmethod(launch.fold_tails)
        normalizers = staticmethod(launch.normalizers)
        attend = staticmethod(launch.attend)
        attend_vjp = staticmethod(launch.attend_vjp)
        projection_vjp = staticmethod(launch.projection_vjp)
        attend_exact = staticmethod(launch.attend_exact)
        exact_vjp = staticmethod(launch.exact_vjp)
        attend_plainly = staticmethod(plain.attend_plainly)
        plan_of_token = staticmethod(plain.plan_of_token)
    else:

        def __getattr__(self, name):
            """Import what computes when it is first needed."""
            if name.startswith("_"):
                raise AttributeError(name)
            from favor_np.cpu import launch, plain, states

            home = next((m for m in (launch, plain) if hasattr(m, name)), states)
            function = getattr(home, name)
            setattr(self, name, function)
            return function
