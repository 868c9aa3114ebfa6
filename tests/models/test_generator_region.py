"""Images and gradients of a generator that computes its planes where rays look, against the whole network's."""

from __future__ import annotations

import pytest
import torch

from checks import assert_close, draw, draw_uniform
from epigraf_fast.camera import Patch
from epigraf_fast.config import CameraConfig, GeneratorConfig, RendererConfig
from epigraf_fast.models import region as regions
from epigraf_fast.models.generator import Generator
from epigraf_fast.models.image_generator import ImageGenerator
from epigraf_fast.models.region import boxes_of, plan, region_of

CAMERA = CameraConfig(prior="normal", fov=12.0, radius=1.0, ray_start=0.88, ray_end=1.12, cube_scale=0.2)
SETTINGS = {"z_dim": 8, "w_dim": 8, "plane_resolution": 64, "plane_channels": 4, "channel_base": 256, "channel_max": 8}
SAMPLES = {"coarse_samples": 5, "fine_samples": 4}
FRONT = torch.tensor([[0.0, torch.pi / 2, 0.0]], dtype=torch.float64)
ANGLES = FRONT + torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.2, 0.0], [-0.7, 0.3, 0.1]], dtype=torch.float64)
PATCH = Patch(
    torch.tensor([0.2, 0.5, 0.35], dtype=torch.float64),
    torch.tensor([[0.1, 0.7], [0.5, 0.0], [0.3, 0.3]], dtype=torch.float64),
)


@pytest.fixture(autouse=True)
def small_levels(monkeypatch):
    monkeypatch.setattr(regions, "WHOLE_BELOW", 16)


def build(renderer=None, backend=None, label_dim=0, **settings):
    torch.manual_seed(0)
    settings = GeneratorConfig(**{**SETTINGS, "decoder_hidden": 16, **settings})
    options = {"backend": backend, "renderer_backend": backend, "label_dim": label_dim}
    network = Generator(settings, RendererConfig(**SAMPLES, **(renderer or {})), CAMERA, **options).double()
    for name, p in network.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.3)
    return network.eval()


def images_and_gradients(network, region, **options):
    z = draw(3, 8, seed=1).requires_grad_(True)
    arguments = {"resolution": 6, "patch": PATCH, "noise_mode": "const", **options}
    images = network(z, ANGLES, region=region, **arguments)
    inputs = {"z": z, **dict(network.named_parameters())}
    outputs = [x for x in images if x.requires_grad]
    incoming = [draw(*x.shape, seed=2) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), incoming, allow_unused=True)
    return images, dict(zip(inputs, gradients, strict=True))


def compare(network, region=True, **options):
    images, gradients = images_and_gradients(network, False, **options)
    in_part, gradients_in_part = images_and_gradients(network, region, **options)
    for name, got, want in zip(images._fields, in_part, images, strict=True):
        assert_close(got, want, name)
    for name, want in gradients.items():
        got = gradients_in_part[name]
        assert (got is None) == (want is None), name
        if want is not None:
            unit = want.abs().amax().clamp(min=1e-30)
            assert_close(got / unit, want / unit, name)


def computed_share(network, monkeypatch, **options):
    """Of the planes, that a call of the generator lets the synthesis network hand on."""
    seen = []
    original = network.synthesis._planes
    monkeypatch.setattr(network.synthesis, "_planes", lambda *args: seen.append(original(*args)) or seen[-1])
    images_and_gradients(network, True, **options)
    (planes,) = seen
    return planes.shape[2] * planes.shape[3] / 64**2


@pytest.mark.parametrize("backend", ["reference", None])
def test_images_and_gradients_are_those_of_whole_planes(backend, monkeypatch):
    network = build(backend=backend)
    compare(network)
    assert computed_share(network, monkeypatch) == 46 * 58 / 64**2  # a box of 38 x 50, and its rim


@pytest.mark.parametrize(
    "settings",
    [
        {"renderer": {"background": "sphere", "background_samples": 3}},
        {"decoder_fourier": 3},
        {"view_direction": True},
        {"renderer": {"fine_samples": 0}},
    ],
    ids=str,
)
def test_with_what_else_a_generator_may_have(settings):
    renderer = {**settings.pop("renderer", {})}
    fine = renderer.pop("fine_samples", None)
    network = build(renderer, **settings)
    if fine is not None:
        network.renderer.config = RendererConfig(coarse_samples=5, fine_samples=fine)
    compare(network)


def test_lenses_and_whole_images():
    compare(build(), fov=torch.tensor([8.0, 12.0, 4.0], dtype=torch.float64))
    compare(build(), patch=None, fov=6.0)


def test_a_plan_that_is_handed_in():
    boxes = boxes_of(CAMERA, 64, ANGLES, PATCH)
    compare(build(), plan(region_of(boxes, 64, (64, 56)), 64, "cpu"))


def test_whole_planes_where_they_are_asked_for(monkeypatch):
    network = build()
    assert computed_share(network, monkeypatch, with_context=True) == 1
    network = build({"background": "plane"})
    assert not network.takes_region
    assert computed_share(network, monkeypatch) == 1
    settings = GeneratorConfig(**SETTINGS, backbone="image")
    network = ImageGenerator(settings, RendererConfig(**SAMPLES), CAMERA, image_resolution=16).double().eval()
    compare(network)


@pytest.mark.parametrize("prior", ["front", "sphere"])
def test_the_reference_finds_no_tap_outside(prior):
    """Which it looks for; with random depths, and boxes that touch every border of the planes."""
    network = build(backend="reference").train()
    for seed in range(8):
        u = draw_uniform(3, 3, seed=seed)
        spread = torch.tensor([0.6, 0.3, 0.0]) if prior == "front" else torch.tensor([6.28, 2.8, 0.0])
        angles = FRONT + (u - 0.5) * spread
        scale = 0.1 + 0.9 * draw_uniform(3, seed=100 + seed)
        offset = draw_uniform(3, 2, seed=200 + seed) * (1 - scale)[:, None]
        options = {"patch": Patch(scale, offset), "noise_mode": "none"}
        with torch.no_grad():
            network(draw(3, 8), angles, resolution=5, region=True, **options)


def test_settings_forbid_it(monkeypatch):
    network = build(region="off")
    assert not network.takes_region
    assert computed_share(network, monkeypatch) == 1


def test_whole_planes_where_a_part_saves_little(monkeypatch):
    """Boxes of nearly all, and they are painted as they are without a region: by the same operations."""
    network = build()
    planes, place = network.paint(draw(3, network.mapping.num_ws, 8), ANGLES, fov=30.0, noise_mode="none")
    assert place is None
    assert planes.shape[2:] == (64, 64)
    planes, place = network.paint(draw(3, network.mapping.num_ws, 8), ANGLES, PATCH, noise_mode="none")
    assert planes.shape[2] * planes.shape[3] < 0.9 * 64**2
    assert place.whole == (64, 64)
    monkeypatch.setattr(regions, "PAYS_BELOW", 0.1)
    assert computed_share(network, monkeypatch) == 1


@pytest.mark.parametrize("samples", [{}, {"fine_samples": 0}], ids=str)
@pytest.mark.parametrize("backend", ["reference", None])
def test_in_debug_mode_the_renderer_looks(backend, samples, monkeypatch):
    """With every backend; those that count a texel that is not stored as zero would not say a word."""
    network = build(backend=backend)
    network.renderer.config = RendererConfig(**{**SAMPLES, **samples})
    boxes = boxes_of(CAMERA, 64, ANGLES, PATCH)
    small = plan(region_of(torch.cat([boxes[:, :2], boxes[:, :2] + 1], dim=1), 64), 64, "cpu")
    options = {"resolution": 6, "patch": PATCH}
    if backend is None:
        network(draw(3, 8), ANGLES, region=small, **options)
    monkeypatch.setenv("EPIGRAF_FAST_DEBUG", "1")
    network(draw(3, 8), ANGLES, region=True, **options)
    with pytest.raises((RuntimeError, ValueError), match="points must keep to the region"):
        network(draw(3, 8), ANGLES, region=small, **options)


def test_a_box_too_small_is_noticed():
    network = build(backend="reference")
    boxes = boxes_of(CAMERA, 64, ANGLES, PATCH)
    small = region_of(torch.cat([boxes[:, :2], boxes[:, :2] + 1], dim=1), 64)
    with pytest.raises(ValueError, match="points must keep to the region"):
        network(draw(3, 8), ANGLES, resolution=6, patch=PATCH, region=plan(small, 64, "cpu"))
