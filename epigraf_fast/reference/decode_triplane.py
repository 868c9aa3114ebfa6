"""Colour and density of points: tri-plane features through a two-layer network (paper, section 3.1)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .sample_triplane import PlaneRegion, sample_triplane


class Network(NamedTuple):
    """The decoder's two layers, the equalized learning rate folded in."""

    w0: Tensor  # [hidden, C]
    b0: Tensor  # [hidden]
    w1: Tensor  # [out, hidden]
    b1: Tensor  # [out]


def decode_triplane(planes: Tensor, points: Tensor, network: Network, region: PlaneRegion | None = None) -> Tensor:
    """out = w1 lrelu(w0 feature + b0) + b1, lrelu with slope 0.2 and gain sqrt(2).

    Args:
        planes: [B, 3*C, H, W].
        points: [B, N, 3], in units of the cube's half size.
        region: See `sample_triplane`.

    Returns:
        [B, N, out]: raw colour, then raw density last; the widest dtype of planes and network.
    """
    return decode_features(sample_triplane(planes, points, region), network)


def decode_features(features: Tensor, network: Network) -> Tensor:
    """The network alone: [B, N, C] -> [B, N, out], in the widest dtype of all."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (features, *network)))
    features, w0, b0, w1, b1 = (x.to(dtype) for x in (features, *network))
    hidden = torch.nn.functional.linear(features, w0, b0)
    hidden = torch.nn.functional.leaky_relu(hidden, 0.2) * 2**0.5
    return torch.nn.functional.linear(hidden, w1, b1)


def decode_triplane_rays(
    planes: Tensor,
    ray_origins: Tensor,
    ray_directions: Tensor,
    t: Tensor,
    network: Network,
    cube_scale: float = 1.0,
    region: PlaneRegion | None = None,
) -> Tensor:
    """The same at the points (ray_origin + t ray_direction) / cube_scale.

    Args:
        ray_origins, ray_directions: [B, R, 3], world units.
        t: [B, R, S], distances along the rays, world units.
        cube_scale: Half size of the cube that the planes span, world units.
        region: See `sample_triplane`.

    Returns:
        [B, R, S, out].
    """
    points = points_on_rays(ray_origins, ray_directions, t) / cube_scale
    return decode_triplane(planes, points.flatten(1, 2), network, region).unflatten(1, t.shape[1:])


def points_on_rays(ray_origins: Tensor, ray_directions: Tensor, t: Tensor) -> Tensor:
    """ray_origin + t ray_direction: [B, R, 3], [B, R, 3], [B, R, S] -> [B, R, S, 3]."""
    return ray_origins[:, :, None] + t[..., None] * ray_directions[:, :, None]
