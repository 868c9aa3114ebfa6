"""Rectangles of images, at a place of each image's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.cut import cut as _reference
from ..reference.cut import paste as _reference_paste
from . import library
from .backends import served
from .checks import check_shape
from .ranges import annotate


def cut(x: Tensor, first: Tensor, size: tuple[int, int], *, backend: str | None = None) -> Tensor:
    """y[b, c, i, j] = x[b, c, first[b, 0] + i, first[b, 1] + j]: the part of every image that is asked for.

    Args:
        x: [B, C, H, W], any dtype; channels_last stays so.
        first: [B, 2] int32 or int64 on the device of x, row and column of the first pixel. The rectangle must lie
            inside of the image; on a GPU nothing looks, as that would make it wait.
        size: Rows and columns of y, at most those of x.

    Returns:
        [B, C, *size].

    Backend triton: numbers of at most 8 bytes; a copy is one launch, and so is its transpose. What lies outside of the
    image is 0.

    Derivatives: any order, to x; each is the same copy, or its transpose `paste`, without atomics.

    Raises:
        TypeError, ValueError: Wrong shape, dtype or device; on a CPU a rectangle that leaves its image; unknown or
            missing backend.
    """
    check_shape("cut", "x", x, ("B", "C", "H", "W"))
    check_shape("cut", "first", first, (len(x), 2))
    if first.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cut: first must be int32 or int64 (because it counts pixels), got {first.dtype}")
    if first.device != x.device:
        raise ValueError(f"cut: first must be on {x.device} as x is, got {first.device}")
    if len(size) != 2 or not all(1 <= part <= whole for part, whole in zip(size, x.shape[2:], strict=True)):
        raise ValueError(f"cut: size must be two numbers from 1 to {list(x.shape[2:])}, those of x, got {list(size)}")
    route = library.route(x, first)

    def check() -> None:
        if route is not library.REFERENCE and x.element_size() > 8:
            raise TypeError(f'cut: x must have numbers of at most 8 bytes (because backend is "triton"), got {x.dtype}')

    chosen = served("cut", backend, x.device.type, check)
    chosen = "reference" if chosen == "torch" else chosen
    if route is library.REFERENCE or (route is library.LIBRARY and chosen == "reference"):
        return _reference(x, first, size)
    if tuple(size) == tuple(x.shape[2:]):
        if route is library.PLAIN:
            _check_room(first, size, x.shape[2:])
        return x
    return library.call(route, _Cut, x, first, tuple(size), False, chosen)


def _check_room(first: Tensor, size: Sequence[int], whole: Sequence[int]) -> None:
    if first.device.type != "cpu":
        return
    room = first.new_tensor(whole) - first.new_tensor(size)
    if bool(((first < 0) | (first > room)).any()):
        raise ValueError(f"cut: first must leave room for {list(size)} in {list(whole)}, got {first.tolist()}")


@library.register("cut(Tensor x, Tensor first, SymInt[2] size, bool paste, str backend) -> Tensor")
class _Cut:
    """A copy of rectangles, or to `paste` its transpose: of what was cut an image of that size, with zeros around."""

    @staticmethod
    def empty(x: Tensor, first: Tensor, size: Sequence[int], paste: bool, backend: str) -> Tensor:
        return _like(x, size, backend)

    @staticmethod
    def run(x: Tensor, first: Tensor, size: Sequence[int], paste: bool, backend: str) -> Tensor:
        with annotate("paste" if paste else "cut"):
            if not paste:
                _check_room(first, size, x.shape[2:])
            if backend == "triton":
                from ..kernels import cut as kernels

                return (kernels.paste if paste else kernels.cut)(x, first, tuple(size))
            if backend == "reference":
                return _Cut.reference(x, first, size, paste, backend)
            y = _like(x, size, backend)
            whole, part = (y.zero_(), x) if paste else (x, y)
            rows, columns = part.shape[2:]
            for image, (row, column) in enumerate(first.tolist()):
                inside = whole[image, :, row : row + rows, column : column + columns]
                target, source = (inside, part[image]) if paste else (part[image], inside)
                target.copy_(source)
            return y

    @staticmethod
    def reference(x: Tensor, first: Tensor, size: Sequence[int], paste: bool, backend: str) -> Tensor:
        return (_reference_paste if paste else _reference)(x, first, size)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
        x, first, _, ctx.paste, ctx.backend = inputs
        ctx.size = tuple(x.shape[2:])
        ctx.save_for_backward(first)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        options = ctx.size, not ctx.paste, ctx.backend
        return library.apply(_Cut, grad_y, *ctx.saved_tensors, *options), None, None, None, None


def _like(x: Tensor, size: Sequence[int], backend: str) -> Tensor:
    """Memory for [B, C, *size] in the layout of x; the reference leaves channels last."""
    last = backend == "reference" or (x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(*x.shape[:2], *size, dtype=x.dtype, device=x.device, memory_format=layout)
