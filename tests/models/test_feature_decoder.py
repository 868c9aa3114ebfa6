"""Decoders of the ablations: Fourier features, view directions (method.md 3)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from checks import assert_close, draw, draw_uniform
from epigraf_fast import ops
from epigraf_fast.models.feature_decoder import FeatureDecoder, encode_directions


def random_decoder(**settings) -> FeatureDecoder:
    torch.manual_seed(0)
    decoder = FeatureDecoder(3, 5, **settings).double()
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return decoder


def linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T / math.sqrt(x.shape[-1]) + layer.bias


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def test_directions_by_hand() -> None:
    """v, sin(pi v), sin(2 pi v), sin(4 pi v), coordinate by coordinate."""
    encoded = encode_directions(torch.tensor([[1 / 6, -0.25, 1.0]], dtype=torch.float64))
    half = math.sqrt(3) / 2
    expected = [1 / 6, 0.5, half, half, -0.25, -math.sqrt(0.5), -1, 0, 1, 0, 0, 0]
    assert_close(encoded, torch.tensor([expected]), "encoded", "hand")


def test_fourier_features_are_appended() -> None:
    decoder, planes = random_decoder(fourier=4), draw(2, 9, 6, 6, seed=1)
    points = (2 * draw_uniform(2, 11, 3, seed=2) - 1) * 3.8
    features = ops.sample_triplane(planes, points / 3.8, backend="reference")
    parts = [features]
    for coordinate in range(3):
        v = points[..., coordinate : coordinate + 1] / 3.8
        pi = torch.tensor(math.pi).double()  # as a float32 buffer holds it
        parts += [(v * pi).sin(), (2 * v * pi).sin(), (v * pi).cos(), (2 * v * pi).cos()]
    expected = linear(decoder.fc1, lrelu(linear(decoder.fc0, torch.cat(parts, dim=-1))))
    assert_close(decoder.at_points(planes, points, 3.8), expected, "colour and raw density")


def test_view_direction_equals_the_formula() -> None:
    decoder, planes = random_decoder(view_direction=True), draw(2, 9, 6, 6, seed=1)
    origins, directions = draw(2, 7, 3, seed=2), torch.nn.functional.normalize(draw(2, 7, 3, seed=3), dim=-1)
    t = draw_uniform(2, 7, 4, seed=4)
    points = (origins[:, :, None] + t[..., None] * directions[:, :, None]).flatten(1, 2)
    x = ops.sample_triplane(planes, points / 1.5, backend="reference")
    x = linear(decoder.fc1, lrelu(linear(decoder.fc0, x)))
    assert x.shape[-1] == 6
    hidden = torch.where(x[..., :-1] > 0, x[..., :-1], 0.1 * x[..., :-1])
    seen = encode_directions(directions)[:, :, None].expand(-1, -1, 4, -1).flatten(1, 2)
    colour = linear(decoder.view1, lrelu(linear(decoder.view0, torch.cat([hidden, seen], dim=-1))))
    assert decoder.view0.weight.shape == (32, 5 + 12)
    expected = torch.cat([colour, x[..., -1:]], dim=-1).unflatten(1, (7, 4))
    assert_close(decoder(planes, origins, directions, t, 1.5), expected, "samples")


def test_density_does_not_see_the_direction() -> None:
    decoder, planes = random_decoder(view_direction=True), draw(1, 9, 6, 6, seed=1)
    origins = draw(1, 1, 3, seed=2).expand(1, 2, 3)
    directions = torch.nn.functional.normalize(draw(1, 2, 3, seed=3), dim=-1)
    a, b = decoder(planes, origins, directions, torch.zeros(1, 2, 1).double(), 3.0)[0, :, 0]
    assert_close(a[-1], b[-1], "density")
    assert (a[:3] - b[:3]).abs().min() > 1e-3


@pytest.mark.parametrize("settings", [{"fourier": 4}, {"view_direction": True}, {"fourier": 4, "view_direction": True}])
def test_coarse_to_fine_is_two_passes(settings) -> None:
    decoder, planes = random_decoder(**settings), draw(2, 9, 6, 6, seed=1)
    rays = draw(2, 7, 3, seed=2), torch.nn.functional.normalize(draw(2, 7, 3, seed=3), dim=-1)
    t, seen = draw_uniform(2, 7, 4, seed=4), []

    def resample(values: Tensor) -> Tensor:
        seen.append(values)
        return t[..., :2] + 0.1

    coarse, t_fine, fine = decoder.coarse_to_fine(planes, *rays, t, resample, 1.5)
    assert_close(coarse, decoder(planes, *rays, t, 1.5), "coarse")
    assert_close(fine, decoder(planes, *rays, t[..., :2] + 0.1, 1.5), "fine")
    assert torch.equal(t_fine, t[..., :2] + 0.1)
    assert torch.equal(seen[0], coarse)
    assert not seen[0].requires_grad


def test_the_generator_takes_it(tiny_generator) -> None:
    """The picture turns with the direction alone."""
    angles = torch.tensor([[0.4, 1.2, 0.0]], dtype=torch.float64)
    for settings in ({"decoder_fourier": 4}, {"view_direction": True}):
        generator = tiny_generator(**settings)
        assert isinstance(generator.decoder, FeatureDecoder)
        generator(draw(1, 6), angles, resolution=4).rgb.square().sum().backward()
        for name, parameter in generator.decoder.named_parameters():
            assert parameter.grad.abs().max() > 0, name
