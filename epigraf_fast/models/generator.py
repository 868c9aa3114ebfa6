"""The generator: latent code and camera to an image or a patch of it, through tri-planes (paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import CameraConfig, GeneratorConfig, RendererConfig
from .decoder import Decoder
from .layers import camera_numbers
from .mapping import StyleMapping
from .renderer import Images, Renderer, render_planes
from .synthesis import Synthesis


class Generator(nn.Module):
    """mapping -> synthesis -> renderer.

    Args:
        config, renderer, camera: Settings.
        label_dim: Numbers of a class label, 0 for none.
        half_blocks: Top resolutions of the synthesis network in fp16 (on a GPU).
        backend: See `ops`.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        renderer: RendererConfig,
        camera: CameraConfig,
        *,
        label_dim: int = 0,
        half_blocks: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.z_dim, self.label_dim = config.z_dim, label_dim
        self.pose_conditioning = config.pose_conditioning
        self.camera = camera
        self.synthesis = Synthesis(
            config.w_dim,
            config.plane_resolution,
            3 * config.plane_channels,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            half_blocks=half_blocks,
            backend=backend,
        )
        self.mapping = StyleMapping(
            config.z_dim,
            label_dim + (2 if config.pose_conditioning else 0),
            config.w_dim,
            self.synthesis.num_ws,
            config.mapping_layers,
            backend=backend,
        )
        self.decoder = Decoder(config.plane_channels, config.decoder_hidden, backend=backend)
        self.renderer = Renderer(renderer, camera.ray_start, camera.ray_end, camera.cube_scale, backend=backend)
        self.register_buffer("mean_camera_pose", torch.tensor([camera.yaw_mean, camera.pitch_mean, 0.0]))

    def ws(
        self,
        z: Tensor,
        label: Tensor | None = None,
        angles: Tensor | None = None,
        **mapping_options: float | int | bool | None,
    ) -> Tensor:
        """Style vectors [B, num_ws, w_dim] of z [B, z_dim], label [B, L] and, with pose conditioning, angles [B, 3].

        No angles: the mean camera pose. Options: truncation_psi, truncation_cutoff, update_w_avg (see `StyleMapping`).
        """
        condition = []
        if self.label_dim:
            if label is None or tuple(label.shape) != (len(z), self.label_dim):
                got = None if label is None else list(label.shape)
                raise ValueError(f"Generator: label must have shape {[len(z), self.label_dim]}, got {got}")
            condition.append(label)
        if self.pose_conditioning:
            pose = self.mean_camera_pose.expand(len(z), -1) if angles is None else angles
            condition.append(camera_numbers(pose))
        return self.mapping(z, torch.cat(condition, dim=1) if condition else None, **mapping_options)

    def render(
        self,
        planes: Tensor,
        angles: Tensor,
        resolution: int,
        patch_scale: Tensor | None = None,
        patch_offset: Tensor | None = None,
        *,
        fov: float | Tensor | None = None,
        **render_options: bool | float | Tensor | None,
    ) -> Images:
        """Renders planes [B, 3*C, H, W] as full images or patches of resolution^2 pixels; see `render_planes`."""
        return render_planes(
            self.renderer,
            self.decoder,
            self.camera,
            planes,
            angles,
            resolution,
            patch_scale,
            patch_offset,
            fov=fov,
            **render_options,
        )

    def forward(
        self,
        z: Tensor,
        angles: Tensor,
        label: Tensor | None = None,
        *,
        resolution: int,
        patch_scale: Tensor | None = None,
        patch_offset: Tensor | None = None,
        conditioning_angles: Tensor | None = None,
        noise_mode: str = "random",
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_w_avg: bool = False,
        **render_options: bool | float | Tensor | None,
    ) -> Images:
        """Images or patches [B, 3, resolution, resolution] of latent codes.

        Args:
            z: [B, z_dim].
            angles: [B, 3] that the renderer sees.
            conditioning_angles: [B, 3] that the mapping sees, with pose conditioning; default: `mean_camera_pose`.
            noise_mode: "random", "const" or "none", the noise images of the synthesis network.
            render_options: See `render`.
        """
        ws = self.ws(
            z,
            label,
            conditioning_angles,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            update_w_avg=update_w_avg,
        )
        planes = self.synthesis(ws, noise_mode)
        return self.render(planes, angles, resolution, patch_scale, patch_offset, **render_options)
