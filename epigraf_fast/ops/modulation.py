"""Weight, style and demodulation of a modulated convolution, with the kernels' derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.modulation import DEMODULATION_EPSILON, weight_divisor
from ..reference.modulation import modulation as _reference
from . import library, native
from .backends import resolve
from .checks import check_shape, check_together


class Modulation(NamedTuple):
    """What a modulated layer needs beside its input: see `modulation`."""

    weight: Tensor  # [C_out, C_in, k, k], for the convolution
    style: Tensor  # [B, C_in], for the convolution's input
    demod: Tensor | None  # [B, C_out], for its output


class OfWeight:
    """What follows from a weight alone, made by the first of several calls with the same one: see `modulation`."""

    def __init__(self) -> None:
        self.made: dict[Hashable, Tensor | None] = {}

    def normalized(self, weight: Tensor) -> Tensor:
        """The weight as fp16's products need it (`normalize_weight` of the reference); its divisor is a constant."""
        if "divisor" not in self.made:
            self.made["divisor"] = weight_divisor(weight.detach())
        divisor = self.made["divisor"]
        return self.copy(weight, "normalized", lambda weight: weight / divisor, divisor)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype."""
        return weight if weight.dtype == dtype else self.copy(weight, dtype, lambda weight: weight.to(dtype))

    def copy(
        self, weight: Tensor, what: Hashable, make: Callable[[Tensor], Tensor], divisor: Tensor | None = None
    ) -> Tensor:
        """make(weight), a copy in another dtype or layout, of which the gradient over `divisor` is the weight's."""
        if what not in self.made:
            self.made[what] = make(weight.detach())
        made = self.made[what]
        return _Copied.apply(weight, made, divisor) if torch.is_grad_enabled() and weight.requires_grad else made


class _Copied(torch.autograd.Function):
    """A copy that was made before."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor, divisor: Tensor | None) -> Tensor:
        ctx.dtype, ctx.divisor = weight.dtype, divisor
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.to(ctx.dtype)
        return grad if ctx.divisor is None else grad / ctx.divisor, None, None


def modulation(
    weight: Tensor,
    style: Tensor,
    dtype: torch.dtype,
    *,
    demodulate: bool = True,
    of_weight: OfWeight | None = None,
    backend: str | None = None,
) -> Modulation:
    """demod[b, o] = 1 / sqrt(sum_{i, k} (weight[o, i, k] style[b, i])^2 + 1e-8), and its factors for a convolution.

    In fp16 weight and style are first scaled to keep products in range (weight to a maximum of 1 / sqrt(C_in k k) per
    output, style to 1 per image), which demodulation makes up for. The derivatives of cpu and cuda take both scales for
    constants (they matter as much as the 1e-8 does).

    Args:
        weight: [C_out, C_in, k, k].
        style: [B, C_in].
        dtype: That of the convolution.
        demodulate: Without it weight and style come back as they are, with demod None.
        of_weight: Keeps the weight's energy and its copy in `dtype` for further calls; a new one for other weights, and
            whenever this one has changed.

    Returns:
        `Modulation`: weight in `dtype`, style and demod in their own.

    Derivatives: any order; cpu and cuda fuse the first.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; unknown or missing backend.
    """
    check_together("modulation", weight=weight, style=style)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"modulation: dtype must be floating point, got {dtype}")
    check_shape("modulation", "weight", weight, ("C_out", "C_in", "k", "k"))
    check_shape("modulation", "style", style, ("B", weight.shape[1]))
    chosen = resolve("modulated_conv2d", backend, weight.device.type)
    route = library.route(weight, style)
    if "reference" in (chosen, route) or not demodulate or weight.shape[1] == 0:
        return Modulation(*_reference(weight, style, dtype, demodulate=demodulate))
    half = dtype == torch.float16
    if half:
        weight = (of_weight or OfWeight()).normalized(weight)
    weight = weight.to(native.compute_dtype(weight.dtype))
    known = of_weight and of_weight.made.get(("energy", half))
    args = weight, style.to(weight.dtype), known, half
    if route is library.PLAIN and torch.is_grad_enabled():
        weight, style, demod, energy = _ModulationOfWeight.apply(*_Modulating.ready(*args))
    else:
        made, demod, _, energy = library.call(route, _Modulating, *args)
        style = args[1] if made is None else made
    if of_weight is None:
        return Modulation(weight.to(dtype), style, demod)
    if len(style):  # else nothing was launched
        of_weight.made.setdefault(("energy", half), energy)
    return Modulation(of_weight.cast(weight, dtype), style, demod)


@library.register(
    "modulation(Tensor weight, Tensor given, Tensor? known, bool normalize) -> (Tensor, Tensor, Tensor, Tensor)"
)
class _Modulating:
    """Gives the style (None where that is `given`), demod, and for the backward the style's scale and the energy.

    The energy, [C_out, C_in] sums over the taps of the weight's squares, is None where it is `known`.
    """

    constants = ("known",)

    @staticmethod
    def ready(weight: Tensor, given: Tensor, known: Tensor | None, normalize: bool) -> tuple[Any, ...]:
        return *native.contiguous(weight, given, known), normalize

    @staticmethod
    def empty(weight: Tensor, given: Tensor, known: Tensor | None, normalize: bool) -> tuple[Tensor | None, ...]:
        batch, (c_out, c_in) = len(given), weight.shape[:2]
        style = given.new_empty(batch, c_in) if normalize else None
        scale = given.new_empty(batch) if normalize else None
        return style, given.new_empty(batch, c_out), scale, given.new_empty(c_out, c_in) if known is None else None

    @staticmethod
    def run(weight: Tensor, given: Tensor, known: Tensor | None, normalize: bool) -> tuple[Tensor | None, ...]:
        style, demod, scale, energy = outputs = _Modulating.empty(weight, given, known, normalize)
        numbers = *_modulation_sizes(weight, len(given)), DEMODULATION_EPSILON, torch.finfo(weight.dtype).tiny
        tensors = weight, given, style, scale, energy if known is None else known, demod
        native.launch("modulation_fwd", tensors, *numbers, known is not None)
        return outputs

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
        weight, given, known, _ = inputs
        style, demod, scale, energy = outputs
        ctx.save_for_backward(
            weight, given if style is None else style, scale, known if energy is None else energy, demod
        )
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
        weight, style, scale, energy, demod = ctx.saved_tensors
        if grad_demod is not None:
            tensors = grad_weight, grad_style, grad_demod, weight, style, scale, energy, demod
            grad_weight, grad_style = library.apply(_ModulationBackward, *tensors, ctx.needs_input_grad[:2])
        elif grad_style is not None and scale is not None:
            grad_style = grad_style * scale[:, None]
        return grad_weight, grad_style, None, None


class _ModulationOfWeight(torch.autograd.Function):
    """The weight too, which passes through, so that its two gradients meet in the backward kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        outputs = _Modulating.run(*args)
        _Modulating.keep(ctx, args, outputs)
        weight, given, *_ = args
        style, demod, _, energy = outputs
        return weight, given if style is None else style, demod, energy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Modulating.gradients(ctx, *grads[:3])


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
