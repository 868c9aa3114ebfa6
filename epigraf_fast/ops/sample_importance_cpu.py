"""The launcher of csrc/sample_importance.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import native


def fwd(t: Tensor, raw_density: Tensor, u: Tensor, settings: Any) -> Tensor:
    """Fine depths [B, R, K] of u, from depths [B, R, S] that rise along every ray."""
    t_fine, samples, stride = t.new_empty(u.shape), t.shape[-1], raw_density.stride(-1)
    if stride < 1 or raw_density.stride()[:2] != (t.shape[1] * samples * stride, samples * stride):  # not evenly spaced
        raw_density, stride = raw_density.contiguous(), 1
    sizes = native.DTYPES[t.dtype], t.shape[:2].numel(), samples, u.shape[-1], stride
    density = settings.activation == "relu", settings.softplus_beta, settings.density_shift
    tensors = t.contiguous(), raw_density, u.contiguous(), t_fine
    native.launch("sample_importance", tensors, *sizes, *density, settings.sorted)
    return t_fine
