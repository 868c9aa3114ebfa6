"""Bias, activation, gain and clamp in one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.bias_act import ACTIVATIONS
from ..reference.bias_act import bias_act as _reference
from . import native
from .backends import resolve
from .checks import check_choice, check_clamp, check_dtype, check_gain, check_integers, check_shape, check_together


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = clamp(gain act(x + bias), -clamp, clamp) (SPEC section 16).

    Args:
        x: Any shape.
        bias: [x.shape[dim]].
        act: linear, relu, lrelu (slope 0.2), tanh, sigmoid, elu, selu, softplus or swish (x sigmoid(x)).
        gain: Finite; default sqrt(2) for relu, lrelu and swish, 1 for the others.
        clamp: Positive, or None. The gradient is 0 where clipped.

    Returns:
        Shape and dtype of x. NaN stays NaN.

    Derivatives: reference any order; cpu and cuda the second, the bias's summed in one fixed order.

    Raises:
        ValueError, TypeError: Wrong shape, dtype, device, dim or activation; a clamp that is not positive, a gain that
            is not finite; unknown or missing backend.
        NotImplementedError: cpu, cuda: a third derivative is asked for.
    """
    check_together("bias_act", x=x, bias=bias)
    check_choice("bias_act", "act", act, tuple(ACTIVATIONS))
    if bias is not None:
        check_integers("bias_act", dim=dim)
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"bias_act: dim must be a dimension of x, which has {x.ndim}, got {dim}")
        check_shape("bias_act", "bias", bias, (x.shape[dim],))
    check_gain("bias_act", gain)
    clamp = check_clamp("bias_act", clamp)
    chosen = resolve("bias_act", backend, x.device.type)
    if chosen == "reference":
        return _reference(x, bias, dim=dim, act=act, gain=gain, clamp=clamp)
    check_dtype("bias_act", "x", x, tuple(native.DTYPES), f'backend is "{chosen}"')
    settings = BiasActSettings(
        dim=dim if bias is not None else None,
        act=NUMBERS[act],
        gain=ACTIVATIONS[act][1] if gain is None else float(gain),
        clamp=math.inf if clamp is None else float(clamp),
    )
    if bias is not None:
        bias = bias.to(native.compute_dtype(x.dtype)).contiguous()
    x = native.dense(x)
    return _BiasAct.apply(x, bias, settings) if native.records(x, bias) else _launch(x, bias, settings)


NUMBERS = {act: number for number, act in enumerate(ACTIVATIONS)}  # as the extension's


class BiasActSettings(NamedTuple):
    dim: int | None  # None without bias
    act: int  # its number in NUMBERS
    gain: float
    clamp: float  # infinite where there is none

    @property
    def constant(self) -> bool:
        """Whether the derivative is the gain everywhere."""
        return self.act == 0 and self.clamp == math.inf

    @property
    def curved(self) -> bool:
        """Whether there is a second derivative: not of linear, relu and lrelu."""
        return self.act > 2

    def for_launch(self, x: Tensor) -> tuple[Any, ...]:
        """What follows the tensors in a launch; element e of x has channel (e // inner) % channels."""
        count = x.numel()
        channels = 1 if self.dim is None else x.shape[self.dim]
        inner = 1 if count == 0 else count if channels == 1 else x.stride(self.dim)
        return native.DTYPES[x.dtype], self.act, self.gain, self.clamp, count, channels, inner


def _launch(x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> Tensor:
    """x is dense, the bias contiguous; it has, as everything that belongs to it, the dtype that is computed in."""
    y = torch.empty_like(x)
    native.launch("bias_act_fwd", (x, bias, y), *settings.for_launch(x))
    return y


class _BiasAct(torch.autograd.Function):
    """Takes what `_launch` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> Tensor:
        y = _launch(x, bias, settings)
        ctx.settings = settings
        ctx.save_for_backward(*((None, None) if settings.constant else (x, bias)))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *bias_act_backward(grad_y, *ctx.saved_tensors, ctx.settings, ctx.needs_input_grad[1]), None


def bias_act_backward(
    grad_y: Tensor, x: Tensor | None, bias: Tensor | None, settings: BiasActSettings, wants_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients to x and the bias, differentiable once; these are None where the derivative does not depend on them."""
    grad_y = native.dense(grad_y) if x is None else native.dense_as(grad_y, x)
    return native.apply(_BiasActBackward, grad_y, x, bias, settings, wants_bias)


class _BiasActBackward(torch.autograd.Function):
    """x and the bias are None where the derivative does not depend on them."""

    @staticmethod
    def forward(
        ctx: Any, grad_y: Tensor, x: Tensor | None, bias: Tensor | None, settings: BiasActSettings, wants_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_x = torch.empty_like(grad_y)
        grad_bias, partials = _sums(grad_y, settings) if wants_bias else (None, None)
        tensors = grad_y, x, bias, grad_x, grad_bias, partials
        native.launch("bias_act_bwd", tensors, *settings.for_launch(grad_y))
        ctx.settings = settings
        ctx.save_for_backward(grad_y, x, bias)
        ctx.set_materialize_grads(False)
        return grad_x, grad_bias

    @staticmethod
    def backward(
        ctx: Any, grad_grad_x: Tensor | None, grad_grad_bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if grad_grad_x is None and grad_grad_bias is None:
            return None, None, None, None, None
        grad_y, x, bias = ctx.saved_tensors
        if grad_grad_x is not None:
            grad_grad_x = native.dense_as(grad_grad_x, grad_y)
        needed = ctx.needs_input_grad[:3]
        incoming = grad_grad_x, grad_grad_bias
        return *_BiasActDoubleBackward.apply(*incoming, grad_y, x, bias, ctx.settings, needed), None, None


class _BiasActDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad_grad_x: Tensor | None,
        grad_grad_bias: Tensor | None,
        grad_y: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        settings: BiasActSettings,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_grad_y = torch.empty_like(grad_y) if needed[0] else None
        grad_x = torch.empty_like(grad_y) if needed[1] and settings.curved else None
        grad_bias, partials = _sums(grad_y, settings) if needed[2] and settings.curved else (None, None)
        grad_grad_bias = None if grad_grad_bias is None else grad_grad_bias.contiguous()
        tensors = grad_grad_x, grad_grad_bias, grad_y, x, bias, grad_grad_y, grad_x, grad_bias, partials
        native.launch("bias_act_double_bwd", tensors, *settings.for_launch(grad_y))
        if needed[2] and grad_bias is None:
            # Not None: an optimizer's state moves with a gradient of 0, which is what the reference gives.
            grad_bias = torch.zeros_like(bias)
        return grad_grad_y, grad_x, grad_bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('bias_act: only backend="reference" has a third derivative')


def _sums(grad_y: Tensor, settings: BiasActSettings) -> tuple[Tensor, Tensor]:
    """Where the gradient of the bias goes, and the scratch memory of its parts."""
    grad_bias = grad_y.new_empty(grad_y.shape[settings.dim], dtype=native.compute_dtype(grad_y.dtype))
    parts = native.extension().bias_act_parts(*settings.for_launch(grad_y)[-3:])
    return grad_bias, grad_bias.new_empty(parts * grad_bias.numel())
