"""The scale- and location-aware patch discriminator (paper, section 3.2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..camera import Patch
from ..config import DiscriminatorConfig
from .layers import CLAMP, Affines, Conv2d, FullyConnected, ScalarEncoder, camera_numbers, channels_at
from .mapping import Mapping


def minibatch_std(x: Tensor, group: int, parts: int = 1) -> Tensor:
    """Appends one channel: the standard deviation over a group, averaged over channels and pixels.

    With G = min(group, B) and n = B / G, group j holds the samples j, j + n, j + 2n, ...

    Args:
        x: [P B, C, H, W], B a multiple of G.
        parts: P, batches one after the other, each with groups of its own.

    Returns:
        [P B, C+1, H, W].
    """
    total, _, height, width = x.shape
    batch = total // parts
    group = min(group, batch)
    if total % parts or batch % group:
        raise ValueError(
            f"minibatch_std: the batch must be a multiple of the group size {group}, got {total} in {parts} parts"
        )
    y = x.unflatten(0, (parts, group, batch // group))
    std = (y.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=(2, 3, 4))  # [P, n]
    std = std.repeat(1, group).view(total, 1, 1, 1).expand(-1, -1, height, width)
    return torch.cat([x, std], dim=1)


def modulation_of(x: Tensor) -> Tensor:
    """1 + tanh(x)."""
    return x.tanh() + 1


class _ChannelsLast(torch.autograd.Function):
    """The same numbers in channels_last, and so with what comes back: gradients of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ChannelsLast.apply(grad)


class DiscriminatorBlock(nn.Module):
    """conv0, conv1 and a 1x1 skip; conv1's channels are scaled by sigma = 1 + tanh(affine(patch code)).

    Args:
        c_in: Channels that the block works at.
        c_out: Channels that it ends at.
        image_channels: Of the image that the block begins with, 0 if it does not.
        down: 1 (leading blocks) or 2.
        modulate: "input" or "output", what of conv1 sigma scales (paper, Eq. 2: output), or "none".
        code_dim: Width of the patch code.
        clamp: Of activations; None for never.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        image_channels: int,
        down: int,
        modulate: str,
        code_dim: int,
        clamp: float | None = CLAMP,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.modulate = modulate
        options = {"clamp": clamp, "backend": backend}
        self.from_rgb = Conv2d(image_channels, c_in, 1, **options) if image_channels else None
        self.conv0 = Conv2d(c_in, c_in, 3, **options)
        self.conv1 = Conv2d(c_in, c_out, 3, down=down, gain=math.sqrt(0.5), **options)
        self.skip = Conv2d(
            c_in, c_out, 1, down=down, act="linear", bias=False, clamp=None, gain=math.sqrt(0.5), backend=backend
        )
        if modulate != "none":
            self.affine = FullyConnected(code_dim, c_in if modulate == "input" else c_out)

    def forward(self, x: Tensor, sigma: Tensor | None) -> Tensor:
        """[B, image_channels or c_in, H, W] -> [B, c_out, H/down, W/down]; None: it is not modulated."""
        if self.from_rgb is not None:
            x = self.from_rgb(x)
        in_scale = sigma if self.modulate == "input" else None
        out_scale = sigma if self.modulate == "output" else None
        return self.skip(x) + self.conv1(self.conv0(x, next_scale=in_scale), out_scale=out_scale)


class Discriminator(nn.Module):
    """Judges r x r patches of R x R images, knowing their scale and position.

    log2(R / r) leading blocks keep the size, then residual blocks go down to 4x4; channels are
    min(channel_base / res, channel_max), `res` counting the leading blocks as if they were at R. A hypernetwork turns
    the encoded (scale, offset x, offset y) into the code that modulates the blocks; the projection head compares the
    last layer with a mapping of label, patch and camera.

    Args:
        config: Settings.
        resolution: R.
        patch_resolution: r.
        label_dim: Numbers of a class label, 0 for none.
        half_blocks: Top blocks in half precision ...
        half_dtype: ... which is this, fp16 or bf16 ...
        half_on: ... on these kinds of devices; on others they run in the dtype of the patches.
        backend: See `ops`.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        resolution: int,
        patch_resolution: int,
        *,
        label_dim: int = 0,
        half_blocks: int = 0,
        half_dtype: torch.dtype = torch.float16,
        half_on: tuple[str, ...] = ("cuda",),
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.label_dim = config, label_dim
        # What is looked at: the patch, the patch and the whole image beside it, or one image that holds both.
        self.input_resolution = resolution if config.global_context == "paste" else patch_resolution
        self.image_channels = 6 if config.global_context == "concat" else 3
        self.resolutions = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]  # R, R/2, ..., 8
        self.half_resolutions = self.resolutions[:half_blocks]
        self.half_dtype, self.half_on = half_dtype, half_on

        head_dim = label_dim
        if config.modulate != "none":
            self.patch_encoder = ScalarEncoder(
                config.patch_steps,
                config.patch_table_dim,
                cosines=config.patch_cosines,
                skip_lowest=config.patch_skip_lowest,
                skip_highest=config.patch_skip_highest,
            )
            self.patch_numbers = 3 if config.patch_position else 1  # scale, offset x, offset y
            patch_dim = self.patch_numbers * self.patch_encoder.dim
            self.hypernetwork = Mapping(0, patch_dim, config.code_dim, backend=backend)
            head_dim += patch_dim
        if config.camera_conditioning:
            self.camera_encoder = ScalarEncoder(config.camera_steps)
            head_dim += 2 * self.camera_encoder.dim

        for res in self.resolutions:
            c_in, c_out = (channels_at(r, config.channel_base, config.channel_max) for r in (res, res // 2))
            block = DiscriminatorBlock(
                c_in,
                c_out,
                image_channels=self.image_channels if res == resolution else 0,
                down=1 if res > self.input_resolution else 2,
                modulate=config.modulate,
                code_dim=config.code_dim,
                clamp=config.clamp or None,
                backend=backend,
            )
            self.add_module(f"b{res}", block)
        self.affines = None
        if config.modulate != "none":
            self.affines = Affines([getattr(self, f"b{res}").affine for res in self.resolutions])
        width = channels_at(4, config.channel_base, config.channel_max)
        self.conv = Conv2d(width + 1, width, 3, clamp=config.clamp or None, backend=backend)
        self.fc = FullyConnected(width * 16, width, act="lrelu", backend=backend)
        self.out = FullyConnected(width, width if head_dim else 1)
        self.head = Mapping(0, head_dim, width, backend=backend) if head_dim else None

    def modulation(self, patch: Patch) -> tuple[Tensor, list[Tensor]]:
        """Of a modulated D: the encoding [B, n] of where patches lie, and sigma of every block.

        Each sigma is [B, c_in or c_out] and in (0, 2); that of the largest resolution comes first.
        """
        numbers = torch.cat([patch.scale[:, None], patch.offset], dim=1)[:, : self.patch_numbers]
        encoded = self.patch_encoder(numbers)
        return encoded, self.affines(self.hypernetwork(None, encoded), modulation_of)

    def forward(
        self,
        patches: Tensor,
        patch: Patch,
        label: Tensor | None = None,
        angles: Tensor | None = None,
        *,
        parts: int = 1,
    ) -> Tensor:
        """Logits [B], large for real.

        Args:
            patches: [B, 3, r, r]; with global context [B, 6, r, r], the whole image last ("concat"), or the whole image
                with the patch in it, [B, 3, R, R] ("paste").
            patch: Where they lie.
            label: [B, L], if the data set has labels.
            angles: [B, 3], with camera conditioning.
            parts: Of the batch, equally large and one after the other, that do not see each other, as in calls of their
                own: minibatch statistics are taken within each.
        """
        expected = [self.image_channels, self.input_resolution, self.input_resolution]
        if list(patches.shape[1:]) != expected:
            raise ValueError(f"Discriminator: patches must have shape {['B', *expected]}, got {list(patches.shape)}")
        condition = [label] if self.label_dim else []
        sigmas = [None] * len(self.resolutions)
        if self.affines is not None:
            encoded, sigmas = self.modulation(patch)
            condition.append(encoded)
        if self.config.camera_conditioning:
            features = self.camera_encoder(camera_numbers(angles))
            condition.append(torch.nn.functional.dropout(features, self.config.camera_dropout, self.training))

        # A GPU's convolutions want channels last; told once, they copy nothing on the way.
        x = _ChannelsLast.apply(patches) if patches.is_cuda else patches
        halves = self.half_resolutions if x.device.type in self.half_on else ()
        for res, sigma in zip(self.resolutions, sigmas, strict=True):
            x = getattr(self, f"b{res}")(x.to(self.half_dtype if res in halves else patches.dtype), sigma)
        x = minibatch_std(x.to(patches.dtype), self.config.minibatch_std_group, parts)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.head is None:
            return x.squeeze(1)
        return (x * self.head(None, torch.cat(condition, dim=1))).sum(dim=1) / math.sqrt(x.shape[1])


class ScaleDiscriminators(nn.Module):
    """One discriminator without modulation for each scale of the discrete distribution (the "scale-specific" ablation).

    Each judges the patches of its own scale alone, so that minibatch statistics stay within their groups. Which those
    are is read from the scales: hand them over on the CPU, or the call waits for the device.

    Args:
        config: Settings; `scales` discriminators, evenly spaced from 1 down to 0.25.
        resolution, patch_resolution, options: As `Discriminator`.
    """

    def __init__(self, config: DiscriminatorConfig, resolution: int, patch_resolution: int, **options: Any) -> None:
        super().__init__()
        self.scales = torch.linspace(1, 0.25, config.scales, device="cpu").tolist()
        config = dataclasses.replace(config, modulate="none")
        self.discriminators = nn.ModuleList(
            Discriminator(config, resolution, patch_resolution, **options) for _ in self.scales
        )

    def forward(
        self,
        patches: Tensor,
        patch: Patch,
        label: Tensor | None = None,
        angles: Tensor | None = None,
        *,
        parts: int = 1,
    ) -> Tensor:
        """As `Discriminator`; a scale between two of the support belongs to the nearest."""
        if parts > 1:  # which have different numbers of patches at a scale
            given, size = (patches, patch, label, angles), len(patches) // parts
            chunks = zip(*((None,) * parts if x is None else x.split(size) for x in given), strict=True)
            return torch.cat([self(*chunk) for chunk in chunks])
        nearest = [min(range(len(self.scales)), key=lambda k: abs(s - self.scales[k])) for s in patch.scale.tolist()]
        logits, places = [], []
        for k, discriminator in enumerate(self.discriminators):
            mine = [i for i, which in enumerate(nearest) if which == k]
            if mine:
                index = _index(mine, patches.device)
                own, *condition = (None if x is None else x[index] for x in (patches, label, angles))
                # Without modulation nothing looks at the patch's place.
                logits.append(discriminator(own, patch, *condition))
                places += mine
        order = sorted(range(len(places)), key=places.__getitem__)
        return torch.cat(logits)[_index(order, patches.device)]


def _index(places: list[int], device: torch.device) -> Tensor:
    """Places as a tensor on the device, which is not waited for."""
    return torch.tensor(places).to(device, non_blocking=True)


def discriminator_class(config: DiscriminatorConfig) -> type[Discriminator] | type[ScaleDiscriminators]:
    """The discriminator that the settings ask for; both are built and called alike."""
    return ScaleDiscriminators if config.scales > 1 else Discriminator
