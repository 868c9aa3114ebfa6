"""The fastest configuration of each Triton kernel for the shapes of a run: timed once, before the first step."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.decode_triplane import Network
from .checks import resolve_deterministic
from .decode_triplane import check_rays


def tune_decode_triplane(
    planes: Tensor,
    ray_origins: Tensor,
    ray_directions: Tensor,
    t: Tensor,
    network: Network,
    cube_scale: float = 1.0,
    *,
    precision: str = "fp32",
    deterministic: bool | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Times forward and backward of `decode_triplane_rays` with every plan; later calls take the fastest.

    Without a GPU nothing is timed and the defaults stay; nor if `deterministic`, for plans differ in roundings. It
    waits for the GPU: never call it in the loop.

    Args:
        planes, ...: See `decode_triplane_rays`; the values should be like those of the run, for points share texels.
        timer: Milliseconds of a call; default: by CUDA events, which needs a GPU.
        seconds: After which no other plan is begun, compilation included; the fastest until then is taken, and where
            there was none, the default, which is always tried first.
        clock: In seconds.

    Returns:
        A row a plan, forward first: kernel, plan, ms (None: not timed), and whether it was chosen.
    """
    if resolve_deterministic(deterministic) or (timer is None and planes.device.type != "cuda"):
        return []
    rays = ray_origins, ray_directions, t
    check_rays("tune_decode_triplane", planes, rays, network, cube_scale, None, precision, "triton")
    from ..kernels import decode_triplane as kernels
    from ..kernels import tuning

    w0, b0, w1, b1 = network
    problem = planes, w0, w1, precision, tuning.architecture(planes.device)
    inputs = [x.detach() for x in (planes, ray_origins, ray_directions, t, w0, b0, w1)]
    options = cube_scale, precision
    grad_y = torch.ones(*t.shape, len(w1), device=planes.device)

    def fwd(plan: tuple) -> None:
        kernels.fwd(*inputs, b1.detach(), *options, chosen=plan)

    def bwd(plan: tuple) -> None:
        kernels.bwd(grad_y, *inputs, *options, chosen=plan)

    begun, timer = clock(), milliseconds if timer is None else timer
    rows: list[dict[str, Any]] = []
    for way, launch in (("fwd", fwd), ("bwd", bwd)):
        times: list[float] = []

        def timed(call: Callable[[], Any], times: list[float] = times) -> float:
            times.append(math.inf)  # what it stays if there is no time left, or no room on the GPU
            if clock() - begun < seconds:
                times[-1] = timer(call)
            return times[-1]

        case = kernels.case(way, *problem)
        with torch.cuda.device(planes.device) if planes.is_cuda else contextlib.nullcontext():
            chosen = tuning.tune(case, launch, timed)
        for plan, ms in zip(tuning.plans(case), times, strict=True):
            row = {"kernel": case.kernel, "plan": [list(part) for part in plan]}
            rows.append({**row, "ms": ms if math.isfinite(ms) else None, "chosen": plan == chosen})
    return rows


def milliseconds(call: Callable[[], Any], *, warmup: int = 3, repeats: int = 10) -> float:
    """Median time of a call on torch's current GPU; the first calls, which compile, are not counted."""
    for _ in range(warmup):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def export_choices() -> list[dict[str, Any]]:
    """What was chosen so far, as plain JSON values."""
    from ..kernels import tuning

    return tuning.export_choices()


def import_choices(choices: list[dict[str, Any]]) -> None:
    """Takes up what `export_choices` gave.

    Raises:
        ValueError: It names a plan that is not there: it was saved by another version.
    """
    from ..kernels import tuning

    tuning.import_choices(choices)
