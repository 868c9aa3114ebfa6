"""What a run takes by the machine it is on, beyond its settings, where that gives the same gradients faster."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from ..config import Config
from ..ops import backends
from .distributed import World
from .proof import Finding
from .proof_items import GRAPHS, RECORDED
from .regions import is_on

MOST_LOADERS = 16
BESIDE_A_CPU = 2  # loader processes where training itself takes the cores
SHARED = Path("/dev/shm")  # where batches lie on their way
USABLE = 0.8  # of what is free there
WAITING = 3  # batches of a loader process: two ahead, one that is made


def tuned(config: Config, finding: Finding | None, device: torch.device) -> tuple[Config, list[str]]:
    """The settings with what this device has proved to do, and a line for every choice.

    CUDA graphs where their check passed; cuDNN's trials of its algorithms where sizes stay the same and no order of
    sums is asked for.

    Args:
        finding: What the check of the kernels found, None where there was none: nothing is chosen then.
    """
    if device.type not in backends.CHECKED or finding is None:
        return config, []
    found = finding.items.get(f"{GRAPHS} {RECORDED}")
    if config.cuda_graphs:
        graphs = "as asked for"
    elif finding.records:
        config = dataclasses.replace(config, cuda_graphs=True)
        graphs = "a phase is one launch; here its replays gave the gradients of plain calls"
    else:
        graphs = f"off, {found.why}" if found is not None else "off, which these settings cannot do with"
    trials = not config.deterministic and (config.cuda_graphs or not is_on(config))
    if trials:
        torch.backends.cudnn.benchmark = True
        cudnn = "cuDNN tries its algorithms, once for each size"
    else:
        cudnn = "off, sums keep one order" if config.deterministic else "off, planes in part change their sizes"
    lines = [f"CUDA graphs: {graphs}", f"cudnn.benchmark: {cudnn}"]
    return config, lines


def with_loaders(config: Config, device: torch.device, world: World) -> tuple[Config, list[str]]:
    """The settings with a number of loader processes in place of `auto`, and a line on it.

    One for every core of this process's share but one, at most `MOST_LOADERS`; on a CPU, which trains, `BESIDE_A_CPU`;
    and no more than shared memory has room for.
    """
    if config.loader.workers != "auto":
        return config, []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // world.local_size
    most = BESIDE_A_CPU if device.type == "cpu" else MOST_LOADERS
    count, why = max(1, min(most, share - 1)), f"by {cores} cores"
    if world.local_size > 1:
        why += f" for {world.local_size} processes"
    room = shared_room()
    if room is not None:
        batch = config.batch // world.size * 3 * config.resolution**2
        fit = int(USABLE * room / (WAITING * batch * world.local_size))
        if fit < count:
            count, why = fit, f"by {room / 2**20:.0f} MiB in {SHARED}: make it larger, as with docker run --shm-size 8g"
    loader = dataclasses.replace(config.loader, workers=count)
    return dataclasses.replace(config, loader=loader), [f"loader processes: {count}, {why}"]


def shared_room() -> int | None:
    """Bytes that are free for batches on their way; None: not known."""
    try:
        found = os.statvfs(SHARED)
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize
