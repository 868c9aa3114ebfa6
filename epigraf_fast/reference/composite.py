"""Volume integration along rays (method.md 4; the discretized volume rendering integral of NeRF)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TRANSMITTANCE_FLOOR = 1e-10  # added to 1 - alpha, so that no transmittance is exactly zero
INFINITE_INTERVAL = 1e10


class Composite(NamedTuple):
    """What one integration gives; see `composite`."""

    rgb: Tensor  # [B, R, C]
    depth: Tensor  # [B, R]
    weight_sum: Tensor  # [B, R]
    final_transmittance: Tensor  # [B, R]
    weights: Tensor | None  # [B, R, S]


def density_activation(raw: Tensor, activation: str, beta: float = 1.0) -> Tensor:
    """softplus(beta x) / beta, or ReLU."""
    return torch.nn.functional.softplus(raw, beta=beta) if activation == "softplus" else raw.relu()


def ray_weights(
    t: Tensor,
    raw_density: Tensor,
    *,
    activation: str = "softplus",
    softplus_beta: float = 1.0,
    density_shift: float = 0.0,
    last_interval: float = INFINITE_INTERVAL,
) -> tuple[Tensor, Tensor]:
    """w_i = a_i T_i, a_i = 1 - exp(-(t_{i+1} - t_i) density_i), T_i = prod_{j<i} (1 - a_j + 1e-10).

    Args:
        t: [..., S] sorted.
        raw_density: [..., S] before the activation.

    Returns:
        weights [..., S] and transmittance T [..., S].
    """
    density = density_activation(raw_density + density_shift, activation, softplus_beta)
    intervals = torch.cat([t.diff(dim=-1), torch.full_like(t[..., :1], last_interval)], dim=-1)
    alpha = -torch.expm1(-intervals * density)
    passed = (1 - alpha + TRANSMITTANCE_FLOOR).cumprod(dim=-1)
    transmittance = torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], dim=-1)
    return alpha * transmittance, transmittance


def composite(
    t: Tensor,
    values: Tensor,
    t_fine: Tensor | None = None,
    values_fine: Tensor | None = None,
    *,
    activation: str = "softplus",
    softplus_beta: float = 1.0,
    density_shift: float = 0.0,
    density_noise: Tensor | None = None,
    last_interval: float = INFINITE_INTERVAL,
    last_back: bool = False,
    white_background: bool = False,
    background: Tensor | None = None,
    return_weights: bool = False,
) -> Composite:
    """rgb = sum_i w_i c_i and depth = sum_i w_i t_i over the samples of one or two sets, in order of t.

    Equal depths keep the order fine, then coarse. `last_back` adds 1 - sum(w) to the last weight; `white_background`
    adds 1 - sum(w) to the first three channels, `background` adds final_transmittance * background. Here sum(w) is
    always the sum before `last_back`.

    Args:
        t: [B, R, S_coarse] distances along the rays, sorted if there is no second set.
        values: [B, R, S_coarse, C+1] colours, raw density last.
        t_fine, values_fine: The second set, or None.
        density_noise: [B, R, S] added to the raw density of the sorted samples.
        background: [B, R, C].

    Returns:
        `Composite`: rgb [B, R, C], depth [B, R] (not normalized), weight_sum [B, R], final_transmittance [B, R] (T in
        front of the last sample), weights [B, R, S] in order of t if `return_weights` (with `last_back` in them), else
        None.
    """
    if t_fine is not None:
        t, order = torch.cat([t_fine, t], dim=-1).sort(dim=-1, stable=True)
        values = torch.cat([values_fine, values], dim=-2)
        values = values.gather(-2, order[..., None].expand_as(values))
    colours, raw_density = values[..., :-1], values[..., -1]
    if density_noise is not None:
        raw_density = raw_density + density_noise
    weights, transmittance = ray_weights(
        t,
        raw_density,
        activation=activation,
        softplus_beta=softplus_beta,
        density_shift=density_shift,
        last_interval=last_interval,
    )
    weight_sum = weights.sum(dim=-1)
    if last_back:
        weights = torch.cat([weights[..., :-1], weights[..., -1:] + (1 - weight_sum)[..., None]], dim=-1)
    rgb = (weights[..., None] * colours).sum(dim=-2)
    depth = (weights * t).sum(dim=-1)
    if white_background:
        rgb = torch.cat([rgb[..., :3] + (1 - weight_sum)[..., None], rgb[..., 3:]], dim=-1)
    if background is not None:
        rgb = rgb + transmittance[..., -1:] * background
    return Composite(rgb, depth, weight_sum, transmittance[..., -1], weights if return_weights else None)
