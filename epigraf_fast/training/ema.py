"""The running average of the generator, which is what gets used after training."""

from __future__ import annotations

import copy

import torch
from torch import nn


def average_of(module: nn.Module) -> nn.Module:
    """A copy to average into: in evaluation mode, without gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module for the parameters; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    buffers = list(average.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(module.buffers()))
