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


GROWTH = 2000  # steps without an overflow after which a lowered scale is doubled


class LossScale:
    """What a loss is multiplied by, so that its gradients in fp16 do not underflow: a power of two, on the device.

    A constant, as long as nothing overflows: a step that does halves it, and after `GROWTH` steps without one it is
    doubled again, up to where it began. CUDA graphs and the host need not know, nor is the device waited for.

    Args:
        first: What it begins with.
    """

    def __init__(self, first: float, device: torch.device) -> None:
        self.first = first
        self.state = torch.tensor([first, 0.0, 0.0], device=device)  # scale, steps since it changed, steps left out

    @property
    def value(self) -> Tensor:
        """fp32 [], the scale: a view that the next `update` changes."""
        return self.state[0]

    @property
    def skipped(self) -> Tensor:
        """fp32 [], the steps that overflowed in the whole run."""
        return self.state[2]

    def unscale_(self, gradients: Tensor) -> Tensor:
        """Divides by the scale, in place.

        Returns:
            fp32 [], 1 where a gradient is not finite, else 0.
        """
        overflow = torch.linalg.vector_norm(gradients, torch.inf).isfinite().logical_not().float()
        gradients.div_(self.value)
        return overflow

    def update(self, overflow: Tensor) -> None:
        """After a step that was made (0) or left out (1)."""
        scale, good, skipped = self.state
        skipped.add_(overflow)
        good.add_(1).mul_(1 - overflow)
        grown = (good >= GROWTH).float()
        scale.mul_((1 - overflow / 2) * (1 + grown)).clamp_(1.0, self.first)
        good.mul_(1 - grown)


def step_unless(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """The step of a fused optimizer, or none of it, not even of its counters and moments, where `skipped` [] is 1.

    The device decides, and is not waited for.
    """
    optimizer.found_inf = skipped  # as torch's GradScaler hands it over
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
