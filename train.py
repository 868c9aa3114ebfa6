"""Trains EpiGRAF: parse, build, loop, save.

$ python train.py demo
$ python train.py ffhq --data datasets/ffhq.zip --resolution 512 --batch 64 --run-dir runs/ffhq
$ python train.py ffhq --data datasets/ffhq.zip --dry-run
$ python train.py ffhq --data datasets/ffhq.zip --run-dir runs/ffhq --resume auto
$ torchrun --nproc_per_node 8 train.py ffhq --data datasets/ffhq.zip --run-dir runs/ffhq --resume auto
"""

import contextlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from epigraf_fast import doctor
from epigraf_fast.config import PRESETS, Config, check, preset, to_dict, with_data_camera
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.errors import DivergenceError, UserError
from epigraf_fast.training.checkpoint import check_resumable, find_checkpoint, load_checkpoint, set_random_state
from epigraf_fast.training.distributed import FAULT, World, check_world
from epigraf_fast.training.endurance import StopRequest, explain_out_of_memory
from epigraf_fast.training.memory import keep_freed_memory, meta_networks, parameter_count, step_bytes
from epigraf_fast.training.networks import choose_backends, find_device, set_arithmetic
from epigraf_fast.training.profile import traced
from epigraf_fast.training.record import Record
from epigraf_fast.training.step import Trainer
from epigraf_fast.training.warmup import warm_up


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 training diverged, 2 a fault in the input, 128 + n stopped by signal n."""
    command, world = parse(argv), World.from_environment()
    try:
        check(command.config)
        check_world(command.config, world)
        config, device, loader = command.config, pick_device(command.config, world), command.config.loader
        dataset = ImageDataset(config.data, config.resolution, use_labels=loader.labels, mirror=loader.mirror)
        config = with_data_camera(config, dataset.camera)
        check(config)
        if command.dry_run:
            return dry_run(config, dataset)
        with traced(Path(config.run_dir) / "trace.json" if command.profile and world.rank == 0 else None):
            return train(config, dataset, device, command.resume, world)
    except (UserError, DivergenceError) as error:
        where = f"[rank {world.rank}] " if world.size > 1 else ""
        print(f"{where}{'error' if isinstance(error, UserError) else 'stopped'}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        world.close()


def parse(argv: list[str] | None):
    """The command line; every setting of `Config` is a flag, and each preset a subcommand with its own defaults."""
    import tyro

    @dataclass(frozen=True)
    class Command:
        config: Annotated[Config, tyro.conf.arg(name="")]
        resume: str | None = None
        """Continue: a checkpoint, a run folder, or `auto` for the newest checkpoint in --run-dir, if there is one."""
        dry_run: bool = False
        """Print the settings, parameter counts and a memory estimate, check the data, and leave."""
        profile: bool = False
        """Write a torch profiler trace of a few iterations, from the sixth on, to trace.json in --run-dir."""

    presets = {name: (f"the {name} preset", Command(preset(name))) for name in PRESETS}
    return tyro.extras.overridable_config_cli(presets, prog="train.py", description=__doc__, args=argv)


def pick_device(config: Config, world: World) -> torch.device:
    """The device to train on, with the arithmetic that the precision asks for switched on."""
    device = find_device(config.device)
    if device.type == "cpu" and config.precision != "fp32":
        raise UserError(f"precision {config.precision} needs a GPU, a CPU computes in fp32: set --precision fp32")
    if device.type == "cpu" and config.cuda_graphs:
        raise UserError("cuda_graphs needs a GPU, a CPU has nothing to record: leave --cuda-graphs out")
    choose_backends(config, device.type)
    set_arithmetic(config)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" and world.size > 1:
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    return device


def dry_run(config: Config, dataset: ImageDataset) -> int:
    """Checks everything that can be checked without training, and prints what would be trained."""
    generator, discriminator = meta_networks(config, dataset.label_dim)
    fixed, step = step_bytes(config, generator, discriminator)
    dataset.check_images(progress=True)
    print(json.dumps(to_dict(config), indent=2))
    print(f"data: {config.data}: {len(dataset):,} images (mirrored: {config.loader.mirror}), all readable")
    print(f"parameters: G {parameter_count(generator):,}, D {parameter_count(discriminator):,}")
    print(
        f"memory, estimated in fp32: {fixed / 2**30:.2f} GiB for weights, gradients, Adam and the average, "
        f"{step / 2**30:.2f} GiB for a micro-batch of {config.micro}"
    )
    return 0


def train(
    config: Config, dataset: ImageDataset, device: torch.device, resume: str | None, world: World | None = None
) -> int:
    """Builds or restores a run, and trains it."""
    world = World() if world is None else world
    world.connect(device)
    checkpoint, random_states = find_checkpoint(resume, Path(config.run_dir)), []
    random.seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(config.seed)
    trainer = Trainer(config, dataset, device, world)
    if checkpoint:
        stored_config, stored = load_checkpoint(checkpoint)
        changes = check_resumable(stored_config, config)
        trainer.load_state_dict(stored["trainer"])
        random_states = stored["random"]
        set_random_state(random_states[world.rank % len(random_states)])
        if world.rank == 0:
            print(f"continuing from {checkpoint}", *changes, sep="\n  ")
    if len(random_states) != world.size:  # else every process goes on exactly where it was
        world.reseed(config.seed, trainer.cur_nimg)
    if world.rank == 0:
        print(doctor.format_backends(doctor.report(), trainer.backends))
    warm_up(trainer)
    with contextlib.closing(Record(config, dataset, trainer)) as record:
        return loop(config, dataset, trainer, record)


def loop(config: Config, dataset: ImageDataset, trainer: Trainer, record: Record) -> int:
    """Trains a run to its end, or until a signal."""
    world, stop = trainer.world, StopRequest()
    total = round(config.kimg * 1000)
    record.begin()
    order = trainer.share, config.seed, trainer.cur_nimg, config.loader.workers
    loader = make_loader(dataset, *order, rank=world.rank, world_size=world.size, device=trainer.device)

    def crossed(kimg: float | None) -> bool:
        """Whether the last iteration stepped over a multiple of this many kimg."""
        interval = round((kimg or 0) * 1000)
        return interval > 0 and trainer.cur_nimg // interval != (trainer.cur_nimg - config.batch) // interval

    while trainer.cur_nimg < total:
        fault = None
        try:
            batch = next(loader)
        except UserError as error:  # an unreadable image or a dead worker; the networks are sound
            fault = error
        (word,) = world.agree(FAULT if fault else stop.signal)
        if word:
            saved = (
                f"saved {record.save()}; go on with --run-dir {config.run_dir} --resume auto"
                if trainer.cur_nimg
                else ""
            )
            if word == FAULT:
                raise UserError(f"{fault or 'another process has no data'}{f' ({saved})' if saved else ''}")
            record.say(f"stopped by signal {word}; {saved or 'nothing was trained yet'}")
            return 128 + word
        with explain_out_of_memory(config, dataset.label_dim, trainer.device):
            trainer.iteration(*batch)
        record.advance()
        if crossed(config.log_kimg):
            record.statistics()
        if crossed(config.snapshot_kimg):
            record.grids()
        finished, measuring = trainer.cur_nimg >= total, crossed(config.metric_kimg)
        if finished or measuring or crossed(config.checkpoint_kimg):
            record.save(must=finished)
        if measuring and not finished:
            record.measure()
    record.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
