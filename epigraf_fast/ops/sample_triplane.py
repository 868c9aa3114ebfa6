"""Tri-plane features of points."""

from __future__ import annotations

from torch import Tensor

from ..reference.sample_triplane import sample_triplane as _reference
from .backends import resolve
from .checks import check_planes, check_shape, check_together


def sample_triplane(planes: Tensor, points: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean of three bilinear samples, one from each axis-aligned plane (paper, section 3.1).

    Plane 0 is read at (p0, p1), plane 1 at (p0, p2), plane 2 at (p1, p2), as (horizontal, vertical). Coordinate -1 is
    the centre of the first column or row, +1 that of the last (align_corners=True); texels outside count as zero.

    Args:
        planes: [B, 3*C, H, W]; channels_last is read without a copy.
        points: [B, N, 3], in units of the cube's half size.

    Returns:
        [B, N, C], dtype of `planes`.

    Derivatives: reference any order, to planes and points.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; unknown or missing backend.
    """
    check_together("sample_triplane", planes=planes, points=points)
    check_planes("sample_triplane", planes)
    check_shape("sample_triplane", "points", points, (planes.shape[0], "N", 3))
    resolve("sample_triplane", backend, planes.device.type)
    return _reference(planes, points)
