"""Explicit vectors for Numba: a register type, the operations the kernels need, and a GEMM tile.

LLVM's loop vectoriser stops at half the machine's width on most AVX-512 hosts and keeps no
accumulator in a register across a loop nest, so the hot loops say what they mean.  A ``Vector`` is
one register: VECTOR_BYTES of float32 or float64, or of the integers of that width.  Nothing here
reads past the vectors it is asked for; whole vectors are the caller's promise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from numba.np.arrayobj import make_array, populate_array

from favor_np.cpu.processor import TARGET, VECTOR_BYTES
from favor_np.numerics import EXP2, EXP2_BFLOAT16, ROUNDER

ISA = TARGET.isa
#: Rows of the two GEMM tiles, each two vectors wide: as many sums as the registers hold.
TALL, SHORT = (14, 8) if ISA in ("avx512", "neon") else (6, 4)


class Vector(types.Type):  # type: ignore[misc]  # Numba's classes have no types
    """One register of ``dtype`` (float32, float64, int32 or int64)."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.lanes = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vector({dtype}x{self.lanes})")

    @property
    def integer(self) -> Vector:
        """The vector of integers of the same width."""
        return Vector(types.int32 if self.dtype.bitwidth == 32 else types.int64)

    @property
    def ir(self) -> Any:
        """Its LLVM type."""
        scalar = {
            types.float32: ir.FloatType(),
            types.float64: ir.DoubleType(),
            types.int32: ir.IntType(32),
            types.int64: ir.IntType(64),
        }[self.dtype]
        return ir.VectorType(scalar, self.lanes)

    def constant(self, value: float) -> Any:
        """The vector with ``value`` in every lane."""
        return ir.Constant(self.ir, [value] * self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # Numba's classes have no types
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


def _call(builder: Any, name: str, vector: Any, *args: Any) -> Any:
    """Call the LLVM intrinsic ``llvm.<name>`` on whole vectors."""
    suffix = {"float": "f32", "double": "f64", "i32": "i32", "i64": "i64"}[str(vector.element)]
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector] * len(args)),
        f"llvm.{name}.v{vector.count}{suffix}",
    )
    return builder.call(function, args)


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    empty = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, empty, mask)


def _leading(builder: Any, array: Any, width: int) -> Any:
    """Elements from one row of a C-ordered matrix to the next."""
    size = ir.Constant(ir.IntType(64), width // 8)
    return builder.sdiv(builder.extract_value(array.strides, 0), size)


def address(context: Any, builder: Any, array_type: Any, value: Any, i: Any, j: Any) -> Any:
    """Return the pointer to ``value[i, j]``, in code that an intrinsic generates."""
    array = make_array(array_type)(context, builder, value)
    offset = builder.add(builder.mul(i, _leading(builder, array, array_type.dtype.bitwidth)), j)
    return builder.gep(array.data, [offset])


def _load(builder: Any, pointer: Any, vector: Any, width: int) -> Any:
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = width // 8
    return value


@intrinsic
def load(typingctx, array, i, j):
    """The vector at ``array[i, j:j + lanes]``."""
    vector = Vector(array.dtype)

    def codegen(context, builder, signature, args):
        pointer = address(context, builder, array, args[0], args[1], args[2])
        return _load(builder, pointer, vector.ir, array.dtype.bitwidth)

    return vector(array, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, array, i, j, value):
    """``array[i, j:j + lanes] = value``."""

    def codegen(context, builder, signature, args):
        pointer = address(context, builder, array, args[0], args[1], args[2])
        where = builder.bitcast(pointer, value.ir.as_pointer())
        builder.store(args[3], where).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), codegen


@intrinsic
def splat(typingctx, like, scalar):
    """``scalar`` in every lane of a vector of the element type of the array or vector ``like``."""
    vector = Vector(like.dtype)

    def codegen(context, builder, signature, args):
        return _splat(builder, context.cast(builder, args[1], scalar, like.dtype), vector.ir)

    return vector(like, scalar), codegen


def _operator(symbol: Callable[..., Any], floats: str, integers: str) -> None:
    """Give vectors an operator, lane by lane."""

    @infer_global(symbol)
    class VectorOperator(ConcreteTemplate):  # type: ignore[misc]  # Numba's classes have no types
        cases: ClassVar = [
            signature(Vector(kind), Vector(kind), Vector(kind))
            for kind in (types.float32, types.float64, types.int32, types.int64)
        ]

    @lower_builtin(symbol, Vector, Vector)
    def operate(context, builder, sig, args):
        method = floats if isinstance(sig.return_type.dtype, types.Float) else integers
        return getattr(builder, method)(*args)


_operator(operator.add, "fadd", "add")
_operator(operator.sub, "fsub", "sub")
_operator(operator.mul, "fmul", "mul")


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, fused where the machine can."""

    def codegen(context, builder, signature, args):
        return _call(builder, "fmuladd", a.ir, *args)

    return a(a, a, a), codegen


@intrinsic
def maximum(typingctx, a, b):
    """The larger of each pair of lanes; of floats none may be NaN."""

    def codegen(context, builder, signature, args):
        if isinstance(a.dtype, types.Float):
            return builder.select(builder.fcmp_ordered(">", *args), *args)
        return builder.select(builder.icmp_signed(">", *args), *args)

    return a(a, a), codegen


@intrinsic
def minimum(typingctx, a, b):
    """The smaller of each pair of lanes; of floats none may be NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return a(a, a), codegen


@intrinsic
def highest(typingctx, a):
    """The largest lane of a vector of integers."""

    def codegen(context, builder, signature, args):
        element = a.ir.element
        name = f"llvm.vector.reduce.smax.v{a.lanes}{element}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(element, [a.ir]), name
        )
        return builder.call(function, args)

    return a.dtype(a), codegen


@intrinsic
def sum_lanes(typingctx, a):
    """The sum of the lanes of a vector of floats."""

    def codegen(context, builder, signature, args):
        element = a.ir.element
        name = f"llvm.vector.reduce.fadd.v{a.lanes}f{a.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(element, [element, a.ir]), name
        )
        return builder.call(function, [ir.Constant(element, -0.0), args[0]], fastmath=("reassoc",))

    return a.dtype(a), codegen


#: Per type: what rounds to an integer when it is added, and the bits of the mantissa.
_ROUNDER = {types.float32: ROUNDER[4], types.float64: ROUNDER[8]}


@intrinsic
def nearest(typingctx, y):
    """The integer nearest to each lane, for |y| < 2**22 (float32) or 2**51 (float64)."""
    magic, _ = _ROUNDER[y.dtype]

    def codegen(context, builder, signature, args):
        shifted = builder.bitcast(builder.fadd(args[0], y.constant(magic)), y.integer.ir)
        bits = builder.bitcast(y.constant(magic), y.integer.ir)
        return builder.sub(shifted, bits)

    return y.integer(y), codegen


def _exp2(short: tuple[float, ...] | None = None) -> Callable[..., Any]:
    """Make `exp2`, with the polynomial `short` for float32 if one is given."""

    @intrinsic
    def exp2(typingctx, y, n):
        magic, mantissa = _ROUNDER[y.dtype]
        coefficients = short or EXP2[y.dtype.bitwidth // 8]
        lowest = -125 if mantissa == 23 else -1021  # the fraction is from 0.7 up

        def codegen(context, builder, signature, args):
            value, exponent = args
            whole = builder.fsub(builder.fadd(value, y.constant(magic)), y.constant(magic))
            f = builder.fsub(value, whole)
            p = y.constant(coefficients[-1])
            for coefficient in coefficients[-2::-1]:
                p = _call(builder, "fmuladd", y.ir, p, f, y.constant(coefficient))
            moved = builder.shl(exponent, n.constant(mantissa))
            moved = builder.add(builder.bitcast(p, n.ir), moved)
            tiny = builder.icmp_signed("<", exponent, n.constant(lowest))
            return builder.select(tiny, y.constant(0.0), builder.bitcast(moved, y.ir))

        return y(y, n), codegen

    return exp2  # type: ignore[no-any-return]  # intrinsic has no types


#: ``exp2(y, n) = 2**(y - nearest(y) + n)``: the integer only moves the exponent, so it never
#: rounds. Zero where the result might be below the smallest normal number; n must not pass the
#: largest.
exp2 = _exp2()
#: The same for float32, as exact as bfloat16 needs.
exp2_short = _exp2(EXP2_BFLOAT16)


@intrinsic
def transpose(typingctx, source, i, j, target):
    """``target[j:j + lanes, i:i + lanes] = source[i:i + lanes, j:j + lanes].T``, in registers."""
    vector = Vector(source.dtype)
    lanes = vector.lanes

    def codegen(context, builder, signature, args):
        def step(value: Any, n: int) -> Any:
            return builder.add(value, ir.Constant(ir.IntType(64), n))

        rows = [
            _load(
                builder,
                address(context, builder, source, args[0], step(args[1], r), args[2]),
                vector.ir,
                source.dtype.bitwidth,
            )
            for r in range(lanes)
        ]
        half = lanes // 2
        low = [
            x for pair in zip(range(half), range(lanes, lanes + half), strict=True) for x in pair
        ]
        high = [x + half for x in low]
        mask_type = ir.VectorType(ir.IntType(32), lanes)
        # Riffling the rows log2(lanes) times with themselves half a deck away transposes them.
        for _ in range(lanes.bit_length() - 1):
            pairs = [(rows[r], rows[r + half]) for r in range(half)]
            rows = [
                builder.shuffle_vector(a, b, ir.Constant(mask_type, mask))
                for a, b in pairs
                for mask in (low, high)
            ]
        for r in range(lanes):
            pointer = address(context, builder, target, args[3], step(args[2], r), args[1])
            where = builder.bitcast(pointer, vector.ir.as_pointer())
            builder.store(rows[r], where).align = source.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target), codegen


def _fused(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """Add a * b to a total, lane by lane."""
    return _call(builder, "fmuladd", a.type, a, b, total)


def gemm_tile(
    rows: int, vectors: int, *, transposed: bool, product: Callable[..., Any] = _fused
) -> Callable[..., Any]:
    """Make ``tile(a, i, b, j, c, first, last, add)``: a tile of ``c (+)= a @ b`` or ``a.T @ b``.

    The tile is ``c[i:i + rows, j:j + vectors * lanes]``, summed over first <= k < last.  Its sums
    stay in registers and are formed in the order of k, each by its own chain of fused
    multiply-adds: an element's bits depend on nothing but its own row of a and column of b.
    """
    # Two steps a turn are 5 to 10% faster; for a row-major `a` they need more address registers
    # than there are.
    unroll = 2 if transposed else 1

    @intrinsic
    def tile(typingctx, a_t, i_t, b_t, j_t, c_t, first_t, last_t, add_t):
        signature = types.void(
            a_t, types.intp, b_t, types.intp, c_t, types.intp, types.intp, types.boolean
        )
        vector = Vector(c_t.dtype)
        width = c_t.dtype.bitwidth

        def codegen(context, builder, sig, args):
            index = ir.IntType(64)
            i, j, first, last = args[1], args[3], args[5], args[6]

            def const(n: int) -> Any:
                return ir.Constant(index, n)

            a, b, c = (make_array(sig.args[n])(context, builder, args[n]) for n in (0, 2, 4))
            lda, ldb, ldc = (_leading(builder, array, width) for array in (a, b, c))
            a_start = builder.gep(a.data, [i if transposed else builder.mul(i, lda)])
            b_start = builder.gep(b.data, [j])
            c_start = builder.gep(c.data, [builder.add(builder.mul(i, ldc), j)])

            def step(k: Any, sums: list[list[Any]]) -> list[list[Any]]:
                """The sums after depth k."""
                b_row = builder.gep(b_start, [builder.mul(k, ldb)])
                b_vectors = [
                    _load(builder, builder.gep(b_row, [const(v * vector.lanes)]), vector.ir, width)
                    for v in range(vectors)
                ]
                after = []
                for r in range(rows):
                    if transposed:
                        where = builder.add(builder.mul(k, lda), const(r))
                    else:
                        where = builder.add(k, builder.mul(const(r), lda))
                    wide = _splat(builder, builder.load(builder.gep(a_start, [where])), vector.ir)
                    after.append(
                        [product(builder, wide, b_vectors[v], sums[r][v]) for v in range(vectors)]
                    )
                return after

            def flat(k: Any, sums: list[list[Any]]) -> list[Any]:
                return [k, *(value for row in sums for value in row)]

            def merge(*branches: tuple[Any, Any, Any]) -> tuple[Any, list[list[Any]], list[Any]]:
                """Phis for (k, sums) that arrive from some blocks."""
                phis = [builder.phi(index)]
                phis += [builder.phi(vector.ir) for _ in range(rows * vectors)]
                for block, k, sums in branches:
                    for phi, value in zip(phis, flat(k, sums), strict=True):
                        phi.add_incoming(value, block)
                grid = [phis[1 + r * vectors : 1 + (r + 1) * vectors] for r in range(rows)]
                return phis[0], grid, phis

            zeros = [[vector.constant(0.0)] * vectors] * rows
            entry = builder.block
            loop, rest, odd, done = (
                builder.append_basic_block(name) for name in ("depth", "rest", "odd", "done")
            )
            more = builder.icmp_signed("<", builder.add(first, const(unroll - 1)), last)
            builder.cbranch(more, loop, rest)
            builder.position_at_end(loop)
            k, sums, phis = merge((entry, first, zeros))
            for n in range(unroll):
                sums = step(builder.add(k, const(n)), sums)
            after = builder.add(k, const(unroll))
            for phi, value in zip(phis, flat(after, sums), strict=True):
                phi.add_incoming(value, loop)
            more = builder.icmp_signed("<", builder.add(after, const(unroll - 1)), last)
            builder.cbranch(more, loop, rest)
            builder.position_at_end(rest)
            k, rest_sums, _ = merge((entry, first, zeros), (loop, after, sums))
            builder.cbranch(builder.icmp_signed("<", k, last), odd, done)
            builder.position_at_end(odd)
            odd_sums = step(k, rest_sums)
            builder.branch(done)
            builder.position_at_end(done)
            _, following, _ = merge((rest, k, rest_sums), (odd, k, odd_sums))

            def write(accumulate: bool) -> None:
                for r in range(rows):
                    for v in range(vectors):
                        offset = builder.add(builder.mul(const(r), ldc), const(v * vector.lanes))
                        pointer = builder.gep(c_start, [offset])
                        value = following[r][v]
                        if accumulate:
                            value = builder.fadd(_load(builder, pointer, vector.ir, width), value)
                        where = builder.bitcast(pointer, vector.ir.as_pointer())
                        builder.store(value, where).align = width // 8

            with builder.if_else(args[7]) as (then, otherwise):
                with then:
                    write(accumulate=True)
                with otherwise:
                    write(accumulate=False)
            return context.get_dummy_value()

        return signature, codegen

    return tile  # type: ignore[no-any-return]  # intrinsic has no types


@intrinsic
def view(typingctx, array, start, rows, cols):
    """The C-ordered matrix (rows, cols) over array's memory from flat element start on.

    Unchecked, and without a reference: slicing costs ten times the code.
    """
    matrix = types.Array(array.dtype, 2, "C")
    size = array.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        data = builder.gep(make_array(array)(context, builder, args[0]).data, [args[1]])
        result = make_array(matrix)(context, builder)
        item = ir.Constant(ir.IntType(64), size)
        populate_array(
            result,
            data=data,
            shape=[args[2], args[3]],
            strides=[builder.mul(args[3], item), item],
            itemsize=item,
            meminfo=None,
        )
        return result._getvalue()

    return matrix(array, types.intp, types.intp, types.intp), codegen


@intrinsic
def prefetch(typingctx, array, i, j):
    """Ask for the cache line of ``array[i, j]``; a hint, harmless for any address."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        i32 = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]),
            "llvm.prefetch.p0",
        )
        pointer = address(context, builder, array, args[0], args[1], args[2])
        flags = [ir.Constant(i32, n) for n in (0, 2, 1)]  # to read, into the second level, data
        builder.call(function, [builder.bitcast(pointer, byte), *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), codegen


@intrinsic
def fetch_add(typingctx, array, index, value):
    """Add to an int64 array's element atomically; the element as it was before."""

    def codegen(context, builder, signature, args):
        pointer = builder.gep(
            make_array(signature.args[0])(context, builder, args[0]).data, [args[1]]
        )
        return builder.atomic_rmw("add", pointer, args[2], "acq_rel")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def call_function(typingctx, function):
    """Call the C function at an address; it takes nothing."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
