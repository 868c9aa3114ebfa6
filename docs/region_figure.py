"""Draws docs/region.png, with the functions that training calls: `python docs/region_figure.py`."""

from __future__ import annotations

from pathlib import Path

import torch

from epigraf_fast.camera import Patch, cam2world_matrix, camera_rays
from epigraf_fast.config import CameraConfig
from epigraf_fast.models.region import boxes_of, levels, region_of
from epigraf_fast.reference.sample_triplane import PLANE_AXES
from epigraf_fast.tools.plotting import new_figure, save

CAMERA = CameraConfig()  # FFHQ's
RESOLUTION = 512
ANGLES = torch.tensor([[0.35, 1.45, 0.0]], dtype=torch.float64)  # yaw, pitch
PATCH = Patch(torch.tensor([0.45], dtype=torch.float64), torch.tensor([[0.1, 0.4]], dtype=torch.float64))
BOX, BUCKET, RIM = "tab:red", "tab:orange", "tab:blue"


def samples(pixels: int, depths: int) -> torch.Tensor:
    """Points of the patch's rays [rays, depths, 3], in half sizes of the cube."""
    matrix = cam2world_matrix(ANGLES, CAMERA.radius)
    origins, directions = camera_rays(matrix, CAMERA.fov, pixels, PATCH)
    t = torch.linspace(CAMERA.ray_start, CAMERA.ray_end, depths, dtype=torch.float64)
    return (origins[0, :, None] + t[:, None] * directions[0, :, None]) / CAMERA.cube_scale


def rectangle(axes, first, size, **style) -> None:
    """first and size are (row, column), (rows, columns)."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((first[1], first[0]), size[1], size[0], **style))


def main() -> None:
    box = boxes_of(CAMERA, RESOLUTION, ANGLES, PATCH)
    region = region_of(box, RESOLUTION)
    first, last = box[0, :2].tolist(), box[0, 2:].tolist()
    figure = new_figure(13, 7)
    grid = figure.subplots(2, 4)

    above = grid[0, 0]
    hull = samples(2, 2)
    for ray in hull:
        above.plot(ray[:, 0], ray[:, 2], color="black", lw=1)
    for k in range(2):
        ring = hull[[0, 1, 3, 2, 0], k]
        above.plot(ring[:, 0], ring[:, 2], color="black", lw=1)
    low, high = hull.flatten(0, 1).amin(0), hull.flatten(0, 1).amax(0)
    rectangle(above, (low[2], low[0]), (high[2] - low[2], high[0] - low[0]), fill=False, ec=BOX, lw=1.5, ls="--")
    rectangle(above, (-1, -1), (2, 2), fill=False, ec="grey", lw=1)
    above.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xlabel="axis 0", ylabel="axis 2")
    above.set_title("the patch's frustum in the cube, its\nshadow's range on every axis", fontsize=10)

    texels = (samples(24, 12).flatten(0, 1) + 1) / 2 * (RESOLUTION - 1)
    for number, (horizontal, vertical) in enumerate(PLANE_AXES):
        axes = grid[0, 1 + number]
        axes.scatter(texels[:, horizontal], texels[:, vertical], s=0.3, color="black", lw=0)
        rectangle(axes, first, (last[0] - first[0], last[1] - first[1]), fill=False, ec=BOX, lw=1.5, ls="--")
        rectangle(axes, region.first[0].tolist(), region.size, fill=False, ec=BUCKET, lw=1.5)
        axes.set(xlim=(0, RESOLUTION), ylim=(RESOLUTION, 0), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"plane {number}: axes {horizontal} and {vertical}", fontsize=10)

    plan = levels(region, RESOLUTION)
    for axes, resolution in zip(grid[1], (RESOLUTION, RESOLUTION // 2, RESOLUTION // 4), strict=False):
        level, part = plan[resolution], RESOLUTION // resolution
        rectangle(axes, level.first[0].tolist(), level.size, fc=RIM, alpha=0.3)
        rectangle(axes, level.first[0].tolist(), level.size, fill=False, ec=RIM, lw=1.5)
        wanted = [x / part for x in region.first[0].tolist()], [x / part for x in region.size]
        rectangle(axes, *wanted, fill=False, ec=BUCKET, lw=1.5)
        axes.set(xlim=(0, resolution), ylim=(resolution, 0), aspect="equal", xticks=[], yticks=[])
        share = level.size[0] * level.size[1] / resolution**2
        axes.set_title(f"level {resolution}: {level.size[0]}x{level.size[1]} texels, {share:.2f} of it", fontsize=10)
    words = grid[1, 3]
    words.axis("off")
    for i, (colour, text) in enumerate(
        (
            ("black", "the patch's rays, and their samples"),
            (BOX, "box: every texel that they read"),
            (BUCKET, "bucket: the box in one of a few sizes"),
            (RIM, "bucket and rim: what the level computes"),
        )
    ):
        words.text(0, 0.8 - 0.15 * i, text, color=colour, fontsize=11)
    save(figure, Path(__file__).with_name("region.png"), dpi=90)


if __name__ == "__main__":
    main()
