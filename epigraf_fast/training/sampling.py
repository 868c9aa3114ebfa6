"""Pictures of a generator: grids, turntables and batches for metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..camera import sample_angles
from ..config import CameraConfig
from ..data import ImageDataset
from ..models.generator import Generator, Images

BATCH = 8  # images rendered at once


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


@torch.no_grad()
def render_images(
    generator: Generator, z: Tensor, label: Tensor, angles: Tensor, resolution: int, noise_mode: str = "const"
) -> Iterator[Images]:
    """Full images in batches, with evenly spaced samples; deterministic unless `noise_mode` is "random"."""
    for first in range(0, len(z), BATCH):
        part = slice(first, first + BATCH)
        yield generator(
            z[part],
            angles[part],
            label[part],
            resolution=resolution,
            conditioning_angles=angles[part],
            noise_mode=noise_mode,
            stochastic=False,
        )


def turntable_angles(frames: int, pitch: float = 1.2) -> Tensor:
    """Cameras once around at one pitch (radians, from +y): [frames, 3]."""
    yaw = torch.arange(frames) * (2 * math.pi / frames)
    return torch.stack([yaw, torch.full_like(yaw, pitch), torch.zeros_like(yaw)], dim=1)


@torch.no_grad()
def render_turntable(generator: Generator, z: Tensor, label: Tensor, frames: int, resolution: int) -> Tensor:
    """Objects seen from all around: rgb [frames, B, 3, resolution, resolution], about [-1, 1]."""
    angles = turntable_angles(frames).to(z.device)
    ws = generator.ws(z, label)
    planes = generator.synthesis(ws, noise_mode="const")
    views = [
        generator.render(planes, angle.expand(len(z), -1), resolution, ws=ws, stochastic=False).rgb for angle in angles
    ]
    return torch.stack(views)
