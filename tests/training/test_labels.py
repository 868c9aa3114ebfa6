"""Class-conditional training: what the generator paints for a class is of that class."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from epigraf_fast.config import Config
from epigraf_fast.training.step import Trainer

STEPS = 160


def one_colour_a_class(files: dict[str, bytes], metadata: dict[str, Any]) -> None:
    """Class 0 is red, 1 green, 2 blue."""
    for name, label in metadata["labels"]:
        image = np.full((16, 16, 3), 40, np.uint8)
        image[..., label] = 220
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "png")
        files[name] = buffer.getvalue()


def test_each_class_gets_its_colour(
    tiny_config: Callable[..., Config],
    tiny_trainer: Callable[[Config], tuple[Trainer, Iterator]],
    write_data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = tiny_config(
        data=str(write_data(tmp_path / "colours.zip", edit=one_colour_a_class)),
        seed=1,
        generator={"pose_conditioning": False},
        discriminator={"camera_conditioning": False},
        renderer={"white_background": False, "density_noise": 0.0},
        optim={"g_lr": 0.005, "d_lr": 0.004, "r1_gamma": 0.1, "blur_sigma": 0.0, "ema_kimg": 0.05},
    )
    trainer, batches = tiny_trainer(config)
    for _ in range(STEPS):
        trainer.iteration(*next(batches))
    generator = trainer.average.eval()
    z = torch.randn(8, config.generator.z_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        colours = torch.stack(
            [
                generator(z, trainer.angles[:8], label.expand(8, 3), resolution=8).rgb.mean(dim=(0, 2, 3))
                for label in torch.eye(3)
            ]
        )
    assert colours.argmax(dim=1).tolist() == [0, 1, 2], colours
    assert colours.argmax(dim=0).tolist() == [0, 1, 2], colours
