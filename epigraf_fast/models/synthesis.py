"""The synthesis network: style vectors to tri-planes (StyleGAN2 with skip connections; paper, section 3.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.backends import resolve
from .layers import CLAMP, LOW_PASS, Affines, FullyConnected, Scaled, channels_at
from .region import Level, Plan, Region, plan

NOISE_MODES = ("random", "const", "none")
SUMMED = 4096  # pixels, about, that one part of a weight's gradient is summed over on a GPU


class SynthesisLayer(nn.Module):
    """style = affine(w); y = clamp(lrelu(demod conv(x style) + noise strength + bias) sqrt(2)), optionally up 2."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        w_dim: int,
        resolution: int,
        *,
        up: int = 1,
        clamp: float | None = CLAMP,
        backend: str | None = None,
        cut_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.clamp = resolution, up, clamp
        self.backend, self.cut_backend = backend, cut_backend
        self.affine = FullyConnected(w_dim, c_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.of_weight: ops.OfWeight | None = None  # while `layers.scaled_once` keeps it
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("low_pass", torch.tensor(LOW_PASS), persistent=False)

    def noise(self, x: Tensor, noise_mode: str, first: Tensor | None) -> Tensor | None:
        """The noise image, without its strength, of what comes of x; see `forward`."""
        size = tuple(n * self.up for n in x.shape[2:])
        if noise_mode == "random":
            return torch.randn(len(x), 1, *size, device=x.device, dtype=self.noise_strength.dtype)
        if noise_mode == "none":
            return None
        if first is None:
            return self.noise_const
        return ops.cut(self.noise_const.expand(len(x), 1, -1, -1), first, size, backend=self.cut_backend)

    def modulation(self, style: Tensor, dtype: torch.dtype) -> ops.Modulation:
        """Weight, style and demodulation coefficients for styles [B, c_in]."""
        return ops.modulation(self.weight, style, dtype, of_weight=self.of_weight, backend=self.backend)

    def forward(self, x: Tensor, w: Tensor, noise_mode: str = "random", first: Tensor | None = None) -> Tensor:
        """`first` [B, 2] is the first texel of what comes out, where x is a part of its level."""
        noise = self.noise(x, noise_mode, first)
        return ops.modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            up=self.up,
            kernel=self.low_pass,
            noise=None if noise is None else noise * self.noise_strength,
            bias=self.bias,
            act="lrelu",
            clamp=self.clamp,
            backend=self.backend,
        )

    def chained(
        self,
        x: Tensor,
        modulation: ops.Modulation,
        noise_mode: str,
        styles: Sequence[Tensor | None],
        first: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`forward` between others: x comes times this layer's style; out go y times each of the styles that follow."""
        noise = self.noise(x, noise_mode, first)
        return ops.modulated_layer(
            x,
            modulation.weight,
            modulation.demod,
            up=self.up,
            kernel=self.low_pass,
            of_weight=self.of_weight,
            noise=noise,
            strength=None if noise is None else self.noise_strength,
            bias=self.bias,
            styles=styles,
            act="lrelu",
            clamp=self.clamp,
            keep_x=False,
            backend=self.backend,
        )


class ToPlanes(nn.Module):
    """A modulated 1x1 convolution without demodulation, the style divided by sqrt(c_in); bias, clamp."""

    def __init__(
        self, c_in: int, c_out: int, w_dim: int, *, clamp: float | None = CLAMP, backend: str | None = None
    ) -> None:
        super().__init__()
        self.clamp, self.backend = clamp, backend
        self.affine = FullyConnected(w_dim, c_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        return ops.modulated_conv2d(
            x, self.weight, style, demodulate=False, bias=self.bias, clamp=self.clamp, backend=self.backend
        )

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` without bias and clamp, as one matrix product for every image: x is read, and never scaled.

        Args:
            weight: [B, c_out, c_in], the style in it.
        """
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, c_in], a view of channels_last memory
        parts = parts_of(pixels.shape[1]) if x.is_cuda else 1
        y = product_of_pixels(pixels, weight.to(x.dtype), parts)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def parts_of(pixels: int) -> int:
    """How many equal parts of about `SUMMED` an image's pixels have; 1 where there is no such number."""
    least = -(-pixels // SUMMED)
    return next((parts for parts in range(least, 4 * least + 1) if pixels % parts == 0), 1)


def product_of_pixels(pixels: Tensor, weight: Tensor, parts: int = 1) -> Tensor:
    """pixels [B, N, C] weight^T [B, C, O] -> [B, N, O].

    The gradient of the weight is a sum over N, hundreds of thousands of pixels, for few numbers: on a GPU a few blocks
    would add them one after the other. In `parts` equal parts it is as many products at once, whose results are added.
    """
    return torch.bmm(pixels, weight.mT) if parts == 1 else _ProductOfPixels.apply(pixels, weight, parts)


class _ProductOfPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, parts: int) -> Tensor:
        ctx.save_for_backward(pixels, weight)
        ctx.parts = parts
        return torch.bmm(pixels, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Of torch's operations, which have further derivatives."""
        pixels, weight = ctx.saved_tensors
        grad_pixels = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_pixels = torch.bmm(grad, weight)
        if ctx.needs_input_grad[1]:
            left, right = (x.unflatten(1, (ctx.parts, -1)).flatten(0, 1) for x in (grad, pixels))
            sums = torch.bmm(left.mT, right).unflatten(0, (-1, ctx.parts))  # [B, parts, O, C]
            grad_weight = sums.sum(dim=1)
        return grad_pixels, grad_weight, None


class SynthesisBlock(nn.Module):
    """One resolution: conv0 (up 2, absent at 4x4), conv1, and the layer that adds to the running sum of planes."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        plane_channels: int,
        w_dim: int,
        resolution: int,
        *,
        clamp: float | None = CLAMP,
        backend: str | None = None,
        cut_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.first = c_in == 0
        self.clamp, self.backend, self.cut_backend = clamp, backend, cut_backend
        options = {"clamp": clamp, "backend": backend}
        if self.first:
            self.const = nn.Parameter(torch.randn(c_out, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(c_in, c_out, w_dim, resolution, up=2, cut_backend=cut_backend, **options)
        self.conv1 = SynthesisLayer(c_out, c_out, w_dim, resolution, cut_backend=cut_backend, **options)
        self.to_planes = ToPlanes(c_out, plane_channels, w_dim, **options)
        self.register_buffer("low_pass", torch.tensor(LOW_PASS), persistent=False)
        self.num_convs = 1 if self.first else 2

    def convs(self) -> list[SynthesisLayer]:
        return [self.conv1] if self.first else [self.conv0, self.conv1]

    def forward(
        self,
        x: Tensor | None,
        planes: Tensor | None,
        ws: Sequence[Tensor],
        dtype: torch.dtype,
        noise_mode: str,
        level: Level | None = None,
    ) -> tuple[Tensor, Tensor]:
        """ws num_convs + 1 times [B, w_dim]; x and planes at half the resolution (None at the first).

        With a `level`, only what that says is computed, of what the level below hands on.
        """
        if self.first:
            x = self.const.to(dtype).expand(len(ws[0]), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        elif level is None:
            x = self.conv0(x.to(dtype), ws[0], noise_mode)
        else:
            x = ops.cut(x, level.below, level.below_size, backend=self.cut_backend)
            x = self.conv0(x.to(dtype), ws[0], noise_mode, level.first)
        x = self.conv1(x, ws[self.num_convs - 1], noise_mode, None if level is None else level.first)
        added = self.to_planes(x, ws[self.num_convs]).to(ws[0].dtype)
        return x, added if planes is None else self.upsample(planes, level) + added

    def chained(
        self,
        x: Tensor | None,
        planes: Tensor | None,
        modulations: Sequence[ops.Modulation],
        weight: Tensor,
        next_style: Tensor | None,
        noise_mode: str,
        level: Level | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """`forward` in a chain: x comes and goes times the style of the convolution that reads it.

        Args:
            modulations: Of conv0 and conv1.
            weight: Of the layer that adds to the planes, see `ToPlanes.product`.
            next_style: Of the next block's conv0; None at the last one, which hands no x on.
        """
        last = modulations[-1]
        if self.first:
            x = self.const.to(last.weight.dtype) * last.style.to(last.weight.dtype)[:, :, None, None]
            x = x.contiguous(memory_format=torch.channels_last)
        elif level is None:
            (x,) = self.conv0.chained(x, modulations[0], noise_mode, (last.style,))
        else:
            x = ops.cut(x, level.below, level.below_size, backend=self.cut_backend)
            (x,) = self.conv0.chained(x, modulations[0], noise_mode, (last.style,), level.first)
        styles, first = (None,) if next_style is None else (None, next_style), None if level is None else level.first
        y, *following = self.conv1.chained(x, last, noise_mode, styles, first)
        product, bias = self.to_planes.product(y, weight), self.to_planes.bias
        if planes is None:
            planes = ops.bias_act(product, bias, clamp=self.clamp, backend=self.backend).to(weight.dtype)
        else:
            if product.dtype == torch.bfloat16:  # which the kernels add to no sum
                product = product.to(planes.dtype)
            planes = self.upsample(planes, level, added=product, bias=bias, clamp=self.clamp)
        return following[0] if following else None, planes

    def upsample(self, planes: Tensor, level: Level | None = None, **added: Any) -> Tensor:
        """The running sum times 2, or that of the part that a level reads; `ops.upfirdn2d` says what may be added."""
        if level is not None:
            planes = ops.cut(planes, level.below, level.below_size, backend=self.cut_backend)
        # "Same size" padding of an up-2 filter: (n + 1) // 2 before, (n - 2) // 2 after.
        pads = ((len(LOW_PASS) + 1) // 2, (len(LOW_PASS) - 2) // 2)
        return ops.upfirdn2d(planes, self.low_pass, up=2, padding=pads * 2, gain=4, backend=self.backend, **added)


class Synthesis(nn.Module):
    """Blocks from 4x4 to the planes' resolution; channels min(channel_base / resolution, channel_max).

    Args:
        w_dim: Width of the style vectors.
        resolution: Of the planes, a power of two of at least 8.
        plane_channels: Numbers that come out, 3 * C.
        clamp: Of activations and of what is added to the planes; None for never.
        noise: Whether noise images are added; False is noise mode "none" whatever is asked for.
        half_blocks: Blocks, counted from the highest resolution, that run in half precision ...
        half_dtype: ... which is this, fp16 or bf16 ...
        half_on: ... on these kinds of devices; on others they run in the dtype of ws.
        backend, cut_backend: Of the convolutions and of `ops.cut`; see `ops`.
    """

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        plane_channels: int,
        *,
        channel_base: int = 32768,
        channel_max: int = 512,
        clamp: float | None = CLAMP,
        noise: bool = True,
        half_blocks: int = 0,
        half_dtype: torch.dtype = torch.float16,
        half_on: tuple[str, ...] = ("cuda",),
        backend: str | None = None,
        cut_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.noise, self.backend = noise, backend
        self.resolutions = [2**i for i in range(2, resolution.bit_length())]
        self.half_resolutions = self.resolutions[::-1][:half_blocks]
        self.half_dtype, self.half_on = half_dtype, half_on
        c_in = 0
        for res in self.resolutions:
            c_out = channels_at(res, channel_base, channel_max)
            options = {"clamp": clamp, "backend": backend, "cut_backend": cut_backend}
            block = SynthesisBlock(c_in, c_out, plane_channels, w_dim, res, **options)
            self.add_module(f"b{res}", block)
            c_in = c_out
        # Every convolution has a style vector; a to-planes layer shares the next one, and the last has its own.
        self.num_ws = 2 * len(self.resolutions)
        blocks = [getattr(self, f"b{res}") for res in self.resolutions]
        # The styles of all layers come from one product for each width, those of the convolutions first.
        convs = [conv for block in blocks for conv in block.convs()]
        to_planes = [block.to_planes for block in blocks]
        self.affines = Affines([layer.affine for layer in (*convs, *to_planes)])
        which = [*range(len(convs)), *range(1, self.num_ws, 2)]  # style vector of each
        rows = torch.tensor([which[place] for place in self.affines.order])
        self.register_buffer("rows", rows, persistent=False)
        self.plane_weights = [
            Scaled([to_planes[place - len(convs)] for place in group if place >= len(convs)], "weight", width**-0.5)
            for group, width in zip(self.affines.groups, self.affines.widths, strict=True)
        ]

    def forward(self, ws: Tensor, noise_mode: str = "random") -> Tensor:
        """ws [B, num_ws, w_dim] -> planes [B, 3*C, H, W], channels_last, dtype of ws."""
        return self._planes(ws, noise_mode, {})

    def in_region(
        self, ws: Tensor, region: Region | Plan, noise_mode: str = "random"
    ) -> tuple[Tensor, ops.PlaneRegion | None]:
        """`forward`, but for what lies outside of a region.

        Returns:
            Planes [B, 3*C, h, w], a little larger than the region, and where they lie; those of their texels that lie
            in the region are right, the rest need not be.
        """
        work = region if isinstance(region, Plan) else plan(region, self.resolutions[-1], ws.device)
        return self._planes(ws, noise_mode, work.levels), work.planes

    def _planes(self, ws: Tensor, noise_mode: str, levels: dict[int, Level]) -> Tensor:
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"Synthesis: noise_mode must be one of {', '.join(NOISE_MODES)}, got {noise_mode!r}")
        noise_mode = noise_mode if self.noise else "none"
        blocks = [getattr(self, f"b{res}") for res in self.resolutions]
        halves = self.half_resolutions if ws.device.type in self.half_on else ()
        dtypes = [self.half_dtype if res in halves else ws.dtype for res in self.resolutions]
        x = planes = None
        if resolve("modulated_conv2d", self.backend, ws.device.type) == "reference":
            firsts = itertools.accumulate((block.num_convs for block in blocks[:-1]), initial=0)
            every = ws.unbind(1)
            vectors = [every[i : i + block.num_convs + 1] for i, block in zip(firsts, blocks, strict=True)]
            for res, block, block_ws, dtype in zip(self.resolutions, blocks, vectors, dtypes, strict=True):
                x, planes = block(x, planes, block_ws, dtype, noise_mode, levels.get(res))
        else:
            styles, weights = self._styles(ws)
            of_convs = iter(styles)
            modulations = [
                [conv.modulation(next(of_convs), dtype) for conv in block.convs()]
                for block, dtype in zip(blocks, dtypes, strict=True)
            ]
            next_styles = [first.style for first, *_ in modulations[1:]] + [None]
            for i, block in enumerate(blocks):
                if x is not None:
                    x = x.to(dtypes[i])
                level = levels.get(self.resolutions[i])
                x, planes = block.chained(x, planes, modulations[i], weights[i], next_styles[i], noise_mode, level)
        return planes.contiguous(memory_format=torch.channels_last)

    def _styles(self, ws: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of every convolution its style [B, c_in], of every layer that adds to the planes its weight [B, 3*C, c_in].

        (See `ToPlanes.product`.)
        """
        count = self.num_ws - 1  # of convolutions, which come first in every group
        styles: list[Tensor] = [ws] * count
        weights: list[Tensor] = []
        groups = self.affines.grouped(ws.index_select(1, self.rows).transpose(0, 1))
        for group, vectors, part in zip(self.affines.groups, groups, self.plane_weights, strict=True):
            own, of_planes = vectors.split([len(group) - len(part.layers), len(part.layers)])
            for place, style in zip(group, own.unbind(0), strict=False):
                styles[place] = style
            weights += (part.stacked().flatten(2)[:, None] * of_planes[:, :, None]).unbind(0)
        return styles, weights
