"""Cameras, patches, decoder, renderer and the rendering tool together: planes fitted to views of one real object.

Views that were held out come out right only if all of them agree about where a camera is and where it looks.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from epigraf_fast.camera import Patch, extract_patches
from epigraf_fast.config import Config, RendererConfig, with_data_camera
from epigraf_fast.data import ImageDataset
from epigraf_fast.models.raw_planes import RawPlanes

DATA = Path(__file__).resolve().parents[1] / "data" / "one_object.zip"
HELD_OUT = 6  # every so many views
STEPS, BATCH, PATCH, LEARNING_RATE = 150, 8, 16, 0.1
GOAL = 25.0  # dB
MARGIN = 5.0  # dB that a wrong camera must cost

RIGHT = torch.ones(3), torch.zeros(3)
# angles * factor + term
WRONG = {
    "yaw negated": (torch.tensor([-1.0, 1.0, 1.0]), torch.zeros(3)),
    "pitch counted from below": (torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.0, math.pi, 0.0])),
}


def held_out_psnr(camera_change):
    """Fits planes to patches of five views in six; dB over the others, of images in [0, 1]."""
    torch.manual_seed(0)
    dataset = ImageDataset(DATA, mirror=False)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))]).float() / 127.5 - 1
    angles = dataset.angles * camera_change[0] + camera_change[1]
    held_out = torch.arange(len(dataset)) % HELD_OUT == 0
    images, angles, images_out, angles_out = images[~held_out], angles[~held_out], images[held_out], angles[held_out]

    camera = with_data_camera(Config(), dataset.camera).camera
    renderer = RendererConfig(
        coarse_samples=12, fine_samples=12, density_shift=-1.0, last_interval=1e-3, white_background=True
    )
    model = RawPlanes(48, 8, 16, renderer, camera)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    smallest = (PATCH - 1) / (dataset.resolution - 1)  # at which the patch's pixels are the image's
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2 - 2 * step / STEPS)
        view = torch.randint(len(images), (BATCH,))
        scale = smallest + (1 - smallest) * torch.rand(BATCH)
        offset = torch.rand(BATCH, 2) * (1 - scale)[:, None]
        patch = Patch(scale, offset)
        target = extract_patches(images[view], patch, PATCH)
        loss = (model(angles[view], PATCH, patch).rgb - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        rgb = model.eval()(angles_out, dataset.resolution).rgb
    error = ((rgb.clamp(-1, 1) - images_out) / 2).square().mean()
    return -10 * math.log10(error.item())


@pytest.fixture(scope="module")
def right_psnr():
    return held_out_psnr(RIGHT)


def test_held_out_views_are_predicted(right_psnr):
    assert right_psnr >= GOAL, f"{right_psnr:.2f} dB on held-out views, expected at least {GOAL}"


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_camera_is_noticed(right_psnr, mistake):
    psnr = held_out_psnr(WRONG[mistake])
    assert psnr < min(GOAL, right_psnr - MARGIN), (
        f"{mistake}: {psnr:.2f} dB, and {right_psnr:.2f} dB with the right one"
    )
