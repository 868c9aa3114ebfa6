"""torch's convolutions with further derivatives that are convolutions of the usual kind.

torch's own second derivative takes the gradient to the weight for a convolution of transposed factors, whose kernel is
as large as an image and whose result lies transposed in memory. Here it is the same call as in a first derivative. And
what no gradient is asked for is not computed: a Function of Python's would not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from . import convolution_cpu, convolution_layout, library
from .convolution_layout import Plan


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """torch's conv2d: x [B, C_in, H, W], weight [C_out, C_in, k, k]. Derivatives of any order."""
    if _is_eager(x, weight):
        return differentiable(x, weight, Plan(stride, padding, False), Arithmetic)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def conv_transpose2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """torch's conv_transpose2d: x [B, C_in, H, W], weight [C_in, C_out, k, k]. Derivatives of any order."""
    if _is_eager(x, weight):
        return differentiable(x, weight, Plan(stride, 0, True), Arithmetic)
    return F.conv_transpose2d(x, weight, stride=stride)


def _is_eager(x: Tensor, weight: Tensor) -> bool:
    return not is_compiling() and library.route(x, weight) is not library.REFERENCE


class Arithmetic:
    """How a convolution and its gradients are computed: by torch, in the layout that was chosen."""

    @staticmethod
    def convolution(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
        return convolution_layout.convolution(x, weight, plan)

    @staticmethod
    def gradients(
        grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """To x and the weight, those of the two that are wanted."""
        by_products = wanted[1] and convolution_cpu.suits(grad, x, weight)
        found = convolution_layout.gradients(grad, x, weight, plan, (wanted[0], wanted[1] and not by_products))
        return (found[0], convolution_cpu.gradient_of_weight(grad, x, weight, plan)) if by_products else found


def differentiable(x: Tensor, weight: Tensor, plan: Plan, way: type[Arithmetic]) -> Tensor:
    """The convolution, and with it its derivatives of any order, by this arithmetic."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Convolution.apply(x, weight, plan, way)
    return way.convolution(x, weight, plan)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: Plan, way: type[Arithmetic]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.way = plan, way
        return way.convolution(x, weight, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = library.wanted(ctx, 0), library.wanted(ctx, 1)
        return *_gradients(grad, *ctx.saved_tensors, ctx.plan, ctx.way, wanted), None, None


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        plan: Plan,
        way: type[Arithmetic],
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, weight)
        ctx.plan, ctx.way = plan, way
        ctx.set_materialize_grads(False)
        return way.gradients(grad, x, weight, plan, wanted)

    @staticmethod
    def backward(ctx: Any, dot_x: Tensor | None, dot_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """<grad, conv(x, weight)> is linear in each of the three."""
        grad, x, weight = ctx.saved_tensors
        to_grad = to_x = to_weight = None
        if library.wanted(ctx, 0):
            for pair in ((dot_x, weight), (x, dot_weight)):
                if pair[0] is not None and pair[1] is not None:
                    part = _convolution(*pair, ctx.plan, ctx.way)
                    to_grad = part if to_grad is None else to_grad + part
        if dot_weight is not None and library.wanted(ctx, 1):
            to_x, _ = _gradients(grad, x, dot_weight, ctx.plan, ctx.way, (True, False))
        if dot_x is not None and library.wanted(ctx, 2):
            _, to_weight = _gradients(grad, dot_x, weight, ctx.plan, ctx.way, (False, True))
        return to_grad, to_x, to_weight, None, None, None


# In a backward, where gradients may be batched or have a direction of their own: what only torch's operations know.


def _convolution(x: Tensor, weight: Tensor, plan: Plan, way: type[Arithmetic]) -> Tensor:
    if library.route_of_gradients(x, weight) is library.REFERENCE:
        return torch.ops.aten.convolution(x, weight, None, *plan.arguments())
    return _Convolution.apply(x, weight, plan, way)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, way: type[Arithmetic], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    if library.route_of_gradients(grad, x, weight) is library.REFERENCE:
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *plan.arguments(), [*wanted, False])[:2]
    return _Gradients.apply(grad, x, weight, plan, way, wanted)
