"""Rectangles of images, at a place of each image's own."""

from __future__ import annotations

import torch
from torch import Tensor


def cut(x: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    """y[b, c, i, j] = x[b, c, first[b, 0] + i, first[b, 1] + j].

    Args:
        x: [B, C, H, W].
        first: [B, 2] integers, row and column of the first pixel; the rectangle lies inside of the image.
        size: Rows and columns of y.

    Returns:
        [B, C, *size].
    """
    rows, columns = (first[:, i, None].long() + torch.arange(size[i], device=first.device) for i in range(2))
    return _pixels(x, rows, columns)


def paste(y: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of `cut`: y [B, C, h, w] in its places of an image [B, C, *size] of zeros."""
    rows, columns = (torch.arange(size[i], device=first.device) - first[:, i, None].long() for i in range(2))
    (height, width), inside = y.shape[2:], (rows >= 0) & (rows < y.shape[2])
    inside = inside[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    pixels = _pixels(y, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    return torch.where(inside, pixels, torch.zeros_like(pixels))


def _pixels(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x [B, C, H, W] at rows [B, h] and columns [B, w]: [B, C, h, w]. A gather has every derivative, of batches too."""
    (batch, channels, height, width), size = x.shape, (rows.shape[1], columns.shape[1])
    index = (
        (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, size[0] * size[1], 1).expand(-1, -1, channels)
    )
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels).gather(1, index)
    return pixels.reshape(batch, *size, channels).permute(0, 3, 1, 2)
