"""Convolution with resampling, and the whole modulated layer of the synthesis network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.bias_act import ACTIVATIONS
from ..reference.modulated_conv2d import DEMODULATION_EPSILON, normalize_weight
from ..reference.modulated_conv2d import conv2d_resample as _reference_conv2d_resample
from ..reference.modulated_conv2d import layer_epilogue as _reference_layer_epilogue
from ..reference.modulated_conv2d import modulated_conv2d as _reference
from ..reference.modulated_conv2d import modulation as _reference_modulation
from . import native
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
from .upfirdn2d import upfirdn2d

SLOPES = {"linear": 1.0, "lrelu": 0.2}  # the activations of the epilogue, by their slope on the left


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
    """A k x k convolution that keeps the size, then resampling by the low-pass filter `kernel` (SPEC section 16).

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
    chosen = resolve("modulated_conv2d", backend, x.device.type)
    if chosen == "reference":
        return _reference_conv2d_resample(x, weight, kernel=kernel, up=up, down=down, flip_weight=flip_weight)
    filter_ = functools.partial(upfirdn2d, backend=chosen)
    return _reference_conv2d_resample(
        x, weight, kernel=kernel, up=up, down=down, flip_weight=flip_weight, upfirdn2d=filter_
    )


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
    """y = bias_act(demod[b, o] conv(x style[b, i], weight) + noise, bias): a whole layer (SPEC sections 7 and 16).

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
    chosen = resolve("modulated_conv2d", backend, x.device.type)
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
    if chosen == "reference" or not demodulate or weight.shape[1] == 0:
        return Modulation(*_reference_modulation(weight, style, dtype, affine=affine, demodulate=demodulate))
    half = dtype == torch.float16
    if half:
        weight = normalize_weight(weight)
    weight = weight.to(native.compute_dtype(weight.dtype)).contiguous()
    style, matrix, bias = (None if x is None else x.to(weight.dtype) for x in (style, matrix, bias))
    if style.stride(1) != 1 or affine is None:
        style = style.contiguous()
    if affine is not None:
        matrix, bias = matrix.contiguous(), bias.contiguous()
    weight, style, demod = _Modulation.apply(weight, style, matrix, bias, float(factor), half)
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
        epilogue: noise, strength, bias, styles, act, gain, clamp of `layer_epilogue`.

    Returns, derivatives, raises: As `layer_epilogue`.
    """
    check_together("modulated_layer", x=x, weight=weight, demod=demod, kernel=kernel)
    _check_convolution("modulated_layer", x, weight, kernel, up, 1)
    chosen = resolve("modulated_conv2d", backend, x.device.type)
    fused = up == 2 and weight.shape[-1] == 3 and tuple(kernel.shape) == (4,) and chosen != "reference"
    if fused:
        x = torch.nn.functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
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
    chosen = resolve("modulated_conv2d", backend, x.device.type)
    if chosen == "reference":
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
    vectors = [None if v is None else v.to(dtype).contiguous() for v in (blur, demod, bias, noise, strength, *styles)]
    settings = _Epilogue(
        slope=SLOPES[act],
        gain=ACTIVATIONS[act][1] if gain is None else float(gain),
        clamp=math.inf if clamp is None else float(clamp),
        outputs=len(styles),
    )
    if len(styles) == 1:
        vectors.append(None)
    x = x.contiguous(memory_format=torch.channels_last) if native.on_gpu(x) else native.dense(x)
    return _LayerEpilogue.apply(x, *vectors, settings)


class _Epilogue(NamedTuple):
    slope: float
    gain: float
    clamp: float
    outputs: int

    def for_launch(self, x: Tensor, noise: Tensor | None, blur: bool) -> tuple[Any, ...]:
        """What follows the tensors in a launch."""
        batch, channels, height, width = x.shape
        height, width = height - blur, width - blur
        stride = height * width if noise is not None and len(noise) == batch else 0
        numbers = self.slope, self.gain, self.clamp
        return native.DTYPES[x.dtype], _is_channels_last(x), *numbers, batch, channels, height, width, stride


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _outputs(x: Tensor, blur: Tensor | None) -> Tensor:
    """Memory for an output, in the layout of x."""
    if blur is None:
        return torch.empty_like(x)
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    batch, channels, height, width = x.shape
    size = batch, channels, height - 1, width - 1
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


class _LayerEpilogue(torch.autograd.Function):
    """x is dense; vectors and noise ([1 or B, H, W]) have the dtype that is computed in and are contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blur: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        demod, bias, noise, strength, style0, style1, settings = args
        outputs = [_outputs(x, blur) for _ in range(settings.outputs)]
        tensors = x, blur, demod, bias, noise, strength, style0, style1
        out1 = outputs[1] if settings.outputs == 2 else None
        sizes = settings.for_launch(x, noise, blur is not None)
        native.launch("layer_epilogue_fwd", (*tensors, outputs[0], out1), *sizes)
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, blur, demod, bias, noise, strength, *styles = ctx.saved_tensors
        present = [k for k, grad in enumerate(grads) if grad is not None]
        if not present:
            return (None,) * 9
        # Copied here, where autograd sees it: what the backward's own backward keeps is what it was given.
        grads = [_in_layout(grads[k], x) for k in present] + [None] * (2 - len(present))
        of_outputs = [styles[k] for k in present] + [None] * (2 - len(present))
        needs = ctx.needs_input_grad[:8]
        result = native.apply(
            _LayerEpilogueBackward, *grads, x, blur, demod, bias, noise, strength, *of_outputs, ctx.settings, needs
        )
        grad_styles = [None, None]
        for k, grad in zip(present, result[5:], strict=False):
            grad_styles[k] = grad
        return result[0], None, *result[1:5], *grad_styles, None


class _LayerEpilogueBackward(torch.autograd.Function):
    """The outputs that have a gradient come first, with their styles."""

    @staticmethod
    def forward(
        ctx: Any, grad0: Tensor, grad1: Tensor | None, x: Tensor, blur: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        demod, bias, noise, strength, style0, style1, settings, needs = args
        grad_x = torch.empty_like(x)
        grads = _Sums(x, blur, demod, bias, noise, strength, style0, style1 if grad1 is not None else None, needs)
        tensors = x, blur, demod, bias, noise, strength, style0, style1
        sizes = settings.for_launch(x, noise, blur is not None)
        native.launch("layer_epilogue_bwd", (*tensors, grad0, grad1, grad_x, *grads.for_launch()), *sizes)
        ctx.settings = settings
        ctx.save_for_backward(grad0, grad1, *tensors)
        ctx.set_materialize_grads(False)
        grad_noise = grads.map
        if grad_noise is not None:
            grad_noise = grad_noise if strength is None else grad_noise * strength
            grad_noise = grad_noise.sum(0, keepdim=True) if len(noise) == 1 else grad_noise
        return grad_x, grads.demod, grads.bias, grad_noise, grads.strength, grads.style0, grads.style1

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in incoming):
            return (None,) * 12
        return *_LayerEpilogueDoubleBackward.apply(*incoming, *ctx.saved_tensors, ctx.settings), None, None


class _LayerEpilogueDoubleBackward(torch.autograd.Function):
    """With the blur, of which the second derivative is rare, x and its gradients are filtered by `upfirdn2d`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        dot_x, dot_demod, dot_bias, dot_noise, dot_strength, dot_style0, dot_style1, *rest = args
        grad0, grad1, x, blur, demod, bias, noise, strength, style0, style1, settings = rest
        if blur is not None:
            x = _blur(x, blur)
            dot_x = None if dot_x is None else _blur(dot_x, blur)
        dot_x = None if dot_x is None else _in_layout(dot_x, x)
        grad0, grad1 = (None if grad is None else _in_layout(grad, x) for grad in (grad0, grad1))
        vectors = [None if v is None else v.contiguous() for v in (dot_demod, dot_bias, dot_style0, dot_style1)]
        dot_demod, dot_bias, dot_style0, dot_style1 = vectors
        along_noise = None  # by how much strength noise changes, [B, H, W]
        if dot_strength is not None:
            along_noise = dot_strength * noise
        if dot_noise is not None:
            added = dot_noise if strength is None else dot_noise * strength
            along_noise = added if along_noise is None else along_noise + added
        if along_noise is not None:
            along_noise = along_noise.expand(len(x), -1, -1).contiguous()
        grad_grads = torch.empty_like(x), None if grad1 is None else torch.empty_like(x)
        grad_x = torch.empty_like(x)
        style1 = None if grad1 is None else style1
        sums = _Sums(x, None, demod, bias, noise, strength, style0, style1, (True,) * 8)
        gradient_map = None if along_noise is None else torch.empty_like(along_noise)
        tensors = x, demod, bias, noise, strength, style0, style1, grad0, grad1
        incoming = dot_x, dot_demod, dot_bias, along_noise, dot_style0, dot_style1
        results = *grad_grads, grad_x, *sums.for_launch(gradient_map)
        sizes = settings.for_launch(x, noise, False)
        native.launch("layer_epilogue_double_bwd", (*tensors, *incoming, *results), *sizes)
        grad_noise, grad_strength = sums.map, sums.strength
        if grad_noise is not None:
            if strength is not None:
                grad_noise = grad_noise * strength
            if dot_strength is not None:
                grad_noise = grad_noise + dot_strength * gradient_map
            if dot_noise is not None and strength is not None:
                grad_strength = grad_strength + (gradient_map * dot_noise).sum()
            grad_noise = grad_noise.sum(0, keepdim=True) if len(noise) == 1 else grad_noise
        if blur is not None:
            grad_x = _blur(grad_x, blur, adjoint=True)
        vectors = sums.demod, sums.bias, grad_noise, grad_strength, sums.style0, sums.style1
        return *grad_grads, grad_x, None, *vectors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('layer_epilogue: only backend="reference" has a third derivative')


class _Sums:
    """Memory for the gradients of vectors and noise, where these are there and a gradient is needed."""

    def __init__(
        self,
        x: Tensor,
        blur: Tensor | None,
        demod: Tensor | None,
        bias: Tensor | None,
        noise: Tensor | None,
        strength: Tensor | None,
        style0: Tensor | None,
        style1: Tensor | None,
        needs: tuple[bool, ...],
    ) -> None:
        def like(vector: Tensor | None, needed: bool) -> Tensor | None:
            return None if vector is None or not needed else torch.empty_like(vector)

        self.demod, self.bias, self.strength = like(demod, needs[2]), like(bias, needs[3]), like(strength, needs[5])
        self.style0, self.style1 = like(style0, any(needs[6:8])), like(style1, any(needs[6:8]))
        self.map = None
        if noise is not None and needs[4]:
            self.map = noise.new_empty((len(x), *noise.shape[1:]))
        batch, channels, height, width = x.shape
        blurred = blur is not None
        sizes = batch, channels, height - blurred, width - blurred, blurred, native.on_gpu(x)
        count = native.extension().layer_epilogue_partials(*sizes)
        self.partials = x.new_empty(count, dtype=native.compute_dtype(x.dtype))

    def for_launch(self, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        vectors = self.demod, self.bias, self.strength, self.style0, self.style1
        return *vectors, self.map, *more, self.partials


def _in_layout(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of `like`, which is contiguous or channels_last."""
    layout = torch.channels_last if _is_channels_last(like) else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def _blur(x: Tensor, kernel: Tensor, *, adjoint: bool = False) -> Tensor:
    """The filter that ends upsampling by 2: [B, C, H+1, W+1] -> [B, C, H, W], or its adjoint."""
    padding = 2 if adjoint else 1
    return upfirdn2d(x, kernel, padding=padding, flip=adjoint, gain=4, backend=x.device.type)


class _Modulation(torch.autograd.Function):
    """Weight, style and demod: the weight passes through, so that its two gradients meet in the backward kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        source: Tensor,
        matrix: Tensor | None,
        bias: Tensor | None,
        factor: float,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`source` is the style, or with a matrix what it is computed from; all is contiguous, source in its rows."""
        batch, (c_out, c_in) = len(source), weight.shape[:2]
        if matrix is not None:
            style = source.new_empty(batch, c_in)
        else:
            style = source.clone() if normalize else source
        scale = source.new_empty(batch) if normalize else None
        energy, demod = source.new_empty(c_out, c_in), source.new_empty(batch, c_out)
        partials = None
        if native.on_gpu(weight):
            partials = source.new_empty(native.extension().modulation_partials(batch, c_out, c_in))
        tensors = weight, source if matrix is not None else None, matrix, bias, style, scale, energy, demod, partials
        numbers = DEMODULATION_EPSILON, factor, torch.finfo(weight.dtype).tiny, source.shape[1], source.stride(0)
        native.launch("modulation_fwd", tensors, *_modulation_sizes(weight, batch), *numbers)
        ctx.factor = factor
        ctx.save_for_backward(weight, style, scale, energy, demod, *(() if matrix is None else (source, matrix)))
        ctx.set_materialize_grads(False)
        return weight, style, demod

    @staticmethod
    def backward(
        ctx: Any, grad_weight: Tensor | None, grad_style: Tensor | None, grad_demod: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weight, style, scale, energy, demod, *affine = ctx.saved_tensors
        if grad_demod is not None:
            needs = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])
            # Copied here, where autograd sees it; a weight's taps need only be evenly spaced.
            if grad_weight is not None and grad_weight.stride(2) != grad_weight.stride(3) * grad_weight.shape[3]:
                grad_weight = grad_weight.contiguous()
            grads = grad_weight, None if grad_style is None else grad_style.contiguous(), grad_demod.contiguous()
            saved = weight, style, scale, energy, demod
            grad_weight, grad_style = native.apply(_ModulationBackward, *grads, *saved, needs)
        elif grad_style is not None and scale is not None:
            grad_style = grad_style * scale[:, None]
        if not affine or grad_style is None:
            return grad_weight, grad_style, None, None, None, None
        w, matrix = affine
        scaled = ctx.factor * grad_style
        grad_w = scaled @ matrix if ctx.needs_input_grad[1] else None
        grad_matrix = scaled.t() @ w if ctx.needs_input_grad[2] else None
        grad_bias = grad_style.sum(0) if ctx.needs_input_grad[3] else None
        return grad_weight, grad_w, grad_matrix, grad_bias, None, None


class _ModulationBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_weight: Tensor | None, grad_style: Tensor | None, grad_demod: Tensor, *args: Any
    ) -> tuple[Tensor | None, ...]:
        weight, style, scale, energy, demod, needs = args
        strides = 0, 0, 0
        if grad_weight is not None:
            strides = grad_weight.stride(0), grad_weight.stride(1), grad_weight.stride(3)
        grad_weight_out = torch.empty_like(weight) if needs[0] else None
        grad_style_out = torch.empty_like(style) if needs[1] else None
        tensors = weight, style, scale, energy, demod, grad_demod, grad_weight, grad_style
        results = grad_weight_out, grad_style_out
        native.launch("modulation_bwd", (*tensors, *results), *_modulation_sizes(weight, len(style)), *strides)
        ctx.save_for_backward(grad_weight, grad_style, grad_demod, weight, style, scale)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *gradients, _ = _differentiate(_modulation_backward, ctx.saved_tensors, grads)
        return *gradients, None, None, None, None


def _modulation_sizes(weight: Tensor, batch: int) -> tuple[Any, ...]:
    c_out, c_in, *taps = weight.shape
    return native.DTYPES[weight.dtype], batch, c_out, c_in, math.prod(taps)


def _modulation_backward(
    grad_weight: Tensor | None,
    grad_style: Tensor | None,
    grad_demod: Tensor,
    weight: Tensor,
    style: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `_ModulationBackward` computes, in operations that torch differentiates."""
    energy = weight.square().sum(dim=(2, 3))
    demod = (style.square() @ energy.t() + DEMODULATION_EPSILON).rsqrt()
    inner = -grad_demod * demod.pow(3)  # [B, C_out]
    to_weight = (inner.t() @ style.square())[:, :, None, None] * weight
    to_style = style * (inner @ energy)
    to_weight = to_weight if grad_weight is None else grad_weight + to_weight
    to_style = to_style if grad_style is None else grad_style + to_style
    return to_weight, to_style if scale is None else to_style * scale[:, None]


def _differentiate(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of a differentiable function to its inputs; themselves differentiable where autograd records."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that what one input owes to another does not count.
        views = [None if x is None else x.view_as(x) if x.requires_grad else x.detach() for x in inputs]
        wanted = [x for x in views if x is not None and x.requires_grad]
        pairs = [(y, grad) for y, grad in zip(function(*views), grads, strict=True) if grad is not None]
        outputs, incoming = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, incoming, create_graph=create_graph, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in views]
