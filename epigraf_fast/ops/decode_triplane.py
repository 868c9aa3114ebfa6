"""Raw colour and density of points, from tri-planes and the two-layer decoder."""

from __future__ import annotations

import math

from torch import Tensor

from ..reference.decode_triplane import decode_features, points_on_rays
from ..reference.decode_triplane import decode_triplane as _reference
from ..reference.decode_triplane import decode_triplane_rays as _reference_rays
from .backends import resolve
from .checks import check_planes, check_shape, check_together
from .sample_triplane import sample_triplane_cpu


def _check_network(op: str, planes: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> None:
    check_planes(op, planes)
    check_shape(op, "w0", w0, ("hidden", planes.shape[1] // 3))
    check_shape(op, "b0", b0, (w0.shape[0],))
    check_shape(op, "w1", w1, ("out", w0.shape[0]))
    check_shape(op, "b1", b1, (w1.shape[0],))


def decode_triplane(
    planes: Tensor,
    points: Tensor,
    w0: Tensor,
    b0: Tensor,
    w1: Tensor,
    b1: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """out = w1 lrelu(w0 feature + b0) + b1, `feature` as in `sample_triplane`, lrelu of slope 0.2 and gain sqrt(2).

    Args:
        planes: [B, 3*C, H, W]; channels_last is read without a copy.
        points: [B, N, 3], in units of the cube's half size.
        w0, b0: [hidden, C], [hidden], the equalized learning rate folded in.
        w1, b1: [out, hidden], [out].

    Returns:
        [B, N, out]: raw colour, raw density last.

    Derivatives: reference any order, to everything; cpu the first.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; unknown or missing backend.
    """
    check_together("decode_triplane", planes=planes, points=points, w0=w0, b0=b0, w1=w1, b1=b1)
    _check_network("decode_triplane", planes, w0, b0, w1, b1)
    check_shape("decode_triplane", "points", points, (planes.shape[0], "N", 3))
    if resolve("decode_triplane", backend, planes.device.type) == "cpu":
        return decode_features(sample_triplane_cpu(planes, points), w0, b0, w1, b1)
    return _reference(planes, points, w0, b0, w1, b1)


def decode_triplane_rays(
    planes: Tensor,
    ray_origins: Tensor,
    ray_directions: Tensor,
    t: Tensor,
    w0: Tensor,
    b0: Tensor,
    w1: Tensor,
    b1: Tensor,
    cube_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """`decode_triplane` at the points (ray_origin + t ray_direction) / cube_scale.

    Args:
        ray_origins, ray_directions: [B, R, 3], world units, directions of length one.
        t: [B, R, S], distance along the ray, world units.
        cube_scale: Half size of the cube that the planes span, world units.
        planes, w0, b0, w1, b1: See `decode_triplane`.

    Returns:
        [B, R, S, out]: raw colour, raw density last.

    Derivatives: reference any order, to everything; cpu the first.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; a cube_scale that is not finite and positive;
            unknown or missing backend.
    """
    op = "decode_triplane_rays"
    check_together(
        op, planes=planes, ray_origins=ray_origins, ray_directions=ray_directions, t=t, w0=w0, b0=b0, w1=w1, b1=b1
    )
    _check_network(op, planes, w0, b0, w1, b1)
    check_shape(op, "ray_origins", ray_origins, (planes.shape[0], "R", 3))
    check_shape(op, "ray_directions", ray_directions, tuple(ray_origins.shape))
    check_shape(op, "t", t, (planes.shape[0], ray_origins.shape[1], "S"))
    if not (math.isfinite(cube_scale) and cube_scale > 0):
        raise ValueError(f"{op}: cube_scale must be finite and positive (it divides the points), got {cube_scale}")
    if resolve("decode_triplane", backend, planes.device.type) == "cpu":
        points = points_on_rays(ray_origins, ray_directions, t) / cube_scale
        features = sample_triplane_cpu(planes, points.flatten(1, 2))
        return decode_features(features, w0, b0, w1, b1).unflatten(1, t.shape[1:])
    return _reference_rays(planes, ray_origins, ray_directions, t, w0, b0, w1, b1, cube_scale)
