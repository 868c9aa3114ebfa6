"""Patches: their scales and offsets (paper, section 3.3); `camera.extract_patches` cuts them from images."""

from __future__ import annotations

import torch
from torch import Tensor

from ..camera import Patch, extract_patches, paste_patches
from ..config import Config, PatchConfig
from .schedule import patch_beta, patch_min_scale

IMPORTANCE_GRID = 8  # points along each side that a patch's mean importance is taken over


def patch_progress(config: PatchConfig, resolution: int, cur_nimg: int, batch: int) -> float:
    """The number that a distribution of scales depends on at this time: 1 / beta, or s_min of all but `beta`.

    Args:
        resolution: R.
        batch: Images per iteration.
    """
    if config.distribution == "beta":
        return 1 / patch_beta(config, cur_nimg)
    return patch_min_scale(config, cur_nimg, batch, config.resolution / resolution)


def sample_patches(
    config: PatchConfig,
    resolution: int,
    progress: float | Tensor,
    num: int,
    group: int,
    *,
    device: torch.device | str | None = None,
    scale_draw: Tensor | None = None,
    offset_draw: Tensor | None = None,
    importance: Tensor | None = None,
) -> Patch:
    """Draws scale and offset of patches; the samples of one group share a draw.

    With r the patch's and R the image's resolution:
      beta      s = draw (1 - r/R) + r/R, draw ~ Beta(1, beta) (Eq. 5)
      uniform, graf, gnerf   U[s_min, 1] (Eq. 4)
      discrete  evenly spaced from 0.25 to 1, those of at least s_min, equally likely
    and each offset is uniform in [0, 1 - s].

    Args:
        resolution: R.
        progress: Of `patch_progress`, a number or a tensor of one.
        num: Samples in this micro-batch, a multiple of min(group, num).
        group: The minibatch-std group: sample i takes draw i mod n, n = num / group ("strided"; those groups are
            strided, too), or i div group ("consecutive").
        scale_draw, offset_draw: Uniform [n], [n, 2] in place of fresh draws. Scales stay where their draws are.
        importance: Of `importance_map`; an offset is then chosen among `config.importance` such draws, in proportion
            to the map's mean over the patch.

    Returns:
        `num` patches, scales in [r/R, 1].
    """
    group = min(group, num)
    draws = num // group
    smallest = config.resolution / resolution
    u = torch.rand(draws, device=device) if scale_draw is None else scale_draw
    if config.distribution == "beta":
        # Inverse of the CDF 1 - (1 - x)^beta; u and 1 - u are alike.
        scale = (1 - u**progress) * (1 - smallest) + smallest
    elif config.distribution == "discrete":
        support = torch.linspace(1, 0.25, config.num_scales, device=u.device)
        allowed = (support >= progress - 1e-6).sum()  # descending, so the first ones
        scale = support[(u * allowed).long().minimum(allowed - 1)]
    else:
        scale = progress + u * (1 - progress)
    if importance is not None:
        offset_draw = _important(importance, scale, config.importance)
    v = torch.rand(draws, 2, device=device) if offset_draw is None else offset_draw
    offset = v * (1 - scale.to(v.device, non_blocking=True))[:, None]
    if config.groups == "strided":
        return Patch(scale.repeat(group), offset.repeat(group, 1))
    return Patch(scale.repeat_interleave(group), offset.repeat_interleave(group, dim=0))


def with_context(patches: Tensor, patch: Patch, config: Config) -> Tensor:
    """What D is shown of patches [B, 6, r, r], the whole image last, by `discriminator.global_context`.

    Returns:
        [B, 6, r, r] as it is ("concat"), or the image, upsampled, with the patch in its place, [B, 3, R, R] ("paste").
    """
    if config.discriminator.global_context == "concat":
        return patches
    return paste_patches(*patches.chunk(2, dim=1), patch, config.resolution)


def importance_map(images: Tensor) -> Tensor:
    """Where images vary: the norm of the gradient (differences of neighbours), averaged over images: [R, R].

    Args:
        images: [B, C, R, R].
    """
    right = torch.nn.functional.pad(images.diff(dim=3), (0, 1))
    down = torch.nn.functional.pad(images.diff(dim=2), (0, 0, 0, 1))
    return (right.square() + down.square()).sum(dim=1).sqrt().mean(dim=0)


def _important(importance: Tensor, scale: Tensor, candidates: int) -> Tensor:
    """Uniform draws [n, 2], one of `candidates` each, chosen in proportion to the map's mean over its patch."""
    draws = len(scale)
    v = torch.rand(draws, candidates, 2, device=importance.device)
    scales = scale.to(importance.device)[:, None].expand(-1, candidates)
    offsets = (v * (1 - scales)[..., None]).flatten(0, 1)
    maps = importance.expand(draws * candidates, 1, *importance.shape)
    means = extract_patches(maps, Patch(scales.flatten(), offsets), IMPORTANCE_GRID).mean(dim=(1, 2, 3))
    chances = means.view(draws, candidates).cumsum(dim=1)
    u = torch.rand(draws, 1, device=importance.device) * chances[:, -1:]
    chosen = (chances <= u).sum(dim=1).clamp(max=candidates - 1)
    return v[torch.arange(draws, device=v.device), chosen]
