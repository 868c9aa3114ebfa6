"""Tri-plane sampling, forward and backward: one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .planes import (
    adds_vectors,
    fixed_point_scale,
    from_fixed_point,
    gather_features,
    image_and_point,
    pieces,
    region_options,
    scatter_gradient,
    strides,
    zero_planes,
)
from .tuning import Case, Config, Plan, architecture, plan


@triton.jit
def _load_points(points_ptr, valid):
    p0 = tl.load(points_ptr, mask=valid, other=0.0)
    p1 = tl.load(points_ptr + 1, mask=valid, other=0.0)
    p2 = tl.load(points_ptr + 2, mask=valid, other=0.0)
    return p0, p1, p2


@triton.jit
def _sample_triplane_fwd_kernel(
    planes_ptr,
    points_ptr,
    features_ptr,
    num_points,
    height,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    first_ptr,
    whole_height,
    whole_width,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """feature(p) = 1/3 sum_k bilinear(plane_k, p[axes_k]).

    One program owns BLOCK_N points of one image, with all their channels.
    """
    image, first = image_and_point(num_points, BLOCK_N)
    n = first + tl.arange(0, BLOCK_N)
    valid = n < num_points
    point = image * num_points + n
    row_start = None if first_ptr is None else tl.load(first_ptr + image * 2)
    column_start = None if first_ptr is None else tl.load(first_ptr + image * 2 + 1)
    p0, p1, p2 = _load_points(points_ptr + point * 3, valid)
    features = gather_features(
        planes_ptr + image * stride_b * UNIT,
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
        CHANNELS,
        BLOCK_C,
        UNIT,
    )
    c = pieces(BLOCK_C, features.shape[2])
    mask = valid[None, :, None] & (c < CHANNELS)
    tl.store(features_ptr + (point * CHANNELS)[None, :, None] + c, features, mask=mask)


@triton.jit
def _sample_triplane_bwd_kernel(
    grad_features_ptr,
    points_ptr,
    grad_planes_ptr,
    scale_ptr,
    num_points,
    height,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    first_ptr,
    whole_height,
    whole_width,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """grad_plane_k[texel] += 1/3 weight(p, texel) grad_feature(p), the transpose of the forward, by atomics into fp32,
    or into int64 where scale_ptr is given.

    One program owns BLOCK_N points of one image, with all their channels; texels are shared between programs.
    """
    image, first = image_and_point(num_points, BLOCK_N)
    n = first + tl.arange(0, BLOCK_N)
    valid = n < num_points
    point = image * num_points + n
    row_start = None if first_ptr is None else tl.load(first_ptr + image * 2)
    column_start = None if first_ptr is None else tl.load(first_ptr + image * 2 + 1)
    c = pieces(BLOCK_C, 8 if BLOCK_C > 8 else BLOCK_C)
    mask = valid[None, :, None] & (c < CHANNELS)
    pointers = grad_features_ptr + (point * CHANNELS)[None, :, None] + c
    if not VECTORS:
        pointers = tl.max_contiguous(pointers, [1, 1, 1])  # by the threads that add it
    grad_features = tl.load(pointers, mask=mask, other=0.0)
    p0, p1, p2 = _load_points(points_ptr + point * 3, valid)
    scatter_gradient(
        grad_planes_ptr + image * stride_b * UNIT,
        scale_ptr,
        grad_features.to(tl.float32),
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
        CHANNELS,
        BLOCK_C,
        UNIT,
        VECTORS,
    )


def _launch_options(config: Config, channels: int) -> dict[str, int | bool | None]:
    """What both kernels take by keyword. A tile has as many numbers whatever the channels: block_n is for 32."""
    block_c = triton.next_power_of_2(channels)
    return {
        "CHANNELS": channels,
        "BLOCK_C": block_c,
        "BLOCK_N": config.block_n * 32 // block_c,
        "num_warps": config.num_warps,
        "num_stages": 1,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": True,
    }


def case(
    way: str, channels: int, height: int, width: int, dtype: torch.dtype, arch: int, deterministic: bool = False
) -> Case:
    """What `tuning` knows a problem by; `way` is fwd or bwd."""
    name = str(dtype).removeprefix("torch.")
    return Case(f"sample_{way}", arch, channels, 0, 0, height, width, dtype.itemsize, name, deterministic)


def fwd(
    planes: Tensor,
    points: Tensor,
    *,
    region: tuple[Tensor, tuple[int, int]] | None = None,
    chosen: Plan | None = None,
    arch: int | None = None,
) -> Tensor:
    """planes [B, 3*C, H, W], fp32, fp16 or bf16, any strides; points [B, N, 3] fp32 -> features [B, N, C].

    With a `region`, (first [B, 2] integers, size of whole planes), the planes are a part of such. `chosen` and `arch`
    are what `tuning` and the device say, if not given.
    """
    points = points.contiguous()
    batch, num_points, _ = points.shape
    channels, (height, width) = planes.shape[1] // 3, planes.shape[2:]
    features = torch.empty(batch, num_points, channels, dtype=planes.dtype, device=planes.device)
    if features.numel() == 0:
        return features
    arch = architecture(planes.device) if arch is None else arch
    (config,) = chosen or plan(case("fwd", channels, height, width, planes.dtype, arch))
    options = _launch_options(config, channels)
    unit, plane_strides = strides(planes)
    with torch.cuda.device_of(planes):
        _sample_triplane_fwd_kernel[(batch * triton.cdiv(num_points, options["BLOCK_N"]),)](
            planes,
            points,
            features,
            num_points,
            height,
            width,
            *plane_strides,
            **region_options(region),
            UNIT=unit,
            **options,
        )
    return features


def bwd(
    grad_features: Tensor,
    points: Tensor,
    height: int,
    width: int,
    deterministic: bool = False,
    *,
    region: tuple[Tensor, tuple[int, int]] | None = None,
    chosen: Plan | None = None,
    arch: int | None = None,
) -> Tensor:
    """grad_features [B, N, C], points [B, N, 3] -> grad_planes [B, 3*C, height, width], fp32, channels_last.

    `deterministic` sums in int64: the same bits whatever the order, for an accumulator of twice the size, a pass over
    grad_features for the scale, one over the accumulator, and scalar atomics.
    """
    grad_features, points = grad_features.contiguous(), points.contiguous()
    batch, num_points, channels = grad_features.shape
    shape = batch, 3 * channels, height, width
    grad_planes = zero_planes(shape, points.device, torch.int64 if deterministic else torch.float32)
    if grad_features.numel() == 0:
        return grad_planes.float()
    scale = fixed_point_scale(grad_features.abs().amax().float(), num_points) if deterministic else None
    arch = architecture(points.device) if arch is None else arch
    (config,) = chosen or plan(case("bwd", channels, height, width, grad_features.dtype, arch, deterministic))
    options = _launch_options(config, channels)
    unit, plane_strides = strides(grad_planes)
    with torch.cuda.device_of(points):
        _sample_triplane_bwd_kernel[(batch * triton.cdiv(num_points, options["BLOCK_N"]),)](
            grad_features,
            points,
            grad_planes,
            scale,
            num_points,
            height,
            width,
            *plane_strides,
            **region_options(region),
            UNIT=unit,
            VECTORS=adds_vectors(arch, deterministic),
            **options,
        )
    return from_fixed_point(grad_planes, scale) if deterministic else grad_planes
