"""Upsample, filter, downsample (method.md 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bias_act import bias_act


def upfirdn2d(
    x: Tensor,
    kernel: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    flip: bool = False,
    gain: float = 1.0,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Inserts up-1 zeros after every sample, pads with zeros, filters, keeps samples 0, down, 2 down, ...

    Args:
        x: [B, C, H, W].
        kernel: [kh, kw], or [k] for its outer product with itself.
        padding: x before, x after, y before, y after, in upsampled samples; negative numbers crop.
        flip: False convolves, True correlates.
        gain: Multiplies the 2-D filter.
        added, bias, clamp: Its `bias_act` is added to what comes out.

    Returns:
        [B, C, (H up + pads - kh) // down + 1, (W up + pads - kw) // down + 1].
    """
    batch, channels, height, width = x.shape
    if kernel.ndim == 1:
        kernel = torch.outer(kernel, kernel)
    if not flip:
        kernel = kernel.flip([0, 1])
    if up > 1:
        x = x.reshape(batch, channels, height, 1, width, 1)
        x = torch.nn.functional.pad(x, (0, up - 1, 0, 0, 0, up - 1))
        x = x.reshape(batch, channels, height * up, width * up)
    # Pad before cropping: more may be cropped from one side than x has.
    for limit in (max, min):
        pads = [limit(pad, 0) for pad in padding]
        x = torch.nn.functional.pad(x, pads) if any(pads) else x
    kernel = (kernel * gain).to(x.dtype).expand(channels, 1, *kernel.shape)
    y = torch.nn.functional.conv2d(x, kernel, stride=down, groups=channels)
    return y if added is None else y + bias_act(added, bias, clamp=clamp).to(y.dtype)
