"""Volume integration of one or two sets of samples along rays."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.composite import INFINITE_INTERVAL, Composite
from ..reference.composite import composite as _reference
from . import composite_cpu, library, native
from .backends import resolve, served
from .checks import (
    TRITON_DTYPES,
    check_density,
    check_dtype,
    check_no_gradient,
    check_shape,
    check_together,
    is_differentiated,
)
from .draws import check_no_seed, check_noise_std, is_noisy, seed_for_kernel, std_for_kernel
from .ranges import annotate


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
    noise_std: float | Tensor = 0.0,
    seed: Tensor | None = None,
    last_interval: float = INFINITE_INTERVAL,
    last_back: bool = False,
    white_background: bool = False,
    background: Tensor | None = None,
    return_weights: bool = False,
    t_sorted: bool = False,
    backend: str | None = None,
) -> Composite:
    """rgb = sum_i w_i c_i, depth = sum_i w_i t_i over both sets in order of t (method.md 4).

    density = activation(raw + density_shift + noise); a_i = 1 - exp(-(t_{i+1} - t_i) density_i), the last
    interval being `last_interval`; T_i = prod_{j<i} (1 - a_j + 1e-10); w_i = a_i T_i. Equal depths keep the order fine,
    then coarse.

    Args:
        t: [B, R, S_coarse], distance along the ray, world units.
        values: [B, R, S_coarse, C+1], colours (any number, linear), raw density last.
        t_fine, values_fine: [B, R, S_fine], [B, R, S_fine, C+1], or None for one set alone.
        activation: "softplus" (softplus(b x) / b with b = softplus_beta, positive) or "relu".
        density_noise: [B, R, S_coarse + S_fine], added to the raw density of the sorted samples.
        noise_std: Standard deviation of normal noise that is drawn in place of density_noise: a number (0 for none) or
            a tensor of one, which always draws.
        seed: [1] int64 on the device of t, for backend triton, which draws noise from it by Philox, and again in the
            backward; a CUDA graph reads it anew at each replay. Default: drawn from torch's generator, as the noise
            itself is by the reference.
        last_interval: 1e10 without a background, 1e-3 in front of one; finite, not negative.
        last_back: Adds 1 - sum(w) to the last weight.
        white_background: Adds 1 - sum(w), sum(w) before `last_back`, to the first three colours, of which there are.
        background: [B, R, C], added times the final transmittance.
        return_weights: Whether to return the weights too.
        t_sorted: The caller's word that t, and t_fine, rise along every ray, as those of `sample_stratified` and
            `sample_importance` do. Saves sorting one set alone, and each of two, which backends triton and cpu merge.

    Returns:
        rgb [B, R, C]; depth [B, R], not normalized; weight_sum [B, R], before `last_back`; final_transmittance [B, R],
        T in front of the last sample; weights [B, R, S_coarse + S_fine] in order of t, or None.

    Backend triton: t is fp32, values fp32, fp16 or bf16; the results are fp32. Rows of samples are read in place where
    they are dense and evenly spaced, else copied. Both sets together hold at most 2048 samples of up to 4 numbers (1024
    of 8, 512 of 16, 128 of 32).

    Derivatives: reference any order, to everything (through the merge, too); triton and cpu the first, to everything
        but t (cpu is the reference where a gradient to t is asked for, and for dtypes that are not all fp32 or fp64).

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes, devices, activation or numbers; half of the second set
            missing; a white background of less than three colours; density_noise beside noise_std; `seed` for another
            backend; unknown or missing backend.
        NotImplementedError: With triton a gradient to t; with triton or cpu a second derivative.
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
    check_density("composite", activation, softplus_beta, density_shift, last_interval, t)
    if white_background and values.shape[-1] < 4:
        raise ValueError(
            f"composite: values must hold at least 3 colours and a density (because white_background is set), "
            f"got {list(values.shape)}"
        )
    check_noise_std("composite", noise_std, t.device)
    noisy = is_noisy(noise_std)
    if noisy and density_noise is not None:
        raise ValueError(f"composite: noise_std must be 0 where density_noise is given, got {noise_std}")
    settings = {
        "activation": activation,
        "softplus_beta": float(softplus_beta),
        "density_shift": float(density_shift),
        "last_interval": float(last_interval),
        "last_back": last_back,
        "white_background": white_background,
    }
    route = library.route(t, values, t_fine, values_fine, density_noise, background)
    preferred = resolve("composite", backend, t.device.type)

    def check() -> None:
        if route is not library.REFERENCE:
            _check_triton(t, values, t_fine, values_fine)

    chosen = served("composite", backend, t.device.type, check)
    if chosen == "triton" and route is not library.REFERENCE:
        if not t_sorted:
            t, values = sort_samples(t, values)
            t_fine, values_fine = (None, None) if t_fine is None else sort_samples(t_fine, values_fine)
        seed = seed_for_kernel("composite", seed, t.device) if noisy else None
        std, number = std_for_kernel(noise_std) if noisy else (None, None)
        inputs = t, values, t_fine, values_fine, density_noise, background, seed, std
        return _launched(route, inputs, _Settings(**settings, backend=chosen), return_weights, number)
    if chosen == preferred and (noisy or chosen != "triton"):  # a fallback draws from torch's generator
        check_no_seed("composite", seed)
    if noisy:
        density_noise = noise_std * torch.randn(*t.shape[:2], samples, dtype=t.dtype, device=t.device)
    inputs = t, values, t_fine, values_fine, density_noise, background
    compiled = chosen == "cpu" and route is not library.REFERENCE and native.takes_on_cpu(*inputs)
    compiled = compiled and not is_differentiated(t, t_fine)
    if not t_sorted and (compiled or t_fine is None):  # the reference sorts two sets together in any case
        t, values = sort_samples(t, values)
        if t_fine is not None:
            t_fine, values_fine = sort_samples(t_fine, values_fine)
    if compiled:
        inputs = t, values, t_fine, values_fine, density_noise, background, None, None
        return _launched(route, inputs, _Settings(**settings, backend=chosen), return_weights, None)
    return _reference(
        t,
        values,
        t_fine,
        values_fine,
        density_noise=density_noise,
        background=background,
        return_weights=return_weights,
        **settings,
    )


def _launched(
    route: str, inputs: tuple[Tensor | None, ...], settings: _Settings, return_weights: bool, std: float | None
) -> Composite:
    return Composite(*library.call(route, _Composite, *inputs, settings, return_weights, std))


def sort_samples(t: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[B, R, S] in rising order, and with it [B, R, S] or [B, R, S, C]; equal ones keep theirs."""
    t, order = t.sort(dim=-1, stable=True)
    if values.ndim > t.ndim:
        order = order[..., None].expand_as(values)
    return t, values.gather(2, order)


def _check_triton(t: Tensor, values: Tensor, t_fine: Tensor | None, values_fine: Tensor | None) -> None:
    """What the kernels ask for beyond the public checks."""
    because = 'backend is "triton"'
    check_dtype("composite", "t", t, (torch.float32,), because)
    check_dtype("composite", "values", values, TRITON_DTYPES, because)
    if t_fine is not None:
        check_dtype("composite", "t_fine", t_fine, (torch.float32,), because)
        check_dtype("composite", "values_fine", values_fine, (values.dtype,), f"{because}, and values are")
    check_no_gradient("composite", t=t, t_fine=t_fine)
    from ..kernels import composite as kernels

    channels = values.shape[-1]
    if channels > kernels.MAX_CHANNELS:
        raise ValueError(
            f"composite: values must hold at most {kernels.MAX_CHANNELS} numbers a sample "
            f"(because {because}), got {channels}"
        )
    most = kernels.max_samples(channels)
    samples = t.shape[-1] + (0 if t_fine is None else t_fine.shape[-1])
    if samples > most:
        raise ValueError(
            f"composite: t and t_fine must hold at most {most} samples of {channels} numbers together "
            f"(because {because}), got {samples}"
        )


class _Settings(NamedTuple):
    activation: str
    softplus_beta: float
    density_shift: float
    last_interval: float
    last_back: bool
    white_background: bool
    backend: str

    @property
    def kernels(self) -> ModuleType:
        return composite_cpu if self.backend == "cpu" else _triton_kernels()

    @property
    def of_kernels(self) -> dict[str, Any]:
        """What kernels take by keyword."""
        return {name: value for name, value in self._asdict().items() if name != "backend"}


@functools.cache
def _triton_kernels() -> ModuleType:
    from ..kernels import composite as kernels

    return kernels


def _wide(x: Tensor | None) -> Tensor | None:
    """In the dtype that is computed with: fp64, else fp32."""
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


_INPUTS = (
    "Tensor t, Tensor values, Tensor? t_fine, Tensor? values_fine, Tensor? density_noise, Tensor? background, "
    "Tensor? seed, Tensor? noise_std"
)
_SETTINGS = (
    "str activation, float softplus_beta, float density_shift, float last_interval, bool last_back, "
    "bool white_background, str backend"
)


@library.register(
    f"composite({_INPUTS}, {_SETTINGS}, bool return_weights, float? std) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class _Composite:
    """The fields of `Composite` by a kernel. Triton's draws noise with a standard deviation `noise_std`, or `std`.

    Saves its inputs alone: the backward integrates again.
    """

    Settings = _Settings
    constants = ("t", "t_fine")

    @staticmethod
    @annotate("composite_fwd")
    def run(*args: Any) -> tuple[Tensor | None, ...]:
        *inputs, noise_std, settings, return_weights, std = args
        std = std if noise_std is None else noise_std
        return tuple(settings.kernels.fwd(*inputs, std, return_weights=return_weights, **settings.of_kernels))

    @staticmethod
    def empty(t: Tensor, values: Tensor, t_fine: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        return_weights = args[-2]
        dtype = torch.promote_types(values.dtype, torch.float32)
        rgb = values.new_empty(*t.shape[:2], values.shape[-1] - 1, dtype=dtype)
        single = (rgb.new_empty(t.shape[:2]) for _ in range(3))
        samples = t.shape[-1] + (0 if t_fine is None else t_fine.shape[-1])
        return rgb, *single, rgb.new_empty(*t.shape[:2], samples) if return_weights else None

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor | None, ...]:
        t, values, t_fine, values_fine, density_noise, background, seed, _, settings, return_weights, _ = args
        if seed is not None:
            raise NotImplementedError(
                "composite: noise that a kernel drew has no batched and no forward-mode derivatives; pass it as "
                'density_noise, or use backend="reference"'
            )
        values, values_fine, density_noise, background = map(_wide, (values, values_fine, density_noise, background))
        more = {"density_noise": density_noise, "background": background, "return_weights": return_weights}
        return tuple(_reference(t, values, t_fine, values_fine, **more, **settings.of_kernels))

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.settings, _, ctx.std = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grad_outputs):
            return (None,) * 11
        *_, to_density_noise, to_background = ctx.needs_input_grad[:6]
        options = ctx.settings, ctx.std, to_density_noise, to_background
        to_values, to_values_fine, to_density_noise, to_background = library.apply(
            _CompositeBackward, *grad_outputs, *ctx.saved_tensors, *options
        )
        return None, to_values, None, to_values_fine, to_density_noise, to_background, *(None,) * 5


@library.register(
    "composite_backward(Tensor? grad_rgb, Tensor? grad_depth, Tensor? grad_weight_sum, Tensor? grad_transmittance, "
    f"Tensor? grad_weights, {_INPUTS}, {_SETTINGS}, float? std, bool to_density_noise, bool to_background) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
class _CompositeBackward(library.Last):
    """The gradients by a kernel, as a function of the incoming ones and of the inputs."""

    Settings = _Settings
    refusal = 'composite: backend "{0.backend}" has no second derivative; use backend="reference"'

    @staticmethod
    @annotate("composite_bwd")
    def run(*args: Any) -> tuple[Tensor | None, ...]:
        *tensors, noise_std, settings, std, to_density_noise, to_background = args
        inputs = *tensors[5:], std if noise_std is None else noise_std
        wanted = {"to_density_noise": to_density_noise, "to_background": to_background}
        return tuple(settings.kernels.bwd(tensors[:5], *inputs, **wanted, **settings.of_kernels))

    @staticmethod
    def empty(*args: Any) -> tuple[Tensor | None, ...]:
        _, values, _, values_fine, density_noise, background, *_, to_density_noise, to_background = args[5:]
        wanted = values, values_fine, density_noise if to_density_noise else None, background if to_background else None
        return tuple(None if x is None else x.new_empty(x.shape) for x in wanted)

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor | None, ...]:
        grad_outputs, (*tensors, settings, std, _, _) = args[:5], args[5:]

        def forward(values: Tensor, values_fine: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = tensors[0], values, tensors[2], values_fine, *others, *tensors[6:]
            return _Composite.reference(*inputs, settings, grad_outputs[4] is not None, std)

        return library.pull_back(forward, (tensors[1], *tensors[3:6]), grad_outputs)
