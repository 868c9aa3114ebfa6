"""The convolutions of G and D, on every backend that is here.

Against the literal sequence, explicit kernels per sample, difference quotients, and the reference in float64.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch

from checks import (
    SIGMAS,
    assert_close,
    assert_finite,
    draw,
    gradcheck,
    gradgradcheck,
    layouts,
)
from csrc_backends import check_derivatives, here, on_backend, use
from epigraf_fast import ops

BLUR = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8


@pytest.fixture(params=here("modulated_conv2d"))
def backend(request, monkeypatch):
    return use(request.param, monkeypatch)


@pytest.fixture
def conv2d_resample(backend):
    return on_backend(ops.conv2d_resample, backend)


@pytest.fixture
def modulated_conv2d(backend):
    return on_backend(ops.modulated_conv2d, backend)


def valid_convolution(x, kernel):
    """A true convolution of every channel with `kernel`, without padding."""
    kernel = kernel.flip([0, 1]).expand(x.shape[1], 1, *kernel.shape)
    return torch.nn.functional.conv2d(x, kernel, groups=x.shape[1])


def literal_resample(x, weight, kernel=None, up=1, down=1, flip_weight=False):
    """method.md 7 in its own order: insert zeros, pad once, filter, convolve, filter, keep; no padding between."""
    batch, channels, height, width = x.shape
    inserted = x.new_zeros(batch, channels, height * up, width * up)
    inserted[:, :, ::up, ::up] = x
    before = after = weight.shape[-1] // 2
    if kernel is not None:
        kernel = kernel if kernel.ndim == 2 else kernel[:, None] * kernel[None, :]
        taps = kernel.shape[-1]
    if up > 1:
        before, after = before + (taps + up - 1) // 2, after + (taps - up) // 2
    if down > 1:
        before, after = before + (taps - down + 1) // 2, after + (taps - down) // 2
    padded = x.new_zeros(batch, channels, height * up + before + after, width * up + before + after)
    padded[:, :, before : before + height * up, before : before + width * up] = inserted
    if up > 1:
        padded = valid_convolution(padded, up * up * kernel)
    padded = torch.nn.functional.conv2d(padded, weight.flip([2, 3]) if flip_weight else weight)
    if down > 1:
        padded = valid_convolution(padded, kernel)
    return padded[:, :, ::down, ::down]


def literal_modulated(x, weight, style, demodulate=True, up=1, kernel=None):
    """A kernel for every sample: times style, divided by its norm."""
    out = []
    for image, image_style in zip(x, style, strict=True):
        modulated = weight * image_style[None, :, None, None]
        if demodulate:
            norms = [(one.square().sum() + 1e-8).sqrt() for one in modulated]
            modulated = torch.stack([one / norm for one, norm in zip(modulated, norms, strict=True)])
        out.append(literal_resample(image[None], modulated, kernel, up=up, flip_weight=up > 1)[0])
    return torch.stack(out)


def layer(channels=3, out=2, k=3, size=(4, 5), batch=2, dtype=torch.float64):
    return {
        "x": draw(batch, channels, *size, seed=1, dtype=dtype),
        "weight": draw(out, channels, k, k, seed=2, dtype=dtype),
        "style": draw(batch, channels, seed=3, dtype=dtype),
    }


# --- conv2d_resample


def test_plain_convolution_by_hand(conv2d_resample):
    x = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.float64)
    weight = torch.tensor([[[[0, 0, 0], [0, 1, 10], [0, 100, 1000]]]], dtype=torch.float64)
    # Correlation: every pixel, 10 times its right, 100 times its lower, 1000 times its lower right neighbour.
    assert_close(conv2d_resample(x, weight), [[[[4321, 402], [43, 4]]]], "correlation")
    # Rotated: every pixel, 10 times its left, 100 times its upper, 1000 times its upper left neighbour.
    assert_close(conv2d_resample(x, weight, flip_weight=True), [[[[1, 12], [103, 1234]]]], "convolution")


def test_upsampling_convolution_by_hand(conv2d_resample):
    # One pixel of 1 becomes 1 0 / 0 0; [1, 1] / 2 with gain 4 and pads (2+2-1)//2 = 1, 0 makes it 1 1 / 1 1 (as any
    # [1, 1] with gain 1 per axis); then a plain 1x1 convolution by 5.
    box = torch.tensor([0.5, 0.5], dtype=torch.float64)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert_close(conv2d_resample(one, 5 * one, kernel=box, up=2), [[[[5, 5], [5, 5]]]], "1x1")
    # 3x3: of the filtered 1 1 / 1 1 within zeros, with taps 1..9 row by row as correlation: top left 5 + 6 + 8 + 9,
    # top right 4 + 5 + 7 + 8, bottom left 2 + 3 + 5 + 6, bottom right 1 + 2 + 4 + 5. Rotated: the other way round.
    weight = torch.arange(1, 10, dtype=torch.float64).view(1, 1, 3, 3)
    assert_close(conv2d_resample(one, weight, kernel=box, up=2), [[[[28, 24], [16, 12]]]], "3x3")
    actual = conv2d_resample(one, weight, kernel=box, up=2, flip_weight=True)
    assert_close(actual, [[[[12, 16], [24, 28]]]], "3x3, rotated")


def test_discriminators_paddings(conv2d_resample):
    # method.md 7: the 3x3 convolution down 2 pads 2 on every side, the 1x1 skip pads 1.
    x = draw(1, 2, 6, 8, seed=1)
    for k, pad in ((3, 2), (1, 1)):
        weight = draw(3, 2, k, k, seed=2)
        padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
        filtered = valid_convolution(padded, BLUR[:, None] * BLUR)
        expected = torch.nn.functional.conv2d(filtered, weight)[:, :, ::2, ::2]
        assert_close(conv2d_resample(x, weight, kernel=BLUR, down=2), expected, f"{k}x{k}")


def test_generators_paddings(conv2d_resample):
    # method.md 7: a stride-2 transposed convolution with the raw kernel gives 2H+1; the filter then pads 1 everywhere.
    x, weight = draw(1, 2, 3, 4, seed=1), draw(3, 2, 3, 3, seed=2)
    wide = torch.nn.functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    assert wide.shape == (1, 3, 7, 9)
    expected = valid_convolution(torch.nn.functional.pad(wide, (1, 1, 1, 1)), 4 * BLUR[:, None] * BLUR)
    assert_close(conv2d_resample(x, weight, kernel=BLUR, up=2, flip_weight=True), expected, "y")


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)])
@pytest.mark.parametrize("kernel_shape", [(3,), (4,), (5, 5), (6,)])
@pytest.mark.parametrize("flip_weight", [False, True])
def test_equals_the_literal_sequence(k, up, down, kernel_shape, flip_weight, conv2d_resample):
    x, weight, kernel = draw(2, 3, 5, 6, seed=1), draw(2, 3, k, k, seed=2), draw(*kernel_shape, seed=3)
    settings = {"kernel": kernel, "up": up, "down": down, "flip_weight": flip_weight}
    expected = literal_resample(x, weight, **settings)
    assert expected.shape[2:] == (5 * up // down, 6 * up // down)
    assert_close(conv2d_resample(x, weight, **settings), expected, "y")


def test_two_taps_are_enough_for_a_factor_of_two(conv2d_resample):
    x, weight, kernel = draw(1, 1, 2, 2, seed=1), draw(1, 1, 1, 1, seed=2), draw(2, seed=3)
    for factors in ({"up": 2}, {"down": 2}):
        expected = literal_resample(x, weight, kernel, **factors)
        assert_close(conv2d_resample(x, weight, kernel=kernel, **factors), expected, str(factors))


@pytest.mark.parametrize("settings", [{}, {"up": 2, "kernel": BLUR, "flip_weight": True}, {"down": 2, "kernel": BLUR}])
@pytest.mark.parametrize("k", [1, 3])
def test_derivatives_of_the_convolution(settings, k, conv2d_resample):
    inputs = {"x": draw(1, 2, 2, 3, seed=1), "weight": draw(1, 2, k, k, seed=2)}
    function = functools.partial(conv2d_resample, **settings)
    gradcheck(function, inputs, "conv2d_resample")
    gradgradcheck(function, inputs, "conv2d_resample")


# --- modulated_conv2d


def test_values_by_hand(modulated_conv2d):
    x, one = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    assert_close(modulated_conv2d(x, 3 * one[..., None, None], 5 * one, demodulate=False), [[[[30]]]], "2 * 3 * 5")
    assert_close(modulated_conv2d(x, 3 * one[..., None, None], -5 * one), [[[[-2]]]], "2 * (3 * -5) / 15", "hand")
    # Two channels: x = (1, 2), weight (3, 4), style (1, 1): 11 / 5. Style (4, 3): (12 + 24) / sqrt(12^2 + 12^2).
    x = torch.tensor([1, 2], dtype=torch.float64).view(1, 2, 1, 1)
    weight = torch.tensor([3, 4], dtype=torch.float64).view(1, 2, 1, 1)
    for style, expected in (([1, 1], 2.2), ([4, 3], 36 / 288**0.5)):
        style = torch.tensor([style], dtype=torch.float64)
        assert_close(modulated_conv2d(x, weight, style), [[[[expected]]]], f"style {style.tolist()}", "hand")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_demodulation_floor_by_hand(dtype, modulated_conv2d):
    # (weight * style)^2 = 1e-8 beside the floor of 1e-8: 1e-4 x / sqrt(2e-8) = x / sqrt(2).
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    actual = modulated_conv2d(one, 1e-2 * one, 1e-2 * one[0, 0])
    assert_close(actual, [[[[0.5**0.5]]]], "y", "hand")


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("channels", "out"), [(3, 2), (1, 5), (16, 8)])
def test_equals_a_kernel_per_sample(demodulate, up, k, channels, out, modulated_conv2d):
    inputs = layer(channels, out, k)
    kernel = BLUR if up > 1 else None
    expected = literal_modulated(**inputs, demodulate=demodulate, up=up, kernel=kernel)
    actual = modulated_conv2d(**inputs, demodulate=demodulate, up=up, kernel=kernel)
    assert actual.shape == (2, out, 4 * up, 5 * up)
    assert_close(actual, expected, "y")


def test_equals_a_grouped_convolution(modulated_conv2d):
    inputs = layer(channels=4, out=3, batch=3)
    kernels = inputs["weight"][None] * inputs["style"][:, None, :, None, None]
    kernels = kernels / kernels.flatten(2).norm(dim=2)[:, :, None, None, None]
    expected = torch.nn.functional.conv2d(
        inputs["x"].flatten(0, 1)[None], kernels.flatten(0, 1), padding=1, groups=3
    ).view(3, 3, 4, 5)
    assert_close(modulated_conv2d(**inputs), expected, "y", "hand")  # all but the floor of 1e-8


def test_demodulated_output_has_unit_variance(modulated_conv2d):
    num = 40
    x = draw(num, 24, 6, 6, seed=1)
    weight, style = 7 * draw(10, 24, 3, 3, seed=2), 0.1 * draw(num, 24, seed=3)
    for settings in ({}, {"act": "linear", "gain": 1.0}):
        inner = modulated_conv2d(x, weight, style, **settings)[:, :, 1:-1, 1:-1]  # whose windows lie in the image
        # Every output is normal with variance 1. Neighbours are correlated; images are not: the spread of the mean
        # square over images says how far it may be off.
        squares = inner.square().mean(dim=(1, 2, 3))
        assert abs(squares.mean() - 1) < SIGMAS * squares.std() / num**0.5
        assert squares.std() / num**0.5 < 0.05  # so the test can fail


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (1, 1, 4, 5), (4, 5), (2, 1, 1, 1), ()])
def test_noise_broadcasts(shape, modulated_conv2d):
    inputs, noise = layer(), draw(*shape, seed=5)
    expected = literal_modulated(**inputs) + noise
    assert_close(modulated_conv2d(**inputs, noise=noise), expected, "y")


def test_epilogue(modulated_conv2d):
    # Noise before the bias, both inside the activation, then gain, then clamp.
    inputs, noise, bias = layer(), draw(2, 1, 8, 10, seed=5), draw(2, seed=6)
    before = literal_modulated(**inputs, up=2, kernel=BLUR) + noise + bias[:, None, None]
    activated = torch.where(before > 0, before, before / 5)
    settings = {"up": 2, "kernel": BLUR, "noise": noise, "bias": bias, "act": "lrelu"}
    assert_close(modulated_conv2d(**inputs, **settings), 2**0.5 * activated, "default gain")
    actual = modulated_conv2d(**inputs, **settings, gain=3.0, clamp=1.5)
    expected = (3 * activated).clamp(-1.5, 1.5)
    assert (expected.abs() == 1.5).any()
    assert (expected.abs() < 1.5).any()
    assert_close(actual, expected, "gain and clamp")


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("demodulate", [True, False])
def test_first_and_second_derivatives(up, demodulate, modulated_conv2d):
    inputs = {
        **layer(channels=2, out=2, size=(2, 2), batch=2),
        "noise": draw(2, 1, 2 * up, 2 * up, seed=5),
        "bias": draw(2, seed=6),
    }
    settings = {
        "demodulate": demodulate,
        "up": up,
        "kernel": BLUR if up > 1 else None,
        "act": "swish",
        "gain": 1.3,
        "clamp": 2.0,
    }
    function = functools.partial(modulated_conv2d, **settings)
    reference = functools.partial(ops.modulated_conv2d, backend="reference", **settings)
    check_derivatives(function, reference, inputs, "modulated_conv2d")


HALF = {"channels": 32, "out": 16, "size": (6, 6)}


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("demodulate", [True, False])
def test_fp16_is_close_to_fp32(up, demodulate, modulated_conv2d):
    inputs = layer(**HALF, dtype=torch.float32)
    inputs["x"] = inputs["x"].half()
    settings = {"demodulate": demodulate, "up": up, "kernel": BLUR.float() if up > 1 else None}
    if not demodulate:
        inputs["style"] = inputs["style"] / HALF["channels"] ** 0.5  # as the to-planes layers do
    settings |= {"noise": draw(2, 1, 6 * up, 6 * up, seed=5).float(), "bias": draw(16, seed=6).float(), "act": "lrelu"}
    actual = modulated_conv2d(**inputs, **settings)
    assert actual.dtype == torch.float16
    expected = modulated_conv2d(inputs["x"].float(), inputs["weight"], inputs["style"], **settings)
    assert_close(actual / expected.std(), expected / expected.std(), "y", "fp16_layer")


@pytest.mark.parametrize("up", [1, 2])
def test_fp16_derivatives_are_close_to_those_of_fp32(up, modulated_conv2d):
    """To the weight as it is given too, which is divided by its maximum first."""
    inputs = layer(**HALF, dtype=torch.float32)
    inputs["weight"] *= torch.linspace(0.1, 10, HALF["out"])[:, None, None, None]
    direction = draw(2, HALF["out"], 6 * up, 6 * up, seed=7).float()
    found = []
    for dtype in (torch.float16, torch.float32):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        x = leaves["x"].to(dtype)
        y = modulated_conv2d(**leaves | {"x": x}, up=up, kernel=BLUR.float() if up > 1 else None)
        found.append(torch.autograd.grad((y.float() * direction).sum(), list(leaves.values())))
    for name, half, single in zip(inputs, *found, strict=True):
        assert (half - single).norm() <= 3e-3 * single.norm(), name


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_fp16_range_does_not_depend_on_the_scale_of_weight_and_style(scale, modulated_conv2d):
    # At 1e4 the unscaled products (1e4 * 1e4 * sqrt(288) terms) are beyond fp16's 65504, and so is their energy.
    inputs = layer(**HALF, dtype=torch.float32)
    expected = modulated_conv2d(**inputs)
    actual = modulated_conv2d(inputs["x"].half(), scale * inputs["weight"], scale * inputs["style"])
    assert_close(actual, expected, "y", "fp16_layer")


def test_fp16_scales_are_per_output_and_per_sample(modulated_conv2d):
    # One output channel and one image thousands of times larger than the others do not push these into underflow.
    inputs = layer(**HALF, dtype=torch.float32)
    weight, style = inputs["weight"].clone(), inputs["style"].clone()
    weight[0] *= 1e5
    style[0] *= 1e5
    actual = modulated_conv2d(inputs["x"].half(), weight, style)
    assert_close(actual, modulated_conv2d(**inputs), "y", "fp16_layer")


def test_fp16_of_large_activations_is_finite(modulated_conv2d):
    # Activations at the clamp of 256, all of one sign: the sums are largest.
    x = torch.full((1, 512, 4, 4), 256.0, dtype=torch.float16)
    weight, style = torch.ones(8, 512, 3, 3), torch.ones(1, 512)
    y = modulated_conv2d(x, weight, style)
    assert_finite(y, "y")
    assert_close(y[..., 1:-1, 1:-1] / 256, torch.full((1, 8, 2, 2), (512 * 9) ** 0.5), "y / 256", "fp16_layer")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_zero_weight_or_style_gives_zero(dtype, modulated_conv2d):
    inputs = layer(dtype=torch.promote_types(dtype, torch.float32))
    inputs["x"] = inputs["x"].to(dtype)
    inputs["weight"][0] = 0
    inputs["style"][1] = 0
    y = modulated_conv2d(**inputs)
    assert_close(y[:, 0], torch.zeros(2, 4, 5), "output channel without weight", "exact")
    assert_close(y[1], torch.zeros(2, 4, 5), "image without style", "exact")
    assert y[0, 1].abs().min() > 0


def test_float32(modulated_conv2d):
    inputs = layer(channels=16, out=8)
    y = modulated_conv2d(**{name: x.float() for name, x in inputs.items()}, up=2, kernel=BLUR.float())
    assert y.dtype == torch.float32
    assert_close(y, modulated_conv2d(**inputs, up=2, kernel=BLUR), "y")


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_batch(up, dtype, conv2d_resample, modulated_conv2d):
    inputs = {**layer(batch=0, dtype=torch.float32), "bias": draw(2).float()}
    inputs["x"] = inputs["x"].to(dtype).requires_grad_()
    y = modulated_conv2d(**inputs, up=up, kernel=BLUR.float(), act="lrelu", noise=draw(4 * up, 5 * up).float())
    assert y.shape == (0, 2, 4 * up, 5 * up)
    assert torch.autograd.grad(y.sum(), inputs["x"])[0].shape == (0, 3, 4, 5)
    for settings in ({}, {"up": 2, "kernel": BLUR.float()}, {"down": 2, "kernel": BLUR.float()}):
        y = conv2d_resample(torch.zeros(0, 3, 4, 4), torch.zeros(5, 3, 1, 1), **settings)
        assert y.shape[:2] == (0, 5)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1)])
def test_single_rows_and_columns(size, modulated_conv2d):
    inputs = layer(size=size, batch=1, channels=1, out=1)
    for settings in ({"up": 1}, {"up": 2, "kernel": BLUR}):
        assert_close(modulated_conv2d(**inputs, **settings), literal_modulated(**inputs, **settings), f"{settings}")


def test_layout_does_not_matter(modulated_conv2d):
    inputs = {**layer(), "noise": draw(2, 1, 8, 10, seed=5), "bias": draw(2, seed=6), "kernel": draw(4, 4, seed=7)}
    expected = modulated_conv2d(**inputs, up=2)
    for changed, x in inputs.items():
        for name, view in layouts(x):
            assert_close(modulated_conv2d(**{**inputs, changed: view}, up=2), expected, f"{changed}: {name}")


CONVOLUTION_ERRORS = [
    ({"x": draw(3, 4, 5)}, ValueError, "x must have shape [B, C_in, H, W], got [3, 4, 5]"),
    ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "x must be floating point, got torch.int32"),
    ({"weight": draw(2, 4, 3, 3)}, ValueError, "weight must have shape [C_out, 3, k, k], got [2, 4, 3, 3]"),
    ({"weight": draw(2, 3, 3, 1)}, ValueError, "weight must be square with an odd number of taps"),
    ({"weight": draw(2, 3, 2, 2)}, ValueError, "weight must be square with an odd number of taps"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"weight": torch.zeros(2, 3, 3, 3, device="meta")}, ValueError, "weight must be on cpu as x is, got meta"),
    ({"up": 0}, ValueError, "up and down must be at least 1, and one of them 1, got 0 and 1"),
    ({"up": 2}, ValueError, "kernel must be given when up or down is above 1"),
    ({"up": 2, "kernel": draw(4, 3)}, ValueError, "kernel must be [n] or [n, n] with n at least the resampling factor"),
    ({"up": 2, "kernel": draw(1)}, ValueError, "kernel must be [n] or [n, n] with n at least the resampling factor"),
    ({"up": 2, "kernel": draw(4, 4, 4)}, ValueError, "kernel must be [n] or [n, n]"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *CONVOLUTION_ERRORS,
        ({"down": 0}, ValueError, "up and down must be at least 1, and one of them 1, got 1 and 0"),
        ({"down": 2}, ValueError, "kernel must be given when up or down is above 1"),
        ({"up": 2, "down": 2, "kernel": BLUR}, ValueError, "up and down must be at least 1, and one of them 1"),
    ],
)
def test_errors_of_the_convolution(change, error, message, conv2d_resample):
    inputs = layer()
    with pytest.raises(error, match=re.escape(f"conv2d_resample: {message}")):
        conv2d_resample(**{"x": inputs["x"], "weight": inputs["weight"], **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *CONVOLUTION_ERRORS,
        ({"style": draw(1, 3)}, ValueError, "style must have shape [2, 3], got [1, 3]"),
        ({"style": draw(2, 4)}, ValueError, "style must have shape [2, 3], got [2, 4]"),
        ({"bias": draw(3)}, ValueError, "bias must have shape [2], got [3]"),
        ({"noise": draw(2, 2, 4, 5)}, ValueError, "noise must broadcast to [2, 1, 4, 5], got [2, 2, 4, 5]"),
        ({"noise": draw(3, 1, 4, 5)}, ValueError, "noise must broadcast to [2, 1, 4, 5], got [3, 1, 4, 5]"),
        ({"noise": draw(1, 2, 1, 4, 5)}, ValueError, "noise must broadcast to [2, 1, 4, 5], got [1, 2, 1, 4, 5]"),
        ({"noise": draw(1, 1, 1, 1, 1)}, ValueError, "noise must broadcast to [2, 1, 4, 5], got [1, 1, 1, 1, 1]"),
        ({"noise": draw(4, 5), "up": 2, "kernel": BLUR}, ValueError, "noise must broadcast to [2, 1, 8, 10]"),
        ({"noise": 1.0}, TypeError, "noise must be a tensor, got float"),
        ({"act": "gelu"}, ValueError, "act must be one of linear, relu, lrelu"),
        ({"clamp": -1.0}, ValueError, "clamp must be positive or None, got -1.0"),
    ],
)
def test_errors_of_the_layer(change, error, message, modulated_conv2d):
    with pytest.raises(error, match=re.escape(f"modulated_conv2d: {message}")):
        modulated_conv2d(**{**layer(), **change})
