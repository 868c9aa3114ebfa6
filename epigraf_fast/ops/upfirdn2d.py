"""Upsample, filter, downsample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.upfirdn2d import upfirdn2d as _reference
from . import library, native
from .backends import resolve
from .bias_act import BiasActSettings, bias_act_backward
from .checks import check_clamp, check_dtype, check_finite, check_integers, check_shape, check_together


def upfirdn2d(
    x: Tensor,
    kernel: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    flip: bool = False,
    gain: float = 1.0,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Inserts up-1 zeros after every sample, pads, filters, keeps samples 0, down, 2 down, ... (method.md 7).

    With `added` the same pass adds clamp(added + bias, -clamp, clamp) to that, as the running sum of planes does.

    Args:
        x: [B, C, H, W]; every channel is filtered alike.
        kernel: [kh, kw], or [k] for its outer product with itself, which cpu and cuda filter one axis at a time.
        up, down: Integers of at least 1.
        padding: One number, or (x before, x after, y before, y after), in upsampled samples; negative numbers crop.
        flip: False convolves, True correlates.
        gain: Multiplies the 2-D filter; finite.
        added: [B, C, H', W'], of the dtype of x, or fp16.
        bias: [C], of `added`.
        clamp: Positive, or None, of `added`. The gradient is 0 where clipped.

    Returns:
        [B, C, H', W'], W' = (W up + x before + x after - kw) // down + 1, in the dtype of x.

    Derivatives: reference any order; cpu and cuda any order to x, the second to `added` and its bias, none to the
        kernel. A call without a named backend takes the reference where a gradient to the kernel is asked for.

    Raises:
        ValueError, TypeError: Wrong ranks, dtypes, devices, factors; a gain that is not finite, a clamp that is not
            positive; nothing left to filter; unknown or missing backend.
        NotImplementedError: cpu, cuda: a gradient to the kernel is asked for.
    """
    check_together("upfirdn2d", x=x, kernel=kernel, added=added, bias=bias)
    check_shape("upfirdn2d", "x", x, ("B", "C", "H", "W"))
    if kernel.ndim not in (1, 2) or kernel.numel() == 0:
        raise ValueError(f"upfirdn2d: kernel must have shape [k] or [kh, kw], got {list(kernel.shape)}")
    check_integers("upfirdn2d", up=up, down=down)
    if up < 1 or down < 1:
        raise ValueError(f"upfirdn2d: up and down must be at least 1, got {up} and {down}")
    padding = tuple(padding) if isinstance(padding, Sequence) else (padding,) * 4
    if len(padding) != 4:
        raise ValueError(f"upfirdn2d: padding must be one number or four (x, x, y, y), got {len(padding)}")
    for pad in padding:
        if type(pad) is not int:
            check_integers("upfirdn2d", padding=pad)
    check_finite("upfirdn2d", "gain", gain)
    width = x.shape[3] * up + padding[0] + padding[1] - kernel.shape[-1]
    height = x.shape[2] * up + padding[2] + padding[3] - kernel.shape[0]
    if width < 0 or height < 0:
        raise ValueError(
            f"upfirdn2d: the padded image must be at least as large as the kernel {list(kernel.shape)}, "
            f"got x {list(x.shape)}, up {up}, padding {padding}"
        )
    size = height // down + 1, width // down + 1
    if added is not None:
        check_shape("upfirdn2d", "added", added, (*x.shape[:2], *size))
        if added.dtype not in (x.dtype, torch.float16):
            raise TypeError(f"upfirdn2d: added must be {x.dtype}, as x is, or torch.float16, got {added.dtype}")
    elif bias is not None or clamp is not None:
        raise ValueError("upfirdn2d: added must be given where bias or clamp is, got None")
    if bias is not None:
        check_shape("upfirdn2d", "bias", bias, (x.shape[1],))
    clamp = check_clamp("upfirdn2d", clamp)
    chosen = resolve("upfirdn2d", backend, x.device.type)
    route = library.route(x, kernel, added, bias)
    if "reference" not in (chosen, route) and kernel.requires_grad and torch.is_grad_enabled():
        if backend is not None:
            raise NotImplementedError(
                f'upfirdn2d: backend "{backend}" has no gradient to kernel; use backend="reference", or detach kernel'
            )
        chosen = "reference"
    if "reference" in (chosen, route):
        added_too = {"added": added, "bias": bias, "clamp": clamp}
        return _reference(x, kernel, up=up, down=down, padding=padding, flip=flip, gain=gain, **added_too)
    check_dtype("upfirdn2d", "x", x, tuple(native.DTYPES), f'backend is "{chosen}"')
    dtype = native.compute_dtype(x.dtype)
    kernel = kernel.detach() if kernel.dtype == dtype else kernel.detach().to(dtype)
    bias = None if bias is None else bias.to(dtype)
    limit = math.inf if clamp is None else float(clamp)
    settings = _Settings(size, up, down, (padding[0], padding[2]), flip, float(gain), limit)
    return library.call(route, _UpFirDn2d, x, kernel, added, bias, settings)


class _Settings(NamedTuple):
    size: tuple[int, int]  # of the output
    up: int
    down: int
    padding: tuple[int, int]  # before x and y; what lies behind follows from the sizes
    flip: bool
    gain: float
    clamp: float  # of what is added; infinite where there is none

    def adjoint(self, size: tuple[int, int], kernel: Tensor) -> _Settings:
        """The transposed map, back to `size`: up and down change places, and the taps their direction."""
        padding = kernel.shape[-1] - 1 - self.padding[0], kernel.shape[0] - 1 - self.padding[1]
        return _Settings(size, self.down, self.up, padding, not self.flip, self.gain, math.inf)

    def behind(self, size: Sequence[int], kernel: Tensor) -> tuple[int, int, int, int]:
        """Padding of x of this size, before and behind, which gives the size of the output."""
        (height, width), taps = size, (kernel.shape[0], kernel.shape[-1])
        x_after = (self.size[1] - 1) * self.down + taps[1] - width * self.up - self.padding[0]
        y_after = (self.size[0] - 1) * self.down + taps[0] - height * self.up - self.padding[1]
        return self.padding[0], x_after, self.padding[1], y_after


@library.register(
    "upfirdn2d(Tensor x, Tensor kernel, Tensor? added, Tensor? bias, "
    "SymInt[2] size, int up, int down, SymInt[2] padding, bool flip, float gain, float clamp) -> Tensor"
)
class _UpFirDn2d:
    """The map is linear: its gradient is the adjoint map, and so on to any order. The kernel is in what is computed.

    What is added, which is dense, has the derivatives of `bias_act`.
    """

    Settings = _Settings
    constants = ("kernel",)

    @staticmethod
    def ready(
        x: Tensor, kernel: Tensor, added: Tensor | None, bias: Tensor | None, settings: _Settings
    ) -> tuple[Any, ...]:
        added = None if added is None else native.dense(added)
        return native.dense(x), kernel.contiguous(), added, None if bias is None else bias.contiguous(), settings

    @staticmethod
    def empty(x: Tensor, kernel: Tensor, added: Tensor | None, bias: Tensor | None, settings: _Settings) -> Tensor:
        return torch.empty(
            (*x.shape[:2], *settings.size),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last,
        )

    @staticmethod
    def run(x: Tensor, kernel: Tensor, added: Tensor | None, bias: Tensor | None, settings: _Settings) -> Tensor:
        y = _UpFirDn2d.empty(x, kernel, added, bias, settings)
        added = None if added is None else native.dense_as(added, y)
        dtypes = native.DTYPES[x.dtype], native.DTYPES[x.dtype if added is None else added.dtype]
        taps = kernel.shape[0], kernel.shape[-1]
        flags = kernel.ndim == 1, not x.is_contiguous(), settings.flip
        sizes = *x.shape, *settings.size, *taps
        factors = settings.up, settings.down, *settings.padding, settings.gain, settings.clamp
        native.launch("upfirdn2d", (x, kernel, added, bias, y), *dtypes, *sizes, *flags, *factors)
        return y

    @staticmethod
    def reference(x: Tensor, kernel: Tensor, added: Tensor | None, bias: Tensor | None, settings: _Settings) -> Tensor:
        """Of a map to which nothing is added, as that of a gradient."""
        up, down, padding = settings.up, settings.down, settings.behind(x.shape[2:], kernel)
        return _reference(x, kernel, up=up, down=down, padding=padding, flip=settings.flip, gain=settings.gain)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
        x, kernel, added, bias, ctx.settings = inputs
        ctx.size, ctx.dtype, ctx.of_added = x.shape[2:], None if added is None else added.dtype, None
        clamp = ctx.settings.clamp
        if clamp < math.inf and not _within(added, bias, clamp):  # where networks diverge; else nothing is kept
            ctx.of_added = BiasActSettings(None if bias is None else 1, 0, 1.0, clamp)
        ctx.save_for_backward(kernel, *((None, None) if ctx.of_added is None else (added, bias)))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kernel, added, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = grad_added = grad_bias = None
        if needs[0]:
            grad_x = library.apply(_UpFirDn2d, grad_y, kernel, None, None, ctx.settings.adjoint(ctx.size, kernel))
        if ctx.of_added is None:
            grad_added = grad_y.to(ctx.dtype) if needs[2] else None
            grad_bias = grad_y.sum((0, 2, 3), dtype=native.compute_dtype(ctx.dtype)) if needs[3] else None
        elif needs[2] or needs[3]:
            grad_added, grad_bias = bias_act_backward(grad_y.to(ctx.dtype), added, bias, ctx.of_added, needs[3])
        return grad_x, None, grad_added, grad_bias, None


def _within(added: Tensor, bias: Tensor | None, clamp: float) -> bool:
    """Whether nothing comes near the clamp, on a CPU; a GPU is not waited for."""
    if added.device.type != "cpu" or not added.numel():
        return False
    if library.route(added, bias) is not library.PLAIN:  # whose numbers may not be there
        return False
    in_memory = native.dense(added.detach()).as_strided((added.numel(),), (1,))  # as it lies, which is fastest
    least, most = torch.aminmax(in_memory)
    reached = max(-least.item(), most.item())
    if bias is not None:
        reached += bias.detach().abs().max().item()
    return reached < clamp  # not with NaN
