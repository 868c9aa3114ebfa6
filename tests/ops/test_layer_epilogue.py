"""What follows a modulated convolution, on every backend that is here, against the reference in float64."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch

import checks
from checks import (
    assert_close,
    assert_error_within_reference,
    draw,
    layouts,
    roundings,
)
from csrc_backends import check_derivatives, cpu_levels, here, on_backend, on_kernels, use
from epigraf_fast import ops
from epigraf_fast.ops import backends, native


@pytest.fixture(params=here("modulated_conv2d"))
def backend(request, monkeypatch):
    return use(request.param, monkeypatch)


@pytest.fixture
def layer_epilogue(backend):
    return on_backend(ops.layer_epilogue, backend)


def epilogue_inputs(batch, channels, height, width, *, blur=False, styles=1, dtype=torch.float64):
    """Every argument, of which a gradient is taken, and the settings."""
    size = (height + 1, width + 1) if blur else (height, width)
    inputs = {
        "x": draw(batch, channels, *size, seed=1, dtype=dtype),
        "demod": draw(batch, channels, seed=2).abs().add(0.3),
        "noise": draw(batch, 1, height, width, seed=3),
        "strength": draw(seed=4),
        "bias": draw(channels, seed=5),
        **{f"style{k}": draw(batch, channels, seed=6 + k) for k in range(styles)},
    }
    return inputs, {"blur": SKEWED.clone() if blur else None, "act": "lrelu", "clamp": 1.7}


SKEWED = torch.tensor([1, 3, 2.5, 1.5], dtype=torch.float64) / 8  # no mirror image of itself


def call_epilogue(op, settings, **inputs):
    styles = tuple(inputs.pop(name) for name in sorted(inputs) if name.startswith("style"))
    return op(**inputs, styles=styles or (None,), **settings)


def derivatives(op, inputs, settings, order=2):
    """Outputs, first, and second derivatives, by name."""
    return checks.derivatives(functools.partial(call_epilogue, op, settings), inputs, order)


SIZES = [(2, 3, 4, 5), (1, 1, 1, 1), (2, 5, 70, 3), (1, 9, 35, 600), (3, 4, 1, 7)]


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("styles", [0, 1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_epilogue_equals_the_reference(layer_epilogue, size, blur, styles, channels_last, poisoned):
    inputs, settings = epilogue_inputs(*size, blur=blur, styles=styles)
    expected = derivatives(functools.partial(ops.layer_epilogue, backend="reference"), inputs, settings)
    if channels_last:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    for name, actual in derivatives(layer_epilogue, inputs, settings).items():
        assert_close(actual, expected[name], name)


def largest_term_of_demod(inputs, settings, styles):
    """From the outputs y the gradient to demod is (sum grad_y y - strength sum gu noise - bias sum gu) / demod: the
    largest of those terms, float64."""
    names, largest = ("demod", "strength", "bias"), 0.0
    size = torch.broadcast_shapes(inputs["demod"][..., None, None].shape, inputs["noise"].shape)
    grads = [draw(*size, seed=40 + k) for k in range(max(styles, 1))]  # as `checks.derivatives` has them
    for b, c in itertools.product(range(size[0]), range(size[1])):
        part = {name: x[b : b + 1] if x.ndim > 1 else x[c : c + 1] if x.ndim else x for name, x in inputs.items()}
        part = {name: x[:, c : c + 1] if x.ndim > 1 and name != "noise" else x for name, x in part.items()}
        leaves = {name: part[name].clone().requires_grad_() for name in names}
        ys = call_epilogue(functools.partial(ops.layer_epilogue, backend="reference"), settings, **part | leaves)
        found = torch.autograd.grad(ys, [*leaves.values()], [g[b : b + 1, c : c + 1] for g in grads])
        products = [(grad * x).item() for grad, x in zip(found, leaves.values(), strict=True)]
        largest = max(largest, *(abs(x / leaves["demod"].item()) for x in (sum(products), *products[1:])))
    return largest


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("styles", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_epilogue_errs_no_more_than_the_reference(layer_epilogue, blur, styles, dtype):
    """With the blur, which has a kernel for that, from the outputs; in half precision without a clamp then."""
    inputs, settings = epilogue_inputs(2, 16, 9, 33, blur=blur, styles=styles, dtype=dtype)
    settings["keep_x"] = not blur
    if blur and dtype != torch.float32:
        settings["clamp"] = None  # what lies next to it may round to either side
    reference = functools.partial(ops.layer_epilogue, backend="reference")
    exact = {name: x.double() for name, x in inputs.items()}
    truth = derivatives(reference, exact, settings, order=1)
    single = {name: x if name == "x" else x.float() for name, x in inputs.items()}
    largest = largest_term_of_demod(exact, settings, styles) if blur else 0.0
    # One after the other a thread adds up 9 rows, a warp 4 columns in 2 steps, and a thread what 8 warps have.
    of_terms = {"more": roundings(terms=9 + 2 + 8), "largest": largest}
    if blur:
        settings["blur"] = settings["blur"].float()
    expected = derivatives(reference, single, settings, order=1)
    for name, actual in derivatives(layer_epilogue, single, settings, order=1).items():
        options = of_terms if blur and name.endswith("demod") else {}
        assert_error_within_reference(actual, expected[name], truth[name], name, **options)


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("styles", [0, 1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(2, 5, 4, 37), (3, 4, 35, 3)])
def test_epilogue_from_outputs(layer_epilogue, size, channels_last, blur, styles, poisoned):
    """x is not kept: both orders come from what went out, the first one by a kernel of its own."""
    inputs, settings = epilogue_inputs(*size, blur=blur, styles=styles)
    expected = derivatives(functools.partial(ops.layer_epilogue, backend="reference"), inputs, settings)
    settings["keep_x"] = False
    if channels_last:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    for order in (1, 2):
        for name, actual in derivatives(layer_epilogue, inputs, settings, order).items():
            assert_close(actual, expected[name], f"order {order}: {name}")


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("styles", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_epilogue_from_outputs_on_every_cpu(dtype, channels_last, styles, blur):
    """Rows of more elements than the longest vector has, and of no multiple of that."""
    inputs, settings = epilogue_inputs(2, 37, 5, 21, blur=blur, styles=styles, dtype=dtype)
    inputs["demod"] += 0.7  # it divides what outputs were rounded by
    settings["clamp"] = None if dtype.itemsize == 2 else 1.7  # what lies next to it may round to either side
    reference = functools.partial(ops.layer_epilogue, backend="reference")
    exact = {name: x.double() for name, x in inputs.items()}
    truth = derivatives(reference, exact, settings, order=1)
    largest = largest_term_of_demod(exact, settings, styles)
    vectors = native.compute_dtype(dtype)
    inputs = {name: x if name == "x" else x.to(vectors) for name, x in inputs.items()}
    settings["blur"] = SKEWED.to(vectors) if blur else None
    expected = derivatives(reference, inputs, settings, order=1)
    if channels_last:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    for level in cpu_levels():
        found = derivatives(
            functools.partial(ops.layer_epilogue, backend="cpu"), inputs, settings | {"keep_x": False}, order=1
        )
        for name, actual in found.items():
            if dtype == torch.float64:
                assert_close(actual, expected[name], f"{level}: {name}")
                continue
            if name.endswith("strength"):
                continue  # one number, which the reference may happen to hit
            options = {"more": roundings(terms=5 * 21), "largest": largest} if name.endswith("demod") else {}
            assert_error_within_reference(actual, expected[name], truth[name], f"{level}: {name}", **options)


@on_kernels("modulated_conv2d")
@pytest.mark.parametrize("gain", [0.5, -0.5])
@pytest.mark.parametrize("styles", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_epilogue_from_outputs_that_say_little(layer_epilogue, backend, dtype, styles, gain):
    """Outputs of 0 and at the clamp, and styles of 0 and of either sign, by hand: y = gain lrelu(x), clamp 0.7."""
    x = torch.tensor([[-1.0, 0.0, 1.0, 5.0], [-1.0, 0.0, 1.0, 5.0], [-20.0, 0.0, 1.0, 3.0]], dtype=dtype)[None, :, None]
    x, style = x.requires_grad_(), torch.tensor([[-3.0, 0.0, 2.0], [1.0, -2.0, 0.0]][:styles], requires_grad=True)
    outputs = layer_epilogue(x, styles=style[:, None].unbind(), act="lrelu", gain=gain, clamp=0.7, keep_x=False)
    to_x, to_style = torch.autograd.grad(sum(y.sum() for y in outputs), (x, style))
    slopes = torch.tensor([[0.2, 0.2, 1.0, 0.0], [0.2, 0.2, 1.0, 0.0], [0.0, 0.2, 1.0, 0.0]])
    assert_close(to_x, (gain * slopes * style.detach().sum(0)[:, None])[None, :, None], "to x", dtype)
    known = 2.2 if styles == 2 else 0.0  # y, from the output of a style that is not 0
    assert_close(to_style, gain * torch.tensor([[2.2, known, 1.0]] * styles), "to style", dtype)


@on_kernels("modulated_conv2d")
def test_epilogue_keeps_no_x(layer_epilogue, backend):
    inputs, settings = epilogue_inputs(1, 3, 4, 5, blur=True)
    inputs["x"].requires_grad_()
    for keep_x in (True, False):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(tuple(x.shape)), lambda x: x):
            call_epilogue(layer_epilogue, settings | {"keep_x": keep_x}, **inputs)
        assert ((1, 3, 5, 6) in kept) == keep_x


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("styles", [0, 2])
def test_epilogue_derivatives(layer_epilogue, blur, styles):
    inputs, settings = epilogue_inputs(2, 2, 2, 3, blur=blur, styles=styles)
    function = functools.partial(call_epilogue, layer_epilogue, settings)
    reference = functools.partial(call_epilogue, functools.partial(ops.layer_epilogue, backend="reference"), settings)
    check_derivatives(function, reference, inputs, "layer_epilogue")


def test_epilogue_layouts(layer_epilogue):
    inputs, settings = epilogue_inputs(2, 3, 4, 5)
    expected = derivatives(functools.partial(ops.layer_epilogue, backend="reference"), inputs, settings)
    for layout, x in layouts(inputs["x"]):
        for name, actual in derivatives(layer_epilogue, {**inputs, "x": x}, settings).items():
            assert_close(actual, expected[name], f"x: {layout}; {name}")


@pytest.mark.parametrize("keep_x", [False, True])
@pytest.mark.parametrize(
    ("size", "blur"),
    [((0, 3, 4, 5), False), ((0, 3, 4, 5), True), ((2, 0, 4, 5), False), ((0, 3, 1, 1), False), ((0, 3, 1, 1), True)],
)
def test_epilogue_of_nothing(layer_epilogue, size, blur, keep_x):
    inputs, settings = epilogue_inputs(*size, blur=blur)
    settings["keep_x"] = keep_x
    for name, x in derivatives(layer_epilogue, inputs, settings, order=1).items():
        assert not x.any(), name


@pytest.mark.parametrize("keep_x", [False, True])
def test_epilogue_does_not_depend_on_threads(layer_epilogue, backend, keep_x):
    inputs, settings = epilogue_inputs(1, 5, 70, 40, blur=True, styles=2)
    settings["keep_x"] = keep_x
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(derivatives(layer_epilogue, inputs, settings, order=1))
    finally:
        torch.set_num_threads(before)
    for name in found[0]:
        assert_close(found[1][name], found[0][name], name, torch.float64 if backend == "reference" else "exact")


def test_epilogue_has_no_third_derivative():
    if backends.status()["modulated_conv2d"]["cpu"] is not None:
        pytest.skip(backends.status()["modulated_conv2d"]["cpu"])
    inputs, settings = epilogue_inputs(1, 2, 2, 2)
    op = functools.partial(ops.layer_epilogue, backend="cpu")
    with pytest.raises(NotImplementedError, match='only backend="reference" has a third derivative'):
        derivatives(op, inputs, settings, order=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"demod": draw(2, 4)}, "demod must have shape [2, 3], got [2, 4]"),
        ({"styles": (draw(3, 3),)}, "styles[0] must have shape [2, 3], got [3, 3]"),
        ({"styles": (None, None, None)}, "styles must be one or two, got 3"),
        ({"strength": draw(1)}, "strength must have shape [], got [1]"),
        ({"noise": draw(2, 2, 4, 5)}, "noise must broadcast to [2, 1, 4, 5]"),
        ({"blur": draw(3)}, "blur must have shape [4], got [3]"),
        ({"act": "relu"}, "act must be one of linear, lrelu, got 'relu'"),
        ({"clamp": 0.0}, "clamp must be positive or None, got 0.0"),
    ],
)
def test_errors_of_the_epilogue(layer_epilogue, change, message):
    with pytest.raises(ValueError, match=re.escape(f"layer_epilogue: {message}")):
        layer_epilogue(**{"x": draw(2, 3, 4, 5), **change})
