"""Every variant of the paper, by its flags alone, trains ten tiny steps: losses stay finite and every network moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from checks import assert_finite
from epigraf_fast.config import Config
from epigraf_fast.training.step import Trainer

STEPS = 10
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
    "modulated outputs": {"discriminator": {"modulate": "output"}},
    "full-size patches": {"patch": {"resolution": 16}},
    "uniform scales, T = 1k": {"patch": {"distribution": "uniform", "anneal_kimg": 1000.0}},
    "uniform scales, T = 5k": {"patch": {"distribution": "uniform", "anneal_kimg": 5000.0}},
    "uniform scales, T = 10k": {"patch": {"distribution": "uniform", "anneal_kimg": 10_000.0}},
    "GRAF's schedule": {"patch": {"distribution": "graf"}},
    "GNeRF's schedule": {"patch": {"distribution": "gnerf"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_ten_steps(
    name: str,
    tiny_config: Callable[..., Config],
    tiny_trainer: Callable[[Config], tuple[Trainer, Iterator]],
) -> None:
    trainer, batches = tiny_trainer(tiny_config(**VARIANTS[name]))
    networks = {"generator": trainer.generator, "discriminator": trainer.discriminator}
    before = {
        f"{which}.{key}": parameter.detach().clone()
        for which, network in networks.items()
        for key, parameter in network.named_parameters()
    }
    for _ in range(STEPS):
        trainer.iteration(*next(batches))
    for statistic, value in trainer.statistics().items():
        assert_finite(torch.tensor(value), statistic)
    for which, network in networks.items():
        for key, parameter in network.named_parameters():
            assert_finite(parameter, f"{which}.{key}")
            assert not torch.equal(parameter, before[f"{which}.{key}"]), f"{which}.{key} did not move"
