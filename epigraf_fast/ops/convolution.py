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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library
from .convolution_derivatives import Arithmetic, differentiable
from .convolution_derivatives import conv2d as plain_conv2d
from .convolution_derivatives import conv_transpose2d as plain_conv_transpose2d
from .convolution_layout import Plan

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
    return differentiable(x, weight, Plan(stride, padding, False), _Products)


def conv_transpose2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """torch's conv_transpose2d: x [B, C_in, H, W], weight [C_in, C_out, k, k]. Derivatives of any order."""
    if not _is_split(x, weight):
        return plain_conv_transpose2d(x, weight, stride)
    return differentiable(x, weight, Plan(stride, 0, True), _Products)


def _is_split(x: Tensor, weight: Tensor) -> bool:
    enough = _least is not None and min(weight.shape[:2]) >= _least and weight.shape[-1] > 1
    suited = enough and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return suited and library.route(x, weight) is not library.REFERENCE


class _Products(Arithmetic):
    """Of factors that are split along what is summed over; a transposed convolution is a gradient, as torch has it."""

    @staticmethod
    def convolution(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
        if not plan.transposed:
            return _convolution(x, weight, plan)
        height, width = ((n - 1) * plan.stride + weight.shape[-1] for n in x.shape[2:])
        return _to_input(x, weight, (len(x), weight.shape[1], height, width), plan)

    @staticmethod
    def gradients(
        grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        to_x = to_weight = None
        if wanted[0]:
            to_x = _convolution(grad, weight, plan) if plan.transposed else _to_input(grad, weight, x.shape, plan)
        if wanted[1]:
            to_weight = _to_weight(*((x, grad) if plan.transposed else (grad, x)), weight.shape, plan)
        return to_x, to_weight


# The three members of <grad, conv(x, weight)>, of a convolution that is not transposed.


def _convolution(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Summed over C_in."""
    with _tf32():
        return F.conv2d(_split(x, 1, "aab"), _split(weight, 1, "aba"), stride=plan.stride, padding=plan.padding)


def _to_input(grad: Tensor, weight: Tensor, size: Sequence[int], plan: Plan) -> Tensor:
    """Of this size, summed over C_out."""
    like = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=_layout(grad))  # never read
    return _backward(_split(grad, 1, "aab"), like, _split(weight, 0, "aba"), plan, 0)


def _to_weight(grad: Tensor, x: Tensor, size: Sequence[int], plan: Plan) -> Tensor:
    """Of this size, summed over images and pixels."""
    like = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    return _backward(_split(grad, 0, "aab"), _split(x, 0, "aba"), like, plan, 1)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, which: int) -> Tensor:
    """torch's gradient of a convolution to x (0) or to the weight (1)."""
    arguments, mask = plan._replace(transposed=False).arguments(), [which == 0, which == 1, False]
    with _tf32():
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments, mask)[which]


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
