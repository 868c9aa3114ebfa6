"""How the processes of a run begin: from the same settings, data and code, and in the same state."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..config import Config, flat
from ..data import ImageDataset
from ..errors import CheckpointError, UserError
from ..progress import waiting
from .checkpoint import check_resumable, find_checkpoint, load_checkpoint, set_random_state
from .distributed import World
from .endurance import explain_out_of_memory
from .memory import keep_freed_memory
from .networks import choose_backends, find_device, set_arithmetic
from .precision import capability_of, require
from .progress import say
from .step import Trainer

# Settings that each process may have its own of: where its machine keeps things, and how it reads them.
OWN = ("data", "run_dir", "inception", "device", "loader.workers")
IMAGES = 16  # of the data set that are compared

Facts = dict[str, dict[str, Any]]


def pick_device(config: Config, world: World) -> torch.device:
    """The device to train on, with the arithmetic that the precision asks for switched on.

    Raises:
        UserError: There is none, or it cannot do what was asked for.
    """
    if world.size > 1 and ":" in (config.device or ""):
        raise UserError(
            f"--device is {config.device}, but of {world.size} processes each takes the GPU of its LOCAL_RANK: "
            "give --device cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    device = find_device(config.device)
    if device.type == "cpu" and config.cuda_graphs:
        raise UserError("cuda_graphs needs a GPU, a CPU has nothing to record: leave --cuda-graphs out")
    if config.backend != "auto":  # which takes what is there
        choose_backends(config, device.type)
    set_arithmetic(config)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" and world.size > 1:
        gpus = torch.cuda.device_count()
        if world.local_rank >= gpus:
            raise UserError(
                f"LOCAL_RANK is {world.local_rank}, but torch sees {gpus} GPUs on this machine: start at most {gpus} "
                f"processes there (torchrun --nproc_per_node {gpus})"
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    require(config, capability_of(device))
    return device


def require_same(
    config: Config, dataset: ImageDataset, device: torch.device, world: World, *, dry_run: bool = False
) -> None:
    """Compares the processes before any of them begins.

    Raises:
        UserError: They differ; in every process the same line, which names what differs and where.
    """
    if world.size == 1:
        return
    with world.together():
        mine = facts(config, dataset, device, dry_run)
    everyone = world.exchange(mine)
    for advice, expected in everyone[0].items():
        lines = []
        for name, value in expected.items():
            for rank, theirs in enumerate(everyone[1:], start=1):
                if theirs[advice].get(name) != value:
                    lines.append(f"{name} is {value} on rank 0 and {theirs[advice].get(name)} on rank {rank}")
                    break
        if lines:
            more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
            raise UserError(f"the processes differ: {'; '.join(lines[:3])}{more}: {advice}")


def facts(config: Config, dataset: ImageDataset, device: torch.device, dry_run: bool) -> Facts:
    """What has to be the same in all processes, by the advice on what differs."""
    places = torch.linspace(0, len(dataset) - 1, min(len(dataset), IMAGES)).long().tolist()
    return {
        "install the same everywhere": {
            "torch": torch.__version__,
            "epigraf_fast": __version__,
            "the checksum of epigraf_fast's code": _code(),
        },
        "give every process the same settings": {
            "dry_run": dry_run,
            "the kind of device": device.type,
            **{name: value for name, value in flat(config).items() if name not in OWN},
        },
        "give every process the same data set": {
            "the number of images": len(dataset),
            "the checksum of the labels": checksum(dataset.labels),
            "the checksum of the poses": checksum(dataset.angles),
            "the checksum of some images": checksum([dataset[place][0] for place in places]),
        },
    }


def _code() -> str:
    """A checksum of the package's sources, wherever they are installed."""
    package = Path(__file__).resolve().parents[1]
    sources = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    kernels = importlib.util.find_spec(f"{package.name}.kernels")  # which a checkout has beside the package
    for place in (kernels and kernels.submodule_search_locations) or []:
        sources |= {f"kernels/{path.name}": path for path in Path(place).glob("*.py")}
    return checksum({name: path.read_bytes() for name, path in sources.items()})


def build(config: Config, dataset: ImageDataset, device: torch.device, resume: str | None, world: World) -> Trainer:
    """A trainer at the beginning of a run, or where a checkpoint left one; in all processes in the same state.

    Each process reads its own checkpoint. Those that have none, as without a shared disk, or another one, are given the
    state of rank 0, which says so.

    Raises:
        UserError: Nothing to resume from, or another process knows more of the run than rank 0, which writes.
    """
    checkpoint, stored_config, stored = None, config, None
    with world.together(), waiting("reading the checkpoint", shown=world.rank == 0):
        try:
            checkpoint = find_checkpoint(resume, Path(config.run_dir))
            if checkpoint is not None:
                stored_config, stored = load_checkpoint(checkpoint)
        except CheckpointError:
            if world.rank == 0:
                raise
    counts = world.exchange(stored["trainer"]["cur_nimg"] if stored else 0)
    if max(counts) > counts[0]:
        rank, own = counts.index(max(counts)), f"one of {counts[0]}" if counts[0] else "none"
        raise UserError(
            f"rank {rank} has a checkpoint of {counts[rank]} images, but rank 0, which writes, has {own}: copy the "
            f"checkpoints of rank {rank} into the --run-dir of rank 0"
        )
    random_states, changes = [], []
    with world.together(), waiting("building the networks", shown=world.rank == 0):
        random.seed(config.seed)
        np.random.seed(config.seed)  # noqa: NPY002 - libraries draw from it
        torch.manual_seed(config.seed)
        with explain_out_of_memory(config, dataset.label_dim, device, world.size):
            trainer = Trainer(config, dataset, device, world)
        if stored is not None and counts[world.rank] == counts[0]:
            changes = check_resumable(stored_config, config)
            before = stored["trainer"].get("backends", trainer.backends)  # which the first release did not keep
            changes += [
                f"{op}: {before.get(op)} -> {now}" for op, now in trainer.backends.items() if before.get(op) != now
            ]
            trainer.load_state_dict(stored["trainer"])
            random_states = stored["random"]
    if world.size > 1:
        random_states = _align(trainer, random_states)
    if world.rank == 0 and checkpoint is not None:
        say("\n  ".join([f"continuing from {checkpoint}", *changes]))
    if random_states:
        set_random_state(random_states[world.rank % len(random_states)])
    if len(random_states) != world.size:  # else every process goes on exactly where it was
        world.reseed(config.seed, trainer.cur_nimg)
    return trainer


def _align(trainer: Trainer, random_states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives the state of rank 0 to those that have another one; returns its random states."""
    world = trainer.world
    with waiting("comparing the processes", shown=world.rank == 0):
        sums = world.exchange(checksum([trainer.state_dict(), random_states]))
        others = [rank for rank, value in enumerate(sums) if value != sums[0]]
        if not others:
            return random_states
        content = world.broadcast({"trainer": trainer.state_dict(), "random": random_states})
    if world.rank in others:
        trainer.load_state_dict(content["trainer"])
    if world.rank == 0:
        ranks = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
        say(f"{ranks}: no checkpoint of {trainer.cur_nimg} images, or another one; taken is the state of rank 0")
    return content["random"]


def checksum(content: Any) -> str:
    """Of all bits of a nest of dicts, sequences, tensors and plain values."""
    digest = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(repr(len(value)).encode())
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()
