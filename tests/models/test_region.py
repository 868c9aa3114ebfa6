"""Planes of a region against the same texels of the whole planes, and their gradients."""

from __future__ import annotations

import pytest
import torch

from checks import assert_close, draw
from epigraf_fast.models import region as regions
from epigraf_fast.models.region import Region, bucket, levels, region_of
from epigraf_fast.models.synthesis import Synthesis

RESOLUTION = 64
# Firsts of three images, and one size: odd and even places, every border, a texel, a line, all of it.
CASES = {
    "odd and even": ([[0, 0], [5, 7], [20, 33]], (20, 13)),
    "corners": ([[0, 51], [44, 0], [44, 51]], (20, 13)),
    "small": ([[0, 0], [31, 30], [61, 61]], (3, 3)),
    "a texel": ([[0, 0], [17, 42], [63, 63]], (1, 1)),
    "columns": ([[0, 0], [0, 5], [0, 55]], (64, 9)),
    "rows": ([[0, 0], [6, 0], [54, 0]], (10, 64)),
    "nearly whole": ([[0, 0], [1, 0], [1, 1]], (63, 63)),
    "whole": ([[0, 0], [0, 0], [0, 0]], (64, 64)),
}


@pytest.fixture(params=["reference", None])
def synthesis(request, monkeypatch):
    """Of 64x64 planes, computed whole below 16, with noise and biases that are not zero; on both chains."""
    monkeypatch.setattr(regions, "WHOLE_BELOW", 16)
    torch.manual_seed(0)
    network = Synthesis(8, RESOLUTION, 6, channel_base=256, channel_max=8, backend=request.param).double()
    for name, p in network.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.5)
        elif name.endswith("bias") and "affine" not in name:
            p.data.normal_()
    return network


def part_of(planes, at, region):
    """The region's texels of planes that lie where `at` says; None: they are whole."""
    height, width = region.size
    places = (region.first - (0 if at is None else at.first)).tolist()
    return torch.stack([x[:, r : r + height, c : c + width] for x, (r, c) in zip(planes, places, strict=True)])


@pytest.mark.parametrize("case", CASES)
def test_planes_and_gradients_are_those_of_the_whole_network(synthesis, case):
    first, size = CASES[case]
    region = Region(torch.tensor(first), size)
    ws = draw(3, synthesis.num_ws, 8).requires_grad_(True)
    parameters = dict(synthesis.named_parameters())
    inputs = [ws, *parameters.values()]
    whole = part_of(synthesis(ws, "const"), None, region)
    incoming = draw(*whole.shape, seed=1)
    expected = torch.autograd.grad(whole, inputs, incoming)
    planes, at = synthesis.in_region(ws, region, "const")
    part = part_of(planes, at, region)
    assert_close(part, whole, "planes")
    gradients = torch.autograd.grad(part, inputs, incoming)
    for name, got, want in zip(["ws", *parameters], gradients, expected, strict=True):
        assert_close(got / want.abs().amax().clamp(min=1e-30), want / want.abs().amax().clamp(min=1e-30), name)


def test_work_shrinks_with_the_region(synthesis):
    """As many texels are computed as the rim rules say: a box of 13 by 13 at 20, 21 of 64."""
    plan = levels(Region(torch.tensor([[20, 21]]), (13, 13)), RESOLUTION)
    # 13 and three on either side, from and to even texels; half of that, 10 from 8 and 9 on, asks for as many again.
    assert {resolution: level.size for resolution, level in plan.items()} == {32: (18, 18), 64: (20, 20)}
    assert plan[64].first.tolist() == [[16, 18]]
    assert plan[64].below_size == (10, 10)
    assert plan[32].first.tolist() == [[4, 6]]
    assert plan[64].below.tolist() == [[4, 3]]  # 8 and 9, counted from there
    planes, at = synthesis.in_region(draw(1, synthesis.num_ws, 8), Region(torch.tensor([[20, 21]]), (13, 13)))
    assert tuple(planes.shape[2:]) == (20, 20)
    assert at.first.tolist() == [[16, 18]]
    assert at.whole == (RESOLUTION, RESOLUTION)


@pytest.mark.parametrize("change", [-1, 1])
def test_the_rim_is_no_wider_than_needed(change, synthesis, monkeypatch):
    """One texel less of a rim gives wrong planes; one more gives the same."""
    monkeypatch.setattr(regions, "RIM", regions.RIM + change)
    region, ws = Region(torch.tensor([[20, 22]]), (12, 14)), draw(1, synthesis.num_ws, 8)
    part = part_of(*synthesis.in_region(ws, region, "const"), region)
    off = (part - part_of(synthesis(ws, "const"), None, region)).abs().max()
    assert (off < 1e-10) == (change > 0)


@pytest.mark.parametrize(("extent", "fine", "coarse"), [(1, 16, 64), (64, 64, 64), (65, 80, 128), (512, 512, 512)])
def test_buckets_are_32nds_and_eighths(extent, fine, coarse):
    assert bucket(extent, 512) == fine
    assert bucket(extent, 512, 8) == coarse


def test_the_full_size():
    """512x512 texels, with the levels that are computed whole in training."""
    assert regions.WHOLE_BELOW == 128
    torch.manual_seed(0)
    network = Synthesis(8, 512, 6, channel_base=2048, channel_max=8).double()
    region = Region(torch.tensor([[130, 57]]), (192, 224))
    ws = draw(1, network.num_ws, 8).requires_grad_(True)
    whole = part_of(network(ws, "const"), None, region)
    incoming, inputs = draw(*whole.shape, seed=1), [ws, *network.parameters()]
    expected = torch.autograd.grad(whole, inputs, incoming)
    planes, at = network.in_region(ws, region, "const")
    assert planes.shape[2] * planes.shape[3] < 0.2 * 512**2
    part = part_of(planes, at, region)
    assert_close(part, whole, "planes")
    for number, (got, want) in enumerate(zip(torch.autograd.grad(part, inputs, incoming), expected, strict=True)):
        unit = want.abs().amax().clamp(min=1e-30)
        assert_close(got / unit, want / unit, f"gradient {number}")


def test_a_region_holds_every_box():
    boxes = torch.tensor([[0, 0, 100, 60], [500, 450, 512, 512], [200, 37, 260, 165]])
    region = region_of(boxes, 512)
    assert region.size == (112, 128)  # of 100 and of 128
    last = region.first + torch.tensor(region.size)
    assert (region.first >= 0).all()
    assert (last <= 512).all()
    assert (region.first <= boxes[:, :2]).all()
    assert (last >= boxes[:, 2:]).all()
