"""What makes a run slower than it could be on this machine, a line each, and what to do about it."""

from __future__ import annotations

import torch

from .. import machine
from ..ops import backends
from .precision import capability_of

BUSY = 20  # percent of a GPU's time that something else takes
CAPPED = 0.9  # of the power that a GPU is sold with


def advice(device: torch.device) -> list[str]:
    """One line for each: an old driver, kernels that cannot be had, a GPU that is busy or may not draw its power.

    To be asked before the run itself computes, since a GPU that is busy is busy with something else then.
    """
    kernels = {"triton": "decode_triplane", "cuda": "bias_act"} if device.type == "cuda" else {"cpu": "bias_act"}
    lacking = [backends.lacking_on(op, name, device.type) for name, op in kernels.items()]
    lines = _of_gpu(device) if device.type == "cuda" else []
    return [f"slower than it could be: {line}" for line in [*filter(None, lacking), *lines]]


def _of_gpu(device: torch.device) -> list[str]:
    lines, driver = [], machine.driver()
    new = (capability_of(device) or 0) > machine.NEWEST_VOLTA  # others stay with CUDA 12
    if driver and new and int(driver.partition(".")[0]) < machine.CUDA13_DRIVER:
        lines.append(
            f"driver {driver} has no CUDA 13: update it to {machine.CUDA13_DRIVER} or newer, and run make again, which "
            f"then installs torch {machine.TESTED} with newer libraries"
        )
    state = machine.condition(device.index or 0)
    if state is not None and state.busy is not None and state.busy >= BUSY:
        lines.append(f"{device} is {state.busy:g}% busy with something else: see nvidia-smi, or take another --device")
    if state is not None and state.watts and state.default_watts and state.watts < CAPPED * state.default_watts:
        lines.append(
            f"{device} may draw {state.watts:g} W of {state.default_watts:g} W: nvidia-smi -pl {state.default_watts:g} "
            "as root lifts that, where the machine is cooled for it"
        )
    return lines
