"""bias_act: every backend against numbers worked by hand and differences, the kernels against the reference."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from checks import (
    assert_close,
    assert_error_within_reference,
    assert_finite,
    draw,
    gradcheck,
    gradgradcheck,
    layouts,
)
from csrc_backends import on_kernels
from epigraf_fast import ops
from epigraf_fast.ops import backends

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
def test_values_and_default_gain_by_hand(bias_act, act):
    at_one, at_minus_one, gain = HAND[act]
    expected = as_tensor([[at_one, at_minus_one]])
    # x + bias is 1 and -1.
    actual = functools.partial(bias_act, as_tensor([[0.75, -3.0]]), as_tensor([0.25, 2.0]), act=act)
    assert_close(actual(), gain * expected, "default gain")
    assert_close(actual(gain=1.0), expected, "gain 1")
    assert_close(actual(gain=-0.5), -0.5 * expected, "gain -0.5")
    assert_close(bias_act(as_tensor([[1.0, -1.0]]), act=act), gain * expected, "no bias")


def test_default_is_linear(bias_act):
    assert_close(bias_act(as_tensor([[3.0, -2.0]]), as_tensor([1.0, 0.5])), [[4.0, -1.5]], "y")


def test_clamp_acts_after_the_gain(bias_act):
    y = bias_act(as_tensor([[0.5, 1.0, -1.0, -0.7]]), gain=2.0, clamp=1.5)
    assert_close(y, [[1.0, 1.5, -1.5, -1.4]], "y")
    # lrelu of 1 and -9, times sqrt(2): 1.41421 and -2.54558
    assert_close(bias_act(as_tensor([[1.0, -9.0]]), act="lrelu", clamp=1.5), [[ROOT, -1.5]], "y")


def test_gradient_is_zero_where_clipped(bias_act):
    x = as_tensor([[0.5, 1.0, -1.0, -0.7]]).requires_grad_()
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    grad_x, grad_bias = torch.autograd.grad(bias_act(x, bias, gain=2.0, clamp=1.5).sum(), (x, bias))
    assert_close(grad_x, [[2.0, 0.0, 0.0, 2.0]], "gradient to x", "exact")
    assert_close(grad_bias, [2.0, 0.0, 0.0, 2.0], "gradient to bias", "exact")


@pytest.mark.parametrize(("act", "slope"), [("relu", 0.0), ("lrelu", 0.2 * ROOT)])
def test_kink_has_the_slope_of_the_negative_side(bias_act, act, slope):
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bias_act(x, act=act).sum(), x)
    assert_close(gradient, [[slope]], "gradient at 0")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.6])
def test_first_and_second_derivatives(bias_act, act, clamp):
    # Both sides of every kink, none within a difference step of one.
    x = torch.linspace(-2.1, 2.2, 12, dtype=torch.float64).view(2, 3, 2)
    inputs = {"x": x, "bias": as_tensor([0.03, -0.4, 0.21])}
    function = functools.partial(bias_act, act=act, clamp=clamp, gain=0.9)
    gradcheck(function, inputs, act)
    gradgradcheck(function, inputs, act)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_first_derivative_by_hand(bias_act, act):
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
def test_far_arguments_are_finite(bias_act, act, dtype):
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4]], dtype=dtype, requires_grad=True)
    y = bias_act(x, act=act)
    assert_finite(y, "y")
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert_finite(gradient, "gradient")
    (second,) = torch.autograd.grad((gradient * x).sum(), x)
    assert_finite(second, "second derivative")


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -4])
def test_bias_along_any_dimension(bias_act, dim):
    x = draw(2, 3, 4, 5)
    bias = draw(x.shape[dim], seed=1)
    expected = torch.tanh((x.transpose(dim, -1) + bias).transpose(dim, -1))
    assert_close(bias_act(x, bias, dim=dim, act="tanh"), expected, "y")


def test_default_dimension_is_the_channel(bias_act):
    x, bias = draw(3, 3, 3), draw(3, seed=1)
    assert_close(bias_act(x, bias), x + bias[:, None], "y")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_dtypes(bias_act, act, dtype):
    x, bias = draw(2, 3, 4).to(dtype), torch.tensor([0.5, -0.25, 1.0])  # the bias is exact in every dtype
    y = bias_act(x, bias, act=act, clamp=1.5)
    assert y.dtype == dtype
    assert_close(y, bias_act(x.double(), bias, act=act, clamp=1.5), "y")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1), (1,)])
def test_empty_and_single(bias_act, shape):
    dim = len(shape) // 2
    x, bias = draw(*shape).requires_grad_(), draw(shape[dim], seed=1).requires_grad_()
    y = bias_act(x, bias, dim=dim, act="lrelu", clamp=256)
    assert y.shape == x.shape
    for gradient, of in zip(torch.autograd.grad(y.sum(), (x, bias)), (x, bias), strict=True):
        assert gradient.shape == of.shape


def test_layout_does_not_matter(bias_act):
    x, bias = draw(2, 3, 4, 5), draw(3, seed=1)
    expected = bias_act(x, bias, act="swish")
    for name, view in layouts(x):
        assert_close(bias_act(view, bias, act="swish"), expected, f"x: {name}")
    for name, view in layouts(bias[None]):
        assert_close(bias_act(x, view[0], act="swish"), expected, f"bias: {name}")
    y = bias_act(x.contiguous(memory_format=torch.channels_last), bias, act="lrelu", clamp=1)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_input_is_not_written_to(bias_act):
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
def test_errors(bias_act, change, error, message):
    with pytest.raises(error, match=re.escape(f"bias_act: {message}")):
        bias_act(**{"x": draw(2, 3), "bias": draw(3), **change})


def derivatives(function, own, dtype, shape, dim, channels_last=False, **settings):
    """y, both gradients and the three second ones, of numbers that `own` can hold, computed in `dtype`."""

    def numbers(*sizes, seed):
        x = draw(*sizes, seed=seed).to(own).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x

    x, grad_y = numbers(*shape, seed=0).requires_grad_(), numbers(*shape, seed=2).requires_grad_()
    bias = numbers(shape[dim], seed=1).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    y = function(x, bias, dim=dim, **settings)
    first = torch.autograd.grad(y, (x, bias), grad_y, create_graph=True)
    mixed = (first[0] * numbers(*shape, seed=3)).sum() + (first[1] * numbers(shape[dim], seed=4)).sum()
    second = torch.autograd.grad(mixed, (grad_y, x, bias), materialize_grads=True, allow_unused=True)
    names = "y", "to x", "to bias", "to the gradient, again", "to x, again", "to bias, again"
    return dict(zip(names, (y, *first, *second), strict=True))


@on_kernels("bias_act")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((2, 16, 9, 8), 1), ((2, 3, 40, 41), 1), ((5, 70), 1), ((130,), 0), ((3, 4, 5), -1), ((0, 3, 2), 1)],
)
def test_error_is_that_of_the_reference(bias_act, backend, act, dtype, shape, dim):
    reference = functools.partial(ops.bias_act, backend="reference")
    settings = {"act": act, "clamp": 1.5}
    truth = derivatives(reference, dtype, torch.float64, shape, dim, **settings)
    expected = derivatives(reference, dtype, dtype, shape, dim, **settings)
    for channels_last in (False, True):
        for what, actual in derivatives(bias_act, dtype, dtype, shape, dim, channels_last, **settings).items():
            assert_error_within_reference(actual, expected[what], truth[what], what)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_kinks_are_those_of_the_reference(bias_act, act):
    # 0, both clamps, and the values next to them, in exact numbers.
    x = as_tensor([[-2.0, -1.5, -1.0, -0.0, 0.0, 1.0, 1.5, 2.0]]).requires_grad_()
    for clamp in (None, 1.0, 1.5):
        settings = {"act": act, "gain": 1.0, "clamp": clamp}
        results = []
        for function in (bias_act, functools.partial(ops.bias_act, backend="reference")):
            y = function(x, **settings)
            (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
            (second,) = torch.autograd.grad((first + 0 * x).sum(), x)
            results.append((y, first, second))
        for what, actual, expected in zip(("y", "first", "second"), *results, strict=True):
            assert_close(actual, expected, f"{what}, clamp {clamp}")


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_levels_and_threads_agree(act, cpu_level, threads):
    function = functools.partial(ops.bias_act, backend="cpu")
    for channels_last in (False, True):
        results = []
        for count in (1, 3):
            threads(count)
            results.append(
                derivatives(
                    function, torch.float32, torch.float32, (3, 24, 32, 33), 1, channels_last, act=act, clamp=1.0
                )
            )
        for what, actual in results[1].items():
            assert_close(actual, results[0][what], f"{cpu_level} {what}", "exact")


@on_kernels("bias_act")
def test_third_derivative_is_refused(bias_act, backend):
    x = draw(2, 3).requires_grad_()
    for _ in range(2):
        (x_,) = torch.autograd.grad(bias_act(x, act="tanh").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(x_.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), x)


@on_kernels("bias_act")
def test_without_a_clamp_linear_saves_nothing(bias_act, backend):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        bias_act(draw(2, 3).requires_grad_(), draw(3, seed=1).requires_grad_())
    assert not saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 0}, "x must not be a null pointer"),
        ({"y": 0}, "y must not be a null pointer"),
        ({"x": 10}, "x must be aligned to its elements of 4 bytes, got 10"),
        ({"bias": 2}, "bias must be aligned"),
        ({"dtype": -1}, "dtype must be a code from 0 to 3, got -1"),
        ({"act": 9}, "act must be from 0 to 8, got 9"),
        ({"clamp": 0.0}, "clamp must be positive"),
        ({"clamp": float("nan")}, "clamp must be positive"),
        ({"count": -6}, "count must be at least 0"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"channels": 4}, "count must be a multiple of channels * inner, got 6, 4 and 1"),
        ({"inner": 1 << 48}, "count must be a multiple of channels * inner"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_binding_refuses_what_cannot_be_right(change, message):
    reason = backends.status()["bias_act"]["cpu"]
    if reason is not None:
        pytest.skip(reason)
    from epigraf_fast import _C

    x, bias, y = torch.ones(2, 3), torch.ones(3), torch.empty(2, 3)
    arguments = {"x": x.data_ptr(), "bias": bias.data_ptr(), "y": y.data_ptr(), "dtype": 0, "act": 0, "gain": 1.0}
    arguments |= {"clamp": 1.5, "count": 6, "channels": 3, "inner": 1, "threads": 1}
    _C.bias_act_fwd_cpu(*arguments.values())
    assert_close(y, torch.full((2, 3), 1.5), "y")
    with pytest.raises(ValueError, match=re.escape(f"bias_act_fwd: {message}")):
        _C.bias_act_fwd_cpu(*{**arguments, **change}.values())


def test_activations_have_the_numbers_of_the_extension():
    reason = backends.status()["bias_act"]["cpu"]
    if reason is not None:
        pytest.skip(reason)
    from epigraf_fast import _C

    assert _C.BIAS_ACT_ACTIVATIONS == ACTIVATIONS
