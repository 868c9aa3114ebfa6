"""Backgrounds: sizes, the inverted sphere, its integration, and how they join the foreground (method.md 6)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from checks import assert_close, assert_finite, draw, draw_uniform
from epigraf_fast.camera import Patch, cam2world_matrix, camera_rays, extract_patches
from epigraf_fast.config import CameraConfig, RendererConfig, preset
from epigraf_fast.models.background import (
    ModulatedLinear,
    PlaneBackground,
    SphereBackground,
    ToOutput,
    conventional_depth,
    sphere_points,
)
from epigraf_fast.models.renderer import Images
from epigraf_fast.training.memory import meta_networks, parameter_count

ANGLES = torch.tensor([[0.4, 1.2, 0.0], [-2.0, 2.0, 0.0]], dtype=torch.float64)
CAMERA = CameraConfig(fov=30.0, radius=8.0, ray_start=6.0, ray_end=10.0, cube_scale=3.8)


def rays(resolution: int = 5) -> tuple[Tensor, Tensor]:
    """Of cameras on the unit sphere; the middle pixel looks through the centre."""
    return camera_rays(cam2world_matrix(ANGLES, 1.0), 40.0, resolution)


def background(**settings) -> SphereBackground:
    torch.manual_seed(0)
    config = RendererConfig(**{"background_samples": 6, **settings})
    return SphereBackground(8, config, CAMERA, channel_max=12).double()


def count(kind: str) -> tuple[int, int]:
    config = preset("ffhq")
    config = dataclasses.replace(
        config,
        generator=dataclasses.replace(config.generator, pose_conditioning=False),
        renderer=dataclasses.replace(config.renderer, background=kind),
    )
    generator = meta_networks(config, 0)[0]
    return parameter_count(generator), generator.mapping.num_ws


def test_published_sizes() -> None:
    assert count("none") == (28_983_507, 16)
    assert count("sphere") == (29_311_115, 20)
    # Three more outputs of every to-planes layer: 3 * (channels + 1).
    channels = [512, 512, 512, 512, 512, 256, 128, 64]
    assert count("plane") == (28_983_507 + 3 * sum(c + 1 for c in channels), 16)


def test_a_zoom_zooms_the_background_too(tiny_generator) -> None:
    generator = tiny_generator(renderer={"background": "sphere"}).eval()
    ws = generator.ws(draw(2, 6))
    planes = generator.synthesis(ws, "const")
    usual, same, nearer = (
        generator.render(planes, ANGLES, 4, ws=ws, layer="background", fov=fov).rgb for fov in (None, CAMERA.fov, 15.0)
    )
    assert torch.equal(usual, same)
    assert not torch.allclose(usual, nearer)


# The inverted sphere


def test_points_lie_on_their_rays() -> None:
    """The point at the conventional depth has the radius and the direction that the four numbers say."""
    origins, directions = rays()
    inverse = torch.tensor([0.95, 0.6, 0.3, 0.05], dtype=torch.float64).expand(2, 25, 4)
    points = sphere_points(origins, directions, inverse)
    depth = conventional_depth(origins, directions, inverse * 1)
    # The published 1e-6 in the depth's denominator moves the point by that share.
    exact = origins[..., None, :] + depth[..., None] * directions[..., None, :]
    assert_close(points[..., :3], torch.nn.functional.normalize(exact, dim=-1), "direction", "background_depth")
    assert_close(1 / exact.norm(dim=-1), inverse, "inverse radius", "background_depth")
    assert_close(points[..., 3], inverse, "fourth coordinate", "exact")


def test_ends_of_a_ray() -> None:
    """At inverse radius 1 the exit from the unit sphere, at 0 the direction of the ray."""
    origins, directions = rays()
    inverse = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 25, 2)
    points = sphere_points(origins, directions, inverse)[..., :3]
    exits = origins - 2 * (origins * directions).sum(dim=-1, keepdim=True) * directions  # a chord from sphere to sphere
    assert_close(points[..., 0, :], exits, "exit")
    assert_close(points[..., 1, :], directions, "infinity")


def test_a_ray_through_the_centre() -> None:
    """It has no axis of rotation."""
    for dtype in (torch.float64, torch.float32):
        origin = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=dtype)
        points = sphere_points(origin, -origin, torch.tensor([[[1.0, 0.5, 0.0]]], dtype=dtype))
        assert_close(points[0, 0, :, :3], torch.tensor([[0.0, 0.0, -1.0]] * 3).to(dtype), "direction")


def test_inverse_radii_by_hand() -> None:
    """1, 2/3, 1/3, 0: strata end at 5/6, 1/2, 1/6; and half of that."""
    for start, jitter, expected in (
        (1.0, 0.0, [1, 5 / 6, 1 / 2, 1 / 6]),
        (1.0, 1.0, [5 / 6, 1 / 2, 1 / 6, 0]),
        (1.0, None, [1, 2 / 3, 1 / 3, 0]),
        (0.5, 0.5, [11 / 24, 1 / 3, 1 / 6, 1 / 24]),
    ):
        network, seen = background(background_samples=4, background_start=start), []
        network.decode = lambda points, ws, seen=seen: seen.append(points) or points
        jitter = None if jitter is None else torch.full((2, 25, 4), jitter).double()
        network.integrate(draw(2, 4, 8), *rays(), jitter)
        inverse = seen[0][..., 3].view(2, 25, 4)
        assert_close(inverse, torch.tensor(expected).double().expand(2, 25, 4), "inverse radii", "hand")


# The network


def test_modulated_linear_equals_the_formula() -> None:
    layer = ModulatedLinear(5, 4, 3).double()
    with torch.no_grad():
        layer.bias.copy_(draw(4, seed=9))
    x, w = draw(2, 7, 5), draw(2, 3, seed=1)
    style = w @ (layer.affine.weight / math.sqrt(3)).T + layer.affine.bias
    for b in range(2):
        weight = layer.weight * style[b]
        weight = weight / (weight.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
        y = x[b] @ weight.T + layer.bias
        expected = torch.where(y < 0, 0.2 * y, y) * math.sqrt(2)
        assert_close(layer(x, w)[b], expected, f"image {b}")
    assert (layer.affine.bias == 1).all()


def test_to_output_equals_the_formula() -> None:
    layer = ToOutput(5, 4, 3).double()
    with torch.no_grad():
        layer.bias.copy_(draw(4, seed=9))
    x, w = draw(2, 7, 5), draw(2, 3, seed=1)
    style = (w @ (layer.affine.weight / math.sqrt(3)).T + layer.affine.bias) / math.sqrt(5)
    expected = torch.stack([(x[b] * style[b]) @ layer.weight.T for b in range(2)]) + layer.bias
    assert_close(layer(x, w), expected, "output")


def test_who_sees_which_style_vector() -> None:
    """block0.layer 0, block0.out and block1.first 1, block1.second 2, block1.out 3."""
    network, seen = background(), {}
    for name, module in network.named_children():
        if isinstance(module, (ModulatedLinear, ToOutput)):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[1]}))
    ws = draw(2, 4, 8)
    network.decode(draw(2, 3, 4) / 4, ws)
    expected = {"layer0": 0, "out0": 1, "layer1": 1, "layer2": 2, "out1": 3}
    assert seen.keys() == expected.keys()
    for name, index in expected.items():
        assert torch.equal(seen[name], ws[:, index]), name
    assert network.layer0.weight.shape == (12, 48)


def test_blocks_add_up() -> None:
    network, ws, points = background(), draw(2, 4, 8), draw(2, 3, 4) / 4
    encoded = torch.stack([network.encoder(p) for p in points])
    first = network.layer0(encoded, ws[:, 0])
    second = network.layer2(network.layer1(first, ws[:, 1]), ws[:, 2])
    expected = network.out0(first, ws[:, 1]) + network.out1(second, ws[:, 3])
    assert_close(network.decode(points, ws), expected, "sum")


@pytest.mark.parametrize("white", [False, True])
def test_integration_by_hand(white: bool) -> None:
    """Constant raw density d and colour c: the first five intervals are 1/5, the last one stops everything."""
    network = background(white_background=white)
    network.decode = lambda points, ws: torch.tensor([0.1, 0.2, 0.3, 0.5]).double().expand(*points.shape[:2], 4)
    origins, directions = rays()
    rgb, depth = network.integrate(draw(2, 4, 8), origins, directions, with_depth=True)
    assert_close(rgb, torch.tensor([0.1, 0.2, 0.3]).double().expand(2, 25, 3), "colour", "hand")
    density = math.log1p(math.exp(0.5))
    weights = [(1 - math.exp(-density / 5)) * math.exp(-density * k / 5) for k in range(5)] + [math.exp(-density)]
    inverse = torch.linspace(1, 0, 6, dtype=torch.float64).expand(2, 25, 6)
    expected = (conventional_depth(origins, directions, inverse) * torch.tensor(weights)).sum(dim=-1)
    assert_close(depth, expected, "depth", "hand")


@pytest.mark.parametrize(
    ("settings", "density"),
    [
        ({"density_activation": "relu"}, 0.5),
        ({"softplus_beta": 4.0}, math.log1p(math.exp(4 * 0.5)) / 4),
        ({}, math.log1p(math.exp(0.5))),
    ],
)
def test_the_density_has_the_activation_of_the_settings(settings: dict, density: float) -> None:
    """The first sample's colour is 1 and all others' 0: what is seen is the opacity of the first interval, 1/5 long."""
    network = background(**settings)
    values = torch.tensor([[0.0, 0.0, 0.0, 0.5]]).repeat(6, 1).double()
    values[0, :3] = 1
    network.decode = lambda points, ws: values.repeat(points.shape[1] // 6, 1).expand(len(points), -1, 4)
    rgb, _ = network.integrate(draw(2, 4, 8), *rays())
    assert_close(rgb, torch.full((2, 25, 3), 1 - math.exp(-density / 5)).double(), "colour", "hand")


def test_relu_lets_negative_densities_through() -> None:
    network = background(density_activation="relu", white_background=True)
    network.decode = lambda points, ws: torch.tensor([0.1, 0.2, 0.3, -0.5]).double().expand(*points.shape[:2], 4)
    rgb, _ = network.integrate(draw(2, 4, 8), *rays())
    assert_close(rgb, torch.ones(2, 25, 3).double(), "colour", "hand")


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, ws = background(), draw(2, 7, 8)
    with torch.no_grad():
        whole = network(None, ws, ANGLES, 5, jitter=draw_uniform(2, 25, 6), with_depth=True)
        monkeypatch.setattr("epigraf_fast.models.background.CHUNK", 80)
        parts = network(None, ws, ANGLES, 5, jitter=draw_uniform(2, 25, 6), with_depth=True)
    for name, a, b in zip(("colour", "depth"), whole, parts, strict=True):
        assert_close(a, b, name)


def test_the_sphere_is_that_of_the_cameras() -> None:
    """In other units the picture is the same, and depths scale."""
    near, far = background(), background()
    near.camera, far.camera = CameraConfig(fov=30.0, radius=1.0), CameraConfig(fov=30.0, radius=32.0)
    ws = draw(2, 7, 8)
    a, b = (network(None, ws, ANGLES, 4, with_depth=True) for network in (near, far))
    assert_close(a[0], b[0], "colour")
    assert_close(32 * a[1], b[1], "depth")


# The plane


def test_plane_is_resized_then_cut() -> None:
    picture = draw(2, 3, 6, 6)
    plane = PlaneBackground(11)
    image = torch.nn.functional.interpolate(picture, (11, 11), mode="bilinear", align_corners=True)
    whole, depth = plane(picture, None, ANGLES, 11)
    assert depth is None
    assert_close(whole.transpose(1, 2).unflatten(2, (11, 11)), image, "whole")
    cut = Patch(torch.tensor([0.5, 0.7]).double(), torch.tensor([[0.3, 0.1], [0.0, 0.25]]).double())
    patch, _ = plane(picture, None, ANGLES, 4, cut)
    assert_close(patch.transpose(1, 2).unflatten(2, (4, 4)), extract_patches(image, cut, 4), "patch")
    small, _ = plane(picture, None, ANGLES, 6)
    ones = extract_patches(image, Patch.whole(image), 6)
    assert_close(small.transpose(1, 2).unflatten(2, (6, 6)), ones, "another size")


# In the generator


@pytest.mark.parametrize("kind", ["sphere", "plane"])
def test_layers_add_up(tiny_generator, kind: str) -> None:
    """Image = foreground + background times the final transmittance; the foreground ends in an interval of 1e-3."""
    generator = tiny_generator(renderer={"background": kind, "density_shift": -3.0}).eval()
    assert generator.renderer.config.last_interval == 1e-3
    ws = generator.ws(draw(2, 6))
    planes = generator.synthesis(ws, "const")
    transmittance = []
    forward = generator.renderer.forward

    def watched(*args, **kwargs):
        transmittance.append(forward(*args, **kwargs))
        return transmittance[-1]

    generator.renderer.forward = watched
    image, front, back = (
        generator.render(planes, ANGLES, 4, ws=ws, layer=layer) for layer in ("both", "foreground", "background")
    )
    left = transmittance[0].final_transmittance.view(2, 1, 4, 4)
    assert (left > 0.01).all()
    assert_close(image.rgb, front.rgb + back.rgb * left, "image")
    assert_close(image.depth, front.depth, "depth")
    if kind == "sphere":
        assert (back.depth > 2 * 8 * math.cos(math.radians(30))).all()  # behind the sphere
        assert_finite(back.depth, "depth")
    else:
        assert torch.isinf(back.depth).all()


def test_white_is_behind_the_background_alone(tiny_generator) -> None:
    generator = tiny_generator(renderer={"background": "sphere", "white_background": True})
    assert not generator.renderer.config.white_background
    assert generator.background.config.white_background


@pytest.mark.parametrize("kind", ["sphere", "plane"])
@pytest.mark.parametrize("last_back", [False, True])
def test_published_white_is_in_front_too(tiny_generator, kind: str, last_back: bool) -> None:
    """1 - sum(w), taken before `last_back`, is added to the foreground; nothing else changes."""
    settings = {"background": kind, "white_background": True, "density_shift": -3.0, "last_back": last_back}
    ours, published = (
        tiny_generator(renderer={**settings, "white_foreground": white}).eval() for white in (False, True)
    )
    ws = ours.ws(draw(2, 6))
    planes = ours.synthesis(ws, "const")
    for layer in ("both", "foreground", "background"):
        a, b = (generator.render(planes, ANGLES, 4, ws=ws, layer=layer) for generator in (ours, published))
        added = 0 if layer == "background" else 1 - a.weight_sum
        assert_close(b.rgb, a.rgb + added, layer)
        assert layer == "background" or (added > 0.01).all()
        assert torch.equal(a.depth, b.depth)


def test_the_sphere_follows_the_settings_of_the_density(tiny_generator) -> None:
    generator = tiny_generator(
        renderer={"background": "sphere", "density_activation": "relu", "softplus_beta": 2.0, "density_shift": 1.0}
    )
    config = generator.background.config
    assert (config.density_activation, config.softplus_beta) == ("relu", 2.0)


def test_without_a_background(tiny_generator) -> None:
    generator = tiny_generator().eval()
    assert generator.renderer.config.last_interval == 1e10
    planes = generator.synthesis(generator.ws(draw(2, 6)), "const")
    images = [generator.render(planes, ANGLES, 4, layer=layer) for layer in ("both", "foreground")]
    for name in Images._fields:
        assert torch.equal(*(getattr(image, name) for image in images))
    with pytest.raises(ValueError, match=r"layer must be both .* no background"):
        generator.render(planes, ANGLES, 4, layer="background")
    with pytest.raises(ValueError, match="layer must be one of both, foreground, background, got 'front'"):
        generator.render(planes, ANGLES, 4, layer="front")


def test_sphere_needs_its_style_vectors(tiny_generator) -> None:
    generator = tiny_generator(renderer={"background": "sphere"})
    planes = generator.synthesis(generator.ws(draw(2, 6)), "const")
    with pytest.raises(ValueError, match="ws must be given"):
        generator.render(planes, ANGLES, 4)


@pytest.mark.parametrize("kind", ["sphere", "plane"])
def test_a_patch_is_the_crop_of_the_full_image(tiny_generator, kind: str) -> None:
    """With pixels on pixels: scale (r - 1) / (R - 1)."""
    generator = tiny_generator(renderer={"background": kind, "density_shift": -3.0}).eval()
    if kind == "plane":
        generator.background.image_resolution = 9
    z = draw(2, 6)
    whole = generator(z, ANGLES, resolution=9, noise_mode="const").rgb
    scale = torch.full((2,), 3 / 8).double()
    offset = torch.tensor([[2 / 8, (9 - 4 - 1) / 8]] * 2).double()
    patch = generator(z, ANGLES, resolution=4, patch=Patch(scale, offset), noise_mode="const").rgb
    assert_close(patch, whole[:, :, 1:5, 2:6], "crop")


def test_jitter_in_training_only(tiny_generator) -> None:
    generator = tiny_generator(renderer={"background": "sphere"})
    ws = generator.ws(draw(2, 6))
    planes = generator.synthesis(ws, "const")

    def back(**options) -> Tensor:
        return generator.render(planes, ANGLES, 4, ws=ws, layer="background", **options).rgb

    assert not torch.equal(back(), back())
    assert torch.equal(back(stochastic=False), back(stochastic=False))
    jitter = draw_uniform(2, 16, 16)
    assert torch.equal(back(background_jitter=jitter), back(background_jitter=jitter))
    generator.eval()
    assert torch.equal(back(), back())
    even = tiny_generator(renderer={"background": "sphere", "stochastic": False})
    even.load_state_dict(generator.state_dict())
    assert even.training
    assert torch.equal(even.render(planes, ANGLES, 4, ws=ws, layer="background").rgb, back())


@pytest.mark.parametrize("kind", ["sphere", "plane"])
def test_a_training_step_reaches_every_parameter(tiny_generator, kind: str) -> None:
    generator = tiny_generator(renderer={"background": kind, "density_shift": -3.0}, dtype=torch.float32)
    generator(draw(2, 6).float(), ANGLES.float(), resolution=4).rgb.square().sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert_finite(parameter.grad, name)
        assert parameter.grad.abs().max() > 0, name
