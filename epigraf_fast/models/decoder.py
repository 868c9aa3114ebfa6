"""The tri-plane decoder: a point's features to raw colour and density (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .. import ops
from .layers import FullyConnected


class Decoder(nn.Module):
    """Fully connected C -> hidden, lrelu, hidden -> colours + density, linear.

    The layers are evaluated inside the tri-plane ops, so that features and hidden units need not exist in memory.

    Args:
        precision: Of the products, with backend triton; see `ops.decode_triplane`.
        backend: See `ops`.
    """

    def __init__(
        self,
        channels: int = 32,
        hidden: int = 64,
        colours: int = 3,
        *,
        precision: str = "fp32",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options = {"precision": precision, "backend": backend}
        self.fc0 = FullyConnected(channels, hidden)
        self.fc1 = FullyConnected(hidden, colours + 1)

    def forward(
        self,
        planes: Tensor,
        ray_origins: Tensor,
        ray_directions: Tensor,
        t: Tensor,
        cube_scale: float,
        region: ops.PlaneRegion | None = None,
    ) -> Tensor:
        """Samples at t [B, R, S] of rays [B, R, 3] -> [B, R, S, colours + 1], raw density last."""
        return ops.decode_triplane_rays(
            planes,
            ray_origins,
            ray_directions,
            t,
            self.network(),
            cube_scale,
            region=region,
            **self.options,
        )

    def coarse_to_fine(
        self,
        planes: Tensor,
        ray_origins: Tensor,
        ray_directions: Tensor,
        t: Tensor,
        resample: Callable[[Tensor], Tensor],
        cube_scale: float,
        region: ops.PlaneRegion | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` at t, and at the depths [B, R, K] that `resample` finds with the detached result.

        Returns:
            The result at t [B, R, S, colours + 1], the fine t, the result at these [B, R, K, colours + 1].
        """
        return ops.decode_triplane_coarse_to_fine(
            planes,
            ray_origins,
            ray_directions,
            t,
            self.network(),
            resample,
            cube_scale,
            region=region,
            **self.options,
        )

    def at_points(self, planes: Tensor, points: Tensor, cube_scale: float) -> Tensor:
        """Points [B, N, 3] in world units -> [B, N, colours + 1], raw density last (what a mesh is extracted from)."""
        return ops.decode_triplane(planes, points / cube_scale, self.network(), **self.options)

    def network(self) -> ops.Network:
        """Weights and biases, the equalized learning rates folded in."""
        return ops.Network(*self.fc0.effective(), *self.fc1.effective())
