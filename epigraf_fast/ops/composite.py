"""Volume integration of one or two sets of samples along rays."""

from __future__ import annotations

from torch import Tensor

from ..reference.composite import INFINITE_INTERVAL, Composite
from ..reference.composite import composite as _reference
from .backends import resolve
from .checks import check_choice, check_shape, check_together

DENSITY_ACTIVATIONS = ("softplus", "relu")


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
    backend: str | None = None,
) -> Composite:
    """rgb = sum_i w_i c_i, depth = sum_i w_i t_i over both sets in order of t (SPEC section 4).

    density = activation(raw + density_shift + density_noise); a_i = 1 - exp(-(t_{i+1} - t_i) density_i), the last
    interval being `last_interval`; T_i = prod_{j<i} (1 - a_j + 1e-10); w_i = a_i T_i. Equal depths keep the order fine,
    then coarse.

    Args:
        t: [B, R, S_coarse], distance along the ray, world units.
        values: [B, R, S_coarse, C+1], colours (any number, linear), raw density last.
        t_fine, values_fine: [B, R, S_fine], [B, R, S_fine, C+1], or None for one set alone.
        activation: "softplus" (softplus(b x) / b with b = softplus_beta) or "relu".
        density_noise: [B, R, S_coarse + S_fine], added to the raw density of the sorted samples.
        last_interval: 1e10 without a background, 1e-3 in front of one.
        last_back: Adds 1 - sum(w) to the last weight.
        white_background: Adds 1 - sum(w), sum(w) before `last_back`, to the first three colours.
        background: [B, R, C], added times the final transmittance.
        return_weights: Whether to return the weights too.

    Returns:
        rgb [B, R, C]; depth [B, R], not normalized; weight_sum [B, R], before `last_back`; final_transmittance [B, R],
        T in front of the last sample; weights [B, R, S_coarse + S_fine] in order of t, or None.

    Derivatives: reference any order, to everything (through the merge, too).

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes, devices or activation; half of the second set missing;
            unknown or missing backend.
    """
    check_together(
        "composite",
        t=t,
        values=values,
        t_fine=t_fine,
        values_fine=values_fine,
        density_noise=density_noise,
        background=background,
    )
    check_shape("composite", "t", t, ("B", "R", "S"))
    check_shape("composite", "values", values, (*t.shape, "C+1"))
    if values.shape[-1] < 2 or t.shape[-1] < 1:
        raise ValueError(
            f"composite: values must hold a sample with a colour and a density at least, got {list(values.shape)}"
        )
    if (t_fine is None) != (values_fine is None):
        raise ValueError("composite: t_fine and values_fine must be given together, got one of them")
    samples = t.shape[-1]
    if t_fine is not None:
        check_shape("composite", "t_fine", t_fine, (*t.shape[:2], "S_fine"))
        check_shape("composite", "values_fine", values_fine, (*t_fine.shape, values.shape[-1]))
        samples += t_fine.shape[-1]
    if density_noise is not None:
        check_shape("composite", "density_noise", density_noise, (*t.shape[:2], samples))
    if background is not None:
        check_shape("composite", "background", background, (*t.shape[:2], values.shape[-1] - 1))
    check_choice("composite", "activation", activation, DENSITY_ACTIVATIONS)
    resolve("composite", backend, t.device.type)
    return _reference(
        t,
        values,
        t_fine,
        values_fine,
        activation=activation,
        softplus_beta=softplus_beta,
        density_shift=density_shift,
        density_noise=density_noise,
        last_interval=last_interval,
        last_back=last_back,
        white_background=white_background,
        background=background,
        return_weights=return_weights,
    )
