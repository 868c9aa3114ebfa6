"""Upsample, filter, downsample."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reference.upfirdn2d import upfirdn2d as _reference
from .backends import resolve
from .checks import check_shape, check_together


def upfirdn2d(
    x: Tensor,
    kernel: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    flip: bool = False,
    gain: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Inserts up-1 zeros after every sample, pads, filters, keeps samples 0, down, 2 down, ... (SPEC section 16).

    Args:
        x: [B, C, H, W]; every channel is filtered alike.
        kernel: [kh, kw], or [k] for its outer product with itself.
        up, down: Integers of at least 1.
        padding: One number, or (x before, x after, y before, y after), in upsampled samples; negative numbers crop.
        flip: False convolves, True correlates.
        gain: Multiplies the 2-D filter.

    Returns:
        [B, C, H', W'], W' = (W up + x before + x after - kw) // down + 1.

    Derivatives: reference any order.

    Raises:
        ValueError, TypeError: Wrong ranks, dtypes, devices, factors; nothing left to filter; unknown or missing
            backend.
    """
    check_together("upfirdn2d", x=x, kernel=kernel)
    check_shape("upfirdn2d", "x", x, ("B", "C", "H", "W"))
    if kernel.ndim not in (1, 2) or kernel.numel() == 0:
        raise ValueError(f"upfirdn2d: kernel must have shape [k] or [kh, kw], got {list(kernel.shape)}")
    if up < 1 or down < 1:
        raise ValueError(f"upfirdn2d: up and down must be at least 1, got {up} and {down}")
    padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(padding) != 4:
        raise ValueError(f"upfirdn2d: padding must be one number or four (x, x, y, y), got {len(padding)}")
    width = x.shape[3] * up + padding[0] + padding[1] - kernel.shape[-1]
    height = x.shape[2] * up + padding[2] + padding[3] - kernel.shape[0]
    if width < 0 or height < 0:
        raise ValueError(
            f"upfirdn2d: the padded image must be at least as large as the kernel {list(kernel.shape)}, "
            f"got x {list(x.shape)}, up {up}, padding {padding}"
        )
    resolve("upfirdn2d", backend, x.device.type)
    return _reference(x, kernel, up=up, down=down, padding=padding, flip=flip, gain=gain)
