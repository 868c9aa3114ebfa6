"""The volume renderer: rays through tri-planes, sampled coarse to fine, to colour and depth (paper, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..camera import Patch, cam2world_matrix, camera_rays
from ..config import CameraConfig, RendererConfig
from ..ops.checks import assert_in_region, is_debugging
from .decoder import Decoder

EVALUATION_CHUNK = 2**18  # samples in flight when a full image is rendered without gradients


class Rendering(NamedTuple):
    """What the renderer gives, per ray."""

    rgb: Tensor  # [B, R, 3]
    depth: Tensor  # [B, R] sum of w t, world units; not normalized
    weight_sum: Tensor  # [B, R] opacity
    final_transmittance: Tensor  # [B, R]


class Images(NamedTuple):
    """Rendered images."""

    rgb: Tensor  # [B, 3, H, W], about [-1, 1]
    depth: Tensor  # [B, 1, H, W] sum of w t, world units; not normalized
    weight_sum: Tensor  # [B, 1, H, W] opacity


class Draws(NamedTuple):
    """Random numbers for B images of R rays, each of S coarse and K importance samples; what is None is drawn."""

    jitter: Tensor | None = None  # [B, R, S] in [0, 1), places of the coarse samples in their strata
    u: Tensor | None = None  # [B, R, K] in [0, 1), of the importance samples
    coarse_noise: Tensor | None = None  # [B, R, S] standard normal, on the density that importance samples follow
    fine_noise: Tensor | None = None  # [B, R, S + K] standard normal, on the density that is integrated
    seed: Tensor | None = None  # [1] int64 on the device, what backend triton draws from; None: a fresh one

    def of_rays(self, rays: slice) -> Draws:
        """Those of some rays, with a seed of their own."""
        *given, seed = self
        seed = seed + rays.start if rays.start and seed is not None else seed
        return Draws(*(None if x is None else x[:, rays] for x in given), seed)


FRESH = Draws()


class Renderer(nn.Module):
    """Coarse samples, importance samples, and one integration over both.

    Args:
        config: Sample counts and the density's settings.
        ray_start, ray_end: Along unit rays, world units.
        cube_scale: Half size of the cube that the planes span, world units.
        backend: See `ops`.
    """

    def __init__(
        self,
        config: RendererConfig,
        ray_start: float,
        ray_end: float,
        cube_scale: float,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.ray_start, self.ray_end, self.cube_scale = ray_start, ray_end, cube_scale

    def is_stochastic(self, asked: bool | None = None) -> bool:
        """Whether samples are drawn: what a call asks for, else in training mode, if the config has it."""
        return self.training and self.config.stochastic if asked is None else asked

    def forward(
        self,
        planes: Tensor,
        decoder: Decoder,
        ray_origins: Tensor,
        ray_directions: Tensor,
        *,
        region: ops.PlaneRegion | None = None,
        stochastic: bool | None = None,
        density_noise_std: float | Tensor = 0.0,
        draws: Draws = FRESH,
        background: Tensor | None = None,
    ) -> Rendering:
        """Renders rays.

        With backend triton: five launches forward and two or three backward, for any number of images and rays.

        Args:
            planes: [B, 3*C, H, W].
            ray_origins, ray_directions: [B, R, 3].
            region: Where the planes lie in whole ones, see `ops.sample_triplane`.
            stochastic: Jitter and random importance samples; default: in training mode, if the config has it. False
                takes the evenly spaced coarse depths and u = k / (K - 1).
            density_noise_std: Of the noise on raw densities, 0 for none; a tensor always adds noise.
            draws: In place of fresh ones.
            background: [B, R, 3], what the rays see behind the planes.
        """
        config, (batch, rays), device = self.config, ray_origins.shape[:2], ray_origins.device
        jitter, u, coarse_noise, fine_noise, seed = draws
        stochastic = self.is_stochastic(stochastic)
        noisy = isinstance(density_noise_std, Tensor) or density_noise_std > 0
        composite = ops.backends.resolve("composite", self.backend, device.type)
        triton, merges = composite == "triton", composite in ("triton", "cpu")
        importance = ops.backends.resolve("sample_importance", self.backend, device.type) == "triton"
        draws_samples = stochastic and (jitter is None or u is None)
        draws_noise = noisy and (coarse_noise is None or fine_noise is None)
        if (triton or importance) and seed is None and (draws_samples or draws_noise):
            seed = ops.draw_seed(device)  # one for all
        source = {"seed": seed if importance or not triton else None, "backend": self.backend}
        t = ops.sample_stratified(
            batch,
            rays,
            config.coarse_samples,
            self.ray_start,
            self.ray_end,
            stochastic=stochastic,
            jitter=jitter if stochastic else None,
            dtype=ray_origins.dtype,
            device=device,
            **source,
        )

        def resample(coarse: Tensor) -> Tensor:
            raw_density = coarse[..., -1]
            if noisy and coarse_noise is not None:
                raw_density = raw_density + density_noise_std * coarse_noise
            return ops.sample_importance(
                t,
                raw_density,
                u,
                samples=None if u is not None else config.fine_samples,
                stochastic=stochastic,
                noise_std=density_noise_std if coarse_noise is None else 0.0,
                sorted=merges,  # such a composite merges two sets, each sorted; the others sort both together
                t_sorted=True,
                **config.density,
                **source,
            )

        samples = planes, ray_origins, ray_directions, t
        t_fine = fine = None
        if config.fine_samples:
            coarse, t_fine, fine = decoder.coarse_to_fine(*samples, resample, self.cube_scale, region)
        else:
            coarse = decoder(*samples, self.cube_scale, region)
        if region is not None and is_debugging():
            for depths in (t, t_fine) if config.fine_samples else (t,):
                points = ray_origins[:, :, None] + depths[..., None] * ray_directions[:, :, None]
                assert_in_region("Renderer", points.flatten(1, 2) / self.cube_scale, region, planes.shape[2:])
        result = ops.composite(
            t,
            coarse,
            t_fine,
            fine,
            density_noise=density_noise_std * fine_noise if noisy and fine_noise is not None else None,
            noise_std=density_noise_std if fine_noise is None else 0.0,
            white_background=config.white_background,
            last_back=config.last_back,
            background=background,
            t_sorted=merges or t_fine is None,
            seed=seed if triton or not importance else None,
            backend=self.backend,
            **config.density,
        )
        return Rendering(result.rgb, result.depth, result.weight_sum, result.final_transmittance)


def render_planes(
    renderer: Renderer,
    decoder: Decoder,
    camera: CameraConfig,
    planes: Tensor,
    angles: Tensor,
    resolution: int,
    patch: Patch | None = None,
    *,
    fov: float | Tensor | None = None,
    draws: Draws = FRESH,
    **render_options: bool | float | Tensor | ops.PlaneRegion | None,
) -> Images:
    """Renders planes from cameras, as full images or patches of resolution^2 pixels.

    In evaluation mode without gradients the rays go through in chunks, so that memory stays bounded at any resolution.

    Args:
        planes: [B, 3*C, H, W].
        angles: [B, 3] radians.
        patch: None for the whole image.
        fov: Degrees, a number or [B]; default: the camera's.
        draws, render_options: See `Renderer.forward`.
    """
    fov = camera.fov if fov is None else fov
    rays = camera_rays(cam2world_matrix(angles, camera.radius), fov, resolution, patch)
    num_rays = resolution**2
    chunk = num_rays
    if not torch.is_grad_enabled() and not renderer.training:
        samples = renderer.config.coarse_samples + renderer.config.fine_samples
        chunk = max(1, EVALUATION_CHUNK // (len(planes) * samples))
    parts = []
    for first in range(0, num_rays, chunk):
        part = slice(first, first + chunk)
        options = {**render_options, "draws": draws.of_rays(part)}
        if options.get("background") is not None:
            options["background"] = options["background"][:, part]
        parts.append(renderer(planes, decoder, rays[0][:, part], rays[1][:, part], **options))
    whole = Rendering(*(torch.cat(x, dim=1) for x in zip(*parts, strict=True))) if len(parts) > 1 else parts[0]
    size = (resolution, resolution)
    return Images(
        whole.rgb.transpose(1, 2).unflatten(2, size),
        whole.depth[:, None].unflatten(2, size),
        whole.weight_sum[:, None].unflatten(2, size),
    )
