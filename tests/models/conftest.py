"""Tiny networks that the tests of the models share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from checks import GRADCHECK_STEP, assert_close, draw
from epigraf_fast.config import CameraConfig, DiscriminatorConfig, GeneratorConfig, RendererConfig
from epigraf_fast.models.discriminator import Discriminator
from epigraf_fast.models.generator import Generator

TINY_GENERATOR = GeneratorConfig(
    z_dim=6, w_dim=8, plane_resolution=16, plane_channels=3, channel_base=64, channel_max=8, decoder_hidden=5
)
TINY_RENDERER = RendererConfig(coarse_samples=6, fine_samples=5)
TINY_DISCRIMINATOR = DiscriminatorConfig(channel_base=128, channel_max=8, code_dim=6, patch_table_dim=4)
CAMERA = CameraConfig(fov=30.0, radius=8.0, ray_start=6.0, ray_end=10.0, cube_scale=3.8)  # as the demo


@pytest.fixture
def tiny_generator():
    """A function that makes a generator in float64, from settings that replace the tiny ones."""

    def make(*, label_dim=0, renderer=None, dtype=torch.float64, **settings):
        torch.manual_seed(0)
        renderer = dataclasses.replace(TINY_RENDERER, **(renderer or {}))
        config = dataclasses.replace(TINY_GENERATOR, **settings)
        return Generator(config, renderer, CAMERA, label_dim=label_dim).to(dtype)

    return make


@pytest.fixture
def tiny_discriminator():
    """A function that makes a discriminator of 8x8 patches of 16x16 images in float64 (leading block, last block)."""

    def make(*, label_dim=0, resolution=16, patch_resolution=8, dtype=torch.float64, backend=None, **settings):
        torch.manual_seed(0)
        config = dataclasses.replace(TINY_DISCRIMINATOR, **settings)
        return Discriminator(config, resolution, patch_resolution, label_dim=label_dim, backend=backend).to(dtype)

    return make


@pytest.fixture
def assert_directional_derivative():
    """A function that compares a number's gradients to parameters, each along one direction, with differences."""

    def check(function, parameters, step=GRADCHECK_STEP):
        gradients = torch.autograd.grad(function(), list(parameters.values()), materialize_grads=True)
        for i, ((name, p), gradient) in enumerate(zip(parameters.items(), gradients, strict=True)):
            direction = draw(*p.shape, seed=1000 + i)
            original = p.detach().clone()
            length = step * max(1.0, original.abs().max().item())  # raw weights may be of order 100
            values = []
            for sign in (1, -1):
                p.data.copy_(original + sign * length * direction)
                values.append(function().detach())
            p.data.copy_(original)
            expected = (values[0] - values[1]) / (2 * length)
            assert_close((gradient * direction).sum(), expected, f"derivative to {name}", "gradcheck")

    return check
