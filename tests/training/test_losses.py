"""Losses, R1 and the blur of the discriminator's input, by hand from method.md 10."""

from __future__ import annotations

import math

import pytest
import torch

from checks import assert_close, assert_finite, draw
from epigraf_fast.training.losses import blur, discriminator_loss, generator_loss, path_lengths, r1_penalty

LN3 = math.log(3)


def test_generator_loss() -> None:
    """softplus(0) = ln 2, softplus(-ln 3) = ln(4/3)."""
    loss = generator_loss(torch.tensor([0.0, LN3]))
    assert_close(loss, torch.tensor((math.log(2) + math.log(4 / 3)) / 2), "G", "hand")


def test_discriminator_loss() -> None:
    """Fake: softplus(0), softplus(ln 3) = ln 4; real, of another number: softplus(-ln 3)."""
    loss = discriminator_loss(torch.tensor([0.0, LN3]), torch.tensor([LN3]))
    assert_close(loss, torch.tensor((math.log(2) + math.log(4)) / 2 + math.log(4 / 3)), "D", "hand")


def test_large_logits_stay_finite() -> None:
    large = torch.tensor([1e4, -1e4])
    assert_close(generator_loss(large), torch.tensor(5e3), "G")
    assert_close(discriminator_loss(large, large), torch.tensor(1e4), "D")


def test_r1_of_a_quadratic() -> None:
    """D(x) = sum a x^2 / 2: the gradient is a x, the penalty sum a^2 x^2, its derivative to a is 2 a x^2."""
    a = draw(3, 2, 2, seed=1).requires_grad_()
    x = draw(4, 3, 2, 2, seed=2).requires_grad_()
    penalty = r1_penalty((a * x.square() / 2).sum(dim=(1, 2, 3)), x)
    assert_close(penalty, (a * x).square().sum(dim=(1, 2, 3)), "penalty")
    (grad_a,) = torch.autograd.grad(penalty.sum(), a)
    assert_close(grad_a, 2 * (a * x.square()).sum(dim=0), "its gradient")


def test_path_lengths_of_a_quadratic() -> None:
    """image = sum over vectors of a_l w_l^2 / 2 (one number each): g_l = a_l w_l sum(noise) / sqrt(H W)."""
    a, ws = draw(3, 2, seed=1).requires_grad_(), draw(4, 3, 2, seed=2).requires_grad_()
    noise = draw(4, 1, 2, 5, seed=3)
    images = (a * ws.square() / 2).sum(dim=(1, 2)).view(4, 1, 1, 1).expand(4, 1, 2, 5)
    total = noise.sum(dim=(1, 2, 3)) / math.sqrt(10)
    expected = total.abs() * (a * ws).square().sum(dim=2).mean(dim=1).sqrt()
    lengths = path_lengths(images, ws, noise)
    assert_close(lengths, expected, "lengths")
    (grad,) = torch.autograd.grad(lengths.sum(), a, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected.sum(), a)
    assert_close(grad, expected_grad, "their gradient")


# Blur


def impulse_response(sigma: float, size: int) -> torch.Tensor:
    """The filter [size, size] as seen from the middle of an image (float64)."""
    image = torch.zeros(1, 1, size, size, dtype=torch.float64)
    image[..., size // 2, size // 2] = 1
    return blur(image, sigma)[0, 0]


@pytest.mark.parametrize(
    ("sigma", "taps"),
    [
        (1 / 3, [2**-9, 1, 2**-9]),  # floor(3 sigma) = 1; 2^-(i / sigma)^2
        (0.5, [1 / 16, 1, 1 / 16]),
        (1.0, [2**-9, 2**-4, 0.5, 1, 0.5, 2**-4, 2**-9]),
        (1.3, [2 ** -((i / 1.3) ** 2) for i in range(-3, 4)]),
    ],
)
def test_taps(sigma: float, taps: list[float]) -> None:
    row = torch.tensor(taps, dtype=torch.float64)
    row = row / row.sum()
    pad = (13 - len(taps)) // 2
    row = torch.nn.functional.pad(row, (pad, pad))
    assert_close(impulse_response(sigma, 13), row[:, None] * row[None, :], f"sigma {sigma}", "hand")


def test_first_blur_has_61_taps() -> None:
    row = impulse_response(10.0, 81).sum(dim=0)
    assert (row > 0).nonzero().squeeze(1).tolist() == list(range(10, 71))
    assert_close(row.sum(), 1.0, "sum", "hand")
    assert_close(row[50] / row[40], 0.5, "10 pixels off", "hand")  # half the peak at sigma: 2^-1


@pytest.mark.parametrize("sigma", [0.0, 0.2, 0.333])
def test_no_blur_below_one_tap(sigma: float) -> None:
    images = draw(1, 3, 4, 4)
    assert blur(images, sigma) is images


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_and_dtype_stay(size: int, dtype: torch.dtype) -> None:
    blurred = blur(draw(2, 3, size, size, dtype=dtype), 10.0)
    assert blurred.shape == (2, 3, size, size)
    assert blurred.dtype == dtype
    assert_finite(blurred, "blurred")


def test_outside_is_black() -> None:
    """sigma 0.5 has the taps 1/18, 16/18, 1/18: 17/18 of a constant is left at an edge, its square in a corner."""
    blurred = blur(torch.ones(1, 1, 4, 4, dtype=torch.float64), 0.5)[0, 0]
    edge = torch.tensor([17 / 18, 1, 1, 17 / 18], dtype=torch.float64)
    assert_close(blurred, edge[:, None] * edge[None, :], "constant image", "hand")


def test_r1_through_the_blur() -> None:
    """R1 takes the gradient before the blur: sum(x B) has the gradient B^T 1."""
    x = draw(1, 1, 6, 6).requires_grad_()
    penalty = r1_penalty(blur(x, 0.5).sum(dim=(1, 2, 3)), x)
    column_sums = blur(torch.ones(1, 1, 6, 6, dtype=torch.float64), 0.5)  # the filter is symmetric
    assert_close(penalty, column_sums.square().sum().reshape(1), "penalty")
