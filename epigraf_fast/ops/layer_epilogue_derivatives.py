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


class Vectors(NamedTuple):
    """What there is besides images, or gradients to it, in the dtype that is computed in; noise is [1 or B, H, W]."""

    demod: Tensor | None
    bias: Tensor | None
    noise: Tensor | None
    strength: Tensor | None
    style0: Tensor | None
    style1: Tensor | None

    def gradients(self, images: int, needs: Sequence[bool]) -> Vectors:
        """Memory for gradients, where these are needed: that of the noise for so many images."""
        *of_vectors, to_style0, to_style1 = needs
        needs = *of_vectors, to_style0 or to_style1, to_style0 or to_style1
        made = Vectors(*map(native.like, self._replace(noise=None), needs))
        if self.noise is None or not needs[2]:
            return made
        return made._replace(noise=self.noise.new_empty((images, *self.noise.shape[1:])))


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def resized(x: Tensor, blur: Tensor | None, more: int) -> Tensor:
    """Memory in the layout of x, with so many more rows and columns where there is a blur: -1 for outputs, 1 back."""
    if blur is None:
        return torch.empty_like(x)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    batch, channels, height, width = x.shape
    size = batch, channels, height + more, width + more
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def dense(x: Tensor) -> Tensor:
    """x in a layout that the launchers read: on a GPU in channels_last alone."""
    return x.contiguous(memory_format=torch.channels_last) if native.on_gpu(x) else native.dense(x)


def blurred(x: Tensor, kernel: Tensor, *, adjoint: bool = False, backend: str | None = None) -> Tensor:
    """The filter that ends upsampling by 2: [B, C, H+1, W+1] -> [B, C, H, W], or its adjoint."""
    return upfirdn2d(x, kernel, padding=2 if adjoint else 1, flip=adjoint, gain=4, backend=backend or x.device.type)


VECTORS = ", ".join(f"Tensor? {name}" for name in Vectors._fields)
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


def recovered(outputs: Sequence[Tensor | None], vectors: Sequence[Tensor | None], settings: Epilogue) -> Tensor:
    """The blur(x), or x, of these outputs, in the dtype that is computed in; beyond the clamp where it was clipped."""
    demod, bias, noise, strength, *styles = vectors
    y = None
    for out, style in zip(outputs, styles, strict=True):
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
        vectors = Vectors(*native.contiguous(*vectors))
        if grad1 is None:
            vectors = vectors._replace(style1=None)
        return grad0, grad1, x, blur, *vectors, out0, out1, settings, needs

    @staticmethod
    def empty(
        grad0: Tensor, grad1: Tensor | None, x: Tensor | None, blur: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        *vectors, _, _, _, needs = args
        vectors = Vectors(*vectors)
        images = 0 if vectors.noise is None else len(vectors.noise)
        return resized(grad0, blur, 1), *vectors.gradients(images, needs[2:])

    @staticmethod
    def run(
        grad0: Tensor, grad1: Tensor | None, x: Tensor | None, blur: Tensor | None, *args: Any
    ) -> tuple[Tensor | None, ...]:
        *vectors, out0, out1, settings, needs = args
        vectors = Vectors(*vectors)
        if x is not None and blur is not None and native.on_gpu(x):  # rare: the kernel with the blur reads outputs
            grad_x, *grads = LayerEpilogueBackward.run(grad0, grad1, blurred(x, blur), None, *args)
            return blurred(grad_x, blur, adjoint=True), *grads
        grad_x = resized(grad0, blur, 1)
        grads = vectors.gradients(len(grad0), needs[2:])
        results = grad_x, *_for_launch(grads), _partials(grad0, blur is not None)
        sizes = settings.for_launch(grad0, vectors.noise)
        native.launch("layer_epilogue_bwd", (x, blur, *vectors, out0, out1, grad0, grad1, *results), *sizes)
        grad_noise = grads.noise
        if grad_noise is not None:
            grad_noise = grad_noise if vectors.strength is None else grad_noise * vectors.strength
            grad_noise = grad_noise.sum(0, keepdim=True) if len(vectors.noise) == 1 else grad_noise
        return grad_x, *grads._replace(noise=grad_noise)

    @staticmethod
    def reference(grad0: Tensor, grad1: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, out0, out1, settings, _ = args
        settings = settings._replace(outputs=1 if grad1 is None else 2)
        x, blur, *vectors = tensors
        if x is None:
            tensors = recovered((out0, out1), vectors, settings).to(grad0.dtype), None, *vectors
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
    f"layer_epilogue_double_backward(Tensor? dot_x, {VECTORS.replace('? ', '? dot_')}, Tensor grad0, Tensor? grad1, "
    f"Tensor x, Tensor? blur, {VECTORS}, {SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class _LayerEpilogueDoubleBackward(library.Last):
    """With the blur, of which the second derivative is rare, x and its gradients are filtered by `upfirdn2d`."""

    Settings = Epilogue
    refusal = 'layer_epilogue: only backend="reference" has a third derivative'

    @staticmethod
    def ready(*args: Any) -> tuple[Any, ...]:
        dot_x, dots, tensors, settings = args[0], Vectors(*args[1:7]), args[7:-1], args[-1]
        *tensors, _, _, _, _ = LayerEpilogueBackward.ready(*tensors, None, None, settings, None)
        dots = Vectors(*native.contiguous(*dots._replace(noise=None)))._replace(noise=dots.noise)
        return dot_x, *dots, *tensors, settings

    @staticmethod
    def empty(*args: Any) -> tuple[Tensor | None, ...]:
        dots, (grad0, grad1, x, _, *vectors, _) = Vectors(*args[1:7]), args[7:]
        return native.like(grad0), native.like(grad1), native.like(x, _bends(dots)), *map(native.like, vectors)

    @staticmethod
    def run(*args: Any) -> tuple[Tensor | None, ...]:
        dot_x, dots, (grad0, grad1, x, blur, *vectors, settings) = args[0], Vectors(*args[1:7]), args[7:]
        vectors = Vectors(*vectors)
        noise, strength = vectors.noise, vectors.strength
        if blur is not None:
            x = blurred(x, blur)
            dot_x = None if dot_x is None else blurred(dot_x, blur)
        dot_x = None if dot_x is None else _in_layout(dot_x, x)
        along_noise = None  # by how much strength noise changes, [B, H, W]
        if dots.strength is not None:
            along_noise = dots.strength * noise
        if dots.noise is not None:
            added = dots.noise if strength is None else dots.noise * strength
            along_noise = added if along_noise is None else along_noise + added
        if along_noise is not None:
            along_noise = along_noise.expand(len(x), -1, -1).contiguous()
        grad_grads = torch.empty_like(x), None if grad1 is None else torch.empty_like(x)
        grad_x = torch.empty_like(x)
        grads = vectors.gradients(len(x), (True,) * 6)
        gradient_map = None if along_noise is None else torch.empty_like(along_noise)
        incoming = dot_x, dots.demod, dots.bias, along_noise, dots.style0, dots.style1
        results = *grad_grads, grad_x, *_for_launch(grads), gradient_map, _partials(x, False)
        sizes = settings.for_launch(x, noise)
        native.launch("layer_epilogue_double_bwd", (x, *vectors, grad0, grad1, *incoming, *results), *sizes)
        grad_noise, grad_strength = grads.noise, grads.strength
        if grad_noise is not None:
            if strength is not None:
                grad_noise = grad_noise * strength
            if dots.strength is not None:
                grad_noise = grad_noise + dots.strength * gradient_map
            if dots.noise is not None and strength is not None:
                grad_strength = grad_strength + (gradient_map * dots.noise).sum()
            grad_noise = grad_noise.sum(0, keepdim=True) if len(noise) == 1 else grad_noise
        if not _bends(dots):
            grad_x = None  # of nothing but zeros, which would be added to what is as large
        elif blur is not None:
            grad_x = blurred(grad_x, blur, adjoint=True)
        return *grad_grads, grad_x, *grads._replace(noise=grad_noise, strength=grad_strength)

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor | None, ...]:
        incoming, tensors, settings = args[:7], args[7:-1], args[-1]

        def backward(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
            return LayerEpilogueBackward.reference(*tensors, None, None, settings, None)

        gradients = library.pull_back(backward, tensors, incoming)
        return *gradients[:3], *gradients[4:]


def _bends(dots: Vectors) -> bool:
    """Whether a gradient that is differentiated depends on x beyond its sign."""
    return any(dot is not None for dot in (dots.demod, dots.style0, dots.style1))


def _for_launch(grads: Vectors) -> tuple[Tensor | None, ...]:
    """As launchers take them: the noise's last."""
    demod, bias, noise, *others = grads
    return demod, bias, *others, noise


def _partials(y: Tensor, blurred: bool) -> Tensor:
    """Memory for sums over parts of y, of which a launcher makes the vectors' gradients."""
    count = native.extension().layer_epilogue_partials(*y.shape, blurred, native.on_gpu(y))
    return y.new_empty(count, dtype=native.compute_dtype(y.dtype))


def _in_layout(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of `like`, which is contiguous or channels_last."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return x.contiguous(memory_format=layout)
