"""What this GPU does at best, measured in the same run: copies, gathers from L2, atomic adds, matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..timing import Spread, gpu_times
from .parity import arithmetic

COPY_BYTES = 2**30
TABLE_ROWS, ROW = 2**17, 32  # 16 MiB of 128-byte rows, half of an L2 at most: one plane of 512 x 512 has 32
TILE = 64  # rows that one program takes at once
TILES = 16  # how often
PROGRAMS = 2**13
PRODUCT = 8192


def measure(tiny: bool = False) -> dict[str, float]:
    """Ceilings in bytes, additions or operations per second.

    Returns:
        copy_bytes: Device to device, read and written bytes both counted.
        gather_bytes: Random 128-byte rows of a table that stays in L2.
        atomics_scalar, atomics_vector: fp32 additions to such rows, each by itself, and up to four in one instruction
            where the GPU has that.
        fp32_flops, tf32_flops, fp16_flops: Square matrix products.
    """
    side, copied = (512, 2**22) if tiny else (PRODUCT, COPY_BYTES)
    source = torch.empty(copied, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"copy_bytes": 2 * copied / _seconds(lambda: target.copy_(source))}
    found |= _l2(PROGRAMS // 64 if tiny else PROGRAMS)
    for dtype in ("fp32", "tf32", "fp16"):
        kind = torch.float16 if dtype == "fp16" else torch.float32
        a, b = (torch.randn(side, side, device="cuda").to(kind) for _ in range(2))
        with arithmetic(dtype):
            found[f"{dtype}_flops"] = 2 * side**3 / _seconds(lambda a=a, b=b: a @ b)
    return found


def _seconds(function: Callable[[], Any]) -> float:
    return Spread.of(gpu_times(function, cold=False)).median / 1000


def _l2(programs: int) -> dict[str, float]:
    """The three ceilings of tri-plane kernels; nothing without Triton."""
    try:
        from . import l2_kernels as kernels
    except ImportError:
        return {}
    table = torch.randn(TABLE_ROWS, ROW, device="cuda")
    rows = torch.randint(TABLE_ROWS, (programs * TILES * TILE,), device="cuda", dtype=torch.int32)
    columns = torch.arange(ROW, device="cuda", dtype=torch.int32)
    out = torch.empty(programs, ROW, device="cuda")
    grid, numbers = (programs,), programs * TILES * TILE * ROW
    size = {"ROW": ROW, "TILE": TILE, "TILES": TILES, "num_warps": 8}
    return {
        "gather_bytes": 4 * numbers / _seconds(lambda: kernels.gather_kernel[grid](table, rows, out, **size)),
        "atomics_scalar": numbers
        / _seconds(lambda: kernels.add_kernel[grid](table, rows, columns, VECTOR=False, **size)),
        "atomics_vector": numbers
        / _seconds(lambda: kernels.add_kernel[grid](table, rows, columns, VECTOR=True, **size)),
    }
