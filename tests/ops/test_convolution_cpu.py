"""The gradient to a weight as matrix products: torch's numbers in float64, for every stride, padding and size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import draw
from epigraf_fast.ops import convolution_cpu
from epigraf_fast.ops.convolution_derivatives import conv2d, conv_transpose2d
from epigraf_fast.ops.convolution_layout import Plan

LAST = torch.channels_last


def inputs(plan, batch, c_in, c_out, height, width, k, dtype=torch.float64):
    """x, weight and the gradient of the result."""
    x = draw(batch, c_in, height, width, dtype=dtype).contiguous(memory_format=LAST)
    weight = draw(*((c_in, c_out) if plan.transposed else (c_out, c_in)), k, k, seed=1, dtype=dtype)
    y = torch.ops.aten.convolution(x, weight, None, *plan.arguments())
    return x, weight, draw(*y.shape, seed=2, dtype=dtype).contiguous(memory_format=LAST)


def torchs(grad, x, weight, plan):
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *plan.arguments(), [False, True, False])[1]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_gradient_of_any_convolution(data):
    """Sums in chunks of a few pixels, so that their borders lie anywhere."""

    def number(low, high):
        return data.draw(st.integers(low, high))

    k, stride, transposed = 2 * number(0, 2) + 1, number(1, 3), data.draw(st.booleans())
    plan = Plan(stride, number(0, k // 2), transposed)
    sizes = number(1, 3), number(1, 4), number(1, 4), number(k, 9), number(k, 9)
    x, weight, grad = inputs(plan, *sizes, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_cpu, "CHUNK", number(1, 300))
        found = convolution_cpu.gradient_of_weight(grad, x, weight, plan)
    expected = torchs(grad, x, weight, plan)
    assert found.shape == weight.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("transposed", [False, True])
def test_single_precision_is_no_worse_than_onednns(transposed):
    plan = Plan(2, 0, True) if transposed else Plan(1, 1, False)
    x, weight, grad = inputs(plan, 1, 16, 24, 96, 80, 3, torch.float32)
    truth = torchs(grad.double(), x.double(), weight.double(), plan)
    ours, theirs = (
        (found - truth).norm() / truth.norm()
        for found in (convolution_cpu.gradient_of_weight(grad, x, weight, plan), torchs(grad, x, weight, plan))
    )
    assert ours < 1e-6
    if convolution_cpu._is_slow():  # where oneDNN is taken, it computes in another way
        assert ours < 2 * theirs


@pytest.mark.parametrize("laid_out", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("up", [False, True])
def test_it_is_taken_where_onednn_is_slow(up, laid_out, monkeypatch):
    """Large fp32 convolutions of channels_last images on AVX2; the result lies as torch's does, derivatives go on."""
    taken, real = [], convolution_cpu.gradient_of_weight
    monkeypatch.setattr(convolution_cpu, "gradient_of_weight", lambda *args: taken.append(args) or real(*args))
    monkeypatch.setattr(convolution_cpu, "LEAST", 5_000)
    monkeypatch.setattr(convolution_cpu, "LEAST_CHANNELS", 4)
    monkeypatch.setattr(convolution_cpu, "_is_slow", lambda: True)
    shape = (4, 6, 3, 3)

    def gradients(x, weight):
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = conv_transpose2d(x, weight, stride=2) if up else conv2d(x, weight.transpose(0, 1), padding=1)
        grad_x, grad = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return grad, *torch.autograd.grad(grad.square().sum() + grad_x.square().sum(), (x, weight))

    x = draw(2, 4, 12, 12, dtype=torch.float32).contiguous(memory_format=LAST)
    weight = draw(*shape, seed=1, dtype=torch.float32).contiguous(memory_format=laid_out)
    found = gradients(x, weight)
    assert len(taken) == 3  # the gradient; in the next ones that to the weight through either gradient
    monkeypatch.setattr(convolution_cpu, "_is_slow", lambda: False)
    expected = gradients(x, weight)
    assert len(taken) == 3
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
        assert a.stride() == b.stride()

    monkeypatch.setattr(convolution_cpu, "_is_slow", lambda: True)
    others = (
        (x.double(), weight.double(), 1),
        (x.contiguous(), weight, 1),  # as it lies oneDNN is fast
        (x[:1, :, :4, :4].contiguous(memory_format=LAST), weight, 1),  # small
        (x, weight[..., 1:2, 1:2], 0),
        (x.repeat(1, 1, 4, 4)[:, :3], weight[:3], 1),  # few channels
    )
    for image, kernel, padding in others:
        conv2d(image, kernel.transpose(0, 1).clone().requires_grad_(), padding=padding).sum().backward()
    assert len(taken) == 3
    nothing = weight.new_zeros(6, 0, 3, 3).requires_grad_()
    conv2d(x[:, :0], nothing, padding=1).sum().backward()
    assert nothing.grad.shape == nothing.shape
    conv2d(x, weight.transpose(0, 1).clone().requires_grad_(), padding=1).sum().backward()
    assert len(taken) == 4
