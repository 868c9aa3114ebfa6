"""ld and st."""

from __future__ import annotations

import numpy as np

from .operations import CODES, Opcode, Operation, operation
from .parse import SIZES, Address, Instruction
from .wave import Wave

_SPACES = ("global", "shared", "local", "param", "const")
# How long, how near, and in which order: nothing that a value depends on, where nobody else writes.
_HINTS = "volatile relaxed acquire release weak gpu cta sys cluster nc ca cg cs lu cv wb wt v2 v4 L1 L2"
_HINTS += " L1::evict_last L1::evict_first L1::no_allocate L1::evict_normal L2::128B L2::256B L2::64B shared::cta"


def offset_of(address: object) -> int:
    return address.offset if isinstance(address, Address) else 0


def address_code(instruction: Instruction, position: int, space: str) -> str:
    """The type to read an address as."""
    return "u8" if space == "global" else "u4"


@operation("ld", f"{' '.join(_SPACES)} {_HINTS}")
def _load(opcode: Opcode, instruction: Instruction) -> Operation | None:
    space = opcode.one_of(*_SPACES) or ("shared" if "shared::cta" in opcode else "")
    if space not in ("global", "shared", "local", "param"):
        return None
    count = int(opcode.one_of("v2", "v4", default="v1")[1])
    size, code = SIZES[opcode.type], CODES[opcode.type].replace("b", "u")
    offset = offset_of(instruction.operands[1])

    def load(wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray) -> object:
        values = wave.spaces[space].load(wave, site, active, address, offset, size, count)
        if code[0] == "i":
            values = tuple(value.view(code) for value in values)
        return values if count > 1 else values[0]

    return Operation(
        load, (code if code[0] == "i" else f"u{size}",) * count, (address_code(instruction, 1, space),), True
    )


@operation("st", f"{' '.join(_SPACES)} {_HINTS}")
def _store(opcode: Opcode, instruction: Instruction) -> Operation | None:
    space = opcode.one_of(*_SPACES) or ("shared" if "shared::cta" in opcode else "")
    if space not in ("global", "shared", "local"):
        return None
    count = int(opcode.one_of("v2", "v4", default="v1")[1])
    size = SIZES[opcode.type]
    offset = offset_of(instruction.operands[0])

    def store(
        wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, *values: np.ndarray
    ) -> None:
        wave.spaces[space].store(wave, site, active, address, offset, values)

    return Operation(store, (), (address_code(instruction, 0, space), *[f"u{size}"] * count), True)
