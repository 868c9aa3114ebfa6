"""The mapping network: its formula, the average of w, truncation."""

from __future__ import annotations

import math

import pytest
import torch

from checks import SIGMAS, assert_close, draw, gradcheck, gradgradcheck
from epigraf_fast.models.mapping import Mapping, StyleMapping, mix_styles, normalize_rms


def lrelu(x):
    return torch.where(x > 0, x, 0.2 * x) * 2**0.5


def test_normalize_rms_by_hand():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    scale = (12.5 + 1e-8) ** -0.5
    assert_close(normalize_rms(x), [[3 * scale, -4 * scale], [0, 0]], "normalized")
    small = torch.full((1, 2), 1e-4, dtype=torch.float64)
    assert_close(normalize_rms(small), [[0.5**0.5] * 2], "the epsilon is inside the root", "hand")


def test_normalize_rms_derivatives():
    inputs = {"x": draw(3, 4)}
    gradcheck(normalize_rms, inputs, "normalized")
    gradgradcheck(normalize_rms, inputs, "normalized")


@pytest.mark.parametrize(("z_dim", "c_dim"), [(5, 0), (5, 3), (0, 3)])
def test_equals_the_formula(z_dim, c_dim):
    torch.manual_seed(0)
    mapping = Mapping(z_dim, c_dim, 4).double()
    for layer in (mapping.fc0, mapping.fc1):
        torch.nn.init.normal_(layer.bias, std=30)
    z, c = draw(7, z_dim, seed=1), draw(7, c_dim, seed=2)
    parts = [z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()] if z_dim else []
    if c_dim:
        torch.nn.init.normal_(mapping.embed.bias)
        y = c @ mapping.embed.weight.T / 3**0.5 + mapping.embed.bias
        parts.append(y / (y.square().mean(dim=1, keepdim=True) + 1e-8).sqrt())
    x = torch.cat(parts, dim=1)
    for layer in (mapping.fc0, mapping.fc1):
        x = lrelu(x @ layer.weight.T * 0.01 / x.shape[1] ** 0.5 + 0.01 * layer.bias)
    assert_close(mapping(z if z_dim else None, c if c_dim else None), x, "w")
    assert hasattr(mapping, "embed") == (c_dim > 0)


def test_initial_w_is_of_order_one():
    torch.manual_seed(0)
    for mapping in (Mapping(512, 0, 512), Mapping(512, 25, 512), Mapping(0, 828, 512)):
        with torch.no_grad():
            w = mapping(torch.randn(16, 512), torch.randn(16, mapping.c_dim))
        assert 0.5 < w.square().mean().sqrt() < 2
        assert 40 < mapping.fc0.weight.std() < 200  # 100


def test_one_w_serves_all_style_vectors():
    torch.manual_seed(0)
    mapping = StyleMapping(5, 3, 4, num_ws=6).double()
    z, c = draw(2, 5, seed=1), draw(2, 3, seed=2)
    ws = mapping(z, c)
    assert_close(ws, Mapping.forward(mapping, z, c)[:, None].expand(2, 6, 4), "ws", "exact")
    assert_close(mapping(3 * z, c), ws, "z enters normalized", torch.float32)


def test_average_of_w():
    torch.manual_seed(0)
    mapping = StyleMapping(5, 0, 4, num_ws=2).double()
    assert not mapping.w_avg.any()
    first, second = draw(8, 5, seed=1), draw(8, 5, seed=2)
    means = [mapping(z, None)[:, 0].mean(dim=0) for z in (first, second)]
    assert not mapping.w_avg.any()  # only where asked for
    ws = mapping(first, None, update_w_avg=True)
    assert_close(mapping.w_avg, 0.002 * means[0], "after one update")
    mapping(second, None, update_w_avg=True)
    assert_close(mapping.w_avg, 0.998 * 0.002 * means[0] + 0.002 * means[1], "after two")
    assert not mapping.w_avg.requires_grad
    assert_close(ws, mapping(first, None), "the update leaves ws alone", "exact")
    assert "w_avg" in mapping.state_dict()


@pytest.mark.parametrize("cutoff", [None, 0, 1, 3])
def test_truncation(cutoff):
    torch.manual_seed(0)
    mapping = StyleMapping(5, 0, 4, num_ws=3).double()
    mapping.w_avg.copy_(draw(4, seed=3))
    z = draw(2, 5, seed=1)
    expected = mapping(z, None).clone()
    cut = 3 if cutoff is None else cutoff
    expected[:, :cut] = mapping.w_avg + 0.7 * (expected[:, :cut] - mapping.w_avg)
    assert_close(mapping(z, None, truncation_psi=0.7, truncation_cutoff=cutoff), expected, "ws")


def test_truncation_to_nothing_is_the_average():
    torch.manual_seed(0)
    mapping = StyleMapping(5, 0, 4, num_ws=3).double()
    mapping.w_avg.copy_(draw(4, seed=3))
    expected = mapping.w_avg.expand(2, 3, 4)
    assert_close(mapping(draw(2, 5, seed=1), None, truncation_psi=0.0), expected, "ws", "exact")


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_style_mixing(probability):
    """The first vectors are kept, at least one; of those mixed, every cutoff in 1..num_ws-1 is equally likely."""
    torch.manual_seed(0)
    num = 12_000
    mixed = mix_styles(torch.zeros(num, 5, 2), torch.ones(num, 5, 2), probability)
    assert torch.equal(mixed[..., 0], mixed[..., 1])
    assert (mixed[:, :, 0].diff(dim=1) >= 0).all()
    kept = (mixed[:, :, 0] == 0).sum(dim=1)
    for cutoff in range(1, 6):
        expected = probability / 4 if cutoff < 5 else 1 - probability
        deviation = SIGMAS * math.sqrt(expected * (1 - expected) / num)
        assert abs((kept == cutoff).double().mean().item() - expected) <= deviation
