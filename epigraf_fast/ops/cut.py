"""Rectangles of images, at a place of each image's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.cut import cut as _reference
from ..reference.cut import paste as _reference_paste
from .checks import check_shape


def cut(x: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    """y[b, c, i, j] = x[b, c, first[b, 0] + i, first[b, 1] + j]: the part of every image that is asked for.

    Args:
        x: [B, C, H, W], any dtype; channels_last stays so.
        first: [B, 2] int32 or int64 on the device of x, row and column of the first pixel. The rectangle must lie
            inside of the image; on a GPU nothing looks, as that would make it wait.
        size: Rows and columns of y, at most those of x.

    Returns:
        [B, C, *size].

    Derivatives: any order, to x; each is the same copy, or its transpose `paste`, without atomics.

    Raises:
        TypeError, ValueError: Wrong shape, dtype or device; on a CPU a rectangle that leaves its image.
    """
    check_shape("cut", "x", x, ("B", "C", "H", "W"))
    check_shape("cut", "first", first, (len(x), 2))
    if first.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cut: first must be int32 or int64 (because it counts pixels), got {first.dtype}")
    if first.device != x.device:
        raise ValueError(f"cut: first must be on {x.device} as x is, got {first.device}")
    if len(size) != 2 or not all(1 <= part <= whole for part, whole in zip(size, x.shape[2:], strict=True)):
        raise ValueError(f"cut: size must be two numbers from 1 to {list(x.shape[2:])}, those of x, got {list(size)}")
    room = first.new_tensor(x.shape[2:]) - first.new_tensor(size)
    if x.device.type == "cpu" and bool(((first < 0) | (first > room)).any()):
        raise ValueError(f"cut: first must leave room for {list(size)} in {list(x.shape[2:])}, got {first.tolist()}")
    if tuple(size) == tuple(x.shape[2:]):
        return x
    return _Cut.apply(x, first, tuple(size))


def _copied(x: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    if x.device.type != "cpu":
        return _reference(x, first, size)
    y = torch.empty_like(x[:, :, : size[0], : size[1]])
    for image, (row, column) in enumerate(first.tolist()):
        y[image] = x[image, :, row : row + size[0], column : column + size[1]]
    return y


def _pasted(y: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    if y.device.type != "cpu":
        return _reference_paste(y, first, size)
    layout = torch.channels_last if y.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    x = torch.empty(*y.shape[:2], *size, dtype=y.dtype, memory_format=layout).zero_()
    for image, (row, column) in enumerate(first.tolist()):
        x[image, :, row : row + y.shape[2], column : column + y.shape[3]] = y[image]
    return x


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(first)
        ctx.size = tuple(x.shape[2:])
        return _copied(x, first, size)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return _Paste.apply(grad_y, ctx.saved_tensors[0], ctx.size), None, None


class _Paste(torch.autograd.Function):
    """The transpose of `_Cut`: zeros around."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(first)
        ctx.size = tuple(y.shape[2:])
        return _pasted(y, first, size)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None, None]:
        return _Cut.apply(grad_x, ctx.saved_tensors[0], ctx.size), None, None
