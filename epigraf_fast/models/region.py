"""Which texels of every level the synthesis network needs, to paint a part of the planes (docs/region.md).

Convolutions are local: planes over a box need features over the box and a rim of a few texels, which need those of the
level below over half of that and a rim, and so on down to where the whole level is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WHOLE_BELOW = 128  # levels of fewer texels a side are computed whole: there is nothing to save
BUCKETS = 8  # steps of a box's size, in parts of the planes' side


class Region(NamedTuple):
    """A part of the planes, of one size for a batch and at a place of each image's own."""

    first: Tensor  # [B, 2] int64 on the CPU, row and column of the first texel
    size: tuple[int, int]  # rows, columns


class Level(NamedTuple):
    """What one level of the network computes. Places are [B, 2] int64 on the device, row and column.

    Every level hands on features and planes of `size` texels from `first` on; those at a cut edge are spoiled, and none
    of the next level's, or of the box, depends on them.
    """

    below: Tensor  # where the features of the level below are cut, counted in what it hands on
    below_size: tuple[int, int]
    frame: Tensor  # the first texel of conv0's output
    between: Tensor  # where conv0's output is cut, counted in it
    planes: Tensor  # where the running sum times 2 is cut, counted in it
    first: Tensor
    size: tuple[int, int]


def bucket(extent: int, resolution: int) -> int:
    """The least multiple of resolution / BUCKETS that holds `extent` texels."""
    step = max(resolution // BUCKETS, 2)
    return min(-(-extent // step) * step, resolution)


def region_of(boxes: Tensor, resolution: int) -> Region:
    """One region for a batch of boxes: sizes are the bucket of the largest, places hold each box.

    Args:
        boxes: [B, 4] int64 on the CPU, see `camera.patch_boxes`.
        resolution: Of the planes.
    """
    first, last = boxes.cpu().split(2, dim=1)
    size = tuple(bucket(extent, resolution) for extent in (last - first).amax(dim=0).tolist())
    return Region(first.minimum(resolution - first.new_tensor(size)), size)


def levels(region: Region, resolution: int, device: torch.device | str | None = None) -> dict[int, Level]:
    """Resolution -> what it computes, for the levels that are not computed whole.

    Args:
        region: Of the planes.
        resolution: Of the planes.
        device: Where the places go.
    """
    asked = []  # from the top down: resolution, what conv0 reads and what comes between conv0 and conv1
    first, size = region
    while resolution >= WHOLE_BELOW and min(size) < resolution:
        # conv1 reads one texel more on every side; what conv0 gives starts and ends at even texels.
        between_size = tuple(min(2 * (n // 2) + 4, resolution) for n in size)
        between = _inside(2 * ((first - 1) // 2), between_size, resolution)
        size = tuple(min(n // 2 + 4, resolution // 2) for n in between_size)
        first = _inside(between // 2 - 2, size, resolution // 2)
        asked.append((resolution, first, size, between, between_size))
        resolution //= 2
    found, given = {}, torch.zeros_like(region.first)  # the first texel that the level below hands on
    for resolution, below, below_size, between, between_size in reversed(asked):
        places = torch.stack([below - given, 2 * below, between - 2 * below, between - 2 * given, between])
        below, frame, cut, planes, first = places.to(device, non_blocking=True).unbind()
        found[resolution] = Level(below, below_size, frame, cut, planes, first, between_size)
        given = between
    return found


def _inside(first: Tensor, size: tuple[int, int], resolution: int) -> Tensor:
    """Places moved inwards where a rectangle would leave its level: all that lies in both stays covered."""
    return first.clamp(min=0).minimum(resolution - first.new_tensor(size))


def share(region: Region, resolution: int) -> float:
    """The part of the planes that is computed."""
    return region.size[0] * region.size[1] / resolution**2
