"""Checks a data set before training, and draws its poses.

$ python -m epigraf_fast.check_data datasets/ffhq.zip --preset ffhq --plot poses.png

Every image is read. The plot shows the distribution of poses and the cameras around the cube with their frustum.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import plotting
from .arguments import Parser, whole
from .camera import cam2world_matrix, camera_rays, frustum_extent
from .command import Progress, running, waiting
from .config import PRESETS, CameraConfig, preset, with_data_camera
from .data import ImageDataset
from .training.sampling import prior_angles

DRAWN = 200  # cameras in the plot
BINS = 40


def frustum_lines(camera: CameraConfig, angles: Tensor) -> np.ndarray:
    """The edges of one camera's view frustum between ray_start and ray_end: [12, 2, 3]."""
    origins, directions = camera_rays(cam2world_matrix(angles[None], camera.radius), camera.fov, 2)
    corners = [(origins + t * directions)[0] for t in (camera.ray_start, camera.ray_end)]  # [4, 3] each
    ring = ((0, 1), (1, 3), (3, 2), (2, 0))
    lines = [torch.stack([corner[a], corner[b]]) for corner in corners for a, b in ring]
    lines += [torch.stack([corners[0][i], corners[1][i]]) for i in range(4)]
    return torch.stack(lines).numpy()


def report(dataset: ImageDataset, camera: CameraConfig, stored: bool) -> Iterator[str]:
    """What the set holds, line by line."""
    count = len(dataset.files)
    doubled = f", {len(dataset):,} with the mirrored" if dataset.mirror else ""
    yield f"{dataset.path}: {count:,} images of {dataset.resolution}x{dataset.resolution}{doubled}, all readable"
    for column, name in ((0, "yaw"), (1, "pitch")):
        values = dataset.angles[:count, column]
        low, high, mean, std = (float(x) for x in (values.min(), values.max(), values.mean(), values.std()))
        yield f"{name}: {low:.3f} to {high:.3f}, mean {mean:.3f}, standard deviation {std:.3f} radians"
    if dataset.label_values.ndim > 1:
        yield f"labels: vectors of {dataset.label_dim} numbers"
    elif dataset.label_dim:
        sizes = dataset.labels[:count].sum(dim=0)[dataset.label_values]
        yield f"labels: {len(sizes)} classes, {int(sizes.min())} to {int(sizes.max())} images each"
    yield from (f"warning: {remark}" for remark in dataset.remarks())
    extent = frustum_extent(camera.fov, camera.radius, camera.ray_start, camera.ray_end)
    yield (
        f"camera ({'stored in the set' if stored else 'of the preset'}): fov {camera.fov:g}, radius {camera.radius:g}, "
        f"rays {camera.ray_start:g} to {camera.ray_end:g}; the frustum reaches {extent:.4g}, "
        f"the cube {camera.cube_scale:g}"
    )
    if extent > camera.cube_scale:
        yield f"warning: the frustum leaves the cube: set --camera.cube-scale {math.ceil(extent * 1000) / 1000:g}"
    yaw = float(dataset.angles[:count, 0].double().mean())
    spread = float(dataset.angles[:count, 0].std())
    if abs(yaw) > max(0.3, 2 * spread / math.sqrt(count)) and spread < 1.5:
        yield f"warning: the yaws are not centred at zero (mean {yaw:.2f}): pose conditioning and mirroring expect it"


def plot(dataset: ImageDataset, camera: CameraConfig, path: Path) -> None:
    """Draws yaw against pitch with both histograms, and cameras with a frustum and the cube."""
    angles = dataset.angles[: len(dataset.files)]
    figure = plotting.new_figure(12, 5.5)
    left, right = figure.subfigures(1, 2)

    axes = left.subplots(2, 2, width_ratios=(4, 1), height_ratios=(1, 4), sharex="col", sharey="row")
    yaw, pitch = angles[:, 0].numpy(), angles[:, 1].numpy()
    main, above, beside = axes[1, 0], axes[0, 0], axes[1, 1]
    axes[0, 1].axis("off")
    main.hist2d(yaw, pitch, bins=BINS, cmin=1, cmap="viridis")
    main.set(xlabel="yaw (radians)", ylabel="pitch (radians, 0 is straight above)")
    main.invert_yaxis()
    above.hist(yaw, bins=BINS, density=True)
    beside.hist(pitch, bins=BINS, density=True, orientation="horizontal")
    if camera.prior != "custom":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            prior = prior_angles(camera, 20_000).numpy()
        above.hist(prior[:, 0], bins=BINS, density=True, histtype="step", color="tab:red", label="prior")
        beside.hist(prior[:, 1], bins=BINS, density=True, histtype="step", color="tab:red", orientation="horizontal")
        above.legend(frameon=False)
    left.suptitle(f"{len(angles):,} poses of {dataset.name}")

    space = right.add_subplot(projection="3d")
    some = angles[torch.linspace(0, len(angles) - 1, min(DRAWN, len(angles))).long()]
    # matplotlib's third axis is up, ours the second: (x, y, z) -> (x, -z, y).
    draw = lambda points: (points[..., 0], -points[..., 2], points[..., 1])  # noqa: E731
    space.scatter(*draw(cam2world_matrix(some, camera.radius)[:, :3, 3].numpy()), s=4)
    for line in frustum_lines(camera, dataset.mean_camera_pose):
        space.plot(*draw(line), color="tab:red", linewidth=1)
    ends = np.array([-1.0, 1.0]) * camera.cube_scale
    for axis in range(3):
        for a in ends:
            for b in ends:
                line = np.full((2, 3), 0.0)
                line[:, axis], line[:, (axis + 1) % 3], line[:, (axis + 2) % 3] = ends, a, b
                space.plot(*draw(line), color="grey", linewidth=0.8)
    space.set(xlabel="x", ylabel="-z", zlabel="y", title="cameras, the mean pose's frustum, the cube")
    space.set_aspect("equal")
    plotting.save(figure, path, dpi=110)


def arguments() -> Parser:
    parser = Parser("check_data", __doc__)
    parser.add_argument("data", help="a zip or folder of images with dataset.json, or 'builtin'")
    parser.add_argument("--resolution", type=whole(4, 16384), help="that the images must have")
    parser.add_argument("--labels", action="store_true", help="check the labels too")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="ffhq",
        help="whose camera to draw, if none is stored (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, help="the picture to write, .png, .pdf or .svg")
    parser.add_overwrite()
    return parser


def main(args: Sequence[str] | None = None) -> None:
    with running():
        run(arguments().parse_args(args))


def run(options: argparse.Namespace) -> None:
    if options.plot is not None:
        plotting.check_figure("--plot", options.plot, overwrite=options.overwrite)
    with waiting("reading dataset.json"):
        dataset = ImageDataset(options.data, options.resolution, use_labels=options.labels)
    dataset.check_images(progress=Progress)
    config: Any = with_data_camera(preset(options.preset), dataset.camera)
    print(*report(dataset, config.camera, dataset.camera is not None), sep="\n")
    if options.plot is not None:
        plot(dataset, config.camera, options.plot)
        print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
