"""The gradients of a network in one piece, so that one launch averages them and one cleans them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # numbers; what reads several at once finds every gradient at the start of such a block


def flatten(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies of gradients, side by side in one tensor, and the views of it that are each laid out as its parameter.

    Args:
        gradients: Of one dtype.
        parameters: Whose gradients those are, dense.
    """
    starts, total = [], 0
    for parameter in parameters:
        starts.append(total)
        total += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    flat = gradients[0].new_zeros(total)
    parts = [flat.as_strided(p.shape, p.stride(), start) for p, start in zip(parameters, starts, strict=True)]
    torch._foreach_copy_(parts, list(gradients))
    return flat, parts


def clean_(gradients: Tensor) -> Tensor:
    """NaN becomes 0, and an infinity 1e5 of its sign, in place."""
    return torch.nan_to_num(gradients, nan=0.0, posinf=1e5, neginf=-1e5, out=gradients)
