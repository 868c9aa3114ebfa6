"""The gradient to a convolution's weight on a CPU without AVX-512, as matrix products of channels_last images.

oneDNN is slow at it there for channels_last images, and not in the other layout, in which neither the networks' other
operations nor the other convolutions are faster. Here

    dweight[:, :, i, j] = sum_p coarse[p] fine[stride p + (i, j) - padding]^T,

coarse being the gradient and fine the images (for a transposed convolution the other way round), is one product for
each tap. Both lie as [pixels, channels], with as many columns, zeros between the rows: so a tap is a first row.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from .convolution_layout import Plan

LEAST = 1 << 29  # multiplications from which on this is faster with one thread and with two
LEAST_CHANNELS = 32  # of either factor; with 16 and fewer oneDNN is faster
CHUNK = 1 << 18  # numbers of a factor that are multiplied at once: caches hold them for all taps


@functools.cache
def _is_slow() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def suits(grad: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is slower for the gradient to this weight [_, _, k, k]; x and grad [B, _, H, W]."""
    return (
        weight.is_cpu
        and weight.dtype == torch.float32
        and weight.shape[-1] > 1
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and len(x) * min(math.prod(grad.shape[2:]), math.prod(x.shape[2:])) * weight.numel() >= LEAST
        and not x.is_contiguous()
        and _is_slow()
    )


def gradient_of_weight(grad: Tensor, x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """The gradient to the weight of torch's convolution, channels_last as torch gives it.

    Args:
        grad: [B, C_out, h, w], of the result.
        x: [B, C_in, H, W].
        weight: [C_out, C_in, k, k]; of a transposed convolution [C_in, C_out, k, k]. Its values are not read.
    """
    coarse, fine = (x, grad) if plan.transposed else (grad, x)
    batch, (height, width), k = len(x), coarse.shape[2:], weight.shape[-1]
    more = (k - 1) // plan.stride  # rows and columns of the fine image that coarse pixels see beyond their own
    grid = batch, height + more, width + more
    pixels = grid[0] * grid[1] * grid[2]
    rows = coarse.new_zeros(*grid, coarse.shape[1])
    rows[:, :height, :width] = coarse.permute(0, 2, 3, 1)
    rows = rows.flatten(0, 2)
    step = max(CHUNK // max(weight.shape[:2]), 1)
    found = coarse.new_zeros(weight.shape[0], k, k, weight.shape[1])
    for phase in itertools.product(range(min(plan.stride, k)), repeat=2):
        # One row or column of zeros too many at the end, and what a tap's first row leaves of them.
        seen = _phase(fine, phase, plan, grid, more * (grid[2] + 1))
        taps = [*itertools.product(*(range(first, k, plan.stride) for first in phase))]
        for start in range(0, pixels, step):
            left = rows[start : start + step].t()
            for i, j in taps:
                first = start + i // plan.stride * grid[2] + j // plan.stride
                found[:, i, j].addmm_(left, seen[first : first + left.shape[1]])
    return found.permute(0, 3, 1, 2)


def _phase(fine: Tensor, phase: tuple[int, int], plan: Plan, grid: tuple[int, int, int], more: int) -> Tensor:
    """[pixels of the grid + more, C]: every stride-th row and column of an image with its padding, from `phase` on."""
    out = fine.new_zeros(grid[0] * grid[1] * grid[2] + more, fine.shape[1])
    into = out[: len(out) - more].view(*grid, -1)
    places, sources = [], []
    for number, first, size in zip(grid[1:], phase, fine.shape[2:], strict=True):
        begin = -(-max(plan.padding - first, 0) // plan.stride)  # the first place that is not padding
        end = min(number, -(-(size + plan.padding - first) // plan.stride))
        source = begin * plan.stride + first - plan.padding
        places.append(slice(begin, end))
        sources.append(slice(source, source + (end - begin - 1) * plan.stride + 1, plan.stride))
    into[:, places[0], places[1]] = fine[:, :, sources[0], sources[1]].permute(0, 2, 3, 1)
    return out
