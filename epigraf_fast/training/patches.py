"""Patches: their scales and offsets (paper, section 3.3); `camera.extract_patches` cuts them from images."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import PatchConfig
from .schedule import patch_beta, patch_min_scale


def sample_patches(
    config: PatchConfig,
    resolution: int,
    cur_nimg: int,
    batch: int,
    num: int,
    group: int,
    *,
    device: torch.device | str | None = None,
    scale_draw: Tensor | None = None,
    offset_draw: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws scale and offset of patches; the samples of one group share a draw.

    With r the patch's and R the image's resolution:
      beta      s = draw (1 - r/R) + r/R, draw ~ Beta(1, beta(cur_nimg)) (Eq. 5)
      uniform, graf, gnerf   U[s_min(cur_nimg), 1] (Eq. 4)
      discrete  evenly spaced from 0.25 to 1, those of at least s_min(cur_nimg), equally likely
    and each offset is uniform in [0, 1 - s].

    Args:
        resolution: R.
        batch: Images per iteration.
        num: Samples in this micro-batch, a multiple of min(group, num).
        group: The minibatch-std group: sample i takes draw i mod n, n = num / group ("strided"; those groups are
            strided, too), or i div group ("consecutive").
        scale_draw, offset_draw: Uniform [n], [n, 2] in place of fresh draws.

    Returns:
        patch_scale [num] in [r/R, 1], patch_offset [num, 2].
    """
    group = min(group, num)
    draws = num // group
    smallest = config.resolution / resolution
    u = torch.rand(draws, device=device) if scale_draw is None else scale_draw
    if config.distribution == "beta":
        # Inverse of the CDF 1 - (1 - x)^beta; u and 1 - u are alike.
        scale = (1 - u ** (1 / patch_beta(config, cur_nimg))) * (1 - smallest) + smallest
    else:
        s_min = patch_min_scale(config, cur_nimg, batch, smallest)
        if config.distribution == "discrete":
            support = torch.linspace(1, 0.25, config.num_scales)  # on the CPU: counting must not wait for a GPU
            allowed = int((support >= s_min - 1e-6).sum())  # descending, so the first ones
            scale = support.to(u.device)[(u * allowed).long().clamp(max=allowed - 1)]
        else:
            scale = s_min + u * (1 - s_min)
    v = torch.rand(draws, 2, device=device) if offset_draw is None else offset_draw
    offset = v * (1 - scale)[:, None]
    if config.groups == "strided":
        return scale.repeat(group), offset.repeat(group, 1)
    return scale.repeat_interleave(group), offset.repeat_interleave(group, dim=0)
