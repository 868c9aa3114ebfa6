"""Weight, style and demodulation of a modulated convolution, with the kernels' derivatives."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.modulation import DEMODULATION_EPSILON, normalize_weight
from ..reference.modulation import modulation as _reference
from . import library, native
from .backends import resolve
from .checks import check_finite, check_shape, check_together


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
        return Modulation(*_reference(weight, style, dtype, affine=affine, demodulate=demodulate))
    half = dtype == torch.float16
    if half:
        weight = normalize_weight(weight)
    weight = weight.to(native.compute_dtype(weight.dtype))
    style, matrix, bias = (None if x is None else x.to(weight.dtype) for x in (style, matrix, bias))
    args = weight, style, matrix, bias, float(factor), half
    if route is library.PLAIN and torch.is_grad_enabled():
        weight, style, demod = _ModulationOfWeight.apply(*_Modulating.ready(*args))
    else:
        made, demod, *_ = library.call(route, _Modulating, *args)
        style = style if made is None else made
    return Modulation(weight.to(dtype), style, demod)


@library.register(
    "modulation(Tensor weight, Tensor source, Tensor? matrix, Tensor? bias, float factor, bool normalize) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
class _Modulating:
    """`source` is the style, or with a matrix what it is computed from.

    Gives the style (None where that is `source`), demod, and for the backward the style's scale and the energy.
    """

    @staticmethod
    def ready(
        weight: Tensor, source: Tensor, matrix: Tensor | None, bias: Tensor | None, *more: Any
    ) -> tuple[Any, ...]:
        if matrix is None or source.stride(1) != 1:
            source = source.contiguous()
        return weight.contiguous(), source, *native.contiguous(matrix, bias), *more

    @staticmethod
    def empty(
        weight: Tensor, source: Tensor, matrix: Tensor | None, bias: Tensor | None, factor: float, normalize: bool
    ) -> tuple[Tensor | None, ...]:
        batch, (c_out, c_in) = len(source), weight.shape[:2]
        style = source.new_empty(batch, c_in) if normalize or matrix is not None else None
        scale = source.new_empty(batch) if normalize else None
        return style, source.new_empty(batch, c_out), scale, source.new_empty(c_out, c_in)

    @staticmethod
    def run(
        weight: Tensor, source: Tensor, matrix: Tensor | None, bias: Tensor | None, factor: float, normalize: bool
    ) -> tuple[Tensor | None, ...]:
        outputs = _Modulating.empty(weight, source, matrix, bias, factor, normalize)
        style, demod, scale, energy = outputs
        if matrix is None and normalize:
            style.copy_(source)
        batch, partials = len(source), None
        if normalize and native.on_gpu(weight):
            partials = source.new_empty(native.extension().modulation_partials(batch, weight.shape[1]))
        tensors = weight, source if matrix is not None else None, matrix, bias, source if style is None else style
        numbers = DEMODULATION_EPSILON, factor, torch.finfo(weight.dtype).tiny, source.shape[1], source.stride(0)
        sizes = _modulation_sizes(weight, batch)
        native.launch("modulation_fwd", (*tensors, scale, energy, demod, partials), *sizes, *numbers)
        return outputs

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
        weight, source, matrix, _, ctx.factor, _ = inputs
        style, demod, scale, energy = outputs
        affine = () if matrix is None else (source, matrix)
        ctx.save_for_backward(weight, source if style is None else style, scale, energy, demod, *affine)
        ctx.mark_non_differentiable(*(x for x in (scale, energy) if x is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_style: Tensor | None, grad_demod: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _Modulating.gradients(ctx, None, grad_style, grad_demod)

    @staticmethod
    def gradients(
        ctx: Any, grad_weight: Tensor | None, grad_style: Tensor | None, grad_demod: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """To all inputs; grad_weight is what else the weight is used for."""
        weight, style, scale, energy, demod, *affine = ctx.saved_tensors
        if grad_demod is not None:
            needs = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])
            tensors = grad_weight, grad_style, grad_demod, weight, style, scale, energy, demod
            grad_weight, grad_style = library.apply(_ModulationBackward, *tensors, needs)
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


class _ModulationOfWeight(torch.autograd.Function):
    """Weight, style and demod: the weight passes through, so that its two gradients meet in the backward kernel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, source: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        args = weight, source, *more
        outputs = _Modulating.run(*args)
        _Modulating.keep(ctx, args, outputs)
        style, demod, *_ = outputs
        return weight, source if style is None else style, demod

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Modulating.gradients(ctx, *grads)


@library.register(
    "modulation_backward(Tensor? grad_weight, Tensor? grad_style, Tensor grad_demod, Tensor weight, Tensor style, "
    "Tensor? scale, Tensor energy, Tensor demod, bool[2] needs) -> (Tensor, Tensor)"
)
class _ModulationBackward:
    """Differentiable to any order, by `_modulation_backward`; energy and demod follow from weight and style."""

    @staticmethod
    def ready(grad_weight: Tensor | None, grad_style: Tensor | None, grad_demod: Tensor, *args: Any) -> tuple[Any, ...]:
        *tensors, needs = args
        if grad_weight is not None and grad_weight.stride(2) != grad_weight.stride(3) * grad_weight.shape[3]:
            grad_weight = grad_weight.contiguous()
        return grad_weight, *native.contiguous(grad_style, grad_demod, *tensors), needs

    @staticmethod
    def empty(*args: Any) -> tuple[Tensor | None, Tensor | None]:
        weight, style, needs = args[3], args[4], args[-1]
        return native.like(weight, needs[0]), native.like(style, needs[1])

    @staticmethod
    def run(
        grad_weight: Tensor | None, grad_style: Tensor | None, grad_demod: Tensor, *args: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        weight, style, scale, energy, demod, _ = args
        results = _ModulationBackward.empty(grad_weight, grad_style, grad_demod, *args)
        strides = 0, 0, 0
        if grad_weight is not None:
            strides = grad_weight.stride(0), grad_weight.stride(1), grad_weight.stride(3)
        tensors = weight, style, scale, energy, demod, grad_demod, grad_weight, grad_style
        native.launch("modulation_bwd", (*tensors, *results), *_modulation_sizes(weight, len(style)), *strides)
        return results

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor, Tensor]:
        return _modulation_backward(*args[:6])

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], gradients: tuple[Tensor | None, Tensor | None]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *library.pull_back(_modulation_backward, ctx.saved_tensors, grads), None, None, None


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
