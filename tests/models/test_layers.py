"""Layers: effective weights, scaling of channels and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from checks import SIGMAS, assert_close, draw, draw_uniform
from epigraf_fast import ops
from epigraf_fast.models.layers import (
    CLAMP,
    LOW_PASS,
    Affines,
    Conv2d,
    FullyConnected,
    ScalarEncoder,
    camera_numbers,
    channels_at,
    scaled_once,
)

PI = math.pi


def as_tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def lrelu(x):
    return torch.where(x > 0, x, 0.2 * x) * 2**0.5


def assert_statistics(x, mean, std, what):
    """Mean and standard deviation of normal draws."""
    margin = SIGMAS * std / x.numel() ** 0.5
    assert abs(x.mean().item() - mean) < margin, f"{what}: mean {x.mean().item()}, expected {mean}"
    assert abs(x.std().item() - std) < margin, f"{what}: standard deviation {x.std().item()}, expected {std}"


def test_channels():
    assert [channels_at(res, 32768, 512) for res in (4, 64, 128, 512)] == [512, 512, 256, 64]
    assert [channels_at(res, 16384, 512) for res in (512, 256, 64, 16)] == [32, 64, 256, 512]
    assert channels_at(512, 64, 8) == 1


def test_filter():
    assert_close(LOW_PASS, as_tensor([1, 3, 3, 1]) / 8, "[1, 3, 3, 1] of sum 1", "exact")


@pytest.mark.parametrize(("multiplier", "weight_std"), [(1.0, 1.0), (0.01, 100.0)])
def test_fully_connected_initialization(multiplier, weight_std):
    torch.manual_seed(1)
    layer = FullyConnected(400, 50, lr_multiplier=multiplier, bias_init=3.0)
    assert_statistics(layer.weight, 0, weight_std, "raw weights")
    weight, bias = layer.effective()
    assert_statistics(weight, 0, 1 / 20, "effective weights")
    assert_close(bias, torch.full((50,), 3.0), "effective bias", "hand")
    assert_close(layer.bias, torch.full((50,), 3 / multiplier), "raw bias", "hand")


def test_fully_connected_by_hand():
    layer = FullyConnected(4, 2, act="lrelu", lr_multiplier=0.5).double()
    with torch.no_grad():
        layer.weight.copy_(as_tensor([[1, 2, 3, 4], [-1, 0, 0, 1]]))
        layer.bias.copy_(as_tensor([2, -6]))
    # Weights times 0.5 / 2, biases times 0.5: 10 / 4 + 1 and 0 - 3, then lrelu.
    expected = [[3.5 * 2**0.5, -0.6 * 2**0.5]]
    assert_close(layer(torch.ones(1, 4, dtype=torch.float64)), expected, "y")


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_conv2d_is_equalized(kernel_size):
    layer = Conv2d(5, 4, kernel_size).double()
    x = draw(2, 5, 6, 6, seed=1)
    with torch.no_grad():
        layer.weight.copy_(draw(4, 5, kernel_size, kernel_size, seed=2))
        layer.bias.copy_(draw(4, seed=3))
    weight = layer.weight / (5 * kernel_size**2) ** 0.5
    expected = lrelu(torch.nn.functional.conv2d(x, weight, layer.bias, padding=kernel_size // 2))
    assert_close(layer(x), expected, "y")


class Several(torch.nn.Module):
    """A layer of every kind, and linear ones that are computed together."""

    def __init__(self):
        super().__init__()
        self.first = FullyConnected(6, 6, act="lrelu", lr_multiplier=0.01)
        self.linear = torch.nn.ModuleList(FullyConnected(6, n, bias_init=1.0) for n in (4, 3, 4))
        self.affines = Affines(self.linear)
        self.conv = Conv2d(4, 3, 3)

    def forward(self, x):
        a, b, c = self.affines(self.first(x), torch.tanh)
        return (self.conv(a[:, :, None, None] * c[:, None, None, :].mT) * b[:, :, None, None]).square().sum()


def test_linear_layers_together():
    """Those of equal width in one product; given one vector for all, or each its own in `order`."""
    module = Several().double()
    x = draw(3, 2, 6, seed=1)
    assert module.affines.groups == [[0, 2], [1]]
    assert module.affines.order == [0, 2, 1]
    for name, given in (("one for all", x[:1].expand(3, -1, -1)), ("each its own", x)):
        expected = [layer(vectors) for layer, vectors in zip(module.linear, given[[0, 2, 1]], strict=True)]
        actual = module.affines(x[0] if name == "one for all" else x)
        for k, (y, known) in enumerate(zip(actual, expected, strict=True)):
            assert y.is_contiguous()
            assert_close(y, known, f"{name}: layer {k}")
    assert not list(module.affines.parameters())
    assert module.state_dict().keys() == {
        f"{layer}.{kind}"
        for layer in ("first", "linear.0", "linear.1", "linear.2", "conv")
        for kind in ("weight", "bias")
    }


def test_weights_are_scaled_once():
    """Inside of the block nothing is scaled any more, and the gradients are those of before."""
    module = Several().double()
    module.first.bias.requires_grad_(False)
    x = draw(2, 6, seed=2)
    for _ in range(2):
        module(x).backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    with scaled_once(module) as leaves:
        stacked = leaves[id(module.linear[0].weight)]
        assert stacked is leaves[id(module.linear[2].weight)]
        assert_close(stacked[1], module.linear[2].weight / 6**0.5, "in the stack")
        assert_close(leaves[id(module.conv.weight)], module.conv.weight / 6, "of the convolution")
        for _ in range(2):
            module(x).backward()
        assert module.conv.weight.grad is None
    for name, p in module.named_parameters():
        if name == "first.bias":
            assert p.grad is None
        else:
            assert_close(p.grad, expected[name], name)
    with torch.no_grad():
        module.conv.weight.mul_(2)
    assert_close(module.conv.scaled_weight(), module.conv.weight / 6, "after the block the weights are those of now")


def test_weights_are_cast_once(monkeypatch):
    """For all calls in half precision; gradients are the same bits."""
    layer, images = Conv2d(3, 4, 3), [draw(2, 3, 5, 5, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    leaf = layer.scaled_weight().detach().requires_grad_()
    layer.scaled_weight.kept = leaf
    expected = [layer(x) for x in images]
    (expected_grad,) = torch.autograd.grad([y.float().square().sum() for y in expected], leaf)
    layer.scaled_weight.kept = None
    copy, casts = ops.OfWeight.copy, []
    monkeypatch.setattr(
        ops.OfWeight, "copy", lambda self, w, what, make: copy(self, w, what, lambda w: casts.append(what) or make(w))
    )
    with scaled_once(layer) as leaves:
        actual = [layer(x) for x in images]
        (grad,) = torch.autograd.grad([y.float().square().sum() for y in actual], leaves[id(layer.weight)])
    assert casts == [torch.bfloat16]
    assert layer.of_weight is None
    for a, b in zip([*actual, grad], [*expected, expected_grad], strict=True):
        assert torch.equal(a, b)


def test_conv2d_initialization():
    torch.manual_seed(1)
    layer = Conv2d(30, 20, 3)
    assert_statistics(layer.weight, 0, 1, "raw weights")
    assert not layer.bias.any()
    assert Conv2d(3, 4, 1, bias=False).bias is None


def test_conv2d_gain_multiplies_the_clamp_too():
    layer = Conv2d(1, 2, 1, gain=0.5).double()
    with torch.no_grad():
        layer.weight.copy_(as_tensor([1, -10]).view(2, 1, 1, 1))
    x = as_tensor([1, 1000]).view(1, 1, 1, 2)
    low = -2 * 2**0.5 * 0.5  # of -10; and 1000 and -10,000 times 0.2 are beyond 256
    expected = as_tensor([[0.5 * 2**0.5, CLAMP / 2], [low, -CLAMP / 2]]).view(1, 2, 1, 2)
    assert_close(layer(x), expected, "y")
    skip = Conv2d(1, 1, 1, act="linear", bias=False, clamp=None, gain=0.5).double()
    torch.nn.init.ones_(skip.weight)
    assert_close(skip(x), x / 2, "neither bias nor clamp")


def test_conv2d_down_filters_before_it_subsamples():
    layer = Conv2d(1, 1, 1, down=2, act="linear", clamp=None).double()
    torch.nn.init.ones_(layer.weight)
    x = draw(1, 1, 6, 8, seed=4)
    taps = torch.outer(as_tensor(LOW_PASS), as_tensor(LOW_PASS))[None, None]
    assert_close(layer(x), torch.nn.functional.conv2d(x, taps, stride=2, padding=1), "1x1, down 2")
    assert Conv2d(1, 1, 3, down=2)(torch.ones(1, 1, 6, 8)).shape == (1, 1, 3, 4)


@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("scaled", ["input", "output"])
def test_scaling_channels_equals_scaling_the_kernel_of_each_sample(scaled, down):
    """The paper's Eq. 1 against its Eq. 2, and the same for input channels."""
    layer = Conv2d(3, 4, 3, down=down).double()
    torch.nn.init.normal_(layer.bias)
    sigma = 2 * draw_uniform(2, 3 if scaled == "input" else 4, seed=2)
    first = Conv2d(3, 3, 3).double()
    x = first(draw(2, 3, 6, 6, seed=1))
    if scaled == "input":  # the layer before scales what it gives
        y = layer(first(draw(2, 3, 6, 6, seed=1), next_scale=sigma))
    else:
        y = layer(x, out_scale=sigma)
    for i in range(2):
        one = Conv2d(3, 4, 3, down=down).double()
        one.load_state_dict(layer.state_dict())
        with torch.no_grad():
            one.weight *= sigma[i].view((1, 3, 1, 1) if scaled == "input" else (4, 1, 1, 1))
        assert_close(y[i : i + 1], one(x[i : i + 1]), f"sample {i}")


def test_scalar_encoder_by_hand():
    encoder = ScalarEncoder(4).double()  # L = 2: v pi and 2 v pi
    assert encoder.dim == 4
    root = 0.5**0.5
    expected = [[1, 0, 0, -1, root, 1, root, 0], [0, 0, 1, 1, -1, 0, 0, -1]]  # sines, then cosines
    assert_close(encoder(as_tensor([[0.5, 0.25], [0.0, -0.5]])), expected, "encoded", "hand")


@pytest.mark.parametrize(("m", "levels"), [(2, 1), (5, 3), (64, 6), (1000, 10), (1024, 10), (1025, 11)])
def test_scalar_encoder_frequencies(m, levels):
    encoder = ScalarEncoder(m)
    assert encoder.dim == 2 * levels
    assert_close(encoder.frequencies, [m * PI * 2.0 ** (k - levels) for k in range(levels)], "frequencies", "hand")


def test_scalar_encoder_of_fewer_frequencies():
    """What is left out is missing, the rest is as before."""
    values = as_tensor([[0.5, 0.25], [0.3, -0.7]])
    sines, cosines = ScalarEncoder(16).double()(values).unflatten(1, (2, 2, 4)).unbind(2)  # [B, D, L]
    cut = ScalarEncoder(16, skip_lowest=1, skip_highest=2).double()
    assert cut.dim == 2
    expected = torch.stack([sines[..., 1], cosines[..., 1]], dim=-1).flatten(1)
    assert_close(cut(values), expected, "one frequency", "exact")
    without = ScalarEncoder(16, cosines=False).double()
    assert without.dim == 4
    assert_close(without(values), sines.flatten(1), "sines", "exact")


def test_scalar_encoder_table_rounds_halves_to_even():
    encoder = ScalarEncoder(4, table_dim=2).double()
    assert tuple(encoder.table.shape) == (5, 2)
    assert encoder.dim == 6
    encoder.table.data = as_tensor([[row, -row] for row in range(5)])
    values = as_tensor([[0, 1 / 8, 0.374, 3 / 8, 5 / 8, 0.626, 1]])  # times 4: 0, 0.5, 1.496, 1.5, 2.5, 2.504, 4
    encoded = encoder(values).unflatten(1, (7, 6))
    assert_close(encoded[0, :, 4], [0, 0, 1, 2, 2, 3, 4], "rows", "exact")
    assert_close(encoded[0, :, 5], [0, 0, -1, -2, -2, -3, -4], "rows, second column", "exact")
    assert_close(encoded[..., :4].flatten(1), ScalarEncoder(4).double()(values), "the rest")


def test_scalar_encoder_of_patches_has_828_numbers():
    encoder = ScalarEncoder(1000, 256)
    assert tuple(encoder.table.shape) == (1001, 256)
    assert tuple(encoder(torch.rand(2, 3)).shape) == (2, 828)


def test_camera_numbers_by_hand():
    angles = as_tensor([[-PI / 2, PI / 2, 7], [3 * PI, PI, 7], [-5 * PI, 1e-5, 7], [0, 2.5 * PI, 7]])
    expected = [[-0.25, 0.25], [0.5, 0.5], [-0.5, 1e-5 / (2 * PI)], [0, 0.25]]
    assert_close(camera_numbers(angles), expected, "numbers", "hand")
