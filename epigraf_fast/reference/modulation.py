"""What a modulated convolution takes: weight, style and StyleGAN2's demodulation (method.md 8)."""

from __future__ import annotations

import torch
from torch import Tensor

DEMODULATION_EPSILON = 1e-8


def normalize_weight(weight: Tensor) -> Tensor:
    """Weight [C_out, C_in, k, k] scaled to a maximum of 1 / sqrt(C_in k k) per output, which fp16's products need."""
    return weight / weight_divisor(weight)


def weight_divisor(weight: Tensor) -> Tensor:
    """[C_out, 1, 1, 1], by which `normalize_weight` divides."""
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    return weight[0].numel() ** 0.5 * largest.clamp(min=torch.finfo(weight.dtype).tiny)


def modulation(
    weight: Tensor,
    style: Tensor,
    dtype: torch.dtype,
    *,
    demodulate: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, style and demod[b, o] = 1 / sqrt(sum_{i, k} (weight[o, i, k] style[b, i])^2 + 1e-8) of a convolution.

    Args:
        weight: [C_out, C_in, k, k].
        style: [B, C_in].
        dtype: That of the convolution; fp16 normalizes first.

    Returns:
        weight in `dtype`; style [B, C_in]; demod [B, C_out], None without demodulation.
    """
    if not demodulate:
        return weight.to(dtype), style, None
    if dtype == torch.float16:
        # Products stay in range; demodulation makes the result independent of either scale.
        weight = normalize_weight(weight)
        style = style / style.abs().amax(1, keepdim=True).clamp(min=torch.finfo(style.dtype).tiny)
    energy = style.square() @ weight.square().sum(dim=(2, 3)).t()  # [B, C_out]
    return weight.to(dtype), style, (energy + DEMODULATION_EPSILON).rsqrt()
