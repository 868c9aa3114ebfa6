"""The samples of one or two sets along rays in order of t, read from where they lie.

Two sets that are each sorted are merged by rank: the program finds by bisection how many samples of the second set are
among the first p. Nothing is sorted, gathered or written in sorted order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rays import NOISE_STREAM, density_noise

MISSING: tl.constexpr = tl.constexpr(float("nan"))  # t where there is no sample; NaN comes last in any case


@triton.jit
def _merged_samples(
    t_ptr,
    values_ptr,
    t_fine_ptr,
    values_fine_ptr,
    p,
    valid,
    CHANNELS: tl.constexpr,
    S_COARSE: tl.constexpr,
    S_FINE: tl.constexpr,
    FINE_BITS: tl.constexpr,
):
    """Sample p of the merged sets, fine before coarse where t is equal.

    Args:
        t_ptr, ...: The starts of the rays' rows, [RAYS, 1]; the last two None without a second set.
        p: [1, BLOCK_S]; valid: [RAYS, BLOCK_S], whether there are the ray and the sample.
        FINE_BITS: Such that S_FINE < 2^FINE_BITS.

    Returns:
        t, t of the next sample (anything for the last), whether the sample is a fine one, its index in its set, and the
        pointer to its values. NaN comes last. Indices are inside their sets even where t is not sorted.
    """
    if S_FINE == 0:
        t = tl.load(t_ptr + p, mask=valid, other=0.0)
        t_next = tl.load(t_ptr + p + 1, mask=valid & (p + 1 < S_COARSE), other=0.0)
        index = tl.where(valid, p, 0)
        is_fine = index < 0
        source = values_ptr + index * CHANNELS
    else:
        # Fine sample j is among the first p if it is not behind coarse sample p - 1 - j; nothing is behind a NaN. True
        # up to some j, then false.
        fine = tl.where(valid, 0, 0)
        for bit in tl.static_range(FINE_BITS):
            j = fine + (1 << (FINE_BITS - 1 - bit)) - 1
            i = p - 1 - j
            exists = valid & (j < S_FINE) & (i >= 0)
            t_j = tl.load(t_fine_ptr + j, mask=exists, other=0.0)
            t_i = tl.load(t_ptr + i, mask=exists & (i < S_COARSE), other=MISSING)
            fine = tl.where(exists & ((t_j <= t_i) | (t_i != t_i)), j + 1, fine)
        coarse = p - fine
        t_fine = tl.load(t_fine_ptr + fine, mask=valid & (fine < S_FINE), other=MISSING)
        t_fine_next = tl.load(t_fine_ptr + fine + 1, mask=valid & (fine + 1 < S_FINE), other=MISSING)
        t_coarse = tl.load(t_ptr + coarse, mask=valid & (coarse < S_COARSE), other=MISSING)
        t_coarse_next = tl.load(t_ptr + coarse + 1, mask=valid & (coarse + 1 < S_COARSE), other=MISSING)
        is_fine = (fine < S_FINE) & ((t_fine <= t_coarse) | (t_coarse != t_coarse))
        t = tl.where(valid, tl.where(is_fine, t_fine, t_coarse), 0.0)
        rival = tl.where(is_fine, t_coarse, t_fine)
        follower = tl.where(is_fine, t_fine_next, t_coarse_next)
        index = tl.where(valid, tl.where(is_fine, fine, coarse), 0)
        rival_is_next = (rival < follower) | (follower != follower)
        t_next = tl.where(valid, tl.where(rival_is_next, rival, follower), 0.0)
        source = tl.where(is_fine, values_fine_ptr + index * CHANNELS, values_ptr + index * CHANNELS)
    return t, t_next, is_fine, index, source


@triton.jit
def sorted_samples(
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
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    S_COARSE: tl.constexpr,
    S_FINE: tl.constexpr,
    FINE_BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The samples of a tile of rays in order of t.

    Returns:
        All [RAYS, BLOCK_S]: whether ray and sample exist; t; interval; x, the argument of the activation; whether the
        sample is a fine one; its index in its set. And its values, [RAYS, BLOCK_S, BLOCK_C].
    """
    S: tl.constexpr = S_COARSE + S_FINE
    p = tl.arange(0, BLOCK_S)[None, :]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    valid = (ray < num_rays)[:, None] & (p < S)
    row = ray[:, None]
    if S_FINE > 0:
        t_fine_ptr += row * t_fine_stride
        values_fine_ptr += row * values_fine_stride
    t, t_next, is_fine, index, source = _merged_samples(
        t_ptr + row * t_stride,
        values_ptr + row * values_stride,
        t_fine_ptr,
        values_fine_ptr,
        p,
        valid,
        CHANNELS,
        S_COARSE,
        S_FINE,
        FINE_BITS,
    )
    interval = tl.where(p == S - 1, last_interval, t_next - t)
    values = tl.load(source[:, :, None] + c, mask=valid[:, :, None] & (c < CHANNELS), other=0.0).to(tl.float32)
    x = tl.sum(tl.where(c == CHANNELS - 1, values, 0.0), 2) + density_shift
    if density_noise_ptr is not None:
        x += tl.load(density_noise_ptr + row * density_noise_stride + p, mask=valid, other=0.0).to(tl.float32)
    if noise_std is not None:
        x += density_noise(seed_ptr, noise_std, row, p, NOISE_STREAM)
    return valid, t, interval, x, is_fine, index, values
