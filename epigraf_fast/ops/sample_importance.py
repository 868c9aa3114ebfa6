"""Depths along rays: stratified coarse ones, and fine ones, drawn where the coarse pass saw something."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.composite import INFINITE_INTERVAL
from ..reference.sample_importance import sample_importance as _reference
from ..reference.sample_importance import sample_stratified as _reference_stratified
from . import library, native, sample_importance_cpu
from .backends import resolve, served
from .checks import check_density, check_dtype, check_integers, check_shape, check_together
from .composite import sort_samples
from .draws import check_no_seed, check_noise_std, is_noisy, seed_for_kernel, std_for_kernel
from .ranges import annotate


def sample_stratified(
    batch: int,
    rays: int,
    samples: int,
    ray_start: float,
    ray_end: float,
    *,
    jitter: Tensor | None = None,
    stochastic: bool = True,
    seed: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Depths evenly spaced in [ray_start, ray_end], ends included, each moved inside its stratum (method.md 1).

    t_i = low_i + (high_i - low_i) jitter_i, low and high being the midpoints with the neighbours; the first stratum
    begins and the last one ends at its depth.

    Args:
        batch, rays, samples: B, R, S of at least 1.
        ray_start, ray_end: Along the rays, world units.
        jitter: [B, R, S] in [0, 1); it also sets dtype and device. None draws it.
        stochastic: False takes the evenly spaced depths where jitter is None.
        seed: [1] int64 on the device, for backend triton, which draws from it by Philox; a CUDA graph reads it anew at
            each replay. Default: drawn from torch's generator, as jitter itself is by the other backends. It may be the
            seed of `sample_importance` and `composite` too: each draws other numbers from it.
        dtype: triton: fp32.

    Returns:
        [B, R, S], every ray sorted.

    Derivatives: none (reference: to jitter).

    Raises:
        ValueError, TypeError: Sizes; dtype or device of jitter; depths that are not finite and rising; `seed` for
            another backend; unknown or missing backend.
    """
    op, shape = "sample_stratified", (batch, rays, samples)
    check_integers(op, batch=batch, rays=rays, samples=samples)
    if min(batch, rays) < 0 or samples < 1:
        raise ValueError(f"{op}: samples must be at least 1, batch and rays 0, got {samples}, {batch}, {rays}")
    if not (math.isfinite(ray_start) and math.isfinite(ray_end) and ray_start < ray_end):
        raise ValueError(f"{op}: ray_end must exceed ray_start, both finite, got {ray_start} and {ray_end}")
    if jitter is not None:
        check_together(op, jitter=jitter)
        check_shape(op, "jitter", jitter, shape)
        dtype, device = jitter.dtype, jitter.device
    device = torch.get_default_device() if device is None else torch.device(device)
    route = library.route(jitter, seed)
    preferred = resolve("sample_importance", backend, device.type)

    def check() -> None:
        if dtype != torch.float32 and route is not library.REFERENCE:
            raise TypeError(f'{op}: dtype must be float32 (because backend is "triton"), got {dtype}')

    chosen = served("sample_importance", backend, device.type, check)
    draws = stochastic and jitter is None
    if chosen == "triton" and route is not library.REFERENCE:
        seed = seed_for_kernel(op, seed, device) if draws else None
        jitter = None if jitter is None else jitter.detach()
        if route is library.PLAIN:
            return _stratified(jitter, seed, *shape, float(ray_start), float(ray_end), device)
        if seed is not None or jitter is not None:
            return library.call(route, _SampleStratified, jitter, seed, *shape, float(ray_start), float(ray_end))
    if chosen == preferred and (draws or chosen != "triton"):  # a fallback draws from torch's generator
        check_no_seed(op, seed)
    if jitter is None:
        if not stochastic:
            return torch.linspace(ray_start, ray_end, samples, dtype=dtype, device=device).expand(shape)
        jitter = torch.rand(shape, dtype=dtype, device=device)
    return _reference_stratified(ray_start, ray_end, jitter)


def _check_lengths(op: str, lengths: dict[str, int]) -> None:
    """Rows are held in registers: raises ValueError where one is longer than the Triton kernels compile for."""
    from ..kernels import sample_importance as kernels

    most = kernels.MAX_SAMPLES
    for name, length in lengths.items():
        if length > most:
            raise ValueError(
                f'{op}: {name} must hold at most {most} numbers a row (because backend is "triton"), got {length}'
            )


def sample_importance(
    t: Tensor,
    raw_density: Tensor,
    u: Tensor | None = None,
    *,
    activation: str = "softplus",
    softplus_beta: float = 1.0,
    density_shift: float = 0.0,
    noise_std: float | Tensor = 0.0,
    last_interval: float = INFINITE_INTERVAL,
    sorted: bool = True,
    stochastic: bool = True,
    samples: int | None = None,
    seed: Tensor | None = None,
    t_sorted: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Integrates coarse samples to weights w, then inverts (w + 1e-5)[1:-1] over the midpoints of t (method.md 5).

    Args:
        t: [B, R, S], distances along the rays, world units; S of at least 3.
        raw_density: [B, R, S], before the activation.
        u: [B, R, K] in [0, 1]; None draws it.
        activation, softplus_beta, density_shift, last_interval: See `composite`. (The last interval decides the last
            weight alone, and that one is dropped.)
        noise_std: Standard deviation of normal noise that is drawn and added to raw_density, a number (0 for none) or a
            tensor of one, which always draws. Noise of one's own goes into raw_density.
        sorted: Whether every ray's result is sorted; else it comes in the order of u, as published.
        stochastic: False takes u_k = k / (K - 1) where u is None.
        samples: K where u is None; default S.
        seed: [1] int64 on the device of t, for backend triton, which draws u and noise from it by Philox; a CUDA graph
            reads it anew at each replay. Default: drawn from torch's generator, as noise and then u themselves are by
            the other backends. It may be the seed of `sample_stratified` and `composite` too: each draws other numbers.
        t_sorted: The caller's word that t rises along every ray, as that of `sample_stratified` does: saves sorting it.

    Returns:
        [B, R, K] fine t, sorted, or in the order of u.

    Backend triton: t is fp32, and so is the result; given u is sorted first, by a launch of its own, if `sorted` is.
    S and K are at most 4096.

    Derivatives: none; the result carries no gradient.

    Raises:
        ValueError, TypeError: Wrong shapes, dtypes, devices, activation or numbers; fewer than 3 samples; `samples`
            beside u; `seed` for another backend; a negative noise_std; unknown or missing backend.
    """
    op = "sample_importance"
    check_together(op, t=t, raw_density=raw_density, u=u)
    check_shape(op, "t", t, ("B", "R", "S"))
    check_shape(op, "raw_density", raw_density, tuple(t.shape))
    if t.shape[-1] < 3:
        raise ValueError(f"{op}: t must hold at least 3 samples (the ends are dropped), got {t.shape[-1]}")
    check_noise_std(op, noise_std, t.device)
    noisy = is_noisy(noise_std)
    if u is not None:
        check_shape(op, "u", u, (*t.shape[:2], "K"))
        if samples is not None:
            raise ValueError(f"{op}: samples must be None where u is given (it is for drawing it), got {samples}")
        samples = u.shape[-1]
    else:
        samples = t.shape[-1] if samples is None else samples
        check_integers(op, samples=samples)
        if samples < 0:
            raise ValueError(f"{op}: samples must not be negative, got {samples}")
    check_density(op, activation, softplus_beta, density_shift, last_interval, t)
    density = {
        "activation": activation,
        "softplus_beta": float(softplus_beta),
        "density_shift": float(density_shift),
    }
    t, raw_density, u = t.detach(), raw_density.detach(), None if u is None else u.detach()
    if not t_sorted:
        t, raw_density = sort_samples(t, raw_density)
    route = library.route(t, raw_density, u)
    preferred = resolve("sample_importance", backend, t.device.type)

    def check() -> None:
        if route is not library.REFERENCE:
            check_dtype(op, "t", t, (torch.float32,), 'backend is "triton"')
            _check_lengths(op, {"t": t.shape[-1], "u": samples})

    chosen = served("sample_importance", backend, t.device.type, check)
    draws = noisy or (u is None and stochastic)
    if chosen == "triton" and route is not library.REFERENCE:
        seed = seed_for_kernel(op, seed, t.device) if draws else None
        if u is not None and sorted:
            u = u.sort(dim=-1).values
        std, number = std_for_kernel(noise_std) if noisy else (None, None)
        settings = _Settings(samples, sorted, **density, even=not stochastic, noise_std=number, backend=chosen)
        return library.call(route, _SampleImportance, t, raw_density, u, seed, std, settings)
    if chosen == preferred and (draws or chosen != "triton"):
        check_no_seed(op, seed)
    if noisy:
        raw_density = raw_density + noise_std * torch.randn_like(raw_density)
    if u is None:
        shape = (*t.shape[:2], samples)
        if stochastic:
            u = torch.rand(shape, dtype=t.dtype, device=t.device)
        else:
            u = torch.linspace(0, 1, samples, dtype=t.dtype, device=t.device).expand(shape)
    if chosen == "cpu" and route is not library.REFERENCE and native.takes_on_cpu(t, raw_density, u):
        settings = _Settings(samples, sorted, **density, even=False, noise_std=None, backend=chosen)
        return library.call(route, _SampleImportance, t, raw_density, u, None, None, settings)
    t_fine = _reference(t, raw_density, u, last_interval=last_interval, **density)
    return t_fine.sort(dim=-1).values if sorted else t_fine


def _stratified(
    jitter: Tensor | None,
    seed: Tensor | None,
    batch: int,
    rays: int,
    samples: int,
    ray_start: float,
    ray_end: float,
    device: torch.device,
) -> Tensor:
    from ..kernels import sample_importance as kernels

    with annotate("sample_stratified"):
        return kernels.stratified(batch, rays, samples, ray_start, ray_end, jitter, seed, device)


@library.register(
    "sample_stratified(Tensor? jitter, Tensor? seed, SymInt batch, SymInt rays, SymInt samples, "
    "float ray_start, float ray_end) -> Tensor"
)
class _SampleStratified:
    """With jitter or a seed: depths that are evenly spaced depend on no tensor."""

    @staticmethod
    def run(jitter: Tensor | None, seed: Tensor | None, *numbers: float) -> Tensor:
        return _stratified(jitter, seed, *numbers, (seed if jitter is None else jitter).device)

    @staticmethod
    def empty(jitter: Tensor | None, seed: Tensor | None, batch: int, rays: int, samples: int, *_: float) -> Tensor:
        return (seed if jitter is None else jitter).new_empty(batch, rays, samples, dtype=torch.float32)


class _Settings(NamedTuple):
    samples: int
    sorted: bool
    activation: str
    softplus_beta: float
    density_shift: float
    even: bool
    noise_std: float | None  # where it is no tensor
    backend: str


@library.register(
    "sample_importance(Tensor t, Tensor raw_density, Tensor? u, Tensor? seed, Tensor? noise_std, SymInt samples, "
    "bool sorted, str activation, float softplus_beta, float density_shift, bool even, float? std, str backend) "
    "-> Tensor"
)
class _SampleImportance:
    Settings = _Settings

    @staticmethod
    @annotate("sample_importance")
    def run(
        t: Tensor,
        raw_density: Tensor,
        u: Tensor | None,
        seed: Tensor | None,
        noise_std: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        if settings.backend == "cpu":
            return sample_importance_cpu.fwd(t, raw_density, u, settings)
        from ..kernels import sample_importance as kernels

        options = settings._asdict()
        samples, std, _ = options.pop("samples"), options.pop("noise_std"), options.pop("backend")
        return kernels.fwd(
            t, raw_density, u, seed, samples, noise_std=std if noise_std is None else noise_std, **options
        )

    @staticmethod
    def empty(t: Tensor, *args: Any) -> Tensor:
        return t.new_empty(*t.shape[:2], args[-1].samples)
