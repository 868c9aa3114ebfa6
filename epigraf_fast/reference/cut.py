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
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def paste(y: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of `cut`: y [B, C, h, w] in its places of an image [B, C, *size] of zeros."""
    rows, columns = (first[:, i, None].long() + torch.arange(y.shape[2 + i], device=first.device) for i in range(2))
    image = torch.arange(len(y), device=y.device)[:, None, None]
    x = y.new_zeros(len(y), *size, y.shape[1])
    x = x.index_put((image, rows[:, :, None], columns[:, None, :]), y.permute(0, 2, 3, 1))
    return x.permute(0, 3, 1, 2)
