"""The convolutions of the networks: plain ones, or where a run asks for it fp32 ones as three products in TF32.

With a = hi(a) + lo(a), hi(a) being a without its last 13 bits, TF32 holds hi exactly and lo to 2^-11 of itself, and

    a b = hi(a) hi(b) + hi(a) lo(b) + lo(a) hi(b) + lo(a) lo(b),

of which the last term is below 2^-20 of a b. The other three are one convolution: channels [hi, hi, lo] of one factor
against [hi, lo, hi] of the other, summed in fp32. The same is done in every gradient, along what that sums over:
channels, or for the weight's the images. docs/training.md has the arithmetic of where it pays.

Factors are taken apart by their bits, which batched and dual tensors have not: under torch.func's transforms, in
forward mode and with batched gradients a convolution, or that gradient of it, is torch's own, in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library
from .convolution_derivatives import conv2d as plain_conv2d
from .convolution_derivatives import conv_transpose2d as plain_conv_transpose2d

LOW = 13  # bits of fp32's 23 that TF32 has not
LEAST = 64  # channels from which on the products weigh more than what splitting reads and writes

_least: int | None = None  # see `split_from`


def split_from(channels: int | None) -> None:
    """Says for the whole process which 3 x 3 convolutions of fp32 are split: those with so many channels; None: none.

    The channels are those of the input or of the output, whichever are fewer.
    """
    global _least
    _least = channels


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """torch's conv2d: x [B, C_in, H, W], weight [C_out, C_in, k, k]. Derivatives of any order."""
    if not _is_split(x, weight):
        return plain_conv2d(x, weight, stride, padding)
    return _Convolution.apply(x, weight, stride, padding)


def conv_transpose2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """torch's conv_transpose2d: x [B, C_in, H, W], weight [C_in, C_out, k, k]. Derivatives of any order."""
    if not _is_split(x, weight):
        return plain_conv_transpose2d(x, weight, stride)
    height, width = ((n - 1) * stride + weight.shape[-1] for n in x.shape[2:])
    shape = len(x), weight.shape[1], height, width
    return _ToInput.apply(x, weight, _Plan(shape, tuple(weight.shape), stride, 0))


def _is_split(x: Tensor, weight: Tensor) -> bool:
    enough = _least is not None and min(weight.shape[:2]) >= _least and weight.shape[-1] > 1
    suited = enough and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return suited and library.route(x, weight) is not library.REFERENCE


class _Plan(NamedTuple):
    """A convolution that is not transposed.

    Args:
        x, weight: The shapes of its factors.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int
    padding: int


# The three members of <grad, conv(x, weight)>: each is linear in two of its factors, and its gradients are the others.


class _Convolution(torch.autograd.Function):
    """y [B, C_out, h, w] of x and weight, summed over C_in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan = _Plan(tuple(x.shape), tuple(weight.shape), stride, padding)
        with _tf32():
            return F.conv2d(_split(x, 1, "aab"), _split(weight, 1, "aba"), stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = library.wanted(ctx, 0), library.wanted(ctx, 1)
        return (
            _to_input(grad, x, weight, ctx.plan) if to_x else None,
            _to_weight(grad, x, weight, ctx.plan) if to_weight else None,
            None,
            None,
        )


class _ToInput(torch.autograd.Function):
    """Of the shape of x, of grad and weight, summed over C_out."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.plan = plan
        with _tf32():
            like = torch.empty(plan.x, dtype=grad.dtype, device=grad.device, memory_format=_layout(grad))  # never read
            return _backward(_split(grad, 1, "aab"), like, _split(weight, 0, "aba"), plan, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_y, weight = ctx.saved_tensors
        to_y, to_weight = library.wanted(ctx, 0), library.wanted(ctx, 1)
        return (
            _convolution(grad, weight, ctx.plan) if to_y else None,
            _to_weight(of_y, grad, weight, ctx.plan) if to_weight else None,
            None,
        )


class _ToWeight(torch.autograd.Function):
    """Of the shape of weight, of grad and x, summed over images and pixels."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.plan = plan
        with _tf32():
            like = torch.empty(plan.weight, dtype=x.dtype, device=x.device, memory_format=_layout(x))
            return _backward(_split(grad, 0, "aab"), _split(x, 0, "aba"), like, plan, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_y, x = ctx.saved_tensors
        to_y, to_x = library.wanted(ctx, 0), library.wanted(ctx, 1)
        return (
            _convolution(x, grad, ctx.plan) if to_y else None,
            _to_input(of_y, x, grad, ctx.plan) if to_x else None,
            None,
        )


# In a backward, where gradients may be batched or dual: the members of above, or torch's own.


def _convolution(x: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
    if library.route_of_gradients(x, weight) is library.REFERENCE:
        return F.conv2d(x, weight, stride=plan.stride, padding=plan.padding)
    return _Convolution.apply(x, weight, plan.stride, plan.padding)


def _to_input(grad: Tensor, x: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
    if library.route_of_gradients(grad, x, weight) is library.REFERENCE:
        return _backward(grad, x, weight, plan, 0)
    return _ToInput.apply(grad, weight, plan)


def _to_weight(grad: Tensor, x: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
    if library.route_of_gradients(grad, x, weight) is library.REFERENCE:
        return _backward(grad, x, weight, plan, 1)
    return _ToWeight.apply(grad, x, plan)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, plan: _Plan, which: int) -> Tensor:
    """torch's gradient of a convolution to x (0) or to the weight (1)."""
    stride, padding = [plan.stride] * 2, [plan.padding] * 2
    mask = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask)
    return found[which]


def _split(x: Tensor, dim: int, parts: str) -> Tensor:
    """hi(x) for every "a", lo(x) for every "b" of `parts`, side by side along a dimension, in the layout of x."""
    x = x.resolve_neg()
    size, shape = x.shape[dim], list(x.shape)
    shape[dim] = size * len(parts)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    pieces = [out.narrow(dim, i * size, size) for i in range(len(parts))]
    first = pieces[parts.index("a")]
    torch.bitwise_and(x.view(torch.int32), -(1 << LOW), out=first.view(torch.int32))
    for piece, part in zip(pieces, parts, strict=True):
        if part == "b":
            torch.sub(x, first, out=piece)
        elif piece is not first:
            piece.copy_(first)
    return out


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """cuDNN rounds to TF32 inside, which is exact for what is split; a backward pass has this thread wait."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
