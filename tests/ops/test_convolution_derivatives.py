"""Convolutions with derivatives of their own: torch's numbers, and nothing that is not asked for."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from checks import assert_close, draw
from epigraf_fast.ops.convolution_derivatives import conv2d, conv_transpose2d

CASES = {
    "3x3": (lambda f, x, w: f[0](x, w, padding=1), (5, 3, 3, 3)),
    "1x1": (lambda f, x, w: f[0](x, w), (5, 3, 1, 1)),
    "down": (lambda f, x, w: f[0](x, w, stride=2), (5, 3, 3, 3)),
    "up": (lambda f, x, w: f[1](x, w.transpose(0, 1), stride=2), (5, 3, 3, 3)),
}


class Seen(TorchDispatchMode):
    """Which convolutions, and which gradients of them, were computed."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::convolution_backward":
            for what, asked in zip(("to x", "to weight"), args[-1], strict=False):
                self.counts[what] += asked
        elif name == "aten::convolution":
            self.counts["forward"] += 1
        return func(*args, **(kwargs or {}))


def derivatives(call, functions, x, weight):
    """Output, first and second derivatives, as R1 and the path lengths take them."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = call(functions, x, weight)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (grad_weight,) = torch.autograd.grad(call(functions, x, weight).square().sum(), weight, create_graph=True)
    seconds = torch.autograd.grad(grad_x.square().sum() + grad_weight.square().sum(), (x, weight))
    return y, grad_x, grad_weight, *seconds


@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_torchs(case):
    call, shape = CASES[case]
    x, weight = draw(2, 3, 7, 7), draw(*shape, seed=1)
    actual = derivatives(call, (conv2d, conv_transpose2d), x, weight)
    expected = derivatives(call, (F.conv2d, F.conv_transpose2d), x, weight)
    names = "y", "grad x", "grad weight", "second to x", "second to weight"
    for name, a, b in zip(names, actual, expected, strict=True):
        assert_close(a, b, name)


def test_nothing_that_is_not_asked_for():
    """A gradient to the image alone has none to the weight; its derivative has one, laid out as the weight."""
    x = draw(2, 3, 8, 8).requires_grad_()
    weight = draw(4, 3, 3, 3, seed=1).requires_grad_()
    with Seen() as seen:
        y = conv2d(x, weight, padding=1)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert seen.counts == {"forward": 1, "to x": 1, "to weight": 0}
    strides = []
    weight.register_hook(lambda grad: strides.append(grad.stride()))
    with Seen() as seen:
        grad.square().sum().backward()
    assert (seen.counts["forward"], seen.counts["to weight"]) == (0, 1)  # y.sum() is linear: its own gradient is fixed
    assert strides == [weight.stride()]
    with Seen() as seen, torch.no_grad():
        conv2d(x, weight)
    assert seen.counts == {"forward": 1}
