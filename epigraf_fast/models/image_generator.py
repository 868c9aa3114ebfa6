"""The 2D baseline: StyleGAN2 paints the image itself, and patches are cut from it (paper, Table 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..camera import Patch, extract_patches
from ..config import CameraConfig, GeneratorConfig, RendererConfig
from .generator import Generator
from .mapping import StyleMapping
from .renderer import Draws, Images
from .synthesis import Synthesis


class ImageGenerator(nn.Module):
    """mapping -> synthesis, with the interface of `Generator`; it has no third dimension, so no depth, and no renderer.

    Args:
        config, camera: Settings; those of planes and decoder do nothing, nor do `precision` and `renderer_backend`.
        label_dim, half_blocks, half_dtype, half_on, backend: As `Generator`.
        image_resolution: Of whole images.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        renderer: RendererConfig,
        camera: CameraConfig,
        *,
        label_dim: int = 0,
        image_resolution: int,
        half_blocks: int = 0,
        half_dtype: torch.dtype = torch.float16,
        half_on: tuple[str, ...] = ("cuda",),
        precision: str = "fp32",
        backend: str | None = None,
        renderer_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.z_dim, self.label_dim = config.z_dim, label_dim
        self.pose_conditioning, self.pose_dropout = config.pose_conditioning, config.pose_dropout
        self.synthesis = Synthesis(
            config.w_dim,
            image_resolution,
            3,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            clamp=config.clamp or None,
            noise=config.noise,
            half_blocks=half_blocks,
            half_dtype=half_dtype,
            half_on=half_on,
            backend=backend,
        )
        self.mapping = StyleMapping(
            config.z_dim,
            label_dim + (2 if config.pose_conditioning else 0),
            config.w_dim,
            self.synthesis.num_ws,
            config.mapping_layers,
        )
        self.register_buffer("mean_camera_pose", torch.tensor([camera.yaw_mean, camera.pitch_mean, 0.0]))
        self.label_values: Tensor | None = None  # what it was trained on (see ImageDataset), where that is known

    takes_region = False

    # Conditions and style vectors are those of the generator of planes, and so is the way from latent code to image.
    ws = Generator.ws
    forward = Generator.forward
    paint = Generator.paint

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


def generator_class(config: GeneratorConfig) -> type[Generator] | type[ImageGenerator]:
    """The generator that the settings ask for; both are built alike."""
    return ImageGenerator if config.backbone == "image" else Generator
