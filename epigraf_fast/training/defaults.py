"""What a run on a GPU takes beyond its settings, where that gives the same gradients faster."""

from __future__ import annotations

import dataclasses

import torch

from ..config import Config
from ..ops import backends
from .proof import Finding
from .regions import is_on


def tuned(config: Config, finding: Finding | None, device: torch.device) -> tuple[Config, list[str]]:
    """The settings with what this device has proved to do, and a line for every choice.

    CUDA graphs where their check passed; cuDNN's trials of its algorithms where sizes stay the same and no order of
    sums is asked for.

    Args:
        finding: What the check of the kernels found, None where there was none: nothing is chosen then.
    """
    if device.type not in backends.CHECKED or finding is None:
        return config, []
    lines = []
    if finding.records and not config.cuda_graphs:
        config = dataclasses.replace(config, cuda_graphs=True)
        lines.append("CUDA graphs: a phase is one launch; here its replays gave the gradients of plain calls")
    if not config.deterministic and (config.cuda_graphs or not is_on(config)):
        torch.backends.cudnn.benchmark = True
        lines.append("cudnn.benchmark: cuDNN tries its algorithms, once for each size")
    return config, lines
