"""Everything that changes during training, as functions of `cur_nimg`, the images seen at an iteration's start."""

from __future__ import annotations

import math

from ..config import GeneratorConfig, OptimConfig, PatchConfig, RendererConfig

# Decay per iteration and first scale of the two published schedules that count iterations.
GRAF_DECAY, GRAF_START = 0.0075, 0.9
GNERF_DECAY, GNERF_START = 0.0002, 0.8


def linear(start: float, end: float, progress: float) -> float:
    """From start to end while progress goes from 0 to 1, then end."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def patch_beta(config: PatchConfig, cur_nimg: int) -> float:
    """beta of Beta(1, beta) (paper, Eq. 5)."""
    return linear(config.beta_start, config.beta_end, cur_nimg / (config.anneal_kimg * 1000))


def patch_min_scale(config: PatchConfig, cur_nimg: int, batch: int, smallest: float) -> float:
    """s_min of the annealed uniform distributions (paper, Eq. 4 and appendix B.3).

    Args:
        batch: Images per iteration; GRAF's and GNeRF's schedules count iterations.
        smallest: r / R.
    """
    iteration = cur_nimg / batch
    if config.distribution == "graf":
        return min(GRAF_START, max(smallest, math.exp(-GRAF_DECAY * (iteration // 1000))))
    if config.distribution == "gnerf":
        return min(GNERF_START, max(smallest, math.exp(-GNERF_DECAY * iteration)))
    return linear(1.0, smallest, cur_nimg / (config.anneal_kimg * 1000))


def density_noise_std(config: RendererConfig, cur_nimg: int) -> float:
    """Standard deviation of the noise on raw densities."""
    return linear(config.density_noise, 0.0, cur_nimg / (config.density_noise_kimg * 1000))


def blur_sigma(config: OptimConfig, cur_nimg: int) -> float:
    """Width of the blur of the discriminator's input, pixels."""
    return linear(config.blur_sigma, 0.0, cur_nimg / (config.blur_kimg * 1000))


def lr_factor(config: OptimConfig, cur_nimg: int, kimg: float) -> float:
    """What the learning rates are multiplied by.

    A generator and a discriminator circle around each other in steps of their learning rates; what is averaged over
    the circle is dull. The smaller the rates, the smaller the circle.

    Args:
        kimg: Thousands of images in the whole run.

    Returns:
        1; after `lr_decay_kimg` sqrt(lr_decay_kimg / kimg so far), as in EDM2 (Karras et al. 2024); in the last
        `lr_rampdown` of the run times what falls linearly from 1 to 0.
    """
    factor = 1.0
    if config.lr_decay_kimg is not None:
        factor = 1 / math.sqrt(max(cur_nimg / (config.lr_decay_kimg * 1000), 1))
    if config.lr_rampdown:
        factor *= linear(1.0, 0.0, 1 - (1 - cur_nimg / (kimg * 1000)) / config.lr_rampdown)
    return factor


def pose_swap_probability(config: GeneratorConfig, cur_nimg: int) -> float:
    """Probability that the mapping sees another sample's camera."""
    return linear(1.0, config.pose_swap_probability, cur_nimg / (config.pose_swap_kimg * 1000))


def ema_decay(config: OptimConfig, cur_nimg: int, batch: int) -> float:
    """Share of the average generator that is kept: 0.5^(batch / half life in images); 0 in the first iteration."""
    half_life = (0.3125 * batch if config.ema_kimg is None else config.ema_kimg) * 1000
    return 0.5 ** (batch / max(min(half_life, config.ema_rampup * cur_nimg), 1e-8))
