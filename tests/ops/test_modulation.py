"""Weight, style and demodulation of a modulated convolution, on every backend that is here."""

from __future__ import annotations

import re

import pytest
import torch

from checks import (
    assert_close,
    draw,
    gradcheck,
    gradgradcheck,
)
from csrc_backends import here, on_backend, use
from epigraf_fast import ops


@pytest.fixture(params=here("modulated_conv2d"))
def backend(request, monkeypatch):
    return use(request.param, monkeypatch)


@pytest.fixture
def modulation(backend):
    return on_backend(ops.modulation, backend)


@pytest.mark.parametrize("k", [1, 3])
def test_modulation(modulation, k):
    inputs = {"weight": draw(3, 2, k, k, seed=1), "style": draw(4, 2, seed=2)}
    modulated = modulation(**inputs, dtype=torch.float64)
    energy = (inputs["weight"][None] * inputs["style"][:, None, :, None, None]).square().sum(dim=(2, 3, 4))
    assert_close(modulated[2], (energy + 1e-8) ** -0.5, "demod")
    assert_close(modulated[0], inputs["weight"], "weight", "exact")
    assert_close(modulated[1], inputs["style"], "style", "exact")

    def function(weight, style):
        weight, style, demod = modulation(weight, style, torch.float64)
        return weight, demod

    gradcheck(function, inputs, "modulation")
    gradgradcheck(function, inputs, "modulation")


@pytest.mark.parametrize("batch", [0, 1, 9])
@pytest.mark.parametrize("contiguous", [True, False])
def test_modulation_by_an_affine(modulation, batch, contiguous):
    """Styles from style vectors, which may be rows of a larger tensor; batches and channels that fill no block."""
    inputs = {"weight": draw(5, 35, 3, 3, seed=1), "w": draw(batch, 7, seed=2)}
    inputs |= {"matrix": draw(35, 7, seed=3), "bias": draw(35, seed=4)}

    def function(weight, w, matrix, bias):
        w = w if contiguous else torch.stack([w, w.detach()], 1)[:, 0]
        return modulation(weight, w, torch.float64, affine=(matrix, bias, 0.5))

    modulated = function(**inputs)
    style = 0.5 * inputs["w"] @ inputs["matrix"].t() + inputs["bias"]
    energy = (inputs["weight"][None] * style[:, None, :, None, None]).square().sum(dim=(2, 3, 4))
    assert_close(modulated.style, style, "style")
    assert_close(modulated.demod, (energy + 1e-8) ** -0.5, "demod")
    if batch == 1:
        small = {"weight": draw(2, 3, 1, 1), "w": draw(2, 2, seed=2), "matrix": draw(3, 2, seed=3), "bias": draw(3)}
        gradcheck(function, small, "modulation")
        gradgradcheck(function, small, "modulation")


def test_styles_without_demodulation_have_gradients(modulation):
    """Where nothing depends on demod, in fp16 too, where the style is scaled to a maximum of 1."""
    inputs = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 4, 1, 1), (2, 5), (4, 5), (4,)])]
    for dtype in (torch.float64, torch.float16):
        weight, w, matrix, bias = inputs
        style = modulation(weight, w, dtype, affine=(matrix, bias, 2.0)).style
        plain = 2 * w @ matrix.t() + bias
        scale = plain.detach().abs().amax(1, keepdim=True) if dtype == torch.float16 else 1.0
        assert_close(style, plain / scale, "style")
        if dtype == torch.float64:
            direction = draw(2, 4, seed=9)
            found = torch.autograd.grad(style, [w, matrix, bias], direction)
            for actual, expected in zip(found, torch.autograd.grad(plain, [w, matrix, bias], direction), strict=True):
                assert_close(actual, expected, "gradient")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": draw(2, 4)}, "style must have shape [B, 3], got [2, 4]"),
        ({"affine": (draw(4, 7), draw(3), 1.0)}, "matrix must have shape [3, D], got [4, 7]"),
        ({"affine": (draw(3, 7), draw(4), 1.0)}, "bias must have shape [3], got [4]"),
        ({"affine": (draw(3, 7), draw(3), 1.0)}, "style must have shape [B, 7], got [2, 3]"),
    ],
)
def test_errors_of_modulation(modulation, change, message):
    arguments = {"weight": draw(2, 3, 3, 3), "style": draw(2, 3), "dtype": torch.float64, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        modulation(**arguments)
