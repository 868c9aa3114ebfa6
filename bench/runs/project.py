"""Whether a generator's own images get back their look: `python -m bench.runs.project RUN --json FILE --plot FILE`.

A seed's object, truncation off, is drawn from a random camera of the prior; its picture of 8 bits is all that is given,
with its camera and without. Then both objects are seen from cameras that the fit has not had: beside the picture's, a
quarter to each side, from behind. Where the camera was estimated, views are as far from that; how far it is from the
true one is beside them. No time is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epigraf_fast.config import to_dict
from epigraf_fast.models.generator import Generator
from epigraf_fast.tools.project import Fit, apart, fit, on_sphere, psnr, random_cameras, views
from epigraf_fast.tools.render import save_picture
from epigraf_fast.training.log import tile, to_uint8
from epigraf_fast.training.pretrained import load_generator
from epigraf_fast.training.sampling import latents_of_seeds

from .. import results

SEEDS = (10_000, 10_001, 10_002, 10_003, 10_004)  # none of those that a search starts from
# Name -> yaw and pitch beside the picture's camera, radians.
HELD_OUT = {
    "left 20 degrees": (-0.35, 0.0),
    "right 20 degrees": (0.35, 0.0),
    "left 40 degrees": (-0.7, 0.0),
    "right 40 degrees": (0.7, 0.0),
    "left 90 degrees": (-math.pi / 2, 0.0),
    "right 90 degrees": (math.pi / 2, 0.0),
    "behind": (math.pi, 0.0),
    "right and below": (0.3, 0.2),
    "left and above": (-0.3, -0.2),
}


def beside(angles: Tensor) -> Tensor:
    """Cameras [1 + V, 3]: this one [3] and the held-out ones."""
    steps = torch.tensor([(0.0, 0.0, 0.0), *((*step, 0.0) for step in HELD_OUT.values())])
    return on_sphere(angles.cpu() + steps)


def measure(
    generator: Generator, seed: int, known: bool, steps: int, size: int
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """A row of the result; and the views [1 + V, 3, size, size] of the true object and of the found one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (pose,) = random_cameras(generator.camera, generator.mean_camera_pose, 1)
    pose = pose.to(generator.mean_camera_pose.device)
    (ws,) = generator.ws(*latents_of_seeds(generator, [seed]))
    truth = torch.stack([*views(generator, Fit(ws, pose, 0.0), beside(pose), size)]).clamp(-1, 1)
    target = to_uint8(truth[:1])[0].float() / 127.5 - 1
    found = fit(generator, target, pose if known else None, steps)
    seen = torch.stack([*views(generator, found, beside(found.angles), size)])
    same, *others = [psnr(image, true) for image, true in zip(seen, truth, strict=True)]
    row = {
        "seed": seed,
        "camera": "given" if known else "estimated",
        "camera_error_degrees": round(math.degrees(apart(found.angles[None].double(), pose[None].double())), 2),
        "psnr": round(same, 2),
        "held_out": {name: round(value, 2) for name, value in zip(HELD_OUT, others, strict=True)},
        "lowest": round(min(others), 2),
    }
    return row, (truth, seen)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.project", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run, a checkpoint, or builtin")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--cameras", nargs="+", choices=("given", "estimated"), default=("given", "estimated"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="a .png: the true views, and the found ones below")
    args = parser.parse_args(argv)
    config, generator = load_generator(args.run, args.device)
    generator.requires_grad_(False)
    settings = {name: value for name, value in to_dict(config).items() if name != "run_dir"}
    settings = {"run": args.run.name, "steps": args.steps, "config": settings}
    rows, shown = [], []
    for seed in args.seeds:
        for camera in args.cameras:
            row, pair = measure(generator, seed, camera == "given", args.steps, config.resolution)
            rows.append(row)
            shown += pair
            place = f"{camera}, {row['camera_error_degrees']} degrees off"
            print(f"seed {seed}, camera {place}: {row['psnr']} dB; held-out views {row['held_out']}", flush=True)
            if args.json:
                results.write(args.json, results.result("project", settings, rows, held_out=HELD_OUT))
            if args.plot:
                save_picture(tile(to_uint8(torch.cat(shown).cpu()), 1 + len(HELD_OUT)), args.plot)
    print(f"lowest of all held-out views: {min(row['lowest'] for row in rows)} dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
