"""Patch draws and patches of real images, against method.md 2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from checks import SIGMAS, assert_close, draw, draw_uniform
from epigraf_fast.camera import Patch, extract_patches
from epigraf_fast.config import PatchConfig
from epigraf_fast.models.discriminator import minibatch_std
from epigraf_fast.training.patches import importance_map, patch_progress, sample_patches

R, SMALL = 64, 8  # r / R = 0.125
DISTRIBUTIONS = ("beta", "uniform", "discrete", "graf", "gnerf")


def sample(config: PatchConfig, cur_nimg: int, num: int = 4, group: int = 1, **draws: Tensor) -> tuple[Tensor, Tensor]:
    return sample_patches(config, R, patch_progress(config, R, cur_nimg, 64), num, group, **draws)


def settings(distribution: str, **others: float | str) -> PatchConfig:
    return PatchConfig(resolution=SMALL, distribution=distribution, **others)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("cur_nimg", [0, 64, 5_000_000, 10_000_000, 50_000_000])
def test_ranges(distribution: str, cur_nimg: int) -> None:
    torch.manual_seed(0)
    scale, offset = sample(settings(distribution, num_scales=4), cur_nimg, 4000)
    assert scale.shape == (4000,)
    assert offset.shape == (4000, 2)
    assert scale.min() >= SMALL / R
    assert scale.max() <= 1
    assert (offset >= 0).all()
    assert (offset <= (1 - scale)[:, None]).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_ends_of_the_draw(distribution: str, u: float) -> None:
    """torch.rand gives 0 and never 1."""
    ends = {"scale_draw": torch.full((2,), u), "offset_draw": torch.full((2, 2), u)}
    for cur_nimg in (0, 5_000_000, 10_000_000):
        scale, offset = sample(settings(distribution, num_scales=4), cur_nimg, 2, **ends)
        assert (scale >= SMALL / R).all()
        assert (scale <= 1).all()
        assert (offset <= (1 - scale)[:, None]).all()


def test_training_begins_with_whole_images() -> None:
    torch.manual_seed(0)
    assert (sample(settings("uniform"), 0, 100)[0] == 1).all()
    assert (sample(settings("discrete"), 0, 100)[0] == 1).all()
    num = 4000
    scale, _ = sample(settings("beta"), 0, num)
    p = (0.01 / 0.875) ** 0.001  # P(scale > 0.99) = P(draw > 1 - 0.01 / 0.875), and P(draw > x) = (1 - x)^0.001
    assert abs((scale > 0.99).double().mean() - p) < SIGMAS * (p * (1 - p) / num) ** 0.5


def test_beta_inverts_its_distribution_function() -> None:
    """P(draw <= x) = 1 - (1 - x)^beta; the draw for u lies where that is 1 - u."""
    u = draw_uniform(1000)
    for cur_nimg, beta in ((5_000_000, 0.4005), (10_000_000, 0.8), (30_000_000, 0.8)):
        scale, _ = sample(settings("beta"), cur_nimg, 1000, scale_draw=u, offset_draw=draw_uniform(1000, 2))
        x = (scale - SMALL / R) / (1 - SMALL / R)
        assert_close((1 - x) ** beta, u, f"beta {beta}", "hand")


def test_beta_moments() -> None:
    """Beta(1, b): mean 1 / (1 + b), variance b / ((1 + b)^2 (2 + b))."""
    torch.manual_seed(0)
    num, b = 20_000, 0.4005
    scale, _ = sample(settings("beta"), 5_000_000, num)
    x = (scale.double() - SMALL / R) / (1 - SMALL / R)
    variance = b / ((1 + b) ** 2 * (2 + b))
    assert abs(x.mean() - 1 / (1 + b)) < SIGMAS * math.sqrt(variance / num)
    fourth = (x - x.mean()).pow(4).mean()
    assert abs(x.var() - variance) < SIGMAS * ((fourth - variance**2) / num).sqrt()


def test_offsets_are_uniform() -> None:
    torch.manual_seed(0)
    num = 20_000
    scale, offset = sample(settings("beta"), 10_000_000, num)
    v = (offset / (1 - scale)[:, None])[scale < 0.9].double()
    assert (abs(v.mean(0) - 0.5) < SIGMAS * (1 / 12 / len(v)) ** 0.5).all()
    assert abs(((v[:, 0] - 0.5) * (v[:, 1] - 0.5)).mean()) < SIGMAS / 12 / len(v) ** 0.5  # x and y independent


def test_uniform_by_hand() -> None:
    """At 5,000 kimg s_min = 1 - 0.5 * 0.875 = 0.5625."""
    scale, offset = sample(
        settings("uniform"),
        5_000_000,
        2,
        scale_draw=torch.tensor([0.0, 0.5]),
        offset_draw=torch.tensor([[0.5, 1.0], [0.0, 0.2]]),
    )
    assert_close(scale, torch.tensor([0.5625, 0.78125]), "scale")
    assert_close(offset, torch.tensor([[0.21875, 0.4375], [0.0, 0.04375]]), "offset")


@pytest.mark.parametrize(
    ("num_scales", "cur_nimg", "expected"),
    [
        (1, 0, {1.0}),
        (1, 10_000_000, {1.0}),
        (2, 0, {1.0}),
        (2, 8_500_000, {1.0}),  # s_min = 1 - 0.85 * 0.875 = 0.25625
        (2, 8_600_000, {1.0, 0.25}),  # 0.2475
        (4, 2_800_000, {1.0}),  # 0.755
        (4, 2_900_000, {1.0, 0.75}),  # 0.74625
        (4, 5_700_000, {1.0, 0.75}),  # 0.50125
        (4, 5_800_000, {1.0, 0.75, 0.5}),  # 0.4925
        (4, 10_000_000, {1.0, 0.75, 0.5, 0.25}),
    ],
)
def test_discrete_scales(num_scales: int, cur_nimg: int, expected: set[float]) -> None:
    """Evenly spaced from 0.25 to 1, those of at least s_min, equally likely: 840 even u fall evenly on them."""
    u = (torch.arange(840) + 0.5) / 840
    scale, _ = sample(settings("discrete", num_scales=num_scales), cur_nimg, 840, scale_draw=u)
    values, counts = scale.unique(return_counts=True)
    assert set(values.tolist()) == expected
    assert (counts == 840 // len(expected)).all()


def test_discrete_keeps_the_whole_image_when_patches_are_large() -> None:
    """r / R = 0.5: 0.25 would ask for more pixels than there are."""
    config = PatchConfig(resolution=R // 2, distribution="discrete")
    scale, _ = sample(config, 20_000_000, 100)
    assert (scale == 1).all()


@pytest.mark.parametrize(
    ("groups", "order"), [("strided", [0, 1, 0, 1, 0, 1, 0, 1]), ("consecutive", [0] * 4 + [1] * 4)]
)
def test_who_shares_a_draw(groups: str, order: list[int]) -> None:
    u, v = torch.tensor([0.0, 0.5]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    scale, offset = sample(settings("uniform", groups=groups), 10_000_000, 8, 4, scale_draw=u, offset_draw=v)
    expected = torch.tensor([0.125, 0.5625])
    assert_close(scale, expected[order], "scale")
    assert_close(offset, (v * (1 - expected)[:, None])[order], "offset")


def test_group_is_at_most_the_batch() -> None:
    scale, offset = sample(settings("uniform"), 10_000_000, 2, 4)
    assert scale[0] == scale[1]
    assert torch.equal(offset[0], offset[1])


def test_strided_draws_agree_with_the_minibatch_std_groups() -> None:
    torch.manual_seed(0)
    for groups, agree in (("strided", True), ("consecutive", False)):
        scale, _ = sample(settings("uniform", groups=groups), 10_000_000, 8, 4)
        images = scale[:, None, None, None].expand(-1, 3, 2, 2)
        deviation = minibatch_std(images, 4)[:, -1]
        assert bool((deviation < 2e-4).all()) == agree, groups  # sqrt(1e-8) where all are alike


def test_draws_come_from_the_global_generator_alone() -> None:
    config = settings("beta")
    torch.manual_seed(3)
    first = sample(config, 10_000_000)
    torch.manual_seed(3)
    for a, b in zip(first, sample(config, 10_000_000), strict=True):
        assert torch.equal(a, b)


# Real patches


def test_patches_are_crops_where_pixels_coincide() -> None:
    """s = (r - 1) / (R - 1), offset_x = column / (R - 1), offset_y = (R - r - row) / (R - 1)."""
    images, side, small = draw(1, 3, 16, 16, dtype=torch.float32), 16, 5
    for row, column in ((0, 0), (0, 11), (11, 0), (11, 11), (3, 7)):
        scale = torch.tensor([(small - 1) / (side - 1)])
        offset = torch.tensor([[column / (side - 1), (side - small - row) / (side - 1)]])
        crop = images[:, :, row : row + small, column : column + small]
        assert_close(extract_patches(images, Patch(scale, offset), small), crop, f"row {row}, column {column}")


def test_whole_image_at_its_resolution_is_the_image() -> None:
    images = draw(2, 3, 8, 8, dtype=torch.float32)
    assert_close(extract_patches(images, Patch.whole(images), 8), images, "whole images")


def test_patches_are_bilinear() -> None:
    """4 columns of values 0..3: s = 0.5 from 0.25 on covers 0.75 to 2.25; rows of 0, 10, 20, 30 from the top, offset_y
    0.5: the upper half, from 0 to 15."""
    image = torch.arange(4.0)[None, :] + 10 * torch.arange(4.0)[:, None]
    patch = extract_patches(image.expand(1, 3, 4, 4), Patch(torch.tensor([0.5]), torch.tensor([[0.25, 0.5]])), 3)
    expected = torch.tensor([0.75, 1.5, 2.25])[None, :] + torch.tensor([0.0, 7.5, 15.0])[:, None]
    assert_close(patch, expected.expand(1, 3, 3, 3), "patch")


def test_every_sample_has_its_own_patch() -> None:
    images = draw(2, 3, 8, 8, dtype=torch.float32)
    patch = Patch(torch.tensor([0.5, 0.7]), torch.tensor([[0.1, 0.5], [0.3, 0.0]]))
    together = extract_patches(images, patch, 4)
    for i in range(2):
        one = slice(i, i + 1)
        assert torch.equal(extract_patches(images[one], Patch(*(x[one] for x in patch)), 4), together[one])


# Importance


def test_importance_map_by_hand() -> None:
    """Differences to the right and down, root of their squares over channels; 0 beyond the border; averaged."""
    image = torch.tensor([[0.0, 3.0], [4.0, 3.0]])
    images = torch.stack([image.expand(2, 2, 2), torch.zeros(2, 2, 2)])
    root2 = math.sqrt(2)
    expected = torch.tensor([[5 * root2, 0.0], [root2, 0.0]]) / 2
    assert_close(importance_map(images), expected, "map", "hand")


def test_important_places_are_seen_more_often() -> None:
    """A map that is 1 in the right half and 0 elsewhere: no patch that misses it is drawn, however small."""
    importance = torch.zeros(R, R)
    importance[:, R // 2 :] = 1
    config = settings("discrete", num_scales=1, importance=16)
    torch.manual_seed(0)
    scale, offset = sample(settings("uniform", importance=16), 10_000_000, 4000, importance=importance)
    small = scale < 0.4
    assert small.sum() > 500
    # With 16 candidates the chance that all miss the right half is below 2^-15 a draw.
    assert (offset[small, 0] + scale[small] > 0.5).double().mean() > 0.99
    assert abs(offset[small, 1].div(1 - scale[small]).mean().item() - 0.5) < 0.05
    assert (offset >= 0).all()
    assert (offset <= (1 - scale)[:, None]).all()
    scale, offset = sample(config, 10_000_000, 8, importance=importance)
    assert torch.equal(offset, torch.zeros(8, 2))  # of whole images there is one


def test_places_are_seen_in_proportion_to_their_importance() -> None:
    """Of two candidates, a quarter of the pairs are both left, a quarter both right, and of the rest, where the map is
    three times as important to the right, 3/4 go there: 1/4 + 1/2 * 3/4. (The better one of two would be 3/4.)"""
    importance = torch.ones(R, R)
    importance[:, R // 2 :] = 3
    torch.manual_seed(0)
    scale, offset = sample(settings("uniform", importance=2), 10_000_000, 40_000, importance=importance)
    left = offset[:, 0] + scale <= 0.5
    right = offset[:, 0] >= 0.5
    whole = (scale < 0.25) & (left | right)
    count, share = int(whole.sum()), right[whole].double().mean().item()
    assert count > 1000
    assert abs(share - 0.625) < SIGMAS * math.sqrt(0.625 * 0.375 / count) + 0.02  # the middle is left out


def test_even_importance_changes_nothing() -> None:
    torch.manual_seed(0)
    scale, offset = sample(settings("uniform", importance=8), 10_000_000, 8000, importance=torch.ones(R, R))
    place = offset / (1 - scale)[:, None]
    deviation = math.sqrt(1 / 12 / 8000)
    assert ((place.mean(dim=0) - 0.5).abs() < SIGMAS * deviation).all()
    assert abs(place.std().item() - math.sqrt(1 / 12)) < 0.01
