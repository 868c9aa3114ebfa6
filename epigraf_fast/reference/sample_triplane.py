"""Tri-plane features of points (paper, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Coordinates that each plane is read at: (horizontal, vertical).
PLANE_AXES = ((0, 1), (0, 2), (1, 2))


class PlaneRegion(NamedTuple):
    """Which part of whole planes is stored: planes[b, :, y, x] is texel (first[b, 0] + y, first[b, 1] + x)."""

    first: Tensor  # [B, 2] int32 or int64, row and column, on the device of the planes
    whole: tuple[int, int]  # rows and columns of whole planes


def reads_outside(points: Tensor, region: PlaneRegion, size: tuple[int, int]) -> Tensor:
    """Whether any of points [B, N, 3] gives a weight to a texel that planes of `size`, at a region, do not hold.

    Returns:
        One bool, a tensor without dimensions.
    """

    def taps(coordinate: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
        """Of both texels that coordinates lie between: whether whole planes are read there, and whether it is held."""
        whole, first = region.whole[side], region.first[:, side, None]
        position = (coordinate.clamp(-3, 3) + 1) * ((whole - 1) / 2)
        lower = position.floor()
        weights = (lower, 1 - (position - lower)), (lower + 1, position - lower)
        return [
            ((weight > 0) & (texel >= 0) & (texel < whole), (texel >= first) & (texel < first + size[side]))
            for texel, weight in weights
        ]

    found = []
    for horizontal, vertical in PLANE_AXES:
        for asked_x, held_x in taps(points[..., horizontal], 1):
            for asked_y, held_y in taps(points[..., vertical], 0):
                found.append((asked_x & asked_y & ~(held_x & held_y)).any())
    return torch.stack(found).any()


def sample_triplane(planes: Tensor, points: Tensor, region: PlaneRegion | None = None) -> Tensor:
    """feature(p) = 1/3 sum_k bilinear(plane_k, p[axes_k]); -1 and +1 are the centres of the border texels.

    Texels outside a plane count as zero. Bilinear sampling is written with gathers, so that it has every derivative, to
    planes and to points.

    Args:
        planes: [B, 3*C, H, W], channels 0..C-1 being the first plane; no copy when channels_last.
        points: [B, N, 3].
        region: Where the planes lie in whole ones, which points are then relative to. A texel that is not stored counts
            as zero, too; on a CPU one that has a weight is an error.

    Returns:
        [B, N, C].
    """
    batch, channels, height, width = planes.shape
    rows, columns = (height, width) if region is None else region.whole
    channels //= 3
    texels = planes.permute(0, 2, 3, 1).reshape(batch * height * width * 3, channels)  # row: ((b*H + y)*W + x)*3 + k

    # From 3 on every tap is outside, however small the plane; the clamp keeps the integer conversion in range.
    coordinates = points.clamp(-3, 3).unbind(dim=-1)
    x, y = (torch.stack([coordinates[axis] for axis in axes], dim=-1) for axes in zip(*PLANE_AXES, strict=True))
    x, y = (x + 1) * ((columns - 1) / 2), (y + 1) * ((rows - 1) / 2)  # [B, N, 3]
    x_floor, y_floor = x.detach().floor(), y.detach().floor()
    right, down = x - x_floor, y - y_floor
    x_corners = torch.stack([x_floor, x_floor, x_floor + 1, x_floor + 1], dim=-1)  # [B, N, 3, 4]
    y_corners = torch.stack([y_floor, y_floor + 1, y_floor, y_floor + 1], dim=-1)
    tap_weights = torch.stack([1 - right, 1 - right, right, right], dim=-1)
    tap_weights = tap_weights * torch.stack([1 - down, down, 1 - down, down], dim=-1)
    inside = (x_corners >= 0) & (x_corners < columns) & (y_corners >= 0) & (y_corners < rows)
    if region is not None:
        first = region.first.to(x_corners)[:, :, None, None, None]  # [B, 2, 1, 1, 1]
        x_corners, y_corners = x_corners - first[:, 1], y_corners - first[:, 0]
        inside = (x_corners >= 0) & (x_corners < width) & (y_corners >= 0) & (y_corners < height)
        if planes.device.type == "cpu" and bool(reads_outside(points.detach(), region, (height, width))):
            raise ValueError("sample_triplane: points must keep to the region, got some that read texels outside of it")
    tap_weights = (tap_weights * inside).to(planes.dtype)

    column = x_corners.long().clamp(0, width - 1)
    row = y_corners.long().clamp(0, height - 1)
    image = torch.arange(batch, device=planes.device)[:, None, None, None]
    plane = torch.arange(3, device=planes.device)[:, None]
    index = ((image * height + row) * width + column) * 3 + plane
    taps = texels.index_select(0, index.flatten()).view(*index.shape, channels)  # [B, N, 3, 4, C]
    return (taps * tap_weights[..., None]).sum(dim=(2, 3)) / 3
