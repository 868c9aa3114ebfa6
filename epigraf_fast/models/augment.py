"""Augmentation of the discriminator's input (method.md 12; Karras et al. 2020, "Training generative adversarial
networks with limited data").

One geometric map and one colour map per image, each a product of operations that their own gates switch on. Nothing
waits for the device: the strength is a tensor, and the constants are buffers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..config import AugmentConfig

# The 12-tap low-pass of the sym6 wavelet; used divided by its sum.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
GEOMETRY = ("x_flip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
COLOUR = ("brightness", "contrast", "luma_flip", "hue", "saturation")
# One row a number that is drawn: (operation, gate, factor, constant, neutral value). The first are uniform, those from
# `scale` on normal; factor and constant make them what `Operations` has, with what `Augment.draw` does to some rows.
ROWS = (
    ("x_flip", 0, 2.0, 0.0, 0.0),
    ("rotate90", 1, 4.0, 0.0, 0.0),
    ("xint", 2, 1 / 4, -1 / 8, 0.0),
    ("xint", 2, 1 / 4, -1 / 8, 0.0),
    ("rotate", 4, 2 * math.pi, -math.pi, 0.0),
    ("rotate", 6, 2 * math.pi, -math.pi, 0.0),
    ("luma_flip", 10, 2.0, 0.0, 0.0),
    ("hue", 11, 2 * math.pi, -math.pi, 0.0),
    ("scale", 3, 0.2, 0.0, 1.0),
    ("aniso", 5, 0.2, 0.0, 1.0),
    ("xfrac", 7, 1 / 8, 0.0, 0.0),
    ("xfrac", 7, 1 / 8, 0.0, 0.0),
    ("brightness", 8, 0.2, 0.0, 0.0),
    ("contrast", 9, 0.5, 0.0, 1.0),
    ("saturation", 12, 1.0, 0.0, 1.0),
)
# The order that they are computed in: whole numbers, angles, xint, xfrac, brightness, powers of two.
ORDER = (0, 1, 6, 4, 5, 7, 2, 3, 10, 11, 12, 8, 9, 13, 14)
WHOLE, XINT, POWERS = slice(0, 3), slice(6, 8), slice(11, 15)
UNIFORM, GATES = 8, 13
SECOND_ROTATION = 5
REACH = 6  # pixels that half the filter sees beyond the image


class Operations(NamedTuple):
    """What is done to each image; see method.md 12 for the units. [B], translations [B, 2] (x, y)."""

    x_flip: Tensor
    rotate90: Tensor
    xint: Tensor  # pixels
    scale: Tensor
    rotate_before: Tensor  # radians
    aniso: Tensor
    rotate_after: Tensor  # radians
    xfrac: Tensor  # shares of the image's size
    brightness: Tensor
    contrast: Tensor
    luma_flip: Tensor
    hue: Tensor  # radians
    saturation: Tensor


class Augment(nn.Module):
    """Augments patches with a probability per operation, each image by itself.

    Args:
        config: Which operations are enabled.
        backend: See `ops`.
    """

    def __init__(self, config: AugmentConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.enabled = {name for name in (*GEOMETRY, *COLOUR) if getattr(config, name)}
        names, gates, *numbers = zip(*(ROWS[row] for row in ORDER), strict=True)
        # Either rotation is on with probability p: 1 - (1 - gate)^2 = p. What is disabled is on with 1 - (1 - p)^0.
        numbers.append([(0.5 if name == "rotate" else 1.0) * (name in self.enabled) for name in names])
        for name, dtype in (("rows", torch.float64), ("single_rows", torch.float32)):
            self.register_buffer(name, torch.tensor(numbers, dtype=dtype)[..., None], persistent=False)
        places = [*gates, *(GATES + row for row in ORDER)]  # among all that is drawn
        self.register_buffer("places", torch.tensor(places), persistent=False)
        taps = torch.tensor(SYM6, dtype=torch.float64)
        self.register_buffer("low_pass", (taps / taps.sum()).float(), persistent=False)
        # Rodrigues' formula about v = (1, 1, 1) / sqrt(3): cos I + sin K + (1 - cos) v v^T, K x = v cross x.
        self.register_buffer("identity", torch.eye(3), persistent=False)
        self.register_buffer("unmoved", torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]), persistent=False)
        self.register_buffer("zero", torch.zeros([]), persistent=False)
        self.register_buffer("mean_colour", torch.full((3, 3), 1 / 3), persistent=False)
        cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
        self.register_buffer("cross", cross / math.sqrt(3), persistent=False)

    def forward(self, patches: Tensor, p: Tensor, percentile: float | None = None) -> Tensor:
        """[B, C, H, W], C = 1 or a multiple of 3 -> the same shape; affine in the patches, differentiable to any order.

        Further groups of 3 channels are further images that the same is done to.

        Args:
            p: Strength, a number on the device: the probability of every operation.
            percentile: In (0, 100): all enabled operations are on, every uniform number is Q = percentile / 100, every
                normal one erfinv(2 Q - 1), and the second rotation is 0. Draws nothing.

        Raises:
            ValueError: Another number of channels, or a percentile outside (0, 100).
        """
        batch, channels, height, width = patches.shape
        if channels != 1 and channels % 3:
            raise ValueError(f"Augment: patches must have 1 channel or a multiple of 3, got {channels}")
        if percentile is not None and not 0 < percentile < 100:
            raise ValueError(f"Augment: percentile must be in (0, 100), got {percentile}")
        drawn = self.draw(batch, (width, height), p, patches.dtype, percentile)
        if self.enabled & set(GEOMETRY):
            moved = geometric_map(drawn, (width, height))
            margins = exact_margins(*moved, (width, height)) if self.config.exact_margins else None
            resampled = resample(patches, *moved, self.low_pass.to(patches.dtype), margins, backend=self.backend)
            # What nothing moves stays as it is to the last bit; the filters alone would cost a rounding or two.
            still = (torch.cat([moved[0].flatten(1), moved[1]], dim=1) == self.unmoved).all(dim=1)
            patches = choose(still[:, None, None, None], patches, resampled, self.zero.to(patches.dtype))
        if self.enabled & set(COLOUR):
            patches = recolour(patches, *self.colour_map(drawn, grey=channels == 1))
        return patches

    def draw(
        self, num: int, size: tuple[int, int], p: Tensor, dtype: torch.dtype, percentile: float | None = None
    ) -> Operations:
        """The operations of `num` images of `size` (width, height)."""
        device, count = self.low_pass.device, GATES + len(ROWS)
        factor, constant, neutral, exponents = self.rows.to(dtype) if dtype != torch.float32 else self.single_rows
        if percentile is None:
            drawn = torch.empty(count, num, dtype=dtype, device=device)
            drawn[: GATES + UNIFORM].uniform_()
            drawn[GATES + UNIFORM :].normal_()
            probability = 1 - (1 - p.to(dtype).clamp(0, 1)).pow(exponents)
        else:
            drawn = torch.full((count, num), percentile / 100, dtype=dtype, device=device)
            drawn[:GATES], probability = 0, exponents
            drawn[GATES + UNIFORM :] = (2 * drawn[GATES + UNIFORM :] - 1).erfinv()
            drawn[GATES + SECOND_ROTATION] = 0.5  # an angle of 0
        # All numbers at once, few launches: each operation by itself would need several.
        gates, drawn = drawn[self.places].chunk(2)
        drawn = torch.addcmul(constant, drawn, factor)
        drawn[WHOLE].floor_()
        if size[0] == size[1]:
            drawn[XINT].mul_(size[0])
        else:
            for place, pixels in enumerate(size, XINT.start):
                drawn[place].mul_(pixels)
        drawn[XINT].round_()
        drawn[POWERS].exp2_()
        drawn = torch.where(gates < probability, drawn, neutral)
        flip, turn, luma, before, after, hue, *_, brightness, scale, aniso, contrast, saturation = drawn
        return Operations(
            x_flip=flip,
            rotate90=turn,
            xint=drawn[XINT].t(),
            scale=scale,
            rotate_before=before,
            aniso=aniso,
            rotate_after=after,
            xfrac=drawn[XINT.stop : XINT.stop + 2].t(),
            brightness=brightness,
            contrast=contrast,
            luma_flip=luma,
            hue=hue,
            saturation=saturation,
        )

    def colour_map(self, drawn: Operations, grey: bool = False) -> tuple[Tensor, Tensor]:
        """A [B, 3, 3] and b [B, 3] of the colour map A rgb + b; [B, 1, 1] and [B, 1] for grey images."""
        dtype = drawn.contrast.dtype
        identity, mean = self.identity.to(dtype), self.mean_colour.to(dtype)
        contrast, flip = drawn.contrast[:, None, None], drawn.luma_flip[:, None, None]
        matrix = contrast * torch.addcmul(identity, flip, mean, value=-2)
        if not grey:
            cos, sin = drawn.hue.cos()[:, None, None], drawn.hue.sin()[:, None, None]
            rotation = torch.addcmul(torch.lerp(mean, identity, cos), sin, self.cross.to(dtype))
            saturation = torch.lerp(mean, identity, drawn.saturation[:, None, None])
            matrix = product(saturation, product(rotation, matrix))
        shift = matrix.sum(dim=2) * drawn.brightness[:, None]  # brightness comes first, the same to all channels
        if grey:
            return matrix.sum(dim=2).mean(dim=1)[:, None, None], shift.mean(dim=1, keepdim=True)
        return matrix, shift


def product(a: Tensor, b: Tensor) -> Tensor:
    """[..., n, k] times [..., k, m], in full precision whatever the setting of TF32."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(dim=-2)


def geometric_map(drawn: Operations, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """M as L [B, 2, 2] and b [B, 2]: output pixel positions u to input ones L u + b, x right, y down, from the centre.

    M = S(1-2f, 1) Rot(k pi/2) T(-i) S(1/s, 1/s) Rot(a) S(1/q, q) Rot(a') T(-W v_x, -H v_y).

    Args:
        size: Width, height.
    """
    angles = torch.stack([drawn.rotate90 * (math.pi / 2), drawn.rotate_before, drawn.rotate_after])
    cos, sin = angles.cos(), angles.sin()
    turn, before, after = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    mirror = torch.rsub(drawn.x_flip, 1, alpha=2)[:, None, None]
    first = torch.cat([turn[:, :1] * mirror, turn[:, 1:]], dim=1)
    stretch = torch.stack([drawn.aniso.reciprocal(), drawn.aniso], dim=1)
    linear = product(first, before / drawn.scale[:, None, None])
    linear = product(linear * stretch[:, None, :], after)
    width, height = size
    if width == height:
        back = drawn.xfrac * -width
    else:
        back = torch.stack([drawn.xfrac[:, 0] * -width, drawn.xfrac[:, 1] * -height], dim=1)
    return linear, torch.addcmul(linear * back[:, None, :], first, drawn.xint[:, None, :], value=-1).sum(dim=2)


def exact_margins(linear: Tensor, shift: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, right, top and bottom padding that a batch needs; waits for the device.

    Args:
        linear, shift: Of `geometric_map`.
        size: Width, height.
    """
    x, y = (size[0] - 1) / 2, (size[1] - 1) / 2
    corners = torch.tensor([[-x, x, x, -x], [-y, -y, y, y]], dtype=linear.dtype, device=linear.device)
    at = product(linear, corners) + shift[..., None]  # [B, 2, 4]
    reach = torch.stack([(-at).amax(dim=(0, 2)), at.amax(dim=(0, 2))], dim=1).flatten().tolist()
    most = (size[0] - 1, size[0] - 1, size[1] - 1, size[1] - 1)
    return tuple(math.ceil(min(max(r + REACH - m / 2, 0), m)) for r, m in zip(reach, most, strict=True))


def resample(
    images: Tensor,
    linear: Tensor,
    shift: Tensor,
    low_pass: Tensor,
    margins: tuple[int, int, int, int] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Images moved by u -> L u + b: reflected around, upsampled by 2, sampled bilinearly, downsampled.

    Args:
        images: [B, C, H, W].
        linear, shift: Of `geometric_map`.
        low_pass: [12], orthonormal, sum 1.
        margins: Left, right, top, bottom; default: as much as reflection allows, which needs no look at the map.
    """
    height, width = images.shape[2:]
    left, right, top, bottom = (width - 1, width - 1, height - 1, height - 1) if margins is None else margins
    x = torch.nn.functional.pad(images, (left, right, top, bottom), mode="reflect")
    x = ops.upfirdn2d(x, low_pass, up=2, padding=(6, 5, 6, 5), gain=4, backend=backend)
    # Zeros up to powers of two, by which normalized coordinates divide without rounding: pixels stay on pixels.
    rows, columns = x.shape[2:]
    padded_rows, padded_columns = (1 << (n - 1).bit_length() for n in (rows, columns))
    x = torch.nn.functional.pad(x, (0, padded_columns - columns, 0, padded_rows - rows))

    # In upsampled pixels, from the centres, which lie half a pixel further than those of the pixels before:
    # v = L (u + 1/2) + 2 b - 1/2, moved by the margins; then (2 v + columns) / padded_columns - 1.
    axes = ((left, right, columns, padded_columns), (top, bottom, rows, padded_rows))
    scales: Any = [2 / padded for _, _, _, padded in axes]
    starts: Any = [(before - after - 0.5) * (2 / padded) + (size / padded - 1) for before, after, size, padded in axes]
    x_places = _places(width, linear)
    y_places = x_places if width == height else _places(height, linear)
    if axes[0] == axes[1]:
        scales, starts = scales[0], starts[0]
    else:
        scales, starts = linear.new_tensor([scales, starts])
    start = shift * (2 * scales) + starts  # [B, 2], x and y
    along_x, along_y = (linear.transpose(1, 2) * scales).unbind(1)  # [B, 2], steps
    at_x = along_x[:, None] * x_places  # [B, w, 2]
    at_y = torch.addcmul(start[:, None], along_y[:, None], y_places)  # [B, h, 2]
    grid = at_y[:, :, None] + at_x[:, None]
    x = sample_bilinear(x, grid)
    return ops.upfirdn2d(x, low_pass, down=2, padding=-1, flip=True, backend=backend)


def _places(pixels: int, like: Tensor) -> Tensor:
    """Of the upsampled pixels that the last filter reads along an axis, from the centre in halves of pixels: [n, 1]."""
    reach = pixels + REACH
    return torch.arange(1 - reach, 1 + reach, dtype=like.dtype, device=like.device)[:, None]


def recolour(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """A x + b on every pixel: images [B, k C, H, W], A [B, C, C], b [B, C]."""
    colours = images.unflatten(1, (-1, shift.shape[1])).transpose(1, 2)  # [B, C, k, H, W]
    mapped = torch.baddbmm(shift[:, :, None], matrix, colours.flatten(2)).view_as(colours)
    return mapped.transpose(1, 2).flatten(1, 2)


def choose(where: Tensor, first: Tensor, second: Tensor, zero: Tensor) -> Tensor:
    """The first tensor's numbers where the condition holds, else the second's.

    Args:
        zero: A 0 that lies on the device: torch would make one for every gradient.
    """
    return _Choice.apply(where, first, second, zero)


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, where: Tensor, first: Tensor, second: Tensor, zero: Tensor) -> Tensor:
        ctx.save_for_backward(where, zero)
        return torch.where(where, first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        where, zero = ctx.saved_tensors
        to_first, to_second = ctx.needs_input_grad[1:3]
        return (
            None,
            _Choice.apply(where, grad, zero, zero) if to_first else None,
            _Choice.apply(where, zero, grad, zero) if to_second else None,
            None,
        )


def sample_bilinear(images: Tensor, grid: Tensor) -> Tensor:
    """`grid_sample` (bilinear, zeros outside, align_corners=False) with derivatives of every order to the images.

    torch's own has no second derivative in many releases. The sampling is linear in the images, so the gradient is its
    transpose, and the gradient of that is the sampling again; the grid gets no gradient.

    Args:
        images: [B, C, H, W].
        grid: [B, h, w, 2].
    """
    return _Sample.apply(images, grid)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return torch.nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SampleTransposed.apply(grad, *ctx.saved_tensors, ctx.shape), None


class _SampleTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        # Of the images only the shape counts: their values would make the gradient to the grid.
        images = grad.new_zeros(1).expand(shape)
        return torch.ops.aten.grid_sampler_2d_backward(grad, images, grid, 0, 0, False, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sample.apply(grad_grad, *ctx.saved_tensors), None, None
