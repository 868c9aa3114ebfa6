"""Depths along rays: evenly spaced coarse ones, and fine ones where the coarse pass saw something. No gradient.

A launch each: the coarse depths with their jitter; and integration, CDF and inversion of the fine ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rays import (
    COARSE_NOISE_STREAM,
    IMPORTANCE_STREAM,
    JITTER_STREAM,
    TILE,
    absorption,
    density,
    density_noise,
    rows,
    uniforms,
)

WEIGHT_FLOOR: tl.constexpr = tl.constexpr(1e-5)
BLOCK = 1024  # coarse depths of a program
REGISTER_KNOTS = 128  # of a CDF, and samples, that are kept in registers; more go through memory
MAX_SAMPLES = 4096  # of a ray, coarse or fine


@triton.jit
def _evenly(i, first, last, NUM: tl.constexpr):
    """Number i of NUM evenly spaced ones from first to last, both exact; first if there is but one."""
    STEPS: tl.constexpr = NUM - 1 if NUM > 1 else 1
    step = (last - first) / STEPS
    return tl.where(2 * i < NUM, first + i * step, last - (NUM - 1 - i) * step)


@triton.jit
def _sample_stratified_kernel(
    jitter_ptr,
    seed_ptr,
    t_ptr,
    num_rays,
    jitter_stride,
    ray_start,
    ray_end,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """t_i = low + (high - low) jitter_i, low and high being the midpoints between evenly spaced depths and their
    neighbours, or the depth itself at the ends; without jitter_ptr and seed_ptr the evenly spaced depths.

    One program owns BLOCK depths. jitter_stride is that of rows (one ray).
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ray, i = n // S, (n % S).to(tl.int32)
    exists = ray < num_rays
    t = _evenly(i, ray_start, ray_end, S)
    if jitter_ptr is not None or seed_ptr is not None:
        if jitter_ptr is not None:
            jitter = tl.load(jitter_ptr + ray * jitter_stride + i, mask=exists, other=0.0).to(tl.float32)
        else:
            jitter, _ = uniforms(tl.load(seed_ptr), ray, i, JITTER_STREAM)
        low = tl.where(i > 0, (_evenly(i - 1, ray_start, ray_end, S) + t) * 0.5, t)
        high = tl.where(i < S - 1, (t + _evenly(i + 1, ray_start, ray_end, S)) * 0.5, t)
        t = low + (high - low) * jitter
    tl.store(t_ptr + n, t, mask=exists)


@triton.jit
def _larger(a, b):
    return tl.where(b < a, a, b)


@triton.jit
def _look_up(x, x_ptr, index):
    """x[index] along dimension 1: of a tile in registers, or where x_ptr is given of what lies at it."""
    if x_ptr is None:
        found = tl.gather(x, index, 1)
    else:
        found = tl.load(x_ptr + index)
    return found


@triton.jit
def _invert_cdf(bins, pdf, u, scratch_ptr, row, KNOTS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Inverts the CDF of a piecewise constant density, for a tile of rays.

    Knot i is the first with CDF >= u, found by steps of falling powers of two; lower = max(i - 1, 0),
    upper = min(i, KNOTS - 1), d = CDF[upper] - CDF[lower], 1 where below 1e-5;
    sample = bins[lower] + (u - CDF[lower]) / d (bins[upper] - bins[lower]).

    Args:
        bins: [RAYS, BLOCK_S], of which the first KNOTS are in use.
        pdf: [RAYS, BLOCK_S], not normalized; element i >= 1 belongs to the slot between knots i - 1 and i, and 0 stands
            at 0 and from KNOTS on.
        u: [RAYS, BLOCK_K].
        scratch_ptr: Room for 2 KNOTS fp32 numbers of every row, through which long rows are looked up: a gather from
            registers takes as many shuffles as a lane has of them. None for short ones.
        row: [RAYS, 1], their numbers.
    """
    j = tl.arange(0, BLOCK_S)[None, :]
    # Sums in fp64: what they round is large beside slots of 1e-5, and such rays are short.
    pdf = pdf.to(tl.float64)
    cdf = (tl.cumsum(pdf, 1) * (1.0 / tl.sum(pdf, 1))[:, None]).to(tl.float32)
    cdf_ptr = None
    bins_ptr = None
    if scratch_ptr is not None:
        cdf_ptr = scratch_ptr + row * (2 * KNOTS)
        bins_ptr = cdf_ptr + KNOTS
        tl.store(cdf_ptr + j, cdf, mask=j < KNOTS)
        tl.store(bins_ptr + j, bins, mask=j < KNOTS)
        tl.debug_barrier()  # other threads read it
    knot = tl.zeros_like(u).to(tl.int32)
    STEPS: tl.constexpr = KNOTS.bit_length()
    for bit in tl.static_range(STEPS):
        probe = knot + (1 << (STEPS - 1 - bit)) - 1
        below = _look_up(cdf, cdf_ptr, tl.where(probe < KNOTS, probe, KNOTS - 1)) < u
        knot = tl.where((probe < KNOTS) & below, probe + 1, knot)
    lower = tl.where(knot > 0, knot - 1, 0)
    upper = tl.where(knot < KNOTS, knot, KNOTS - 1)
    cdf_lower = _look_up(cdf, cdf_ptr, lower)
    bins_lower = _look_up(bins, bins_ptr, lower)
    d = _look_up(cdf, cdf_ptr, upper) - cdf_lower
    d = tl.where(d < WEIGHT_FLOOR, 1.0, d)
    return bins_lower + (u - cdf_lower) / d * (_look_up(bins, bins_ptr, upper) - bins_lower)


@triton.jit
def _draw_uniforms(seed, ray, k, SORTED: tl.constexpr, K: tl.constexpr):
    """K uniform numbers for every ray of [RAYS, 1], in the first K of [RAYS, BLOCK_K].

    Sorted ones, the order statistics of K uniforms, are the partial sums of K + 1 exponential variates over the sum of
    them all.
    """
    u, _ = uniforms(seed, ray, k, IMPORTANCE_STREAM)
    if SORTED:
        steps = tl.where(k < K, -tl.log(1.0 - u), 0.0)
        last, _ = uniforms(seed, ray, tl.full([1, 1], K, tl.int32), IMPORTANCE_STREAM)
        u = tl.cumsum(steps, 1) / (tl.sum(steps, 1)[:, None] - tl.log(1.0 - last))
    return u


@triton.jit
def _sample_importance_kernel(
    t_ptr,
    raw_density_ptr,
    u_ptr,
    seed_ptr,
    noise_std,
    scratch_ptr,
    t_fine_ptr,
    num_rays,
    t_stride,
    raw_density_stride,
    raw_density_sample_stride,
    u_stride,
    softplus_beta,
    density_shift,
    RELU: tl.constexpr,
    SORTED: tl.constexpr,
    EVEN: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """w_i = alpha_i T_i of the coarse samples, then the inversion of (w + 2e-5)[1:-1] over the midpoints of t.

    The last weight is dropped, and with it the last interval. One program owns BLOCK_R rays. Uniforms are read from
    u_ptr, or where that is None evenly spaced from 0 to 1 if EVEN, else drawn from the seed that seed_ptr points to, in
    rising order if SORTED; SORTED also has the result rise where rounding would swap neighbours. Where noise_std is not
    None, noise from the seed is added to raw densities. Strides are those of rows (one ray).
    """
    ray = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = ray[:, None]
    ray_exists = row < num_rays
    j = tl.arange(0, BLOCK_S)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]

    has_next = ray_exists & (j < S - 1)
    # The last one too, which has no use: whole vectors are read then.
    t = tl.load(t_ptr + row * t_stride + j, mask=ray_exists & (j < S), other=0.0)
    t = tl.where(has_next, t, 0.0)
    t_next = tl.load(t_ptr + row * t_stride + j + 1, mask=has_next, other=0.0)
    densities = raw_density_ptr + row * raw_density_stride + j * raw_density_sample_stride
    raw_density = tl.load(densities, mask=has_next, other=0.0).to(tl.float32)
    if noise_std is not None:
        raw_density += density_noise(seed_ptr, noise_std, row, j, COARSE_NOISE_STREAM)
    thickness = (t_next - t) * density(raw_density + density_shift, softplus_beta, RELU)
    alpha, T, _ = absorption(thickness, has_next)
    # One floor is added to the coarse weights, another by the inversion.
    pdf = tl.where((j > 0) & (j < S - 1), alpha * T + WEIGHT_FLOOR + WEIGHT_FLOOR, 0.0)

    drawn = ray_exists & (k < K)
    if u_ptr is not None:
        u = tl.load(u_ptr + row * u_stride + k, mask=drawn, other=0.0).to(tl.float32)
    elif EVEN:
        u = _evenly(k, 0.0, 1.0, K) + tl.zeros([BLOCK_R, 1], tl.float32)
    else:
        u = _draw_uniforms(tl.load(seed_ptr), row, k, SORTED, K)
    t_fine = _invert_cdf((t + t_next) * 0.5, pdf, u, scratch_ptr, row, S - 1, BLOCK_S)
    if SORTED:
        t_fine = tl.associative_scan(t_fine, 1, _larger)
    tl.store(t_fine_ptr + row * K + k, t_fine, mask=drawn)


def _tile(knots: int, samples: int) -> dict[str, int | bool]:
    """Blocks that hold all knots and all samples of a ray; short rays share a warp, none is cut."""
    block_s, block_k = (max(triton.next_power_of_2(n), 2) for n in (knots, samples))
    longer = max(block_s, block_k)
    return {
        "BLOCK_S": block_s,
        "BLOCK_K": block_k,
        "BLOCK_R": max(TILE // longer, 1),
        "num_warps": min(max(longer // 256, 1), 8),
        "enable_fp_fusion": True,
    }


def _scratch(rows: int, knots: int, samples: int, device: torch.device) -> Tensor | None:
    """What `_invert_cdf` looks long rows up in."""
    if max(knots, samples) <= REGISTER_KNOTS:
        return None
    return torch.empty(rows, 2, knots, dtype=torch.float32, device=device)


def stratified(
    batch: int,
    rays: int,
    samples: int,
    ray_start: float,
    ray_end: float,
    jitter: Tensor | None,
    seed: Tensor | None,
    device: torch.device,
) -> Tensor:
    """One launch: [B, R, S] fp32 t.

    Args:
        jitter: [B, R, S], or None to draw it from `seed`, [1] int64; None for both has t evenly spaced.
    """
    t = torch.empty(batch, rays, samples, dtype=torch.float32, device=device)
    if t.numel():
        jitter = rows(jitter)
        with torch.cuda.device_of(t):
            _sample_stratified_kernel[(triton.cdiv(t.numel(), BLOCK),)](
                jitter,
                seed,
                t,
                batch * rays,
                0 if jitter is None else jitter.stride(0),
                ray_start,
                ray_end,
                S=samples,
                BLOCK=BLOCK,
                enable_fp_fusion=True,
            )
    return t


def fwd(
    t: Tensor,
    raw_density: Tensor,
    u: Tensor | None,
    seed: Tensor | None,
    samples: int,
    *,
    sorted: bool,
    activation: str,
    softplus_beta: float,
    density_shift: float,
    even: bool = False,
    noise_std: Tensor | float | None = None,
) -> Tensor:
    """One launch: [B, R, K] fp32 fine t.

    Args:
        t: [B, R, S] fp32, sorted, S of at least 3.
        raw_density: [B, R, S], fp32, fp16 or bf16, any stride between samples.
        u: [B, R, K], K = `samples`, sorted if `sorted` is; or None: evenly spaced if `even`, else drawn from `seed`.
        seed: [1] int64, on the device of t; a captured CUDA graph reads what it holds at replay.
        noise_std: Of noise that is drawn from `seed` too and added to raw_density: a number, a tensor of one, fp32, or
            None for none.
    """
    shape = t.shape[:2]
    t_fine = torch.empty(*shape, samples, dtype=torch.float32, device=t.device)
    if t_fine.numel() == 0:
        return t_fine
    options = _tile(t.shape[-1] - 1, samples)
    t, u, raw_density = rows(t), rows(u), raw_density.flatten(0, 1)
    with torch.cuda.device_of(t):
        _sample_importance_kernel[(triton.cdiv(len(t), options["BLOCK_R"]),)](
            t,
            raw_density,
            u,
            seed,
            noise_std,
            _scratch(len(t), t.shape[1] - 1, samples, t.device),
            t_fine,
            len(t),
            t.stride(0),
            *raw_density.stride(),
            0 if u is None else u.stride(0),
            softplus_beta,
            density_shift,
            RELU=activation == "relu",
            SORTED=sorted,
            EVEN=even,
            S=t.shape[1],
            K=samples,
            **options,
        )
    return t_fine
