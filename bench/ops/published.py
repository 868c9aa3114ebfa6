"""The published op sequence in eager torch, written from docs/method.md: what the engine's speed is measured against.

Drop-in replacements. The renderer reads planes by `grid_sample`, decodes with library calls, merges by sort and gather;
modulated convolutions are unfused: scale the input, convolve, filter, scale the output, add noise, then bias and
activation. `bias_act` and `upfirdn2d` are the engine's own kernels, as the published code has its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epigraf_fast import ops
from epigraf_fast.models.decoder import Decoder
from epigraf_fast.models.renderer import FRESH, Draws, Renderer, Rendering
from epigraf_fast.models.synthesis import Synthesis
from epigraf_fast.ops import backends

# Ops whose published sequence is not that of the reference.
OPS = ("sample_triplane", "decode_triplane", "modulated_conv2d", "renderer", "synthesis")

# The functions of `ops` that `installed` replaces; bias_act and upfirdn2d are called from inside them, too.
_bias_act, _upfirdn2d, _conv2d_resample = ops.bias_act, ops.upfirdn2d, ops.conv2d_resample


def sample_triplane(planes: Tensor, points: Tensor) -> Tensor:
    """The mean of three bilinear samples, by `grid_sample`: [B, 3*C, H, W], [B, N, 3] -> [B, N, C]."""
    batch, channels, height, width = planes.shape
    planes = planes.reshape(batch * 3, channels // 3, height, width)
    grid = torch.stack([points[..., [0, 1]], points[..., [0, 2]], points[..., [1, 2]]], dim=1)  # [B, 3, N, 2]
    grid = grid.to(planes.dtype).flatten(0, 1)[:, None]  # [3*B, 1, N, 2]
    features = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return features.squeeze(2).unflatten(0, (batch, 3)).mean(dim=1).transpose(1, 2)


def decode_triplane_rays(
    planes: Tensor,
    ray_origins: Tensor,
    ray_directions: Tensor,
    t: Tensor,
    network: ops.Network,
    cube_scale: float = 1.0,
) -> Tensor:
    """Raw colour and density [B, R, S, out] of points on rays; every feature and hidden unit goes through memory."""
    points = ray_origins[:, :, None] + t[..., None] * ray_directions[:, :, None]
    features, (w0, b0, w1, b1) = sample_triplane(planes, (points / cube_scale).flatten(1, 2)), network
    hidden = F.leaky_relu(F.linear(features, w0, b0), 0.2) * 2**0.5
    return F.linear(hidden, w1, b1).unflatten(1, t.shape[1:])


def _weights(t: Tensor, raw_density: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """w_i = a_i T_i and T_i, [B, R, S] each."""
    raw_density = raw_density + options["density_shift"]
    if options["activation"] == "softplus":
        density = F.softplus(raw_density, beta=options["softplus_beta"])
    else:
        density = F.relu(raw_density)
    last = torch.full_like(t[..., :1], options["last_interval"])
    alpha = 1 - torch.exp(-torch.cat([t[..., 1:] - t[..., :-1], last], dim=-1) * density)
    through = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10], dim=-1)
    transmittance = torch.cumprod(through, dim=-1)[..., :-1]
    return alpha * transmittance, transmittance


def _fine_t(t: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """Importance samples [B, R, K] by inversion of the coarse weights' CDF."""
    bins = (t[..., 1:] + t[..., :-1]) / 2
    weights = (weights + 1e-5)[..., 1:-1] + 1e-5
    cdf = torch.cumsum(weights / weights.sum(dim=-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1)
    knot = torch.searchsorted(cdf, u.contiguous())
    ends = torch.stack([(knot - 1).clamp(min=0), knot.clamp(max=weights.shape[-1])], dim=-1)  # [B, R, K, 2]
    shape = (*ends.shape[:-1], -1)
    cdf_ends = cdf[..., None, :].expand(*shape[:-1], cdf.shape[-1]).gather(-1, ends)
    bin_ends = bins[..., None, :].expand(*shape[:-1], bins.shape[-1]).gather(-1, ends)
    span = cdf_ends[..., 1] - cdf_ends[..., 0]
    span = torch.where(span < 1e-5, torch.ones_like(span), span)
    return bin_ends[..., 0] + (u - cdf_ends[..., 0]) / span * (bin_ends[..., 1] - bin_ends[..., 0])


def stratified_t(ray_start: float, ray_end: float, jitter: Tensor) -> Tensor:
    """Evenly spaced depths, each moved inside its stratum by jitter [..., S] in [0, 1)."""
    t = torch.linspace(ray_start, ray_end, jitter.shape[-1], dtype=jitter.dtype, device=jitter.device)
    middle = (t[1:] + t[:-1]) / 2
    low, high = torch.cat([t[:1], middle]), torch.cat([middle, t[-1:]])
    return low + (high - low) * jitter


def render(
    renderer: Renderer,
    planes: Tensor,
    network: ops.Network,
    ray_origins: Tensor,
    ray_directions: Tensor,
    *,
    stochastic: bool | None = None,
    density_noise_std: float | Tensor = 0.0,
    draws: Draws = FRESH,
) -> Rendering:
    """`Renderer.forward` by eager torch: decode, integrate, draw, decode, concatenate, sort, gather, integrate.

    Args:
        renderer: Holds the settings.
        draws: The seed is not used: torch's generator draws.
    """
    config, shape, device = renderer.config, ray_origins.shape[:2], ray_origins.device
    jitter, u, coarse_noise, fine_noise, _ = draws
    stochastic = renderer.is_stochastic(stochastic)

    def decode(t: Tensor) -> Tensor:
        return decode_triplane_rays(planes, ray_origins, ray_directions, t, network, renderer.cube_scale)

    def noisy(raw_density: Tensor, draw: Tensor | None) -> Tensor:
        if not isinstance(density_noise_std, Tensor) and density_noise_std == 0:
            return raw_density
        return raw_density + density_noise_std * (torch.randn_like(raw_density) if draw is None else draw)

    samples, dtype = config.coarse_samples, ray_origins.dtype
    if stochastic:
        jitter = torch.rand(*shape, samples, dtype=dtype, device=device) if jitter is None else jitter
        t = stratified_t(renderer.ray_start, renderer.ray_end, jitter)
    else:
        t = torch.linspace(renderer.ray_start, renderer.ray_end, samples, dtype=dtype, device=device)
        t = t.expand(*shape, -1)
    values = decode(t)
    if config.fine_samples:
        with torch.no_grad():
            weights, _ = _weights(t, noisy(values[..., -1], coarse_noise), config.density)
            if u is None and stochastic:
                u = torch.rand(*shape, config.fine_samples, dtype=dtype, device=device)
            elif u is None:
                u = torch.linspace(0, 1, config.fine_samples, dtype=dtype, device=device).expand(*shape, -1)
            t_fine = _fine_t(t, weights, u)
        values = torch.cat([decode(t_fine), values], dim=2)
        t, order = torch.sort(torch.cat([t_fine, t], dim=2), dim=2, stable=True)
        values = torch.gather(values, 2, order[..., None].expand_as(values))
    weights, transmittance = _weights(t, noisy(values[..., -1], fine_noise), config.density)
    weight_sum = weights.sum(dim=-1)
    if config.last_back:
        weights = torch.cat([weights[..., :-1], weights[..., -1:] + (1 - weight_sum)[..., None]], dim=-1)
    rgb = (weights[..., None] * values[..., :-1]).sum(dim=2)
    if config.white_background:
        rgb = rgb + (1 - weight_sum)[..., None]
    return Rendering(rgb, (weights * t).sum(dim=-1), weight_sum, transmittance[..., -1])


class PublishedRenderer(Renderer):
    """A `Renderer` that renders by `render`. The decoder's weights are used; its op is not."""

    def forward(
        self, planes: Tensor, decoder: Decoder, ray_origins: Tensor, ray_directions: Tensor, **options: Any
    ) -> Rendering:
        return render(self, planes, decoder.network(), ray_origins, ray_directions, **options)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    up: int = 1,
    kernel: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`ops.modulated_conv2d`, one pass over memory after the other; the demodulation builds a kernel for every image.

    Args:
        backend: Of `bias_act` and `upfirdn2d`.
    """
    if x.dtype == torch.float16 and demodulate:
        fan_in = weight[0].numel()
        weight = weight / (fan_in**0.5 * weight.abs().amax(dim=(1, 2, 3), keepdim=True))
        style = style / style.abs().amax(dim=1, keepdim=True)
    x = x * style.to(x.dtype)[:, :, None, None]
    if up == 1:
        x = F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2)
    else:
        x = F.conv_transpose2d(x, weight.to(x.dtype).transpose(0, 1), stride=up)
        # The transposed convolution gives 2H + 1 rows, of which the 4-tap filter leaves 2H.
        pad = (kernel.shape[-1] - 2) // 2
        x = _upfirdn2d(x, kernel, padding=pad, gain=up**2, backend=backend)
    if demodulate:
        of_image = weight[None] * style[:, None, :, None, None]  # [B, C_out, C_in, k, k]
        demodulation = (of_image.square().sum(dim=(2, 3, 4)) + 1e-8).rsqrt()
        x = x * demodulation.to(x.dtype)[:, :, None, None]
    if noise is not None:
        x = x + noise.to(x.dtype)
    return _bias_act(x, None if bias is None else bias.to(x.dtype), act=act, gain=gain, clamp=clamp, backend=backend)


def layer_epilogue(
    x: Tensor,
    *,
    blur: Tensor | None = None,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    styles: tuple[Tensor | None, ...] = (None,),
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """What follows a convolution, and the scaling of the next one's input, one pass over memory after the other."""
    if blur is not None:
        x = _upfirdn2d(x, blur, padding=1, gain=4, backend=backend)
    if demod is not None:
        x = x * demod.to(x.dtype)[:, :, None, None]
    if noise is not None:
        x = x + (noise if strength is None else noise * strength).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = _bias_act(x, bias, act=act, gain=gain, clamp=clamp, backend=backend)
    return tuple(y if style is None else y * style.to(y.dtype)[:, :, None, None] for style in styles)


def synthesize(synthesis: Synthesis, layout: torch.memory_format, ws: Tensor, noise_mode: str = "random") -> Tensor:
    """`Synthesis.forward` with activations in a layout; planes come contiguous, as `grid_sample` wants them."""
    noise_mode = noise_mode if synthesis.noise else "none"
    x = planes = None
    first = 0
    for resolution in synthesis.resolutions:
        block = getattr(synthesis, f"b{resolution}")
        half = ws.device.type in synthesis.half_on and resolution in synthesis.half_resolutions
        dtype = synthesis.half_dtype if half else ws.dtype
        x, planes = block(x, planes, ws[:, first : first + block.num_convs + 1].unbind(1), dtype, noise_mode)
        x = x.contiguous(memory_format=layout)
        first += block.num_convs
    return planes.contiguous()


def fused_backend(device_type: str, compiled: bool = False) -> str | None:
    """What `installed` gives a baseline on a kind of device.

    The engine's kernels, as the published code has its own, whether a GPU was checked for them or not; but a compiler
    fuses what it can see, and gets the plain bias_act and upfirdn2d.
    """
    if compiled:
        return "reference"
    return "cuda" if backends.lacking_on("bias_act", "cuda", device_type) is None else None


@contextlib.contextmanager
def installed(backend: str | None = None) -> Iterator[None]:
    """In this block the convolutions of `ops` are the unfused ones; networks that are called inside use them.

    Args:
        backend: Of bias_act and upfirdn2d; None takes the fastest there is.
    """
    functions = {
        "modulated_conv2d": modulated_conv2d,
        "layer_epilogue": layer_epilogue,
        "conv2d_resample": _conv2d_resample,
        "bias_act": _bias_act,
        "upfirdn2d": _upfirdn2d,
    }
    replaced = {name: _with_backend(f, backend) for name, f in functions.items() if hasattr(ops, name)}
    before = {name: getattr(ops, name) for name in replaced}
    for name, function in replaced.items():
        setattr(ops, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


def _with_backend(function: Callable[..., Tensor], backend: str | None) -> Callable[..., Tensor]:
    """The function with its backend chosen here, whatever the caller asks for."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        return function(*args, **{**options, "backend": backend})

    return call


def prepare_compiler() -> None:
    """Every shape is compiled for itself, and none falls back to eager code in silence."""
    import torch._dynamo

    for name, value in {"recompile_limit": 256, "fail_on_recompile_limit_hit": True}.items():
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, value)


def publish(generator: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> None:
    """Gives a generator the published renderer and a layout; `installed` gives it the modulated convolution."""
    old = generator.renderer
    generator.renderer = PublishedRenderer(old.config, old.ray_start, old.ray_end, old.cube_scale)
    generator.renderer.train(old.training)
    generator.synthesis.forward = functools.partial(synthesize, generator.synthesis, layout)
