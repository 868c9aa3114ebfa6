"""The synthesis network: style vectors to tri-planes (StyleGAN2 with skip connections; paper, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from .layers import CLAMP, LOW_PASS, FullyConnected, channels_at

NOISE_MODES = ("random", "const", "none")


class SynthesisLayer(nn.Module):
    """style = affine(w); y = clamp(lrelu(demod conv(x style) + noise strength + bias) sqrt(2)), optionally up 2."""

    def __init__(
        self, c_in: int, c_out: int, w_dim: int, resolution: int, *, up: int = 1, backend: str | None = None
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.backend = resolution, up, backend
        self.affine = FullyConnected(w_dim, c_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("low_pass", torch.tensor(LOW_PASS), persistent=False)

    def forward(self, x: Tensor, w: Tensor, noise_mode: str = "random") -> Tensor:
        noise = None
        if noise_mode == "random":
            noise = (
                torch.randn(len(x), 1, self.resolution, self.resolution, device=x.device, dtype=w.dtype)
                * self.noise_strength
            )
        elif noise_mode == "const":
            noise = self.noise_const * self.noise_strength
        return ops.modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            up=self.up,
            kernel=self.low_pass,
            noise=noise,
            bias=self.bias,
            act="lrelu",
            clamp=CLAMP,
            backend=self.backend,
        )


class ToPlanes(nn.Module):
    """A modulated 1x1 convolution without demodulation, the style divided by sqrt(c_in); bias, clamp."""

    def __init__(self, c_in: int, c_out: int, w_dim: int, *, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.affine = FullyConnected(w_dim, c_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        return ops.modulated_conv2d(
            x, self.weight, style, demodulate=False, bias=self.bias, clamp=CLAMP, backend=self.backend
        )


class SynthesisBlock(nn.Module):
    """One resolution: conv0 (up 2, absent at 4x4), conv1, and the layer that adds to the running sum of planes."""

    def __init__(
        self, c_in: int, c_out: int, plane_channels: int, w_dim: int, resolution: int, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.first = c_in == 0
        self.backend = backend
        if self.first:
            self.const = nn.Parameter(torch.randn(c_out, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(c_in, c_out, w_dim, resolution, up=2, backend=backend)
        self.conv1 = SynthesisLayer(c_out, c_out, w_dim, resolution, backend=backend)
        self.to_planes = ToPlanes(c_out, plane_channels, w_dim, backend=backend)
        self.register_buffer("low_pass", torch.tensor(LOW_PASS), persistent=False)
        self.num_convs = 1 if self.first else 2

    def forward(
        self, x: Tensor | None, planes: Tensor | None, ws: Tensor, dtype: torch.dtype, noise_mode: str
    ) -> tuple[Tensor, Tensor]:
        """ws [B, num_convs + 1, w_dim]; x and planes at half the resolution (None at the first)."""
        if self.first:
            x = self.const.to(dtype).expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        else:
            x = self.conv0(x.to(dtype), ws[:, 0], noise_mode)
        x = self.conv1(x, ws[:, self.num_convs - 1], noise_mode)
        added = self.to_planes(x, ws[:, self.num_convs]).to(ws.dtype)
        if planes is not None:
            # "Same size" padding of an up-2 filter: (n + 1) // 2 before, (n - 2) // 2 after.
            pads = ((len(LOW_PASS) + 1) // 2, (len(LOW_PASS) - 2) // 2)
            planes = ops.upfirdn2d(planes, self.low_pass, up=2, padding=pads * 2, gain=4, backend=self.backend)
            added = planes + added
        return x, added


class Synthesis(nn.Module):
    """Blocks from 4x4 to the planes' resolution; channels min(channel_base / resolution, channel_max).

    Args:
        w_dim: Width of the style vectors.
        resolution: Of the planes, a power of two of at least 8.
        plane_channels: Numbers that come out, 3 * C.
        half_blocks: Blocks, counted from the highest resolution, that run in fp16 on a GPU.
        backend: See `ops`.
    """

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        plane_channels: int,
        *,
        channel_base: int = 32768,
        channel_max: int = 512,
        half_blocks: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.resolutions = [2**i for i in range(2, resolution.bit_length())]
        self.half_resolutions = self.resolutions[::-1][:half_blocks]
        c_in = 0
        for res in self.resolutions:
            c_out = channels_at(res, channel_base, channel_max)
            self.add_module(f"b{res}", SynthesisBlock(c_in, c_out, plane_channels, w_dim, res, backend=backend))
            c_in = c_out
        # Every convolution has a style vector; a to-planes layer shares the next one, and the last has its own.
        self.num_ws = 2 * len(self.resolutions)

    def forward(self, ws: Tensor, noise_mode: str = "random") -> Tensor:
        """ws [B, num_ws, w_dim] -> planes [B, 3*C, H, W], channels_last, dtype of ws."""
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"Synthesis: noise_mode must be one of {', '.join(NOISE_MODES)}, got {noise_mode!r}")
        x = planes = None
        first = 0
        for res in self.resolutions:
            block = getattr(self, f"b{res}")
            half = ws.is_cuda and res in self.half_resolutions
            dtype = torch.float16 if half else ws.dtype
            x, planes = block(x, planes, ws[:, first : first + block.num_convs + 1], dtype, noise_mode)
            first += block.num_convs
        return planes.contiguous(memory_format=torch.channels_last)
