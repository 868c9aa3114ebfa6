"""The tri-plane decoder: a point's features to raw colour and density (paper, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .layers import FullyConnected


class Decoder(nn.Module):
    """Fully connected C -> hidden, lrelu, hidden -> colours + density, linear.

    The layers are evaluated inside the tri-plane ops, so that features and hidden units need not exist in memory.
    """

    def __init__(self, channels: int = 32, hidden: int = 64, colours: int = 3, *, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.fc0 = FullyConnected(channels, hidden)
        self.fc1 = FullyConnected(hidden, colours + 1)

    def forward(
        self, planes: Tensor, ray_origins: Tensor, ray_directions: Tensor, t: Tensor, cube_scale: float
    ) -> Tensor:
        """Samples at t [B, R, S] of rays [B, R, 3] -> [B, R, S, colours + 1], raw density last."""
        return ops.decode_triplane_rays(
            planes,
            ray_origins,
            ray_directions,
            t,
            *self.fc0.effective(),
            *self.fc1.effective(),
            cube_scale,
            backend=self.backend,
        )

    def at_points(self, planes: Tensor, points: Tensor, cube_scale: float) -> Tensor:
        """Points [B, N, 3] in world units -> [B, N, colours + 1], raw density last (what a mesh is extracted from)."""
        return ops.decode_triplane(
            planes, points / cube_scale, *self.fc0.effective(), *self.fc1.effective(), backend=self.backend
        )
