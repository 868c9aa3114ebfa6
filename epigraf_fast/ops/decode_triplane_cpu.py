"""Launchers of csrc/decode_triplane.cpp, with the signatures of kernels/decode_triplane.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.sample_triplane import PlaneRegion
from . import native


def fwd(
    planes: Tensor,
    origins: Tensor,
    directions: Tensor | None,
    t: Tensor | None,
    w0: Tensor,
    b0: Tensor,
    w1: Tensor,
    b1: Tensor,
    cube_scale: float,
    precision: str,
    *,
    region: PlaneRegion | None = None,
) -> Tensor:
    """Raw colour and density of points [B, N, 3], or of the depths t [B, R, S] of rays [B, R, 3]."""
    y = planes.new_empty(*(origins.shape[:2] if t is None else t.shape), len(w1))
    tensors = _dense(planes, origins, directions, t, w0, b0, w1, b1)
    first, whole = _part(planes, region)
    native.launch("decode_triplane_fwd", (*tensors, y, first), *_sizes(planes, origins, t, w0, w1, cube_scale), *whole)
    return y


def bwd(
    grad_y: Tensor,
    planes: Tensor,
    origins: Tensor,
    directions: Tensor | None,
    t: Tensor | None,
    w0: Tensor,
    b0: Tensor,
    w1: Tensor,
    cube_scale: float,
    precision: str,
    needs_planes: bool,
    needs_network: bool,
    deterministic: bool,
    *,
    region: PlaneRegion | None = None,
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """Gradients of `fwd` to planes and to the network, all sums in a fixed order; None for what is not needed."""
    grad_planes = torch.empty_like(planes, memory_format=torch.channels_last) if needs_planes else None
    network = None
    if needs_network:
        # Not `empty_like`, which keeps the strides of a transposed matrix.
        network = tuple(w0.new_empty(shape) for shape in (w0.shape, b0.shape, w1.shape, (len(w1),)))
    tensors = _dense(planes, origins, directions, t, w0, b0, w1)
    results = grad_planes, *(network or (None,) * 4)
    sizes = _sizes(planes, origins, t, w0, w1, cube_scale)
    first, whole = _part(planes, region)
    native.launch("decode_triplane_bwd", (*tensors, grad_y.contiguous(), *results, first), *sizes, *whole)
    return grad_planes, network


def _dense(planes: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the kernels read them: planes in channels_last, the rest contiguous."""
    planes = planes.contiguous(memory_format=torch.channels_last)
    return planes, *(None if x is None else x.contiguous() for x in others)


def _part(planes: Tensor, region: PlaneRegion | None) -> tuple[Tensor | None, tuple[int, int]]:
    """First texels in int64, and the size of whole planes."""
    if region is None:
        return None, tuple(planes.shape[2:])
    return region.first.long().contiguous(), region.whole


def _sizes(
    planes: Tensor, origins: Tensor, t: Tensor | None, w0: Tensor, w1: Tensor, cube_scale: float
) -> tuple[Any, ...]:
    samples = 1 if t is None else t.shape[2]
    hidden, channels = w0.shape
    points = len(planes), origins.shape[1], samples
    return native.DTYPES[planes.dtype], *points, channels, *planes.shape[2:], hidden, len(w1), float(cube_scale)
