"""bias_act: the reference against numbers worked by hand and difference quotients."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from checks import assert_close, assert_finite, draw, gradcheck, gradgradcheck, layouts
from epigraf_fast import ops

bias_act = functools.partial(ops.bias_act, backend="reference")
ROOT = 2**0.5

# activation: (at 1, at -1, default gain), from tables, without the gain; selu is 1.0507009873554805 times x for x > 0
# and 1.0507009873554805 * 1.6732632423543772 * (e^x - 1) else.
HAND = {
    "linear": (1.0, -1.0, 1.0),
    "relu": (1.0, 0.0, ROOT),
    "lrelu": (1.0, -0.2, ROOT),
    "tanh": (0.7615941559557649, -0.7615941559557649, 1.0),
    "sigmoid": (0.7310585786300049, 0.2689414213699951, 1.0),
    "elu": (1.0, -0.6321205588285577, 1.0),
    "selu": (1.0507009873554805, -1.1113307378125625, 1.0),
    "softplus": (1.3132616875182228, 0.31326168751822286, 1.0),
    "swish": (0.7310585786300049, -0.2689414213699951, ROOT),
}
ACTIVATIONS = tuple(HAND)


def as_tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values_and_default_gain_by_hand(act):
    at_one, at_minus_one, gain = HAND[act]
    expected = as_tensor([[at_one, at_minus_one]])
    # x + bias is 1 and -1.
    actual = functools.partial(bias_act, as_tensor([[0.75, -3.0]]), as_tensor([0.25, 2.0]), act=act)
    assert_close(actual(), gain * expected, "default gain")
    assert_close(actual(gain=1.0), expected, "gain 1")
    assert_close(actual(gain=-0.5), -0.5 * expected, "gain -0.5")
    assert_close(bias_act(as_tensor([[1.0, -1.0]]), act=act), gain * expected, "no bias")


def test_default_is_linear():
    assert_close(bias_act(as_tensor([[3.0, -2.0]]), as_tensor([1.0, 0.5])), [[4.0, -1.5]], "y")


def test_clamp_acts_after_the_gain():
    y = bias_act(as_tensor([[0.5, 1.0, -1.0, -0.7]]), gain=2.0, clamp=1.5)
    assert_close(y, [[1.0, 1.5, -1.5, -1.4]], "y")
    # lrelu of 1 and -9, times sqrt(2): 1.41421 and -2.54558
    assert_close(bias_act(as_tensor([[1.0, -9.0]]), act="lrelu", clamp=1.5), [[ROOT, -1.5]], "y")


def test_gradient_is_zero_where_clipped():
    x = as_tensor([[0.5, 1.0, -1.0, -0.7]]).requires_grad_()
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    grad_x, grad_bias = torch.autograd.grad(bias_act(x, bias, gain=2.0, clamp=1.5).sum(), (x, bias))
    assert_close(grad_x, [[2.0, 0.0, 0.0, 2.0]], "gradient to x", "exact")
    assert_close(grad_bias, [2.0, 0.0, 0.0, 2.0], "gradient to bias", "exact")


@pytest.mark.parametrize(("act", "slope"), [("relu", 0.0), ("lrelu", 0.2 * ROOT)])
def test_kink_has_the_slope_of_the_negative_side(act, slope):
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bias_act(x, act=act).sum(), x)
    assert_close(gradient, [[slope]], "gradient at 0")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.6])
def test_first_and_second_derivatives(act, clamp):
    # Both sides of every kink, none within a difference step of one.
    x = torch.linspace(-2.1, 2.2, 12, dtype=torch.float64).view(2, 3, 2)
    inputs = {"x": x, "bias": as_tensor([0.03, -0.4, 0.21])}
    function = functools.partial(bias_act, act=act, clamp=clamp, gain=0.9)
    gradcheck(function, inputs, act)
    gradgradcheck(function, inputs, act)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_first_derivative_by_hand(act):
    # From the values at 1: e.g. tanh' = 1 - tanh^2, (x s)' = s + x s (1 - s); elu and selu are linear there.
    s = HAND["sigmoid"][0]
    slope = {
        "tanh": 1 - HAND["tanh"][0] ** 2,
        "sigmoid": s * (1 - s),
        "softplus": s,
        "swish": s + s * (1 - s),
        "selu": HAND["selu"][0],
    }.get(act, 1.0)
    x = as_tensor([[1.0]]).requires_grad_()
    (gradient,) = torch.autograd.grad(bias_act(x, act=act).sum(), x)
    assert_close(gradient, [[slope * HAND[act][2]]], "gradient at 1")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_arguments_are_finite(act, dtype):
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4]], dtype=dtype, requires_grad=True)
    y = bias_act(x, act=act)
    assert_finite(y, "y")
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert_finite(gradient, "gradient")
    (second,) = torch.autograd.grad((gradient * x).sum(), x)
    assert_finite(second, "second derivative")


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -4])
def test_bias_along_any_dimension(dim):
    x = draw(2, 3, 4, 5)
    bias = draw(x.shape[dim], seed=1)
    expected = torch.tanh((x.transpose(dim, -1) + bias).transpose(dim, -1))
    assert_close(bias_act(x, bias, dim=dim, act="tanh"), expected, "y")


def test_default_dimension_is_the_channel():
    x, bias = draw(3, 3, 3), draw(3, seed=1)
    assert_close(bias_act(x, bias), x + bias[:, None], "y")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_dtypes(act, dtype):
    x, bias = draw(2, 3, 4).to(dtype), torch.tensor([0.5, -0.25, 1.0])  # the bias is exact in every dtype
    y = bias_act(x, bias, act=act, clamp=1.5)
    assert y.dtype == dtype
    assert_close(y, bias_act(x.double(), bias, act=act, clamp=1.5), "y")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1), (1,)])
def test_empty_and_single(shape):
    dim = len(shape) // 2
    x, bias = draw(*shape).requires_grad_(), draw(shape[dim], seed=1).requires_grad_()
    y = bias_act(x, bias, dim=dim, act="lrelu", clamp=256)
    assert y.shape == x.shape
    for gradient, of in zip(torch.autograd.grad(y.sum(), (x, bias)), (x, bias), strict=True):
        assert gradient.shape == of.shape


def test_layout_does_not_matter():
    x, bias = draw(2, 3, 4, 5), draw(3, seed=1)
    expected = bias_act(x, bias, act="swish")
    for name, view in layouts(x):
        assert_close(bias_act(view, bias, act="swish"), expected, f"x: {name}")
    for name, view in layouts(bias[None]):
        assert_close(bias_act(x, view[0], act="swish"), expected, f"bias: {name}")
    y = bias_act(x.contiguous(memory_format=torch.channels_last), bias, act="lrelu", clamp=1)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_input_is_not_written_to():
    x, bias = draw(2, 3), draw(3, seed=1)
    bias_act(x, bias, act="lrelu", clamp=0.1)
    assert_close(x, draw(2, 3), "x", "exact")
    assert_close(bias, draw(3, seed=1), "bias", "exact")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x must be floating point, got torch.int32"),
        ({"bias": draw(4)}, ValueError, "bias must have shape [3], got [4]"),
        ({"bias": draw(3, 1)}, ValueError, "bias must have shape [3], got [3, 1]"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias must be on cpu as x is, got meta"),
        ({"dim": 2}, ValueError, "dim must be a dimension of x, which has 2, got 2"),
        ({"dim": -3}, ValueError, "dim must be a dimension of x, which has 2, got -3"),
        ({"act": "gelu"}, ValueError, "act must be one of linear, relu, lrelu"),
        ({"clamp": 0.0}, ValueError, "clamp must be positive or None, got 0.0"),
        ({"clamp": -1}, ValueError, "clamp must be positive or None, got -1"),
        ({"clamp": float("nan")}, ValueError, "clamp must be positive or None, got nan"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=re.escape(f"bias_act: {message}")):
        bias_act(**{"x": draw(2, 3), "bias": draw(3), **change})
