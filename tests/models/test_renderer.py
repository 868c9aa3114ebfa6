"""The renderer against closed forms, its draws, its chunks, its gradients, and patches against the full image."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from checks import assert_close, draw, draw_uniform
from epigraf_fast import ops
from epigraf_fast.camera import Patch, cam2world_matrix, camera_rays
from epigraf_fast.config import CameraConfig, RendererConfig
from epigraf_fast.models import renderer as renderer_module
from epigraf_fast.models.decoder import Decoder
from epigraf_fast.models.raw_planes import RawPlanes
from epigraf_fast.models.renderer import Draws, Renderer, render_planes

CAMERA = CameraConfig(fov=30.0, radius=8.0, ray_start=6.0, ray_end=10.0, cube_scale=3.8)
SMALL = RendererConfig(coarse_samples=6, fine_samples=5, density_shift=0.3)
ANGLES = torch.tensor([[0.4, 1.2, 0.0], [-2.0, 2.0, 0.0]], dtype=torch.float64)


def make(config=SMALL, decoder_channels=3, **settings):
    """A renderer in evaluation mode, a decoder, two scenes and the rays of two 4x4 images."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, **settings)
    renderer = Renderer(config, CAMERA.ray_start, CAMERA.ray_end, CAMERA.cube_scale).eval()
    decoder = Decoder(decoder_channels, 5).double()
    planes = 2 * draw(2, 3 * decoder_channels, 8, 8, seed=1)
    rays = camera_rays(cam2world_matrix(ANGLES, CAMERA.radius), CAMERA.fov, 4)
    return renderer, decoder, planes, *rays


class StubDecoder(torch.nn.Module):
    """A field: colours and raw density as a function of t. Notes the t it was asked for."""

    def __init__(self, field):
        super().__init__()
        self.field, self.asked = field, []

    def forward(self, planes, ray_origins, ray_directions, t, cube_scale, region=None):
        self.asked.append(t)
        return self.field(t)

    def coarse_to_fine(self, planes, ray_origins, ray_directions, t, resample, cube_scale, region=None):
        rays = planes, ray_origins, ray_directions
        coarse = self(*rays, t, cube_scale)
        t_fine = resample(coarse.detach())
        return coarse, t_fine, self(*rays, t_fine, cube_scale)


def constant(colour, raw):
    return StubDecoder(lambda t: torch.tensor([*colour, raw], dtype=t.dtype).expand(*t.shape, 4))


@pytest.mark.parametrize("fine_samples", [0, 5])
@pytest.mark.parametrize("white", [False, True])
def test_a_uniform_fog_has_a_closed_form(fine_samples, white):
    """Evenly spaced coarse samples reach both ends, so the optical depth is density (end - start + last interval)."""
    renderer, _, planes, *rays = make(fine_samples=fine_samples, last_interval=0.5, white_background=white)
    fog = constant((0.5, -1.0, 2.0), -1.0)
    result = renderer(planes, fog, *rays)
    density = math.log1p(math.exp(-1.0 + 0.3))
    opacity = 1 - math.exp(-density * 4.5)
    expected = torch.tensor([0.5, -1.0, 2.0]).double() * opacity + (1 - opacity if white else 0)
    assert_close(result.rgb, expected.expand(2, 16, 3), "rgb", "hand")
    assert_close(result.weight_sum, torch.full((2, 16), opacity), "opacity", "hand")
    assert_close(result.final_transmittance, torch.full((2, 16), math.exp(-density * 4)), "transmittance", "hand")
    assert len(fog.asked) == (2 if fine_samples else 1)  # the coarse evaluation serves both passes
    assert_close(fog.asked[0], torch.linspace(6, 10, 6).double().expand(2, 16, 6), "coarse t", "hand")


def test_an_opaque_last_sample_without_background():
    renderer, _, planes, *rays = make()
    assert renderer.config.last_interval == 1e10
    result = renderer(planes, constant((1.0, 0.0, -1.0), -1.0), *rays)
    assert_close(result.rgb, torch.tensor([1.0, 0.0, -1.0]).double().expand(2, 16, 3), "rgb", "hand")


def test_last_back_takes_the_rest():
    renderer, _, planes, *rays = make(last_interval=1e-3, last_back=True, fine_samples=0)
    result = renderer(planes, constant((1.0, 0.5, -1.0), -30.0), *rays)
    assert_close(result.rgb, torch.tensor([1.0, 0.5, -1.0]).double().expand(2, 16, 3), "rgb", "hand")
    assert_close(result.depth, torch.full((2, 16), 10.0), "depth", "hand")


def test_fine_samples_gather_at_a_surface():
    renderer, _, planes, *rays = make(coarse_samples=41, fine_samples=40)
    wall = StubDecoder(lambda t: torch.stack([t, t, t, 200 * (t > 7.95) - 100.0], dim=-1))  # opaque behind 7.95
    result = renderer(planes, wall, *rays)
    fine = wall.asked[1]
    # Coarse samples lie 0.1 apart; nearly all weight is that of the one at 8, whose bin is [7.95, 8.05].
    assert ((fine > 7.94) & (fine < 8.06)).double().mean() > 0.9
    assert (result.depth - 8).abs().max() < 0.1
    assert_close(result.rgb[..., 0], result.depth, "a colour of t is the depth")


def test_two_passes_equal_the_ops():
    renderer, decoder, planes, *rays = make(density_activation="relu", last_interval=0.1)
    t = torch.linspace(6, 10, 6, dtype=torch.float64).expand(2, 16, 6)
    u = torch.linspace(0, 1, 5, dtype=torch.float64).expand(2, 16, 5)
    density = {"activation": "relu", "density_shift": 0.3, "last_interval": 0.1}
    coarse = decoder(planes, *rays, t, 3.8)
    t_fine = ops.sample_importance(t, coarse[..., 3], u, **density)
    expected = ops.composite(t, coarse, t_fine, decoder(planes, *rays, t_fine, 3.8), **density)
    result = renderer(planes, decoder, *rays)
    for name in ("rgb", "depth", "weight_sum", "final_transmittance"):
        assert_close(getattr(result, name), getattr(expected, name), name)


def test_evaluation_is_deterministic_and_training_is_not():
    renderer, decoder, planes, *rays = make()
    first = renderer(planes, decoder, *rays)
    assert_close(renderer(planes, decoder, *rays).rgb, first.rgb, "again", "exact")
    assert not torch.equal(renderer(planes, decoder, *rays, stochastic=True).rgb, first.rgb)
    renderer.train()
    one, two = (renderer(planes, decoder, *rays).rgb for _ in range(2))
    assert not torch.equal(one, two)
    assert_close(
        renderer(planes, decoder, *rays, stochastic=False).rgb, first.rgb, "deterministic in training", "exact"
    )
    renderer, *_ = make(stochastic=False)
    renderer.train()
    assert_close(renderer(planes, decoder, *rays).rgb, first.rgb, "a config that draws none", "exact")
    assert not torch.equal(renderer(planes, decoder, *rays, stochastic=True).rgb, first.rgb)


@pytest.mark.parametrize("std", [0.0, 0.7])
def test_draws_handed_in_replace_those_drawn(std):
    renderer, decoder, planes, *rays = make()
    torch.manual_seed(5)
    expected = renderer(planes, decoder, *rays, stochastic=True, density_noise_std=std)
    torch.manual_seed(5)
    draws = {"jitter": torch.rand(2, 16, 6, dtype=torch.float64)}
    if std:
        draws["coarse_noise"] = torch.randn(2, 16, 6, dtype=torch.float64)
    draws["u"] = torch.rand(2, 16, 5, dtype=torch.float64)
    if std:
        draws["fine_noise"] = torch.randn(2, 16, 11, dtype=torch.float64)
    state = torch.get_rng_state()
    result = renderer(planes, decoder, *rays, stochastic=True, density_noise_std=std, draws=Draws(**draws))
    assert torch.equal(torch.get_rng_state(), state), "something was drawn all the same"
    assert_close(result.rgb, expected.rgb, "rgb", "exact")
    assert_close(result.depth, expected.depth, "depth", "exact")
    for name, value in draws.items():
        changed = Draws(**{**draws, name: value / 2})
        other = renderer(planes, decoder, *rays, stochastic=True, density_noise_std=std, draws=changed)
        assert not torch.equal(other.rgb, expected.rgb), f"{name} has no effect"


def test_density_noise_is_added_to_the_raw_density():
    """Two values of noise, constant along the ray: a fog of raw density -1 + 0.5 n."""
    renderer, _, planes, *rays = make(last_interval=0.5)
    n = torch.where(torch.arange(16) % 2 == 0, 1.0, -2.0).double()[None, :, None].expand(2, 16, 11)
    result = renderer(
        planes,
        constant((1.0, 1.0, 1.0), -1.0),
        *rays,
        density_noise_std=0.5,
        draws=Draws(coarse_noise=n[..., :6], fine_noise=n),
    )
    density = torch.nn.functional.softplus(-1 + 0.5 * n[..., 0] + 0.3)
    assert_close(result.weight_sum, 1 - torch.exp(-4.5 * density), "opacity", "hand")


def test_noise_of_standard_deviation_zero_is_none():
    renderer, decoder, planes, *rays = make()
    state = torch.get_rng_state()
    first = renderer(planes, decoder, *rays)
    assert torch.equal(torch.get_rng_state(), state)
    zero = renderer(planes, decoder, *rays, density_noise_std=torch.zeros([], dtype=torch.float64))
    assert not torch.equal(torch.get_rng_state(), state)  # a tensor always draws
    assert_close(zero.rgb, first.rgb, "rgb")


def test_gradients_reach_both_passes_and_no_depth():
    renderer, _, planes, *rays = make()
    leaves, asked = [], []

    def field(t):
        asked.append(t)
        leaves.append(draw(*t.shape, 4, seed=len(leaves)).requires_grad_())
        return leaves[-1]

    result = renderer(planes, StubDecoder(field), *rays, stochastic=True)
    (result.rgb.square().sum() + result.depth.sum()).backward()
    assert not asked[1].requires_grad, "the fine t depend on the coarse density"
    for name, leaf in zip(("coarse", "fine"), leaves, strict=True):
        assert leaf.grad[..., :3].abs().sum(dim=(0, 1, 2)).min() > 0, f"{name} colours"
        assert leaf.grad[..., 3].abs().sum() > 0, f"{name} density"


def test_gradients_reach_planes_and_decoder():
    renderer, decoder, planes, *rays = make()
    planes.requires_grad_()
    renderer(planes, decoder, *rays).rgb.sum().backward()
    for name, x in {"planes": planes, **dict(decoder.named_parameters())}.items():
        assert x.grad.abs().sum() > 0, name


def scene(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = RawPlanes(32, 4, 8, dataclasses.replace(SMALL, **settings), CAMERA, num_scenes=2)
    return model.to(dtype).eval()


@pytest.mark.parametrize("samples", [1, 200, 2**18])
def test_chunks_change_nothing(samples, monkeypatch):
    model = scene()
    whole = model(ANGLES, 9)  # with gradients: at once
    calls = []
    model.renderer.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(renderer_module, "EVALUATION_CHUNK", samples)
    with torch.no_grad():
        chunked = model(ANGLES, 9)
    assert len(calls) == {1: 81, 200: 9, 2**18: 1}[samples]  # 200 // (2 images, 11 samples) = 9 rays
    for name, expected in whole._asdict().items():
        assert_close(getattr(chunked, name), expected, name)


def test_chunks_share_the_draws_handed_in(monkeypatch):
    model = scene()
    options = {
        "stochastic": True,
        "density_noise_std": torch.tensor(0.5, dtype=torch.float64),
        "draws": Draws(
            jitter=draw_uniform(2, 25, 6, seed=1),
            u=draw_uniform(2, 25, 5, seed=2),
            coarse_noise=draw(2, 25, 6, seed=3),
            fine_noise=draw(2, 25, 11, seed=4),
        ),
    }
    expected = model(ANGLES, 5, **options)
    monkeypatch.setattr(renderer_module, "EVALUATION_CHUNK", 100)
    with torch.no_grad():
        assert_close(model(ANGLES, 5, **options).rgb, expected.rgb, "rgb")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_patch_is_the_crop_of_the_full_image(dtype):
    """At the scale where pixels coincide: s = (r - 1) / (R - 1), the offset in y counted from the bottom."""
    model = scene(dtype, coarse_samples=12, fine_samples=12)
    full, r = 20, 6
    angles = ANGLES.to(dtype)
    rows, columns = torch.tensor([3, 14]), torch.tensor([9, 0])
    scale = torch.full((2,), (r - 1) / (full - 1), dtype=dtype)
    offset = torch.stack([columns, full - r - rows], dim=1).to(dtype) / (full - 1)
    with torch.no_grad():
        whole, patch = model(angles, full), model(angles, r, Patch(scale, offset))
    for name, image in whole._asdict().items():
        crops = [
            image[i, :, row : row + r, col : col + r]
            for i, (row, col) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))
        ]
        tolerance = "patch_crop" if dtype == torch.float32 else torch.float64
        assert_close(getattr(patch, name), torch.stack(crops), name, tolerance)


def test_images_run_row_by_row_from_the_top():
    """A colour of the world's x, y, z: a level camera at yaw 0 looks along -x, its right is -z, up is y."""

    class Positions(torch.nn.Module):
        def forward(self, planes, ray_origins, ray_directions, t, cube_scale, region=None):
            points = ray_origins[:, :, None] + t[..., None] * ray_directions[:, :, None]
            return torch.cat([points, torch.where(t > 7.99, 100.0, -100.0)[..., None]], dim=-1)

    renderer = Renderer(RendererConfig(coarse_samples=201, fine_samples=0), 6.0, 10.0, 3.8).eval()
    angles = torch.tensor([[0.0, math.pi / 2, 0.0]], dtype=torch.float64)
    images = render_planes(renderer, Positions(), CAMERA, torch.zeros(1, 3, 2, 2).double(), angles, 3)
    half = 8 * math.sin(math.radians(15))  # t = 8 towards the middle of a border
    x, y, z = images.rgb[0]
    assert abs(x[1, 1].item()) < 0.05
    assert abs(y[0, 1].item() - half) < 0.05
    assert abs(y[2, 1].item() + half) < 0.05
    assert abs(z[1, 0].item() - half) < 0.05
    assert abs(z[1, 2].item() + half) < 0.05
    assert tuple(images.depth.shape) == tuple(images.weight_sum.shape) == (1, 1, 3, 3)


def test_field_of_view_per_sample():
    model = scene()
    both = model(ANGLES, 5, fov=torch.tensor([20.0, 30.0], dtype=torch.float64)).rgb
    assert_close(both[1], model(ANGLES, 5).rgb[1], "the camera's own is 30")
    assert_close(both[0], model(ANGLES, 5, fov=20.0).rgb[0], "one number for all")
    assert not torch.allclose(both[0], model(ANGLES, 5).rgb[0])


def test_scenes_of_raw_planes():
    model = scene()
    every = model(ANGLES, 4).rgb
    swapped = model(ANGLES, 4, scenes=torch.tensor([1, 0])).rgb
    first = model(ANGLES, 4, scenes=torch.tensor([0, 0])).rgb
    assert_close(first[0], every[0], "scene 0")
    assert_close(first[1], swapped[1], "scene 0, second camera")
    assert not torch.equal(every, swapped)
    with pytest.raises(ValueError, match=r"scenes must be given \(2 scenes, 1 cameras\)"):
        model(ANGLES[:1], 4)
    torch.manual_seed(0)
    one = RawPlanes(32, 4, 8, SMALL, CAMERA)
    assert abs(one.planes.std().item() - 1) < 0.05
    assert one.planes.is_contiguous(memory_format=torch.channels_last)
    assert one(ANGLES.float(), 4).rgb.shape == (2, 3, 4, 4)
