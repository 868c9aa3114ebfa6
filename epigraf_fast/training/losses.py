"""The non-saturating GAN losses, R1, and the blur of the discriminator's input (paper, section 3.4; StyleGAN2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import ops


def generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(fake))."""
    return softplus(-fake_logits).mean()


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """mean softplus(D(fake)) + mean softplus(-D(real))."""
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def r1_penalty(real_logits: Tensor, real_patches: Tensor) -> Tensor:
    """Per sample |d sum(D(real)) / d patch|^2 [B]; differentiable, for the discriminator's regularization."""
    (grad,) = torch.autograd.grad(real_logits.sum(), real_patches, create_graph=True)
    return grad.square().sum(dim=(1, 2, 3))


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor | None = None) -> Tensor:
    """Per sample sqrt(mean over style vectors of |g|^2), g the gradient of sum(images noise) / sqrt(H W) to ws: [B].

    Differentiable (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", section 3.2).

    Args:
        images: [B, C, H, W], made from ws [B, num_ws, w_dim].
        noise: Standard normal, like the images, in place of a fresh draw.
    """
    noise = torch.randn_like(images) if noise is None else noise
    height, width = images.shape[2:]
    (grad,) = torch.autograd.grad((images * noise).sum() / math.sqrt(height * width), ws, create_graph=True)
    return grad.square().sum(dim=2).mean(dim=1).sqrt()


def blur_radius(sigma: float) -> int:
    """Taps of `blur` on each side of the middle."""
    return math.floor(3 * sigma)


def blur(images: Tensor, sigma: float | Tensor, radius: int | None = None) -> Tensor:
    """Separable low-pass with taps 2^(-(i / sigma)^2), |i| <= floor(3 sigma), sum 1; zero padding, size kept.

    Args:
        sigma: Pixels, a number, or a tensor of one where `radius` says how many taps that makes.
        radius: `blur_radius(sigma)`.
    """
    radius = blur_radius(sigma) if radius is None else radius
    if radius == 0:
        return images
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    taps = torch.exp2(-(taps / sigma).square())
    taps = (taps / taps.sum()).to(images.dtype)
    images = ops.upfirdn2d(images, taps[None, :], padding=(radius, radius, 0, 0))
    return ops.upfirdn2d(images, taps[:, None], padding=(0, 0, radius, radius))
