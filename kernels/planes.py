"""Texels of tri-planes in kernels: the gather of twelve texels a point, and the scatter that is its transpose.

`tap`, `gather_features` and `scatter_gradient` take the coordinates of one tile of points, in registers, and a pointer
to the planes of one image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# What fixed-point sums may take of the 63 bits beside the sign.
FIXED_BITS = 62


@triton.jit
def texel_offset(row, column, stride_h, stride_w, UNIT: tl.constexpr):
    """Elements from the start of a plane to a texel, in 64 bits: planes may hold more than 2^31 elements.

    Strides are in UNITs, of which the offset is then a multiple that the compiler sees: vectors are loaded at once.
    """
    return (row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w) * UNIT


@triton.jit
def _axis_tap(coordinate, size, start, whole, SIDE: tl.constexpr):
    """One of the two texels that a coordinate lies between (SIDE 0: the lower, 1: the upper), of the `size` ones that
    are stored: all, or of `whole` ones those from `start` on.

    Returns its index, at most a plane's size off where it is outside; its weight; whether it is inside. NaN is texel 0,
    with a weight of NaN.
    """
    # From 3 on every tap is outside, however small the plane; the clamp, which keeps NaN, makes infinities finite.
    coordinate = tl.where(coordinate > 3.0, 3.0, coordinate)
    coordinate = tl.where(coordinate < -3.0, -3.0, coordinate)
    if start is None:
        position = (coordinate + 1.0) * ((size - 1) * 0.5)
    else:
        position = (coordinate + 1.0) * ((whole - 1) * 0.5)
    lower = tl.floor(position)
    if SIDE == 1:
        weight = position - lower
    else:
        weight = 1.0 - (position - lower)
    texel = lower + SIDE
    if start is not None:
        texel -= start
    outside = (texel < 0.0) | (texel >= size)
    return tl.where(texel > 0.0, texel, 0.0).to(tl.int32), weight, ~outside


@triton.jit
def plane_coordinates(p0, p1, p2, plane):
    """What a plane is read at: (horizontal, vertical) is (p0, p1), (p0, p2), (p1, p2) for plane 0, 1, 2."""
    return tl.where(plane == 2, p1, p0), tl.where(plane == 0, p1, p2)


@triton.jit
def tap(
    horizontal,
    vertical,
    height,
    width,
    stride_h,
    stride_w,
    row_start,
    column_start,
    whole_height,
    whole_width,
    RIGHT: tl.constexpr,
    DOWN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One of the four texels around each point: its offset in the plane, its bilinear weight, whether it is inside.

    All are [BLOCK_N].
    """
    column, weight_x, inside_x = _axis_tap(horizontal, width, column_start, whole_width, RIGHT)
    row, weight_y, inside_y = _axis_tap(vertical, height, row_start, whole_height, DOWN)
    return texel_offset(row, column, stride_h, stride_w, UNIT), weight_x * weight_y, inside_x & inside_y


# Channels are worked on in pieces of one sector. A tile is then [PIECES, BLOCK_N, PIECE], of which a thread has all
# pieces of a point: two lanes hold a point, and work out its taps, where eight would side by side.
SECTOR_BITS: tl.constexpr = tl.constexpr(256)


@triton.jit
def pieces(BLOCK_C: tl.constexpr, PIECE: tl.constexpr):
    """The channels of a tile, [PIECES, 1, PIECE]."""
    return tl.arange(0, BLOCK_C // PIECE)[:, None, None] * PIECE + tl.arange(0, PIECE)[None, None, :]


@triton.jit
def gather_features(
    planes_ptr,
    p0,
    p1,
    p2,
    valid,
    height,
    width,
    stride_c,
    stride_h,
    stride_w,
    row_start,
    column_start,
    whole_height,
    whole_width,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
):
    """feature(p) = 1/3 sum_k bilinear(plane_k, p[axes_k]) of a tile of points of one image: [PIECES, BLOCK_N, PIECE]
    fp32, channel piece * PIECE + i at [piece, :, i], PIECE being the channels of a sector.

    Channels from CHANNELS on are 0, and so are points that are not `valid`. With a row_start and a column_start points
    are relative to whole planes, of which height x width texels are stored from there on.
    """
    BITS: tl.constexpr = planes_ptr.dtype.element_ty.primitive_bitwidth
    PIECE: tl.constexpr = SECTOR_BITS // BITS if SECTOR_BITS // BITS < BLOCK_C else BLOCK_C
    c = pieces(BLOCK_C, PIECE)
    features = tl.zeros([BLOCK_C // PIECE, p0.shape[0], PIECE], tl.float32)
    for plane in range(3):  # not unrolled: the taps of one plane at a time fill the registers
        horizontal, vertical = plane_coordinates(p0, p1, p2, plane)
        channel = (plane * CHANNELS + c).to(tl.int64) * stride_c
        for corner in tl.static_range(4):
            offset, weight, inside = tap(
                horizontal,
                vertical,
                height,
                width,
                stride_h,
                stride_w,
                row_start,
                column_start,
                whole_height,
                whole_width,
                corner % 2,
                corner // 2,
                UNIT,
            )
            mask = (inside & valid)[None, :, None] & (c < CHANNELS)
            texel = tl.load(planes_ptr + offset[None, :, None] + channel, mask=mask, other=0.0)
            features += weight[None, :, None] * texel.to(tl.float32)
    return features * (1.0 / 3.0)


@triton.jit
def scatter_gradient(
    grad_planes_ptr,
    scale_ptr,
    grad_features,
    p0,
    p1,
    p2,
    valid,
    height,
    width,
    stride_c,
    stride_h,
    stride_w,
    row_start,
    column_start,
    whole_height,
    whole_width,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """The transpose of `gather_features`: adds 1/3 weight grad_feature to the twelve texels of every point.

    In fp32, in any order; or where scale_ptr is given, in integers of 1 / scale (see `fixed_point_scale`), whose sum
    does not depend on the order. grad_features is in pieces [PIECES, BLOCK_N, PIECE] of any size. If VECTORS a thread
    adds to several channels in an instruction; else the threads of one add to channels side by side, whole sectors.
    """
    PIECE: tl.constexpr = grad_features.shape[2]
    c = pieces(BLOCK_C, PIECE)[None, :, :, :]
    grad_features = grad_features * (1.0 / 3.0)
    if scale_ptr is not None:
        grad_features *= tl.load(scale_ptr)
    # The compiler moves a conversion of layouts above a new dimension, and so makes it once, not for every tap.
    grad_features = grad_features[None, :, :, :]
    for plane in range(3):  # not unrolled: the taps of one plane at a time fill the registers
        horizontal, vertical = plane_coordinates(p0, p1, p2, plane)
        channel = (plane * CHANNELS + c).to(tl.int64) * stride_c
        for corner in tl.static_range(4):
            offset, weight, inside = tap(
                horizontal,
                vertical,
                height,
                width,
                stride_h,
                stride_w,
                row_start,
                column_start,
                whole_height,
                whole_width,
                corner % 2,
                corner // 2,
                UNIT,
            )
            mask = (inside & valid)[None, None, :, None] & (c < CHANNELS)
            pointers = grad_planes_ptr + offset[None, None, :, None] + channel
            if not VECTORS:
                pointers = tl.max_contiguous(pointers, [1, 1, 1, 1])
            addend = weight[None, None, :, None] * grad_features
            if scale_ptr is not None:
                addend = addend.to(tl.int64)
            tl.atomic_add(pointers, addend, mask=mask, sem="relaxed")


@triton.jit
def image_and_point(num_points, POINTS: tl.constexpr):
    """The image of a program that owns POINTS points, and the first of them; images one after the other."""
    programs = tl.cdiv(num_points, POINTS)
    program = tl.program_id(0)
    return (program // programs).to(tl.int64), (program % programs) * POINTS


def strides(planes: Tensor) -> tuple[int, tuple[int, ...]]:
    """The unit of the strides (see `texel_offset`), and the strides in it, those of channels in elements."""
    stride_b, stride_c, stride_h, stride_w = planes.stride()
    unit = 8 if stride_c == 1 and stride_b % 8 == stride_h % 8 == stride_w % 8 == 0 else 1
    return unit, (stride_b // unit, stride_c, stride_h // unit, stride_w // unit)


def adds_vectors(arch: int, deterministic: bool) -> bool:
    """Whether a thread can add several numbers at once: fp32 ones, from sm_90 on."""
    return arch >= 90 and not deterministic


def zero_planes(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """An accumulator of planes: zeros in channels_last, in which one tap of a plane is contiguous."""
    batch, channels, height, width = shape
    return torch.zeros(batch, height, width, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)


def region_options(region: tuple[Tensor, tuple[int, int]] | None) -> dict[str, Tensor | int | None]:
    """What kernels are told of a region; None makes them those of whole planes."""
    if region is None:
        return {"first_ptr": None, "whole_height": None, "whole_width": None}
    first, (height, width) = region
    return {"first_ptr": first.contiguous(), "whole_height": height, "whole_width": width}


def fixed_point_scale(largest: Tensor, addends: int) -> Tensor:
    """The power of two that fp32 numbers are multiplied by so that their sum fits int64; no GPU is waited for.

    `addends` numbers of at most `largest` are then integers whose sum is below 2^62. Each loses less than 1 / scale, at
    most 2^-43 of `largest` for 2^18 addends, where a sum in fp32 loses 2^-24 of itself. The scale is at most 2^126, so
    that 1 / scale is a normal number, which only gradients below 1e-24 feel. Where `largest` is not finite it is NaN.

    Args:
        largest: fp32, one element.

    Returns:
        [1] fp32 on the same device.
    """
    largest = largest.reshape(1)
    exponent = torch.frexp(largest).exponent
    exponent = (FIXED_BITS - addends.bit_length() - exponent).clamp(-126, 126)
    scale = ((exponent + 127) << 23).view(torch.float32)  # exact, as a power need not be
    return torch.where(torch.isfinite(largest), scale, torch.nan)


def from_fixed_point(sums: Tensor, scale: Tensor) -> Tensor:
    """int64 sums in fp32, rounded once."""
    return sums.to(torch.float32).mul_(1.0 / scale)
