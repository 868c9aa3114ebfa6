"""Depths along rays: stratified coarse ones (method.md 1), and fine ones where the coarse pass saw something (5)."""

from __future__ import annotations

import torch
from torch import Tensor

from .composite import INFINITE_INTERVAL, ray_weights

WEIGHT_FLOOR = 1e-5


def sample_stratified(ray_start: float, ray_end: float, jitter: Tensor) -> Tensor:
    """Depths evenly spaced in [ray_start, ray_end], ends included, each moved inside its stratum.

    A stratum reaches to the midpoints with the neighbours; the first begins and the last ends at its depth.

    Args:
        jitter: [..., S] in [0, 1).

    Returns:
        [..., S], sorted.
    """
    t = torch.linspace(ray_start, ray_end, jitter.shape[-1], dtype=jitter.dtype, device=jitter.device)
    middle = (t[1:] + t[:-1]) / 2
    low, high = torch.cat([t[:1], middle]), torch.cat([middle, t[-1:]])
    return low + (high - low) * jitter


@torch.no_grad()
def invert_cdf(bins: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """Samples of the piecewise constant density `weights` over `bins`, by inversion.

    weights + 1e-5 are normalized and summed to a CDF of M + 1 knots with leading 0; i is the first knot with CDF >= u;
    lower = max(i - 1, 0), upper = min(i, M), d = CDF[upper] - CDF[lower], 1 where below 1e-5;
    sample = bins[lower] + (u - CDF[lower]) / d (bins[upper] - bins[lower]).

    Args:
        bins: [..., M + 1] sorted.
        weights: [..., M].
        u: [..., K] in [0, 1].

    Returns:
        [..., K], in the order of u. No gradient.
    """
    pdf = weights + WEIGHT_FLOOR
    cdf = (pdf / pdf.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1).contiguous()
    knot = torch.searchsorted(cdf, u.contiguous(), right=False)
    lower, upper = (knot - 1).clamp(min=0), knot.clamp(max=weights.shape[-1])
    cdf_lower, bin_lower = cdf.gather(-1, lower), bins.gather(-1, lower)
    d = cdf.gather(-1, upper) - cdf_lower
    d = torch.where(d < WEIGHT_FLOOR, 1.0, d)
    return (bin_lower + (u - cdf_lower) / d * (bins.gather(-1, upper) - bin_lower)).to(bins.dtype)


@torch.no_grad()
def sample_importance(
    t: Tensor,
    raw_density: Tensor,
    u: Tensor,
    *,
    activation: str = "softplus",
    softplus_beta: float = 1.0,
    density_shift: float = 0.0,
    last_interval: float = INFINITE_INTERVAL,
) -> Tensor:
    """Integrates the coarse samples to weights w, then inverts (w + 1e-5)[1:-1] over the midpoints of t.

    Args:
        t: [B, R, S] sorted.
        raw_density: [B, R, S], density noise included.
        u: [B, R, K] in [0, 1].

    Returns:
        [B, R, K] fine t, in the order of u. No gradient.
    """
    weights, _ = ray_weights(
        t,
        raw_density,
        activation=activation,
        softplus_beta=softplus_beta,
        density_shift=density_shift,
        last_interval=last_interval,
    )
    midpoints = (t[..., 1:] + t[..., :-1]) / 2
    return invert_cdf(midpoints, (weights + WEIGHT_FLOOR)[..., 1:-1], u)
