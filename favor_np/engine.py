"""The contract of the engines, and the one place that chooses between them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from favor_np.call import (
    Arrays,
    Call,
    Cotangents,
    Forward,
    Options,
    StateForm,
    StateParts,
    StateShape,
)

if TYPE_CHECKING:
    from favor_np.cpu.engine import CPU
    from favor_np.features import FeatureMap

Array: TypeAlias = npt.NDArray[Any]
#: An array of the engine's: NumPy's or, on a device, Numba's.
Buffer: TypeAlias = Any
#: Arrays (c, S, z) in the layout of the engine, a row each.
States: TypeAlias = Any


class Engine(Protocol):
    """What computes attention, on arrays that lie in main memory or on a device.

    An engine checks arrays of the caller's, makes those of the result, and gives them back as what
    the caller has.  States are arrays (c, S, z) in a layout of its own, a row each.
    """

    @property
    def home(self) -> str:
        """Where its arrays lie, for messages: "in main memory", "on a CUDA device"."""

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The one dtype of its states; None if they may be float32 or float64."""

    # Arrays of the caller

    def receive(self, q: Any, k: Any, v: Any, key_mask: Any = None) -> tuple[Engine, Arrays]:
        """Return the engine for arrays given to a state of this one, and the arrays for `check`."""

    def views(self, q: Any, k: Any, v: Any, key_mask: Any) -> Arrays:
        """Return arrays as `check` takes them."""

    def to_host(self, array: Any) -> Any:
        """Return an array in main memory."""

    def check(
        self,
        q: Any,
        k: Any,
        v: Any,
        feature_map: FeatureMap | None = None,
        state: StateShape | None = None,
        **options: Unpack[Options],
    ) -> Call:
        """Check the arguments of a call: see `check_call`."""

    def token(
        self,
        q: Any,
        k: Any,
        v: Any,
        batch: tuple[int, ...],
        dim: int,
        sequences: int | None = None,
        /,
    ) -> tuple[tuple[Any, Any, Any], bool]:
        """Return one token, or one a sequence, as rows; and whether the axis of rows was added."""

    def cotangent(self, call: Call, grad_out: object) -> Buffer:
        """Check the cotangent of a result."""

    def new_output(self, call: Call) -> Buffer:
        """Return a new array for the result, in 32 bits at least."""

    def outputs(self, call: Call, out: object = None) -> tuple[Buffer, Buffer]:
        """Return the array of the result, `out` if given, and the C-ordered one to compute it in.

        The second is the first if that will do.
        """

    def finish(self, call: Call, result: Buffer, target: Buffer, out: Any = None, /) -> Any:
        """Return the result as the caller gets it, `out` if it was given."""

    # States

    def new_states(self, form: StateForm, count: int) -> States:
        """Return so many states of no keys."""

    def copy_states(self, arrays: States) -> States:
        """Return a copy of states."""

    def merge_states(self, into: States, other: States) -> None:
        """Add states `other`, without tails, to the states `into`."""

    def has_tails(self, arrays: States, /) -> bool:
        """Whether tokens wait in the states to be folded together."""

    def fold_tails(self, form: StateForm, arrays: States, /) -> None:
        """Fold them."""

    def lower_states(self, form: StateForm, arrays: States, by: Array, /) -> None:
        """Take so much off the exponents of each state."""

    def scale_states(self, arrays: States, by: Array, /) -> None:
        """Multiply the sums of each state, which has no tail, by a number."""

    def state_sums(self, form: StateForm, arrays: States) -> tuple[Array, Array, Array]:
        """Return copies of (c, S, z) in main memory, without padding."""

    def state_parts(self, form: StateForm, arrays: States) -> StateParts:
        """Return copies of all that states hold, as any machine would have it."""

    def states_of(self, form: StateForm, parts: StateParts, /) -> States:
        """Return states from their parts."""

    # Attention

    def normalizers(self, out: Buffer) -> tuple[Buffer, Buffer]:
        """Return arrays for the denominators of rows: (w, top) for w * 2**top."""

    def attend(
        self,
        call: Call,
        out: Buffer,
        state: States | None = None,
        normalizers: tuple[Buffer, Buffer] | None = None,
    ) -> None:
        """Fold keys and values, into `state` if there is one, and read with queries into `out`."""

    def attend_vjp(
        self, call: Call, forward: Forward, grad: Buffer, final_state: States | None = None
    ) -> Cotangents:
        """Pull `grad`, and the cotangent of the last state, back through `attend`."""

    def projection_vjp(
        self, call: Call, forward: Forward, grad: Buffer, final_state: States | None = None, /
    ) -> tuple[Array, Array, Array]:
        """Return the cotangents of weights and biases for each job, and the head of each job."""


@functools.cache
def processor() -> CPU:
    """Return the engine of the processor."""
    from favor_np.cpu.engine import CPU

    return CPU()


def engine_for(
    device: object, q: Any = None, k: Any = None, v: Any = None, key_mask: Any = None
) -> Engine:
    """Return the engine for these arrays: where they lie, or on the `device` named."""
    if device is None and (type(q) is type(k) is type(v) is np.ndarray or q is None):
        return processor()
    from favor_np.cuda.arrays import place

    found = place(device, q=q, k=k, v=v, key_mask=key_mask)
    if found is None:
        return processor()
    from favor_np.cuda.engine import CUDA

    return CUDA(found)
