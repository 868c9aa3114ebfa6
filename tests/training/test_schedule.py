"""Every schedule at values worked by hand from method.md 2, 4, 8, 10, 11."""

from __future__ import annotations

import math

import pytest

from checks import assert_close
from epigraf_fast.config import GeneratorConfig, OptimConfig, PatchConfig, RendererConfig
from epigraf_fast.training import schedule

SMALLEST = 0.125  # r / R of the paper: 64 / 512
BATCH = 64


@pytest.mark.parametrize(
    ("progress", "expected"), [(-1, 3.0), (0, 3.0), (0.25, 2.5), (1, 1.0), (2, 1.0), (math.inf, 1.0)]
)
def test_linear(progress: float, expected: float) -> None:
    assert_close(schedule.linear(3.0, 1.0, progress), expected, "linear", "hand")


@pytest.mark.parametrize(
    ("cur_nimg", "expected"),
    [(0, 0.001), (64, 0.00100511360), (2_500_000, 0.20075), (10_000_000, 0.8), (15_000_000, 0.8)],
)
def test_patch_beta(cur_nimg: int, expected: float) -> None:
    assert_close(schedule.patch_beta(PatchConfig(), cur_nimg), expected, "beta", "hand")


@pytest.mark.parametrize("distribution", ["uniform", "discrete"])
@pytest.mark.parametrize(
    ("cur_nimg", "expected"),
    [(0, 1.0), (1_000_000, 0.9125), (5_000_000, 0.5625), (10_000_000, 0.125), (2 * 10**7, 0.125)],
)
def test_annealed_smallest_scale(distribution: str, cur_nimg: int, expected: float) -> None:
    config = PatchConfig(distribution=distribution)
    assert_close(schedule.patch_min_scale(config, cur_nimg, BATCH, SMALLEST), expected, distribution, "hand")


@pytest.mark.parametrize(
    ("distribution", "iteration", "smallest", "expected"),
    [
        ("graf", 0, SMALLEST, 0.9),
        ("graf", 14_000, SMALLEST, 0.9),  # exp(-0.105) = 0.90032 is above
        ("graf", 15_000, SMALLEST, 0.8935973),  # exp(-0.1125)
        ("graf", 15_999, SMALLEST, 0.8935973),  # a step every 1000 iterations
        ("graf", 16_000, SMALLEST, 0.8869204),  # exp(-0.12)
        ("graf", 200_000, SMALLEST, 0.2231302),  # exp(-1.5)
        ("graf", 200_000, 0.25, 0.25),
        ("graf", 400_000, SMALLEST, 0.125),
        ("gnerf", 0, SMALLEST, 0.8),
        ("gnerf", 1000, SMALLEST, 0.8),  # exp(-0.2) = 0.81873 is above
        ("gnerf", 2000, SMALLEST, 0.6703200),  # exp(-0.4)
        ("gnerf", 2500, SMALLEST, 0.6065307),  # exp(-0.5)
        ("gnerf", 20_000, SMALLEST, 0.125),
    ],
)
@pytest.mark.parametrize("batch", [1, 48, 64])
def test_schedules_that_count_iterations(
    distribution: str, iteration: int, smallest: float, expected: float, batch: int
) -> None:
    config = PatchConfig(distribution=distribution)
    actual = schedule.patch_min_scale(config, iteration * batch, batch, smallest)
    assert_close(actual, expected, f"{distribution} at iteration {iteration}", "hand")


@pytest.mark.parametrize(
    ("cur_nimg", "expected"), [(0, 1.0), (64, 0.9999872), (1_250_000, 0.75), (5_000_000, 0.0), (6_000_000, 0.0)]
)
def test_density_noise(cur_nimg: int, expected: float) -> None:
    assert_close(schedule.density_noise_std(RendererConfig(), cur_nimg), expected, "density noise", "hand")


@pytest.mark.parametrize(
    ("cur_nimg", "expected"), [(0, 10.0), (50_000, 7.5), (199_936, 0.0032), (200_000, 0.0), (300_000, 0.0)]
)
def test_blur(cur_nimg: int, expected: float) -> None:
    assert_close(schedule.blur_sigma(OptimConfig(), cur_nimg), expected, "blur", "hand")


@pytest.mark.parametrize(("cur_nimg", "expected"), [(0, 1.0), (500_000, 0.75), (1_000_000, 0.5), (9_000_000, 0.5)])
def test_pose_swap(cur_nimg: int, expected: float) -> None:
    assert_close(schedule.pose_swap_probability(GeneratorConfig(), cur_nimg), expected, "pose swap", "hand")


@pytest.mark.parametrize(
    ("config", "cur_nimg", "batch", "expected"),
    [
        (OptimConfig(), 64, 64, 9.5367432e-7),  # half life 0.05 * 64 = 3.2 images, 20 half lives
        (OptimConfig(), 6400, 64, 0.8705506),  # 0.5^0.2
        (OptimConfig(), 400_000, 64, 0.9977843),  # 0.5^0.0032: 20 kimg from here on
        (OptimConfig(), 10_000_000, 64, 0.9977843),
        (OptimConfig(), 10_000_000, 32, 0.9977843),  # 0.3125 kimg per image of the batch
        (OptimConfig(ema_kimg=10.0), 10_000_000, 64, 0.9955735),  # 0.5^0.0064
        (OptimConfig(ema_rampup=1.0), 640, 64, 0.9330330),  # 0.5^0.1
        (OptimConfig(ema_rampup=0.0), 10_000_000, 64, 0.0),
    ],
)
def test_ema_decay(config: OptimConfig, cur_nimg: int, batch: int, expected: float) -> None:
    assert_close(schedule.ema_decay(config, cur_nimg, batch), expected, "ema decay", "hand")


@pytest.mark.parametrize("ema_kimg", [None, 0.0, 20.0])
def test_first_average_is_a_copy(ema_kimg: float | None) -> None:
    assert schedule.ema_decay(OptimConfig(ema_kimg=ema_kimg), 0, BATCH) == 0


@pytest.mark.parametrize(("cur_nimg", "expected"), [(0, 1.0), (2000, 1.0), (8000, 0.5), (200_000, 0.1)])
def test_learning_rates_fall(cur_nimg: int, expected: float) -> None:
    assert_close(schedule.lr_factor(OptimConfig(lr_decay_kimg=2.0), cur_nimg, 10.0), expected, "factor", "hand")
    assert schedule.lr_factor(OptimConfig(), cur_nimg, 10.0) == 1


@pytest.mark.parametrize(
    ("cur_nimg", "expected"), [(0, 1.0), (12_000, 1.0), (15_000, 0.625), (18_000, 0.25), (20_000, 0.0), (30_000, 0.0)]
)
def test_learning_rates_fall_to_nothing_at_the_end(cur_nimg: int, expected: float) -> None:
    assert_close(schedule.lr_factor(OptimConfig(lr_rampdown=0.4), cur_nimg, 20.0), expected, "factor", "hand")
    both = schedule.lr_factor(OptimConfig(lr_rampdown=0.4, lr_decay_kimg=3.0), cur_nimg, 20.0)
    assert_close(both, expected * min(1.0, (3000 / max(cur_nimg, 1)) ** 0.5), "both", "hand")
