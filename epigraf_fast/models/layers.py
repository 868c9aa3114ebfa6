"""Layers with an equalized learning rate (raw weights are N(0, 1), scaled where they are used); a scalar encoder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import ops

LOW_PASS = (0.125, 0.375, 0.375, 0.125)  # [1, 3, 3, 1] of sum 1, the filter of every up- and downsampling
CLAMP = 256.0  # activations are clamped to this, in fp32 too


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """min(channel_base / resolution, channel_max)."""
    return max(1, min(channel_base // resolution, channel_max))


class Scaled:
    """A parameter of a layer times a factor, or that of several layers, of one shape, in one tensor [n, *shape].

    Args:
        layers: Which own the parameters: nothing here is saved or learned.
        name: Of the parameter.
        factor: Of all of them.
    """

    def __init__(self, layers: Sequence[nn.Module], name: str, factor: float) -> None:
        self.layers, self.name, self.factor = list(layers), name, factor
        self.elsewhere = False  # whether another one holds the same parameter, for `scaled_once`
        self.kept: Tensor | None = None  # while `scaled_once` has it

    def parameters(self) -> list[Tensor]:
        return [getattr(layer, self.name) for layer in self.layers]

    def together(self) -> Tensor:
        """The parameters without the factor."""
        parameters = self.parameters()
        return parameters[0] if len(parameters) == 1 else torch.stack(parameters)

    def __call__(self) -> Tensor:
        if self.kept is not None:
            return self.kept
        return self.together() if self.factor == 1 else self.together() * self.factor

    def stacked(self) -> Tensor:
        """[n, *shape] for a single layer, too."""
        return self() if len(self.layers) > 1 else self()[None]


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
        self.scaled_weight = Scaled([self], "weight", self.factor)
        self.scaled_bias = Scaled([self], "bias", lr_multiplier)

    @property
    def factor(self) -> float:
        """m / sqrt(n_in)."""
        return self.lr_multiplier / math.sqrt(self.weight.shape[1])

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight [n_out, n_in] and bias [n_out] with the equalized learning rate folded in."""
        return self.scaled_weight(), self.scaled_bias()

    def forward(self, x: Tensor) -> Tensor:  # [B, n_in] -> [B, n_out]
        weight, factor, bias = self.scaled_weight.kept, 1.0, self.scaled_bias()
        if weight is None:  # the factor is applied inside of the product: the weight is not copied
            weight, factor = self.weight, self.factor
        if self.act == "linear":
            return torch.addmm(bias, x, weight.t(), alpha=factor)
        y = (x if factor == 1 else x * factor) @ weight.t()
        return ops.bias_act(y, bias, act=self.act, backend=self.backend)


class Affines(nn.Module):
    """Linear layers that read vectors of one width, all at once: one product for those of equal output width.

    Args:
        layers: Without activation, of one learning-rate multiplier. They stay where they are: this has no parameters.
    """

    def __init__(self, layers: Sequence[FullyConnected]) -> None:
        super().__init__()
        groups: dict[int, list[int]] = {}
        for place, layer in enumerate(layers):
            groups.setdefault(layer.weight.shape[0], []).append(place)
            layer.scaled_weight.elsewhere = layer.scaled_bias.elsewhere = True
        self.widths, self.groups = list(groups), list(groups.values())  # of what comes out, and places
        self.weights, self.biases = [], []
        for group in self.groups:
            members = [layers[place] for place in group]
            self.weights.append(Scaled(members, "weight", members[0].factor))
            self.biases.append(Scaled(members, "bias", members[0].lr_multiplier))

    @property
    def order(self) -> list[int]:
        """The places of the layers, group by group."""
        return [place for group in self.groups for place in group]

    def forward(self, x: Tensor, then: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """What each layer gives, [B, n_out], in the order that they came in.

        Args:
            x: See `grouped`.
            then: A function of single numbers that is applied to what comes out.
        """
        results: list[Tensor] = [x] * sum(map(len, self.groups))
        for group, y in zip(self.groups, self.grouped(x), strict=True):
            for place, vectors in zip(group, (y if then is None else then(y)).unbind(0), strict=True):
                results[place] = vectors
        return results

    def grouped(self, x: Tensor) -> list[Tensor]:
        """The same, group by group: each [members, B, n_out].

        Args:
            x: [B, n_in], the same for all, or [n, B, n_in], one for each, in `order`.
        """
        results, first = [], 0
        for group, weight, bias in zip(self.groups, self.weights, self.biases, strict=True):
            count = len(group)
            given = x[first : first + count] if x.ndim == 3 else x.expand(count, -1, -1)
            first += count
            results.append(torch.baddbmm(bias.stacked()[:, None], given, weight.stacked().transpose(1, 2)))
        return results


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
        self.scaled_weight = Scaled([self], "weight", 1 / math.sqrt(c_in * kernel_size * kernel_size))
        self.of_weight: ops.OfWeight | None = None  # while `scaled_once` keeps it
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None
        self.register_buffer("low_pass", torch.tensor(LOW_PASS), persistent=False)

    def forward(self, x: Tensor, *, out_scale: Tensor | None = None, next_scale: Tensor | None = None) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H/down, W/down].

        Args:
            out_scale: [B, c_out], multiplies what the convolution gives.
            next_scale: [B, c_out], multiplies what comes out, in the same pass: it modulates the next input.
        """
        weight = self.scaled_weight()
        weight = weight.to(x.dtype) if self.of_weight is None else self.of_weight.cast(weight, x.dtype)
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
def scaled_once(*modules: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The parameters of layers are scaled here, once for all calls inside of the block, in one launch.

    Gradients of `backward()` arrive at the scaled ones. At the end of the block the `grad` of each parameter, which
    must be None before, is made of them. What convolutions make of a weight alone, the first of the calls makes for
    all: see `ops.OfWeight`.

    Yields:
        id(parameter) -> the leaf that stands for it, maybe for others, too.
    """
    owners = [owner for module in modules for owner in module.modules()]
    keeping = [owner for owner in owners if hasattr(owner, "of_weight")]
    parts = [part for owner in owners for part in _scaled_of(owner)]
    parts = [part for part in parts if not part.elsewhere and (part.factor != 1 or len(part.layers) > 1)]
    with torch.no_grad():
        kept = torch._foreach_mul([part.together() for part in parts], [part.factor for part in parts])
    for part, leaf in zip(parts, kept, strict=True):
        part.kept = leaf.requires_grad_(any(parameter.requires_grad for parameter in part.parameters()))
    for layer in keeping:
        layer.of_weight = ops.OfWeight()
    try:
        yield {id(parameter): part.kept for part in parts for parameter in part.parameters()}
    finally:
        for part in parts:
            part.kept = None
        for layer in keeping:
            layer.of_weight = None
    learning, grads, factors = [], [], []
    for part, leaf in zip(parts, kept, strict=True):
        if leaf.grad is not None:
            own = part.parameters()
            learning += own
            grads += [leaf.grad] if len(own) == 1 else leaf.grad.unbind(0)
            factors += [part.factor] * len(own)
    if learning:
        for parameter, grad in zip(learning, torch._foreach_mul(grads, factors), strict=True):
            if parameter.requires_grad:
                parameter.grad = grad


def _scaled_of(owner: nn.Module) -> Iterator[Scaled]:
    """What a module itself holds."""
    for value in vars(owner).values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Scaled):
                yield one


class ScalarEncoder(nn.Module):
    """Encodes numbers by Fourier features and optionally a learned table, coordinate by coordinate (method.md 9).

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
