"""Rectangles of images at a place of each image's own, and their transpose: copies, each a gather in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers that a program owns
LONGEST = 1024  # of them in one row
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what numbers of so many bytes are copied as


@triton.jit
def _cut_kernel(
    x_ptr,
    first_ptr,
    y_ptr,
    groups,
    rows,
    length,
    whole_rows,
    whole_length,
    stride_b,
    stride_g,
    stride_h,
    pixel,
    UNIT: tl.constexpr,
    PASTE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """y[b, g, i, k] = x[b, g, row + i, column pixel + k] with (row, column) = first[b], or if PASTE the opposite shift;
    what lies outside of x is 0.

    x is whole_rows rows of whole_length numbers in each group, y is dense, of rows and length. One program owns BLOCK_H
    rows of one group, BLOCK_L numbers of each. Lengths and strides are in UNITs, of which all offsets are multiples
    that the compiler sees: vectors are copied at once.
    """
    tiles_l = tl.cdiv(length * UNIT, BLOCK_L)
    tiles_h = tl.cdiv(rows, BLOCK_H)
    program = tl.program_id(0)
    tile_l = program % tiles_l
    program = program // tiles_l
    i = (program % tiles_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    plane = program // tiles_h
    image = (plane // groups).to(tl.int64)
    k = tile_l * BLOCK_L + tl.arange(0, BLOCK_L)
    row = tl.load(first_ptr + image * 2).to(tl.int64)
    column = tl.load(first_ptr + image * 2 + 1).to(tl.int64) * pixel
    if PASTE:
        row, column = -row, -column
    source = row + i
    start = column * UNIT
    inside_h = (i < rows) & (source >= 0) & (source < whole_rows)
    inside_l = (k < length * UNIT) & (k >= -start) & (k < whole_length * UNIT - start)
    group = image * stride_b + (plane % groups).to(tl.int64) * stride_g
    x_ptr += (group + column) * UNIT
    offset = (source * stride_h * UNIT)[:, None] + k[None, :]
    values = tl.load(x_ptr + offset, mask=inside_h[:, None] & inside_l[None, :], other=0)
    y_ptr += plane.to(tl.int64) * rows * length * UNIT
    offset = (i.to(tl.int64) * length * UNIT)[:, None] + k[None, :]
    tl.store(y_ptr + offset, values, mask=(i < rows)[:, None] & (k < length * UNIT)[None, :])


def is_last(x: Tensor) -> bool:
    """Whether pixels of x [B, C, H, W] are copied with all their channels: channels_last, and not both layouts."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1


def readable(x: Tensor) -> Tensor:
    """x [B, C, H, W] as the kernel reads it: rows without gaps, of pixels or, if `is_last`, of pixels' channels."""
    if x.stride(3) == 1 or (x.stride(1) == 1 and x.stride(3) == x.shape[1]):
        return x
    return x.contiguous(memory_format=torch.channels_last if is_last(x) else torch.contiguous_format)


def _launch(x: Tensor, first: Tensor, size: tuple[int, int], paste: bool) -> Tensor:
    x, first = readable(x), first.contiguous()
    batch, channels, whole_height, whole_width = x.shape
    (height, width), last = size, is_last(x)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(batch, channels, height, width, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    groups, pixel = (1, channels) if last else (channels, 1)
    stride_b, stride_g, stride_h = x.stride(0), 0 if last else x.stride(1), x.stride(2)
    unit = 8 if pixel % 8 == stride_b % 8 == stride_h % 8 == 0 else 1
    block_l = min(triton.next_power_of_2(width * pixel), LONGEST)
    block_h = min(triton.next_power_of_2(height), TILE // block_l)
    programs = batch * groups * triton.cdiv(height, block_h) * triton.cdiv(width * pixel, block_l)
    word = WORDS[x.element_size()]
    with torch.cuda.device_of(x):
        _cut_kernel[(programs,)](
            x.view(word),
            first,
            y.view(word),
            groups,
            height,
            width * pixel // unit,
            whole_height,
            whole_width * pixel // unit,
            stride_b // unit,
            stride_g // unit,
            stride_h // unit,
            pixel // unit,
            UNIT=unit,
            PASTE=paste,
            BLOCK_H=block_h,
            BLOCK_L=block_l,
            num_warps=4,
        )
    return y


def cut(x: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    """x [B, C, H, W] of 1, 2, 4 or 8 bytes a number, first [B, 2] integers -> y [B, C, *size], in the layout of x.

    y[b, c, i, j] = x[b, c, first[b, 0] + i, first[b, 1] + j], and 0 where that is outside of x.
    """
    return _launch(x, first, size, False)


def paste(y: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of `cut`: y [B, C, h, w] in its places of images [B, C, *size] of zeros, in the layout of y."""
    return _launch(y, first, size, True)
