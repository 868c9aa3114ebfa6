"""Tri-plane features of points."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.sample_triplane import sample_triplane as _reference
from .backends import resolve
from .checks import check_planes, check_shape, check_together


def sample_triplane(planes: Tensor, points: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean of three bilinear samples, one from each axis-aligned plane (paper, section 3.1).

    Plane 0 is read at (p0, p1), plane 1 at (p0, p2), plane 2 at (p1, p2), as (horizontal, vertical). Coordinate -1 is
    the centre of the first column or row, +1 that of the last (align_corners=True); texels outside count as zero.

    Args:
        planes: [B, 3*C, H, W]; channels_last is read without a copy.
        points: [B, N, 3], in units of the cube's half size.

    Returns:
        [B, N, C], dtype of `planes`.

    Derivatives: reference any order, to planes and points; cpu (torch's grid sampler) the first.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; unknown or missing backend.
    """
    check_together("sample_triplane", planes=planes, points=points)
    check_planes("sample_triplane", planes)
    check_shape("sample_triplane", "points", points, (planes.shape[0], "N", 3))
    if resolve("sample_triplane", backend, planes.device.type) == "cpu":
        return sample_triplane_cpu(planes, points)
    return _reference(planes, points)


def sample_triplane_cpu(planes: Tensor, points: Tensor) -> Tensor:
    """The same by torch's vectorized grid sampler. Before torch 2.13 it has no second derivative, and says so."""
    batch, channels, height, width = planes.shape
    dtype = torch.promote_types(planes.dtype, points.dtype)  # coordinates need more bits than features
    # The sampler is many times faster on contiguous planes and grids: copies pay.
    texels = planes.to(dtype).reshape(batch * 3, channels // 3, height, width).contiguous()
    grid = torch.stack([points[..., :2], points[..., ::2], points[..., 1:]], dim=1)  # [B, 3, N, 2], as PLANE_AXES
    # All taps of what lies beyond +-3 are outside; infinite coordinates would make the sampler's weights NaN.
    grid = grid.to(dtype).clamp(-3, 3).flatten(0, 1)[:, :, None]  # [3*B, N, 1, 2]
    features = torch.nn.functional.grid_sample(texels, grid, padding_mode="zeros", align_corners=True)
    return features.squeeze(3).unflatten(0, (batch, 3)).mean(dim=1).transpose(1, 2).to(planes.dtype)
