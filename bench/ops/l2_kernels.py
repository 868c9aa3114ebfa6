"""The simplest kernels that read or add random rows of a table, for `ceilings`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(table_ptr, rows_ptr, out_ptr, ROW: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """out[program] = sum of TILES * TILE rows of the table; a program owns one row of out."""
    program = tl.program_id(0)
    column = tl.arange(0, ROW)
    total = tl.zeros([TILE, ROW], tl.float32)
    for i in range(TILES):
        row = tl.load(rows_ptr + (program * TILES + i) * TILE + tl.arange(0, TILE))
        total += tl.load(table_ptr + row[:, None] * ROW + column[None, :])
    tl.store(out_ptr + program * ROW + column, tl.sum(total, axis=0))


@triton.jit
def add_kernel(
    table_ptr,
    rows_ptr,
    columns_ptr,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """table[row] += 1 for TILES * TILE rows; columns that are read from memory cannot be joined into vectors."""
    program = tl.program_id(0)
    column = tl.arange(0, ROW) if VECTOR else tl.load(columns_ptr + tl.arange(0, ROW))
    ones = tl.full([TILE, ROW], 1.0, tl.float32)
    for i in range(TILES):
        row = tl.load(rows_ptr + (program * TILES + i) * TILE + tl.arange(0, TILE))
        tl.atomic_add(table_ptr + row[:, None] * ROW + column[None, :], ones, sem="relaxed")
