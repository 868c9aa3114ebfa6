"""The mapping network: latent code and conditions to style vectors; also hypernetwork and head of the discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .layers import FullyConnected

W_AVG_DECAY = 0.998


def normalize_rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-8) over the last dimension."""
    recorded = torch.is_grad_enabled() and x.requires_grad and not is_compiling()
    return (_NormalizeRms.apply(x) if recorded else _rms(x))[0]


def _rms(x: Tensor) -> tuple[Tensor, Tensor]:
    """The normalized vectors and what they were multiplied by."""
    factor = (x.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()
    return x * factor, factor


class _NormalizeRms(torch.autograd.Function):
    """`_rms` with its gradient in few operations: (g - y mean(g y)) factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return _rms(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        y, factor = outputs
        ctx.save_for_backward(*inputs, y, factor)
        ctx.mark_non_differentiable(factor)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
        if grad is None:
            return None
        x, y, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # both again as functions of x, for the derivatives of this one
            y, factor = _rms(x)
        return torch.addcmul(grad, y, (grad * y).mean(dim=-1, keepdim=True), value=-1) * factor


class Mapping(nn.Module):
    """w = fc1(fc0(normalize(z) | normalize(embed(c)))), both layers lrelu with learning-rate multiplier 0.01.

    Args:
        z_dim: Width of z, 0 for none.
        c_dim: Numbers of the condition (label, then camera, as one vector), 0 for none.
        w_dim: Width of everything after.
        num_layers: Fully connected layers.
        backend: See `ops`.
    """

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_layers: int = 2, *, backend: str | None = None) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_layers = z_dim, c_dim, w_dim, num_layers
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        widths = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * num_layers
        for i in range(num_layers):
            layer = FullyConnected(widths[i], widths[i + 1], act="lrelu", lr_multiplier=0.01, backend=backend)
            self.add_module(f"fc{i}", layer)

    def forward(self, z: Tensor | None, c: Tensor | None) -> Tensor:  # [B, z_dim], [B, c_dim] -> [B, w_dim]
        parts = []
        if self.z_dim:
            parts.append(normalize_rms(z))
        if self.c_dim:
            parts.append(normalize_rms(self.embed(c)))
        x = torch.cat(parts, dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x


class StyleMapping(Mapping):
    """The generator's mapping: `Mapping` with the running average of w, truncation and one copy of w per style vector.

    Args:
        num_ws: Style vectors that the synthesis network takes.
    """

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, num_ws: int, num_layers: int = 2, *, backend: str | None = None
    ) -> None:
        super().__init__(z_dim, c_dim, w_dim, num_layers, backend=backend)
        self.num_ws = num_ws
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor,
        c: Tensor | None,
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_w_avg: bool = False,
    ) -> Tensor:
        """Style vectors [B, num_ws, w_dim]; truncation is w_avg + psi (w - w_avg) on the first `truncation_cutoff`."""
        w = super().forward(z, c)
        if update_w_avg:
            self.w_avg.copy_(w.detach().mean(dim=0).lerp(self.w_avg, W_AVG_DECAY))
        ws = w[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi != 1:
            truncated = self.w_avg.lerp(ws, truncation_psi)
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws = torch.cat([truncated[:, :cutoff], ws[:, cutoff:]], dim=1)
        return ws


def mix_styles(ws: Tensor, others: Tensor, probability: float) -> Tensor:
    """With a probability, the style vectors of a sample from a random cutoff in 1..num_ws-1 on are the other ones.

    Args:
        ws, others: [B, num_ws, w_dim].
    """
    batch, num_ws, _ = ws.shape
    cutoff = torch.rand(batch, device=ws.device).mul(num_ws - 1).floor() + 1
    kept = torch.where(torch.rand(batch, device=ws.device) < probability, cutoff, num_ws)
    mask = torch.arange(num_ws, device=ws.device) < kept[:, None]
    return torch.where(mask[..., None], ws, others)
