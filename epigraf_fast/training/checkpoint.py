"""Checkpoints: written whole or not at all, read without running code, complete enough to continue exactly.

A checkpoint is `torch.save` of nested dicts, lists, tensors and numbers, and loads with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic import replacing
from ..config import Config, differences, from_dict, to_dict
from ..errors import CheckpointError, SaveError, UserError
from .identify import what_else

FORMAT = "epigraf_fast"
VERSION = 1
NAME = re.compile(r"checkpoint-(\d{9})\.pt")


def random_state() -> dict[str, Any]:
    """The states of python's, numpy's and torch's global generators, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`. GPU states are restored where the same number of GPUs is there."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def checkpoint_path(run_dir: Path, cur_nimg: int) -> Path:
    """Where the checkpoint at `cur_nimg` images belongs."""
    return run_dir / "checkpoints" / f"checkpoint-{cur_nimg:09d}.pt"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = (run_dir / "checkpoints").glob("checkpoint-*.pt")
    return sorted(path for path in found if NAME.fullmatch(path.name))


def save_checkpoint(
    run_dir: Path,
    config: Config,
    trainer_state: dict[str, Any],
    keep: int,
    random_states: list[dict[str, Any]] | None = None,
) -> Path:
    """Writes a checkpoint to a temporary file, renames it into place, and removes all but the newest `keep`.

    A write that fails, as on a full disk, leaves nothing behind and the checkpoints before alone.

    Args:
        trainer_state: `Trainer.state_dict()`.
        random_states: `random_state()` of every process, in order; default: of this one, alone.

    Returns:
        Its path.

    Raises:
        SaveError: The file could not be written.
    """
    path = checkpoint_path(run_dir, trainer_state["cur_nimg"])
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_dict(config),
        "trainer": trainer_state,
        "random": random_states or [random_state()],
    }
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter while it handles the former
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).strip().splitlines()[0][:120]
        kept = list_checkpoints(run_dir)
        last = f"the last one is {kept[-1].name}" if kept else "there is none yet"
        raise SaveError(f"checkpoint {path} could not be written ({reason}): make room; {last}") from None
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself survives a power cut
        finally:
            os.close(directory)
    for old in list_checkpoints(run_dir)[:-keep]:
        if old != path:  # which is not the last one where a damaged one was passed over on resume
            with contextlib.suppress(OSError):
                old.unlink()
    return path


def keep_best(run_dir: Path, cur_nimg: int) -> Path | None:
    """Keeps the checkpoint at `cur_nimg` images as best.pt, beside the newest ones; None if there is none."""
    path = checkpoint_path(run_dir, cur_nimg)
    if not path.is_file():
        return None
    best = path.with_name("best.pt")
    with replacing(best) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
    return best


def load_checkpoint(path: Path) -> tuple[Config, dict[str, Any]]:
    """Reads a checkpoint, onto the CPU.

    Returns:
        Its settings, and a dict with "trainer" (for `Trainer.load_state_dict`) and "random", a list with one state per
        process (for `set_random_state`).

    Raises:
        CheckpointError: Missing, damaged, or no checkpoint.
        UserError: Of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: give a checkpoint file or a run folder")
    other = what_else(path)
    if other is not None:
        raise CheckpointError(f"{path} is no checkpoint but {other}")
    try:
        # The file is a zip whose checksums torch writes, but does not compare on reading: a flipped bit would pass.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            # No checksum covers the directory of the zip, where torch believes an entry that says it is a folder.
            broken = broken or next((entry.filename for entry in archive.infolist() if entry.external_attr), None)
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch trip in every possible way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint {path} cannot be read ({reason[:120]}): use the one before it") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of epigraf_fast")
    if content.get("version") != VERSION:
        raise UserError(f"checkpoint {path} has version {content.get('version')}, this release reads version {VERSION}")
    random_states = content["random"] if isinstance(content["random"], list) else [content["random"]]
    return from_dict(content["config"]), {"trainer": content["trainer"], "random": random_states}


def find_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """What `--resume` means: nothing, a checkpoint file, a run folder (its newest readable one), or "auto".

    "auto" is the newest readable checkpoint of `run_dir`, or None when it has none. A damaged newest one is skipped
    with a warning.

    Raises:
        UserError: Nothing to resume from, or `run_dir` holds a run that goes on from somewhere else.
    """
    own = list_checkpoints(run_dir)
    if resume is None:
        if own:
            raise UserError(f"{run_dir} already holds a run: add --resume auto, or choose another --run-dir")
        return None
    path = run_dir if resume == "auto" else Path(resume)
    if own and path.resolve() not in (run_dir.resolve(), own[-1].resolve()):
        raise UserError(
            f"{run_dir} already holds a run that reaches {own[-1].name}: "
            f"take --resume auto, or choose another --run-dir to go on from {path}"
        )
    if path.is_file():
        return path
    candidates = list_checkpoints(path)
    for candidate in reversed(candidates):
        try:
            load_checkpoint(candidate)
        except UserError as error:
            warnings.warn(f"{error}", stacklevel=2)
            continue
        return candidate
    if resume == "auto" and not candidates:
        return None
    advice = "choose another --run-dir to begin anew" if resume == "auto" else "give a checkpoint file or a run folder"
    raise CheckpointError(f"{path} holds no readable checkpoint: {advice}")


# What a checkpoint's networks and optimizers depend on; everything else may change on resume.
STRUCTURE = (
    "resolution",
    "generator.",
    "renderer.background",
    "discriminator.",
    "patch.resolution",
    "loader.labels",
    "loader.mirror",
    "seed",
)
FREE = (
    "generator.pose_swap_probability",
    "generator.pose_swap_kimg",
    "generator.pose_dropout",
    "generator.style_mixing",
    "renderer.background_samples",
    "renderer.background_start",
    "discriminator.camera_dropout",
    "discriminator.half_blocks",
)


def check_resumable(stored: Config, config: Config) -> list[str]:
    """Compares the settings of a checkpoint with those of the run that continues it.

    Returns:
        One line per harmless difference.

    Raises:
        UserError: A difference that the checkpoint cannot be continued with.
    """
    lines = []
    for name, (old, new) in differences(stored, config).items():
        if name.startswith(STRUCTURE) and name not in FREE:
            raise UserError(f"cannot resume: {name} is {new}, but the checkpoint was made with {old}: set it to that")
        lines.append(f"{name}: {old} -> {new}")
    return lines
