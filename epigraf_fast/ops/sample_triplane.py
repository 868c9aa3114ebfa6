"""Tri-plane features of points."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.sample_triplane import PlaneRegion
from ..reference.sample_triplane import sample_triplane as _reference
from . import library
from .backends import served
from .checks import (
    check_dtype,
    check_no_gradient,
    check_planes,
    check_region,
    check_shape,
    check_together,
    check_triton_planes,
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

    Derivatives: reference any order, to planes and points; cpu and torch (torch's grid sampler, on a GPU where no
        `deterministic` order is asked for) the first; triton the first, to
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
    route = library.route(planes, points)

    def check() -> None:
        if route is not library.REFERENCE:
            check_triton_planes("sample_triplane", planes)
            check_dtype("sample_triplane", "points", points, (torch.float32,), 'backend is "triton"')
            check_no_gradient("sample_triplane", points=points)

    chosen = served("sample_triplane", backend, planes.device.type, check)
    if "reference" in (chosen, route):
        return _reference(planes, points, region)
    if chosen == "torch" and is_unordered(planes, deterministic):
        return _reference(planes, points, region)
    if chosen == "triton":
        first, whole = (None, None) if region is None else region
        options = whole, resolve_deterministic(deterministic)
        return library.call(route, _SampleTriplane, planes, points, first, *options)
    return sample_triplane_cpu(planes, points, region)


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
    # Not by way of `grid_sample`, which on a GPU goes to cuDNN's sampler: it refuses some sizes, and computes the
    # coordinates' gradient whether it is wanted or not.
    features = torch.grid_sampler_2d(texels, grid, 0, 0, True)  # bilinear, zeros outside, align_corners
    return features.squeeze(3).unflatten(0, (batch, 3)).mean(dim=1).transpose(1, 2).to(planes.dtype)


def _in_part(grid: Tensor, region: PlaneRegion, height: int, width: int) -> Tensor:
    """Coordinates [B, 3, N, 2] of whole planes as those of a part of so many texels."""
    first = region.first.to(grid).flip(1)[:, None, None]  # horizontal first, as the coordinates
    parts = []  # axis by axis: a vector of sizes would be copied from the host, which makes a GPU wait
    for axis, (whole, size) in enumerate(((region.whole[1], width), (region.whole[0], height))):
        parts.append(((grid[..., axis] + 1) * ((whole - 1) / 2) - first[..., axis]) * (2 / (size - 1)) - 1)
    return torch.stack(parts, dim=-1)


def is_unordered(planes: Tensor, deterministic: bool | None) -> bool:
    """Whether torch's grid sampler would add the planes' gradient in an order that must not change from run to run."""
    return planes.is_cuda and resolve_deterministic(deterministic)


def as_region(first: Tensor | None, whole: Sequence[int] | None) -> PlaneRegion | None:
    return None if first is None else PlaneRegion(first, tuple(whole))


@library.register(
    "sample_triplane(Tensor planes, Tensor points, Tensor? first, SymInt[2]? whole, bool deterministic) -> Tensor"
)
class _SampleTriplane:
    """Features by the Triton kernel. They are linear in planes: points are all that the backward needs."""

    constants = ("points",)

    @staticmethod
    @annotate("sample_triplane_fwd")
    def run(planes: Tensor, points: Tensor, first: Tensor | None, whole: Sequence[int] | None, _: bool) -> Tensor:
        from ..kernels import sample_triplane as kernels

        return kernels.fwd(planes, points, region=as_region(first, whole))

    @staticmethod
    def empty(planes: Tensor, points: Tensor, *_: Any) -> Tensor:
        return planes.new_empty(*points.shape[:2], planes.shape[1] // 3)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], features: Tensor) -> None:
        planes, points, first, ctx.whole, ctx.deterministic = inputs
        ctx.size, ctx.dtype = planes.shape[2:], planes.dtype
        ctx.save_for_backward(points, first)

    @staticmethod
    def backward(ctx: Any, grad_features: Tensor) -> tuple[Tensor, None, None, None, None]:
        options = ctx.whole, *ctx.size, ctx.dtype, ctx.deterministic
        grad_planes = library.apply(_SampleTriplaneBackward, grad_features, *ctx.saved_tensors, *options)
        return grad_planes, None, None, None, None


@library.register(
    "sample_triplane_backward(Tensor grad_features, Tensor points, Tensor? first, SymInt[2]? whole, "
    "SymInt height, SymInt width, ScalarType dtype, bool deterministic) -> Tensor"
)
class _SampleTriplaneBackward(library.Last):
    refusal = 'sample_triplane: backend "triton" has no second derivative; use backend="reference"'

    @staticmethod
    @annotate("sample_triplane_bwd")
    def run(
        grad_features: Tensor,
        points: Tensor,
        first: Tensor | None,
        whole: Sequence[int] | None,
        height: int,
        width: int,
        dtype: torch.dtype,
        deterministic: bool,
    ) -> Tensor:
        from ..kernels import sample_triplane as kernels

        size = height, width
        return kernels.bwd(grad_features, points, *size, deterministic, region=as_region(first, whole)).to(dtype)

    @staticmethod
    def empty(grad_features: Tensor, points: Tensor, *options: Any) -> Tensor:
        _, _, height, width, dtype, _ = options
        size = len(points), 3 * grad_features.shape[2], height, width
        return torch.empty(size, dtype=dtype, device=points.device, memory_format=torch.channels_last)

    @staticmethod
    def reference(grad_features: Tensor, points: Tensor, *options: Any) -> Tensor:
        first, whole, height, width, dtype, _ = options
        planes = points.new_zeros(len(points), 3 * grad_features.shape[2], height, width, dtype=dtype)
        forward = functools.partial(_reference, points=points, region=as_region(first, whole))
        return library.pull_back(forward, (planes,), (grad_features,))[0]
