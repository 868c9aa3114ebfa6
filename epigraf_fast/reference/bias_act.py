"""Bias, activation, gain and clamp (method.md 7)."""

from __future__ import annotations

import torch
from torch import Tensor

# name: (function, default gain)
ACTIVATIONS = {
    "linear": (lambda x: x, 1.0),
    "relu": (torch.relu, 2**0.5),
    "lrelu": (lambda x: torch.nn.functional.leaky_relu(x, 0.2), 2**0.5),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 1.0),
    "elu": (torch.nn.functional.elu, 1.0),
    "selu": (torch.nn.functional.selu, 1.0),
    "softplus": (torch.nn.functional.softplus, 1.0),
    "swish": (lambda x: x * torch.sigmoid(x), 2**0.5),
}


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """y = clamp(gain act(x + bias), -clamp, clamp); the gradient is 0 where clipped.

    Args:
        x: Any shape.
        bias: [x.shape[dim]].
        gain: Default: that of the activation.

    Returns:
        Shape and dtype of x.
    """
    function, default_gain = ACTIVATIONS[act]
    if bias is not None:
        x = x + bias.to(x.dtype).view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    x = function(x)
    gain = default_gain if gain is None else gain
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
