"""Pictures of a generator: grids, turntables and batches for metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..camera import sample_angles
from ..config import CameraConfig
from ..data import ImageDataset
from ..errors import UserError
from ..models.generator import Generator, Images
from .progress import progress

BATCH = 8  # images rendered at once
THREE_QUARTER = (0.6, 1.15, 0.0)  # radians


def prior_angles(
    camera: CameraConfig, num: int, *, draws: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """`sample_angles` from the prior that the settings describe: [num, 3] radians."""
    return sample_angles(
        num,
        camera.prior,
        yaw_mean=camera.yaw_mean,
        yaw_spread=camera.yaw_spread,
        pitch_mean=camera.pitch_mean,
        pitch_spread=camera.pitch_spread,
        draws=draws,
        device=device,
    )


def fixed_latents(
    num: int, generator: Generator, dataset: ImageDataset, camera: CameraConfig, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """z [num, z_dim], label [num, L] and angles [num, 3] that depend on the seed alone, on the generator's device.

    Labels (and poses, with the custom prior) are those of random entries of the data set.
    """
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(num, generator.z_dim, generator=rng)
    entry = torch.randint(len(dataset), (num,), generator=rng)
    if camera.prior == "custom":
        angles = dataset.angles[entry]
    else:
        if camera.prior in ("uniform", "spherical_uniform"):
            draws = torch.rand(num, 2, generator=rng)
        else:
            shape = (num, 2, 4) if camera.prior == "truncated_gaussian" else (num, 2)
            draws = torch.randn(shape, generator=rng)
        angles = prior_angles(camera, num, draws=draws)
    device = generator.mean_camera_pose.device
    return z.to(device), dataset.labels[entry].to(device), angles.to(device)


def known_labels(generator: Generator) -> Tensor:
    """The classes [K] or vectors [K, L] that a generator was trained on; all classes, if it does not know."""
    return torch.arange(generator.label_dim) if generator.label_values is None else generator.label_values


def latents_of_seeds(generator: Generator, seeds: Sequence[int], classes: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """z [num, z_dim] and label [num, L], one a seed, on the generator's device.

    Args:
        classes: Taken in turn; default: seed modulo the classes that had images, or the vectors of labels that the
            generator was trained on. Without labels: not looked at.

    Raises:
        UserError: A class that the generator has not.
    """
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.stack([torch.randn(generator.z_dim, generator=rng) for rng in rngs])
    device, count = generator.mean_camera_pose.device, generator.label_dim
    known = known_labels(generator)
    if not count:
        label = torch.zeros(len(seeds), 0)
    elif not classes:
        label = known[[seed % len(known) for seed in seeds]]  # classes, or vectors
    elif known.ndim > 1:
        raise UserError("the generator was trained on vectors of labels: it has no classes to choose from")
    else:
        wrong = next((number for number in classes if not 0 <= number < count), None)
        if wrong is not None:
            raise UserError(f"label must be a class from 0 to {count - 1}, got {wrong}")
        label = torch.tensor([classes[i % len(classes)] for i in range(len(seeds))])
    return z.to(device), (F.one_hot(label, count).float() if label.ndim == 1 else label).to(device)


def surface_depth(images: Images, ray_end: float) -> Tensor:
    """Depth along the ray [B, 1, H, W], world units; what is transparent lies at the far end, not at depth 0."""
    return images.depth + (1 - images.weight_sum) * ray_end


@torch.no_grad()
def render_images(
    generator: Generator, z: Tensor, label: Tensor, angles: Tensor, resolution: int, noise_mode: str = "const"
) -> Iterator[Images]:
    """Full images in batches, with evenly spaced samples; deterministic unless `noise_mode` is "random".

    One view of each object: planes are computed only where its rays look.
    """
    for first in range(0, len(z), BATCH):
        part = slice(first, first + BATCH)
        yield generator(
            z[part],
            angles[part],
            label[part],
            resolution=resolution,
            conditioning_angles=angles[part],
            noise_mode=noise_mode,
            region=True,
            stochastic=False,
        )


def showing_pose(generator: Generator) -> Tensor:
    """The pose [3] that shows an object best, on the CPU: three-quarter from above where objects are seen from all
    around, whose mean pose is but front on; else the mean pose."""
    if generator.camera.prior == "spherical_uniform":
        return torch.tensor(THREE_QUARTER)
    return generator.mean_camera_pose.cpu().clone()


def turntable_angles(frames: int, pitch: float = 1.2) -> Tensor:
    """Cameras once around at one pitch (radians, from +y): [frames, 3]."""
    yaw = torch.arange(frames) * (2 * math.pi / frames)
    return torch.stack([yaw, torch.full_like(yaw, pitch), torch.zeros_like(yaw)], dim=1)


def circle_angles(frames: int, centre: Tensor, yaw: float, pitch: float) -> Tensor:
    """Cameras on an ellipse around a pose [3], of half axes yaw and pitch (radians): [frames, 3]."""
    phase = torch.arange(frames) * (2 * math.pi / frames)
    return centre.cpu() + torch.stack([yaw * phase.sin(), pitch * phase.cos(), torch.zeros_like(phase)], dim=1)


@torch.no_grad()
def render_turntable(generator: Generator, z: Tensor, label: Tensor, frames: int, resolution: int) -> Tensor:
    """Objects seen from all around: rgb [frames, B, 3, resolution, resolution], about [-1, 1]."""
    angles = turntable_angles(frames).to(z.device)
    ws = generator.ws(z, label)
    planes = generator.synthesis(ws, noise_mode="const")
    views = [
        generator.render(planes, angle.expand(len(z), -1), resolution, ws=ws, stochastic=False).rgb
        for angle in progress(angles, frames, "drawing the turntable")
    ]
    return torch.stack(views)
