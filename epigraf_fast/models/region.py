"""Which texels of every level the synthesis network needs, to paint a part of the planes (docs/region.md).

Convolutions are local: planes over a box need features over the box and a rim of a few texels, which need those of the
level below over half of that and a rim, and so on down to where the whole level is needed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..camera import Patch, cam2world_matrix, patch_boxes
from ..config import CameraConfig
from ..ops import PlaneRegion

RIM = 3  # texels of a frame that a cut edge spoils: two by conv0 with its filter, one more by conv1
WHOLE_BELOW = 128  # levels of fewer texels a side are computed whole: there is nothing to save
BUCKETS = 32  # steps of a box's size, in parts of the planes' side
FEW_BUCKETS = 8  # where each size is a CUDA graph
PAYS_BELOW = 0.9  # share of the planes above which cutting takes about what it saves


class Region(NamedTuple):
    """A part of the planes, of one size for a batch and at a place of each image's own."""

    first: Tensor  # [B, 2] int64 on the CPU, row and column of the first texel
    size: tuple[int, int]  # rows, columns


class Level(NamedTuple):
    """What one level of the network computes: a frame of the features and of the running sum of planes.

    It is twice what is cut of the level below. The outermost `RIM` texels at a cut edge are spoiled, and none of the
    next level's, or of the box, depends on them. Places are [B, 2] int64 on the device, row and column.
    """

    below: Tensor  # where features and planes of the level below are cut, counted in what it hands on
    below_size: tuple[int, int]
    first: Tensor  # the frame's first texel
    size: tuple[int, int]


class Plan(NamedTuple):
    """What the network computes for a region: tensors on a device and plain numbers, as a CUDA graph takes them."""

    levels: dict[int, Level]  # by resolution; those that are missing are computed whole
    planes: PlaneRegion | None  # where the planes that come out lie in whole ones; None: they are whole
    share: float  # of the planes, that is computed


def boxes_of(
    camera: CameraConfig,
    resolution: int,
    angles: Tensor,
    patch: Patch | None = None,
    fov: float | Tensor | None = None,
) -> Tensor:
    """`patch_boxes` of cameras [B, 3] and patches, in float64 on the CPU; a GPU that they lie on is waited for.

    Args:
        resolution: Of the planes.
        fov: Degrees, a number or [B]; default: the camera's.
    """
    angles, fov = (x.detach().cpu() if isinstance(x, Tensor) else x for x in (angles, fov))
    patch = None if patch is None else Patch(*(x.detach().cpu() for x in patch))
    rays = camera.fov if fov is None else fov, camera.ray_start, camera.ray_end, camera.cube_scale
    matrix = cam2world_matrix(angles.double(), camera.radius)
    return patch_boxes(matrix, *rays, resolution, patch)


def bucket(extent: int, resolution: int, buckets: int = BUCKETS) -> int:
    """The least multiple of resolution / buckets that holds `extent` texels."""
    step = max(resolution // buckets, 2)
    return min(-(-extent // step) * step, resolution)


def size_of(boxes: Tensor, resolution: int, buckets: int = BUCKETS) -> tuple[int, int]:
    """The bucket of the most rows and of the most columns of boxes."""
    first, last = boxes.split(2, dim=1)
    rows, columns = (bucket(extent, resolution, buckets) for extent in (last - first).amax(dim=0).tolist())
    return rows, columns


def region_of(boxes: Tensor, resolution: int, size: tuple[int, int] | None = None) -> Region:
    """One region for a batch of boxes, whose places hold each box.

    Args:
        boxes: [B, 4] int64 on the CPU, see `camera.patch_boxes`.
        resolution: Of the planes.
        size: Rows and columns, at least those of every box; default: `size_of` the boxes.
    """
    first, size = boxes[:, :2], size_of(boxes, resolution) if size is None else size
    return Region(first.minimum(resolution - first.new_tensor(size)), size)


def computed_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Rows and columns of the frame that a level computes to be right in `size` of them, wherever they lie."""
    if resolution < WHOLE_BELOW:
        return resolution, resolution
    rows, columns = (min(2 * (n // 2 + RIM + 1), resolution) for n in size)
    return rows, columns


def levels(region: Region, resolution: int, device: torch.device | str | None = None) -> dict[int, Level]:
    """Resolution -> what it computes, for the levels that are not computed whole.

    Args:
        region: Of the planes.
        resolution: Of the planes.
        device: Where the places go.
    """
    asked = []  # from the top down: resolution, and what is cut of the level below
    first, size = region
    while computed_size(size, resolution) != (resolution, resolution):
        rows, columns = computed_size(size, resolution)
        size, resolution = (rows // 2, columns // 2), resolution // 2
        first = _inside((first - RIM) // 2, size, resolution)  # a frame starts and ends at even texels
        asked.append((2 * resolution, first, size))
    found, given = {}, torch.zeros_like(region.first)  # the first texel that the level below hands on
    for resolution, below, (rows, columns) in reversed(asked):
        places = torch.stack([below - given, 2 * below])
        on_gpu = torch.device(device or "cpu").type == "cuda"
        places = (places.pin_memory() if on_gpu else places).to(device, non_blocking=on_gpu)
        cut, frame = places.unbind()
        found[resolution] = Level(cut, (rows, columns), frame, (2 * rows, 2 * columns))
        given = 2 * below
    return found


def _inside(first: Tensor, size: tuple[int, int], resolution: int) -> Tensor:
    """Places moved inwards where a rectangle would leave its level: all that lies in both stays covered."""
    return first.clamp(min=0).minimum(resolution - first.new_tensor(size))


def plan(region: Region, resolution: int, device: torch.device | str | None = None) -> Plan:
    """`levels`, and what comes out of them: a little more than the region."""
    found = levels(region, resolution, device)
    if resolution not in found:
        return Plan(found, None, 1.0)
    planes = PlaneRegion(found[resolution].first, (resolution, resolution))
    return Plan(found, planes, computed_share(region.size, resolution))


def plan_of_views(
    camera: CameraConfig,
    resolution: int,
    angles: Tensor,
    patch: Patch | None = None,
    fov: float | Tensor | None = None,
    device: torch.device | str | None = None,
) -> Plan | None:
    """The `plan` for what cameras and patches see, or None where that is about all: whole planes are as fast.

    Arguments are those of `boxes_of`; the plan goes to the device.
    """
    boxes = boxes_of(camera, resolution, angles, patch, fov)
    if computed_share(size_of(boxes, resolution), resolution) > PAYS_BELOW:
        return None
    return plan(region_of(boxes, resolution), resolution, device)


def computed_share(size: tuple[int, int], resolution: int) -> float:
    """The part of the planes that is computed to be right in `size` of them."""
    return math.prod(computed_size(size, resolution)) / resolution**2
