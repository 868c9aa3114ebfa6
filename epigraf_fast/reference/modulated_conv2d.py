"""Convolution with resampling, plain and modulated (method.md 8 and 7)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bias_act import bias_act
from .modulation import modulation
from .upfirdn2d import upfirdn2d as _upfirdn2d


def conv2d_resample(
    x: Tensor,
    weight: Tensor,
    *,
    kernel: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    flip_weight: bool = False,
    upfirdn2d: Callable[..., Tensor] = _upfirdn2d,
    conv2d: Callable[..., Tensor] = torch.nn.functional.conv2d,
    conv_transpose2d: Callable[..., Tensor] = torch.nn.functional.conv_transpose2d,
) -> Tensor:
    """A k x k convolution that keeps the size, then times `up` or divided by `down` with the low-pass filter `kernel`.

    All padding (k // 2, plus (n+up-1)//2, (n-up)//2 or (n-down+1)//2, (n-down)//2 of an n-tap filter) is applied once,
    at the start: zero insertion, padding, filter (up, gain up^2), convolution, filter (down), every down-th sample.

    Args:
        x: [B, C_in, H, W].
        weight: [C_out, C_in, k, k], k odd.
        kernel: [n] or [n, n], sum 1; needed where up or down > 1.
        flip_weight: False correlates with `weight` (torch's conv2d), True convolves with it.
        upfirdn2d: What filters.
        conv2d, conv_transpose2d: What convolves.

    Returns:
        [B, C_out, H up / down, W up / down].
    """
    pad = weight.shape[-1] // 2
    if up > 1:
        # Filter and convolution commute, and a correlation of zero-inserted samples is a transposed convolution with
        # the rotated kernel: cheaper, so it comes first. Its output has k - 1 samples more before and k - up more after
        # than the unpadded correlation; the filter's padding is that much smaller.
        k, taps = weight.shape[-1], kernel.shape[-1]
        before = (taps + up - 1) // 2 + pad - (k - 1)
        after = (taps - up) // 2 + pad - (k - up)
        weight = (weight if flip_weight else weight.flip([2, 3])).transpose(0, 1)
        x = conv_transpose2d(x, weight, stride=up)
        return upfirdn2d(x, kernel, padding=(before, after, before, after), gain=up**2)
    if flip_weight:
        weight = weight.flip([2, 3])
    if down == 1:
        return conv2d(x, weight, padding=pad)
    taps = kernel.shape[-1]
    before, after = (taps - down + 1) // 2 + pad, (taps - down) // 2 + pad
    if weight.shape[-1] == 1:
        # A 1x1 convolution commutes with dropping samples: convolve only what is kept.
        x = upfirdn2d(x, kernel, down=down, padding=(before, after, before, after))
        return conv2d(x, weight)
    x = upfirdn2d(x, kernel, padding=(before, after, before, after))
    return conv2d(x, weight, stride=down)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    up: int = 1,
    kernel: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """y = bias_act(demod[b, o] conv(x style[b, i], weight) + noise, bias), the whole layer of the synthesis network.

    demod[b, o] = 1 / sqrt(sum_{i, k} (weight[o, i, k] style[b, i])^2 + 1e-8). With up = 2 the kernel is rotated by 180
    degrees against the plain case, and the low-pass filter follows.

    Args:
        x: [B, C_in, H, W].
        weight: [C_out, C_in, k, k].
        style: [B, C_in].
        noise: Broadcasts to [B, 1, H up, W up], strength included.
        bias, act, gain, clamp: See `bias_act`.

    Returns:
        [B, C_out, H up, W up].
    """
    weight, style, demod = modulation(weight, style, x.dtype, demodulate=demodulate)
    y = x * style.to(x.dtype)[:, :, None, None]
    y = conv2d_resample(y, weight, kernel=kernel, up=up, flip_weight=up > 1)
    if demod is not None:
        y = y * demod.to(y.dtype)[:, :, None, None]
    if noise is not None:
        y = y + noise.to(y.dtype)
    return bias_act(y, bias, act=act, gain=gain, clamp=clamp)
