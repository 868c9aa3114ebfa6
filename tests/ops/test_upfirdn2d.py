"""upfirdn2d: every backend against loops and numbers worked by hand, the kernels against the reference."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch

from checks import assert_close, assert_error_within_reference, draw, gradcheck, gradgradcheck, layouts
from csrc_backends import check_derivatives, cpu_levels, on_kernels
from epigraf_fast import ops
from epigraf_fast.ops import backends

BLUR = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8


def row(*values):
    """Numbers as one row of one image."""
    return torch.tensor(values, dtype=torch.float64)[None, None, None]


def literal(x, kernel, up=1, down=1, padding=(0, 0, 0, 0), flip=False, gain=1.0):
    """One image, one number after the other: lists in, lists out."""
    height, width = len(x), len(x[0])
    if not isinstance(kernel[0], list):
        kernel = [[a * b for b in kernel] for a in kernel]
    left, right, top, bottom = padding

    def sample(y, x_):  # of the padded image of zero-inserted samples
        y, x_ = y - top, x_ - left
        if 0 <= y < height * up and 0 <= x_ < width * up and y % up == 0 and x_ % up == 0:
            return x[y // up][x_ // up]
        return 0.0

    tall, wide = len(kernel), len(kernel[0])
    out = []
    for y in range(0, height * up + top + bottom - tall + 1, down):
        out.append([])
        for x_ in range(0, width * up + left + right - wide + 1, down):
            total = 0.0
            for i in range(tall):
                for j in range(wide):
                    # Convolution: the tap of largest index meets the first sample.
                    tap = kernel[i][j] if flip else kernel[tall - 1 - i][wide - 1 - j]
                    total += gain * tap * sample(y + i, x_ + j)
            out[-1].append(total)
    return out


def test_convolution_and_correlation_by_hand(upfirdn2d):
    kernel = torch.tensor([[1, 10, 100]], dtype=torch.float64)
    assert_close(upfirdn2d(row(1, 2, 3), kernel), row(123), "convolution")  # 1 * 100 + 2 * 10 + 3 * 1
    assert_close(upfirdn2d(row(1, 2, 3), kernel, flip=True), row(321), "correlation")  # 1 * 1 + 2 * 10 + 3 * 100
    assert_close(upfirdn2d(row(1, 2, 3), kernel, gain=-2), row(-246), "gain")


def test_resampling_by_hand(upfirdn2d):
    kernel = torch.tensor([[1, 1]], dtype=torch.float64)
    # Two zero-inserted samples are 1 0 2 0, two rows of them as many zeros: rows 1 0 2 0 and 0 0 0 0.
    assert_close(upfirdn2d(row(1, 2), kernel, up=2), [[[[1, 2, 2], [0, 0, 0]]]], "up")
    # One zero before: 0 1 0 2 0.
    assert_close(upfirdn2d(row(1, 2), kernel, up=2, padding=(1, 0, 0, -1)), row(1, 1, 2, 2), "up, padded")
    assert_close(upfirdn2d(row(1, 2), kernel, up=2, down=2, padding=(1, 0, 0, 0)), row(1, 2), "up and down")
    # Sums of neighbours 3 5 7 9, of which every second stays.
    assert_close(upfirdn2d(row(1, 2, 3, 4, 5), kernel, down=2), row(3, 7), "down")
    assert_close(upfirdn2d(row(1, 2, 3, 4, 5), kernel, down=3), row(3, 9), "down 3")


def test_one_dimensional_kernel_is_its_outer_product(upfirdn2d):
    x, taps = draw(2, 3, 6, 7), draw(3, seed=1)
    outer = taps[:, None] * taps[None, :]
    for flip in (False, True):
        expected = upfirdn2d(x, outer, up=2, padding=(1, 2, 0, 1), flip=flip, gain=3.0)
        assert_close(upfirdn2d(x, taps, up=2, padding=(1, 2, 0, 1), flip=flip, gain=3.0), expected, f"flip {flip}")


@pytest.mark.parametrize(
    "kernel_shape",
    [(1, 1), (2, 3), (4, 4), (3, 1), (4,)],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": (1, 2, 3, 0), "flip": True, "gain": 0.7},
        {"padding": (4, 4, 4, 4), "down": 2},
        {"up": 2, "padding": (2, 1, 3, 1), "gain": 4.0},
        {"up": 3, "down": 2, "padding": (0, 2, 1, 0), "flip": True},
        {"up": 2, "padding": (-1, -2, 3, -1)},
        {"down": 3, "padding": (-1, 2, 2, -1), "flip": True},
        {"padding": (-6, 9, 9, -6)},  # crops everything, then only zeros are left
    ],
)
def test_equals_the_loops(upfirdn2d, settings, kernel_shape):
    x, kernel = draw(2, 2, 4, 5), draw(*kernel_shape, seed=1)
    actual = upfirdn2d(x, kernel, **settings)
    for image in range(2):
        for channel in range(2):
            expected = literal(x[image, channel].tolist(), kernel.tolist(), **settings)
            assert_close(actual[image, channel], expected, f"image {image}, channel {channel}")


def test_padding_is_before_and_after_x_then_y(upfirdn2d):
    x, kernel = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    y = upfirdn2d(x, kernel, padding=(1, 2, 3, 4))
    assert y.shape == (1, 1, 8, 4)
    assert y[0, 0, 3, 1] == 1
    assert y.sum() == 1
    assert_close(upfirdn2d(x, kernel, padding=2), upfirdn2d(x, kernel, padding=(2, 2, 2, 2)), "one number", "exact")


@pytest.mark.parametrize("taps", range(1, 8))
@pytest.mark.parametrize(("height", "width"), [(6, 12), (5, 7), (1, 1)])
def test_sizes_of_the_standard_paddings(upfirdn2d, taps, height, width):
    kernel = torch.ones(taps, dtype=torch.float64) / taps
    x = draw(1, 1, height, width)
    before, after = taps // 2, (taps - 1) // 2
    assert upfirdn2d(x, kernel, padding=(before, after) * 2).shape == (1, 1, height, width)
    for factor in (2, 3):
        if taps >= factor:
            before, after = (taps + factor - 1) // 2, (taps - factor) // 2
            y = upfirdn2d(x, kernel, up=factor, padding=(before, after) * 2)
            assert y.shape == (1, 1, height * factor, width * factor)
            if height % factor == width % factor == 0:
                before, after = (taps - factor + 1) // 2, (taps - factor) // 2
                y = upfirdn2d(x, kernel, down=factor, padding=(before, after) * 2)
                assert y.shape == (1, 1, height // factor, width // factor)


def test_upsampling_by_hand(upfirdn2d):
    # One pixel, the third of five: upsampled it lies at 4, padded at 6; 1 3 3 1 then covers outputs 3 to 6, which is
    # symmetric about 4.5, the middle of the pixel's two. Weights 2/8 per axis; 3/4 and 1/4 in the rows.
    y = upfirdn2d(row(0, 0, 1, 0, 0), BLUR, up=2, padding=(2, 1, 2, 1), gain=4.0)
    across = torch.tensor([0, 0, 0, 0.25, 0.75, 0.75, 0.25, 0, 0, 0], dtype=torch.float64)
    assert_close(y[0, 0], torch.stack([0.75 * across, 0.75 * across]), "upsampled pixel")
    y = upfirdn2d(torch.ones(1, 1, 4, 4, dtype=torch.float64), BLUR, up=2, padding=(2, 1, 2, 1), gain=4.0)
    assert_close(y[..., 1:-1, 1:-1], torch.ones(1, 1, 6, 6), "a constant stays constant")


def test_downsampling_by_hand(upfirdn2d):
    # Padded by 1: the first output weighs -1..2 by 1 3 3 1 over 8, the second 1..4; rows of one weigh 3/8 (0 1 0 0).
    x = row(8, 16, 24, 32).expand(1, 1, 4, 4)
    y = upfirdn2d(x, BLUR, down=2, padding=(1, 1, 1, 1))
    across = torch.tensor([(3 * 8 + 3 * 16 + 24) / 8, (16 + 3 * 24 + 3 * 32) / 8], dtype=torch.float64)
    assert_close(y[0, 0], torch.stack([7 / 8 * across, 7 / 8 * across]), "downsampled ramp")


@pytest.mark.parametrize(
    "settings",
    [
        {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0},
        {"down": 2, "padding": (1, 1, 1, 1), "flip": True},
        {"up": 2, "down": 3, "padding": (-1, 3, 2, 0)},
    ],
)
def test_adjoint(upfirdn2d, settings):
    x, kernel = draw(2, 3, 5, 6).requires_grad_(), draw(3, 4, seed=1)
    y = upfirdn2d(x, kernel, **settings)
    other = draw(*y.shape, seed=2)
    (adjoint,) = torch.autograd.grad(y, x, other)
    assert_close((adjoint * x).sum(), (other * y).sum(), "<x, A^T y>")


def test_transpose_of_upsampling_is_downsampling(upfirdn2d):
    # By 2, with [1,3,3,1]: the gradient of the one is the other with the kernel flipped.
    x = draw(1, 2, 4, 6).requires_grad_()
    y = upfirdn2d(x, BLUR, up=2, padding=(2, 1, 2, 1))
    grad_y = draw(*y.shape, seed=1)
    (gradient,) = torch.autograd.grad(y, x, grad_y)
    assert_close(gradient, upfirdn2d(grad_y, BLUR, down=2, padding=(1, 1, 1, 1), flip=True), "gradient to x")


@pytest.mark.parametrize(
    "settings",
    [
        {"up": 2, "padding": (2, 1, -1, 1), "gain": 4.0},
        {"down": 2, "padding": (1, 1, 1, 1), "flip": True},
    ],
)
@pytest.mark.parametrize("kernel_shape", [(2, 3), (3,)])
def test_first_and_second_derivatives(upfirdn2d, backend, settings, kernel_shape):
    inputs = {"x": draw(1, 2, 3, 3), "kernel": draw(*kernel_shape, seed=1)}
    function = functools.partial(upfirdn2d, **settings)
    if backend != "reference":  # the kernel is a constant there
        function = functools.partial(function, kernel=inputs.pop("kernel"))
    gradcheck(function, inputs, "upfirdn2d")
    gradgradcheck(function, inputs, "upfirdn2d")


def test_empty_batch(upfirdn2d):
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    y = upfirdn2d(x, BLUR, up=2, padding=(2, 1, 2, 1))
    assert y.shape == (0, 3, 8, 8)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_layout_does_not_matter(upfirdn2d):
    x, kernel = draw(2, 3, 4, 5), draw(3, 2, seed=1)
    function = functools.partial(upfirdn2d, up=2, down=3, padding=(1, 2, 1, 0), gain=2.0)
    expected = function(x, kernel)
    for name, view in layouts(x):
        assert_close(function(view, kernel), expected, f"x: {name}")
    for name, view in layouts(kernel):
        assert_close(function(x, view), expected, f"kernel: {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_x(upfirdn2d, dtype):
    x = draw(1, 2, 6, 6).to(dtype)
    y = upfirdn2d(x, BLUR.float(), up=2, padding=(2, 1, 2, 1), gain=4.0)
    assert y.dtype == dtype
    assert_close(y, upfirdn2d(x.double(), BLUR, up=2, padding=(2, 1, 2, 1), gain=4.0), "y")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": draw(3, 4, 4)}, ValueError, "x must have shape [B, C, H, W], got [3, 4, 4]"),
        ({"x": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)}, TypeError, "x must be floating point, got torch.uint8"),
        ({"kernel": [1.0, 2.0]}, TypeError, "kernel must be a tensor, got list"),
        ({"kernel": draw(2, 2, 2)}, ValueError, "kernel must have shape [k] or [kh, kw], got [2, 2, 2]"),
        ({"kernel": draw(0)}, ValueError, "kernel must have shape [k] or [kh, kw], got [0]"),
        ({"kernel": torch.zeros(4, device="meta")}, ValueError, "kernel must be on cpu as x is, got meta"),
        ({"up": 0}, ValueError, "up and down must be at least 1, got 0 and 1"),
        ({"down": -1}, ValueError, "up and down must be at least 1, got 1 and -1"),
        ({"padding": (1, 2)}, ValueError, "padding must be one number or four (x, x, y, y), got 2"),
        ({"padding": (-1, 0, 0, 0)}, ValueError, "the padded image must be at least as large as the kernel [4]"),
        ({"padding": (0, 0, -3, 2)}, ValueError, "the padded image must be at least as large as the kernel [4]"),
        ({"added": draw(1, 1, 4, 4)}, ValueError, "added must have shape [1, 1, 1, 1], got [1, 1, 4, 4]"),
        ({"added": draw(1, 1, 1, 1).float()}, TypeError, "added must be torch.float64, as x is, or torch.float16"),
        ({"added": draw(1, 1, 1, 1), "bias": draw(2)}, ValueError, "bias must have shape [1], got [2]"),
        ({"added": draw(1, 1, 1, 1), "clamp": 0.0}, ValueError, "clamp must be positive or None, got 0.0"),
        ({"clamp": 1.0}, ValueError, "added must be given where bias or clamp is, got None"),
    ],
)
def test_errors(upfirdn2d, change, error, message):
    with pytest.raises(error, match=re.escape(f"upfirdn2d: {message}")):
        upfirdn2d(**{"x": draw(1, 1, 4, 4), "kernel": draw(4), **change})


# What the networks and the augmentation ask for, and what no fast path takes.
CALLS = {
    "up": ((4,), {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}),
    "down": ((4,), {"down": 2, "padding": (1, 1, 1, 1)}),
    "same": ((4,), {"padding": (2, 1, 2, 1), "flip": True}),
    "augmentation up": ((12,), {"up": 2, "padding": (6, 5, 6, 5), "gain": 4.0}),
    "augmentation down": ((12,), {"down": 2, "padding": (-1, -1, -1, -1), "flip": True}),
    "row": ((1, 7), {"padding": (3, 3, 0, 0)}),
    "column": ((7, 1), {"padding": (0, 0, 3, 3)}),
    "general": ((3, 5), {"up": 3, "down": 2, "padding": (4, -2, 1, 6), "gain": -0.5}),
}


@on_kernels("upfirdn2d")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(2, 16, 17, 19), (1, 3, 16, 24), (3, 5, 1, 40), (0, 4, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_error_is_that_of_the_reference(upfirdn2d, backend, name, dtype, shape):
    kernel_shape, settings = CALLS[name]
    if shape[2] * settings.get("up", 1) + sum(settings["padding"][2:]) < kernel_shape[0]:
        pytest.skip("nothing is left to filter")
    kernel = draw(*kernel_shape, seed=1, dtype=torch.float32)

    own = dtype  # all draws are rounded to it

    def run(function, dtype, channels_last=False):
        x = draw(*shape).to(own).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        y = function(x, kernel.to(torch.promote_types(dtype, torch.float32)), **settings)
        grad_y = draw(*y.shape, seed=2).to(own).to(dtype).requires_grad_()
        (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
        other = draw(*shape, seed=3).to(own).to(dtype)
        (second,) = torch.autograd.grad(grad_x, grad_y, other, materialize_grads=True, allow_unused=True)
        return {"y": y, "gradient to x": grad_x, "gradient to the gradient": second}

    reference = functools.partial(ops.upfirdn2d, backend="reference")
    truth, expected = run(reference, torch.float64), run(reference, dtype)
    for channels_last in (False, True):
        for what, actual in run(upfirdn2d, dtype, channels_last).items():
            assert_error_within_reference(actual, expected[what], truth[what], what)


FACTORS = pytest.mark.parametrize("factors", [{}, {"up": 2}, {"down": 2}], ids=["same", "up", "down"])


def four_taps(upfirdn2d, x, padding, factors, layout_of=None):
    """y and its gradient, for one filter of four taps; the gradient of y has the layout of y, or of another one."""
    x = x.detach().requires_grad_()
    taps = draw(4, seed=1, dtype=torch.float32).to(x.dtype)
    y = upfirdn2d(x, taps, padding=padding, **factors)
    like = y if layout_of is None else layout_of
    grad_y = torch.empty_like(like).copy_(draw(*y.shape, seed=2, dtype=torch.float32)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, grad_y)[0]


def assert_four_taps_are_right(upfirdn2d, x, padding, factors, expected=None):
    """Against the reference in fp64, which is `expected` if that is known; gives it back."""
    actual = four_taps(upfirdn2d, x, padding, factors)
    if expected is None:
        reference = functools.partial(ops.upfirdn2d, backend="reference")
        expected = four_taps(reference, x.double(), padding, factors, actual[0])
    for found, right, what in zip(actual, expected, ("y", "gradient"), strict=True):
        assert_close(found, right.float(), what)
    return expected


@pytest.mark.parametrize("width", [8, 16, 32, 33, 130])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 1, 1, 2), (5, 9, 7, 6), (-3, 2, 1, -2)])
@FACTORS
def test_four_taps_at_every_width(upfirdn2d, factors, padding, width):
    """Rows and blocks of rows that fill vectors and those that do not; more than a thread takes at once."""
    assert_four_taps_are_right(upfirdn2d, draw(3, 5, 70, width, dtype=torch.float32), padding, factors)


@pytest.mark.parametrize("channels", [2, 16, 23, 40])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 1, 1, 2), (5, 9, 7, 6), (-3, 2, 1, -2)])
@FACTORS
def test_four_taps_with_every_number_of_channels(upfirdn2d, factors, padding, channels):
    x = draw(3, channels, 19, 14, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert_four_taps_are_right(upfirdn2d, x, padding, factors)


@pytest.mark.parametrize("width", [255, 256])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@FACTORS
def test_images_larger_than_the_caches(factors, layout, width):
    """Whose memory is fetched ahead, and written past the caches where the processor can and rows are aligned."""
    x = draw(1, 16, 280, width, dtype=torch.float32).contiguous(memory_format=layout)
    upfirdn2d, expected = functools.partial(ops.upfirdn2d, backend="cpu"), None
    for _ in cpu_levels():
        expected = assert_four_taps_are_right(upfirdn2d, x, (2, 1, 2, 1), factors, expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("clamp", [None, 0.5, 100.0])
@pytest.mark.parametrize("channels_last", [True, False])
def test_something_may_be_added(upfirdn2d, name, clamp, channels_last):
    kernel_shape, settings = CALLS[name]
    kernel = draw(*kernel_shape, seed=1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    alone = upfirdn2d(draw(2, 3, 15, 16), kernel, **settings)

    def function(x, added, bias, op=upfirdn2d):
        x, added = x.contiguous(memory_format=layout), added if added is None else added * 1.0
        return op(x, kernel, added=added, bias=bias, clamp=clamp, **settings)

    inputs = {"x": draw(2, 3, 15, 16), "added": draw(*alone.shape, seed=2), "bias": draw(3, seed=3)}
    bound = math.inf if clamp is None else clamp
    expected = alone + (inputs["added"] + inputs["bias"][:, None, None]).clamp(-bound, bound)
    assert_close(function(**inputs), expected, "sum")
    assert_close(function(**{**inputs, "bias": None}), alone + inputs["added"].clamp(-bound, bound), "without bias")
    if clamp and (name, channels_last) in (("up", True), ("general", False)):
        small = {"x": draw(2, 2, 2, 3), "bias": draw(2, seed=3)}
        small["added"] = draw(*upfirdn2d(small["x"], kernel, **settings).shape, seed=2)
        small = {name: small[name] for name in ("x", "added", "bias")}
        reference = functools.partial(function, op=functools.partial(ops.upfirdn2d, backend="reference"))
        check_derivatives(function, reference, small, "upfirdn2d")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("largest", "bias", "kept"),
    [
        (1.0, 0.5, False),
        (1.0, None, False),
        (-1.0, 0.5, False),
        (1.7, -0.5, True),
        (-1.7, 0.5, True),
        (-2.5, None, True),
        (math.nan, None, True),
        (math.inf, 0.0, True),
        (1.0, math.nan, True),
    ],
)
def test_a_cpu_keeps_nothing_of_what_is_within_the_clamp(layout, largest, bias, kept):
    x, added = draw(2, 3, 4, 6), draw(2, 3, 8, 12, seed=1) % 0.9
    added[1, 2, 7, 11] = largest
    x, added = (v.contiguous(memory_format=layout).requires_grad_() for v in (x, added))
    bias = None if bias is None else torch.tensor([0.0, 0.1, bias], dtype=torch.float64, requires_grad=True)
    saved = []

    def save(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    def gradients(backend):
        y = ops.upfirdn2d(x, BLUR, up=2, padding=(2, 1, 2, 1), added=added, bias=bias, clamp=2.0, backend=backend)
        given = [added] if bias is None else [added, bias]
        return torch.autograd.grad(y, given, draw(*y.shape, seed=2))

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        found = gradients("cpu")
    assert (added.data_ptr() in saved) == kept
    if not math.isnan(largest):
        for name, actual, expected in zip(("added", "bias"), found, gradients("reference"), strict=False):
            assert_close(actual, expected, name)


def test_the_clamp_is_seen_in_memory_with_gaps():
    """Of a call that goes through torch's library, which makes nothing dense before."""
    x, whole = torch._neg_view(draw(1, 2, 4, 6)), draw(1, 2, 8, 24, seed=1) % 0.9
    whole[0, 1, 7, 22] = 5.0
    added = whole[..., ::2].requires_grad_()
    assert not added.is_contiguous()
    settings = {"up": 2, "padding": (2, 1, 2, 1), "clamp": 2.0}
    y, expected = (ops.upfirdn2d(x, BLUR, added=added, backend=name, **settings) for name in ("cpu", "reference"))
    actual, expected = (torch.autograd.grad(v.sum(), added)[0] for v in (y, expected))
    assert expected[0, 1, 7, 11] == 0
    assert_close(actual, expected, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [3, 8])
def test_what_is_added_may_be_fp16(upfirdn2d, dtype, channels):
    """As the planes of half-precision blocks are; the sum is computed and given in the dtype of x."""
    x, kernel = draw(2, channels, 5, 6).to(dtype), BLUR.to(torch.promote_types(dtype, torch.float32))
    added = draw(2, channels, 10, 12, seed=1).half().requires_grad_()
    settings = {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}
    for layout in (torch.contiguous_format, torch.channels_last):
        x, added = (v.detach().contiguous(memory_format=layout).requires_grad_() for v in (x, added))
        y = upfirdn2d(x, kernel, added=added, clamp=1.0, **settings)
        expected = ops.upfirdn2d(x.double(), BLUR, added=added.double(), clamp=1.0, backend="reference", **settings)
        assert_close(y, expected.to(dtype), "sum", torch.float16 if dtype == torch.float32 else dtype)
        grad_y = draw(*y.shape, seed=2).to(dtype)
        (actual,) = torch.autograd.grad(y, added, grad_y)
        assert actual.dtype == torch.float16
        assert_close(actual, (grad_y * (added.abs() <= 1)).half(), "gradient", "exact")


@pytest.mark.parametrize("name", CALLS)
def test_levels_and_threads_agree(name, cpu_level, threads):
    kernel_shape, settings = CALLS[name]
    x, kernel = draw(4, 24, 32, 32, dtype=torch.float32), draw(*kernel_shape, seed=1, dtype=torch.float32)
    for view in (x, x.contiguous(memory_format=torch.channels_last)):
        threads(1)
        expected = ops.upfirdn2d(view, kernel, backend="cpu", **settings)
        threads(3)
        assert_close(ops.upfirdn2d(view, kernel, backend="cpu", **settings), expected, cpu_level, "exact")
        reference = ops.upfirdn2d(x, kernel, backend="reference", **settings)
        truth = ops.upfirdn2d(x.double(), kernel.double(), backend="reference", **settings)
        assert_error_within_reference(expected, reference, truth, cpu_level)


def test_kernel_gradient_is_the_references(backend):
    x, kernel = draw(1, 1, 4, 4), draw(3, seed=1).requires_grad_()
    assert torch.autograd.grad(ops.upfirdn2d(x, kernel).sum(), kernel)[0].shape == (3,)
    if backend == "cpu":
        with pytest.raises(NotImplementedError, match=r'upfirdn2d: backend "cpu" has no gradient to kernel'):
            ops.upfirdn2d(x, kernel, backend=backend)


@on_kernels("upfirdn2d")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layout_is_kept(upfirdn2d, backend, dtype):
    x = draw(2, 8, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    y = upfirdn2d(x, BLUR, up=2, padding=(2, 1, 2, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 0}, "x must not be a null pointer"),
        ({"x": 6}, "x must be aligned to its elements of 4 bytes, got 6"),
        ({"taps": 0}, "taps must not be a null pointer"),
        ({"y": 2}, "y must be aligned"),
        ({"added": 3}, "added must be aligned"),
        ({"added": 4, "added_dtype": 2}, "added_dtype must be dtype or that of fp16, got 2"),
        ({"clamp": 0.0}, "clamp must be positive"),
        ({"dtype": 4}, "dtype must be a code from 0 to 3, got 4"),
        ({"batch": -1}, "batch must be at least 0"),
        ({"in_width": -4}, "in_width must be at least 0"),
        ({"out_height": 1 << 40}, "out_height must be at least 0 and at most 16777216"),
        ({"taps_x": 0}, "taps_x must be at least 1"),
        ({"taps_y": 3}, "taps_y must be taps_x of a separable filter, got 3 and 4"),
        ({"up": 0}, "up must be at least 1"),
        ({"channels": 1 << 47}, "elements of x must be at most"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_binding_refuses_what_cannot_be_right(change, message):
    reason = backends.status()["upfirdn2d"]["cpu"]
    if reason is not None:
        pytest.skip(reason)
    from epigraf_fast import _C

    x, taps, y = torch.ones(1, 1, 4, 4), torch.ones(4), torch.empty(1, 1, 4, 4)
    arguments = {"x": x.data_ptr(), "taps": taps.data_ptr(), "added": 0, "bias": 0, "y": y.data_ptr()}
    arguments |= {"dtype": 0, "added_dtype": 0, "batch": 1, "channels": 1}
    arguments |= {"in_height": 4, "in_width": 4, "out_height": 4, "out_width": 4, "taps_y": 4, "taps_x": 4}
    arguments |= {"separable": True, "channels_last": False, "flip": False, "up": 1, "down": 1, "pad_x": 2, "pad_y": 2}
    arguments |= {"gain": 1.0, "clamp": math.inf, "threads": 1}
    _C.upfirdn2d_cpu(*arguments.values())
    assert_close(y[0, 0, 2, 2], torch.tensor(16.0), "y")
    with pytest.raises(ValueError, match=re.escape(f"upfirdn2d: {message}")):
        _C.upfirdn2d_cpu(*{**arguments, **change}.values())
