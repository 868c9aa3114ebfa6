"""What follows the convolution of a modulated layer: blur, demodulation, noise, bias and activation in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.bias_act import ACTIVATIONS
from ..reference.layer_epilogue import layer_epilogue as _reference
from . import library, native
from .backends import resolve
from .checks import check_broadcast, check_choice, check_clamp, check_dtype, check_gain, check_shape, check_together
from .layer_epilogue_derivatives import (
    SETTINGS,
    SLOPES,
    VECTORS,
    Epilogue,
    LayerEpilogueBackward,
    Vectors,
    blurred,
    by_reference,
    dense,
    recovered,
    resized,
)


def resolve_with_filter(op: str, backend: str | None, device_type: str, kernel: Tensor | None) -> str:
    """The backend that a call gets: the reference where a gradient to the low-pass filter is asked for."""
    chosen = resolve("modulated_conv2d", backend, device_type)
    if kernel is None or not (kernel.requires_grad and torch.is_grad_enabled()) or chosen == "reference":
        return chosen
    if backend is not None and library.route(kernel) is not library.REFERENCE:
        raise NotImplementedError(
            f'{op}: backend "{backend}" has no gradient to the low-pass filter; use backend="reference", or detach it'
        )
    return "reference"


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
        keep_x: False lets the backward of cpu and cuda take what it needs of x from the outputs, so that x need not be
            kept. A demod or style of exactly 0 then has gradient 0, and what is at the clamp counts as clipped.

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
    chosen = resolve_with_filter(op, backend, x.device.type, blur)
    route = library.route(x, blur, demod, noise, strength, bias, *styles)
    if "reference" in (chosen, route):
        return _reference(
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
    return library.call(route, _LayerEpilogue, x, *vectors, settings)[: len(styles)]


@library.register(f"layer_epilogue(Tensor x, Tensor? blur, {VECTORS}, {SETTINGS}) -> (Tensor, Tensor)")
class _LayerEpilogue:
    """The second output may be None."""

    Settings = Epilogue
    constants = ("blur",)

    @staticmethod
    def ready(x: Tensor, *args: Any) -> tuple[Any, ...]:
        *vectors, settings = args
        return dense(x), *native.contiguous(*vectors), settings

    @staticmethod
    def empty(x: Tensor, blur: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
        return resized(x, blur, -1), resized(x, blur, -1) if args[-1].outputs == 2 else None

    @staticmethod
    def run(x: Tensor, blur: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
        vectors, settings = Vectors(*args[:-1]), args[-1]
        outputs = _LayerEpilogue.empty(x, blur, settings)
        sizes = settings.for_launch(outputs[0], vectors.noise)
        native.launch("layer_epilogue_fwd", (x, blur, *vectors, *outputs), *sizes)
        return outputs

    reference = staticmethod(by_reference)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor | None]) -> None:
        x, *tensors, ctx.settings = inputs
        keep_x = ctx.settings.keep_x
        styles = tensors[-2:]
        plain = [k for k in range(ctx.settings.outputs) if styles[k] is None]  # y itself, which says all
        kept = () if keep_x else plain[:1] or range(2)
        outputs = (y if k in kept else None for k, y in enumerate(outputs))
        ctx.save_for_backward(x if keep_x else None, *tensors, *outputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, blur, *vectors, out0, out1 = ctx.saved_tensors
        outputs, styles = (out0, out1), vectors[4:]
        if all(grad is None for grad in grads):
            return (None,) * 9
        if x is None and sum(y is not None for y in outputs) == 1:  # which says all only with its own style beside it
            grads = [
                torch.zeros_like(y) if grad is None and y is not None else grad
                for grad, y in zip(grads, outputs, strict=True)
            ]
        present = [k for k, grad in enumerate(grads) if grad is not None]
        grads = [grads[k] for k in present] + [None] * (2 - len(present))
        of_styles, outputs = ([xs[k] for k in present] + [None] * (2 - len(present)) for xs in (styles, outputs))
        given = [True, *(tensor is not None for tensor in (blur, *vectors))]
        needs = tuple(
            needed and library.wanted(ctx, sum(given[:place])) for place, needed in enumerate(ctx.needs_input_grad[:8])
        )
        vectors = *vectors[:4], *of_styles
        again, dtype = x is None and torch.is_grad_enabled(), grads[0].dtype
        if again:  # x as a function of the outputs: differentiable, where the kernel that reads them is not
            x = recovered(outputs, vectors, ctx.settings)
            grads = [None if grad is None else grad.to(x.dtype) for grad in grads]
            blur, kernel, outputs = None, blur, (None, None)
        result = library.apply(LayerEpilogueBackward, *grads, x, blur, *vectors, *outputs, ctx.settings, needs)
        grad_x = result[0]
        if again:
            grad_x = grad_x if kernel is None else blurred(grad_x, kernel, adjoint=True)
            grad_x = grad_x.to(dtype)
        grad_styles = [None, None]
        for k, grad in zip(present, result[5:], strict=False):
            grad_styles[k] = grad
        return grad_x, None, *result[1:5], *grad_styles, None
