"""Checks a data set before training, and draws its poses.

$ epigraf data check datasets/ffhq.zip --preset ffhq --plot poses.png

Every image is read. The plot shows the distribution of poses and the cameras around the cube with their frustum.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tyro.conf import Positional

from ..camera import cam2world_matrix, camera_rays, frustum_extent
from ..config import PRESETS, CameraConfig, preset, with_data_camera
from ..data import ImageDataset
from ..progress import Progress, waiting
from ..training.sampling import prior_angles
from . import plotting
from .arguments import Json, Overwrite, default, optional, whole

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


def facts(dataset: ImageDataset, camera: CameraConfig, stored: bool) -> dict[str, Any]:
    """What the set holds; angles in radians.

    Args:
        stored: Whether the camera comes with the set.
    """
    count = len(dataset.files)
    found: dict[str, Any] = {"data": str(dataset.path), "images": count, "resolution": dataset.resolution}
    found["images_with_mirrored"] = len(dataset)
    for column, name in ((0, "yaw"), (1, "pitch")):
        values = dataset.angles[:count, column].double()
        found[name] = {what: float(getattr(values, what)()) for what in ("min", "max", "mean")}
        found[name]["std"] = float(values.std(correction=min(1, count - 1)))
    if dataset.label_values.ndim > 1:
        found["label_numbers"] = dataset.label_dim
    elif dataset.label_dim:
        sizes = dataset.labels[:count].sum(dim=0)[dataset.label_values]
        found["images_of_class"] = dict(zip(dataset.label_values.tolist(), sizes.int().tolist(), strict=True))
    extent = frustum_extent(camera.fov, camera.radius, camera.ray_start, camera.ray_end)
    found["camera"] = {
        "from": "data" if stored else "preset",
        **{name: getattr(camera, name) for name in ("fov", "radius", "ray_start", "ray_end", "cube_scale")},
        "frustum_extent": extent,
    }
    found["warnings"] = dataset.remarks()
    if extent > camera.cube_scale:
        scale = math.ceil(extent * 1000) / 1000
        found["warnings"].append(f"the frustum leaves the cube: set --camera.cube-scale {scale:g}")
    yaw, spread = found["yaw"]["mean"], found["yaw"]["std"]
    if abs(yaw) > max(0.3, 2 * spread / math.sqrt(count)) and spread < 1.5:
        found["warnings"].append(
            f"the yaws are not centred at zero (mean {yaw:.2f}): pose conditioning and mirroring expect it"
        )
    return found


def report(found: dict[str, Any]) -> Iterator[str]:
    """`facts`, line by line."""
    size, doubled = found["resolution"], found["images_with_mirrored"]
    mirrored = f", {doubled:,} with the mirrored" if doubled > found["images"] else ""
    yield f"{found['data']}: {found['images']:,} images of {size}x{size}{mirrored}, all readable"
    for name in ("yaw", "pitch"):
        low, high, mean, std = found[name].values()
        yield f"{name}: {low:.3f} to {high:.3f}, mean {mean:.3f}, standard deviation {std:.3f} radians"
    if "label_numbers" in found:
        yield f"labels: vectors of {found['label_numbers']} numbers"
    if sizes := found.get("images_of_class", {}).values():
        yield f"labels: {len(sizes)} classes, {min(sizes)} to {max(sizes)} images each"
    yield from (f"warning: {warning}" for warning in found["warnings"])
    camera = found["camera"]
    where = "stored in the set" if camera["from"] == "data" else "of the preset"
    yield (
        f"camera ({where}): fov {camera['fov']:g}, radius {camera['radius']:g}, rays {camera['ray_start']:g} to "
        f"{camera['ray_end']:g}; the frustum reaches {camera['frustum_extent']:.4g}, the cube {camera['cube_scale']:g}"
    )


def plot(dataset: ImageDataset, camera: CameraConfig, path: Path, preset_name: str) -> None:
    """Draws yaw against pitch with both histograms, and cameras with a frustum and the cube.

    Args:
        preset_name: Whose prior is drawn; its camera too, where the data stores none.
    """
    angles = dataset.angles[: len(dataset.files)]
    figure = plotting.new_figure(12, 5.5)
    left, right = figure.subfigures(1, 2)

    axes = left.subplots(2, 2, width_ratios=(4, 1), height_ratios=(1, 4), sharex="col", sharey="row")
    yaw, pitch = angles[:, 0].numpy(), angles[:, 1].numpy()
    main, above, beside = axes[1, 0], axes[0, 0], axes[1, 1]
    axes[0, 1].axis("off")
    *_, shades = main.hist2d(yaw, pitch, bins=BINS, cmin=1, cmap="viridis")
    left.colorbar(shades, ax=main, location="bottom", label="images in a cell", shrink=0.7)
    main.set(xlabel="yaw (radians)", ylabel="pitch (radians, 0 is straight above)")
    main.invert_yaxis()
    above.hist(yaw, bins=BINS, density=True, label="data")
    beside.hist(pitch, bins=BINS, density=True, orientation="horizontal")
    above.set_ylabel("share a radian")
    beside.set_xlabel("share a radian")
    if camera.prior != "custom":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            prior = prior_angles(camera, 20_000).numpy()
        above.hist(
            prior[:, 0],
            bins=BINS,
            density=True,
            histtype="step",
            color="tab:red",
            label=f"prior of the preset {preset_name}",
        )
        beside.hist(prior[:, 1], bins=BINS, density=True, histtype="step", color="tab:red", orientation="horizontal")
    axes[0, 1].legend(*above.get_legend_handles_labels(), loc="center", fontsize=8, frameon=False)
    left.suptitle(f"{len(angles):,} poses of {dataset.name}")

    owner = "the data" if dataset.camera is not None else f"the preset {preset_name}"
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
    space.set(xlabel="x", ylabel="-z", zlabel="y", title=f"cameras of {owner}, the mean pose's frustum, the cube")
    space.set_aspect("equal")
    plotting.save(figure, path, dpi=110)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `epigraf data check`."""

    data: Positional[str]
    """A zip or folder of images with dataset.json, or `builtin`."""
    resolution: Annotated[int | None, whole(4, 16384), default("any")] = None
    """Pixels a side that the images must have."""
    check_labels: bool = False
    """Check the labels too, and count each class."""
    preset: Literal[tuple(PRESETS)] = "ffhq"
    """Whose camera to take, if the set stores none."""
    plot: Annotated[Path | None, optional] = None
    """The .png, .pdf or .svg to draw the poses in."""
    overwrite: Overwrite = False
    json: Json = False


def run(options: Options) -> None:
    if options.plot is not None:
        plotting.check_figure("--plot", options.plot, overwrite=options.overwrite)
    with waiting("reading dataset.json"):
        dataset = ImageDataset(options.data, options.resolution, use_labels=options.check_labels)
    dataset.check_images(Progress)
    config: Any = with_data_camera(preset(options.preset), dataset.camera)
    found = facts(dataset, config.camera, dataset.camera is not None)
    if not options.json:
        print(*report(found), sep="\n")
    if options.plot is not None:
        plot(dataset, config.camera, options.plot, options.preset)
    if options.json:
        print(json.dumps(found, indent=2))
    elif options.plot is not None:
        print(f"wrote {options.plot}")
