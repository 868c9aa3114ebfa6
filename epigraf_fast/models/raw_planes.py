"""Tri-planes without a network behind them: scene fitting, and a test bed of cameras, renderer and decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..camera import Patch
from ..config import CameraConfig, RendererConfig
from .decoder import Decoder
from .renderer import Draws, Images, Renderer, render_planes


class RawPlanes(nn.Module):
    """The planes themselves are the parameters, N(0, 1) at first; one decoder serves all scenes.

    Args:
        plane_resolution: H = W of the planes.
        channels: C, features of one plane.
        hidden: Width of the decoder.
        renderer, camera: Settings.
        num_scenes: Sets of planes.
        precision: Of the decoder's products, with backend triton: fp32, tf32 or fp16.
        backend: See `ops`.
    """

    def __init__(
        self,
        plane_resolution: int,
        channels: int,
        hidden: int,
        renderer: RendererConfig,
        camera: CameraConfig,
        *,
        num_scenes: int = 1,
        precision: str = "fp32",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.camera = camera
        planes = torch.randn(num_scenes, 3 * channels, plane_resolution, plane_resolution)
        self.planes = nn.Parameter(planes.contiguous(memory_format=torch.channels_last))
        self.decoder = Decoder(channels, hidden, precision=precision, backend=backend)
        self.renderer = Renderer(renderer, camera.ray_start, camera.ray_end, camera.cube_scale, backend=backend)

    def forward(
        self,
        angles: Tensor,
        resolution: int,
        patch: Patch | None = None,
        *,
        scenes: Tensor | None = None,
        **render_options: bool | float | Tensor | Draws | None,
    ) -> Images:
        """Images or patches [B, 3, resolution, resolution].

        Args:
            angles: [B, 3] radians.
            scenes: [B] integers, the scene that each camera sees; default: the only one, or, of B scenes, its own.
            render_options: See `render_planes`.
        """
        if scenes is None and len(self.planes) not in (1, len(angles)):
            raise ValueError(
                f"RawPlanes: scenes must be given ({len(self.planes)} scenes, {len(angles)} cameras), got None"
            )
        planes = self.planes.expand(len(angles), -1, -1, -1) if scenes is None else self.planes[scenes]
        return render_planes(
            self.renderer,
            self.decoder,
            self.camera,
            planes,
            angles,
            resolution,
            patch,
            **render_options,
        )
