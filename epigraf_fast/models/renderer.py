"""The volume renderer: rays through tri-planes, sampled coarse to fine, to colour and depth (paper, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..camera import cam2world_matrix, camera_rays
from ..config import CameraConfig, RendererConfig
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


def stratified_t(ray_start: float, ray_end: float, samples: int, jitter: Tensor) -> Tensor:
    """Depths evenly spaced in [ray_start, ray_end], ends included, each moved inside its stratum.

    A stratum reaches to the midpoints with the neighbours; the first begins and the last ends at its depth.

    Args:
        jitter: [..., samples] in [0, 1).

    Returns:
        [..., samples], sorted.
    """
    t = torch.linspace(ray_start, ray_end, samples, dtype=jitter.dtype, device=jitter.device)
    middle = (t[1:] + t[:-1]) / 2
    low, high = torch.cat([t[:1], middle]), torch.cat([middle, t[-1:]])
    return low + (high - low) * jitter


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

    def forward(
        self,
        planes: Tensor,
        decoder: Decoder,
        ray_origins: Tensor,
        ray_directions: Tensor,
        *,
        stochastic: bool | None = None,
        density_noise_std: float | Tensor = 0.0,
        jitter: Tensor | None = None,
        u: Tensor | None = None,
        coarse_noise: Tensor | None = None,
        fine_noise: Tensor | None = None,
        background: Tensor | None = None,
    ) -> Rendering:
        """Renders rays.

        Args:
            planes: [B, 3*C, H, W].
            ray_origins, ray_directions: [B, R, 3].
            stochastic: Jitter and random importance samples; default: in training mode. False takes the evenly spaced
                coarse depths and u = k / (K - 1).
            density_noise_std: Of the noise on raw densities, 0 for none; a tensor always adds noise.
            jitter: [B, R, S] in [0, 1) in place of fresh draws.
            u: [B, R, K] in [0, 1) in place of fresh draws.
            coarse_noise, fine_noise: Standard normal [B, R, S], [B, R, S + K], in place of fresh draws.
            background: [B, R, 3], what the rays see behind the planes.
        """
        config, shape, device = self.config, ray_origins.shape[:2], ray_origins.device
        stochastic = self.training if stochastic is None else stochastic
        samples = config.coarse_samples
        density = {
            "activation": config.density_activation,
            "softplus_beta": config.softplus_beta,
            "density_shift": config.density_shift,
            "last_interval": config.last_interval,
            "backend": self.backend,
        }
        if stochastic:
            jitter = torch.rand(*shape, samples, dtype=ray_origins.dtype, device=device) if jitter is None else jitter
            t = stratified_t(self.ray_start, self.ray_end, samples, jitter)
        else:
            t = torch.linspace(self.ray_start, self.ray_end, samples, dtype=ray_origins.dtype, device=device)
            t = t.expand(*shape, -1)
        coarse = decoder(planes, ray_origins, ray_directions, t, self.cube_scale)  # [B, R, S, 4]
        noisy = isinstance(density_noise_std, Tensor) or density_noise_std > 0

        t_fine = fine = None
        if config.fine_samples:
            raw_density = coarse[..., -1].detach()
            if noisy:
                draw = torch.randn_like(raw_density) if coarse_noise is None else coarse_noise
                raw_density = raw_density + density_noise_std * draw
            if u is None:
                u_shape = (*shape, config.fine_samples)
                if stochastic:
                    u = torch.rand(u_shape, dtype=t.dtype, device=device)
                else:
                    u = torch.linspace(0, 1, config.fine_samples, dtype=t.dtype, device=device).expand(u_shape)
            t_fine = ops.sample_importance(t, raw_density, u, **density)
            fine = decoder(planes, ray_origins, ray_directions, t_fine, self.cube_scale)

        noise = None
        if noisy:
            noise_shape = (*shape, samples + config.fine_samples)
            draw = torch.randn(noise_shape, dtype=t.dtype, device=device) if fine_noise is None else fine_noise
            noise = density_noise_std * draw
        result = ops.composite(
            t,
            coarse,
            t_fine,
            fine,
            density_noise=noise,
            white_background=config.white_background,
            last_back=config.last_back,
            background=background,
            **density,
        )
        return Rendering(result.rgb, result.depth, result.weight_sum, result.final_transmittance)


def render_planes(
    renderer: Renderer,
    decoder: Decoder,
    camera: CameraConfig,
    planes: Tensor,
    angles: Tensor,
    resolution: int,
    patch_scale: Tensor | None = None,
    patch_offset: Tensor | None = None,
    *,
    fov: float | Tensor | None = None,
    **render_options: bool | float | Tensor | None,
) -> Images:
    """Renders planes from cameras, as full images or patches of resolution^2 pixels.

    In evaluation mode without gradients the rays go through in chunks, so that memory stays bounded at any resolution.

    Args:
        planes: [B, 3*C, H, W].
        angles: [B, 3] radians.
        patch_scale, patch_offset: [B], [B, 2], or None for the whole image.
        fov: Degrees, a number or [B]; default: the camera's.
        render_options: See `Renderer.forward`.
    """
    fov = camera.fov if fov is None else fov
    rays = camera_rays(cam2world_matrix(angles, camera.radius), fov, resolution, patch_scale, patch_offset)
    num_rays = resolution**2
    chunk = num_rays
    if not torch.is_grad_enabled() and not renderer.training:
        samples = renderer.config.coarse_samples + renderer.config.fine_samples
        chunk = max(1, EVALUATION_CHUNK // (len(planes) * samples))
    parts = []
    for first in range(0, num_rays, chunk):
        part = slice(first, first + chunk)
        # Draws that were handed in are per ray, and are cut with the rays.
        options = {k: v[:, part] if isinstance(v, Tensor) and v.ndim == 3 else v for k, v in render_options.items()}
        parts.append(renderer(planes, decoder, rays[0][:, part], rays[1][:, part], **options))
    whole = Rendering(*(torch.cat(x, dim=1) for x in zip(*parts, strict=True))) if len(parts) > 1 else parts[0]
    size = (resolution, resolution)
    return Images(
        whole.rgb.transpose(1, 2).unflatten(2, size),
        whole.depth[:, None].unflatten(2, size),
        whole.weight_sum[:, None].unflatten(2, size),
    )
