"""Layers with an equalized learning rate (raw weights are N(0, 1), scaled where they are used); a scalar encoder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import ops

LOW_PASS = (0.125, 0.375, 0.375, 0.125)  # [1, 3, 3, 1] of sum 1, the filter of every up- and downsampling
CLAMP = 256.0  # activations are clamped to this, in fp32 too


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """min(channel_base / resolution, channel_max)."""
    return max(1, min(channel_base // resolution, channel_max))


class FullyConnected(nn.Module):
    """y = act(x W^T m / sqrt(n_in) + b m), m the learning-rate multiplier; W is drawn from N(0, 1) / m.

    Args:
        act: An activation of `ops.bias_act`.
        bias_init: The effective bias at initialization.
        backend: See `ops`.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        act: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.act, self.backend = act, backend
        self.lr_multiplier = lr_multiplier
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((n_out,), bias_init / lr_multiplier))

    @property
    def factor(self) -> float:
        """m / sqrt(n_in)."""
        return self.lr_multiplier / math.sqrt(self.weight.shape[1])

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight [n_out, n_in] and bias [n_out] with the equalized learning rate folded in."""
        return self.weight * self.factor, self.bias * self.lr_multiplier

    def forward(self, x: Tensor) -> Tensor:  # [B, n_in] -> [B, n_out]
        # As `effective` has it, the factor applied inside of the product: the weight is not copied.
        bias = self.bias if self.lr_multiplier == 1 else self.bias * self.lr_multiplier
        if self.act == "linear":
            return torch.addmm(bias, x, self.weight.t(), alpha=self.factor)
        y = (x * self.factor) @ self.weight.t()
        return ops.bias_act(y, bias, act=self.act, backend=self.backend)


class Conv2d(nn.Module):
    """A k x k convolution with equalized learning rate, downsampling, bias, activation and clamp.

    The bias is used as it is (no multiplier). A layer gain multiplies the activation's gain and the clamp.

    Args:
        kernel_size: Odd.
        down: 1 or 2.
        act, bias: As `ops.bias_act`; bias=False leaves it out.
        clamp: Bound of the output before the layer gain, or None.
        backend: See `ops`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        *,
        down: int = 1,
        act: str = "lrelu",
        bias: bool = True,
        clamp: float | None = CLAMP,
        gain: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.down, self.act, self.backend = down, act, backend
        self.gain = gain * (math.sqrt(2) if act == "lrelu" else 1.0)
        self.clamp = None if clamp is None else clamp * gain
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel_size, kernel_size))
        self.divisor = math.sqrt(c_in * kernel_size * kernel_size)
        self.scaled: Tensor | None = None  # weight / divisor, while `scaled_once` has it
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None
        self.register_buffer("low_pass", torch.tensor(LOW_PASS), persistent=False)

    def forward(self, x: Tensor, *, out_scale: Tensor | None = None, next_scale: Tensor | None = None) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H/down, W/down].

        Args:
            out_scale: [B, c_out], multiplies what the convolution gives.
            next_scale: [B, c_out], multiplies what comes out, in the same pass: it modulates the next input.
        """
        weight = (self.weight / self.divisor if self.scaled is None else self.scaled).to(x.dtype)
        x = ops.conv2d_resample(x, weight, kernel=self.low_pass, down=self.down, backend=self.backend)
        if out_scale is None and next_scale is None:
            return ops.bias_act(x, self.bias, act=self.act, gain=self.gain, clamp=self.clamp, backend=self.backend)
        (y,) = ops.layer_epilogue(
            x,
            demod=out_scale,
            bias=self.bias,
            styles=(next_scale,),
            act=self.act,
            gain=self.gain,
            clamp=self.clamp,
            backend=self.backend,
        )
        return y


@contextlib.contextmanager
def scaled_once(module: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The weights of a module's convolutions are scaled here, once for all calls inside of the block, in one launch.

    Gradients of `backward()` arrive at the scaled weights. At the end of the block each weight's `grad`, which must be
    None before, is made of its own.

    Yields:
        id(weight) -> the leaf that stands for it.
    """
    convolutions = [part for part in module.modules() if isinstance(part, Conv2d)]
    divisors = [conv.divisor for conv in convolutions]
    with torch.no_grad():
        scaled = torch._foreach_div([conv.weight for conv in convolutions], divisors)
    for conv, weight in zip(convolutions, scaled, strict=True):
        conv.scaled = weight.requires_grad_(conv.weight.requires_grad)
    try:
        yield {id(conv.weight): conv.scaled for conv in convolutions}
    finally:
        for conv in convolutions:
            conv.scaled = None
    learning = [i for i, weight in enumerate(scaled) if weight.grad is not None]
    if learning:
        grads = torch._foreach_div([scaled[i].grad for i in learning], [divisors[i] for i in learning])
        for i, grad in zip(learning, grads, strict=True):
            convolutions[i].weight.grad = grad


class ScalarEncoder(nn.Module):
    """Encodes numbers by Fourier features and optionally a learned table, coordinate by coordinate (SPEC section 8).

    For one number v: sin(v m pi 2^k / 2^L), k = 0..L-1, L = ceil(log2 m); the cosines; the table's row round(v m),
    halves to even.

    Args:
        max_value: m, the number of steps that [0, 1] is resolved into.
        table_dim: Width of the learned table of m + 1 rows, shared by all coordinates; 0 for none.
        cosines: Whether the cosines are there.
        skip_lowest, skip_highest: How many of the L frequencies are left out at either end.
    """

    def __init__(
        self,
        max_value: int,
        table_dim: int = 0,
        *,
        cosines: bool = True,
        skip_lowest: int = 0,
        skip_highest: int = 0,
    ) -> None:
        super().__init__()
        self.max_value, self.cosines = max_value, cosines
        levels = math.ceil(math.log2(max_value))
        frequencies = max_value * math.pi * 2.0 ** (torch.arange(levels) - levels)
        frequencies = frequencies[skip_lowest : levels - skip_highest]
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.table = nn.Parameter(torch.randn(max_value + 1, table_dim)) if table_dim else None
        self.dim = (2 if cosines else 1) * len(frequencies) + table_dim  # numbers per coordinate

    def forward(self, values: Tensor) -> Tensor:  # [B, D] -> [B, D * dim]
        phases = values[..., None] * self.frequencies
        encoded = [phases.sin(), phases.cos()] if self.cosines else [phases.sin()]
        if self.table is not None:
            rows = (values * self.max_value).round().long().clamp(0, self.max_value)
            encoded.append(torch.nn.functional.embedding(rows, self.table))
        return torch.cat(encoded, dim=-1).flatten(1)


def camera_numbers(angles: Tensor) -> Tensor:
    """Yaw and pitch as conditioning: sign(a) (|a| mod 2 pi) / (2 pi). [B, 3] radians -> [B, 2] in (-1, 1)."""
    angles = angles[:, :2]
    return angles.sign() * (angles.abs() % (2 * math.pi)) / (2 * math.pi)
