"""The command line of training: a preset, and every setting of it as a flag."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..config import PRESETS, Config, preset
from .arguments import read


@dataclasses.dataclass(frozen=True)
class Command:
    """The settings of a preset, and what is no setting of a run."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: str | None = None
    """Continue: a checkpoint, a run folder, or `auto` for the newest checkpoint in --run-dir, if there is one."""
    dry_run: bool = False
    """Check everything, the data too, say in ten lines what would be trained, and leave."""
    json: bool = False
    """With --dry-run: print all that is known, every setting too, as JSON."""
    name: tyro.conf.Suppress[str] = ""  # of the preset
    profile: bool = False
    """Write a torch profiler trace of a few iterations, from the sixth on, to trace.json in --run-dir."""
    recheck: bool = False
    """Check the kernels on this GPU again, whatever an earlier start found."""
    tune: bool = True
    """On a GPU: take CUDA graphs where they proved right, the fastest plans of kernels and cuDNN's algorithms."""


def commands() -> dict[str, tuple[str, Any]]:
    """Each preset's name, what the help says of it, and its options."""
    return {name: (f"the {name} preset", Command(preset(name), name=name)) for name in PRESETS}


def read_preset(description: str, args: Sequence[str] | None) -> Command:
    """The command line of `train.py` or `epigraf train`. Raises UserError where it is wrong."""
    prog = "train.py" if Path(sys.argv[0]).name == "train.py" else "epigraf train"
    return read(functools.partial(tyro.extras.overridable_config_cli, commands()), prog, description, args)
