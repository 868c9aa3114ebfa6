"""The generator: sizes, conditions, style vectors, images; and its derivatives as a whole."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from checks import assert_close, assert_finite, draw
from epigraf_fast.camera import Patch
from epigraf_fast.config import GeneratorConfig, RendererConfig, preset
from epigraf_fast.models.generator import Generator
from epigraf_fast.models.image_generator import generator_class
from epigraf_fast.training.memory import meta_networks, parameter_count

ANGLES = torch.tensor([[0.4, 1.2, 0.0], [-2.0, 2.0, 0.0]], dtype=torch.float64)
PLAIN = 28_983_507
FIRST_CONDITION = 262_656  # embed's bias and fc0's wider input


def count(label_dim=0, **settings):
    config = preset("ffhq")
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, **settings))
    return parameter_count(meta_networks(config, label_dim)[0])


def test_published_sizes():
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(), RendererConfig(), preset("ffhq").camera)
    assert parameter_count(generator) == PLAIN
    assert parameter_count(generator.mapping) == 525_312
    assert parameter_count(generator.synthesis) == 28_455_823
    assert parameter_count(generator.decoder) == 2372
    assert parameter_count(generator.renderer) == 0
    assert generator.mapping.num_ws == generator.synthesis.num_ws == 16


def test_sizes_of_conditions():
    assert count(pose_conditioning=False) == PLAIN
    assert count(pose_conditioning=True) == 29_247_187
    assert PLAIN + FIRST_CONDITION + 2 * 512 == 29_247_187
    assert count(10, pose_conditioning=False) == PLAIN + FIRST_CONDITION + 10 * 512
    assert count(198, pose_conditioning=True) == 29_247_187 + 198 * 512
    assert parameter_count(meta_networks(preset("food"), 10)[0]) == PLAIN + FIRST_CONDITION + 10 * 512


def test_images_are_of_order_one_at_full_width():
    torch.manual_seed(0)
    config = GeneratorConfig(plane_resolution=16)
    generator = Generator(config, RendererConfig(coarse_samples=12, fine_samples=12), preset("ffhq").camera)
    with torch.no_grad():
        images = generator(torch.randn(2, 512), ANGLES.float(), resolution=8)
    for name, image in images._asdict().items():
        assert_finite(image, name)
    assert 0.1 < images.rgb.std() < 5
    assert images.rgb.abs().max() < 20
    assert ((images.depth > 0.88) & (images.depth < 1.12)).all()  # nothing is behind an infinite last interval
    assert_close(images.weight_sum, torch.ones(2, 1, 8, 8), "opacity", "patch_crop")


def test_forward_is_mapping_synthesis_and_render(tiny_generator):
    generator = tiny_generator(pose_conditioning=True, label_dim=3).eval()
    z, label = draw(2, 6, seed=1), torch.eye(3, dtype=torch.float64)[:2]
    poses = ANGLES.flip(0)
    patch = Patch(torch.full((2,), 0.5).double(), torch.tensor([[0.1, 0.2], [0.3, 0.5]], dtype=torch.float64))
    options = {"conditioning_angles": poses, "noise_mode": "const"}
    images = generator(z, ANGLES, label, resolution=4, patch=patch, **options)
    numbers = poses[:, :2].sign() * (poses[:, :2].abs() % (2 * math.pi)) / (2 * math.pi)
    ws = generator.mapping(z, torch.cat([label, numbers], dim=1))  # the label comes first
    planes = generator.synthesis(ws, "const")
    expected = generator.render(planes, ANGLES, 4, patch)
    for name in ("rgb", "depth", "weight_sum"):
        assert_close(getattr(images, name), getattr(expected, name), name)
    assert tuple(images.rgb.shape) == (2, 3, 4, 4)
    assert tuple(images.depth.shape) == tuple(images.weight_sum.shape) == (2, 1, 4, 4)


def test_no_pose_is_the_mean_pose(tiny_generator):
    generator = tiny_generator(pose_conditioning=True)
    z = draw(2, 6, seed=1)
    assert_close(generator.mean_camera_pose, [0.0, math.pi / 2, 0.0], "the prior's means", "hand")
    assert "mean_camera_pose" in generator.state_dict()
    generator.mean_camera_pose.copy_(torch.tensor([0.3, 1.1, 0.0]))
    mean = generator.mean_camera_pose.expand(2, -1)
    assert_close(generator.ws(z), generator.ws(z, angles=mean), "ws", "exact")
    assert not torch.equal(generator.ws(z), generator.ws(z, angles=ANGLES))
    rgb = {"resolution": 3, "noise_mode": "none", "stochastic": False}
    expected = generator(z, ANGLES, conditioning_angles=mean, **rgb).rgb
    assert_close(generator(z, ANGLES, **rgb).rgb, expected, "the renderer's cameras are not the mapping's", "exact")


def test_pose_dropout_in_training_only(tiny_generator):
    """Each of the two numbers is doubled or gone, at dropout 0.5."""
    generator = tiny_generator(pose_conditioning=True, pose_dropout=0.5)
    seen, mapping = [], generator.mapping.forward
    generator.mapping.forward = lambda z, c, **options: seen.append(c) or mapping(z, c, **options)
    numbers = ANGLES[:, :2].sign() * (ANGLES[:, :2].abs() % (2 * math.pi)) / (2 * math.pi)
    for _ in range(20):
        generator.ws(draw(2, 6), angles=ANGLES)
    ratios = torch.stack(seen) / numbers
    for value in (0.0, 2.0):
        assert_close(ratios[(ratios - value).abs() < 1e-9].mean(), value, "ratio", "hand")
    assert (((ratios - 0).abs() < 1e-9) | ((ratios - 2).abs() < 1e-9)).all()
    generator.eval().ws(draw(2, 6), angles=ANGLES)
    assert_close(seen[-1], numbers, "numbers in evaluation", "exact")


@pytest.mark.parametrize("backbone", ["triplane", "image"])
@pytest.mark.parametrize(("clamp", "expected"), [(0.0, None), (5.0, 5.0)])
def test_clamps_and_noise_are_those_of_the_settings(backbone, clamp, expected):
    config = dataclasses.replace(preset("demo").generator, clamp=clamp, noise=False, backbone=backbone)
    with torch.device("meta"):
        generator = generator_class(config)(config, RendererConfig(), preset("ffhq").camera, image_resolution=16)
    assert not generator.synthesis.noise
    for block in (getattr(generator.synthesis, f"b{res}") for res in generator.synthesis.resolutions):
        assert [layer.clamp for layer in (*block.convs(), block.to_planes, block)] == [expected] * (2 + block.num_convs)


def test_without_pose_conditioning_the_pose_is_not_seen(tiny_generator):
    generator = tiny_generator()
    z = draw(2, 6, seed=1)
    assert not hasattr(generator.mapping, "embed")
    assert_close(generator.ws(z, angles=ANGLES), generator.ws(z), "ws", "exact")


def test_the_prior_gives_the_mean_pose():
    config = preset("demo")
    camera = dataclasses.replace(config.camera, yaw_mean=0.5, pitch_mean=1.0)
    with torch.device("meta"):
        generator = Generator(config.generator, config.renderer, camera)
    assert tuple(generator.mean_camera_pose.shape) == (3,)
    generator = Generator(dataclasses.replace(config.generator, plane_resolution=8), config.renderer, camera)
    assert_close(generator.mean_camera_pose, [0.5, 1.0, 0.0], "mean pose", "hand")


def test_labels_change_the_image(tiny_generator):
    generator = tiny_generator(label_dim=3).eval()
    z = draw(1, 6, seed=1).expand(3, -1)
    label = torch.eye(3, dtype=torch.float64)
    rgb = generator(z, ANGLES[:1].expand(3, -1), label, resolution=4, noise_mode="const").rgb
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (rgb[a] - rgb[b]).abs().max() > 1e-3, f"classes {a} and {b} look alike"


@pytest.mark.parametrize(
    ("label", "got"),
    [(None, "None"), (torch.zeros(2, 4), r"\[2, 4\]"), (torch.zeros(1, 3), r"\[1, 3\]"), (torch.zeros(2), r"\[2\]")],
)
def test_label_errors(tiny_generator, label, got):
    generator = tiny_generator(label_dim=3)
    with pytest.raises(ValueError, match=rf"Generator: label must have shape \[2, 3\], got {got}"):
        generator(draw(2, 6), ANGLES, label, resolution=4)


def test_truncation_and_average(tiny_generator):
    generator = tiny_generator().eval()
    z = draw(2, 6, seed=1)
    generator(z, ANGLES, resolution=2)
    assert not generator.mapping.w_avg.any()
    generator(z, ANGLES, resolution=2, update_w_avg=True)
    assert_close(generator.mapping.w_avg, 0.002 * generator.ws(z)[:, 0].mean(dim=0), "w_avg")
    options = {"resolution": 4, "noise_mode": "none"}
    truncated = generator(z, ANGLES, truncation_psi=0.5, truncation_cutoff=2, **options).rgb
    ws = generator.ws(z).clone()
    ws[:, :2] = (ws[:, :2] + generator.mapping.w_avg) / 2
    expected = generator.render(generator.synthesis(ws, "none"), ANGLES, 4).rgb
    assert_close(truncated, expected, "truncated")
    same = generator(z[:1].repeat(2, 1), ANGLES[:1].repeat(2, 1), truncation_psi=0.0, **options).rgb
    other = generator(z[1:].repeat(2, 1), ANGLES[:1].repeat(2, 1), truncation_psi=0.0, **options).rgb
    assert_close(same, other, "psi 0 leaves one object")


def test_noise_modes_and_seeds(tiny_generator):
    generator = tiny_generator().eval()
    for block in (generator.synthesis.b4, generator.synthesis.b16):
        torch.nn.init.constant_(block.conv1.noise_strength, 1.0)
    z, options = draw(2, 6, seed=1), {"resolution": 4}
    one, two = (generator(z, ANGLES, **options).rgb for _ in range(2))
    assert not torch.equal(one, two)  # random by default
    for mode in ("const", "none"):
        one, two = (generator(z, ANGLES, noise_mode=mode, **options).rgb for _ in range(2))
        assert_close(one, two, mode, "exact")


def test_float64_agrees_with_float32(tiny_generator):
    options = {"resolution": 6, "noise_mode": "const", "label": None}
    double = tiny_generator(pose_conditioning=True).eval()
    single = tiny_generator(pose_conditioning=True, dtype=torch.float32).eval()
    z = draw(2, 6, seed=1)
    expected = double(z, ANGLES, conditioning_angles=ANGLES, **options)
    actual = single(z.float(), ANGLES.float(), conditioning_angles=ANGLES.float(), **options)
    for name, image in expected._asdict().items():
        assert image.dtype == torch.float64
        assert_close(getattr(actual, name), image, name, "network_fp32")


def test_gradients_of_the_whole_against_differences(tiny_generator, assert_directional_derivative):
    """Without importance samples: these move with the density, and that part has no gradient (method.md 5)."""
    generator = tiny_generator(label_dim=3, pose_conditioning=True, renderer={"fine_samples": 0}).eval()
    for name, p in generator.named_parameters():
        if "noise_strength" in name:
            torch.nn.init.constant_(p, 0.3)
    z, label = draw(2, 6, seed=1), torch.eye(3, dtype=torch.float64)[:2]
    weights = draw(2, 4, 5, 5, seed=2) / 50

    def loss():
        images = generator(z, ANGLES, label, resolution=5, conditioning_angles=ANGLES, noise_mode="const")
        return (torch.cat([images.rgb, images.depth], dim=1) * weights).sum()

    assert_directional_derivative(loss, dict(generator.named_parameters()))


def test_a_training_step_reaches_every_parameter(tiny_generator):
    generator = tiny_generator(label_dim=3, pose_conditioning=True).train()
    images = generator(
        draw(2, 6, seed=1),
        ANGLES,
        torch.eye(3, dtype=torch.float64)[:2],
        resolution=5,
        conditioning_angles=ANGLES,
        density_noise_std=0.5,
    )
    images.rgb.square().mean().backward()
    for name, p in generator.named_parameters():
        assert p.grad is not None, name
        assert_finite(p.grad, name)
        assert p.grad.abs().sum() > 0, name
