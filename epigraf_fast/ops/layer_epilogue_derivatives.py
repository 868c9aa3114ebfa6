"""The derivatives of `layer_epilogue` on kernels: what its backward launches, and the backward of that."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.layer_epilogue import layer_epilogue as _reference
from . import library, native
from .upfirdn2d import upfirdn2d

SLOPES = {"linear": 1.0, "lrelu": 0.2}  # the activations, by their slope on the left


class Epilogue(NamedTuple):
    slope: float
    gain: float
    clamp: float
    outputs: int
    keep_x: bool  # for the backward; else the outputs are kept

    def for_launch(self, y: Tensor, noise: Tensor | None) -> tuple[Any, ...]:
        """What follows the tensors in a launch; y is like an output."""
        batch, channels, height, width = y.shape
        stride = height * width if noise is not None and len(noise) == batch else 0
        numbers = self.slope, self.gain, self.clamp
        return native.DTYPES[y.dtype], is_channels_last(y), *numbers, batch, channels, height, width, stride


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _input(y: Tensor, blur: Tensor | None) -> Tensor:
    """Memory for what is like x, in the layout of y, which is like an output."""
    if blur is None:
        return torch.empty_like(y)
    layout = torch.channels_last if is_channels_last(y) else torch.contiguous_format
    batch, channels, height, width = y.shape
    size = batch, channels, height + 1, width + 1
    return torch.empty(size, dtype=y.dtype, device=y.device, memory_format=layout)


def dense(x: Tensor) -> Tensor:
    """x in a layout that the launchers read: on a GPU in channels_last alone."""
    return x.contiguous(memory_format=torch.channels_last) if native.on_gpu(x) else native.dense(x)


def blurred(x: Tensor, kernel: Tensor, *, adjoint: bool = False, backend: str | None = None) -> Tensor:
    """The filter that ends upsampling by 2: [B, C, H+1, W+1] -> [B, C, H, W], or its adjoint."""
    return upfirdn2d(x, kernel, padding=2 if adjoint else 1, flip=adjoint, gain=4, backend=backend or x.device.type)


VECTORS = "Tensor? demod, Tensor? bias, Tensor? noise, Tensor? strength, Tensor? style0, Tensor? style1"
SETTINGS = "float slope, float gain, float clamp, int outputs, bool keep_x"


def by_reference(x: Tensor, blur: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
    """The two outputs of the op `layer_epilogue`, by operations of torch."""
    demod, bias, noise, strength, *styles, settings = args
    outputs = _reference(
        x,
        blur=blur,
        demod=demod,
        noise=None if noise is None else noise[:, None],
        strength=strength,
        bias=bias,
        styles=styles[: settings.outputs],
        act="linear" if settings.slope == SLOPES["linear"] else "lrelu",
        gain=settings.gain,
        clamp=None if settings.clamp == math.inf else settings.clamp,
    )
    return outputs[0], outputs[1] if settings.outputs == 2 else None


def recovered(
    outputs: Sequence[Tensor | None],
    demod: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    style0: Tensor | None,
    style1: Tensor | None,
    settings: Epilogue,
) -> Tensor:
    """The blur(x), or x, of these outputs, in the dtype that is computed in; beyond the clamp where it was clipped."""
    y = None
    for out, style in zip(outputs, (style0, style1), strict=True):
        if out is None:
            continue
        one = torch.ones((), dtype=native.compute_dtype(out.dtype), device=out.device)
        style = one if style is None else style[:, :, None, None]
        divided = out.to(one.dtype) / torch.where(style == 0, one, style)
        at_clamp = out.abs() >= (settings.clamp * style.abs()).to(out.dtype)
        if y is None:
            y, size, clipped = divided, style.abs(), at_clamp
        else:
            y, clipped = torch.where(style.abs() > size, divided, y), torch.where(style.abs() > size, at_clamp, clipped)
    u = y / settings.gain if settings.gain else y
    u = torch.where(u > 0, u, u / settings.slope)
    if settings.clamp < math.inf:
        u = torch.where(clipped, 2 * u.detach(), u)
    if noise is not None:
        u = u - (noise if strength is None else strength * noise)[:, None]
    if bias is not None:
        u = u - bias[:, None, None]
    if demod is not None:
        u = u / torch.where(demod == 0, torch.ones_like(demod), demod)[:, :, None, None]
    return u


@library.register(
    f"layer_epilogue_backward(Tensor grad0, Tensor? grad1, Tensor? x, Tensor? blur, {VECTORS}, Tensor? out0, "
    f"Tensor? out1, {SETTINGS}, bool[8] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class LayerEpilogueBackward:
    """The outputs that have a gradient come first, with their styles: themselves too where x is not there.

    Gives no gradient to the blur.
    """

    Settings = Epilogue

    @staticmethod
    def ready(
        grad0: Tensor, grad1: Tensor | None, x: Tensor | None, blur: Tensor | None, *args: Any
    ) -> tuple[Any, ...]:
        *vectors, out0, out1, settings, needs = args
        x, out0, out1 = (None if tensor is None else dense(tensor) for tensor in (x, out0, out1))
        like = next(tensor for tensor in (x, out0, out1) if tensor is not None)
        grad0, grad1 = (None if grad is None else _in_layout(grad, like) for grad in (grad0, grad1))
        return grad0, grad1, x, blur, *native.contiguous(*vectors), out0, out1, settings, needs

    @staticmethod
    def empty(
        grad0: Tensor, grad1: Tensor | None, x: Tensor | None, blur: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        demod, bias, noise, strength, style0, style1, _, _, _, needs = args
        of_styles = any(needs[6:8])
        vectors = (
            native.like(demod, needs[2]),
            native.like(bias, needs[3]),
            native.like(noise, needs[4]),
            native.like(strength, needs[5]),
        )
        return (
            _input(grad0, blur),
            *vectors,
            native.like(style0, of_styles),
            native.like(style1, of_styles and grad1 is not None),
        )

    @staticmethod
    def run(
        grad0: Tensor, grad1: Tensor | None, x: Tensor | None, blur: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        demod, bias, noise, strength, style0, style1, out0, out1, settings, needs = args
        if x is not None and blur is not None and native.on_gpu(x):  # rare: the kernel with the blur reads outputs
            grad_x, *vectors = LayerEpilogueBackward.run(grad0, grad1, blurred(x, blur), None, *args)
            return blurred(grad_x, blur, adjoint=True), *vectors
        grad_x = _input(grad0, blur)
        style1 = None if grad1 is None else style1
        grads = _Sums(grad0, blur is not None, demod, bias, noise, strength, style0, style1, needs)
        tensors = x, blur, demod, bias, noise, strength, style0, style1, out0, out1
        sizes = settings.for_launch(grad0, noise)
        native.launch("layer_epilogue_bwd", (*tensors, grad0, grad1, grad_x, *grads.for_launch()), *sizes)
        grad_noise = grads.map
        if grad_noise is not None:
            grad_noise = grad_noise if strength is None else grad_noise * strength
            grad_noise = grad_noise.sum(0, keepdim=True) if len(noise) == 1 else grad_noise
        return grad_x, grads.demod, grads.bias, grad_noise, grads.strength, grads.style0, grads.style1

    @staticmethod
    def reference(grad0: Tensor, grad1: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, out0, out1, settings, _ = args
        settings = settings._replace(outputs=1 if grad1 is None else 2)
        x, blur, *vectors = tensors
        if x is None:
            tensors = recovered((out0, out1), *vectors, settings).to(grad0.dtype), None, *vectors
        function = functools.partial(_with_settings, by_reference, settings)
        grad_x, _, *vectors = library.pull_back(function, tensors, (grad0, grad1))
        if x is None and blur is not None:
            grad_x = blurred(grad_x, blur, adjoint=True, backend="reference")
        return grad_x, *vectors

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], gradients: tuple[Tensor | None, ...]) -> None:
        *tensors, _, _, ctx.settings, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in incoming):
            return (None,) * 14
        gradients = library.apply(_LayerEpilogueDoubleBackward, *incoming, *ctx.saved_tensors, ctx.settings)
        return *gradients[:3], None, *gradients[3:], None, None, None, None


def _with_settings(function: Callable[..., Any], settings: Any, *tensors: Tensor | None) -> Any:
    return function(*tensors, settings)


@library.register(
    "layer_epilogue_double_backward(Tensor? dot_x, Tensor? dot_demod, Tensor? dot_bias, Tensor? dot_noise, "
    "Tensor? dot_strength, Tensor? dot_style0, Tensor? dot_style1, Tensor grad0, Tensor? grad1, Tensor x, "
    f"Tensor? blur, {VECTORS}, {SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class _LayerEpilogueDoubleBackward(library.Last):
    """With the blur, of which the second derivative is rare, x and its gradients are filtered by `upfirdn2d`."""

    Settings = Epilogue
    refusal = 'layer_epilogue: only backend="reference" has a third derivative'

    @staticmethod
    def ready(*args: Any) -> tuple[Any, ...]:
        dot_x, dot_demod, dot_bias, dot_noise, dot_strength, dot_style0, dot_style1, *rest = args
        *tensors, settings = rest
        *tensors, _, _, _, _ = LayerEpilogueBackward.ready(*tensors, None, None, settings, None)
        rest = *tensors, settings
        dot_demod, dot_bias, dot_style0, dot_style1 = native.contiguous(dot_demod, dot_bias, dot_style0, dot_style1)
        return dot_x, dot_demod, dot_bias, dot_noise, dot_strength, dot_style0, dot_style1, *rest

    @staticmethod
    def empty(*args: Any) -> tuple[Tensor | None, ...]:
        grad0, grad1, x, _, demod, bias, noise, strength, style0, style1, _ = args[7:]
        vectors = (native.like(v) for v in (demod, bias, noise, strength, style0))
        of_x = native.like(x, _bends(*args[:7]))
        return native.like(grad0), native.like(grad1), of_x, *vectors, native.like(style1, grad1 is not None)

    @staticmethod
    def run(*args: Any) -> tuple[Tensor | None, ...]:
        dot_x, dot_demod, dot_bias, dot_noise, dot_strength, dot_style0, dot_style1, *rest = args
        grad0, grad1, x, blur, demod, bias, noise, strength, style0, style1, settings = rest
        if blur is not None:
            x = blurred(x, blur)
            dot_x = None if dot_x is None else blurred(dot_x, blur)
        dot_x = None if dot_x is None else _in_layout(dot_x, x)
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
        sums = _Sums(x, False, demod, bias, noise, strength, style0, style1, (True,) * 8)
        gradient_map = None if along_noise is None else torch.empty_like(along_noise)
        tensors = x, demod, bias, noise, strength, style0, style1, grad0, grad1
        incoming = dot_x, dot_demod, dot_bias, along_noise, dot_style0, dot_style1
        results = *grad_grads, grad_x, *sums.for_launch(gradient_map)
        sizes = settings.for_launch(x, noise)
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
        if not _bends(*args[:7]):
            grad_x = None  # of nothing but zeros, which would be added to what is as large
        elif blur is not None:
            grad_x = blurred(grad_x, blur, adjoint=True)
        vectors = sums.demod, sums.bias, grad_noise, grad_strength, sums.style0, sums.style1
        return *grad_grads, grad_x, *vectors

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor | None, ...]:
        incoming, tensors, settings = args[:7], args[7:-1], args[-1]

        def backward(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
            return LayerEpilogueBackward.reference(*tensors, None, None, settings, None)

        gradients = library.pull_back(backward, tensors, incoming)
        return *gradients[:3], *gradients[4:]


def _bends(dot_x: Any, dot_demod: Any, dot_bias: Any, dot_noise: Any, dot_strength: Any, *dot_styles: Any) -> bool:
    """Whether a gradient that is differentiated depends on x beyond its sign."""
    return any(dot is not None for dot in (dot_demod, *dot_styles))


class _Sums:
    """Memory for the gradients of vectors and noise, where these are there and a gradient is needed."""

    def __init__(
        self,
        y: Tensor,
        blurred: bool,
        demod: Tensor | None,
        bias: Tensor | None,
        noise: Tensor | None,
        strength: Tensor | None,
        style0: Tensor | None,
        style1: Tensor | None,
        needs: tuple[bool, ...],
    ) -> None:
        self.demod, self.bias, self.strength = (
            native.like(demod, needs[2]),
            native.like(bias, needs[3]),
            native.like(strength, needs[5]),
        )
        self.style0, self.style1 = native.like(style0, any(needs[6:8])), native.like(style1, any(needs[6:8]))
        self.map = None
        if noise is not None and needs[4]:
            self.map = noise.new_empty((len(y), *noise.shape[1:]))
        count = native.extension().layer_epilogue_partials(*y.shape, blurred, native.on_gpu(y))
        self.partials = y.new_empty(count, dtype=native.compute_dtype(y.dtype))

    def for_launch(self, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        vectors = self.demod, self.bias, self.strength, self.style0, self.style1
        return *vectors, self.map, *more, self.partials


def _in_layout(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of `like`, which is contiguous or channels_last."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return x.contiguous(memory_format=layout)
