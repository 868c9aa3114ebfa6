"""What lies behind the planes: the inverted sphere of NeRF++ and a painted plane (method.md 6)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..camera import Patch, cam2world_matrix, camera_rays, extract_patches
from ..config import CameraConfig, RendererConfig
from .layers import FullyConnected, ScalarEncoder

ENCODER_STEPS = 64
CHUNK = 2**18  # samples in flight without gradients


class ModulatedLinear(nn.Module):
    """y = lrelu(x (W s / |W s|)^T + b): a modulated 1x1 convolution with demodulation, on points."""

    def __init__(self, n_in: int, n_out: int, w_dim: int) -> None:
        super().__init__()
        self.affine = FullyConnected(w_dim, n_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # [B, N, n_in], [B, w_dim] -> [B, N, n_out]
        weight = self.weight * self.affine(w)[:, None, :]
        weight = weight * (weight.square().sum(dim=2, keepdim=True) + 1e-8).rsqrt()
        return ops.bias_act(torch.bmm(x, weight.transpose(1, 2)), self.bias, dim=2, act="lrelu")


class ToOutput(ModulatedLinear):
    """y = x (W s / sqrt(n_in))^T + b."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # [B, N, n_in], [B, w_dim] -> [B, N, n_out]
        weight = self.weight * (self.affine(w) / math.sqrt(x.shape[2]))[:, None, :]
        return torch.baddbmm(self.bias, x, weight.transpose(1, 2))


def sphere_points(ray_origins: Tensor, ray_directions: Tensor, inverse_radius: Tensor) -> Tensor:
    """Points outside the unit sphere as (unit vector, inverse radius) (NeRF++, section 4).

    With p_mid the ray's nearest point to the origin, r its norm and p_s the ray's exit from the unit sphere, the unit
    vector is p_s rotated about norm(origin x p_s) by asin(r) - asin(r inverse_radius).

    Args:
        ray_origins, ray_directions: [B, R, 3], origins on or in the unit sphere, unit directions.
        inverse_radius: [B, R, S] in [0, 1].

    Returns:
        [B, R, S, 4].
    """
    _, r, exit_point = _landmarks(ray_origins, ray_directions)
    # A ray through the centre has no axis, and needs none: its angle is 0.
    axis = nn.functional.normalize(torch.linalg.cross(ray_origins, exit_point), dim=-1)[..., None, :]  # [B, R, 1, 3]
    angle = (r.asin() - (r * inverse_radius).asin())[..., None]  # [B, R, S, 1]
    vector = exit_point[..., None, :]
    along = (axis * vector).sum(dim=-1, keepdim=True)
    turned = vector * angle.cos() + torch.linalg.cross(axis, vector) * angle.sin() + axis * along * (1 - angle.cos())
    turned = nn.functional.normalize(turned, dim=-1)
    return torch.cat([turned, inverse_radius[..., None]], dim=-1)


def conventional_depth(ray_origins: Tensor, ray_directions: Tensor, inverse_radius: Tensor) -> Tensor:
    """Distances along the rays [B, R, S] of the points of `sphere_points`, in radii of the sphere."""
    middle, r, _ = _landmarks(ray_origins, ray_directions)
    beyond = (r * inverse_radius).asin().cos() / (inverse_radius + 1e-6)
    return beyond + (middle - ray_origins).norm(dim=-1)[..., None]


def _landmarks(ray_origins: Tensor, ray_directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p_mid [B, R, 3], its norm [B, R, 1], p_s [B, R, 3]."""
    middle = ray_origins - (ray_origins * ray_directions).sum(dim=-1, keepdim=True) * ray_directions
    r = middle.norm(dim=-1, keepdim=True).clamp(max=1)
    return middle, r, middle + (1 - r.square()).sqrt() * ray_directions


class PlaneBackground(nn.Module):
    """A picture that the synthesis network paints beside the planes.

    Args:
        image_resolution: Of whole images.
    """

    num_ws, extra_channels = 0, 3

    def __init__(self, image_resolution: int) -> None:
        super().__init__()
        self.image_resolution = image_resolution

    def forward(
        self,
        picture: Tensor,
        ws: Tensor | None,
        angles: Tensor,
        resolution: int,
        patch: Patch | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """The picture [B, 3, H, W], resized to the image (bilinear, corner-aligned) and cut by the patch: [B, R, 3]."""
        size = self.image_resolution
        image = nn.functional.interpolate(picture, (size, size), mode="bilinear", align_corners=True)
        if patch is None and resolution != size:
            patch = Patch.whole(image)
        if patch is not None:
            image = extract_patches(image, patch, resolution)
        return image.flatten(2).transpose(1, 2), None


class SphereBackground(nn.Module):
    """A small style-modulated network of (unit vector, inverse radius), integrated outwards along the rays.

    The sphere is that of the cameras; lengths inside are in units of its radius.

    Args:
        w_dim: Width of the style vectors.
        config: For the samples and the density, to which neither shift nor noise is added; with `white_background`
            what the last sample lets through is white. `background_start` is in (0, 1].
        camera: For radius and field of view.
        channel_base, channel_max: Width of block b is min(channel_base / 2^(b + 2), channel_max).
        backend: Of samples and integration, see `ops`.
    """

    num_ws, extra_channels = 4, 0

    def __init__(
        self,
        w_dim: int,
        config: RendererConfig,
        camera: CameraConfig,
        *,
        channel_base: int = 32768,
        channel_max: int = 128,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < config.background_start <= 1:
            raise ValueError(f"SphereBackground: start must be in (0, 1], got {config.background_start}")
        self.config, self.camera, self.backend = config, camera, backend
        self.encoder = ScalarEncoder(ENCODER_STEPS)
        narrow, wide = (max(1, min(channel_base // 2 ** (block + 2), channel_max)) for block in (0, 1))
        self.layer0 = ModulatedLinear(4 * self.encoder.dim, narrow, w_dim)
        self.out0 = ToOutput(narrow, 4, w_dim)
        self.layer1 = ModulatedLinear(narrow, wide, w_dim)
        self.layer2 = ModulatedLinear(wide, wide, w_dim)
        self.out1 = ToOutput(wide, 4, w_dim)

    def decode(self, points: Tensor, ws: Tensor) -> Tensor:
        """Points [B, N, 4] and style vectors [B, 4, w_dim] -> raw colour and density [B, N, 4]."""
        x = self.encoder(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        x = self.layer0(x, ws[:, 0])
        y = self.out0(x, ws[:, 1])
        x = self.layer2(self.layer1(x, ws[:, 1]), ws[:, 2])
        return y + self.out1(x, ws[:, 3])

    def forward(
        self,
        picture: Tensor | None,
        ws: Tensor | None,
        angles: Tensor,
        resolution: int,
        patch: Patch | None = None,
        *,
        fov: float | Tensor | None = None,
        stochastic: bool = False,
        jitter: Tensor | None = None,
        with_depth: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Colours [B, R, 3], and if wanted depths sum w t [B, R], world units.

        Args:
            ws: [B, num_ws, w_dim], the last 4 of which are the background's.
            stochastic: Jitter of the inverse radii.
            jitter: [B, R, S] in [0, 1) in place of fresh draws.
        """
        if ws is None:
            raise ValueError("SphereBackground: ws must be given (because it is modulated by them), got None")
        radius, fov = self.camera.radius, self.camera.fov if fov is None else fov
        matrix = cam2world_matrix(angles, radius)
        origins, directions = camera_rays(matrix, fov, resolution, patch)
        origins, ws, samples = origins / radius, ws[:, -self.num_ws :], self.config.background_samples
        if stochastic and jitter is None:
            jitter = torch.rand(*origins.shape[:2], samples, dtype=origins.dtype, device=origins.device)
        chunk = origins.shape[1]
        if not torch.is_grad_enabled():
            chunk = max(1, CHUNK // (len(ws) * samples))
        parts = []
        for first in range(0, origins.shape[1], chunk):
            part = slice(first, first + chunk)
            some = None if jitter is None else jitter[:, part]
            parts.append(self.integrate(ws, origins[:, part], directions[:, part], some, with_depth))
        rgb, depth = zip(*parts, strict=True)
        return torch.cat(rgb, dim=1), torch.cat(depth, dim=1) * radius if with_depth else None

    def integrate(
        self,
        ws: Tensor,
        ray_origins: Tensor,
        ray_directions: Tensor,
        jitter: Tensor | None = None,
        with_depth: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Colours and depths of rays [B, R, 3], in radii of the sphere, with style vectors [B, 4, w_dim]."""
        config = self.config
        t = ops.sample_stratified(
            *ray_origins.shape[:2],
            config.background_samples,
            -config.background_start,
            0.0,
            jitter=jitter,
            stochastic=False,
            dtype=ray_origins.dtype,
            device=ray_origins.device,
            backend=self.backend,
        )
        points = sphere_points(ray_origins, ray_directions, -t)
        values = self.decode(points.flatten(1, 2), ws).view(*t.shape, 4)
        result = ops.composite(
            t,
            values,
            activation=config.density_activation,
            softplus_beta=config.softplus_beta,
            white_background=config.white_background,
            return_weights=with_depth,
            t_sorted=True,
            backend=self.backend,
        )
        if not with_depth:
            return result.rgb, None
        return result.rgb, (result.weights * conventional_depth(ray_origins, ray_directions, -t)).sum(dim=-1)
