"""The assertions themselves fail where they should, and say what failed."""

from __future__ import annotations

import pytest
import torch

from checks import (
    assert_close,
    assert_error_within_reference,
    assert_finite,
    draw,
    draw_uniform,
    gradcheck,
    gradgradcheck,
    layouts,
    roundings,
)
from epigraf_fast.ops.checks import resolve_deterministic
from epigraf_fast.training import networks, pretrained, start


def test_products_are_not_rounded_to_tf32():
    """Nor after a test that has asked for it, as training in tf32 does."""
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic


def test_poisoned_memory_changes_nothing_about_sums(poisoned):
    assert torch.empty(3).isnan().all()
    assert not resolve_deterministic(None)


def test_the_device_that_commands_take_by_default_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(networks, "_require_code", lambda device: None)
    assert networks.find_device(None).type == "cuda"
    assert pretrained.find_device(None).type == start.find_device(None).type == "cpu"
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pretrained.find_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]  # what asks for a stream or an event without a device means this one


def test_assert_close_names_the_tensor_and_the_worst_element():
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    assert_close(actual, expected, "rgb")
    actual[1, 2], actual[0, 1] = 0.5, 0.1
    with pytest.raises(AssertionError, match=r"rgb: 2 of 6 values are off, the worst at \(1, 2\): got 0.5"):
        assert_close(actual, expected, "rgb")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_assert_close_looks_at_nan_and_infinity_first(bad):
    x = torch.tensor([0.0, bad])
    with pytest.raises(AssertionError, match=r"depth: 1 of 2 values are NaN or infinite, the first at \(1,\)"):
        assert_close(x, torch.tensor([5.0, 0.0]), "depth")
    with pytest.raises(AssertionError, match=r"depth \(expected\)"):
        assert_close(x, x, "depth")  # even where both agree
    with pytest.raises(AssertionError, match="depth: 1 of 2"):
        assert_finite(x, "depth")


def test_assert_close_refuses_another_shape():
    with pytest.raises(AssertionError, match=r"u: shape \[3\], expected \[1, 3\]"):
        assert_close(torch.zeros(3), torch.zeros(1, 3), "u")


def test_tolerance_is_that_of_the_actual_dtype():
    assert_close(torch.tensor(1.0) + 5e-6, 1.0, "float32")
    with pytest.raises(AssertionError, match="float64"):
        assert_close(torch.tensor(1.0, dtype=torch.float64) + 5e-6, 1.0, "float64")


def test_error_may_be_twice_that_of_the_reference():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    reference = torch.tensor([1.0, 2.001])
    assert_error_within_reference(torch.tensor([1.0019, 2.0]), reference, truth, "y")
    with pytest.raises(AssertionError, match=r"y: the error 0.0021 at \(0,\)"):
        assert_error_within_reference(torch.tensor([1.0021, 2.0]), reference, truth, "y")


def test_error_of_one_rounding_passes_beside_an_exact_reference():
    truth = torch.tensor([1.0, 3.0], dtype=torch.float64)
    off_by_one = torch.tensor([1.0, 3.0]).nextafter(torch.tensor(9.0))
    assert_error_within_reference(off_by_one, truth.float(), truth, "y")
    with pytest.raises(AssertionError, match="y: the error"):
        assert_error_within_reference(off_by_one + 1e-5, truth.float(), truth, "y")


def test_the_arithmetic_of_a_kernel_may_round_more():
    """A product of two factors in two parts each; a thousand terms one after the other."""
    assert roundings() == 0
    a, b = (draw_uniform(200_000, seed=seed).add(1).float() for seed in (1, 2))

    def cut(x):  # to the 11 bits of TF32
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    def parts(x):
        high = cut((x.view(torch.int32) + 0x1000).view(torch.float32))
        return high.double(), cut(x - high).double()

    (a1, a2), (b1, b2) = parts(a), parts(b)
    truth = a.double() * b.double()
    error = ((a1 * b1 + (a1 * b2 + a2 * b1) - truth).abs() / truth).max().item() / 2**-23
    assert 0.3 * roundings(products=1) < error <= roundings(products=1)

    x = draw(1000, 5000, seed=3).float()
    total = torch.zeros(5000)
    for row in x:
        total += row
    errors = (total - x.double().sum(0)) / total.abs().max() / 2**-23
    assert errors.std() < 1000**0.5 / 10
    assert 0.3 * roundings(terms=1000) < errors.abs().max() <= roundings(terms=1000)

    truth = torch.tensor([1.0, 3.0], dtype=torch.float64)
    off = (truth * (1 + 9 * 2**-23)).float()
    assert_error_within_reference(off, truth.float(), truth, "y", roundings(products=1))
    for more in (0, roundings(terms=100), roundings(approximations=2)):
        with pytest.raises(AssertionError, match="y: the error"):
            assert_error_within_reference(off, truth.float(), truth, "y", more)


def test_error_needs_a_float64_truth_and_equal_dtypes():
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="dtypes"):
        assert_error_within_reference(x, x, x, "y")
    with pytest.raises(AssertionError, match="dtypes"):
        assert_error_within_reference(x.half(), x, x.double(), "y")


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad_y):
        return 2 * grad_y


class _DetachedGradient(torch.autograd.Function):
    """x^2 whose backward forgets that it depends on x: what a bare kernel call in a backward does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad_y


def test_gradcheck_names_the_wrong_gradient():
    inputs = {"a": draw(2, seed=1), "b": draw(2, seed=2)}
    gradcheck(lambda a, b: (a * b, a.exp()), inputs, "product")
    with pytest.raises(AssertionError, match="product: gradient to b"):
        gradcheck(lambda a, b: a * _WrongGradient.apply(b), inputs, "product")


class _Restless(torch.autograd.Function):
    """x, with a gradient that differs by a part `step` from call to call, as sums in any order do."""

    @staticmethod
    def forward(ctx, x, step, calls):
        ctx.step, ctx.calls = step, calls
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        ctx.calls.append(1)
        return grad_y * (1 + ctx.step * len(ctx.calls)), None, None


def test_gradcheck_allows_sums_in_any_order():
    inputs, calls = {"x": draw(2)}, []
    gradcheck(lambda x: _Restless.apply(x, 1e-12, calls), inputs, "sum")
    with pytest.raises(AssertionError, match="not reentrant"):
        gradcheck(lambda x: _Restless.apply(x, 1e-8, calls), inputs, "sum")


def test_gradgradcheck_names_the_wrong_second_derivative():
    inputs = {"a": draw(2, seed=1), "b": draw(2, seed=2)}
    gradgradcheck(lambda a, b: (a * b, (a * b).exp()), inputs, "product")
    gradcheck(lambda a, b: a * _DetachedGradient.apply(b), inputs, "product")
    with pytest.raises(AssertionError, match="product: gradient to b, differentiated to b"):
        gradgradcheck(lambda a, b: a * _DetachedGradient.apply(b), inputs, "product")


def test_layouts_keep_the_values():
    x = draw(2, 3, 4, 5)
    names = []
    for name, view in layouts(x):
        names.append(name)
        assert not view.is_contiguous()
        assert_close(view, x, name, "exact")
    assert len(names) == 3
