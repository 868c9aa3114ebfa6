"""What a GPU's tensor cores round, done on any device: for tests and measurements of precisions without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from epigraf_fast.ops.convolution import LOW

HALVES = (torch.float16, torch.bfloat16)
_ATEN = torch.ops.aten
# Products -> how many of their first arguments are factors, and where these begin.
CONVOLUTIONS = {_ATEN.convolution.default: (0, 2), _ATEN.convolution_backward.default: (0, 3)}
MATRICES = {
    _ATEN.mm.default: (0, 2),
    _ATEN.bmm.default: (0, 2),
    _ATEN.addmm.default: (1, 2),
    _ATEN.baddbmm.default: (1, 2),
}


def to_tf32(x: Tensor) -> Tensor:
    """fp32 rounded to the nearest of TF32, whose mantissa has 10 bits; ties away from 0."""
    return ((x.view(torch.int32) + (1 << (LOW - 1))) & -(1 << LOW)).view(torch.float32)


class Rounding(TorchDispatchMode):
    """In this block products round as on a GPU: factors first, sums in fp32.

    Factors of fp32 are rounded to TF32 where torch's switches allow it, `torch.backends.cudnn.allow_tf32` for
    convolutions and `torch.backends.cuda.matmul.allow_tf32` for matrices, as cuDNN and cuBLAS read them. Those of half
    precision are multiplied in fp32, and the result is rounded to half once. Elementwise operations are torch's own.

    Attributes:
        incoming: The gradients that the backward passes of convolutions were given, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.incoming: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        allowed, places = torch.backends.cudnn.allow_tf32, CONVOLUTIONS.get(func)
        if places is None:
            allowed, places = torch.backends.cuda.matmul.allow_tf32, MATRICES.get(func)
        if places is None:
            return func(*args, **(kwargs or {}))
        if func is _ATEN.convolution_backward.default:
            self.incoming.append(args[0].detach().clone())
        begin, count = places
        half = next((x.dtype for x in args[begin : begin + count] if x.dtype in HALVES), None)
        if half is not None:
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype in HALVES else x for x in args)
            return _cast(func(*args, **(kwargs or {})), half)
        if allowed and args[begin].dtype == torch.float32:
            factors = [to_tf32(x) for x in args[begin : begin + count]]
            args = (*args[:begin], *factors, *args[begin + count :])
        return func(*args, **(kwargs or {}))


def _cast(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, tuple):
        return tuple(_cast(x, dtype) for x in result)
    return result.to(dtype) if isinstance(result, Tensor) and result.dtype == torch.float32 else result
