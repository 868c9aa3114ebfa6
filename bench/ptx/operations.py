"""What opcodes mean: a table that the modules of instructions fill, and how an opcode's text is taken apart.

Values are numpy arrays with an axis of blocks and one of threads, either of which may have length 1 where all have the
same: [1 or blocks, 1 or threads]. Types are numpy's codes ("u4", "f4", "?"), or "b1" ... "b8" for bits of any type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import UnknownOpcode
from .parse import SIZES, Instruction

# PTX's types as numpy's. bf16, and what is packed in pairs, are bits to numpy.
CODES = {f"{kind}{bits}": f"{kind}{bits // 8}" for kind in "bu" for bits in (8, 16, 32, 64)}
CODES |= {f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)}
CODES |= {"f16": "f2", "bf16": "u2", "f32": "f4", "f64": "f8", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4", "pred": "?"}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")


@dataclass(frozen=True)
class Opcode:
    """`cvt.rn.f16x2.f32` is base cvt, words rn, types f16x2 and f32."""

    text: str
    base: str
    words: tuple[str, ...]
    types: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Opcode:
        base, *rest = text.split(".")
        types = tuple(part for part in rest if part in SIZES)
        return cls(text, base, tuple(part for part in rest if part not in SIZES), types)

    @property
    def type(self) -> str:
        return self.types[0] if self.types else ""

    def one_of(self, *words: str, default: str = "") -> str:
        """The word among these that the opcode has."""
        return next((word for word in self.words if word in words), default)

    def __contains__(self, word: str) -> bool:
        return word in self.words


@dataclass(frozen=True)
class Operation:
    """A function of arrays, and the types of its results and operands.

    Where `effect`, it is called with the wave, the instruction's site and the threads that take part before the
    operands: it reaches memory, or other threads. Where `accumulates`, what the results' registers hold are its first
    operands.

    An operand that was never written makes a result that counts as never written; an effect must have none, unless it
    `spreads` them: "select" takes the one that its third operand says, "first" treats its first as it treats the value.
    """

    function: Callable[..., Any]
    results: tuple[str, ...]
    operands: tuple[str, ...]
    effect: bool = False
    accumulates: bool = False
    spreads: str = ""


Maker = Callable[[Opcode, Instruction], Operation | None]
_TABLE: dict[tuple[str, str], tuple[frozenset[str], Maker]] = {}


def operation(bases: str, words: str = "", types: tuple[str, ...] = ("",)) -> Callable[[Maker], Maker]:
    """Enters a function that makes operations of opcodes, by the opcode's base and its first type ("": any).

    `words` are all that it knows besides; it gives None for a form that it does not know.
    """

    def enter(maker: Maker) -> Maker:
        for base in bases.split():
            for kind in types:
                _TABLE[base, kind] = frozenset(words.split()), maker
        return maker

    return enter


def find(instruction: Instruction) -> Operation:
    """The operation of an instruction.

    Raises:
        UnknownOpcode: There is none.
    """
    opcode = Opcode.of(instruction.opcode)
    words, maker = _TABLE.get((opcode.base, opcode.type)) or _TABLE.get((opcode.base, ""), (frozenset(), None))
    found = maker(opcode, instruction) if maker and words.issuperset(opcode.words) else None
    if found is None:
        raise UnknownOpcode(f"bench.ptx: opcode {opcode.text} is not known, {instruction}")
    return found


def pure(function: Callable[..., Any], result: str, *operands: str) -> Operation:
    """One result, no effect."""
    return Operation(function, (result,), operands)


def bits(size: int) -> np.dtype:
    """Unsigned integers of so many bytes."""
    return np.dtype(f"u{size}")
