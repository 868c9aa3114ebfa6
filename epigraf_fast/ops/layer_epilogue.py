"""The kernels of `layer_epilogue` and their derivatives; the public function is in `modulated_conv2d`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.modulated_conv2d import layer_epilogue as _reference
from . import library, native
from .upfirdn2d import upfirdn2d

SLOPES = {"linear": 1.0, "lrelu": 0.2}  # the activations, by their slope on the left


class Epilogue(NamedTuple):
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


def _dense(x: Tensor) -> Tensor:
    """x in a layout that the launchers read: on a GPU in channels_last alone."""
    return x.contiguous(memory_format=torch.channels_last) if native.on_gpu(x) else native.dense(x)


_VECTORS = "Tensor? demod, Tensor? bias, Tensor? noise, Tensor? strength, Tensor? style0, Tensor? style1"
_SETTINGS = "float slope, float gain, float clamp, int outputs"


@library.register(f"layer_epilogue(Tensor x, Tensor? blur, {_VECTORS}, {_SETTINGS}) -> (Tensor, Tensor)")
class LayerEpilogue:
    """Vectors and noise ([1 or B, H, W]) have the dtype that is computed in; the second output may be None."""

    Settings = Epilogue
    constants = ("blur",)

    @staticmethod
    def ready(x: Tensor, *args: Any) -> tuple[Any, ...]:
        *vectors, settings = args
        return _dense(x), *native.contiguous(*vectors), settings

    @staticmethod
    def empty(x: Tensor, blur: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
        return _outputs(x, blur), _outputs(x, blur) if args[-1].outputs == 2 else None

    @staticmethod
    def run(x: Tensor, blur: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
        demod, bias, noise, strength, style0, style1, settings = args
        outputs = LayerEpilogue.empty(x, blur, settings)
        sizes = settings.for_launch(x, noise, blur is not None)
        native.launch("layer_epilogue_fwd", (x, blur, demod, bias, noise, strength, style0, style1, *outputs), *sizes)
        return outputs

    @staticmethod
    def reference(x: Tensor, blur: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
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

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor | None]) -> None:
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, blur, demod, bias, noise, strength, *styles = ctx.saved_tensors
        present = [k for k, grad in enumerate(grads) if grad is not None]
        if not present:
            return (None,) * 9
        grads = [grads[k] for k in present] + [None] * (2 - len(present))
        of_outputs = [styles[k] for k in present] + [None] * (2 - len(present))
        needs = ctx.needs_input_grad[:8]
        tensors = *grads, x, blur, demod, bias, noise, strength, *of_outputs
        result = library.apply(_LayerEpilogueBackward, *tensors, ctx.settings, needs)
        grad_styles = [None, None]
        for k, grad in zip(present, result[5:], strict=False):
            grad_styles[k] = grad
        return result[0], None, *result[1:5], *grad_styles, None


@library.register(
    f"layer_epilogue_backward(Tensor grad0, Tensor? grad1, Tensor x, Tensor? blur, {_VECTORS}, {_SETTINGS}, "
    "bool[8] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class _LayerEpilogueBackward:
    """The outputs that have a gradient come first, with their styles. Gives no gradient to the blur."""

    Settings = Epilogue

    @staticmethod
    def ready(grad0: Tensor, grad1: Tensor | None, x: Tensor, *args: Any) -> tuple[Any, ...]:
        *vectors, settings, needs = args
        x = _dense(x)
        grad0, grad1 = (None if grad is None else _in_layout(grad, x) for grad in (grad0, grad1))
        return grad0, grad1, x, *native.contiguous(*vectors), settings, needs

    @staticmethod
    def empty(
        grad0: Tensor, grad1: Tensor | None, x: Tensor, blur: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        demod, bias, noise, strength, style0, style1, _, needs = args
        of_styles = any(needs[6:8])
        vectors = (
            native.like(demod, needs[2]),
            native.like(bias, needs[3]),
            native.like(noise, needs[4]),
            native.like(strength, needs[5]),
        )
        return (
            torch.empty_like(x),
            *vectors,
            native.like(style0, of_styles),
            native.like(style1, of_styles and grad1 is not None),
        )

    @staticmethod
    def run(
        grad0: Tensor, grad1: Tensor | None, x: Tensor, blur: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        demod, bias, noise, strength, style0, style1, settings, needs = args
        grad_x = torch.empty_like(x)
        grads = _Sums(x, blur, demod, bias, noise, strength, style0, style1 if grad1 is not None else None, needs)
        tensors = x, blur, demod, bias, noise, strength, style0, style1
        sizes = settings.for_launch(x, noise, blur is not None)
        native.launch("layer_epilogue_bwd", (*tensors, grad0, grad1, grad_x, *grads.for_launch()), *sizes)
        grad_noise = grads.map
        if grad_noise is not None:
            grad_noise = grad_noise if strength is None else grad_noise * strength
            grad_noise = grad_noise.sum(0, keepdim=True) if len(noise) == 1 else grad_noise
        return grad_x, grads.demod, grads.bias, grad_noise, grads.strength, grads.style0, grads.style1

    @staticmethod
    def reference(grad0: Tensor, grad1: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, settings, _ = args
        settings = settings._replace(outputs=1 if grad1 is None else 2)
        function = functools.partial(_with_settings, LayerEpilogue.reference, settings)
        grad_x, _, *vectors = library.pull_back(function, tensors, (grad0, grad1))
        return grad_x, *vectors

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], gradients: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.settings, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in incoming):
            return (None,) * 12
        gradients = library.apply(_LayerEpilogueDoubleBackward, *incoming, *ctx.saved_tensors, ctx.settings)
        return *gradients[:3], None, *gradients[3:], None, None


def _with_settings(function: Callable[..., Any], settings: Any, *tensors: Tensor | None) -> Any:
    return function(*tensors, settings)


@library.register(
    "layer_epilogue_double_backward(Tensor? dot_x, Tensor? dot_demod, Tensor? dot_bias, Tensor? dot_noise, "
    "Tensor? dot_strength, Tensor? dot_style0, Tensor? dot_style1, Tensor grad0, Tensor? grad1, Tensor x, "
    f"Tensor? blur, {_VECTORS}, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class _LayerEpilogueDoubleBackward:
    """With the blur, of which the second derivative is rare, x and its gradients are filtered by `upfirdn2d`."""

    Settings = Epilogue

    @staticmethod
    def ready(*args: Any) -> tuple[Any, ...]:
        dot_x, dot_demod, dot_bias, dot_noise, dot_strength, dot_style0, dot_style1, *rest = args
        *rest, _ = _LayerEpilogueBackward.ready(*rest, None)
        dot_demod, dot_bias, dot_style0, dot_style1 = native.contiguous(dot_demod, dot_bias, dot_style0, dot_style1)
        return dot_x, dot_demod, dot_bias, dot_noise, dot_strength, dot_style0, dot_style1, *rest

    @staticmethod
    def empty(*args: Any) -> tuple[Tensor | None, ...]:
        grad0, grad1, x, _, demod, bias, noise, strength, style0, style1, _ = args[7:]
        vectors = (native.like(v) for v in (demod, bias, noise, strength, style0))
        return native.like(grad0), native.like(grad1), native.like(x), *vectors, native.like(style1, grad1 is not None)

    @staticmethod
    def run(*args: Any) -> tuple[Tensor | None, ...]:
        dot_x, dot_demod, dot_bias, dot_noise, dot_strength, dot_style0, dot_style1, *rest = args
        grad0, grad1, x, blur, demod, bias, noise, strength, style0, style1, settings = rest
        if blur is not None:
            x = _blur(x, blur)
            dot_x = None if dot_x is None else _blur(dot_x, blur)
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
        return *grad_grads, grad_x, *vectors

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor | None, ...]:
        incoming, tensors, settings = args[:7], args[7:-1], args[-1]

        def backward(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
            return _LayerEpilogueBackward.reference(*tensors, settings, None)

        gradients = library.pull_back(backward, tensors, incoming)
        return *gradients[:3], *gradients[4:]

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], gradients: tuple[Tensor | None, ...]) -> None:
        pass

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
        self.demod, self.bias, self.strength = (
            native.like(demod, needs[2]),
            native.like(bias, needs[3]),
            native.like(strength, needs[5]),
        )
        self.style0, self.style1 = native.like(style0, any(needs[6:8])), native.like(style1, any(needs[6:8]))
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
