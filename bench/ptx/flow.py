"""A kernel's control flow, and what is known of its registers before it runs: their types, which of them are read
behind a block, and which may be read before they are written."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import atomics, conversions, copies, floating, halves, integer, loads, tensor_cores, warp, warpgroup  # noqa: F401 - they fill the table of operations
from .faults import UnknownOpcode
from .operations import CODES, Operation, find
from .parse import Address, Entry, Immediate, Instruction, Not, Operand, Pair, Register, Symbol, Vector

BARRIERS = ("bar", "barrier")


@dataclass(slots=True)
class Block:
    """Instructions that are entered at the first and left at the last.

    Attributes:
        end: jump, branch, exit or barrier.
        next: The block behind; of a branch that is not taken.
        target: Of a jump or branch.
        predicate: Of a branch or a guarded exit, as the function gives it back.
    """

    first: int
    body: list[Instruction] = field(default_factory=list)
    end: str = "jump"
    next: int = -1
    target: int = -1
    last: Instruction | None = None
    opcodes: Counter[str] = field(default_factory=Counter)

    @property
    def successors(self) -> tuple[int, ...]:
        found = {"jump": (self.target,), "branch": (self.target, self.next), "barrier": (self.next,)}
        if self.end == "exit":
            return (self.next,) if self.last is not None and self.last.guard else ()
        return found[self.end]


def blocks_of(entry: Entry) -> list[Block]:
    """The control flow graph; block 0 is the entry."""
    body = entry.body
    leaders = {0}
    for i, instruction in enumerate(body.instructions):
        if _end_of(instruction):
            leaders.add(i + 1)
        if instruction.opcode.split(".")[0] == "bra":
            leaders.add(body.labels[_target(instruction)])
    leaders = sorted(place for place in leaders if place < len(body.instructions))
    number = {place: i for i, place in enumerate(leaders)}
    blocks = []
    for i, place in enumerate(leaders):
        stop = leaders[i + 1] if i + 1 < len(leaders) else len(body.instructions)
        block = Block(place, body.instructions[place:stop], next=i + 1, target=i + 1)
        last = block.body[-1]
        block.opcodes.update(instruction.opcode for instruction in block.body)
        end = _end_of(last)
        if end:
            block.end, block.last = end, block.body.pop()
            if end == "jump" or end == "branch":
                block.target = number[body.labels[_target(last)]]
        elif i + 1 == len(leaders):
            block.end = "exit"
        blocks.append(block)
    return blocks


def _end_of(instruction: Instruction) -> str:
    base = instruction.opcode.split(".")[0]
    if base == "bra":
        return "branch" if instruction.guard else "jump"
    if base in ("ret", "exit"):
        return "exit"
    if base in BARRIERS and ".warp." not in instruction.opcode:
        return "barrier"
    return ""


def _target(instruction: Instruction) -> str:
    return instruction.operands[0].name


def flatten(operand: Operand) -> Iterator[Operand]:
    """The single values of an operand."""
    if isinstance(operand, Vector):
        for part in operand.of:
            yield from flatten(part)
    elif isinstance(operand, Pair):
        yield from flatten(operand.first)
        yield from flatten(operand.second)
    else:
        yield operand


@dataclass(slots=True)
class Step:
    """An instruction with its meaning: what it writes and reads, value by value."""

    instruction: Instruction
    operation: Operation
    results: list[Operand]
    operands: list[Operand]

    @classmethod
    def of(cls, instruction: Instruction) -> Step:
        operation = find(instruction)
        given = list(instruction.operands)
        results = list(flatten(given.pop(0))) if operation.results else []
        operands = [part for operand in given for part in flatten(operand)]
        if operation.accumulates:
            operands = results + operands
        if len(results) != len(operation.results) or len(operands) < len(operation.operands):
            raise UnknownOpcode(f"bench.ptx: operands of {instruction.opcode} are not known, {instruction}")
        return cls(instruction, operation, results, operands[: len(operation.operands)])

    @property
    def guard(self) -> Register | None:
        guard = self.instruction.guard
        return guard.of if isinstance(guard, Not) else guard

    def written(self) -> Iterator[Register]:
        for result in self.results:
            if isinstance(result, Register):
                yield result

    def read(self) -> Iterator[Register]:
        yield from registers_of(self.operands)
        if self.guard is not None:
            yield self.guard


def registers_of(operands: list[Operand]) -> Iterator[Register]:
    for operand in operands:
        if isinstance(operand, Address):
            operand = operand.base
        if isinstance(operand, Not):
            operand = operand.of
        if isinstance(operand, Register):
            yield operand


class Flow:
    """What is known of a kernel.

    Attributes:
        blocks: Its basic blocks; the first is where it starts.
        steps: Of every block, without its end.
        storage: numpy's type of every register.
        live_out: Registers (bits) that are read behind each block.
        doubtful: Registers that some way through the kernel reads before it wrote them.
        grain: Bytes of the smallest access to shared memory, at most 4: how finely races are told apart.
        fences: Whether blocks may order themselves.
        written_through: Where in the parameters pointers lie that the kernel may write through; None: through any.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.blocks = blocks_of(entry)
        self.steps = [[Step.of(instruction) for instruction in block.body] for block in self.blocks]
        self.storage = self._storage()
        self.live_out = self._live_out()
        self.doubtful = self._doubtful()
        self.grain = self._grain()
        self.written_through = _written_through(self)
        warpgroup.check_registers(self)
        self.fences = any(_orders_blocks(step.instruction.opcode) for step in itertools.chain.from_iterable(self.steps))

    def _storage(self) -> list[str]:
        votes = [[0, 0] for _ in self.entry.body.registers]
        for step in itertools.chain.from_iterable(self.steps):
            pairs = itertools.chain(
                zip(step.results, step.operation.results, strict=True),
                zip(step.operands, step.operation.operands, strict=True),
            )
            for operand, code in pairs:
                if isinstance(operand, Register) and code[0] != "b":
                    votes[operand.index][code[0] == "f"] += 1
        found = []
        for register, (whole, floating_point) in zip(self.entry.body.registers, votes, strict=True):
            code = CODES[register.type]
            if code != "?":
                code = f"{'f' if floating_point > whole else 'u'}{code[1:]}"
            found.append(code if code != "f1" else "u1")
        return found

    def _live_out(self) -> list[int]:
        uses, defines = [], []
        for block, steps in zip(self.blocks, self.steps, strict=True):
            used = defined = 0
            for step in steps:
                for register in step.read():
                    used |= 1 << register.index & ~defined
                for register in step.written():
                    if step.guard is None:
                        defined |= 1 << register.index
                    else:
                        used |= 1 << register.index & ~defined
            for register in ending_registers(block):
                used |= 1 << register.index & ~defined
            uses.append(used)
            defines.append(defined)
        live_in = list(uses)
        live_out = [0] * len(self.blocks)
        changed = True
        while changed:
            changed = False
            for i in reversed(range(len(self.blocks))):
                out = 0
                for successor in self.blocks[i].successors:
                    out |= live_in[successor]
                live_out[i] = out
                new = uses[i] | out & ~defines[i]
                if new != live_in[i]:
                    live_in[i], changed = new, True
        return live_out

    def _doubtful(self) -> set[int]:
        everything = (1 << len(self.entry.body.registers)) - 1
        assigned_in = [everything] * len(self.blocks)
        assigned_in[0] = 0
        pending, visited = [0], set()
        while pending:
            i = pending.pop()
            visited.add(i)
            assigned = assigned_in[i]
            for step in self.steps[i]:
                if step.guard is None:
                    for register in step.written():
                        assigned |= 1 << register.index
            for successor in self.blocks[i].successors:
                new = assigned_in[successor] & assigned
                if new != assigned_in[successor] or successor not in visited:
                    assigned_in[successor] = new
                    pending.append(successor)
        found: set[int] = set()
        for i, steps in enumerate(self.steps):
            assigned = assigned_in[i]
            for step in steps:
                found |= {r.index for r in step.read() if not assigned >> r.index & 1}
                if step.guard is None:
                    for register in step.written():
                        assigned |= 1 << register.index
            found |= {r.index for r in ending_registers(self.blocks[i]) if not assigned >> r.index & 1}
        return self._spread(found)

    def _spread(self, doubtful: set[int]) -> set[int]:
        """With what is made of them."""
        changed = True
        while changed:
            changed = False
            for step in itertools.chain.from_iterable(self.steps):
                if step.operation.effect and not step.operation.spreads:
                    continue
                results = {r.index for r in step.written()}
                if not results <= doubtful and any(r.index in doubtful for r in registers_of(step.operands)):
                    doubtful |= results
                    changed = True
        return doubtful

    def _grain(self) -> int:
        sizes = [4]
        for step in itertools.chain.from_iterable(self.steps):
            opcode = step.instruction.opcode
            if ".shared" in opcode and opcode.startswith(("ld.", "st.")):
                sizes += [int(code[1:]) for code in (*step.operation.results, *step.operation.operands[1:])]
        return min(sizes)


def _written_through(flow: Flow) -> frozenset[int] | None:
    """Follows every 64-bit parameter through all arithmetic to the addresses of stores and atomics."""
    offsets = {p.name: p.offset for p in flow.entry.parameters}
    steps = list(itertools.chain.from_iterable(flow.steps))
    places: dict[int, int | None] = {}  # registers that hold a place in the parameters
    for step in steps:
        for register in step.written():
            places[register.index] = None if register.index in places else _place(step, offsets, places)
    origin: dict[int, frozenset[int | None]] = {}  # register -> the parameters that it may come from

    def sources(step: Step) -> frozenset[int | None]:
        opcode = step.instruction.opcode
        if opcode.startswith("ld.param"):
            place = step.operands[0]
            start = offsets.get(place.base.name) if isinstance(place.base, Symbol) else places.get(place.base.index)
            if start is None:
                return frozenset([None])
            return frozenset(start + place.offset + 8 * i for i in range(len(step.results)))
        if step.operation.effect and not step.operation.spreads:
            wide = any(code[1:] == "8" for code in step.operation.results)
            return frozenset([None]) if wide else frozenset()  # a pointer may have been stored
        return frozenset().union(*(origin.get(r.index, frozenset()) for r in registers_of(step.operands)))

    changed = True
    while changed:
        changed = False
        for step in steps:
            new = sources(step)
            for register in step.written():
                old = origin.get(register.index, frozenset())
                if not new <= old:
                    origin[register.index] = old | new
                    changed = True
    found: set[int | None] = set()
    for step in steps:
        base_name, *words = step.instruction.opcode.split(".")
        if base_name in ("st", "atom", "red") and "global" in words:
            for register in registers_of(step.operands[:1]):
                found |= origin.get(register.index, frozenset())
    return None if None in found else frozenset(found)


def _place(step: Step, offsets: dict[str, int], places: dict[int, int | None]) -> int | None:
    """The place in the parameters that an instruction gives, by name or a number of bytes behind another."""
    base = step.instruction.opcode.split(".")[0]
    if base == "mov" and isinstance(step.operands[0], Symbol):
        return offsets.get(step.operands[0].name)
    if base == "add" and isinstance(step.operands[0], Register) and isinstance(step.operands[1], Immediate):
        start = places.get(step.operands[0].index)
        return None if start is None else start + step.operands[1].value
    return None


def _orders_blocks(opcode: str) -> bool:
    base, *words = opcode.split(".")
    ordered = bool({"acq_rel", "acquire", "release"} & set(words))
    return base in ("membar", "fence") or (base in ("atom", "red") and ordered)


def ending_registers(block: Block) -> list[Register]:
    """What a block's end reads."""
    if block.last is None:
        return []
    found = list(registers_of(list(block.last.operands)))
    guard = block.last.guard
    if guard is not None:
        found.append(guard.of if isinstance(guard, Not) else guard)
    return found
