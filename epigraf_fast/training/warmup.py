"""What is done once before the first step: the kernels' configurations are timed, and saved with the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import tuning

FILE = "kernels.json"


def choose_kernels(
    run_dir: Path,
    device: torch.device,
    rays: tuple[Tensor, ...],
    network: tuple[Tensor, ...],
    cube_scale: float,
    *,
    precision: str = "fp32",
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> bool:
    """Times the fused decoder's plans on the run's shapes, or reads what an earlier start found on the same GPU.

    The choices go to `kernels.json`, so that a resumed run takes the same kernels.

    Args:
        rays: planes, ray_origins, ray_directions and t of a micro-batch, see `ops.decode_triplane_rays`.
        network: w0, b0, w1 and b1.
        timer: For tests; default: by CUDA events.

    Returns:
        Whether anything was timed: not without a GPU, and not where the file was read.
    """
    if device.type != "cuda" and timer is None:
        return False
    path = run_dir / FILE
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["device"] == name:
            try:
                tuning.import_choices(stored["choices"])
                return False
            except ValueError as error:
                print(f"{path} is of another version, the kernels are timed anew: {error}")
    tuning.tune_decode_triplane(*rays, *network, cube_scale, precision=precision, timer=timer)
    path.write_text(json.dumps({"device": name, "choices": tuning.export_choices()}, indent=2) + "\n")
    return True
