"""Every variant of the paper, by its flags alone, trains ten tiny steps: losses stay finite and every network moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import assert_finite
from epigraf_fast.config import Config
from epigraf_fast.training.step import Trainer

STEPS = 5  # R1 in the first and the last
# Images of 32 pixels, so that patches of 8 reach the scale 0.25, which they may from 40 images on.
LARGE: dict[str, Any] = {"resolution": 32, "patch": {"anneal_kimg": 0.04}}
FLAT: dict[str, Any] = {"generator": {"backbone": "image", "style_mixing": 0.9}}
VARIANTS: dict[str, dict[str, Any]] = {
    "ADA": {"augment": {"mode": "ada"}},
    "fixed augmentation": {"augment": {"mode": "fixed", "p": 0.5}},
    "sphere background": {"renderer": {"background": "sphere", "background_samples": 4}},
    "plane background": {"renderer": {"background": "plane"}},
    "no conditioning": {
        "generator": {"pose_conditioning": False},
        "discriminator": {"camera_conditioning": False},
        "loader": {"labels": False},
    },
    "standard discriminator": {"discriminator": {"modulate": "none"}},
    "scale without position": {"discriminator": {"patch_position": False}},
    "modulated outputs": {"discriminator": {"modulate": "output"}},
    "2 scale-specific discriminators": {**LARGE, "discriminator": {"scales": 2}},
    "4 scale-specific discriminators": {**LARGE, "discriminator": {"scales": 4}},
    "larger patches": {"patch": {"resolution": 16}},
    "uniform scales, T = 10k": {"patch": {"distribution": "uniform", "anneal_kimg": 10_000.0}},
    "GRAF's schedule": {"patch": {"distribution": "graf"}},
    "GNeRF's schedule": {"patch": {"distribution": "gnerf"}},
    "2D generator, patches": {**FLAT},
    "2D generator, whole images": {**FLAT, "patch": {"resolution": 16}},
    "2D generator, path length": {**FLAT, "optim": {"path_length_weight": 2.0, "g_lr": 0.002, "blur_sigma": 0.0}},
    "global context": {"discriminator": {"global_context": "concat"}, "augment": {"mode": "fixed", "p": 0.5}},
    "global context, pasted": {"discriminator": {"global_context": "paste"}, "augment": {"mode": "fixed", "p": 0.5}},
    "patch embedding of fewer sines": {
        "discriminator": {"patch_cosines": False, "patch_skip_lowest": 1, "patch_skip_highest": 2}
    },
    "patch importance": {"patch": {"importance": 8}},
    "Fourier features": {"generator": {"decoder_fourier": 8}},
    "view direction": {"generator": {"view_direction": True}},
    "no clamps": {"generator": {"clamp": 0.0}, "discriminator": {"clamp": 0.0}},
    "pose dropout": {"generator": {"pose_dropout": 0.5}},
    "sphere of relu, white in front too": {
        "renderer": {
            "background": "sphere",
            "background_samples": 4,
            "white_foreground": True,
            "density_activation": "relu",
        }
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_few_steps(
    name: str,
    tiny_config: Callable[..., Config],
    tiny_trainer: Callable[[Config], tuple[Trainer, Iterator]],
    write_data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = tiny_config(**VARIANTS[name])
    if config.resolution != 16:
        data = write_data(tmp_path / "large.zip", resolution=config.resolution)
        config = dataclasses.replace(config, data=str(data))
    trainer, batches = tiny_trainer(config)
    networks = {"generator": trainer.generator, "discriminator": trainer.discriminator}
    before = {
        f"{which}.{key}": parameter.detach().clone()
        for which, network in networks.items()
        for key, parameter in network.named_parameters()
    }
    for _ in range(STEPS if config.discriminator.scales == 1 else 2 * STEPS):  # each of them has its turn
        trainer.iteration(*next(batches))
    for statistic, value in trainer.statistics().items():
        assert_finite(torch.tensor(value), statistic)
    for which, network in networks.items():
        for key, parameter in network.named_parameters():
            assert_finite(parameter, f"{which}.{key}")
            assert not torch.equal(parameter, before[f"{which}.{key}"]), f"{which}.{key} did not move"
