"""Trains EpiGRAF: parse, build, loop, save.

$ python train.py demo
$ python train.py ffhq --data datasets/ffhq.zip --resolution 512 --batch 64 --run-dir runs/ffhq
$ python train.py ffhq --data datasets/ffhq.zip --dry-run
$ python train.py ffhq --data datasets/ffhq.zip --run-dir runs/ffhq --resume auto
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
from epigraf_fast.errors import DivergenceError, SaveError, UserError
from epigraf_fast.training.checkpoint import (
    check_resumable,
    find_checkpoint,
    keep_best,
    load_checkpoint,
    save_checkpoint,
    set_random_state,
)
from epigraf_fast.training.endurance import StopRequest, explain_out_of_memory, require_finite
from epigraf_fast.training.log import RunLog
from epigraf_fast.training.memory import meta_networks, parameter_count, step_bytes
from epigraf_fast.training.networks import choose_backends, find_device
from epigraf_fast.training.profile import traced
from epigraf_fast.training.snapshot import Snapshots, is_best
from epigraf_fast.training.step import Trainer


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 training diverged, 2 a fault in the input, 128 + n stopped by signal n."""
    command = parse(argv)
    try:
        check(command.config)
        config, device, loader = command.config, pick_device(command.config), command.config.loader
        dataset = ImageDataset(config.data, config.resolution, use_labels=loader.labels, mirror=loader.mirror)
        config = with_data_camera(config, dataset.camera)
        check(config)
        if command.dry_run:
            return dry_run(config, dataset)
        with traced(Path(config.run_dir) / "trace.json" if command.profile else None):
            return train(config, dataset, device, command.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DivergenceError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1


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


def pick_device(config: Config) -> torch.device:
    """The device to train on, with the arithmetic that the precision asks for switched on."""
    device = find_device(config.device)
    if device.type == "cpu" and config.precision != "fp32":
        raise UserError(f"precision {config.precision} needs a GPU, a CPU computes in fp32: set --precision fp32")
    choose_backends(config, device.type)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
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


def train(config: Config, dataset: ImageDataset, device: torch.device, resume: str | None) -> int:
    """Builds or restores a run, and trains it."""
    run_dir = Path(config.run_dir)
    checkpoint = find_checkpoint(resume, run_dir)
    random.seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(config.seed)
    trainer = Trainer(config, dataset, device)
    if checkpoint:
        stored_config, stored = load_checkpoint(checkpoint)
        changes = check_resumable(stored_config, config)
        trainer.load_state_dict(stored["trainer"])
        set_random_state(stored["random"])
        print(f"continuing from {checkpoint}", *changes, sep="\n  ")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    print(doctor.format_backends(doctor.report(), trainer.backends))
    with contextlib.closing(RunLog(run_dir, config.kimg, trainer.cur_nimg)) as log:
        return loop(config, dataset, trainer, log)


def loop(config: Config, dataset: ImageDataset, trainer: Trainer, log: RunLog) -> int:
    """Trains a run to its end, or until a signal."""
    run_dir, stop = Path(config.run_dir), StopRequest()
    snapshots = Snapshots(config, dataset, trainer.average, log)
    total = round(config.kimg * 1000)

    def crossed(kimg: float) -> bool:
        """Whether the last iteration stepped over a multiple of this many kimg."""
        interval = round(kimg * 1000)
        return trainer.cur_nimg // interval != (trainer.cur_nimg - config.batch) // interval

    def save() -> Path:
        with log.pause():
            require_finite(trainer, run_dir)
            return save_checkpoint(run_dir, config, trainer.state_dict(), config.keep_checkpoints)

    def measure() -> None:
        """Measures, and keeps the checkpoint of this moment if it is the best."""
        with log.pause():
            for name, value in snapshots.measure(trainer.cur_nimg).items():
                log.say(f"{f'{name}:':<16} {value:.1f} ({run_dir / 'metrics.json'})")
            if is_best(run_dir):
                keep_best(run_dir, trainer.cur_nimg)

    if trainer.cur_nimg == 0:
        with log.pause():
            log.say(f"real images:     {snapshots.reals()}")
            log.say(f"initial samples: {snapshots.grids(0)[0]}")
        if config.metric_images:
            measure()
    order = config.batch, config.seed, trainer.cur_nimg
    loader = make_loader(dataset, *order, config.loader.workers, device=trainer.device)
    saved_nimg = trainer.cur_nimg

    while trainer.cur_nimg < total:
        try:
            batch = next(loader)
        except UserError as error:  # an unreadable image or a dead worker; the networks are sound
            kept = f" (saved {save()}; go on with --resume auto)" if trainer.cur_nimg > saved_nimg else ""
            raise UserError(f"{error}{kept}") from None
        with explain_out_of_memory(config, dataset.label_dim, trainer.device):
            trainer.iteration(*batch)
        log.advance(trainer.cur_nimg)
        finished = trainer.cur_nimg >= total
        if crossed(config.log_kimg):
            log.write(trainer.cur_nimg, require_finite(trainer, run_dir) | snapshots.statistics)
            trainer.reset_statistics()
        if crossed(config.snapshot_kimg):
            with log.pause():
                snapshots.grids(trainer.cur_nimg)
        measuring = config.metric_kimg is not None and crossed(config.metric_kimg)
        if stop.signal or measuring or finished or crossed(config.checkpoint_kimg):
            try:
                path = save()
                saved_nimg = trainer.cur_nimg
            except SaveError as error:
                if stop.signal or finished:
                    raise
                log.say(f"warning: {error}; training goes on")
        if stop.signal:
            log.say(f"stopped by signal {stop.signal}; saved {path}; go on with --run-dir {run_dir} --resume auto")
            return 128 + stop.signal
        if measuring and not finished:
            measure()

    log.say(f"samples:         {' '.join(map(str, snapshots.grids(trainer.cur_nimg)))}")
    if config.turntable:
        log.say(f"turntable:       {snapshots.turntable()}")
    if config.metric_images:
        measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
