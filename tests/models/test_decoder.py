"""The decoder: size, formula, and that rays and points agree."""

from __future__ import annotations

import torch

from checks import assert_close, draw, draw_uniform
from epigraf_fast import ops
from epigraf_fast.models.decoder import Decoder


def test_size_and_layout():
    decoder = Decoder()
    assert sum(p.numel() for p in decoder.parameters()) == 2372
    assert tuple(decoder.fc0.weight.shape) == (64, 32)
    assert tuple(decoder.fc1.weight.shape) == (4, 64)
    assert not decoder.fc0.bias.any()
    assert not decoder.fc1.bias.any()


def random_decoder():
    torch.manual_seed(0)
    decoder = Decoder(3, 5).double()
    torch.nn.init.normal_(decoder.fc0.bias)
    torch.nn.init.normal_(decoder.fc1.bias)
    return decoder


def test_points_equal_the_formula():
    decoder, planes = random_decoder(), draw(2, 9, 6, 6, seed=1)
    points = 8 * draw_uniform(2, 11, 3, seed=2) - 4
    x = ops.sample_triplane(planes, points / 3.8, backend="reference")
    x = x @ decoder.fc0.weight.T / 3**0.5 + decoder.fc0.bias
    x = torch.where(x > 0, x, 0.2 * x) * 2**0.5
    expected = x @ decoder.fc1.weight.T / 5**0.5 + decoder.fc1.bias
    assert_close(decoder.at_points(planes, points, 3.8), expected, "colour and raw density")


def test_rays_equal_their_points():
    decoder, planes = random_decoder(), draw(2, 9, 6, 6, seed=1)
    origins, directions = draw(2, 7, 3, seed=2), draw(2, 7, 3, seed=3)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    t = draw_uniform(2, 7, 4, seed=4)
    points = origins[:, :, None] + t[..., None] * directions[:, :, None]
    expected = decoder.at_points(planes, points.flatten(1, 2), 1.5).unflatten(1, (7, 4))
    assert_close(decoder(planes, origins, directions, t, 1.5), expected, "samples")


def test_other_colours():
    decoder = Decoder(3, 5, colours=7).double()
    out = decoder.at_points(draw(1, 9, 4, 4, seed=1), draw(1, 2, 3, seed=2), 1.0)
    assert tuple(out.shape) == (1, 2, 8)
