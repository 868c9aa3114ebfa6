"""The average generator of a checkpoint, a run, a safetensors file or the package, ready to be looked at."""

from __future__ import annotations

import dataclasses
import importlib.resources
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config, from_dict, to_dict
from ..errors import UserError, not_installed
from ..models.generator import Generator
from .checkpoint import list_checkpoints, load_checkpoint
from .identify import what_else
from .networks import build_generator, find_device

BUILTIN = Path("builtin")  # the name of the model that comes with the package, trained on the data of that name
BUILTIN_FILE = "objects64.safetensors"


def load_generator(path: Path, device: str | None = None, *, three_d: bool = True) -> tuple[Config, Generator]:
    """Settings and average generator, with the labels that it knows, in evaluation mode and without gradients.

    Args:
        path: A checkpoint, a safetensors file of `save_safetensors`, or a folder: its newest checkpoint, or else its
            G_ema.safetensors; or `builtin`, the model that comes with the package.
        device: cpu or cuda; default: a GPU if there is one.
        three_d: Whether it must have planes; those of `backbone: image` have none.

    Raises:
        UserError: Nothing there, or not a generator of the settings beside it.
    """
    path, device = find_generator(path), find_device(device)
    if path.suffix == ".safetensors":
        config, state, label_values = load_safetensors(path)
    else:
        config, content = load_checkpoint(path)
        state = content["trainer"]["average"]
        label_values = content["trainer"].get("label_values")  # which older checkpoints have not
    if three_d and config.generator.backbone == "image":
        raise UserError(f"{path} is a generator of images (generator.backbone image): it has no planes to look into")
    config = dataclasses.replace(config, backend="auto")  # that of the run need not be here
    try:
        with torch.random.fork_rng(devices=[]):  # the values drawn here are replaced
            generator = build_generator(config, label_dim_of(config, state), device.type)
        generator.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()  # the first line names the class
        raise UserError(f"{path}: the generator does not fit its settings: {reason[:200]}") from None
    generator.label_values = label_values
    return config, generator.eval().requires_grad_(False).to(device)


def label_dim_of(config: Config, state: dict[str, Tensor]) -> int:
    """How many numbers a label has, 0 for none, as the generator's tensors tell."""
    embed = state.get("mapping.embed.weight")
    return 0 if embed is None else embed.shape[1] - 2 * config.generator.pose_conditioning


def find_generator(path: Path) -> Path:
    """The file that `load_generator` reads."""
    if path == BUILTIN:
        return Path(str(importlib.resources.files("epigraf_fast") / "builtin" / BUILTIN_FILE))
    if path.is_dir():
        found = list_checkpoints(path) or sorted(path.glob("checkpoint-*.pt")) or sorted(path.glob("G_ema.safetensors"))
        if not found:
            other = what_else(path)
            hint = f"is {other}" if other else "holds no checkpoint: give a checkpoint, a run folder or a converted one"
            raise UserError(f"{path} {hint}")
        return found[-1]
    return path


def save_safetensors(state: dict[str, Tensor], config: Config, path: Path, label_values: Tensor | None = None) -> None:
    """Writes tensors, with the settings and, where they are known, the `label_values` in the file's header."""
    _require_safetensors()
    from safetensors.torch import save

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"config": json.dumps(to_dict(config))}
    if label_values is not None:
        metadata["label_values"] = json.dumps(label_values.tolist())
    # Written here, since the package's own writer leaves a file that nobody else may read.
    path.write_bytes(save(content, metadata=metadata))


def load_safetensors(path: Path) -> tuple[Config, dict[str, Tensor], Tensor | None]:
    """The inverse of `save_safetensors`: settings, tensors, label values."""
    _require_safetensors()
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except Exception as error:
        raise UserError(f"{path} cannot be read as safetensors ({str(error).splitlines()[0]})") from None
    try:
        stored = json.loads(metadata.get("label_values", "null"))
        dtype = torch.int64 if not stored or isinstance(stored[0], int) else torch.float32
        label_values = None if stored is None else torch.tensor(stored, dtype=dtype)
        return from_dict(json.loads(metadata["config"])), state, label_values
    except (KeyError, json.JSONDecodeError, AttributeError):
        raise UserError(f"{path} was not written by epigraf_fast: its header has no config") from None


def check_finite(state: dict[str, Tensor], name: str) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name}: {key} is not finite")


def _require_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise not_installed("safetensors", "tools")
