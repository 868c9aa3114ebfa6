"""Where the fakes of a phase look: their order, and what is computed for each micro-batch of them (docs/region.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..camera import Patch
from ..config import Config
from ..models.region import FEW_BUCKETS, WHOLE_BELOW, Plan, Region, boxes_of, computed_share, plan, region_of, size_of
from .patches import patch_progress, sample_patches
from .sampling import prior_angles

EXPECTED_OVER = 1024  # cameras and patches that the expected share is a mean over


def is_on(config: Config) -> bool:
    """Whether planes are computed in part: what needs them whole, or is small, computes them whole."""
    generator = config.generator
    return (
        generator.region == "auto"
        and generator.backbone == "triplane"
        and config.renderer.background != "plane"
        and config.discriminator.global_context == "none"
        and generator.plane_resolution >= WHOLE_BELOW
    )


def arrange(boxes: Tensor | None, num: int, group: int, micro: int, groups: str) -> Tensor:
    """The order of samples in which micro-batches hold boxes of like sizes, the largest first.

    Samples come `group` by group, and stay together; each micro-batch has its groups as `sample_patches` says.

    Args:
        boxes: [num, 4], or None for the order of the groups as it is.
        groups: "strided" or "consecutive".

    Returns:
        [num] int64, which sample comes at each place.
    """
    order = torch.arange(num // group)
    if boxes is not None:
        extents = (boxes[:, 2:] - boxes[:, :2]).view(-1, group, 2).amax(dim=1)
        order = extents.prod(dim=1).argsort(descending=True, stable=True)
    members = (order * group)[:, None] + torch.arange(group)  # [groups, group]
    members = members.view(num // micro, micro // group, group)
    return (members.transpose(1, 2) if groups == "strided" else members).flatten()


def plans_of(
    boxes: Tensor, resolution: int, micro: int, device: torch.device | str, *, one_size: bool = False
) -> tuple[Plan, ...]:
    """What is computed for each micro-batch of boxes [num, 4].

    Args:
        resolution: Of the planes.
        one_size: Whether all are computed in the size of the largest, of few: for CUDA graphs.
    """
    sizes = sizes_of(boxes, resolution, micro, one_size)
    parts = zip(boxes.split(micro), sizes, strict=True)
    return tuple(plan(region_of(part, resolution, size), resolution, device) for part, size in parts)


def sizes_of(boxes: Tensor, resolution: int, micro: int, one_size: bool) -> list[tuple[int, int]]:
    """Rows and columns for each micro-batch of boxes; see `plans_of`."""
    parts = boxes.split(micro)
    if one_size:
        return [size_of(boxes, resolution, FEW_BUCKETS)] * len(parts)
    return [size_of(part, resolution) for part in parts]


def expected_sizes(config: Config, angles: Tensor, cur_nimg: int, share: int, micro: int) -> list[tuple[int, int]]:
    """Rows and columns of the planes that micro-batches need at a time of the schedule, of drawn cameras and patches.

    Leaves torch's random numbers as they are.

    Args:
        angles: [N, 3] of the data set.
        share: Images of a phase, of one process.
    """
    group = min(config.discriminator.minibatch_std_group, micro)
    progress = patch_progress(config.patches, config.resolution, cur_nimg, config.batch)
    resolution = config.generator.plane_resolution
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for _ in range(-(-EXPECTED_OVER // share)):
            if config.camera.prior == "custom":
                poses = angles[torch.randint(len(angles), (share,))]
            else:
                poses = prior_angles(config.camera, share)
            drawn = sample_patches(config.patches, config.resolution, progress, share // group, 1)
            patch = Patch(*(x.repeat_interleave(group, dim=0) for x in drawn))
            boxes = boxes_of(config.camera, resolution, poses, patch)
            boxes = boxes[arrange(boxes, share, group, micro, config.patch.groups)]
            found += sizes_of(boxes, resolution, micro, config.cuda_graphs)
    return found


def expected_share(config: Config, angles: Tensor, cur_nimg: int, share: int, micro: int) -> float:
    """The part of the planes that will be computed, a mean over `expected_sizes`."""
    sizes = expected_sizes(config, angles, cur_nimg, share, micro)
    return sum(computed_share(size, config.generator.plane_resolution) for size in sizes) / len(sizes)


def largest_plan(config: Config, angles: Tensor | None, device: torch.device | str) -> Plan | None:
    """What is computed for the largest micro-batch at the start of the schedule, where patches are; None: whole planes.

    Args:
        angles: [N, 3] of the data set; None if they are not known, and then the custom prior takes whole planes.
    """
    if not is_on(config) or (angles is None and config.camera.prior == "custom"):
        return None
    resolution = config.generator.plane_resolution
    sizes = expected_sizes(config, torch.zeros(0, 3) if angles is None else angles, 0, config.batch, config.micro)
    size = max(sizes, key=lambda size: computed_share(size, resolution))
    return plan(Region(torch.zeros(config.micro, 2, dtype=torch.long), size), resolution, device)


def announcement(config: Config, angles: Tensor, cur_nimg: int, share: int, micro: int) -> str | None:
    """A line for the start of a run; None where whole planes are computed. See `expected_share`."""
    if not is_on(config):
        return None
    now, end = (expected_share(config, angles, at, share, micro) for at in (cur_nimg, round(config.kimg * 1000)))
    return f"planes: computed where rays look, {now:.2f} of them expected now and {end:.2f} at the end (planes/share)"
