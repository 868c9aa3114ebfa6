"""What a multiprocessor has, and how much of it a kernel fills; the tool that reads machine code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ARCHS = (70, 80, 90)
SHARED_LIMIT = {70: 96, 80: 163, 90: 227, 100: 227}  # KiB of shared memory that one block can have
SHARED_PER_SM = {70: 96, 80: 164, 90: 228, 100: 228}
REGISTERS_PER_SM, WARPS_PER_SM, BLOCKS_PER_SM = 65536, 64, 32

Row = dict[str, Any]


def cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def occupancy(registers: int, shared: int, warps: int, arch: int) -> float:
    """Warps on a multiprocessor over those that fit at best."""
    registers = 8 * -(-registers // 8)  # of a thread, as the hardware hands them out
    blocks = min(WARPS_PER_SM // warps, REGISTERS_PER_SM // (32 * warps * registers), BLOCKS_PER_SM)
    if shared:
        blocks = min(blocks, SHARED_PER_SM[arch] * 1024 // (shared + 1024))
    return blocks * warps / WARPS_PER_SM
