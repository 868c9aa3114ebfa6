"""The 2D baseline: StyleGAN2 paints the image itself, and patches are cut from it (paper, Table 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..camera import Patch, extract_patches
from ..config import CameraConfig, GeneratorConfig, RendererConfig
from .generator import Generator
from .renderer import Draws, Images


class ImageGenerator(Generator):
    """mapping -> synthesis: red, green and blue are three planes of one channel; no depth, and no renderer.

    Args:
        config, camera: Settings; those of planes and decoder do nothing, nor do `renderer` and `precision`.
        image_resolution: Of whole images.
        options: See `Generator`.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        renderer: RendererConfig,
        camera: CameraConfig,
        *,
        image_resolution: int,
        **options: Any,
    ) -> None:
        config = dataclasses.replace(
            config, backbone="image", plane_resolution=image_resolution, plane_channels=1, region="off"
        )
        super().__init__(config, RendererConfig(), camera, **options)

    def render(
        self,
        planes: Tensor,
        angles: Tensor,
        resolution: int,
        patch: Patch | None = None,
        **render_options: bool | float | Tensor | Draws | None,
    ) -> Images:
        """Cuts patches from the images [B, 3, R, R] that the synthesis network gave; depth is 0, opacity 1.

        Without a patch the image is resampled where the resolution is another (bilinear, corner-aligned). Cameras and
        render options do nothing.
        """
        if patch is None and resolution != planes.shape[2]:
            patch = Patch.whole(planes)
        rgb = planes if patch is None else extract_patches(planes, patch, resolution)
        return Images(rgb, torch.zeros_like(rgb[:, :1]), torch.ones_like(rgb[:, :1]))


def generator_class(config: GeneratorConfig) -> type[Generator]:
    """The generator that the settings ask for; both are built alike."""
    return ImageGenerator if config.backbone == "image" else Generator
