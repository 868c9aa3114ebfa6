"""Decoders of the ablations: Fourier features of the point, and colours that depend on the ray's direction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.checks import checked_resample
from .layers import FullyConnected, ScalarEncoder

DIRECTION_FREQUENCIES = 3  # sines of each coordinate of a direction
DIRECTION_STEPS = 8
VIEW_HIDDEN = 32


def encode_directions(directions: Tensor) -> Tensor:
    """Each coordinate v as v, sin(v 8 pi 2^k / 2^3), k = 0, 1, 2: [..., 3] -> [..., 12]."""
    levels = torch.arange(DIRECTION_FREQUENCIES, dtype=directions.dtype, device=directions.device)
    frequencies = DIRECTION_STEPS * math.pi * torch.exp2(levels - DIRECTION_FREQUENCIES)
    sines = (directions[..., None] * frequencies).sin()
    return torch.cat([directions[..., None], sines], dim=-1).flatten(-2)


class FeatureDecoder(nn.Module):
    """`Decoder` with more inputs; its features and hidden units do exist in memory, so it is for ablations.

    With view directions the first network ends in hidden + 1 numbers. The last is the density; the rest, through a
    leaky ReLU of slope 0.1 without gain, and the encoded direction go through 32 lrelu units to the colours.

    Args:
        channels, hidden, colours: As `Decoder`.
        fourier: Steps of the Fourier features of the point (divided by cube_scale), 0 for none.
        view_direction: Whether colours depend on the ray's direction.
        backend: See `ops`.
    """

    def __init__(
        self,
        channels: int = 32,
        hidden: int = 64,
        colours: int = 3,
        *,
        fourier: int = 0,
        view_direction: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend, self.view_direction = backend, view_direction
        self.encoder = ScalarEncoder(fourier) if fourier else None
        width = channels + (3 * self.encoder.dim if fourier else 0)
        self.fc0 = FullyConnected(width, hidden, act="lrelu")
        self.fc1 = FullyConnected(hidden, (hidden if view_direction else colours) + 1)
        if view_direction:
            self.view0 = FullyConnected(hidden + 3 * (1 + DIRECTION_FREQUENCIES), VIEW_HIDDEN, act="lrelu")
            self.view1 = FullyConnected(VIEW_HIDDEN, colours)

    def forward(
        self,
        planes: Tensor,
        ray_origins: Tensor,
        ray_directions: Tensor,
        t: Tensor,
        cube_scale: float,
        region: ops.PlaneRegion | None = None,
    ) -> Tensor:
        """Samples at t [B, R, S] of rays [B, R, 3] -> [B, R, S, colours + 1], raw density last."""
        points = ray_origins[:, :, None] + t[..., None] * ray_directions[:, :, None]
        directions = ray_directions[:, :, None].expand_as(points)
        values = self._decode(planes, points.flatten(1, 2) / cube_scale, directions.flatten(1, 2), region)
        return values.unflatten(1, t.shape[1:])

    def coarse_to_fine(
        self,
        planes: Tensor,
        ray_origins: Tensor,
        ray_directions: Tensor,
        t: Tensor,
        resample: Callable[[Tensor], Tensor],
        cube_scale: float,
        region: ops.PlaneRegion | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` at t, the depths [B, R, K] that `resample` finds with the detached result, and `forward` there."""
        coarse = self(planes, ray_origins, ray_directions, t, cube_scale, region)
        inputs = planes, ray_origins, ray_directions, t
        t_fine = checked_resample("FeatureDecoder", resample, t, inputs)(coarse)
        return coarse, t_fine, self(planes, ray_origins, ray_directions, t_fine, cube_scale, region)

    def at_points(self, planes: Tensor, points: Tensor, cube_scale: float) -> Tensor:
        """Points [B, N, 3] in world units -> [B, N, colours + 1], seen from outside: along -points."""
        directions = nn.functional.normalize(-points, dim=-1)
        return self._decode(planes, points / cube_scale, directions)

    def _decode(
        self, planes: Tensor, points: Tensor, directions: Tensor, region: ops.PlaneRegion | None = None
    ) -> Tensor:  # [B, N, 3] -> [B, N, colours + 1]
        x = ops.sample_triplane(planes, points, region=region, backend=self.backend).flatten(0, 1)
        if self.encoder is not None:
            x = torch.cat([x, self.encoder(points.flatten(0, 1))], dim=1)
        x = self.fc1(self.fc0(x))
        if self.view_direction:
            density = x[:, -1:]
            features = nn.functional.leaky_relu(x[:, :-1], 0.1)
            features = torch.cat([features, encode_directions(directions.flatten(0, 1))], dim=1)
            x = torch.cat([self.view1(self.view0(features)), density], dim=1)
        return x.unflatten(0, points.shape[:2])
