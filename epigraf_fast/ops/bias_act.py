"""Bias, activation, gain and clamp in one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.bias_act import ACTIVATIONS
from ..reference.bias_act import bias_act as _reference
from . import library, native
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
    """y = clamp(gain act(x + bias), -clamp, clamp) (method.md 7).

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
    route = library.route(x, bias)
    if "reference" in (chosen, route):
        return _reference(x, bias, dim=dim, act=act, gain=gain, clamp=clamp)
    check_dtype("bias_act", "x", x, tuple(native.DTYPES), f'backend is "{chosen}"')
    settings = BiasActSettings(
        dim=dim if bias is not None else None,
        act=NUMBERS[act],
        gain=ACTIVATIONS[act][1] if gain is None else float(gain),
        clamp=math.inf if clamp is None else float(clamp),
    )
    dtype = native.compute_dtype(x.dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return library.call(route, _BiasAct, x, bias, settings)


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

    def for_reference(self) -> dict[str, Any]:
        dim = 1 if self.dim is None else self.dim
        clamp = None if self.clamp == math.inf else self.clamp
        return {"dim": dim, "act": tuple(ACTIVATIONS)[self.act], "gain": self.gain, "clamp": clamp}

    def like_bias(self, x: Tensor) -> Tensor:
        """Where the gradient of the bias goes."""
        return x.new_empty(x.shape[self.dim], dtype=native.compute_dtype(x.dtype))

    def scratch(self, x: Tensor, grad_bias: Tensor | None) -> Tensor | None:
        """Where the parts of that gradient go, if there is one."""
        if grad_bias is None:
            return None
        parts = native.extension().bias_act_parts(*self.for_launch(x)[-3:])
        return grad_bias.new_empty(parts * grad_bias.numel())


@library.register("bias_act(Tensor x, Tensor? bias, int? dim, int act, float gain, float clamp) -> Tensor")
class _BiasAct:
    """The bias, as everything that belongs to it, has the dtype that is computed in."""

    Settings = BiasActSettings

    @staticmethod
    def ready(x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> tuple[Any, ...]:
        return native.dense(x), None if bias is None else bias.contiguous(), settings

    @staticmethod
    def empty(x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def run(x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> Tensor:
        y = torch.empty_like(x)
        native.launch("bias_act_fwd", (x, bias, y), *settings.for_launch(x))
        return y

    @staticmethod
    def reference(x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> Tensor:
        return _reference(x, bias, **settings.for_reference())

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
        x, bias, ctx.settings = inputs
        ctx.save_for_backward(*((None, None) if ctx.settings.constant else (x, bias)))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        wants_bias = ctx.needs_input_grad[1] and library.wanted(ctx, 1)
        return *bias_act_backward(grad_y, *ctx.saved_tensors, ctx.settings, wants_bias), None


def bias_act_backward(
    grad_y: Tensor, x: Tensor | None, bias: Tensor | None, settings: BiasActSettings, wants_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients to x and the bias, differentiable once; these are None where the derivative does not depend on them."""
    return library.apply(_BiasActBackward, grad_y, x, bias, settings, wants_bias)


@library.register(
    "bias_act_backward(Tensor grad_y, Tensor? x, Tensor? bias, "
    "int? dim, int act, float gain, float clamp, bool wants_bias) -> (Tensor, Tensor)"
)
class _BiasActBackward:
    """x and the bias are None where the derivative does not depend on them."""

    Settings = BiasActSettings

    @staticmethod
    def ready(grad_y: Tensor, x: Tensor | None, bias: Tensor | None, *settings: Any) -> tuple[Any, ...]:
        x = None if x is None else native.dense(x)
        grad_y = native.dense(grad_y) if x is None else native.dense_as(grad_y, x)
        return grad_y, x, None if bias is None else bias.contiguous(), *settings

    @staticmethod
    def empty(
        grad_y: Tensor, x: Tensor | None, bias: Tensor | None, settings: BiasActSettings, wants_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return torch.empty_like(grad_y), settings.like_bias(grad_y) if wants_bias else None

    @staticmethod
    def run(
        grad_y: Tensor, x: Tensor | None, bias: Tensor | None, settings: BiasActSettings, wants_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_x, grad_bias = _BiasActBackward.empty(grad_y, x, bias, settings, wants_bias)
        tensors = grad_y, x, bias, grad_x, grad_bias, settings.scratch(grad_y, grad_bias)
        native.launch("bias_act_bwd", tensors, *settings.for_launch(grad_y))
        return grad_x, grad_bias

    @staticmethod
    def reference(
        grad_y: Tensor, x: Tensor | None, bias: Tensor | None, settings: BiasActSettings, wants_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        if x is None:
            grad_x = settings.gain * grad_y
            others = [i for i in range(grad_y.ndim) if wants_bias and i != settings.dim % grad_y.ndim]
            return grad_x, grad_x.sum(others).to(native.compute_dtype(grad_y.dtype)) if wants_bias else None
        return library.pull_back(functools.partial(_BiasAct.reference, settings=settings), (x, bias), (grad_y,))

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], gradients: tuple[Tensor, Tensor | None]) -> None:
        *tensors, ctx.settings, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_grad_x: Tensor | None, grad_grad_bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if grad_grad_x is None and grad_grad_bias is None:
            return None, None, None, None, None
        tensors = grad_grad_x, grad_grad_bias, *ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return *library.apply(_BiasActDoubleBackward, *tensors, ctx.settings, needed), None, None


@library.register(
    "bias_act_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_bias, Tensor grad_y, Tensor? x, Tensor? bias, "
    "int? dim, int act, float gain, float clamp, bool[3] needed) -> (Tensor, Tensor, Tensor)"
)
class _BiasActDoubleBackward(library.Last):
    """Gradients to what `_BiasActBackward` takes, where they are needed."""

    Settings = BiasActSettings
    refusal = 'bias_act: only backend="reference" has a third derivative'

    @staticmethod
    def ready(grad_grad_x: Tensor | None, grad_grad_bias: Tensor | None, grad_y: Tensor, *rest: Any) -> tuple[Any, ...]:
        grad_y, *rest = _BiasActBackward.ready(grad_y, *rest)
        grad_grad_x = None if grad_grad_x is None else native.dense_as(grad_grad_x, grad_y)
        grad_grad_bias = None if grad_grad_bias is None else grad_grad_bias.contiguous()
        return grad_grad_x, grad_grad_bias, grad_y, *rest

    @staticmethod
    def empty(
        grad_grad_x: Tensor | None,
        grad_grad_bias: Tensor | None,
        grad_y: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        settings: BiasActSettings,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        grad_grad_y = torch.empty_like(grad_y) if needed[0] else None
        grad_x = torch.empty_like(grad_y) if needed[1] and settings.curved else None
        # Not None: an optimizer's state moves with a gradient of 0, which is what the reference gives.
        return grad_grad_y, grad_x, settings.like_bias(grad_y) if needed[2] else None

    @staticmethod
    def run(
        grad_grad_x: Tensor | None,
        grad_grad_bias: Tensor | None,
        grad_y: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        settings: BiasActSettings,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        tensors = grad_grad_x, grad_grad_bias, grad_y, x, bias
        grad_grad_y, grad_x, grad_bias = _BiasActDoubleBackward.empty(*tensors, settings, needed)
        curvature = grad_bias if settings.curved else None
        results = grad_grad_y, grad_x, curvature, settings.scratch(grad_y, curvature)
        native.launch("bias_act_double_bwd", (*tensors, *results), *settings.for_launch(grad_y))
        if curvature is None and grad_bias is not None:
            grad_bias.zero_()
        return grad_grad_y, grad_x, grad_bias

    @staticmethod
    def reference(
        grad_grad_x: Tensor | None,
        grad_grad_bias: Tensor | None,
        grad_y: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        settings: BiasActSettings,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        backward = functools.partial(_BiasActBackward.reference, settings=settings, wants_bias=settings.dim is not None)
        return library.pull_back(backward, (grad_y, x, bias), (grad_grad_x, grad_grad_bias))
