"""PTX text: kernels, their parameters and variables, and instructions with the places they come from.

Grammar and layout of parameters are those of NVIDIA's "PTX ISA". A kernel's body is parsed when it is first asked for.
"""

from __future__ import annotations

import bisect
import functools
import re
from dataclasses import dataclass, field

from .faults import UnknownOpcode

# Bytes of a value; predicates have no size in memory.
SIZES = {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
SIZES |= {"f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f16x2": 4, "bf16x2": 4, "f64": 8, "b128": 16, "pred": 0}


@dataclass(frozen=True, slots=True)
class Register:
    index: int  # among all of the kernel
    type: str  # as declared: "b32", "pred", ...
    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A number: an integer, or the bits of a float of 4 or 8 bytes."""

    value: int | float
    float_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable's name where its address is meant, or a label."""

    name: str


@dataclass(frozen=True, slots=True)
class Special:
    name: str  # "%tid.x"


@dataclass(frozen=True, slots=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    of: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """`a|b`: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Not:
    """`!p`."""

    of: Register


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`: a result that nobody wants."""


Operand = Register | Immediate | Symbol | Special | Address | Vector | Pair | Not | Sink


@dataclass(slots=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | Not | None
    line: int  # in the PTX text, from 1
    text: str
    source: tuple[str, int] | None  # file and line, from the last .loc

    def __str__(self) -> str:
        place = f", {self.source[0]}:{self.source[1]}" if self.source else ""
        return f"PTX line {self.line}: `{self.text}`{place}"


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    type: str
    size: int  # bytes
    align: int
    offset: int  # in the buffer of parameters


@dataclass(slots=True)
class Variable:
    """Of shared or local memory. `size` None: as much as the launch gives (extern)."""

    name: str
    space: str
    size: int | None
    align: int


@dataclass(slots=True)
class Body:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of the instruction that follows
    registers: list[Register] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)


@dataclass
class Entry:
    """A kernel."""

    name: str
    parameters: list[Parameter]
    text: str = field(repr=False)
    first_line: int  # of the body's text
    files: dict[int, str] = field(repr=False)
    module_variables: dict[str, Variable] = field(repr=False)

    @functools.cached_property
    def body(self) -> Body:
        return _BodyParser(self).parse()

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)

    @functools.cached_property
    def shared(self) -> dict[str, int]:
        """Where in the block's shared memory its variables lie; those that the launch sizes lie at the end."""
        return _layout(self.body.variables, "shared")

    @functools.cached_property
    def local(self) -> dict[str, int]:
        """Where in a thread's local memory its variables lie."""
        return _layout(self.body.variables, "local")

    def static_bytes(self, space: str) -> int:
        """Of shared or local memory, without what the launch adds."""
        offsets = self.shared if space == "shared" else self.local
        return max(
            (offsets[v.name] + (v.size or 0) for v in self.body.variables.values() if v.space == space), default=0
        )


def _layout(variables: dict[str, Variable], space: str) -> dict[str, int]:
    offsets, end = {}, 0
    for variable in sorted((v for v in variables.values() if v.space == space), key=lambda v: v.size is None):
        start = -(-end // variable.align) * variable.align
        offsets[variable.name] = start
        end = start + (variable.size or 0)
    return offsets


def _without_comments(text: str) -> str:
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)


_ENTRY = re.compile(r"\.entry\s+([\w$%.]+)\s*(?:\(([^)]*)\))?[^{;]*\{")
_VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s+((?:\.align\s+\d+\s+)?)\.(\w+)\s+([\w$%.]+)((?:\[\d*\])*)\s*(=[^;]*)?$"
)


def parse_module(ptx: str) -> dict[str, Entry]:
    """The kernels of a module, by name."""
    text = _without_comments(ptx)
    newlines = [found.start() for found in re.finditer("\n", text)]
    files = {
        int(number): name.rsplit("/", 1)[-1]
        for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
    }
    entries, outside, end = {}, [], 0
    for found in _ENTRY.finditer(text):
        if found.start() < end:
            continue
        close = _closing_brace(text, found.end())
        outside.append(text[end : found.start()])
        entries[found[1]] = (_parameters(found[2] or ""), text[found.end() : close], found.end())
        end = close + 1
    variables = {}
    for statement in re.findall(r"\.(?:shared|global|const)\b[^;{]*(?:\{[^}]*\})?[^;{]*;", "".join(outside)):
        variable = _variable(statement[:-1])
        variables[variable.name] = variable
    return {
        name: Entry(name, parameters, body, bisect.bisect_left(newlines, start) + 1, files, variables)
        for name, (parameters, body, start) in entries.items()
    }


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for found in re.compile("[{}]").finditer(text, start):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.start()
    raise ValueError("bench.ptx: PTX must have a closing brace for every opening one (because kernels end there)")


def _parameters(text: str) -> list[Parameter]:
    parameters, end = [], 0
    for part in filter(None, map(str.strip, text.split(","))):
        found = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr.*\s)?([\w$%.]+)(?:\[(\d+)\])?$", part)
        if found is None:
            raise ValueError(f"bench.ptx: a parameter must read .param TYPE NAME, got {part!r}")
        size = SIZES[found[2]] * int(found[4] or 1)
        align = int(found[1] or SIZES[found[2]])
        offset = -(-end // align) * align
        parameters.append(Parameter(found[3], found[2], size, align, offset))
        end = offset + size
    return parameters


def _variable(text: str) -> Variable:
    found = _VARIABLE.match(" ".join(text.split()))
    if found is None:
        raise ValueError(f"bench.ptx: a variable must read .SPACE TYPE NAME, got {text!r}")
    space, align, kind, name, sizes, _ = found.groups()
    align = int(align.split()[1]) if align else SIZES[kind]
    size: int | None = SIZES[kind]
    for count in re.findall(r"\[(\d*)\]", sizes):
        size = None if count == "" or size is None else size * int(count)
    return Variable(name, space, size, align)


_STATEMENT = re.compile(
    r"""(?P<space>\s+)
      | (?P<loc>\.loc\s+(?P<file>\d+)\s+(?P<row>\d+)[^\n]*)
      | (?P<label>[$\w]+)\s*:(?!:)
      | (?P<open>\{)
      | (?P<close>\})
      | (?P<statement>[^;]+);""",
    re.VERBOSE,
)
_INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)


class _BodyParser:
    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.body = Body()
        self.known = {p.name for p in entry.parameters}
        self.scopes: list[dict[str, Register]] = [{}]
        self.families: list[dict[str, tuple[str, int]]] = [{}]  # "%r" -> ("b32", how many)
        self.operands: dict[str, Operand] = {}  # of the outermost scope, already parsed

    def parse(self) -> Body:
        text, position, line = self.entry.text, 0, self.entry.first_line
        source = None
        while position < len(text):
            found = _STATEMENT.match(text, position)
            if found is None:
                break
            position = found.end()
            kind = found.lastgroup if found["loc"] is None else "loc"
            if kind == "loc":
                row = int(found["row"])
                if row:  # 0: nowhere in particular
                    source = self.entry.files.get(int(found["file"]), f"file {found['file']}"), row
            elif kind == "label":
                self.body.labels[found["label"]] = len(self.body.instructions)
            elif kind == "open":
                self.scopes.append({})
                self.families.append({})
            elif kind == "close":
                self.scopes.pop()
                self.families.pop()
            elif kind == "statement":
                self.statement(found["statement"], line, source)
            line += found[0].count("\n")
        return self.body

    def statement(self, text: str, line: int, source: tuple[str, int] | None) -> None:
        text = " ".join(text.split())
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith((".shared", ".local")):
            variable = _variable(text)
            self.body.variables[variable.name] = variable
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                raise UnknownOpcode(f"bench.ptx: directive {text.split()[0]} is not known, PTX line {line}: `{text}`")
        else:
            found = _INSTRUCTION.match(text)
            if found is None:
                raise ValueError(f"bench.ptx: PTX line {line} is no instruction: `{text}`")
            negated, guard, opcode, rest = found.groups()
            if guard is not None:
                guard = self.register(guard)
                guard = Not(guard) if negated else guard
            operands = tuple(self.operand(part) for part in _split(rest))
            self.body.instructions.append(Instruction(opcode, operands, guard, line, text, source))

    def declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in map(str.strip, names.split(",")):
            family = re.match(r"(.*)<(\d+)>$", name)
            if family:
                self.families[-1][family[1]] = kind[1:], int(family[2])
            else:
                self.scopes[-1][name] = self.new_register(kind[1:], name)

    def new_register(self, kind: str, name: str) -> Register:
        register = Register(len(self.body.registers), kind, name)
        self.body.registers.append(register)
        return register

    def register(self, name: str) -> Register:
        found = self.find_register(name)
        if found is None:
            raise ValueError(f"bench.ptx: register {name} must be declared")
        return found

    def find_register(self, name: str) -> Register | None:
        for scope, families in zip(reversed(self.scopes), reversed(self.families), strict=True):
            if name in scope:
                return scope[name]
            for length in range(len(name) - 1, 0, -1):
                if not name[length].isdigit():
                    break
                family = families.get(name[:length])
                if family and int(name[length:]) < family[1]:
                    scope[name] = self.new_register(family[0], name)
                    return scope[name]
        return None

    def operand(self, text: str) -> Operand:
        if len(self.scopes) > 1:
            return self.new_operand(text)
        found = self.operands.get(text)
        if found is None:
            found = self.operands[text] = self.new_operand(text)
        return found

    def new_operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1].strip())
        if text[0] == "!":
            return Not(self.register(text[1:].strip()))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        number = _number(text)
        if number is not None:
            return number
        register = self.find_register(text)
        if register is not None:
            return register
        if text[0] == "%":
            return Special(text)
        variable = self.entry.module_variables.get(text)
        if variable is not None:
            self.body.variables.setdefault(text, variable)
        return Symbol(text)

    def address(self, text: str) -> Address | Vector:
        if "," in text:  # of a tensor map
            return Vector(tuple(self.operand(part) for part in _split(text)))
        found = re.match(r"(.+?)\s*(?:([+-])\s*(-?\w+))?$", text)
        base = self.operand(found[1])
        offset = int(found[3], 0) if found[3] else 0
        return Address(base, -offset if found[2] == "-" else offset)


def _number(text: str) -> Immediate | None:
    if text[:2] in ("0f", "0F") and len(text) == 10:
        return Immediate(int(text[2:], 16), 4)
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return Immediate(int(text[2:], 16), 8)
    digits = text[1:] if text[0] == "-" else text
    if not digits[:1].isdigit():
        return None
    digits = digits.rstrip("U")
    if re.match(r"\d+(\.\d*)?([eE][+-]?\d+)?$", digits) and not digits.isdigit():
        return Immediate(float(text))
    value = int(digits, 8) if re.match(r"0[0-7]+$", digits) else int(digits, 0)
    return Immediate(-value if text[0] == "-" else value)


def _split(text: str) -> list[str]:
    """Operands: at commas outside of braces and brackets."""
    if not text.strip():
        return []
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")]
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]
