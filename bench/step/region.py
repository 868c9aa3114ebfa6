"""Planes computed where rays look against whole ones: `python -m bench.step.region --json FILE`.

The G phase and the D phase of one micro-batch at full size on a CPU, with cameras and patches drawn from the schedule
at several times, both ways in turn on the same draws: how many times as fast the first is, and what memory it takes.
Beside it, counted, how many times as many multiplications whole planes take: the gain if nothing else took time.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import math
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from epigraf_fast.config import PRESETS, check, preset
from epigraf_fast.models.region import Plan
from epigraf_fast.training.step import Fakes, Samples, Trainer

from .. import results
from ..timing import Spread
from .step import RandomData

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LOSSES = 1e-3  # relative: what the two ways may differ by, in fp32


def peak_of(function: Callable[[], Any]) -> int | None:
    """Bytes of resident memory that a call takes beyond what is there before it; None where Linux does not say."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")  # the highest so far becomes what is there now
    except OSError:
        function()
        return None

    def read(name: str) -> int:
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    before = read("VmRSS")
    function()
    return read("VmHWM") - before


class Phases:
    """The phases of G and D over one micro-batch, without a step of an optimizer: weights stay as they are."""

    def __init__(self, args: argparse.Namespace, images: int) -> None:
        config = preset(args.preset)
        config = dataclasses.replace(
            config,
            device="cpu",
            resolution=args.resolution or config.resolution,
            batch=images,
            micro_batch=images,
            generator=dataclasses.replace(
                config.generator, plane_resolution=args.planes or config.generator.plane_resolution
            ),
        )
        check(config)
        torch.manual_seed(0)
        self.trainer, self.config = Trainer(config, RandomData(config), torch.device("cpu")), config
        shape = images, 3, config.resolution, config.resolution
        data = RandomData(config)
        angles = data.angles[:images]
        self.reals = Samples(torch.rand(shape) * 2 - 1, data.labels[:images], angles, angles)
        self.now = self.trainer._schedule()
        patch = config.patch.resolution
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            fakes = self.draw(0.0)
            self.trainer._judge(torch.zeros(images, 3, patch, patch), fakes.patch, fakes.label, fakes.angles)
        self.judging = counted.get_total_flops() / 2 / images

    def multiplications(self, phase: str, plan: Plan | None) -> float:
        """Of a phase, for each fake: those of convolutions, of products of pixels or points, and their gradients."""
        generator, renderer = self.trainer.generator, self.config.renderer
        painting = 0
        for resolution in generator.synthesis.resolutions:
            block = getattr(generator.synthesis, f"b{resolution}")
            level = None if plan is None else plan.levels.get(resolution)
            pixels = math.prod(level.size) if level is not None else resolution**2
            for conv in block.convs():
                painting += pixels // conv.up**2 * conv.weight.numel()
            painting += pixels * block.to_planes.weight.numel()
        network = generator.decoder.network()
        points = self.config.patch.resolution**2 * (renderer.coarse_samples + renderer.fine_samples)
        rendering = points * (network.w0.numel() + network.w1.numel())
        if phase == "G":  # a gradient has two products for each, that through D to the images one
            return 3 * (painting + rendering) + 2 * self.judging
        return painting + rendering + 2 * 3 * self.judging  # of fakes and as many reals

    def draw(self, kimg: float) -> Fakes:
        """Of the schedule at a time."""
        trainer = self.trainer
        trainer.cur_nimg = round(kimg * 1000)
        self.now = trainer._schedule()
        return trainer._with_patches(trainer._draw_fakes(self.config.batch))

    def run(self, phase: str, fakes: Fakes) -> float:
        """The phase's loss."""
        trainer = self.trainer
        trainer.discriminator.requires_grad_(phase == "D")
        torch.manual_seed(1)
        if phase == "G":
            optimizer, inputs = trainer.g_optimizer, (trainer._generator_phase, self.now, fakes)
        else:
            optimizer, inputs = trainer.d_optimizer, (trainer._discriminator_phase, self.now, fakes, self.reals)
        _, recorded = trainer._gradients(optimizer, *inputs)
        total, count = recorded[f"loss/{phase}"]
        trainer.g_optimizer.zero_grad(set_to_none=True)
        trainer.d_optimizer.zero_grad(set_to_none=True)
        return total.item() / count


def whole(fakes: Fakes) -> Fakes:
    """The same, of whole planes."""
    return fakes._replace(plans=(None,) * len(fakes.plans))


def measure(phases: Phases, kimg: float, phase: str, rounds: int) -> dict[str, Any]:
    """Both ways in turn, each round on draws of its own; the first round is not counted."""
    times: dict[str, list[float]] = {"part": [], "whole": []}
    peaks: dict[str, list[int]] = {"part": [], "whole": []}
    shares, products = [], {"part": 0.0, "whole": 0.0}
    for number in range(rounds + 1):
        fakes = phases.draw(kimg)
        ways, losses = {"part": fakes, "whole": whole(fakes)}, {}
        # Noise images are drawn where they are computed, and shift all later draws: losses agree without them.
        phases.trainer.generator.synthesis.noise = number > 0
        for name in ("part", "whole") if number % 2 else ("whole", "part"):
            seconds = []

            def call(name: str = name, ways: dict = ways, losses: dict = losses, seconds: list = seconds) -> None:
                begun = time.perf_counter()
                losses[name] = phases.run(phase, ways[name])
                seconds.append(time.perf_counter() - begun)

            peak = peak_of(call)
            if number:
                times[name] += seconds
                peaks[name] += [] if peak is None else [peak]
        if number == 0:
            if abs(losses["part"] - losses["whole"]) > LOSSES * max(abs(losses["whole"]), 1):
                raise RuntimeError(f"{phase} at {kimg:g} kimg: losses differ, {losses}")
        else:
            shares += [plan.share for plan in fakes.plans]
            for name, of_way in ways.items():
                products[name] += sum(phases.multiplications(phase, plan) for plan in of_way.plans)
    ratios = [b / a for a, b in zip(times["part"], times["whole"], strict=True)]
    row: dict[str, Any] = {
        "phase": phase,
        "kimg": kimg,
        "micro_batch": phases.config.micro,
        "times_as_fast": Spread.of(ratios).to_dict(),
        "planes_share": sum(shares) / len(shares),
        "multiplications_ratio": products["whole"] / products["part"],
    }
    if peaks["part"]:
        row["peak_bytes"] = {name: max(values) for name, values in peaks.items()}
        row["peak_ratio"] = row["peak_bytes"]["part"] / row["peak_bytes"]["whole"]
    return row


def format_row(row: dict[str, Any]) -> str:
    speed, peak = row["times_as_fast"], row.get("peak_ratio")
    return (
        f"{row['phase']} phase, micro-batch {row['micro_batch']}, {row['kimg']:>6g} kimg: {speed['median']:.2f}x "
        f"({speed['p20']:.2f} to {speed['p80']:.2f}), by multiplications {row['multiplications_ratio']:.2f}x, "
        f"{row['planes_share']:.2f} of the planes" + ("" if peak is None else f", {peak:.2f} of the memory")
    )


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m bench.step.region", description=__doc__.split(":")[0] + ".")
    out.add_argument("--preset", choices=PRESETS, default="ffhq")
    out.add_argument("--resolution", type=int, default=None, help="of the images; default: the preset's")
    out.add_argument("--planes", type=int, default=None, help="texels along each side; default: the preset's")
    out.add_argument("--micro-batch", type=int, nargs="+", default=[1, 4])
    out.add_argument("--kimg", type=float, nargs="+", default=[0.0, 5000.0, 15000.0])
    out.add_argument("--rounds", type=int, nargs="+", default=[5, 2], help="counted, of each micro-batch")
    out.add_argument("--json", default=None, help="write the results there")
    return out


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if len(args.rounds) not in (1, len(args.micro_batch)) or min(args.rounds) < 1:
        raise SystemExit(f"--rounds must be 1 or {len(args.micro_batch)} positive numbers, got {args.rounds}")
    rounds = args.rounds * len(args.micro_batch) if len(args.rounds) == 1 else args.rounds
    rows = []
    for images, count in zip(args.micro_batch, rounds, strict=True):
        phases = Phases(args, images)
        for kimg in args.kimg:
            for phase in ("G", "D"):
                rows.append(measure(phases, kimg, phase, count))
                print(format_row(rows[-1]), flush=True)
                if args.json:  # after every one: this process may be stopped
                    config = {
                        "preset": args.preset,
                        "resolution": phases.config.resolution,
                        "planes": phases.config.generator.plane_resolution,
                        "patch": phases.config.patch.resolution,
                        "threads": torch.get_num_threads(),
                    }
                    results.write(args.json, results.result("region", config, rows))
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
