"""Plain calls: small ones, of arrays in one precision, without an option but `causal`.

What there is to check and to plan depends on their shapes alone, and is kept.  So all that is left
of such a call is to make the array of the result, and to run one kernel on the calling thread.
Whatever else is asked, or found, is for the calls of ``cpu.launch``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import StateForm, check_call
from favor_np.cpu import tuning
from favor_np.cpu.code import Kernel
from favor_np.cpu.memory import Workspace, integer_of
from favor_np.cpu.records import OVERFLOW
from favor_np.cpu.scaling import holds_large
from favor_np.cpu.schedule import schedule
from favor_np.features import ATTENTION_KINDS, FeatureMap, checked
from favor_np.tables import kept
from favor_np.validation import contiguous, outline

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

NO_MASK, NO_BIAS = np.ones(1, np.bool_), np.zeros(1)
NO_MASK.flags.writeable = False
NO_NORMALIZERS = {
    np.dtype(kind): (np.zeros(0, kind), np.zeros(0, integer_of(np.dtype(kind))))
    for kind in (np.float32, np.float64)
}


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What plain calls for arrays of the same shapes have in common."""

    shapes: tuple[Shape, Shape, Shape]
    dtype: np.dtype[Any]
    out_shape: Shape
    kernel: Kernel
    space: Workspace
    rest: tuple[Any, ...]
    count: int

    def fits(self, q: Any, k: Any, v: Any) -> bool:
        """Whether these are plain arrays of its shapes."""
        return (
            (type(q) is type(k) is type(v) is np.ndarray)
            and (q.dtype is k.dtype is v.dtype is self.dtype)
            and (q.shape, k.shape, v.shape) == self.shapes
        )

    def run(self, q: Array, k: Array, v: Array, state: tuple[Array, ...] = ()) -> Array | None:
        """Return the result; None, with the state as it was, if sums of values may overflow."""
        dtype = self.dtype
        out = np.empty(self.out_shape, dtype)
        arrays = (
            contiguous(q, dtype),
            contiguous(k, dtype),
            contiguous(v, dtype),
            NO_MASK,
            NO_BIAS,
            out,
            *NO_NORMALIZERS[dtype],
            *state,
        )
        control = self.space.run(self.kernel, arrays, self.rest, self.count, 1)
        if control[OVERFLOW] and holds_large(contiguous(v, dtype)):
            return None
        return out


class _State(NamedTuple):
    """What `check_call` asks of a state."""

    batch_shape: Shape
    value_dim: int


@tuning.depends_on_tuning
@kept(64, lambda plan: 0 if plan is None else sum(x.nbytes for x in plan.rest[1:4]))
def _plan(
    feature_map: FeatureMap,
    dtype: np.dtype[Any],
    causal: bool,
    q: Shape,
    k: Shape,
    v: Shape,
    state: tuple[Shape, int] | None = None,
) -> Plan | None:
    """Return the plan for arrays of these shapes, or for a token of a state; None: not plain.

    It refuses shapes that do not fit.
    """
    rows: tuple[Any, Any, Any] = outline(q, dtype), outline(k, dtype), outline(v, dtype)
    of, flat = None, False
    if state is not None:
        of = _State(*state)
        rows, flat = validation.token(*rows, of.batch_shape, feature_map.dim)
    fm = checked(feature_map, ATTENTION_KINDS)
    call = check_call(cast(Any, None), *rows, fm, of, causal=causal, dtype=dtype)
    plan = schedule(fm, dtype, call.shapes(stateful=state is not None), causal, None, False)
    count, shape = len(plan.jobs.table), call.out_shape
    if 0 in shape or not call.keys or plan.longest > tuning.SEGMENT_LENGTH:
        return None
    tokens = causal and plan.longest == 1 and plan.jobs.q_rows.shape[1] == 1
    if plan.work * count >= tuning.MIN_PARALLEL_WORK or (of is not None and not tokens):
        return None
    return Plan(
        (q, k, v),
        dtype,
        (*shape[:-2], shape[-1]) if flat else shape,
        plan.layout.attend_tokens if tokens else plan.layout.attend,
        plan.layout.stateful if state is None else plan.layout.stateless,
        plan.fixed,
        count,
    )


def attend_plainly(q: Any, k: Any, v: Any, feature_map: object, causal: object) -> Array | None:
    """Return the result of a plain call; None if it is none."""
    if not (type(q) is type(k) is type(v) is np.ndarray and q.dtype is k.dtype is v.dtype):
        return None
    if q.dtype not in NO_NORMALIZERS or type(feature_map) is not FeatureMap:
        return None
    if causal is not True and causal is not False:
        return None
    plan = _plan(feature_map, q.dtype, causal, q.shape, k.shape, v.shape)
    return None if plan is None else plan.run(q, k, v)


def plan_of_token(form: StateForm, batch_shape: Shape, q: Any, k: Any, v: Any) -> Plan | None:
    """Return the plan for a plain token of a state; None if it is none."""
    fm, dtype, value_dim = form
    if not (type(q) is type(k) is type(v) is np.ndarray and q.dtype is k.dtype is v.dtype is dtype):
        return None
    return _plan(fm, dtype, True, q.shape, k.shape, v.shape, (batch_shape, value_dim))
