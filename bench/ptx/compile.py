"""A kernel as Python: every basic block becomes one function over the registers of all threads.

Registers are arrays [1 or blocks, 1 or threads]. A block's function keeps what it computes in local variables and
gives back what is read behind it, where only some threads have come there beside what the others have. Types of
registers are chosen for the whole kernel, as most of their uses read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import Uninitialized, UnknownOpcode
from .flow import Flow, Step, registers_of
from .parse import Address, Entry, Immediate, Instruction, Not, Operand, Register, Sink, Special, Symbol
from .wave import SPECIALS


class Code:
    """A kernel that can be run: its blocks' functions are made when they are first wanted."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.flow = Flow(entry)
        self.functions: dict[int, Callable[..., Any]] = {}

    def function(self, number: int) -> Callable[..., Any]:
        """Of a block: (wave, registers, which are defined, mask of registers, who is active) -> its end's predicate."""
        if number not in self.functions:
            self.functions[number] = _Writer(self.flow, number).function()
        return self.functions[number]


def guarded(active: np.ndarray | None, guard: np.ndarray) -> np.ndarray:
    """Who takes part in a guarded instruction."""
    return guard if active is None else active & guard


def merged(mask: np.ndarray, new: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """A register where only some threads have got a new value."""
    return new if old is None else np.where(mask, new, old)


def remembered(active: np.ndarray | None, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Which threads have written a register."""
    return new if active is None else np.where(active, new, old)


def check_defined(wave: Any, site: Instruction, active: np.ndarray | None, defined: np.ndarray, name: str) -> None:
    bad = ~defined if active is None else active & ~defined
    if bad.any():
        raise Uninitialized(f"register {name} was never written; {wave.place(site, wave.first(bad))}")


class _Writer:
    """Writes the Python of one block."""

    def __init__(self, flow: Flow, number: int) -> None:
        self.flow, self.number = flow, number
        self.block = flow.blocks[number]
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"where": np.where, "guarded": guarded, "merged": merged, "defined": check_defined}
        self.names |= {"TRUE": np.ones((1, 1), bool), "U4": np.dtype("u4"), "remembered": remembered}
        self.local: dict[int, str] = {}  # register -> variable that has its value
        self.views: dict[tuple[str, str], str] = {}
        self.changed: dict[int, None] = {}
        self.constants: dict[Any, str] = {}
        self.count = itertools.count()

    def function(self) -> Callable[..., Any]:
        result = "None"
        for step in self.flow.steps[self.number]:
            self.step(step)
        last = self.block.last
        if last is not None and last.guard is not None:
            result = self.guard(last)
        self.write_back()
        source = "\n ".join(["def block(W, R, D, m, a):", *self.lines, f"return {result}"])
        exec(compile(source, f"<{self.flow.entry.name}, block {self.number}>", "exec"), self.names)
        return self.names["block"]

    def name(self, value: Any, prefix: str) -> str:
        """A global name for a value."""
        key = (prefix, id(value))
        if key not in self.constants:
            self.constants[key] = f"{prefix}{next(self.count)}"
            self.names[self.constants[key]] = value
        return self.constants[key]

    def variable(self) -> str:
        return f"v{next(self.count)}"

    def value(self, register: Register) -> str:
        """The variable that holds a register."""
        found = self.local.get(register.index)
        if found is None:
            found = self.local[register.index] = f"r{register.index}"
            self.lines.append(f"{found} = R[{register.index}]")
            if register.index in self.flow.doubtful:
                self.lines.append(
                    f"if {found} is None: {found} = {self.constant(0, self.flow.storage[register.index])}"
                )
        return found

    def read(self, operand: Operand, code: str, site: Instruction) -> str:
        """An expression of the operand's value in a type."""
        if isinstance(operand, Address):
            operand = operand.base
        if isinstance(operand, Not):
            return f"~{self.read(operand.of, code, site)}"
        if isinstance(operand, Immediate):
            return self.constant(operand, code)
        if isinstance(operand, Symbol):
            return self.constant(self.address(operand, site), code)
        if isinstance(operand, Special):
            if operand.name not in SPECIALS:
                raise UnknownOpcode(f"bench.ptx: register {operand.name} is not known, {site}")
            variable = self.variable()
            self.lines.append(f"{variable} = W.specials[{operand.name!r}]")
            return self.converted(variable, "u4", code)
        if not isinstance(operand, Register):
            raise UnknownOpcode(f"bench.ptx: operand of {site.opcode} is not known, {site}")
        variable = self.value(operand)
        return self.converted(variable, self.flow.storage[operand.index], code)

    def converted(self, variable: str, have: str, want: str) -> str:
        """As another type: other names for the same bits, or the low ones of them."""
        if want[0] == "b" or have == want:
            return variable
        if have == "?" or want == "?":
            raise UnknownOpcode(f"bench.ptx: a predicate cannot be read as {want}, nor {have} as a predicate")
        key = variable, want
        if key not in self.views:
            size_have, size_want = int(have[1:]), int(want[1:])
            if size_have > size_want:
                text = f"{variable}.view('u{size_have}').astype('u{size_want}')"
                text += f".view({want!r})" if want[0] != "u" else ""
            elif size_have == size_want:
                text = f"{variable}.view({want!r})"
            else:
                text = f"{variable}.view('u{size_have}').astype('u{size_want}').view({want!r})"
            self.views[key] = self.variable()
            self.lines.append(f"{self.views[key]} = {text}")
        return self.views[key]

    def constant(self, value: Immediate | int, code: str) -> str:
        key = value, code
        if key not in self.constants:
            self.constants[key] = f"k{next(self.count)}"
            self.names[self.constants[key]] = constant(value, code)
        return self.constants[key]

    def address(self, symbol: Symbol, site: Instruction) -> int:
        entry = self.flow.entry
        for offsets in (entry.shared, entry.local, {p.name: p.offset for p in entry.parameters}):
            if symbol.name in offsets:
                return offsets[symbol.name]
        raise UnknownOpcode(f"bench.ptx: symbol {symbol.name} is not known, {site}")

    def guard(self, instruction: Instruction) -> str:
        guard = instruction.guard
        self.check([guard], instruction, "a")
        return self.read(guard, "?", instruction)

    def check(self, operands: list[Operand], site: Instruction, active: str) -> None:
        """Has registers of which it is not sure be looked at, whether they were written."""
        for register in dict.fromkeys(registers_of(operands)):
            if register.index in self.flow.doubtful:
                self.lines.append(
                    f"defined(W, {self.name(site, 's')}, {active}, D[{register.index}], {register.name!r})"
                )

    def step(self, step: Step) -> None:
        operation, site = step.operation, step.instruction
        active, guard = "a", None
        if site.guard is not None:
            guard = self.variable()
            self.lines.append(f"{guard} = {self.guard(site)}")
            if operation.effect or self.flow.doubtful:
                active = self.variable()
                self.lines.append(f"{active} = guarded(a, {guard})")
        # What bits of any type are read as.
        raw = next((self.flow.storage[r.index] for r in step.written()), "u4")[0]
        codes = [f"{raw}{code[1:]}" if code[0] == "b" else code for code in operation.operands]
        operands = [self.read(operand, code, site) for operand, code in zip(step.operands, codes, strict=True)]
        if operation.effect:
            self.check(step.operands[operation.spreads == "first" :], site, active)
        call = f"{self.name(operation.function, 'f')}("
        if operation.effect:
            call += f"W, {self.name(site, 's')}, {active}, "
        if not step.results:
            self.lines.append(f"{call}{', '.join(operands)})")
            return
        variables = [self.variable() for _ in step.results]
        self.lines.append(f"{', '.join(variables)} = {call}{', '.join(operands)})")
        defined = None
        if any(register.index in self.flow.doubtful for register in step.written()):
            defined = self.defined(step, operands, call)
        for result, variable, code in zip(step.results, variables, operation.results, strict=True):
            if isinstance(result, Sink):
                continue
            if not isinstance(result, Register):
                raise UnknownOpcode(f"bench.ptx: result of {site.opcode} is not known, {site}")
            self.assign(result, variable, f"{raw}{code[1:]}" if code[0] == "b" else code, guard)
            if result.index in self.flow.doubtful:
                self.lines.append(f"D[{result.index}] = remembered({active}, {defined}, D[{result.index}])")

    def defined(self, step: Step, operands: list[str], call: str) -> str:
        """A variable that says for which threads an operation's results count as written."""
        if step.operation.effect and not step.operation.spreads:
            return "TRUE"
        known = [
            next((f"D[{r.index}]" for r in registers_of([operand]) if r.index in self.flow.doubtful), "TRUE")
            for operand in step.operands
        ]
        if set(known) == {"TRUE"} or not known:
            return "TRUE"
        if step.operation.spreads == "first":
            text = f"{call}{', '.join([f'{known[0]}.astype(U4)', *operands[1:]])})"
            text = f"{text}[0] != 0" if len(step.results) > 1 else f"{text} != 0"
        elif step.operation.spreads == "select":
            text = f"where({operands[2]}, {known[0]}, {known[1]}) & {known[2]}"
        else:
            text = " & ".join(sorted(set(known) - {"TRUE"}))
        variable = self.variable()
        self.lines.append(f"{variable} = {text}")
        return variable

    def assign(self, register: Register, variable: str, code: str, guard: str | None) -> None:
        index, have = register.index, self.flow.storage[register.index]
        if code != have:
            if code[0] == "i" and int(code[1:]) < int(have[1:]):  # the sign fills what is above
                text = f"{variable}.astype('i{have[1:]}').view({have!r})"
            else:
                text = self.converted(variable, code, have)
            if text != variable:
                variable = self.variable()
                self.lines.append(f"{variable} = {text}")
        if guard is not None:
            old = self.local.get(index)
            new = self.variable()
            self.lines.append(f"{new} = merged({guard}, {variable}, {old or f'R[{index}]'})")
            variable = new
        self.local[index] = variable
        self.changed[index] = None

    def write_back(self) -> None:
        live = [index for index in self.changed if self.flow.live_out[self.number] >> index & 1]
        if not live:
            return
        self.lines.append("if m is None:")
        self.lines += [f"    R[{index}] = {self.local[index]}" for index in live]
        self.lines.append("else:")
        self.lines += [f"    R[{index}] = merged(m, {self.local[index]}, R[{index}])" for index in live]


def constant(value: Immediate | int, code: str) -> np.ndarray:
    """A number in a type, [1, 1]."""
    if isinstance(value, int):
        value = Immediate(value)
    if code == "?":
        return np.full((1, 1), bool(value.value))
    size = int(code[1:])
    if value.float_bytes:
        bits = np.array([[value.value]], f"u{value.float_bytes}").view(f"f{value.float_bytes}")
        return (bits if value.float_bytes == size else bits.astype(f"f{size}")).view(code)
    if isinstance(value.value, float):
        return np.array([[value.value]], f"f{size}").view(code)
    if code[0] == "f" and value.value not in (0,):
        # An integer where a float is meant is its bits, as inline assembly writes them.
        return np.array([[value.value % 2 ** (8 * size)]], f"u{size}").view(code)
    return np.array([[value.value % 2 ** (8 * size)]], f"u{size}").view(code)
