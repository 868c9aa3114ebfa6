"""What denormal numbers cost a CPU: iterations of a run's checkpoints, with them and without, in turn.

`python -m bench.runs.denormals RUN --json FILE`, on a machine that does nothing else. Threads inherit whether they
flush, so that each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from epigraf_fast.data import ImageDataset
from epigraf_fast.training.checkpoint import list_checkpoints, load_checkpoint
from epigraf_fast.training.step import Trainer

from .. import results
from ..timing import Spread

WARM_UP = 3  # iterations that do not count


def seconds(checkpoint: Path, iterations: int) -> float:
    """Median of an iteration on the first images of the data."""
    config, state = load_checkpoint(checkpoint)
    dataset = ImageDataset(config.data, config.resolution, use_labels=config.loader.labels)
    trainer = Trainer(dataclasses.replace(config, device="cpu"), dataset, torch.device("cpu"))
    trainer.load_state_dict(state["trainer"])
    images, labels, angles = (torch.stack(x) for x in zip(*(dataset[i] for i in range(config.batch)), strict=True))
    taken = []
    for _ in range(WARM_UP + iterations):
        begun = time.perf_counter()
        trainer.iteration(images, labels, angles)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[WARM_UP:])


def measure(checkpoint: Path, iterations: int, rounds: int) -> dict[str, Any]:
    """How many times as fast it is to flush them."""
    taken: dict[str, list[float]] = {"flush": [], "keep": []}
    for number in range(rounds):
        for way in ("flush", "keep") if number % 2 else ("keep", "flush"):
            line = [sys.executable, "-m", "bench.runs.denormals", str(checkpoint), "--once", way]
            line += ["--iterations", str(iterations)]
            done = subprocess.run(line, cwd=results.ROOT, check=True, stdout=subprocess.PIPE, text=True)
            taken[way].append(float(done.stdout))
    ratios = [keep / flush for keep, flush in zip(taken["keep"], taken["flush"], strict=True)]
    return {"checkpoint": checkpoint.stem, "times_as_fast": Spread.of(ratios).to_dict()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.denormals", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", choices=["flush", "keep"], default=None, help=argparse.SUPPRESS)
    parser.add_argument("--json", default=None, help="write the results there")
    args = parser.parse_args(argv)
    if args.once:  # of a checkpoint
        torch.set_flush_denormal(args.once == "flush")
        print(seconds(args.run, args.iterations))
        return 0
    checkpoints, rows = list_checkpoints(args.run), []
    if not checkpoints:
        raise SystemExit(f"error: {args.run} has no checkpoints: name a run's folder")
    for checkpoint in checkpoints:
        rows.append(measure(checkpoint, args.iterations, args.rounds))
        print(f"{rows[-1]['checkpoint']}: {rows[-1]['times_as_fast']['median']:.2f} times as fast without denormals")
    if args.json:
        of_run, _ = load_checkpoint(checkpoints[0])
        config = {"data": Path(of_run.data).name, "resolution": of_run.resolution, "batch": of_run.batch}
        config |= {"threads": torch.get_num_threads(), "iterations": args.iterations}
        results.write(args.json, results.result("denormals", config, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
