"""A whole training step at full size: 512^2 planes, 64x64 patches, 48 + 48 samples, a micro-batch of 1. 3.3 GB."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch

from checks import assert_finite, draw, draw_uniform
from epigraf_fast.config import check, preset
from epigraf_fast.training.memory import parameter_count
from epigraf_fast.training.step import Trainer


def test_a_training_step_of_the_ffhq_preset():
    torch.manual_seed(0)
    config = dataclasses.replace(preset("ffhq"), batch=1)
    check(config)
    level = torch.tensor([0.0, math.pi / 2, 0.0])
    angles = 0.3 * draw(8, 3, dtype=torch.float32) + level
    dataset = SimpleNamespace(
        labels=torch.zeros(8, 0), label_values=None, angles=angles, label_dim=0, mean_camera_pose=level
    )
    trainer = Trainer(config, dataset, torch.device("cpu"))
    assert parameter_count(trainer.generator) == 29_247_187
    assert parameter_count(trainer.discriminator) == 27_495_168
    before = {name: p.detach().clone() for name, p in trainer.generator.decoder.named_parameters()}
    image = (255 * draw_uniform(1, 3, 512, 512)).byte()
    trainer.iteration(image, torch.zeros(1, 0), angles[:1])
    statistics = trainer.statistics()
    assert {"loss/G", "loss/D", "loss/R1"} <= statistics.keys()
    assert all(math.isfinite(value) for value in statistics.values()), statistics
    for name, p in [*trainer.generator.named_parameters(), *trainer.discriminator.named_parameters()]:
        assert_finite(p, name)
    for name, p in trainer.generator.decoder.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} did not move"
    assert trainer.cur_nimg == 1
