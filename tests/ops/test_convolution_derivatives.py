"""Convolutions with derivatives of their own: torch's numbers, and nothing that is not asked for."""

from __future__ import annotations

import collections
import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from checks import assert_close, draw
from epigraf_fast.ops import convolution
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


@pytest.fixture
def split():
    convolution.split_from(1)
    yield convolution.conv2d, convolution.conv_transpose2d
    convolution.split_from(None)


def products(of):
    """Names -> derivatives, of many or dual directions, of a function of x and weight that gives y."""

    def first(x, weight, **more):
        y = of(x, weight)
        return torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True, **more)

    def batched(x, weight):
        y = of(x, weight)
        return torch.autograd.grad(y, (x, weight), draw(3, *y.shape, seed=2, dtype=x.dtype), is_grads_batched=True)

    def batched_twice(x, weight):
        grads = first(x, weight)
        along = [draw(3, *grad.shape, seed=3, dtype=x.dtype) for grad in grads]
        return torch.autograd.grad(grads, (x, weight), along, is_grads_batched=True)

    def dual(x, weight):
        y = of(x, weight)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(*(draw(*y.shape, seed=seed, dtype=x.dtype) for seed in (4, 5)))
            grads = torch.autograd.grad(y, (x, weight), grad)
            return [part for grad in grads for part in forward_ad.unpack_dual(grad)]

    def transformed(x, weight):
        x, weight = x.detach(), weight.detach()
        tangents = draw(*x.shape, seed=6, dtype=x.dtype), draw(*weight.shape, seed=7, dtype=x.dtype)
        loss = torch.func.grad(lambda x, weight: of(x, weight).square().sum(), argnums=(0, 1))
        many = torch.stack([x, -2 * x])
        values = (
            torch.func.vmap(of, in_dims=(0, None))(many, weight),
            *torch.func.vmap(loss, in_dims=(0, None))(many, weight),
        )
        return *values, *torch.func.jvp(of, (x, weight), tangents), *torch.func.jvp(loss, (x, weight), tangents)[1]

    return {"batched": batched, "batched twice": batched_twice, "dual": dual, "torch.func": transformed}


@pytest.mark.parametrize("case", ["3x3", "down", "up"])
def test_split_products_of_many_or_dual_directions(case, split):
    """Where factors have no bits to take apart: torch's own numbers, in fp32."""
    call, shape = CASES[case]
    inputs = draw(2, 3, 7, 7), draw(*shape, seed=1)
    found = {}
    for dtype, functions in ((torch.float32, split), (torch.float64, (F.conv2d, F.conv_transpose2d))):
        of = functools.partial(call, functions)
        found[dtype] = {
            name: make(*(x.to(dtype).requires_grad_() for x in inputs)) for name, make in products(of).items()
        }
    for name, expected in found[torch.float64].items():
        for number, (a, b) in enumerate(zip(found[torch.float32][name], expected, strict=True)):
            largest = b.abs().max()
            assert_close(a / largest, (b / largest).float(), f"{name} {number}")


def test_split_products_of_a_negated_view(split):
    x, weight = draw(2, 3, 7, 7).float(), draw(5, 3, 3, 3, seed=1).float()
    assert torch.equal(split[0](torch._neg_view(x), weight), split[0](-x, weight))
