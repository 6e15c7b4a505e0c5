"""The one place that calls Numba: a kernel and all that it calls become one piece of object code.

A function that kernels call is typed and lowered once for each signature, and linked into the
kernels; only these are optimised and turned into machine code.  The code is position-independent,
raises no exceptions, allocates nothing, and needs nothing of Numba when it runs.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import compiler, compiler_machinery, cpu, lowering, registry
from numba.core import ir as numba_ir
from numba.core import typed_passes as typed
from numba.core import untyped_passes as untyped
from numba.core.codegen import AOTCodeLibrary, AOTCPUCodegen
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager, register_pass

from favor_np.cpu.processor import TARGET

#: Reassociation is allowed (it is what vectorises a sum), NaN and infinity stay what they are.
FAST = frozenset({"contract", "reassoc", "nsz", "arcp", "afn"})
#: Products and sums may fuse and nothing else: for code that rounds by adding a large number.
EXACT = frozenset({"contract"})


class _Codegen(AOTCPUCodegen):  # type: ignore[misc]  # Numba's classes have no types
    """Code for a target and a way to compute products of bfloat16."""

    def __init__(self, way: str) -> None:
        self._way = way
        super().__init__("favor_np", TARGET.cpu)

    def _customize_tm_features(self) -> str:
        return TARGET.features_for(self._way)


class _Lower(lowering.Lower):  # type: ignore[misc]  # Numba's classes have no types
    """From Numba's form to LLVM's: what is assigned once is a value, and nothing counts references.

    Numba would keep each variable that two blocks know in memory, and clear it after its last use.
    """

    def _find_singly_assigned_variable(self) -> None:
        assigned: Counter[str] = Counter()
        early = set()  # read before they are assigned, in the order in which blocks are lowered
        for _, block in sorted(self.blocks.items()):
            for statement in block.body:
                if isinstance(statement, numba_ir.Del):
                    continue
                is_assignment = isinstance(statement, numba_ir.Assign)
                reads = statement.value if is_assignment else statement
                if isinstance(reads, numba_ir.Var):
                    early |= {reads.name} - assigned.keys()
                elif isinstance(reads, numba_ir.Inst):
                    early |= {each.name for each in reads.list_vars()} - assigned.keys()
                if is_assignment:
                    assigned[statement.target.name] += 1
        self._singly_assigned_vars = {name for name, n in assigned.items() if n == 1} - early
        self._blk_local_varmap: dict[str, Any] = {}

    def storevar(self, value: Any, name: str, argidx: int | None = None) -> None:  # noqa: ARG002
        """Set a variable; what it was is of no interest."""
        if name in self._singly_assigned_vars:
            self._blk_local_varmap[name] = value
        else:
            self.builder.store(value, self.getvar(name))

    def delvar(self, name: str) -> None:
        """Do nothing: no variable has anything to be freed."""


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(typed.NativeLowering):  # type: ignore[misc]  # Numba's classes have no types
    _name = "kernel_lowering"
    lowering_class = _Lower


class _Passes(PassManager):  # type: ignore[misc]  # Numba's classes have no types
    """The passes that kernels need: no closures, no literals, no checks of other passes."""

    def __init__(self, state: Any) -> None:
        super().__init__("kernels")
        state.type_annotation = None
        for each in (
            untyped.TranslateByteCode,
            untyped.FixupArgs,
            untyped.IRProcessing,
            untyped.DeadBranchPrune,
            untyped.GenericRewrites,
            untyped.ReconstructSSA,
            untyped.DeadBranchPrune,
            typed.NopythonTypeInference,
            typed.PreLowerStripPhis,
            typed.IRLegalization,
            _Lowering,
            typed.NoPythonBackend,
        ):
            self.add_pass(each)
        self.finalize()

    def run(self, state: Any) -> None:
        """Run them."""
        for each, _ in self.passes:
            one = compiler_machinery._pass_registry.get(each).pass_inst
            one.analysis = self._analysis
            one.run_pass(state)


class _Compiler(Compiler):  # type: ignore[misc]  # Numba's classes have no types
    def define_pipelines(self) -> list[_Passes]:
        """Return the only pipeline."""
        return [_Passes(self.state)]


class _Library(AOTCodeLibrary):  # type: ignore[misc]  # Numba's classes have no types
    """Code that is optimised once before linking, function by function, and once as a whole."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout
        manager, builder = self._codegen._function_pass_manager()
        for function in module.functions:
            if not function.is_declaration:
                manager.run(function, builder)


class _Part(_Library):
    """Code that is only ever linked into a kernel, and optimised there: none of its own runs."""

    def finalize(self) -> None:
        """Leave what it calls to the kernel, which links each part once."""
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:  # noqa: ARG002
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Do nothing: there is no machine code that could look for it."""


class _PartCompiler(_Compiler):
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *args: Any) -> None:
        library = _Part(codegen_for(""), "part")
        super().__init__(typingctx, targetctx, library, *args)


def _not_callable(*args: Any, **kwargs: Any) -> None:
    raise TypeError("this function has no machine code of its own: only kernels can call it")


def jit(*, fastmath: frozenset[str] = FAST) -> Callable[..., Any]:
    """Compile for kernels: IEEE division, no exceptions, no new arrays."""
    if numba.config.DISABLE_JIT:
        raise RuntimeError("favor_np computes in compiled code only: unset NUMBA_DISABLE_JIT")

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(
            error_model="numpy",
            fastmath=set(fastmath),
            no_cfunc_wrapper=True,
            no_cpython_wrapper=True,
            pipeline_class=_PartCompiler,
            _nrt=False,
        )(function)
        specialise = dispatcher.get_call_template
        # A literal 0 or True at a call site is no reason to compile the callee once more.
        dispatcher.get_call_template = lambda args, kws: specialise(
            [types.unliteral(a) for a in args], {k: types.unliteral(a) for k, a in kws.items()}
        )
        dispatcher._compile_for_args = _not_callable
        dispatcher.add_overload = lambda result: dispatcher.overloads.update(
            {tuple(result.signature.args): result}
        )
        return dispatcher

    return decorate


class _Kernel(_Library):
    """A kernel with all that it calls, of which only the kernel itself can be seen."""

    symbol = ""

    def finalize(self) -> None:
        """Link all that it calls, and what that calls, and compile it."""
        parts: list[Any] = []
        _collect(self, parts)
        self._linking_libraries = parts[::-1]  # those first that call the others
        super().finalize()

    def _optimize_final_module(self) -> None:
        module = self._final_module
        for value in (*module.functions, *module.global_variables):
            if not value.is_declaration and value.name != self.symbol:
                value.linkage = "internal"
        manager, builder = self._codegen._module_pass_manager()
        manager.run(module, builder)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Let the garbage collector rest: what a compiler makes is mostly kept, or freed at once."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _remembering(target: Any) -> Iterator[None]:
    """Let Numba resolve each call and attribute of some types once, and look for no more functions.

    It would ask all that it knows anew at every place, and first whether it knows more by now.
    """
    typing, target_context = target.typing_context, target.target_context
    typing.refresh()
    target_context.refresh()
    typing.refresh = lambda: None
    first = next(iter(target_context._registries))  # where intrinsics go
    target_context.refresh = lambda: target_context.install_registry(first)
    for name in "resolve_function_type", "resolve_getattr":
        setattr(typing, name, _remembered(getattr(typing, name)))
    try:
        yield
    finally:
        for name in "resolve_function_type", "resolve_getattr", "refresh":
            delattr(typing, name)
        del target_context.refresh


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def resolve(subject: Any, args: Any, kws: Any = None) -> Any:
        more = () if kws is None else (kws,)
        key = subject, args if isinstance(args, str) else tuple(args), tuple(dict(*more).items())
        try:
            hash(key)
        except TypeError:  # an index may be a slice
            return function(subject, args, *more)
        if key not in known:
            known[key] = function(subject, args, *more)
        return known[key]

    return resolve


def _collect(library: Any, found: list[Any]) -> None:
    """Add the libraries that one needs, those first that need no other."""
    for each in library._linking_libraries:
        if each not in found:
            _collect(each, found)
            if each not in found:
                found.append(each)


def _flags() -> Any:
    flags = compiler.Flags()
    flags.error_model = "numpy"
    flags.fastmath = cpu.FastMathOptions(set(FAST))
    flags.no_compile = flags.no_cfunc_wrapper = flags.no_cpython_wrapper = True
    return flags


def compile_kernel(body: Any, kind: Any, symbol: str, way: str) -> bytes:
    """Compile ``body(block)`` to the object code of ``int64_t symbol(const void *block)``.

    It returns what the body does, or -1 if that has raised an error.
    """
    target = registry.cpu_target
    with global_compiler_lock, _no_collector(), _remembering(target):
        library = _Kernel(codegen_for(way), symbol)
        library.symbol = symbol
        result = compiler.compile_extra(
            target.typing_context,
            target.target_context,
            body.py_func,
            (kind,),
            types.int64,
            _flags(),
            {},
            library=library,
            pipeline_class=_Compiler,
        )
        library.add_ir_module(_door(target.target_context, library, result.fndesc, symbol))
        library.finalize()
        return bytes(library.emit_native_object())


def _door(context: Any, library: Any, descriptor: Any, symbol: str) -> Any:
    """Make the function that C calls."""
    module = library.create_ir_module(f"{symbol}.door")
    i64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(i64, [i64.as_pointer()]), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    body = context.declare_function(module, descriptor)
    status, value = context.call_conv.call_function(
        builder, body, descriptor.restype, descriptor.argtypes, function.args
    )
    builder.ret(builder.select(status.is_ok, value, ir.Constant(i64, -1)))
    return module


_codegens: dict[str, _Codegen] = {}


def codegen_for(way: str) -> _Codegen:
    """Return the code generator for a way to compute products of bfloat16; "" for any."""
    if way not in _codegens:
        _codegens[way] = _Codegen(way)
    return _codegens[way]
