"""Bias, activation, gain and clamp in one."""

from __future__ import annotations

from torch import Tensor

from ..reference.bias_act import ACTIVATIONS
from ..reference.bias_act import bias_act as _reference
from .backends import resolve
from .checks import check_choice, check_clamp, check_shape, check_together


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = clamp(gain act(x + bias), -clamp, clamp) (SPEC section 16).

    Args:
        x: Any shape.
        bias: [x.shape[dim]].
        act: linear, relu, lrelu (slope 0.2), tanh, sigmoid, elu, selu, softplus or swish (x sigmoid(x)).
        gain: Default sqrt(2) for relu, lrelu and swish, 1 for the others.
        clamp: Positive, or None. The gradient is 0 where clipped.

    Returns:
        Shape and dtype of x.

    Derivatives: reference any order.

    Raises:
        ValueError, TypeError: Wrong shape, dtype, device, dim or activation; a clamp that is not positive; unknown or
            missing backend.
    """
    check_together("bias_act", x=x, bias=bias)
    check_choice("bias_act", "act", act, tuple(ACTIVATIONS))
    if bias is not None:
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"bias_act: dim must be a dimension of x, which has {x.ndim}, got {dim}")
        check_shape("bias_act", "bias", bias, (x.shape[dim],))
    check_clamp("bias_act", clamp)
    resolve("bias_act", backend, x.device.type)
    return _reference(x, bias, dim=dim, act=act, gain=gain, clamp=clamp)
