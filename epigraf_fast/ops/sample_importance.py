"""Fine depths, drawn where the coarse pass saw something."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.composite import INFINITE_INTERVAL
from ..reference.sample_importance import invert_cdf as _reference_invert_cdf
from ..reference.sample_importance import sample_importance as _reference
from .backends import resolve
from .checks import check_choice, check_shape, check_together
from .composite import DENSITY_ACTIVATIONS


def invert_cdf(bins: Tensor, weights: Tensor, u: Tensor, *, backend: str | None = None) -> Tensor:
    """Samples of the piecewise constant density `weights` over `bins`, by inversion of its CDF (SPEC section 5).

    weights + 1e-5 are normalized and summed to a CDF of M + 1 knots with leading 0; i is the first knot with CDF >= u;
    lower = max(i - 1, 0), upper = min(i, M), d = CDF[upper] - CDF[lower], 1 where below 1e-5;
    sample = bins[lower] + (u - CDF[lower]) / d (bins[upper] - bins[lower]).

    Args:
        bins: [..., M + 1] sorted.
        weights: [..., M], not negative.
        u: [..., K] in [0, 1].

    Returns:
        [..., K], in the order of u, dtype of bins.

    Derivatives: none; the result carries no gradient.

    Raises:
        ValueError, TypeError: Wrong shapes, dtypes or devices; unknown or missing backend.
    """
    check_together("invert_cdf", bins=bins, weights=weights, u=u)
    if bins.ndim < 1 or bins.shape[-1] < 2:
        raise ValueError(f"invert_cdf: bins must have shape [..., M + 1] with M of at least 1, got {list(bins.shape)}")
    check_shape("invert_cdf", "weights", weights, (*bins.shape[:-1], bins.shape[-1] - 1))
    check_shape("invert_cdf", "u", u, (*bins.shape[:-1], "K"))
    resolve("sample_importance", backend, bins.device.type)
    return _reference_invert_cdf(bins, weights, u)


def sample_importance(
    t: Tensor,
    raw_density: Tensor,
    u: Tensor | None = None,
    *,
    activation: str = "softplus",
    softplus_beta: float = 1.0,
    density_shift: float = 0.0,
    last_interval: float = INFINITE_INTERVAL,
    backend: str | None = None,
) -> Tensor:
    """Integrates coarse samples to weights w, then inverts (w + 1e-5)[1:-1] over the midpoints of t (SPEC section 5).

    Args:
        t: [B, R, S], sorted distances along the rays, world units; S of at least 3.
        raw_density: [B, R, S], before the activation, density noise included.
        u: [B, R, K] in [0, 1]; None draws [B, R, S] from torch's generator.
        activation, softplus_beta, density_shift, last_interval: See `composite`.

    Returns:
        [B, R, K] fine t, in the order of u.

    Derivatives: none; the result carries no gradient.

    Raises:
        ValueError, TypeError: Wrong shapes, dtypes or devices; fewer than 3 samples; unknown or missing backend.
    """
    check_together("sample_importance", t=t, raw_density=raw_density, u=u)
    check_shape("sample_importance", "t", t, ("B", "R", "S"))
    check_shape("sample_importance", "raw_density", raw_density, tuple(t.shape))
    if t.shape[-1] < 3:
        raise ValueError(f"sample_importance: t must hold at least 3 samples (the ends are dropped), got {t.shape[-1]}")
    if u is None:
        u = torch.rand(t.shape, dtype=t.dtype, device=t.device)
    check_shape("sample_importance", "u", u, (*t.shape[:2], "K"))
    check_choice("sample_importance", "activation", activation, DENSITY_ACTIVATIONS)
    resolve("sample_importance", backend, t.device.type)
    return _reference(
        t,
        raw_density,
        u,
        activation=activation,
        softplus_beta=softplus_beta,
        density_shift=density_shift,
        last_interval=last_interval,
    )
