"""Volume integration along rays, forward and backward: one launch each, whatever the number of sets.

A program reads its rays' samples in order (`sorted_samples`) and integrates in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .merged_samples import sorted_samples
from .rays import TILE, TRANSMITTANCE_FLOOR, absorption, density, density_backward, rows, sum_before

MAX_WARPS = 8
MAX_SAMPLES = 2048  # of a ray, if it has no more than 4 channels; see `max_samples`
MAX_CHANNELS = 32  # of a sample, density included


class Outputs(NamedTuple):
    """What `fwd` gives, fp32."""

    rgb: Tensor  # [B, R, C]
    depth: Tensor  # [B, R]
    weight_sum: Tensor  # [B, R]
    final_transmittance: Tensor  # [B, R]
    weights: Tensor | None  # [B, R, S]


class Gradients(NamedTuple):
    """What `bwd` gives."""

    values: Tensor  # [B, R, S_coarse, C+1]; with the next side by side in one [B, R, S_coarse + S_fine, C+1]
    values_fine: Tensor | None  # [B, R, S_fine, C+1]
    density_noise: Tensor | None  # [B, R, S]
    background: Tensor | None  # [B, R, C]


@triton.jit
def _composite_fwd_kernel(
    t_ptr,
    values_ptr,
    t_fine_ptr,
    values_fine_ptr,
    density_noise_ptr,
    background_ptr,
    seed_ptr,
    noise_std,
    rgb_ptr,
    depth_ptr,
    weight_sum_ptr,
    final_transmittance_ptr,
    weights_ptr,
    num_rays,
    t_stride,
    values_stride,
    t_fine_stride,
    values_fine_stride,
    density_noise_stride,
    background_stride,
    softplus_beta,
    density_shift,
    last_interval,
    RELU: tl.constexpr,
    LAST_BACK: tl.constexpr,
    WHITE_BACKGROUND: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    S_COARSE: tl.constexpr,
    S_FINE: tl.constexpr,
    FINE_BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """w_i = alpha_i T_i, alpha_i = 1 - exp(-interval_i density_i), T_i = prod_{j<i} (1 - alpha_j + 1e-10);
    rgb = sum_i w_i c_i, depth = sum_i w_i t_i.

    One program owns BLOCK_R rays, with all their samples. The second set, density_noise, background and weights may be
    None; strides are those of rows (one ray), which are dense. Noise is drawn from the seed unless noise_std is None.
    """
    S: tl.constexpr = S_COARSE + S_FINE
    ray = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid, t, interval, x, _, _, values = sorted_samples(
        t_ptr,
        values_ptr,
        t_fine_ptr,
        values_fine_ptr,
        density_noise_ptr,
        seed_ptr,
        noise_std,
        ray,
        num_rays,
        t_stride,
        values_stride,
        t_fine_stride,
        values_fine_stride,
        density_noise_stride,
        last_interval,
        density_shift,
        CHANNELS,
        BLOCK_C,
        S_COARSE,
        S_FINE,
        FINE_BITS,
        BLOCK_S,
    )
    p = tl.arange(0, BLOCK_S)[None, :]
    c = tl.arange(0, BLOCK_C)[None, :]
    ray_exists = ray < num_rays
    is_colour = ray_exists[:, None] & (c < CHANNELS - 1)

    alpha, T, _ = absorption(interval * density(x, softplus_beta, RELU), valid)
    weights = tl.where(valid, alpha * T, 0.0)
    weight_sum = tl.sum(weights, 1)
    final_transmittance = tl.sum(tl.where(p == S - 1, T, 0.0), 1)
    if LAST_BACK:
        weights += tl.where(p == S - 1, (1.0 - weight_sum)[:, None], 0.0)
    rgb = tl.sum(tl.where(valid[:, :, None], weights[:, :, None] * values, 0.0), 1)
    if WHITE_BACKGROUND:
        rgb += tl.where(c < 3, (1.0 - weight_sum)[:, None], 0.0)
    if background_ptr is not None:
        background = tl.load(background_ptr + ray[:, None] * background_stride + c, mask=is_colour, other=0.0)
        rgb += final_transmittance[:, None] * background.to(tl.float32)

    tl.store(rgb_ptr + ray[:, None] * (CHANNELS - 1) + c, rgb, mask=is_colour)
    tl.store(depth_ptr + ray, tl.sum(tl.where(valid, weights * t, 0.0), 1), mask=ray_exists)
    tl.store(weight_sum_ptr + ray, weight_sum, mask=ray_exists)
    tl.store(final_transmittance_ptr + ray, final_transmittance, mask=ray_exists)
    if weights_ptr is not None:
        tl.store(weights_ptr + ray[:, None] * S + p, weights, mask=valid)


@triton.jit
def _composite_bwd_kernel(
    grad_rgb_ptr,
    grad_depth_ptr,
    grad_weight_sum_ptr,
    grad_final_transmittance_ptr,
    grad_weights_ptr,
    t_ptr,
    values_ptr,
    t_fine_ptr,
    values_fine_ptr,
    density_noise_ptr,
    background_ptr,
    seed_ptr,
    noise_std,
    grad_values_ptr,
    grad_density_noise_ptr,
    grad_background_ptr,
    num_rays,
    t_stride,
    values_stride,
    t_fine_stride,
    values_fine_stride,
    density_noise_stride,
    background_stride,
    softplus_beta,
    density_shift,
    last_interval,
    RELU: tl.constexpr,
    LAST_BACK: tl.constexpr,
    WHITE_BACKGROUND: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    S_COARSE: tl.constexpr,
    S_FINE: tl.constexpr,
    FINE_BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The forward's gradients, with everything but its inputs recomputed.

    With g_i the gradient to w_i and g_T that to T in front of the last sample, the gradient to the optical thickness
    x_i = interval_i density_i, e_i = exp(-x_i), is

        e_i T_i g_i - e_i / (e_i + 1e-10) (sum_{j>i} w_j g_j + [i < last] T_last g_T):

    more light stopped here, less left for what is behind. The quotient is at most 1, and the sum holds no term of its
    own sample or of those in front, so that what is behind an opaque sample keeps its precision.

    One program owns BLOCK_R rays, with all their samples, and writes each sample's gradient where the sample lies.
    Gradients of outputs that nothing depends on are None, and so are those of inputs that need none.
    """
    S: tl.constexpr = S_COARSE + S_FINE
    ray = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid, t, interval, x, is_fine, index, values = sorted_samples(
        t_ptr,
        values_ptr,
        t_fine_ptr,
        values_fine_ptr,
        density_noise_ptr,
        seed_ptr,
        noise_std,
        ray,
        num_rays,
        t_stride,
        values_stride,
        t_fine_stride,
        values_fine_stride,
        density_noise_stride,
        last_interval,
        density_shift,
        CHANNELS,
        BLOCK_C,
        S_COARSE,
        S_FINE,
        FINE_BITS,
        BLOCK_S,
    )
    p = tl.arange(0, BLOCK_S)[None, :]
    c = tl.arange(0, BLOCK_C)[None, :]
    ray_exists = ray < num_rays
    is_colour = ray_exists[:, None] & (c < CHANNELS - 1)
    is_last = p == S - 1

    alpha, T, passed = absorption(interval * density(x, softplus_beta, RELU), valid)
    weights = tl.where(valid, alpha * T, 0.0)
    if LAST_BACK:
        colour_weights = weights + tl.where(is_last, (1.0 - tl.sum(weights, 1))[:, None], 0.0)
    else:
        colour_weights = weights

    # To every weight, [RAYS, BLOCK_S], and to the final transmittance, [RAYS].
    grad_weights = tl.zeros_like(weights)
    grad_weight_sum = tl.zeros_like(ray).to(tl.float32)
    grad_final = tl.zeros_like(grad_weight_sum)
    grad_rgb = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if grad_weights_ptr is not None:
        grad_weights += tl.load(grad_weights_ptr + ray[:, None] * S + p, mask=valid, other=0.0)
    if grad_depth_ptr is not None:
        grad_weights += tl.load(grad_depth_ptr + ray, mask=ray_exists, other=0.0)[:, None] * t
    if grad_weight_sum_ptr is not None:
        grad_weight_sum += tl.load(grad_weight_sum_ptr + ray, mask=ray_exists, other=0.0)
    if grad_final_transmittance_ptr is not None:
        grad_final += tl.load(grad_final_transmittance_ptr + ray, mask=ray_exists, other=0.0)
    if grad_rgb_ptr is not None:
        grad_rgb = tl.load(grad_rgb_ptr + ray[:, None] * (CHANNELS - 1) + c, mask=is_colour, other=0.0)
        grad_weights += tl.sum(tl.where(c[:, None, :] < CHANNELS - 1, values * grad_rgb[:, None, :], 0.0), 2)
        if WHITE_BACKGROUND:
            grad_weight_sum -= tl.sum(tl.where(c < 3, grad_rgb, 0.0), 1)
        if background_ptr is not None:
            background = tl.load(background_ptr + ray[:, None] * background_stride + c, mask=is_colour, other=0.0)
            grad_final += tl.sum(tl.where(is_colour, grad_rgb * background.to(tl.float32), 0.0), 1)
    if LAST_BACK:  # the last weight is 1 less the others
        grad_weights -= tl.sum(tl.where(is_last, grad_weights, 0.0), 1)[:, None]
    grad_weights = tl.where(valid, grad_weights + grad_weight_sum[:, None], 0.0)

    seen = weights * grad_weights + tl.where(is_last, T * grad_final[:, None], 0.0)
    behind = sum_before(seen, REVERSE=True)
    grad_thickness = passed * (T * grad_weights - behind / (passed + TRANSMITTANCE_FLOOR))
    grad_density = density_backward(x, grad_thickness * interval, softplus_beta, RELU)

    channel = c[:, None, :]
    grad_values = tl.where(
        channel == CHANNELS - 1, grad_density[:, :, None], colour_weights[:, :, None] * grad_rgb[:, None, :]
    )
    row = ray[:, None]
    target = grad_values_ptr + (row * S + tl.where(is_fine, S_COARSE, 0) + index) * CHANNELS
    tl.store(target[:, :, None] + channel, grad_values, mask=valid[:, :, None] & (channel < CHANNELS))
    if grad_density_noise_ptr is not None:
        tl.store(grad_density_noise_ptr + row * S + p, grad_density, mask=valid)
    if grad_background_ptr is not None:
        T_last = tl.sum(tl.where(is_last, T, 0.0), 1)
        tl.store(grad_background_ptr + row * (CHANNELS - 1) + c, T_last[:, None] * grad_rgb, mask=is_colour)


def _warp_values(channels: int) -> int:
    """Colours and densities of a warp: fewer where a lane has many channels, which take more registers."""
    return 1024 if channels <= 16 else 512


def max_samples(channels: int) -> int:
    """The longest rays that the kernels keep in registers, of both sets together; `channels` of at most 32."""
    return min(MAX_WARPS * _warp_values(channels) // triton.next_power_of_2(channels), MAX_SAMPLES)


def _tile(samples: int, channels: int) -> dict[str, int]:
    """BLOCK_S, BLOCK_R and num_warps: short rays share a warp, so that scans stay inside one; no ray is cut."""
    block_s = max(triton.next_power_of_2(samples), 2)
    values = block_s * triton.next_power_of_2(channels)  # of a ray
    block_r = max(min(TILE // block_s, _warp_values(channels) // values), 1)
    return {"BLOCK_S": block_s, "BLOCK_R": block_r, "num_warps": max(values // _warp_values(channels), 1)}


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _settings(
    values: Tensor,
    values_fine: Tensor | None,
    activation: str,
    softplus_beta: float,
    density_shift: float,
    last_interval: float,
    last_back: bool,
    white_background: bool,
) -> dict[str, float | int | bool]:
    """What both kernels take by keyword."""
    coarse, channels = values.shape[-2:]
    fine = 0 if values_fine is None else values_fine.shape[-2]
    return {
        "softplus_beta": softplus_beta,
        "density_shift": density_shift,
        "last_interval": last_interval,
        "RELU": activation == "relu",
        "LAST_BACK": last_back,
        "WHITE_BACKGROUND": white_background,
        "CHANNELS": channels,
        "BLOCK_C": triton.next_power_of_2(channels),
        "S_COARSE": coarse,
        "S_FINE": fine,
        "FINE_BITS": fine.bit_length(),
        "enable_fp_fusion": True,
        **_tile(coarse + fine, channels),
    }


def fwd(
    t: Tensor,
    values: Tensor,
    t_fine: Tensor | None,
    values_fine: Tensor | None,
    density_noise: Tensor | None,
    background: Tensor | None,
    seed: Tensor | None = None,
    noise_std: Tensor | float | None = None,
    *,
    return_weights: bool,
    **settings: str | float | bool,
) -> Outputs:
    """One launch of the forward kernel.

    Args:
        t, t_fine: [B, R, S_coarse], [B, R, S_fine] fp32, each sorted.
        values, values_fine: [B, R, S_coarse, C+1], [B, R, S_fine, C+1], fp32, fp16 or bf16, both alike.
        density_noise, background: [B, R, S_coarse + S_fine], [B, R, C].
        seed, noise_std: [1] int64 and a number or a tensor of one, fp32; None for both draws no noise.
        settings: activation, softplus_beta, density_shift, last_interval, last_back, white_background.
    """
    if t_fine is not None and t_fine.shape[-1] == 0:
        t_fine = values_fine = None
    options = _settings(values, values_fine, **settings)
    shape = t.shape[:2]
    single = (torch.empty(shape, dtype=torch.float32, device=t.device) for _ in range(3))
    rgb = torch.empty(*shape, values.shape[-1] - 1, dtype=torch.float32, device=t.device)
    weights = None
    if return_weights:
        samples = options["S_COARSE"] + options["S_FINE"]
        weights = torch.empty(*shape, samples, dtype=torch.float32, device=t.device)
    outputs = Outputs(rgb, *single, weights)
    num_rays = shape.numel()
    if num_rays:
        inputs = [rows(x) for x in (t, values, t_fine, values_fine, density_noise, background)]
        with torch.cuda.device_of(t):
            _composite_fwd_kernel[(triton.cdiv(num_rays, options["BLOCK_R"]),)](
                *inputs, seed, noise_std, *outputs, num_rays, *map(_stride, inputs), **options
            )
    return outputs


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def bwd(
    grad_outputs: tuple[Tensor | None, ...],
    t: Tensor,
    values: Tensor,
    t_fine: Tensor | None,
    values_fine: Tensor | None,
    density_noise: Tensor | None,
    background: Tensor | None,
    seed: Tensor | None = None,
    noise_std: Tensor | float | None = None,
    *,
    to_density_noise: bool,
    to_background: bool,
    **settings: str | float | bool,
) -> Gradients:
    """One launch of the backward kernel. Noise is drawn again from what the seed holds.

    Args:
        grad_outputs: To rgb, depth, weight_sum, final_transmittance and weights; None where nothing depends on them.
        t, ...: See `fwd`.
    """
    coarse, fine = values.shape[-2], 0 if values_fine is None else values_fine.shape[-2]
    shape = t.shape[:2]
    grad_values = torch.empty(*shape, coarse + fine, values.shape[-1], dtype=values.dtype, device=t.device)
    gradients = Gradients(
        grad_values[..., :coarse, :],
        None if values_fine is None else grad_values[..., coarse:, :],
        _empty_like(density_noise) if to_density_noise else None,
        _empty_like(background) if to_background else None,
    )
    if fine == 0:
        t_fine = values_fine = None
    options = _settings(values, values_fine, **settings)
    num_rays = shape.numel()
    if num_rays:
        inputs = [rows(x) for x in (t, values, t_fine, values_fine, density_noise, background)]
        incoming = [None if grad is None else grad.contiguous() for grad in grad_outputs]
        with torch.cuda.device_of(t):
            _composite_bwd_kernel[(triton.cdiv(num_rays, options["BLOCK_R"]),)](
                *incoming,
                *inputs,
                seed,
                noise_std,
                grad_values,
                *gradients[2:],
                num_rays,
                *map(_stride, inputs),
                **options,
            )
    return gradients
