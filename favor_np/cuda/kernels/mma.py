"""The instruction of the tensor cores, which numba.cuda has no name for."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

_FLOAT, _BITS = ir.FloatType(), ir.IntType(32)
_TF32 = """mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};""".replace("\n", "")


@intrinsic
def mma_tf32(
    typingctx: Any, c0: Any, c1: Any, c2: Any, c3: Any, a0: Any, a1: Any, a2: Any, a3: Any, b0: Any,
    b1: Any,
) -> Any:  # fmt: skip
    """``c + a b`` of a warp, for 16 x 8 numbers a and 8 x 8 numbers b, cut to tf32.

    Lane ``4 g + t`` has a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]; b[t, g], b[t + 4, g]; and
    c[g, 2 t], c[g, 2 t + 1], c[g + 8, 2 t], c[g + 8, 2 t + 1].
    """
    result = types.UniTuple(types.float32, 4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fragment = ir.LiteralStructType([_FLOAT] * 4)
        kind = ir.FunctionType(fragment, [_BITS] * 6 + [_FLOAT] * 4)
        # volatile and convergent: all lanes have to come to it together
        code = ir.InlineAsm(kind, _TF32, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", side_effect=True)
        factors = [builder.bitcast(x, _BITS) for x in args[4:]]
        found = builder.call(code, [*factors, *args[:4]], attrs=("convergent",))
        numbers = [builder.extract_value(found, i) for i in range(4)]
        return context.make_tuple(builder, result, numbers)

    return result(*[types.float32] * 10), codegen


@intrinsic
def thread_again(typingctx: Any) -> Any:
    """threadIdx.x, read here and now: what follows from it is not kept in registers from elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_BITS, [])
        return builder.call(ir.InlineAsm(kind, "mov.u32 $0, %tid.x;", "=r", side_effect=True), [])

    return types.int32(), codegen
