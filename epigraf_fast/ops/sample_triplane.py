"""Tri-plane features of points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.sample_triplane import PlaneRegion
from ..reference.sample_triplane import sample_triplane as _reference
from .backends import resolve
from .checks import (
    check_dtype,
    check_no_gradient,
    check_planes,
    check_region,
    check_shape,
    check_together,
    check_triton_planes,
    no_second_derivative,
    resolve_deterministic,
)
from .ranges import annotate


def sample_triplane(
    planes: Tensor,
    points: Tensor,
    *,
    region: PlaneRegion | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of three bilinear samples, one from each axis-aligned plane (paper, section 3.1).

    Plane 0 is read at (p0, p1), plane 1 at (p0, p2), plane 2 at (p1, p2), as (horizontal, vertical). Coordinate -1 is
    the centre of the first column or row, +1 that of the last (align_corners=True); texels outside count as zero.

    Args:
        planes: [B, 3*C, H, W]; channels_last is read without a copy, and fastest. triton: fp32, fp16 or bf16, C a
            multiple of 8 and at most 64.
        points: [B, N, 3], in units of the cube's half size. triton: fp32.
        region: Where the planes lie in whole ones, which points are then relative to: an image's first texel, and the
            size of the whole. Texels that are not stored count as zero; points should not ask for them (the reference
            on a CPU raises ValueError). The gradient to planes has the size of planes.
        deterministic: triton: whether the gradient to planes has the same bits in every run. Default: what
            `torch.use_deterministic_algorithms` says, which the other backends follow anyway.

    Returns:
        [B, N, C], dtype of `planes`.

    Derivatives: reference any order, to planes and points; cpu (torch's grid sampler) the first; triton the first, to
        planes only, summed in fp32 in an order that changes from run to run. If `deterministic`, the sum is exact in
        fixed point, steps of at most 2^-43 of the largest incoming gradient at 2^18 points an image, and rounded to
        fp32 once; it takes 8 bytes a number more memory while it runs, two more passes, and scalar atomics.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; unknown or missing backend.
        NotImplementedError: triton: a gradient to points, or a second derivative, is asked for.
    """
    check_together("sample_triplane", planes=planes, points=points)
    check_planes("sample_triplane", planes)
    check_shape("sample_triplane", "points", points, (planes.shape[0], "N", 3))
    check_region("sample_triplane", region, planes)
    chosen = resolve("sample_triplane", backend, planes.device.type)
    if chosen == "triton":
        check_triton_planes("sample_triplane", planes)
        check_dtype("sample_triplane", "points", points, (torch.float32,), 'backend is "triton"')
        check_no_gradient("sample_triplane", points=points)
        from ..kernels import sample_triplane as kernels

        return _SampleTriplane.apply(planes, points, region, resolve_deterministic(deterministic), kernels)
    return (sample_triplane_cpu if chosen == "cpu" else _reference)(planes, points, region)


def sample_triplane_cpu(planes: Tensor, points: Tensor, region: PlaneRegion | None = None) -> Tensor:
    """The same by torch's vectorized grid sampler. Before torch 2.13 it has no second derivative, and says so."""
    batch, channels, height, width = planes.shape
    dtype = torch.promote_types(planes.dtype, points.dtype)  # coordinates need more bits than features
    # The sampler is many times faster on contiguous planes and grids: copies pay.
    texels = planes.to(dtype).reshape(batch * 3, channels // 3, height, width).contiguous()
    if region is not None:  # a line that is alone would be met at every coordinate
        texels = torch.nn.functional.pad(texels, (0, int(width == 1), 0, int(height == 1)))
    grid = torch.stack([points[..., :2], points[..., ::2], points[..., 1:]], dim=1)  # [B, 3, N, 2], as PLANE_AXES
    # All taps of what lies beyond +-3 are outside; infinite coordinates would make the sampler's weights NaN.
    grid = grid.to(dtype).clamp(-3, 3)
    if region is not None:
        grid = _in_part(grid, region, *texels.shape[2:])
    grid = grid.flatten(0, 1)[:, :, None]  # [3*B, N, 1, 2]
    features = torch.nn.functional.grid_sample(texels, grid, padding_mode="zeros", align_corners=True)
    return features.squeeze(3).unflatten(0, (batch, 3)).mean(dim=1).transpose(1, 2).to(planes.dtype)


def _in_part(grid: Tensor, region: PlaneRegion, height: int, width: int) -> Tensor:
    """Coordinates [B, 3, N, 2] of whole planes as those of a part of so many texels."""
    last = grid.new_tensor([region.whole[1] - 1, region.whole[0] - 1])  # horizontal first, as the coordinates
    first = region.first.to(grid).flip(1)[:, None, None]
    return ((grid + 1) * (last / 2) - first) * (2 / grid.new_tensor([width - 1, height - 1])) - 1


class _SampleTriplane(torch.autograd.Function):
    """Features by `kernels.fwd`. They are linear in planes: points are all that the backward needs."""

    @staticmethod
    @annotate("sample_triplane_fwd")
    def forward(
        ctx: Any, planes: Tensor, points: Tensor, region: PlaneRegion | None, deterministic: bool, kernels: Any
    ) -> Tensor:
        ctx.save_for_backward(points)
        ctx.region = region
        ctx.deterministic = deterministic
        ctx.kernels, ctx.size, ctx.dtype = kernels, planes.shape[2:], planes.dtype
        return kernels.fwd(planes, points, region=region)

    @staticmethod
    def backward(ctx: Any, grad_features: Tensor) -> tuple[Tensor, None, None, None, None]:
        (points,) = ctx.saved_tensors
        options = ctx.region, ctx.deterministic, ctx.kernels, ctx.size, ctx.dtype
        return _SampleTriplaneBackward.apply(grad_features, points, *options), None, None, None, None


class _SampleTriplaneBackward(torch.autograd.Function):
    @staticmethod
    @annotate("sample_triplane_bwd")
    def forward(
        ctx: Any,
        grad_features: Tensor,
        points: Tensor,
        region: PlaneRegion | None,
        deterministic: bool,
        kernels: Any,
        size: torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        return kernels.bwd(grad_features, points, *size, deterministic, region=region).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise no_second_derivative("sample_triplane")
