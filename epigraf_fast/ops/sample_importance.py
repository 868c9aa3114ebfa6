"""Fine depths, drawn where the coarse pass saw something."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.composite import INFINITE_INTERVAL
from ..reference.sample_importance import invert_cdf as _reference_invert_cdf
from ..reference.sample_importance import sample_importance as _reference
from .backends import resolve
from .checks import check_choice, check_dtype, check_shape, check_together
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
    if resolve("sample_importance", backend, bins.device.type) == "triton":
        check_dtype("invert_cdf", "bins", bins, (torch.float32,), 'backend is "triton"')
        from ..kernels import sample_importance as kernels

        num_rows = bins.shape[:-1].numel()
        flat = (x.detach().reshape(num_rows, x.shape[-1]).contiguous() for x in (bins, weights, u))
        return kernels.invert_cdf(*flat).reshape(u.shape)
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
    sorted: bool = False,
    samples: int | None = None,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Integrates coarse samples to weights w, then inverts (w + 1e-5)[1:-1] over the midpoints of t (SPEC section 5).

    Args:
        t: [B, R, S], sorted distances along the rays, world units; S of at least 3.
        raw_density: [B, R, S], before the activation, density noise included.
        u: [B, R, K] in [0, 1]; None draws it.
        activation, softplus_beta, density_shift, last_interval: See `composite`. (The last interval decides the last
            weight alone, and that one is dropped.)
        sorted: Whether every ray's result is sorted, as `composite` with backend triton needs it.
        samples: K where u is None; default S.
        seed: [1] int64 on the device of t, for backend triton where u is None: the kernel draws from it by Philox, and
            a CUDA graph reads it anew at each replay. Default: drawn from torch's generator, as u itself is by the
            other backends.

    Returns:
        [B, R, K] fine t, in the order of u, or sorted.

    Backend triton: t is fp32, and so is the result; given u is sorted first, by a launch of its own, if `sorted` is.

    Derivatives: none; the result carries no gradient.

    Raises:
        ValueError, TypeError: Wrong shapes, dtypes or devices; fewer than 3 samples; `samples` or `seed` beside u, or
            `seed` for another backend; unknown or missing backend.
    """
    check_together("sample_importance", t=t, raw_density=raw_density, u=u)
    check_shape("sample_importance", "t", t, ("B", "R", "S"))
    check_shape("sample_importance", "raw_density", raw_density, tuple(t.shape))
    if t.shape[-1] < 3:
        raise ValueError(f"sample_importance: t must hold at least 3 samples (the ends are dropped), got {t.shape[-1]}")
    if u is not None:
        check_shape("sample_importance", "u", u, (*t.shape[:2], "K"))
        if samples is not None or seed is not None:
            raise ValueError(
                "sample_importance: samples and seed must be None where u is given (they are for drawing it)"
            )
        samples = u.shape[-1]
    elif samples is None:
        samples = t.shape[-1]
    elif samples < 0:
        raise ValueError(f"sample_importance: samples must not be negative, got {samples}")
    check_choice("sample_importance", "activation", activation, DENSITY_ACTIVATIONS)
    density = {"activation": activation, "softplus_beta": softplus_beta, "density_shift": density_shift}
    if resolve("sample_importance", backend, t.device.type) == "triton":
        check_dtype("sample_importance", "t", t, (torch.float32,), 'backend is "triton"')
        from ..kernels import sample_importance as kernels

        if u is None:
            seed = torch.randint(2**62, (1,), device=t.device) if seed is None else seed
            _check_seed(seed, t.device)
        elif sorted:
            u = u.sort(dim=-1).values
        return kernels.fwd(t.detach(), raw_density.detach(), u, seed, samples, sorted=sorted, **density)
    if seed is not None:
        raise ValueError(
            "sample_importance: seed must be None for a backend other than 'triton' (torch's generator draws)"
        )
    if u is None:
        u = torch.rand(*t.shape[:2], samples, dtype=t.dtype, device=t.device)
    t_fine = _reference(t, raw_density, u, last_interval=last_interval, **density)
    return t_fine.sort(dim=-1).values if sorted else t_fine


def _check_seed(seed: Tensor, device: torch.device) -> None:
    if not (isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.shape == (1,) and seed.device == device):
        raise ValueError(f"sample_importance: seed must be a tensor of shape [1] of int64 on {device}, got {seed!r}")
