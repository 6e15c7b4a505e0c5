"""Translate PTX, as NVVM writes it for Numba's kernels, to C.

One kernel becomes one C function in which every register is an unsigned integer of its width and
every label a label; memory, barriers and warps are those of ptxrun.h.  What is not known here
raises NotImplementedError: nothing is ever guessed.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
            "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip
_ROUND = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
_SPECIAL = {
    **{f"%tid.{axis}": f"self->{axis}" for axis in "xyz"},
    **{
        f"%{name}.{axis}": f"{name.upper()}_{axis.upper()}"
        for name in ("ntid", "ctaid", "nctaid")
        for axis in "xyz"
    },
    "%laneid": "self->lane",
    "%warpid": "self->warp",
    "%lanemask_lt": "((1u << self->lane) - 1)",
    "%dynamic_smem_size": "DYNAMIC_BYTES",
}
#: Bytes between shared variables that belong to none of them.
RED_ZONE = 64


def bits(kind: str) -> int:
    """Width of a PTX type in C: "f32" has 32; a predicate is a byte."""
    if not re.fullmatch(r"pred|b?f?(16|32|64)|[bus](8|16|32|64)", kind):
        raise NotImplementedError(f"PTX type {kind}")
    return 8 if kind == "pred" else int(kind.lstrip("bfsu"))


def c_type(kind: str) -> str:
    """The integer of C that holds a PTX type: signed for s32, else unsigned."""
    return f"{'' if kind[0] == 's' else 'u'}int{bits(kind)}_t"


def _unsigned(kind: str) -> str:
    return f"u{bits(kind)}"


def _name(text: str) -> str:
    """A PTX name as C takes it: %rd1, $L__BB0_2."""
    return text.lstrip("%").replace(".", "_").replace("$", "_S")


def _split(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _members(operand: str) -> list[str]:
    """The registers of {%f1, %f2}, or of %f1 alone."""
    return _split(operand[1:-1]) if operand.startswith("{") else [operand]


@dataclass(frozen=True)
class Instruction:
    """``fma.rn.f32 %f3, %f1, %f2, %f3``: name fma, modifiers rn and f32, kind f32, operands."""

    text: str
    line: int

    @property
    def opcode(self) -> str:
        return self.text.split(None, 1)[0]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[-1]

    @property
    def operands(self) -> list[str]:
        return _split(self.text[len(self.opcode) :])

    def unknown(self) -> NotImplementedError:
        """The error for what is not known of it."""
        return NotImplementedError(f"PTX instruction: {self.text}")


@dataclass
class Kernel:
    """What stands in the PTX text, and its translation."""

    name: str = ""
    parameters: list[tuple[str, str]] = field(default_factory=list)  # name, kind
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, bytes
    shared_bytes: int = 0
    shared_granule: int = 4  # bytes of the smallest store, for which races are told apart
    global_granule: int = 4
    dynamic: str | None = None  # the name of dynamic shared memory
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    constants: dict[str, tuple[str, str]] = field(default_factory=dict)  # kind, numbers
    registers: dict[str, str] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)  # line: file, its line
    body: list[str] = field(default_factory=list)

    @property
    def dynamic_offset(self) -> int:
        """Where dynamic shared memory begins: after a red zone."""
        return -(-(self.shared_bytes + RED_ZONE) // 16) * 16

    def place(self, line: int) -> str:
        """The line of Python that a line of PTX comes from."""
        if line not in self.places:
            return f"PTX line {line}"
        file, number = self.places[line]
        return f"{self.files.get(file, '?').rsplit('/', 1)[-1]}:{number}"

    def c_source(self) -> str:
        """A C file; ptxrun.h has to lie beside it."""
        tables = [
            f"static const {c_type(kind)} K_{_name(name)}[] __attribute__((aligned(16)))"
            f" = {{{numbers}}};"
            for name, (kind, numbers) in self.constants.items()
        ]
        inside = " || ".join(
            f"(a >= (uint64_t)K_{name} && a + n <= (uint64_t)K_{name} + sizeof K_{name})"
            for name in map(_name, self.constants)
        )
        registers = " ".join(
            f"{c_type('b' + str(bits(kind)))} {_name(register)} = 0;"
            for register, kind in self.registers.items()
        )
        return "\n".join(
            [
                "#include <stdint.h>",
                *tables,
                f"static int constant_at(uint64_t a, int n) {{ return {inside or '0'}; }}",
                f"#define LOCAL_BYTES {self.local_bytes}",
                f"#define SHARED_SHIFT {self.shared_granule.bit_length() - 1}",
                f"#define HALF {int(any('f16_of(' in x or 'of_f16(' in x for x in self.body))}",
                '#include "ptxrun.h"',
                "static void kernel(void) {",
                f"int carry = 0; {registers}",
                *self.body,
                "return;\n}\n",
            ]
        )


@functools.cache
def translate(ptx: str) -> Kernel:
    """Translate the one kernel of a PTX text."""
    return _Translator(ptx).kernel


class _Translator:
    """Reads line by line; ``op_*`` and the tables below know the instructions."""

    def __init__(self, ptx: str) -> None:
        self.kernel = Kernel()
        self.where: tuple[int, int] | None = None
        depth, in_parameters = 0, False
        for number, raw in enumerate(ptx.split("\n"), 1):
            line = re.sub(r"//.*", "", raw).strip()
            if not line:
                continue
            if in_parameters:
                in_parameters = not line.startswith(")")
                self.parameter(line)
            elif found := re.match(r"(?:\.visible\s+)?\.entry\s+([\w$]+)", line):
                if self.kernel.name:
                    raise NotImplementedError("PTX with two kernels")
                self.kernel.name = found[1]
                in_parameters = ")" not in line
            elif line in "{}":
                depth += 1 if line == "{" else -1
            elif not self.declaration(line) and depth:
                self.statements(line, number)

    def parameter(self, line: str) -> None:
        found = re.match(
            r"\.param\s+\.(\w+)\s+(?:\.ptr\s+)?(?:\.align\s+\d+\s+)?([\w$]+)(\[\d+\])?,?$", line
        )
        if found:
            self.kernel.parameters.append((found[2], found[1]))

    def declaration(self, line: str) -> bool:
        """Note what a directive declares; False if the line holds instructions."""
        kernel = self.kernel
        if re.match(r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.func\b", line):
            raise NotImplementedError("PTX functions: a call was not inlined")
        if found := re.match(r'\.file\s+(\d+)\s+"([^"]*)"', line):
            kernel.files[int(found[1])] = found[2]
        elif found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            self.where = int(found[1]), int(found[2])
        elif found := re.search(
            r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]", line
        ):
            self.shared(found[2], int(found[1] or 1), found[3])
        elif found := re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", line):
            kernel.local[found[2]] = -(-kernel.local_bytes // 16) * 16
            kernel.local_bytes = kernel.local[found[2]] + int(found[3])
        elif found := re.search(
            r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)\[\d*\]\s*=\s*\{([^}]*)\}",
            line,
        ):
            kernel.constants[found[2]] = found[1], found[3]
        elif found := re.match(r"\.reg\s+\.(\w+)\s+%([A-Za-z_$]+)<(\d+)>;", line):
            kernel.registers |= {f"%{found[2]}{i}": found[1] for i in range(int(found[3]))}
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(%?\w+(?:\s*,\s*%?\w+)*);", line):
            kernel.registers |= {name.strip(): found[1] for name in found[2].split(",")}
        return line.startswith(".") or bool(found)

    def shared(self, name: str, align: int, size: str) -> None:
        kernel = self.kernel
        if not size:
            kernel.dynamic = name
            return
        align = max(align, 16)
        offset = -(-(kernel.shared_bytes + RED_ZONE) // align) * align
        kernel.shared[name] = offset, int(size)
        kernel.shared_bytes = offset + int(size)

    def statements(self, line: str, number: int) -> None:
        found = re.match(r"([$\w]+):\s*(.*)$", line)
        if found:
            self.kernel.body.append(f"{_name(found[1])}:;")
            line = found[2]
        for text in filter(None, map(str.strip, line.split(";"))):
            if self.where:
                self.kernel.places[number] = self.where
            guard = re.match(r"@(!?)(%\w+)\s+(.*)$", text)
            code = self.instruction(Instruction(guard[3] if guard else text, number))
            if guard:
                code = f"if ({guard[1]}{_name(guard[2])}) {{{code}}}"
            self.kernel.body.append(code)

    # ---- operands

    def value(self, operand: str, kind: str) -> str:
        """A C expression: of float or double for f16, bf16, f32 and f64, else of the integer."""
        if kind in ("f32", "f64", "f16", "bf16"):
            if found := re.match(r"0[fF]([0-9a-fA-F]{8})$", operand):
                return f"f32_of(0x{found[1]}u)"
            if found := re.match(r"0[dD]([0-9a-fA-F]{16})$", operand):
                return f"f64_of(0x{found[1]}ull)"
            return f"{kind}_of({_name(operand)})"
        if operand.startswith("!"):
            return f"!{_name(operand[1:])}"
        return f"(({c_type(kind)}){self.bits_of(operand)})"

    def bits_of(self, operand: str) -> str:
        kernel = self.kernel
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand in kernel.registers:
            return _name(operand)
        if operand in kernel.shared:
            return str(kernel.shared[operand][0])
        if operand == kernel.dynamic:
            return str(kernel.dynamic_offset)
        if operand in kernel.local:
            return f"((uint64_t)self->local + {kernel.local[operand]})"
        if operand in kernel.constants:
            return f"(uint64_t)K_{_name(operand)}"
        if found := re.match(r"0[fFdD]([0-9a-fA-F]+)$", operand):
            return f"0x{found[1]}ull"
        if re.match(r"-?(?:\d+|0x[0-9a-fA-F]+)[uU]?$", operand):
            return f"0x{int(operand.rstrip('uU'), 0) & (1 << 64) - 1:x}ull"
        raise NotImplementedError(f"PTX operand {operand}")

    def put(self, register: str, value: str, kind: str) -> str:
        """Assign; a signed value fills a wider register with its sign."""
        if register == "_":
            return f"(void)({value});"
        if kind in ("f32", "f64", "f16", "bf16"):
            return f"{_name(register)} = of_{kind}({value});"
        target = f"uint{bits(self.kernel.registers[register])}_t"
        if kind[0] == "s":
            target += f")(int{bits(self.kernel.registers[register])}_t"
        return f"{_name(register)} = ({target})({c_type(kind)})({value});"

    def address(self, operand: str) -> str:
        base, offset = self.base_and_offset(operand)
        return f"(uint64_t)({self.value(base, 'u64')} + (int64_t){offset})"

    def base_and_offset(self, operand: str) -> tuple[str, int]:
        found = re.match(r"\[([^\]+]+?)\s*(?:\+\s*(-?\w+))?\]$", operand)
        if not found:
            raise NotImplementedError(f"PTX address {operand}")
        return found[1].strip(), int(found[2] or "0", 0)

    # ---- instructions

    def instruction(self, ins: Instruction) -> str:
        if ins.name in ("ret", "exit"):
            return "return;"
        if ins.name in ("membar", "fence"):
            return ";"
        handler = getattr(self, f"op_{ins.name}", None)
        if handler:
            return handler(ins)
        return self.floating(ins) if ins.kind in ("f32", "f64") else self.integer(ins)

    def op_bra(self, ins: Instruction) -> str:
        return f"goto {_name(ins.operands[0])};"

    def op_bar(self, ins: Instruction) -> str:
        if "warp" in ins.modifiers:
            return self.with_warp("SYNCWARP", ins.operands[0], ins.line)
        if ins.operands != ["0"] or "red" in ins.modifiers:
            raise ins.unknown()
        return f"wait_for(AT_BARRIER, {ins.line});"

    op_barrier = op_bar

    def op_ld(self, ins: Instruction) -> str:
        kind = f"s{bits(ins.kind)}" if ins.kind[0] == "s" else f"b{bits(ins.kind)}"
        registers, size = _members(ins.operands[0]), bits(kind) // 8
        if "param" in ins.modifiers:
            name, offset = self.base_and_offset(ins.operands[1])
            offset += 16 * [name for name, _ in self.kernel.parameters].index(name)
            at = f"PARAMETERS + {offset}"
        else:
            at = self.at(ins, ins.operands[1], size * len(registers), "0, 0")
        return self.access(at, *(
            f"{c_type(kind)} v = 0; if (at) memcpy(&v, at + {i * size}, {size});"
            f" {self.put(register, 'v', kind)}"
            for i, register in enumerate(registers)
        ))  # fmt: skip

    op_ldu = op_ld

    def op_st(self, ins: Instruction) -> str:
        kind = f"b{bits(ins.kind)}"
        registers, size = _members(ins.operands[1]), bits(kind) // 8
        at = self.at(ins, ins.operands[0], size * len(registers), "1, 0")
        return self.access(at, *(
            f"{c_type(kind)} v = {self.value(register, kind)};"
            f" if (at) memcpy(at + {i * size}, &v, {size});"
            for i, register in enumerate(registers)
        ))  # fmt: skip

    def op_atom(self, ins: Instruction) -> str:
        to, where, *rest = ins.operands
        return self.atomic(ins, where, rest, to)

    def op_red(self, ins: Instruction) -> str:
        return self.atomic(ins, ins.operands[0], ins.operands[1:], "_")

    def atomic(self, ins: Instruction, where: str, rest: list[str], to: str) -> str:
        kind = ins.kind
        x = self.value(rest[0], kind)
        after = {
            "add": f"old + {x}", "and": f"old & {x}", "or": f"old | {x}", "xor": f"old ^ {x}",
            "min": f"old < {x} ? old : {x}", "max": f"old > {x} ? old : {x}", "exch": x,
        }  # fmt: skip
        if "cas" in ins.modifiers:
            after["cas"] = f"old == {x} ? {self.value(rest[1], kind)} : old"
        name = next((m for m in ins.modifiers if m in after), None)
        if name is None or kind in ("f16", "bf16") or "v2" in ins.modifiers:
            raise ins.unknown()
        c, size = {"f32": "float", "f64": "double"}.get(kind) or c_type(kind), bits(kind) // 8
        return self.access(
            self.at(ins, where, size, "1, 1"),
            f"{c} old = 0, new; if (at) {{memcpy(&old, at, {size}); new = {after[name]};"
            f" memcpy(at, &new, {size});}} {self.put(to, 'old', kind)}",
        )

    def at(self, ins: Instruction, address: str, size: int, how: str) -> str:
        """Where an access goes, after the checks; `how`: does it write, is it atomic."""
        shared, width = "shared" in ins.modifiers, bits(ins.kind) // 8
        if shared:
            self.kernel.shared_granule = min(self.kernel.shared_granule, width)
        elif how.startswith("1"):
            self.kernel.global_granule = min(self.kernel.global_granule, width)
        place = "shared_at" if shared else "global_at"
        return f"{place}({self.address(address)}, {size}, {how}, {ins.line})"

    @staticmethod
    def access(at: str, *each: str) -> str:
        return f"{{uint8_t *at = {at}; {' '.join(f'{{{code}}}' for code in each)}}}"

    def op_cvta(self, ins: Instruction) -> str:
        sign = "-" if "to" in ins.modifiers else "+"
        shift = f" {sign} SHARED_WINDOW" if "shared" in ins.modifiers else ""
        to, x = ins.operands
        return self.put(to, self.value(x, "u64") + shift, "u64")

    def op_mov(self, ins: Instruction) -> str:
        to, x = ins.operands
        width = bits(ins.kind)
        parts = _members(to if to.startswith("{") else x)
        part, kind = width // len(parts), "pred" if ins.kind == "pred" else f"b{width}"
        if to.startswith("{"):
            whole = self.value(x, kind)
            return "".join(
                self.put(p, f"{whole} >> {i * part}", f"b{part}") for i, p in enumerate(parts)
            )
        if x.startswith("{"):
            x = " | ".join(
                f"({c_type(kind)}){self.value(p, f'b{part}')} << {i * part}"
                for i, p in enumerate(parts)
            )
            return self.put(to, x, kind)
        return self.put(to, self.value(x, kind), kind)

    def op_setp(self, ins: Instruction) -> str:
        to, left, right, *other = ins.operands
        x, y = self.value(left, ins.kind), self.value(right, ins.kind)
        compare = ins.modifiers[0]
        if ins.kind[0] == "f":
            if compare in ("num", "nan"):
                test = f"{'!' if compare == 'num' else ''}unordered({x}, {y})"
            elif compare in _COMPARE:
                test = f"(!unordered({x}, {y}) && {x} {_COMPARE[compare]} {y})"
            else:  # ltu: less than, or one of them is NaN
                test = f"(unordered({x}, {y}) || {x} {_COMPARE[compare.removesuffix('u')]} {y})"
        else:
            test = f"({x} {_COMPARE[compare]} {y})"
        for name, sign in (("and", "&&"), ("or", "||"), ("xor", "^")):
            if name in ins.modifiers:
                test = f"({test}) {sign} {self.value(other[0], 'pred')}"
        first, *second = map(str.strip, to.split("|"))
        negated = f"{_name(second[0])} = !test;" if second else ""
        return f"{{uint8_t test = {test}; {_name(first)} = test; {negated}}}"

    def op_selp(self, ins: Instruction) -> str:
        to, x, y, test = ins.operands
        kind = f"b{bits(ins.kind)}"
        return self.put(to, f"{_name(test)} ? {self.value(x, kind)} : {self.value(y, kind)}", kind)

    def op_cvt(self, ins: Instruction) -> str:
        if len(ins.operands) != 2:
            return self.packed(ins)
        to, x = ins.operands
        into, out_of = ins.modifiers[-2:]
        x = self.value(x, out_of)
        halves = {"f16", "bf16"} & {into, out_of}
        known = {"f16", "bf16", "f32", "rn"}
        if halves and not known.issuperset(ins.modifiers):
            raise ins.unknown()
        rounding = next((_ROUND[m] for m in ins.modifiers if m in _ROUND), None)
        if out_of[0] == "f" and into[0] in "su":
            return self.truncated(to, f"{rounding}((double){x})", into)
        if rounding:
            x = f"{rounding}{'f' if out_of == 'f32' else ''}({x})"
        if into in ("f32", "f64"):
            x = f"({'float' if into == 'f32' else 'double'}){x}"
        if "sat" in ins.modifiers:
            if (into, out_of) != ("f32", "f32"):
                raise ins.unknown()
            x = f"fminf(fmaxf({x}, 0), 1)"
        return self.put(to, x, into)

    def packed(self, ins: Instruction) -> str:
        """Two floats rounded to the halves of a register: the first is the upper."""
        if ins.opcode != "cvt.rn.bf16x2.f32":
            raise ins.unknown()
        to, *halves = ins.operands
        upper, lower = (f"of_bf16({self.value(x, 'f32')})" for x in halves)
        return self.put(to, f"(uint32_t){upper} << 16 | {lower}", "b32")

    def truncated(self, to: str, value: str, kind: str) -> str:
        """Put a double into an integer: NaN is 0, what is too large the largest."""
        low, high = (0, 2 ** bits(kind) - 1)
        if kind[0] == "s":
            low, high = -(2 ** (bits(kind) - 1)), 2 ** (bits(kind) - 1) - 1
        least = "INT64_MIN" if low == -(2**63) else str(low)
        clamped = (
            f"v != v ? 0 : v <= {low}.0 ? ({c_type(kind)}){least}"
            f" : v >= {high}.0 ? ({c_type(kind)}){high}ull : ({c_type(kind)})v"
        )
        return f"{{double v = {value}; {self.put(to, clamped, kind)}}}"

    def op_not(self, ins: Instruction) -> str:
        to, x = ins.operands
        sign = "!" if ins.kind == "pred" else "~"
        return self.put(to, sign + self.value(x, ins.kind), ins.kind)

    def op_and(self, ins: Instruction) -> str:
        to, x, y = ins.operands
        sign = {"and": "&", "or": "|", "xor": "^"}[ins.name]
        return self.put(to, f"{self.value(x, ins.kind)} {sign} {self.value(y, ins.kind)}", ins.kind)

    op_or = op_xor = op_and

    def op_shl(self, ins: Instruction) -> str:
        to, x, n = ins.operands
        x, n = self.value(x, ins.kind), self.value(n, "u32")
        width, sign = bits(ins.kind), {"shl": "<<", "shr": ">>"}[ins.name]
        beyond = f"({x} < 0 ? -1 : 0)" if sign == ">>" and ins.kind[0] == "s" else "0"
        return self.put(
            to, f"{n} >= {width} ? {beyond} : ({x} {sign} ({n} & {width - 1}))", ins.kind
        )

    op_shr = op_shl

    def field(self, ins: Instruction, position: str, length: str) -> str:
        """Declarations of p, n and of a mask of n bits, for bfi and bfe."""
        c, width = c_type(_unsigned(ins.kind)), bits(ins.kind)
        return (
            f"unsigned p = {self.value(position, 'u32')} & 255,"
            f" n = {self.value(length, 'u32')} & 255;"
            f" {c} mask = n >= {width} ? ~({c})0 : (({c})1 << n) - 1;"
        )

    def op_bfi(self, ins: Instruction) -> str:
        to, x, y, *field_ = ins.operands
        kind = _unsigned(ins.kind)
        x, y = self.value(x, kind), self.value(y, kind)
        inserted = f"p >= {bits(kind)} ? {y} : ({y} & ~(mask << p)) | (({x} & mask) << p)"
        return f"{{{self.field(ins, *field_)} {self.put(to, inserted, kind)}}}"

    def op_bfe(self, ins: Instruction) -> str:
        to, x, *field_ = ins.operands
        if ins.kind[0] != "u":
            raise ins.unknown()
        found = f"p >= {bits(ins.kind)} ? 0 : ({self.value(x, ins.kind)} >> p) & mask"
        return f"{{{self.field(ins, *field_)} {self.put(to, found, ins.kind)}}}"

    def op_shf(self, ins: Instruction) -> str:
        to, low, high, n = ins.operands
        low, high, n = (self.value(x, "u32") for x in (low, high, n))
        n = f"({n} & 31)" if "wrap" in ins.modifiers else f"({n} > 32 ? 32 : {n})"
        both = f"((uint64_t){high} << 32 | {low})"
        shifted = f"({both} << {n}) >> 32" if "l" in ins.modifiers else f"{both} >> {n}"
        return self.put(to, f"(uint32_t)({shifted})", "u32")

    def op_popc(self, ins: Instruction) -> str:
        to, x = ins.operands
        suffix = "ll" if bits(ins.kind) == 64 else ""
        return self.put(to, f"__builtin_popcount{suffix}({self.value(x, ins.kind)})", "u32")

    def op_clz(self, ins: Instruction) -> str:
        to, x = ins.operands
        x, suffix = self.value(x, ins.kind), "ll" if bits(ins.kind) == 64 else ""
        return self.put(to, f"{x} ? __builtin_clz{suffix}({x}) : {bits(ins.kind)}", "u32")

    # ---- arithmetic

    def integer(self, ins: Instruction) -> str:
        kind, (to, *rest) = ins.kind, ins.operands
        if not re.fullmatch(r"[sub]\d+", kind):
            raise ins.unknown()
        unsigned = _unsigned(kind)
        if "cc" in ins.modifiers or ins.name in ("addc", "subc", "madc"):
            return self.with_carry(ins)
        if ins.name in ("mul", "mad"):
            return self.product(ins)
        plain = [self.value(x, unsigned) for x in rest]
        typed = [self.value(x, kind) for x in rest]
        if ins.name in ("add", "sub") and "sat" not in ins.modifiers:
            return self.put(to, f" {'+' if ins.name == 'add' else '-'} ".join(plain), unsigned)
        if ins.name in ("div", "rem"):
            x, y = typed
            result = f"{y} == 0 ? ({c_type(kind)})-1 : {x} {'/' if ins.name == 'div' else '%'} {y}"
            return self.put(to, result, kind)
        if ins.name in ("min", "max"):
            x, y = typed
            return self.put(to, f"{x} {'<' if ins.name == 'min' else '>'} {y} ? {x} : {y}", kind)
        if ins.name == "neg":
            return self.put(to, f"0 - {plain[0]}", unsigned)
        if ins.name == "abs":
            return self.put(to, f"{typed[0]} < 0 ? 0 - {plain[0]} : {plain[0]}", unsigned)
        raise ins.unknown()

    def product(self, ins: Instruction) -> str:
        kind, (to, x, y, *added) = ins.kind, ins.operands
        width, unsigned = bits(kind), _unsigned(kind)
        twice = {16: "int32_t", 32: "int64_t", 64: "__int128"}[width]
        if kind[0] != "s":
            twice = "unsigned __int128" if width == 64 else f"u{twice}"
        full = f"(({twice}){self.value(x, kind)} * ({twice}){self.value(y, kind)})"
        if "wide" in ins.modifiers:
            unsigned = f"u{2 * width}"
            result = f"({c_type(unsigned)}){full}"
        elif "hi" in ins.modifiers:
            result = f"({c_type(unsigned)})({full} >> {width})"
        else:
            result = f"{self.value(x, unsigned)} * {self.value(y, unsigned)}"
        if added:
            result += f" + {self.value(added[0], unsigned)}"
        return self.put(to, result, unsigned)

    def with_carry(self, ins: Instruction) -> str:
        """add.cc and the like: the sum in twice the width, its upper half the carry."""
        kind, (to, x, y, *added) = ins.kind, ins.operands
        width, unsigned = bits(kind), _unsigned(kind)
        twice, c = {32: "uint64_t", 64: "unsigned __int128"}[width], c_type(unsigned)
        carry = "carry" if ins.name.endswith("c") else "0"
        if ins.name in ("sub", "subc"):
            total = f"({twice}){self.value(x, unsigned)} - {self.value(y, unsigned)} - {carry}"
        elif ins.name in ("add", "addc"):
            total = f"({twice}){self.value(x, unsigned)} + {self.value(y, unsigned)} + {carry}"
        else:
            wide = ({32: "int64_t", 64: "__int128"}[width]) if kind[0] == "s" else twice
            full = f"({twice})(({wide}){self.value(x, kind)} * ({wide}){self.value(y, kind)})"
            part = f"({full} >> {width})" if "hi" in ins.modifiers else full
            total = f"({twice})({c}){part} + {self.value(added[0], unsigned)} + {carry}"
        keep = f"carry = (total >> {width}) & 1;" if "cc" in ins.modifiers else ""
        return f"{{{twice} total = {total}; {keep} {self.put(to, f'({c})total', unsigned)}}}"

    def floating(self, ins: Instruction) -> str:
        kind, (to, *rest) = ins.kind, ins.operands
        f, flush = ("f", "flushed" if "ftz" in ins.modifiers else "") if kind == "f32" else ("", "")
        args = [f"{flush}({self.value(x, kind)})" for x in rest]
        name = {"ex2": "exp2", "lg2": "log2", "mad": "fma", "min": "fmin", "max": "fmax",
                "abs": "fabs"}.get(ins.name, ins.name)  # fmt: skip
        signs = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
        if name in signs:
            result = signs[name].join(args)
        elif name in ("fma", "fmin", "fmax", "fabs", "sqrt", "exp2", "log2", "sin", "cos", "tanh"):
            if "NaN" in ins.modifiers or (kind == "f64" and name in ("sin", "cos", "tanh")):
                raise ins.unknown()
            result = f"{name}{f}({', '.join(args)})"
        elif name in ("rcp", "rsqrt"):
            result = f"1 / {f'sqrt{f}' if name == 'rsqrt' else ''}({args[0]})"
        elif name == "neg":
            result = f"-({args[0]})"
        elif name == "copysign":
            result = f"copysign{f}({args[1]}, {args[0]})"
        else:
            raise ins.unknown()
        if "sat" in ins.modifiers:
            result = f"fmin{f}(fmax{f}({result}, 0), 1)"
        return self.put(to, f"{flush}({result})", kind)

    # ---- warps

    def with_warp(self, operation: str, mask: str, line: int) -> str:
        return f"with_warp({operation}, {self.value(mask, 'u32')}, {line});"

    def op_activemask(self, ins: Instruction) -> str:
        return self.put(ins.operands[0], "0xffffffffu", "b32")

    def op_mma(self, ins: Instruction) -> str:
        if ins.opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
            raise ins.unknown()
        to, a, b, c = map(_members, ins.operands)
        take = [f"self->factors[{i}] = {self.value(x, 'b32')};" for i, x in enumerate([*a, *b])]
        take += [f"self->sums[{i}] = {self.value(x, 'f32')};" for i, x in enumerate(c)]
        give = [self.put(x, f"self->sums[{i}]", "f32") for i, x in enumerate(to)]
        return " ".join([*take, self.with_warp("MMA", "0xffffffff", ins.line), *give])

    def op_shfl(self, ins: Instruction) -> str:
        to, x, b, c, mask = ins.operands
        to, *arrived = map(str.strip, to.split("|"))
        b, c = self.value(b, "s32"), self.value(c, "u32")
        mode = next((m for m in ins.modifiers if m in ("idx", "up", "down", "bfly")), None)
        if mode is None:
            raise ins.unknown()
        source = {
            "idx": f"(lane & segment) | ({b} & ~segment & 31)",
            "up": f"lane - {b}",
            "down": f"lane + {b}",
            "bfly": f"lane ^ {b}",
        }[mode]
        return (
            f"{{int lane = self->lane, segment = {c} >> 8 & 31;"
            f" int end = (lane & segment) | ({c} & 31 & ~segment);"
            f" int source = {source}, inside = source {'>=' if mode == 'up' else '<='} end;"
            f" self->source_lane = inside ? source : lane; self->sent = {self.value(x, 'b32')};"
            f" {self.with_warp('SHUFFLE', mask, ins.line)}"
            f" {self.put(to, 'self->received', 'b32')}"
            f" {f'{_name(arrived[0])} = inside;' if arrived else ''}}}"
        )

    def op_vote(self, ins: Instruction) -> str:
        to, x, mask = ins.operands
        results = {
            "ballot": self.put(to, "self->received", "b32") if "ballot" in ins.modifiers else "",
            "any": f"{_name(to)} = self->received != 0;",
            "all": f"{_name(to)} = self->received == {self.value(mask, 'u32')};",
        }
        mode = next((m for m in ins.modifiers if m in results), None)
        if mode is None:
            raise ins.unknown()
        return (
            f"{{self->sent = {self.value(x, 'pred')}; self->source_lane = self->lane;"
            f" {self.with_warp('BALLOT', mask, ins.line)} {results[mode]}}}"
        )
