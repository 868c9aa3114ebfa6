"""Trains the demo preset by calling train.py's own functions, for machines without its optional packages.

`python -m bench.runs.demo --run-dir DIR --json FILE`. SIGTERM saves and leaves, as in train.py. What needs a
package that is missing (TensorBoard, the turntable, the metric) is left out and said.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

from epigraf_fast import config as settings
from epigraf_fast.data import ImageDataset
from epigraf_fast.tools.doctor import EXTRAS
from epigraf_fast.training import log
from epigraf_fast.training.distributed import World
from epigraf_fast.training.log import read_stats
from epigraf_fast.training.precision import MODES

from .. import results
from ..step.step import opt_in_backend


def missing(*packages: str) -> list[str]:
    """Those that cannot be imported; names as pip has them."""
    return [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]


class NoBoard:
    """Stands in for the file of events, for which TensorBoard's package is missing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--kimg", type=float, default=None, help="default: the preset's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--precision", choices=tuple(MODES), default="fp32")
    parser.add_argument("--backend", default=None, help="of the ops; default: the fastest there is")
    parser.add_argument("--json", default=None, help="write speed and losses there")
    args = parser.parse_args(argv)
    from epigraf_fast.tools import train

    config = dataclasses.replace(
        settings.preset("demo"), run_dir=args.run_dir, device=args.device, precision=args.precision
    )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend = args.backend or opt_in_backend(device)
    if backend:
        config = dataclasses.replace(config, backend=backend)
    if args.kimg:
        short = min(config.log_kimg, args.kimg / 2)
        config = dataclasses.replace(config, kimg=args.kimg, log_kimg=short, grid=(2, 1), turntable=0)
    lacking = {}
    if missing("tensorboard"):
        log.Board = NoBoard
        lacking["TensorBoard"] = ["tensorboard"]
    if missing("imageio"):
        config = dataclasses.replace(config, turntable=0)
        lacking["turntable"] = ["imageio"]
    if args.kimg or missing(*EXTRAS["metrics"]):
        config = dataclasses.replace(config, metric_images=0)
        lacking["fd_efficientnet"] = missing(*EXTRAS["metrics"]) or ["left out of a short run"]
    for what, packages in lacking.items():
        print(f"without {what}: {', '.join(packages)}")

    settings.check(config)
    device = train.pick_device(config, World())
    dataset = ImageDataset(config.data, config.resolution, use_labels=config.loader.labels, mirror=config.loader.mirror)
    config = settings.with_data_camera(config, dataset.camera)
    begun = time.perf_counter()
    code = train.train(config, dataset, device, None, World())
    stats = read_stats(Path(args.run_dir) / "stats.jsonl")
    case = {"exit": code, "seconds": time.perf_counter() - begun, "last": stats[-1] if stats else None}
    if device.type == "cpu" and case["last"]:  # speed on a CPU is no result
        case = {"exit": code, "last": {k: v for k, v in case["last"].items() if k not in SPEEDS}}
    if args.json:
        results.write(args.json, results.result("demo", settings.to_dict(config), [case], without=lacking))
    return 0 if code in (0, 128 + 15) else code


SPEEDS = ("seconds", "sec_per_kimg", "img_per_sec")


if __name__ == "__main__":
    sys.exit(main())
