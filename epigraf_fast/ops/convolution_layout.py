"""The layout in which torch's convolutions get what is channels_last: as it lies, or as copies in the other layout.

The networks' images are channels_last on a GPU, and a convolution that takes tensor cores wants them so. Where none
takes them, cuDNN may be faster in the layout of [B, C, H, W], by more than copies to it and back cost: `tune` finds out
for the convolutions of a run (docs/kernels.md, "The layout of the networks' images").
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

GAIN = 0.97  # of the time as images lie, what copies may take at most


class Plan(NamedTuple):
    """A convolution without dilation and groups."""

    stride: int
    padding: int
    transposed: bool

    def arguments(self) -> tuple[Any, ...]:
        """Stride, padding, dilation, transposed, output padding and groups, as torch's dispatched convolutions have."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1], self.transposed, [0, 0], 1


class Kind(NamedTuple):
    """What a layout is chosen for. Channels tell levels apart; of several sizes of images the largest counts."""

    weight: tuple[int, ...]
    stride: int
    transposed: bool
    dtype: torch.dtype


class Seen(NamedTuple):
    """The largest convolution of a kind: the shape of its images, and how it is computed."""

    x: tuple[int, ...]
    plan: Plan


_copied: frozenset[Kind] = frozenset()
_recorded: dict[Kind, Seen] | None = None


def convolution(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """torch's convolution (x [B, C_in, H, W]), in the layout that was chosen; the result lies as x does."""
    if _recorded is not None:
        _record(_recorded, x, weight, plan)
    if not _is_copied(x, weight, plan):
        return torch.ops.aten.convolution(x, weight, None, *plan.arguments())
    y = torch.ops.aten.convolution(x.contiguous(), weight.contiguous(), None, *plan.arguments())
    return y.contiguous(memory_format=torch.channels_last)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of `convolution` to x and the weight, those that are wanted; they lie as their tensors do."""
    mask = [*wanted, False]
    if not any(wanted):
        return None, None
    if not _is_copied(x, weight, plan):
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *plan.arguments(), mask)[:2]
    copies = (tensor.contiguous() for tensor in (grad, x, weight))
    found = torch.ops.aten.convolution_backward(*copies, None, *plan.arguments(), mask)
    return tuple(
        made if made is None or like.is_contiguous() else made.contiguous(memory_format=torch.channels_last)
        for made, like in zip(found[:2], (x, weight), strict=True)
    )


def _kind(weight: Tensor, plan: Plan) -> Kind:
    return Kind(tuple(weight.shape), plan.stride, plan.transposed, weight.dtype)


def _is_copied(x: Tensor, weight: Tensor, plan: Plan) -> bool:
    return bool(_copied) and _kind(weight, plan) in _copied and not x.is_contiguous()


def _record(seen: dict[Kind, Seen], x: Tensor, weight: Tensor, plan: Plan) -> None:
    kind = _kind(weight, plan)
    larger = kind not in seen or x.numel() > math.prod(seen[kind].x)
    if larger and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        seen[kind] = Seen(tuple(x.shape), plan)


@contextlib.contextmanager
def recording() -> Iterator[dict[Kind, Seen]]:
    """Fills what it gives with the convolutions of channels_last images that are computed meanwhile."""
    global _recorded
    before, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = before


def copy(kinds: Iterable[Kind]) -> None:
    """Says for the whole process which convolutions take copies: those, and no others."""
    global _copied
    _copied = frozenset(kinds)


def tune(
    seen: dict[Kind, Seen],
    device: torch.device,
    timer: Callable[[Callable[[], Any]], float],
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Times every kind both ways, forward and both gradients together; later calls take the faster one.

    It waits for the GPU: never call it in the loop.

    Args:
        seen: Of `recording`.
        timer: Milliseconds of a call.
        seconds: After which no other kind is begun: those left, and those without room, stay as they lie.
        clock: In seconds.

    Returns:
        A row a kind, the largest first: weight, stride, transposed, dtype (as `chosen_of` reads them), x (the shape),
        ms and ms_copied (None: not timed), chosen (whether copies are taken).
    """
    begun, rows = clock(), []
    for kind, (shape, plan) in sorted(seen.items(), key=lambda item: -math.prod(item[1].x)):
        times = [None, None]
        if clock() - begun < seconds:
            try:
                times = _times(kind, shape, plan, device, timer)
            except RuntimeError as error:  # of memory, or cuDNN finds no algorithm that fits into what is left
                if "CUDA error" in str(error):  # of the GPU itself
                    raise
        chosen = times[1] is not None and times[1] < GAIN * times[0]
        told = kind._asdict() | {"dtype": str(kind.dtype).removeprefix("torch."), "x": list(shape)}
        rows.append(told | {"weight": list(kind.weight), "ms": times[0], "ms_copied": times[1], "chosen": chosen})
    copy(chosen_of(rows))
    return rows


def _times(
    kind: Kind, shape: tuple[int, ...], plan: Plan, device: torch.device, timer: Callable[[Callable[[], Any]], float]
) -> list[float]:
    """Milliseconds as images lie, and with copies."""

    def full(*size: int) -> Tensor:  # what the values are does not decide the time
        return torch.full(size, 0.1, dtype=kind.dtype, device=device).contiguous(memory_format=torch.channels_last)

    x, weight = full(*shape), full(*kind.weight)
    grad = torch.ops.aten.convolution(x, weight, None, *plan.arguments()).contiguous(memory_format=torch.channels_last)

    def both() -> None:
        convolution(x, weight, plan)
        gradients(grad, x, weight, plan, (True, True))

    before, times = _copied, []
    try:
        for kinds in ((), (kind,)):
            copy(kinds)
            times.append(timer(both))
    finally:
        copy(before)
    return times


def chosen_of(rows: Iterable[dict[str, Any]]) -> list[Kind]:
    """The kinds of the rows of `tune` that take copies.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: They are of another version, or damaged.
    """
    kinds = []
    for row in rows:
        dtype = getattr(torch, row["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{row['dtype']!r} is no dtype")
        kind = Kind(tuple(map(int, row["weight"])), int(row["stride"]), bool(row["transposed"]), dtype)
        kinds += [kind] if row["chosen"] else []
    return kinds
