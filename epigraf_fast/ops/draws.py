"""What the ops that draw random numbers share."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed(device: torch.device | str) -> Tensor:
    """A seed for backend triton, [1] int64 on the device, from torch's generator; one launch, and nothing waits."""
    return torch.randint(2**62, (1,), device=device)


def seed_for_kernel(op: str, seed: Tensor | None, device: torch.device) -> Tensor:
    """The seed, or where there is none a fresh one. Raises ValueError unless it is [1] int64 on the device."""
    if seed is None:
        return draw_seed(device)
    here = isinstance(seed, Tensor) and seed.device.type == device.type and device.index in (None, seed.device.index)
    if not (here and seed.dtype == torch.int64 and seed.shape == (1,)):
        raise ValueError(f"{op}: seed must be a tensor of shape [1] of int64 on {device}, got {seed!r}")
    return seed


def check_noise_std(op: str, noise_std: float | Tensor, device: torch.device) -> None:
    """A standard deviation is a number that is not negative, or a tensor of one.

    Raises:
        ValueError: It is not.
    """
    if isinstance(noise_std, Tensor):
        if noise_std.numel() != 1 or noise_std.device != device:
            raise ValueError(
                f"{op}: noise_std must be a number or a tensor of one on {device}, "
                f"got shape {list(noise_std.shape)} on {noise_std.device}"
            )
    elif not 0 <= noise_std < float("inf"):
        raise ValueError(f"{op}: noise_std must be finite and not negative, got {noise_std}")


def is_noisy(noise_std: float | Tensor) -> bool:
    """Whether there is noise to draw. A tensor always draws: to look at it would make a GPU wait."""
    return isinstance(noise_std, Tensor) or noise_std > 0


def std_for_kernel(noise_std: float | Tensor) -> tuple[Tensor | None, float | None]:
    """As the Triton kernels take it: an fp32 tensor that they read, or a Python float."""
    return (noise_std.detach().float(), None) if isinstance(noise_std, Tensor) else (None, float(noise_std))


def check_no_seed(op: str, seed: Tensor | None) -> None:
    """Raises ValueError where there is a seed and no kernel that draws from it."""
    if seed is not None:
        raise ValueError(
            f"{op}: seed must be None for a backend other than 'triton' (torch's generator draws), under "
            'torch.func, forward-mode derivatives and torch.jit.trace (the reference draws): use backend="reference"'
        )
