"""The generator: latent code and camera to an image or a patch of it, through tri-planes (paper, section 3.1)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from ..camera import Patch
from ..config import CameraConfig, GeneratorConfig, RendererConfig
from ..ops import PlaneRegion
from .background import PlaneBackground, SphereBackground
from .decoder import Decoder
from .feature_decoder import FeatureDecoder
from .layers import camera_numbers
from .mapping import StyleMapping, mix_styles
from .region import Plan, plan_of_views
from .renderer import Draws, Images, Renderer, render_planes
from .synthesis import Synthesis

LAYERS = ("both", "foreground", "background")
BACKGROUND_INTERVAL = 1e-3  # the last interval in front of a background, which shows through the last sample


class Generator(nn.Module):
    """mapping -> synthesis -> renderer.

    Args:
        config, renderer, camera: Settings.
        label_dim: Numbers of a class label, 0 for none.
        image_resolution: Of whole images, for a plane background; default: that of the planes.
        half_blocks, half_dtype, half_on: Of the synthesis network, see `Synthesis`.
        precision: Of the decoder's products, with renderer_backend triton: fp32, tf32 or fp16.
        backend, renderer_backend: Of the convolutions and of the renderer's ops, `ops.cut` among them; see `ops`.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        renderer: RendererConfig,
        camera: CameraConfig,
        *,
        label_dim: int = 0,
        image_resolution: int | None = None,
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
        self.camera, self.region = camera, config.region
        self.plane_channels = 3 * config.plane_channels
        self.background: PlaneBackground | SphereBackground | None = None
        if renderer.background == "plane":
            self.background = PlaneBackground(image_resolution or config.plane_resolution)
        if renderer.background == "sphere":
            self.background = SphereBackground(
                config.w_dim, renderer, camera, channel_base=config.channel_base, backend=renderer_backend
            )
        if self.background is not None:
            interval = min(renderer.last_interval, BACKGROUND_INTERVAL)
            white = renderer.white_background and renderer.white_foreground
            renderer = dataclasses.replace(renderer, last_interval=interval, white_background=white)
        self.synthesis = Synthesis(
            config.w_dim,
            config.plane_resolution,
            self.plane_channels + (self.background.extra_channels if self.background is not None else 0),
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            clamp=config.clamp or None,
            noise=config.noise,
            half_blocks=half_blocks,
            half_dtype=half_dtype,
            half_on=half_on,
            backend=backend,
            cut_backend=renderer_backend,
        )
        self.mapping = StyleMapping(
            config.z_dim,
            label_dim + (2 if config.pose_conditioning else 0),
            config.w_dim,
            self.synthesis.num_ws + (self.background.num_ws if self.background is not None else 0),
            config.mapping_layers,
            backend=backend,
        )
        if config.backbone == "triplane":  # an image has neither
            if config.decoder_fourier or config.view_direction:
                self.decoder = FeatureDecoder(
                    config.plane_channels,
                    config.decoder_hidden,
                    fourier=config.decoder_fourier,
                    view_direction=config.view_direction,
                    backend=renderer_backend,
                )
            else:
                self.decoder = Decoder(
                    config.plane_channels, config.decoder_hidden, precision=precision, backend=renderer_backend
                )
            self.renderer = Renderer(
                renderer, camera.ray_start, camera.ray_end, camera.cube_scale, backend=renderer_backend
            )
        self.register_buffer("mean_camera_pose", torch.tensor([camera.yaw_mean, camera.pitch_mean, 0.0]))
        self.label_values: Tensor | None = None  # what it was trained on (see ImageDataset), where that is known

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
            condition.append(nn.functional.dropout(camera_numbers(pose), self.pose_dropout, self.training))
        return self.mapping(z, torch.cat(condition, dim=1) if condition else None, **mapping_options)

    def render(
        self,
        planes: Tensor,
        angles: Tensor,
        resolution: int,
        patch: Patch | None = None,
        *,
        ws: Tensor | None = None,
        layer: str = "both",
        background_jitter: Tensor | None = None,
        fov: float | Tensor | None = None,
        **render_options: bool | float | Tensor | Draws | PlaneRegion | None,
    ) -> Images:
        """Renders planes [B, 3*C, H, W] as full images or patches of resolution^2 pixels; see `render_planes`.

        Args:
            planes: What the synthesis network gives; with a plane background, the last 3 channels are that.
            ws: [B, num_ws, w_dim], for a sphere background.
            layer: "both", or "foreground" or "background" alone. The depth is the foreground's; that of the background
                alone is its own, infinite for a plane.
            background_jitter: [B, R, S] in [0, 1) in place of fresh draws, which training mode (or `stochastic`) makes.
        """
        if layer not in LAYERS:
            raise ValueError(f"Generator: layer must be one of {', '.join(LAYERS)}, got {layer!r}")
        if self.background is None and layer == "background":
            raise ValueError('Generator: layer must be both (because there is no background), got "background"')
        if self.background is not None and layer != "foreground":
            rgb, depth = self.background(
                planes[:, self.plane_channels :],
                ws,
                angles,
                resolution,
                patch,
                fov=fov,
                stochastic=self.renderer.is_stochastic(render_options.get("stochastic")),
                jitter=background_jitter,
                with_depth=layer == "background",
            )
            if layer == "background":
                rgb = rgb.transpose(1, 2).unflatten(2, (resolution, resolution))
                depth = torch.full_like(rgb[:, :1], math.inf) if depth is None else depth.view_as(rgb[:, :1])
                return Images(rgb, depth, torch.ones_like(depth))
            render_options["background"] = rgb
        if planes.shape[1] > self.plane_channels:
            planes = planes[:, : self.plane_channels].contiguous(memory_format=torch.channels_last)
        view = (angles, resolution, patch)
        return render_planes(self.renderer, self.decoder, self.camera, planes, *view, fov=fov, **render_options)

    @property
    def takes_region(self) -> bool:
        """Whether planes may be computed in part: not if the settings forbid it, or with a background in them."""
        return self.region == "auto" and not isinstance(self.background, PlaneBackground)

    def paint(
        self,
        ws: Tensor,
        angles: Tensor,
        patch: Patch | None = None,
        *,
        fov: float | Tensor | None = None,
        noise_mode: str = "random",
    ) -> tuple[Tensor, PlaneRegion | None]:
        """Planes of style vectors [B, num_ws, w_dim], where it pays only those that one view of each object needs.

        Cameras that lie on a GPU are fetched from there.

        Returns:
            Planes, and the `region` that `render` takes with them for these cameras and patches; None: whole planes.
        """
        plan = None
        if self.takes_region:
            resolution = self.synthesis.resolutions[-1]
            plan = plan_of_views(self.camera, resolution, angles, patch, fov, ws.device)
        if plan is None:
            return self.synthesis(ws, noise_mode), None
        return self.synthesis.in_region(ws, plan, noise_mode)

    def forward(
        self,
        z: Tensor,
        angles: Tensor,
        label: Tensor | None = None,
        *,
        resolution: int,
        patch: Patch | None = None,
        conditioning_angles: Tensor | None = None,
        noise_mode: str = "random",
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_w_avg: bool = False,
        style_mixing: float = 0.0,
        with_context: bool = False,
        region: Plan | bool = False,
        **render_options: bool | float | Tensor | Draws | None,
    ) -> Images:
        """Images or patches [B, 3, resolution, resolution] of latent codes.

        Args:
            z: [B, z_dim].
            angles: [B, 3] that the renderer sees.
            conditioning_angles: [B, 3] that the mapping sees, with pose conditioning; default: `mean_camera_pose`.
            noise_mode: "random", "const" or "none", the noise images of the synthesis network.
            style_mixing: Probability of `mix_styles` with fresh latent codes.
            with_context: Appends the whole image to rgb, at the same resolution: [B, 6, resolution, resolution].
            region: Whether planes are computed only where rays look (docs/region.md), for the same images, where that
                pays: the cameras are then fetched from their device; or the plan of it. A plane background, the context
                and `GeneratorConfig.region` "off" take whole planes.
            render_options: See `render`.
        """
        options = {"truncation_psi": truncation_psi, "truncation_cutoff": truncation_cutoff}
        ws = self.ws(z, label, conditioning_angles, update_w_avg=update_w_avg, **options)
        if style_mixing:
            ws = mix_styles(ws, self.ws(torch.randn_like(z), label, conditioning_angles, **options), style_mixing)
        if with_context or not self.takes_region:
            region = False
        if region is True:
            fov = render_options.get("fov")
            planes, place = self.paint(ws, angles, patch, fov=fov, noise_mode=noise_mode)
        elif region:
            planes, place = self.synthesis.in_region(ws, region, noise_mode)
        else:
            planes, place = self.synthesis(ws, noise_mode), None
        if place is not None:
            render_options["region"] = place
        images = self.render(planes, angles, resolution, patch, ws=ws, **render_options)
        if not with_context:
            return images
        whole = self.render(planes, angles, resolution, ws=ws, **render_options)
        return images._replace(rgb=torch.cat([images.rgb, whole.rgb], dim=1))
