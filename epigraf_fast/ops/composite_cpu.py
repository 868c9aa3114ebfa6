"""Launchers of csrc/composite.cpp, with the signatures of kernels/composite.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference.composite import Composite
from . import native

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def fwd(
    t: Tensor,
    values: Tensor,
    t_fine: Tensor | None,
    values_fine: Tensor | None,
    density_noise: Tensor | None,
    background: Tensor | None,
    seed: None = None,
    noise_std: None = None,
    *,
    return_weights: bool,
    **settings: Any,
) -> Composite:
    """Of [B, R, S_coarse] and [B, R, S_fine] depths that rise along every ray; noise has been drawn."""
    shape, channels = t.shape[:2], values.shape[-1]
    samples = t.shape[-1] + (0 if t_fine is None else t_fine.shape[-1])
    weights = t.new_empty(*shape, samples) if return_weights else None
    outputs = Composite(t.new_empty(*shape, channels - 1), *(t.new_empty(shape) for _ in range(3)), weights)
    inputs = native.contiguous(t, values, t_fine, values_fine, density_noise, background)
    native.launch("composite_fwd", (*inputs, *outputs), *_sizes(t, values, t_fine), *_numbers(**settings))
    return outputs


def bwd(
    grad_outputs: tuple[Tensor | None, ...],
    t: Tensor,
    values: Tensor,
    t_fine: Tensor | None,
    values_fine: Tensor | None,
    density_noise: Tensor | None,
    background: Tensor | None,
    seed: None = None,
    noise_std: None = None,
    *,
    to_density_noise: bool,
    to_background: bool,
    **settings: Any,
) -> Gradients:
    """To values and values_fine, which share memory, and to what else is asked for."""
    coarse, fine = t.shape[-1], 0 if t_fine is None else t_fine.shape[-1]
    grad_values = t.new_empty(*t.shape[:2], coarse + fine, values.shape[-1])
    wanted = density_noise if to_density_noise else None, background if to_background else None
    others = [None if x is None else t.new_empty(x.shape) for x in wanted]
    inputs = native.contiguous(*grad_outputs, t, values, t_fine, values_fine, density_noise, background)
    tensors = *inputs, grad_values, *others
    native.launch("composite_bwd", tensors, *_sizes(t, values, t_fine), *_numbers(**settings))
    to_fine = None if t_fine is None else grad_values[..., coarse:, :]
    return grad_values[..., :coarse, :], to_fine, *others


def _sizes(t: Tensor, values: Tensor, t_fine: Tensor | None) -> tuple[int, ...]:
    fine = 0 if t_fine is None else t_fine.shape[-1]
    return native.DTYPES[t.dtype], t.shape[:2].numel(), t.shape[-1], fine, values.shape[-1]


def _numbers(
    activation: str,
    softplus_beta: float,
    density_shift: float,
    last_interval: float,
    last_back: bool,
    white_background: bool,
) -> tuple[float, ...]:
    return activation == "relu", softplus_beta, density_shift, last_interval, last_back, white_background
