"""Convolution with resampling, and the whole modulated layer of the synthesis network."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..reference.bias_act import ACTIVATIONS
from ..reference.modulated_conv2d import conv2d_resample as _reference_conv2d_resample
from ..reference.modulated_conv2d import modulated_conv2d as _reference
from . import native
from .bias_act import bias_act
from .checks import check_broadcast, check_choice, check_clamp, check_gain, check_integers, check_shape, check_together
from .convolution import conv2d, conv_transpose2d
from .layer_epilogue import SLOPES, layer_epilogue, resolve_with_filter
from .modulation import OfWeight, modulation
from .upfirdn2d import upfirdn2d


def _check_convolution(op: str, x: Tensor, weight: Tensor, kernel: Tensor | None, up: int, down: int) -> None:
    check_shape(op, "x", x, ("B", "C_in", "H", "W"))
    check_shape(op, "weight", weight, ("C_out", x.shape[1], "k", "k"))
    k = weight.shape[-1]
    if weight.shape[-2] != k or k % 2 == 0:
        raise ValueError(f"{op}: weight must be square with an odd number of taps, got {list(weight.shape)}")
    check_integers(op, up=up, down=down)
    if up < 1 or down < 1 or (up > 1 and down > 1):
        raise ValueError(f"{op}: up and down must be at least 1, and one of them 1, got {up} and {down}")
    if up * down > 1:
        if kernel is None:
            raise ValueError(
                f"{op}: kernel must be given when up or down is above 1 (it is the low-pass filter), got None"
            )
        if kernel.ndim not in (1, 2) or kernel.shape[0] != kernel.shape[-1] or kernel.shape[-1] < max(up, down):
            raise ValueError(
                f"{op}: kernel must be [n] or [n, n] with n at least the resampling factor, got {list(kernel.shape)}"
            )


def conv2d_resample(
    x: Tensor,
    weight: Tensor,
    *,
    kernel: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    flip_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A k x k convolution that keeps the size, then resampling by the low-pass filter `kernel` (method.md 7).

    Zero insertion, padding, filter (up, gain up^2), convolution, filter (down), every down-th sample; all padding
    (k // 2 and the filter's) is applied once, at the start.

    Args:
        x: [B, C_in, H, W].
        weight: [C_out, C_in, k, k], k odd.
        kernel: [n] or [n, n], sum 1; needed where up or down is above 1.
        up, down: Integers of at least 1, one of them 1.
        flip_weight: False correlates with `weight` (as torch's conv2d), True rotates it by 180 degrees first.

    Returns:
        [B, C_out, H up / down, W up / down].

    Derivatives: reference any order.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes, devices or factors; unknown or missing backend.
    """
    check_together("conv2d_resample", x=x, weight=weight, kernel=kernel)
    _check_convolution("conv2d_resample", x, weight, kernel, up, down)
    chosen = resolve_with_filter("conv2d_resample", backend, x.device.type, kernel)
    if chosen == "reference":
        return _reference_conv2d_resample(x, weight, kernel=kernel, up=up, down=down, flip_weight=flip_weight)
    filter_ = functools.partial(upfirdn2d, backend=chosen)
    options = {"upfirdn2d": filter_, "conv2d": conv2d, "conv_transpose2d": conv_transpose2d}
    return _reference_conv2d_resample(x, weight, kernel=kernel, up=up, down=down, flip_weight=flip_weight, **options)


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
    backend: str | None = None,
) -> Tensor:
    """y = bias_act(demod[b, o] conv(x style[b, i], weight) + noise, bias): a whole layer (method.md 8 and 7).

    demod[b, o] = 1 / sqrt(sum_{i, k} (weight[o, i, k] style[b, i])^2 + 1e-8), or 1 without demodulation. With up = 2
    the kernel is rotated by 180 degrees against the plain case and the low-pass filter follows it. Scaling the input
    and the output equals StyleGAN2's scaling of the kernel, without a kernel for every image.

    Args:
        x: [B, C_in, H, W], fp32, fp64, or fp16 (then weight and style are scaled to keep products in range, and x
            should be clamped).
        weight: [C_out, C_in, k, k], k odd, cast to the dtype of x for the convolution.
        style: [B, C_in].
        up: 1, or the upsampling factor; `kernel`, [n] or [n, n] of sum 1, is needed above 1.
        noise: Broadcasts to [B, 1, H up, W up], strength included.
        bias: [C_out]; act, gain, clamp: see `bias_act`.

    Returns:
        [B, C_out, H up, W up], dtype of x.

    Derivatives: reference any order.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes, devices or factors; a clamp that is not positive; unknown or
            missing backend.
    """
    check_together("modulated_conv2d", x=x, weight=weight, style=style, kernel=kernel, noise=noise, bias=bias)
    _check_convolution("modulated_conv2d", x, weight, kernel, up, 1)
    check_shape("modulated_conv2d", "style", style, (x.shape[0], x.shape[1]))
    if noise is not None:
        check_broadcast("modulated_conv2d", "noise", noise, (x.shape[0], 1, x.shape[2] * up, x.shape[3] * up))
    if bias is not None:
        check_shape("modulated_conv2d", "bias", bias, (weight.shape[0],))
    check_choice("modulated_conv2d", "act", act, tuple(ACTIVATIONS))
    check_gain("modulated_conv2d", gain)
    clamp = check_clamp("modulated_conv2d", clamp)
    chosen = resolve_with_filter("modulated_conv2d", backend, x.device.type, kernel)
    if chosen == "reference":
        return _reference(
            x,
            weight,
            style,
            demodulate=demodulate,
            up=up,
            kernel=kernel,
            noise=noise,
            bias=bias,
            act=act,
            gain=gain,
            clamp=clamp,
        )
    modulated = modulation(weight, style, x.dtype, demodulate=demodulate, backend=chosen)
    in_epilogue = {"bias": bias, "act": act, "gain": gain, "clamp": clamp} if act in SLOPES else {}
    (y,) = modulated_layer(
        x * modulated.style.to(x.dtype)[:, :, None, None],
        modulated.weight,
        modulated.demod,
        up=up,
        kernel=kernel,
        noise=noise,
        backend=chosen,
        **in_epilogue,
    )
    return y if in_epilogue else bias_act(y, bias, act=act, gain=gain, clamp=clamp, backend=chosen)


def modulated_layer(
    x: Tensor,
    weight: Tensor,
    demod: Tensor | None = None,
    *,
    up: int = 1,
    kernel: Tensor | None = None,
    of_weight: OfWeight | None = None,
    backend: str | None = None,
    **epilogue: Any,
) -> tuple[Tensor, ...]:
    """`layer_epilogue` of the convolution of x, which has been multiplied by the style: a modulated layer in a chain.

    Args:
        x: [B, C_in, H, W].
        weight, demod, of_weight: See `modulation`; here the weight is kept in the layout that the convolution reads.
        up, kernel: As in `modulated_conv2d`.
        epilogue: noise, strength, bias, styles, act, gain, clamp, keep_x of `layer_epilogue`.

    Returns, derivatives, raises: As `layer_epilogue`.
    """
    check_together("modulated_layer", x=x, weight=weight, demod=demod, kernel=kernel)
    _check_convolution("modulated_layer", x, weight, kernel, up, 1)
    chosen = resolve_with_filter("modulated_layer", backend, x.device.type, kernel)
    fused = up == 2 and weight.shape[-1] == 3 and tuple(kernel.shape) == (4,) and chosen != "reference"
    if fused:
        x = conv_transpose2d(x, _laid_out(weight, of_weight, transposed=True), stride=2)
    else:
        weight = _laid_out(weight, of_weight) if up == 1 else weight
        x = conv2d_resample(x, weight, kernel=kernel, up=up, flip_weight=up > 1, backend=chosen)
    return layer_epilogue(x, demod=demod, blur=kernel if fused else None, backend=chosen, **epilogue)


def _laid_out(weight: Tensor, of_weight: OfWeight | None, *, transposed: bool = False) -> Tensor:
    """A kernel as a GPU's convolution reads it, once for this call and its gradients, which would each copy it."""
    weight = weight.transpose(0, 1) if transposed else weight
    if not native.on_gpu(weight):
        return weight

    def lay_out(weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    return lay_out(weight) if of_weight is None else of_weight.copy(weight, ("laid out", weight.dtype), lay_out)
