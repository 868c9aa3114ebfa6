"""What follows the convolution of a modulated layer (method.md 8)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .bias_act import bias_act
from .upfirdn2d import upfirdn2d as _upfirdn2d


def layer_epilogue(
    x: Tensor,
    *,
    blur: Tensor | None = None,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    styles: Sequence[Tensor | None] = (None,),
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
) -> tuple[Tensor, ...]:
    """y = bias_act(demod[b, c] blur(x) + noise strength, bias), and y times every style that is given.

    Args:
        x: [B, C, H, W], with `blur` [B, C, H+1, W+1].
        blur: [4]: x is padded by 1 and convolved with its outer product, gain 4.
        demod: [B, C].
        noise: Broadcasts to [B, 1, H, W].
        strength: One number.
        styles: Each [B, C], or None for y itself.
        bias, act, gain, clamp: See `bias_act`.

    Returns:
        One [B, C, H, W] for every style.
    """
    y = x
    if blur is not None:
        y = _upfirdn2d(y, blur, padding=(1, 1, 1, 1), gain=4)
    if demod is not None:
        y = y * demod.to(y.dtype)[:, :, None, None]
    if noise is not None:
        y = y + (noise if strength is None else noise * strength).to(y.dtype)
    y = bias_act(y, bias, act=act, gain=gain, clamp=clamp)
    return tuple(y if style is None else y * style.to(y.dtype)[:, :, None, None] for style in styles)
