"""Trains EpiGRAF: parse, build, loop, save. `python train.py` and `epigraf train` are the same.

$ python train.py demo
$ python train.py ffhq --data datasets/ffhq.zip --resolution 512 --batch 64 --run-dir runs/ffhq
$ python train.py ffhq --data datasets/ffhq.zip --dry-run
$ python train.py ffhq --data datasets/ffhq.zip --run-dir runs/ffhq --resume auto
$ torchrun --nproc_per_node 8 train.py ffhq --data datasets/ffhq.zip --resume auto
"""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import Config, check, with_data_camera
from ..data import ImageDataset, make_loader
from ..errors import DeviceError, DivergenceError, Stopped, UserError
from ..progress import Progress, waiting
from ..training import cores, memory
from ..training.advice import advice
from ..training.defaults import tuned, with_loaders
from ..training.distributed import FAULT, World, check_world
from ..training.endurance import StopRequest, explain_out_of_memory, sized
from ..training.files import require_writable
from ..training.lock import locked
from ..training.log import flush_output
from ..training.networks import set_arithmetic
from ..training.precision import capability_of, settled
from ..training.profile import DATA, annotate, traced
from ..training.progress import say
from ..training.proof import settle, suspecting
from ..training.record import Record
from ..training.start import build, pick_device, require_same
from ..training.step import Trainer
from ..training.warmup import choose_layouts, warm_up
from . import doctor, dry_run
from .command import begun


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 training diverged or the GPU failed, 2 a fault in the input, 128 + n stopped by
    signal n. A process that waits for others which hang leaves with 3, see `training.watchdog`.
    """
    begun()
    world = World()
    try:
        world = World.from_environment()
        with world.together():
            command = parse(args)
            check(command.config)
            check_world(command.config, world)
            config, device, loader = command.config, pick_device(command.config, world), command.config.loader
            require_writable(Path(config.run_dir), dry=True)
            with waiting("reading the data set", shown=world.rank == 0):
                dataset = ImageDataset(config.data, config.resolution, use_labels=loader.labels, mirror=loader.mirror)
            config = with_data_camera(config, dataset.camera)
            check(config)
        require_same(config, dataset, device, world, dry_run=command.dry_run)
        slow = advice(device) if world.rank == 0 else []
        config, precision = settled(config, capability_of(device), world)
        set_arithmetic(config)
        config, size = sized(config, dataset.label_dim, device, world)
        remarks = [precision, *filter(None, [size]), *slow]
        if world.rank == 0 and not command.dry_run:
            say("\n".join(remarks))
        if command.dry_run:
            with world.together():
                found = dry_run.facts(config, command.name, dataset, device, world.size, command.resume)
                dataset.check_images(Progress if world.rank == 0 else None)
            if world.rank == 0:
                print(json.dumps(found, indent=2) if command.json else "\n".join([*remarks, *dry_run.summary(found)]))
            return 0
        with traced(Path(config.run_dir) / "trace.json" if command.profile and world.rank == 0 else None):
            options = {"recheck": command.recheck, "tune": command.tune, "remarks": remarks}
            return train(config, dataset, device, command.resume, world, **options)
    except (UserError, DivergenceError, DeviceError) as error:
        where = f"[rank {world.rank}] " if world.size > 1 else ""
        say(f"{where}{'error' if isinstance(error, UserError) else 'stopped'}: {error}", sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        say(str(Stopped(signal.SIGINT)))
        return 128 + signal.SIGINT
    finally:
        world.close()
        flush_output()


def parse(args: Sequence[str] | None) -> Any:
    """The command line: a preset, and what shall differ from it. Raises UserError where it is wrong."""
    from .training_options import read_preset  # here, as those that train without a command line may lack tyro

    return read_preset(__doc__, args)


def train(
    config: Config,
    dataset: ImageDataset,
    device: torch.device,
    resume: str | None,
    world: World | None = None,
    *,
    recheck: bool = False,
    tune: bool = False,
    remarks: Sequence[str] = (),
) -> int:
    """Builds or restores a run, and trains it.

    Args:
        remarks: Lines on what was chosen for it until now, for its record.
    """
    world = World() if world is None else world
    try:
        if device.type == "cpu":
            cores.watch(fixed=config.deterministic or world.size > 1)
        with StopRequest(talks=world.rank == 0) as stop, locked(Path(config.run_dir), world):
            finding = settle(config, dataset, device, world, recheck=recheck)
            config, chosen = tuned(config, finding, device) if tune else (config, [])
            config, loaders = with_loaders(config, device, world)
            world.connect(device)
            trainer = build(config, dataset, device, resume, world)
            if world.rank == 0:
                say(doctor.format_backends(doctor.report(), trainer.backends))
            with suspecting(config, dataset, device, world):
                with world.together(), explain_out_of_memory(config, dataset.label_dim, device, world.size):
                    timed = (choose_layouts(trainer), warm_up(trainer)) if tune else ()
                    chosen += [*loaders, *(line for choice in timed for line in choice.lines())]
                    if chosen and world.rank == 0:
                        say("\n  ".join(["chosen for this machine:", *chosen]))
                    record = Record(config, dataset, trainer, [*remarks, *chosen])
                with contextlib.closing(record), world.watch.over(trainer.where, device):
                    return loop(config, dataset, trainer, record, stop)
    except Stopped as stopped:  # before anything was trained
        say(str(stopped))
        return 128 + stopped.signal


@memory.spared_from_collections()
def loop(config: Config, dataset: ImageDataset, trainer: Trainer, record: Record, stop: StopRequest) -> int:
    """Trains a run to its end, or until a signal."""
    world, total, fault = trainer.world, round(config.kimg * 1000), None
    order = trainer.share, config.seed, trainer.cur_nimg, config.loader.workers
    loader = make_loader(dataset, *order, rank=world.rank, world_size=world.size, device=trainer.device)
    go_on = f"go on with --run-dir {config.run_dir} --resume auto"

    def attempt(work: Callable[[], Any]) -> Any:
        """Does what is not training: a signal ends it, and its fault, as an unreadable image, waits for the others."""
        nonlocal fault
        try:
            return stop.at_once(work)
        except UserError as error:
            fault = error

    def crossed(kimg: float | None) -> bool:
        """Whether the last iteration stepped over a multiple of this many kimg."""
        interval = round((kimg or 0) * 1000)
        return interval > 0 and trainer.cur_nimg // interval != (trainer.cur_nimg - config.batch) // interval

    attempt(record.begin)
    while trainer.cur_nimg < total:
        with annotate(DATA):
            batch = None if fault else attempt(lambda: next(loader))
        (word,) = world.agree(FAULT if fault else stop.signal)
        if word:
            faults = world.exchange(str(fault) if fault else None)
            saved = f"saved {record.save()}; {go_on}" if trainer.cur_nimg else ""
            if word == FAULT:
                told = [f"rank {rank} has stopped: {text}" for rank, text in enumerate(faults) if text]
                raise UserError(f"{fault or told[0]}{f' ({saved})' if saved else ''}")
            record.say(f"stopped by signal {word}; {saved or 'nothing was trained yet'}")
            return 128 + word
        with explain_out_of_memory(config, dataset.label_dim, trainer.device, world.size):
            trainer.iteration(*batch)
        if change := cores.adapt():
            record.say(change)
        record.advance()
        if crossed(config.log_kimg):
            record.statistics()
        if crossed(config.snapshot_kimg):
            attempt(record.grids)
        finished, measuring = trainer.cur_nimg >= total, crossed(config.metric_kimg)
        if finished or measuring or crossed(config.checkpoint_kimg):
            record.save(must=finished)
        if measuring and not finished:
            attempt(record.measure)
    attempt(record.finish)
    if fault:
        raise fault
    if stop.signal:
        record.say(f"stopped by signal {stop.signal}; all is trained and saved; for its last pictures {go_on}")
        return 128 + stop.signal
    return 0
