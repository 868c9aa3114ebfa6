"""What a run leaves behind while it trains: log, pictures, measurements and checkpoints, written by one process."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..atomic import replacing
from ..config import Config, to_dict
from ..data import ImageDataset
from ..errors import SaveError
from ..progress import waiting
from .checkpoint import checkpoint_path, keep_best, random_state, save_checkpoint
from .endurance import require_finite
from .files import append, require_writable
from .log import RunLog
from .meter import CudaGauge, Meter, summary
from .regions import announcement
from .snapshot import Snapshots, is_best
from .step import Trainer


class Record:
    """The run folder. All processes call the same methods in the same order; rank 0 writes, which can take long.

    What cannot be written is a warning, unless it is the folders at the beginning or the last checkpoint.

    Args:
        config, dataset, trainer: Of the run.
        choices: Lines on what this start has chosen, as the precision and why, for a line of `starts.jsonl`.
    """

    def __init__(self, config: Config, dataset: ImageDataset, trainer: Trainer, choices: Sequence[str] = ()) -> None:
        self.config, self.trainer, self.run_dir = config, trainer, Path(config.run_dir)
        self.remarks = dataset.remarks()
        self.log: RunLog | None = None
        self.first_step = contextlib.ExitStack()  # says that it takes its time: kernels are compiled, workers started
        self.lines = 0  # of statistics, in this session
        self.metered = contextlib.ExitStack()
        if trainer.world.rank == 0:
            for folder in ("checkpoints", "samples", "tensorboard"):
                require_writable(self.run_dir / folder)
            self.log = RunLog(self.run_dir, config.kimg, trainer.cur_nimg)
            gauge = CudaGauge(trainer.device) if trainer.device.type == "cuda" else None
            self.meter = self.metered.enter_context(Meter(gauge, trainer.world.size))
            with self.log.sparing("config.json"), replacing(self.run_dir / "config.json") as temporary:
                temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
            start = {"cur_nimg": trainer.cur_nimg, "device": str(trainer.device), "choices": list(choices)}
            with self.log.sparing("starts.jsonl"):
                append(self.run_dir / "starts.jsonl", json.dumps(start).encode() + b"\n")
            self.snapshots = Snapshots(config, dataset, trainer.average, self.log)
            if config.metric_images:
                self.snapshots.open_distances()

    def say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)

    def begin(self) -> None:
        """What should be known of the data, and what is there before the first step of a new run."""
        self.trainer.world.watch.excuse()
        if self.log is None:
            return
        for remark in self.remarks:
            self.say(f"warning: {remark}")
        trainer = self.trainer
        line = announcement(self.config, trainer.angles, trainer.cur_nimg, trainer.share, trainer.micro)
        if line is not None:
            self.say(line)
        if self.trainer.cur_nimg == 0:
            with self.log.pause():
                self.say(f"real images:     {self.snapshots.reals()}")
                self.say(f"initial samples: {self.snapshots.grids(0)[0]}")
            if self.config.metric_images:
                self.measure()
        self.first_step.enter_context(waiting("the first step"))

    def advance(self) -> None:
        """Moves the bar."""
        self.first_step.close()
        if self.log is not None:
            self.log.advance(self.trainer.cur_nimg)

    def statistics(self) -> None:
        """Writes one line of statistics."""
        statistics = require_finite(self.trainer, self.run_dir)
        if self.log is not None:
            images, seconds = self.log.since(self.trainer.cur_nimg)
            found = self.meter.read(images, self.config.kimg, seconds)
            self.log.write(self.trainer.cur_nimg, statistics | found)
            self.lines += 1
            if self.lines == 2:  # in the first kernels were compiled
                self.say(f"time: {summary(found)}")
        self.trainer.reset_statistics()

    def grids(self) -> None:
        """Draws the sample grids."""
        self.trainer.world.watch.excuse()
        if self.log is not None:
            with self.log.pause():
                self.snapshots.grids(self.trainer.cur_nimg)
            self.log.flush()

    def save(self, *, must: bool = True) -> Path:
        """Writes a checkpoint and names it; where it `must` not be, a full disk is but a warning.

        Raises:
            DivergenceError: A loss is not finite.
            SaveError: It could not be written.
        """
        require_finite(self.trainer, self.run_dir)
        self.trainer.share_statistics()
        random_states = self.trainer.world.exchange(random_state())
        self.trainer.world.watch.excuse()
        if self.log is not None:
            state, keep = self.trainer.state_dict(), self.config.keep_checkpoints
            with self.log.pause(), waiting("saving the checkpoint"):
                try:
                    save_checkpoint(self.run_dir, self.config, state, keep, random_states)
                except SaveError as error:
                    if must:
                        raise
                    self.say(f"warning: {error}; training goes on")
        return checkpoint_path(self.run_dir, self.trainer.cur_nimg)

    def measure(self) -> None:
        """Measures, and keeps the checkpoint of this moment if it is the best."""
        self.trainer.world.watch.excuse()
        if self.log is not None:
            with self.log.pause():
                for name, value in self.snapshots.measure(self.trainer.cur_nimg).items():
                    self.say(f"{f'{name}:':<16} {value:.1f} ({self.run_dir / 'metrics.json'})")
                if is_best(self.snapshots.entries):
                    with self.log.sparing("best.pt"):
                        keep_best(self.run_dir, self.trainer.cur_nimg)

    def finish(self) -> None:
        """What a finished run leaves."""
        if self.log is not None:
            self.say(f"samples:         {' '.join(map(str, self.snapshots.grids(self.trainer.cur_nimg)))}")
            if self.config.turntable:
                self.say(f"turntable:       {self.snapshots.turntable()}")
            if self.config.metric_images:
                self.measure()
            if self.config.generator.backbone == "triplane":
                run = shlex.quote(str(self.run_dir))
                self.say("what to try next (epigraf --help lists all; . .venv/bin/activate finds it after make demo):")
                self.say(f"  epigraf viewer {run}     # look around the objects in a browser")
                self.say(f"  epigraf mesh {run} --seeds 3 --out object.glb")
                self.say(f"  epigraf render turntable {run} --seeds 0-5 --out turntable.mp4")

    def close(self) -> None:
        self.first_step.close()
        self.metered.close()
        if self.log is not None:
            self.log.close()
