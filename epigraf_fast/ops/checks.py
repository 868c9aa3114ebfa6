"""Argument checks of the public ops. They look at shapes, dtypes and devices only: none makes a GPU wait."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..reference.decode_triplane import Network
from ..reference.sample_triplane import PlaneRegion, reads_outside
from . import library

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUMBER, INTEGER = (Real, torch.SymFloat, torch.SymInt), (Integral, torch.SymInt)


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Compares a shape with a pattern, in which a string stands for any size.

    Raises:
        TypeError: It is not a tensor (None for a tensor that is needed).
        ValueError: `op: name must have shape [...], got [...]`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    shape = tensor.shape
    fits = len(shape) == len(expected)
    for got, want in zip(shape, expected, strict=False):
        fits = fits and (got == want or isinstance(want, str))
    if not fits:
        pattern = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: {name} must have shape [{pattern}], got {list(shape)}")


def check_together(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating point and on one device.

    Raises:
        TypeError: A tensor is not a tensor or not floating point.
        ValueError: Devices differ.
    """
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} as {first_name} is, got {tensor.device}")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError when `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_broadcast(op: str, name: str, tensor: Tensor, target: tuple[int, ...]) -> None:
    """`tensor` broadcasts to `target` without enlarging it.

    Raises:
        ValueError: `op: name must broadcast to [...], got [...]`.
    """
    shape = (1,) * (len(target) - tensor.ndim) + tuple(tensor.shape)
    if len(shape) != len(target) or any(got not in (1, want) for got, want in zip(shape, target, strict=True)):
        raise ValueError(f"{op}: {name} must broadcast to {list(target)}, got {list(tensor.shape)}")


def _is_number(value: Any) -> bool:
    # Abstract classes take long to ask, and every call does.
    return type(value) is float or type(value) is int or isinstance(value, NUMBER)


def check_finite(op: str, name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number."""
    if not (_is_number(value) and math.isfinite(value)):
        raise ValueError(f"{op}: {name} must be a finite number, got {value}")


def check_positive(op: str, name: str, value: Any, *, or_zero: bool = False) -> None:
    """Raises ValueError unless `value` is a finite number above 0, or `or_zero` 0."""
    if not (_is_number(value) and math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ValueError(f"{op}: {name} must be finite and {'not negative' if or_zero else 'positive'}, got {value}")


def check_integers(op: str, **values: Any) -> None:
    """Raises TypeError unless all are whole numbers."""
    for name, value in values.items():
        if type(value) is not int and not isinstance(value, INTEGER):
            if isinstance(value, Tensor) and torch.jit.is_tracing():  # what sizes are while torch.jit.trace records
                continue
            raise TypeError(f"{op}: {name} must be an integer, got {value!r}")


def check_clamp(op: str, clamp: float | None) -> float | None:
    """The clamp, None for an infinite one. Raises ValueError when it is neither None nor a positive number."""
    if clamp is not None and not (_is_number(clamp) and clamp > 0):
        raise ValueError(f"{op}: clamp must be positive or None, got {clamp}")
    return None if clamp == math.inf else clamp


def check_gain(op: str, gain: float | None) -> None:
    """Raises ValueError when `gain` is neither None nor a finite number."""
    if gain is not None:
        check_finite(op, "gain", gain)


def check_density(
    op: str, activation: str, softplus_beta: float, density_shift: float, last_interval: float, t: Tensor
) -> None:
    """What turns raw density into opacity: raises ValueError where it cannot, be it only in the dtype of t."""
    check_choice(op, "activation", activation, ("softplus", "relu"))
    check_positive(op, "softplus_beta", softplus_beta)
    check_finite(op, "density_shift", density_shift)
    check_positive(op, "last_interval", last_interval, or_zero=True)
    numbers = {"softplus_beta": softplus_beta, "density_shift": density_shift, "last_interval": last_interval}
    for name, number in numbers.items():
        if abs(number) > torch.finfo(t.dtype).max:
            raise ValueError(f"{op}: {name} must be finite in {t.dtype} (because t is), got {number}")


def check_planes(op: str, planes: Tensor) -> None:
    """planes are [B, 3*C, H, W] with at least one texel."""
    check_shape(op, "planes", planes, ("B", "3*C", "H", "W"))
    if planes.shape[1] % 3 or 0 in planes.shape[1:]:
        raise ValueError(
            f"{op}: planes must have 3*C channels (three planes of C each) and at least one texel, "
            f"got {list(planes.shape)}"
        )


def check_region(op: str, region: PlaneRegion | None, planes: Tensor) -> None:
    """The region fits planes [B, 3*C, h, w]; where its texels lie only a CPU looks, and not while tracing.

    Raises:
        TypeError, ValueError: It does not.
    """
    if region is None:
        return
    first, whole = region
    check_shape(op, "region.first", first, (len(planes), 2))
    check_dtype(op, "region.first", first, (torch.int32, torch.int64), "it counts texels")
    if first.device != planes.device:
        raise ValueError(f"{op}: region.first must be on {planes.device} as planes is, got {first.device}")
    size = planes.shape[2:]
    if len(whole) != 2 or not all(n <= most for n, most in zip(size, whole, strict=True)):
        raise ValueError(f"{op}: region.whole must be at least the size {list(size)} of planes, got {list(whole)}")
    if planes.device.type == "cpu" and library.route(planes, first) is library.PLAIN:
        room = first.new_tensor(whole) - first.new_tensor(size)
        if bool(((first < 0) | (first > room)).any()):
            raise ValueError(
                f"{op}: region.first must leave room for {list(size)} in {list(whole)}, got {first.tolist()}"
            )


def is_debugging() -> bool:
    """Whether EPIGRAF_FAST_DEBUG=1 in the environment asks for checks that take time."""
    return os.environ.get("EPIGRAF_FAST_DEBUG") == "1"


def assert_in_region(op: str, points: Tensor, region: PlaneRegion, size: Sequence[int]) -> None:
    """No point reads, with a weight, a texel that is not stored.

    On a CPU it looks at once; on a GPU in its own time, as a device-side assertion, which a CUDA graph keeps.

    Args:
        points: [B, N, 3], relative to whole planes.
        size: Rows and columns of the planes that are stored.

    Raises:
        RuntimeError: One does.
    """
    message = f"{op}: points must keep to the region, got some that read texels outside of it"
    torch._assert_async(~reads_outside(points.detach(), region, tuple(size)), message)


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], because: str) -> None:
    """Raises TypeError when the dtype is none of `dtypes`; `because` says who asks for it."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {names} (because {because}), got {tensor.dtype}")


def checked_resample(
    op: str, resample: Callable[[Tensor], Tensor], t: Tensor, inputs: Sequence[Tensor] | None
) -> Callable[[Tensor], Tensor]:
    """`resample` of the detached argument, its result detached, and an error where it does not keep to its contract.

    Args:
        inputs: What it must not change, or None where versions are not to be had, as while tracing.
    """

    def checked(coarse: Tensor) -> Tensor:
        if inputs is None:
            given, watched = coarse.detach().clone(), []
        elif coarse.is_inference():  # whose changes torch does not count: what is changed is a copy
            given, watched = coarse.clone(), [x for x in inputs if not x.is_inference()]
        else:
            given, watched = coarse.detach(), [coarse, *inputs]
        before = [x._version for x in watched]
        with torch.no_grad():
            t_fine = resample(given)
        if [x._version for x in watched] != before:
            raise ValueError(
                f"{op}: resample must not change tensors in place (because the result and the gradients depend on "
                f"them), got one changed: let it clone what it changes"
            )
        check_together(op, **{"t": t, "what resample returns": t_fine})
        check_shape(op, "what resample returns", t_fine, (*t.shape[:2], "K"))
        check_dtype(op, "what resample returns", t_fine, (t.dtype,), "t is")
        return t_fine.detach()

    return checked


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient to one of them is asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_no_gradient(op: str, **tensors: Tensor | None) -> None:
    """Raises NotImplementedError when a gradient to one of them is asked for, which only the reference gives."""
    for name, tensor in tensors.items():
        if is_differentiated(tensor):
            raise NotImplementedError(
                f'{op}: backend "triton" has no gradient to {name}; use backend="reference", or detach {name}'
            )


def check_triton_planes(op: str, planes: Tensor) -> None:
    """What the Triton kernels ask of planes: fp32, fp16 or bf16, C a multiple of 8 and at most 64.

    Raises:
        TypeError, ValueError: It is not so.
    """
    check_dtype(op, "planes", planes, TRITON_DTYPES, 'backend is "triton"')
    channels = planes.shape[1] // 3
    if channels % 8 or channels > 64:
        raise ValueError(
            f'{op}: planes must have a multiple of 8 channels each, 64 at most (because backend is "triton"), '
            f"got {channels}"
        )


def check_network(op: str, planes: Tensor, network: Network) -> None:
    """Planes and a decoder's network fit."""
    check_planes(op, planes)
    w0, b0, w1, b1 = network
    check_shape(op, "network.w0", w0, ("hidden", planes.shape[1] // 3))
    check_shape(op, "network.b0", b0, (w0.shape[0],))
    check_shape(op, "network.w1", w1, ("out", w0.shape[0]))
    check_shape(op, "network.b1", b1, (w1.shape[0],))


def check_triton_network(op: str, planes: Tensor, network: Network, points: dict[str, Tensor]) -> None:
    """What the Triton kernels ask for beyond the op: dtypes, sizes that fit registers, and no gradient to points."""
    check_triton_planes(op, planes)
    because = 'backend is "triton"'
    for name, x in network._asdict().items():
        check_dtype(op, f"network.{name}", x, TRITON_DTYPES, because)
    for name, x in points.items():
        check_dtype(op, name, x, (torch.float32,), because)
    out, hidden = network.w1.shape
    if not 16 <= hidden <= 128:
        raise ValueError(f"{op}: network.w0 must have 16 to 128 rows, hidden units (because {because}), got {hidden}")
    if not 2 <= out <= 16:
        raise ValueError(f"{op}: network.w1 must have 2 to 16 rows, outputs (because {because}), got {out}")
    check_no_gradient(op, **points)


def resolve_deterministic(deterministic: bool | None) -> bool:
    """None stands for torch's own setting."""
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
