"""What each precision computes in, and which one a device is fast and safe in."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from ..config import Config
from ..errors import UserError
from .distributed import World

HALF_BLOCKS = 4  # top resolutions of G and blocks of D that the published half precision has
TENSOR_FLOAT = 80  # ten times the compute capability from which a GPU multiplies TF32 and bf16


class Mode(NamedTuple):
    """How a precision computes.

    Args:
        what: In words.
        tf32: Whether matrix products and convolutions of fp32 may round their operands to TF32.
        split: Whether convolutions of fp32 are three products in TF32, see `ops.convolution`.
        decoder: The precision of `ops.decode_triplane`.
        half: The dtype of G's top resolutions; None: fp32.
        capability: Ten times the least compute capability of a GPU.
    """

    what: str
    tf32: bool = False
    split: bool = False
    decoder: str = "fp32"
    half: torch.dtype | None = None
    capability: int = 0

    @property
    def blocks(self) -> int:
        """Top resolutions of G in half precision."""
        return HALF_BLOCKS if self.half is not None else 0

    @property
    def half_of_discriminator(self) -> torch.dtype:
        """The dtype of D's half blocks, where it has some."""
        return self.half or torch.float16


MODES = {
    "fp32": Mode("fp32 without TF32"),
    "tf32x3": Mode("fp32, convolutions as three products in TF32", split=True, capability=TENSOR_FLOAT),
    "tf32": Mode("fp32 with products in TF32", tf32=True, decoder="tf32", capability=TENSOR_FLOAT),
    "fp16": Mode(f"G's top {HALF_BLOCKS} resolutions in fp16", tf32=True, decoder="fp16", half=torch.float16),
    "bf16": Mode(
        f"G's top {HALF_BLOCKS} resolutions in bf16",
        tf32=True,
        decoder="tf32",
        half=torch.bfloat16,
        capability=TENSOR_FLOAT,
    ),
}


def mode_of(config: Config) -> Mode:
    """The mode of settings; of those that no device was asked about yet, fp32."""
    return MODES["fp32" if config.precision == "auto" else config.precision]


def half_blocks_of(config: Config) -> int:
    """Top blocks of D in half precision, where no device has decided: as many as of G."""
    blocks = config.discriminator.half_blocks
    return mode_of(config).blocks if blocks is None else blocks


def capability_of(device: torch.device) -> int | None:
    """Ten times the compute capability, as in sm_80; None for a CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def require(config: Config, capability: int | None) -> None:
    """Raises UserError where a device cannot compute in the precision that was asked for.

    A CPU computes in fp32, and in bf16, slowly, for whoever wants to try it.
    """
    name = config.precision
    if name == "auto":
        return
    if capability is None:
        if name not in ("fp32", "bf16"):
            raise UserError(f"precision {name} needs a GPU, a CPU computes in fp32: set --precision fp32")
    elif capability < MODES[name].capability:
        needed, got = (f"{number // 10}.{number % 10}" for number in (MODES[name].capability, capability))
        raise UserError(
            f"precision {name} needs a GPU of compute capability {needed} (an A100 or newer), this one has {got}: set "
            "--precision auto, fp32 or fp16"
        )


def choose(capability: int | None) -> tuple[str, int, str]:
    """What a device is fast and safe in: the precision, D's half blocks, and why."""
    if capability is None:
        return "fp32", 0, "a CPU is fastest in it"
    if capability < TENSOR_FLOAT:
        return "fp32", HALF_BLOCKS, f"sm_{capability} has no TF32; D's half blocks are the published ones"
    return "tf32", HALF_BLOCKS, f"sm_{capability} multiplies in TF32; D's half blocks are the published ones"


def settled(config: Config, capability: int | None, world: World | None = None) -> tuple[Config, str]:
    """The settings with a precision and D's half blocks in place of `auto`, and a line that says what and why.

    The same in all processes: that of their oldest GPU. What was asked for stays.

    Args:
        capability: Of this process's device, see `capability_of`.
        world: The processes of the run.

    Raises:
        UserError: A device cannot compute in the precision that was asked for.
    """
    everyone = [capability] if world is None else world.exchange(capability)
    least = None if None in everyone else min(everyone)
    require(config, least)
    precision, blocks, why = choose(least)
    asked = config.precision != "auto"
    if asked:
        precision, blocks, why = config.precision, MODES[config.precision].blocks, "asked for"
    elif len(set(everyone)) > 1:
        why = f"the oldest GPU decides: {why}"
    if config.discriminator.half_blocks is not None:
        blocks = config.discriminator.half_blocks
        why = why if asked else f"{why.partition('; ')[0]}; D's half blocks are as asked for"
    elif blocks and not config.discriminator.clamp and not asked:
        blocks, why = 0, f"{why.partition('; ')[0]}; D has no clamp, and so no half blocks"
    mode = MODES[precision]
    parts = [mode.what]
    if blocks and (least is not None or mode.half is not None):
        parts.append(f"D's top {blocks} blocks in {str(mode.half_of_discriminator).removeprefix('torch.')}")
    if not asked:
        discriminator = dataclasses.replace(config.discriminator, half_blocks=blocks)
        config = dataclasses.replace(config, precision=precision, discriminator=discriminator)
    return config, f"precision {precision} ({', '.join(parts)}): {why}"
