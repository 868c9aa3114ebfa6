"""Convolution with resampling, and the whole modulated layer of the synthesis network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.bias_act import ACTIVATIONS
from ..reference.modulated_conv2d import conv2d_resample as _reference_conv2d_resample
from ..reference.modulated_conv2d import layer_epilogue as _reference_layer_epilogue
from ..reference.modulated_conv2d import modulated_conv2d as _reference
from ..reference.modulated_conv2d import modulation as _reference_modulation
from ..reference.modulated_conv2d import normalize_weight
from . import library, native
from .backends import resolve
from .bias_act import bias_act
from .checks import (
    check_broadcast,
    check_choice,
    check_clamp,
    check_dtype,
    check_finite,
    check_gain,
    check_integers,
    check_shape,
    check_together,
)
from .convolution import conv2d, conv_transpose2d
from .layer_epilogue import SLOPES, Epilogue, LayerEpilogue
from .modulation import Modulating, ModulationOfWeight
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


def _resolve(op: str, backend: str | None, device_type: str, kernel: Tensor | None) -> str:
    """The backend that a call gets: the reference where a gradient to the low-pass filter is asked for."""
    chosen = resolve("modulated_conv2d", backend, device_type)
    if kernel is None or not (kernel.requires_grad and torch.is_grad_enabled()) or chosen == "reference":
        return chosen
    if backend is not None and library.route(kernel) is not library.REFERENCE:
        raise NotImplementedError(
            f'{op}: backend "{backend}" has no gradient to the low-pass filter; use backend="reference", or detach it'
        )
    return "reference"


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
    chosen = _resolve("conv2d_resample", backend, x.device.type, kernel)
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
    chosen = _resolve("modulated_conv2d", backend, x.device.type, kernel)
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


class Modulation(NamedTuple):
    """What a modulated layer needs beside its input: see `modulation`."""

    weight: Tensor  # [C_out, C_in, k, k], for the convolution
    style: Tensor  # [B, C_in], for the convolution's input
    demod: Tensor | None  # [B, C_out], for its output


def modulation(
    weight: Tensor,
    style: Tensor,
    dtype: torch.dtype,
    *,
    affine: tuple[Tensor, Tensor, float] | None = None,
    demodulate: bool = True,
    backend: str | None = None,
) -> Modulation:
    """demod[b, o] = 1 / sqrt(sum_{i, k} (weight[o, i, k] style[b, i])^2 + 1e-8), and its factors for a convolution.

    In fp16 weight and style are first scaled to keep products in range (weight to a maximum of 1 / sqrt(C_in k k) per
    output, style to 1 per image), which demodulation makes up for. cpu and cuda compute styles and demod in one launch,
    their derivatives take the style's scale for a constant (it matters as much as the 1e-8 does), and to the matrix and
    the style vectors they are plain products.

    Args:
        weight: [C_out, C_in, k, k].
        style: [B, C_in], or with `affine` the style vectors w [B, D].
        dtype: That of the convolution.
        affine: Matrix [C_in, D], bias [C_in] and factor: style = factor w matrix^T + bias.
        demodulate: Without it weight and style come back as they are, with demod None.

    Returns:
        `Modulation`: weight in `dtype`, style and demod in their own.

    Derivatives: any order; cpu and cuda fuse the first.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; unknown or missing backend.
    """
    matrix, bias, factor = (None, None, 1.0) if affine is None else affine
    check_together("modulation", weight=weight, style=style, matrix=matrix, bias=bias)
    check_finite("modulation", "affine's factor", factor)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"modulation: dtype must be floating point, got {dtype}")
    check_shape("modulation", "weight", weight, ("C_out", "C_in", "k", "k"))
    if affine is None:
        check_shape("modulation", "style", style, ("B", weight.shape[1]))
    else:
        check_shape("modulation", "matrix", matrix, (weight.shape[1], "D"))
        check_shape("modulation", "bias", bias, (weight.shape[1],))
        check_shape("modulation", "style", style, ("B", matrix.shape[1]))
    chosen = resolve("modulated_conv2d", backend, weight.device.type)
    route = library.route(weight, style, matrix, bias)
    if "reference" in (chosen, route) or not demodulate or weight.shape[1] == 0:
        return Modulation(*_reference_modulation(weight, style, dtype, affine=affine, demodulate=demodulate))
    half = dtype == torch.float16
    if half:
        weight = normalize_weight(weight)
    weight = weight.to(native.compute_dtype(weight.dtype))
    style, matrix, bias = (None if x is None else x.to(weight.dtype) for x in (style, matrix, bias))
    args = weight, style, matrix, bias, float(factor), half
    if route is library.PLAIN and torch.is_grad_enabled():
        weight, style, demod = ModulationOfWeight.apply(*Modulating.ready(*args))
    else:
        made, demod, *_ = library.call(route, Modulating, *args)
        style = style if made is None else made
    return Modulation(weight.to(dtype), style, demod)


def modulated_layer(
    x: Tensor,
    weight: Tensor,
    demod: Tensor | None = None,
    *,
    up: int = 1,
    kernel: Tensor | None = None,
    backend: str | None = None,
    **epilogue: Any,
) -> tuple[Tensor, ...]:
    """`layer_epilogue` of the convolution of x, which has been multiplied by the style: a modulated layer in a chain.

    Args:
        x: [B, C_in, H, W].
        weight, demod: See `modulation`.
        up, kernel: As in `modulated_conv2d`.
        epilogue: noise, strength, bias, styles, act, gain, clamp, keep_x of `layer_epilogue`.

    Returns, derivatives, raises: As `layer_epilogue`.
    """
    check_together("modulated_layer", x=x, weight=weight, demod=demod, kernel=kernel)
    _check_convolution("modulated_layer", x, weight, kernel, up, 1)
    chosen = _resolve("modulated_layer", backend, x.device.type, kernel)
    fused = up == 2 and weight.shape[-1] == 3 and tuple(kernel.shape) == (4,) and chosen != "reference"
    if fused:
        x = conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    else:
        x = conv2d_resample(x, weight, kernel=kernel, up=up, flip_weight=up > 1, backend=chosen)
    return layer_epilogue(x, demod=demod, blur=kernel if fused else None, backend=chosen, **epilogue)


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
    keep_x: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """y = clamp(gain act(demod[b, c] blur(x) + noise strength + bias[c])) times every style: one read, one write each.

    Args:
        x: [B, C, H, W], contiguous or channels_last (else it is copied); with `blur` [B, C, H+1, W+1].
        blur: [4], sum 1: x is padded by 1 and convolved with its outer product, times 4, as upsampling by 2 ends.
        demod: [B, C].
        noise: Broadcasts to [B, 1, H, W].
        strength: One number that multiplies the noise.
        bias: [C].
        styles: One or two; an output is y times style [B, C] (the next convolution's input), or y for None.
        act: linear, or lrelu (slope 0.2).
        gain, clamp: See `bias_act`.
        keep_x: False lets the backward on a GPU take what it needs of x from the outputs, so that x need not be kept.
            A demod or style of exactly 0 then has gradient 0, and what is at the clamp counts as clipped.

    Returns:
        One [B, C, H, W] for every style, dtype and memory layout of x.

    Derivatives: reference any order; cpu and cuda the second, sums over pixels in one fixed order.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes, devices or activation; a clamp that is not positive; unknown
            or missing backend.
        NotImplementedError: cpu, cuda: a third derivative is asked for.
    """
    op = "layer_epilogue"
    if len(styles) not in (1, 2):
        raise ValueError(f"{op}: styles must be one or two, got {len(styles)}")
    of_styles = {f"styles[{k}]": style for k, style in enumerate(styles)}
    check_together(op, x=x, blur=blur, demod=demod, noise=noise, strength=strength, bias=bias, **of_styles)
    check_shape(op, "x", x, ("B", "C", "H", "W"))
    batch, channels, height, width = x.shape
    if blur is not None:
        check_shape(op, "blur", blur, (4,))
        if height < 2 or width < 2:
            raise ValueError(f"{op}: x must have at least 2 rows and columns (because it is blurred), got {[*x.shape]}")
        height, width = height - 1, width - 1
    for name, vector in (("demod", demod), *of_styles.items()):
        if vector is not None:
            check_shape(op, name, vector, (batch, channels))
    if noise is not None:
        check_broadcast(op, "noise", noise, (batch, 1, height, width))
    if strength is not None:
        check_shape(op, "strength", strength, ())
    if bias is not None:
        check_shape(op, "bias", bias, (channels,))
    check_choice(op, "act", act, tuple(SLOPES))
    check_gain(op, gain)
    clamp = check_clamp(op, clamp)
    chosen = _resolve(op, backend, x.device.type, blur)
    route = library.route(x, blur, demod, noise, strength, bias, *styles)
    if "reference" in (chosen, route):
        return _reference_layer_epilogue(
            x,
            blur=blur,
            demod=demod,
            noise=noise,
            strength=strength,
            bias=bias,
            styles=styles,
            act=act,
            gain=gain,
            clamp=clamp,
        )
    check_dtype(op, "x", x, tuple(native.DTYPES), f'backend is "{chosen}"')
    dtype = native.compute_dtype(x.dtype)
    if noise is None:
        strength = None
    else:
        shape = (1,) * (4 - noise.ndim) + tuple(noise.shape)
        noise = noise.reshape(shape[0], *shape[2:]).expand(-1, height, width)  # [1 or B, H, W]
    vectors = [None if v is None else v.to(dtype) for v in (blur, demod, bias, noise, strength, *styles)]
    settings = Epilogue(
        slope=SLOPES[act],
        gain=ACTIVATIONS[act][1] if gain is None else float(gain),
        clamp=math.inf if clamp is None else float(clamp),
        outputs=len(styles),
        keep_x=bool(keep_x),
    )
    if len(styles) == 1:
        vectors.append(None)
    return library.call(route, LayerEpilogue, x, *vectors, settings)[: len(styles)]
