"""Weight, style and demodulation of a modulated convolution, on every backend that is here."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from checks import (
    assert_close,
    draw,
    gradcheck,
    gradgradcheck,
)
from csrc_backends import here, on_backend, on_kernels, use
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
def test_batches_and_channels_that_fill_no_block(modulation, batch, contiguous):
    """Styles may be rows of a larger tensor."""
    weight, style = draw(5, 35, 3, 3, seed=1), draw(batch, 35, seed=2)
    given = style if contiguous else torch.stack([style, style], 1)[:, 0]
    modulated = modulation(weight, given, torch.float64)
    energy = (weight[None] * style[:, None, :, None, None]).square().sum(dim=(2, 3, 4))
    assert_close(modulated.style, style, "style", "exact")
    assert_close(modulated.demod, (energy + 1e-8) ** -0.5, "demod")


def test_styles_without_demodulation_have_gradients(modulation):
    """Where nothing depends on demod, in fp16 too, where the style is scaled to a maximum of 1."""
    weight, given = draw(3, 4, 1, 1).requires_grad_(), draw(2, 4, seed=1).requires_grad_()
    for dtype in (torch.float64, torch.float16):
        style = modulation(weight, given, dtype).style
        scale = given.detach().abs().amax(1, keepdim=True) if dtype == torch.float16 else torch.ones(2, 1).double()
        assert_close(style, given / scale, "style")
        if dtype == torch.float64:
            direction = draw(2, 4, seed=9)
            assert_close(torch.autograd.grad(style, given, direction)[0], direction, "gradient", "exact")


@on_kernels("modulated_conv2d")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_follows_from_a_weight_alone_is_made_once(modulation, dtype):
    """Further calls give the same bits; their demod is made of the energy that is kept, which no gradient reaches."""
    weight, kept = draw(5, 35, 3, 3, dtype=torch.float32).requires_grad_(), ops.OfWeight()
    for seed in (1, 2):
        results = []
        for of_weight in (None, kept):
            given = draw(3, 35, seed=seed, dtype=torch.float32).requires_grad_()
            outputs = modulation(weight, given, dtype, of_weight=of_weight)
            along = [draw(*y.shape, seed=seed + i, dtype=y.dtype) for i, y in enumerate(outputs)]
            results.append((*outputs, *torch.autograd.grad(outputs, (weight, given), along)))
        for i, (plain, known) in enumerate(zip(*results, strict=True)):
            assert torch.equal(plain, known), f"call {seed}: {i}"
    half = dtype == torch.float16
    kept.made["energy", half] *= 4
    with torch.no_grad():
        demod = modulation(weight, given, dtype, of_weight=kept).demod
    assert_close(2 * demod, outputs.demod, "demod of four times the energy")


@on_kernels("modulated_conv2d")
def test_a_weight_is_normalized_once(modulation, monkeypatch):
    """For fp16: the first call of a phase looks for its maximum; not the others."""
    made = []
    module = sys.modules["epigraf_fast.ops.modulation"]
    real = module.weight_divisor
    monkeypatch.setattr(module, "weight_divisor", lambda weight: made.append(weight) or real(weight))
    weight, kept = draw(5, 35, 3, 3, dtype=torch.float32).requires_grad_(), ops.OfWeight()
    for _ in range(3):
        modulation(weight, draw(3, 35, dtype=torch.float32), torch.float16, of_weight=kept)
    assert len(made) == 1
    modulation(weight, draw(3, 35, dtype=torch.float32), torch.float32, of_weight=ops.OfWeight())
    assert len(made) == 1
    modulation(weight, draw(3, 35, dtype=torch.float32), torch.float16, of_weight=ops.OfWeight())
    assert len(made) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": draw(2, 4)}, "style must have shape [B, 3], got [2, 4]"),
        ({"style": draw(3)}, "style must have shape [B, 3], got [3]"),
        ({"weight": draw(2, 3, 3)}, "weight must have shape [C_out, C_in, k, k], got [2, 3, 3]"),
    ],
)
def test_errors_of_modulation(modulation, change, message):
    arguments = {"weight": draw(2, 3, 3, 3), "style": draw(2, 3), "dtype": torch.float64, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        modulation(**arguments)
