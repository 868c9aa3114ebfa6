"""The renderer as it was published: a baseline, op by op in eager torch (SPEC sections 1, 3, 4 and 5).

Points are written out, every plane is read by `grid_sample`, features and hidden units are tensors, and the two sets of
samples are merged by concatenation, sort and gather. Autograd keeps all of it for the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epigraf_fast.config import RendererConfig
from epigraf_fast.models.decoder import Decoder
from epigraf_fast.models.renderer import Rendering

FLOOR = 1e-5


def decode(planes: Tensor, decoder: Decoder, points: Tensor) -> Tensor:
    """planes [B, 3*C, H, W], points [B, N, 3] in units of the cube's half size -> [B, N, 4]."""
    batch, channels, height, width = planes.shape
    axes = (points[..., [0, 1]], points[..., [0, 2]], points[..., [1, 2]])
    grid = torch.stack(axes, dim=1).flatten(0, 1)[:, None]  # [B*3, 1, N, 2]
    features = torch.nn.functional.grid_sample(
        planes.reshape(batch * 3, channels // 3, height, width),
        grid,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    features = features.reshape(batch, 3, channels // 3, -1).mean(dim=1).transpose(1, 2)  # [B, N, C]
    (w0, b0), (w1, b1) = decoder.fc0.effective(), decoder.fc1.effective()
    hidden = torch.nn.functional.leaky_relu(torch.nn.functional.linear(features, w0, b0), 0.2) * 2**0.5
    return torch.nn.functional.linear(hidden, w1, b1)


def ray_weights(t: Tensor, raw_density: Tensor, config: RendererConfig) -> tuple[Tensor, Tensor]:
    """Weights and transmittance of sorted samples, [B, R, S] each."""
    raw_density = raw_density + config.density_shift
    if config.density_activation == "softplus":
        density = torch.nn.functional.softplus(raw_density, beta=config.softplus_beta)
    else:
        density = torch.relu(raw_density)
    last = torch.full_like(t[..., :1], config.last_interval)
    intervals = torch.cat([t[..., 1:] - t[..., :-1], last], dim=-1)
    alpha = 1 - torch.exp(-intervals * density)
    passed = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10], dim=-1)
    transmittance = torch.cumprod(passed, dim=-1)[..., :-1]
    return alpha * transmittance, transmittance


@torch.no_grad()
def importance_t(t: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """Fine t [B, R, K]: inversion of the CDF of the middle weights over the midpoints of t."""
    bins = (t[..., 1:] + t[..., :-1]) / 2
    weights = weights[..., 1:-1] + 2 * FLOOR
    cdf = torch.cumsum(weights / weights.sum(dim=-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1)
    knot = torch.searchsorted(cdf, u.contiguous(), right=False)
    lower, upper = (knot - 1).clamp(min=0), knot.clamp(max=weights.shape[-1])
    low, high = cdf.gather(-1, lower), cdf.gather(-1, upper)
    width = torch.where(high - low < FLOOR, torch.ones_like(low), high - low)
    start, end = bins.gather(-1, lower), bins.gather(-1, upper)
    return start + (u - low) / width * (end - start)


def render(
    planes: Tensor,
    decoder: Decoder,
    ray_origins: Tensor,
    ray_directions: Tensor,
    ray_start: float,
    ray_end: float,
    cube_scale: float,
    config: RendererConfig,
    *,
    density_noise_std: float | Tensor = 0.0,
    jitter: Tensor | None = None,
    u: Tensor | None = None,
    coarse_noise: Tensor | None = None,
    fine_noise: Tensor | None = None,
) -> Rendering:
    """What `models.renderer.Renderer` computes in training mode; see there for the arguments."""
    (batch, rays), samples, fine_samples = ray_origins.shape[:2], config.coarse_samples, config.fine_samples
    options = {"dtype": ray_origins.dtype, "device": ray_origins.device}
    noisy = isinstance(density_noise_std, Tensor) or density_noise_std > 0

    def decode_at(t: Tensor) -> Tensor:
        points = ray_origins[:, :, None] + t[..., None] * ray_directions[:, :, None]
        return decode(planes, decoder, (points / cube_scale).flatten(1, 2)).unflatten(1, t.shape[1:])

    t = torch.linspace(ray_start, ray_end, samples, **options).expand(batch, rays, samples)
    jitter = torch.rand(batch, rays, samples, **options) if jitter is None else jitter
    middle = (t[..., 1:] + t[..., :-1]) / 2
    low, high = torch.cat([t[..., :1], middle], dim=-1), torch.cat([middle, t[..., -1:]], dim=-1)
    t = low + (high - low) * jitter
    coarse = decode_at(t)
    with torch.no_grad():
        raw_density = coarse[..., 3]
        if noisy:
            noise = torch.randn_like(raw_density) if coarse_noise is None else coarse_noise
            raw_density = raw_density + density_noise_std * noise
        weights, _ = ray_weights(t, raw_density, config)
        u = torch.rand(batch, rays, fine_samples, **options) if u is None else u
        t_fine = importance_t(t, weights, u)
    fine = decode_at(t_fine)

    t, order = torch.sort(torch.cat([t_fine, t], dim=-1), dim=-1)
    values = torch.cat([fine, coarse], dim=-2)
    rgb = torch.gather(values[..., :3], -2, order[..., None].expand(-1, -1, -1, 3))
    raw_density = torch.gather(values[..., 3], -1, order)
    if noisy:
        noise = torch.randn_like(raw_density) if fine_noise is None else fine_noise
        raw_density = raw_density + density_noise_std * noise
    weights, transmittance = ray_weights(t, raw_density, config)
    weight_sum = weights.sum(dim=-1)
    if config.last_back:
        weights = torch.cat([weights[..., :-1], weights[..., -1:] + (1 - weight_sum)[..., None]], dim=-1)
    rgb = (weights[..., None] * rgb).sum(dim=-2)
    depth = (weights * t).sum(dim=-1)
    if config.white_background:
        rgb = rgb + (1 - weight_sum)[..., None]
    return Rendering(rgb, depth, weight_sum, transmittance[..., -1])
