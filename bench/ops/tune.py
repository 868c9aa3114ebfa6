"""The fastest configurations of the tri-plane decoder on this GPU: `python -m bench.ops.tune [--json FILE]`.

What training does before its first step (`training.warmup`), for a preset and in every precision, with the time of each
plan. The file is a run's kernels.json. Without a GPU nothing is timed or chosen: the plans are listed in the order of
the least time that their counts need, see `bench.counts`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from epigraf_fast.config import PRESETS, Config, preset
from epigraf_fast.ops import tuning
from epigraf_fast.training.warmup import micro_batch

from ..counts import counts

PRECISIONS = ("fp32", "tf32", "fp16")


def tune(
    config: Config, images: int, device: torch.device, timer: Callable[[Callable[[], Any]], float]
) -> list[dict[str, Any]]:
    """Times all plans; the decoder takes the fastest from then on.

    Returns:
        A row a plan: precision, kernel, plan, ms, and whether it was chosen.
    """
    rays, network = micro_batch(config, images, device)
    rows = []
    for precision in PRECISIONS:
        found = tuning.tune_decode_triplane(
            *rays, network, config.camera.cube_scale, precision=precision, deterministic=False, timer=timer
        )
        rows += [{"precision": precision, **row} for row in found]
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    lines = ["precision  kernel        ms        points x warps of each launch"]
    for row in rows:
        plan = " + ".join(f"{block_n}x{warps}" for block_n, warps, *_ in row["plan"])
        end = f"{plan} *" if row["chosen"] else plan
        lines.append(f"{row['precision']:<10} {row['kernel']:<12} {row['ms']:>9.3f}  {end}")
    return "\n".join(lines)


def counted(result: dict[str, Any], archs: tuple[int, ...] = counts.ARCHS) -> list[dict[str, Any]]:
    """The decoder's plans by rising least time of all launches of a call, as a result of `bench.counts` has it.

    Returns:
        A row a plan: arch, precision, kernel, plan, least_us, what needs most of it, and whether it is the default.
    """
    plans: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["cases"]:
        words = row["case"].split()
        if (
            row["arch"] in archs
            and words[0] == "decode"
            and row["case"].endswith(f"scale {counts.count_cases.SCALE:g}")
        ):
            key = row["arch"], words[2], f"decode_{words[1]}", row["case"]
            plans.setdefault(key, []).append(row)
    found = []
    for (arch, precision, kernel, _), launches in plans.items():
        longest = max(launches, key=lambda row: row["bound_us"])
        found.append(
            {
                "arch": arch,
                "precision": precision,
                "kernel": kernel,
                "plan": longest["plan"],
                "least_us": sum(row["bound_us"] for row in launches),
                "bound": longest["bound"],
                "default": longest["default"],
            }
        )
    groups = {(row["arch"], row["precision"], row["kernel"]): i for i, row in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda row: (groups[row["arch"], row["precision"], row["kernel"]], row["least_us"]))


def format_counted(rows: list[dict[str, Any]]) -> str:
    lines = ["arch   precision  kernel      least us  by               points x warps @ most registers"]
    for row in rows:
        plan = " + ".join(f"{block_n}x{warps}{f'@{most}' if most else ''}" for block_n, warps, _, most in row["plan"])
        end = f"{plan} (default)" if row["default"] else plan
        start = f"sm_{row['arch']:<4}{row['precision']:<10} {row['kernel']:<11}{row['least_us']:>9.0f}"
        lines.append(f"{start}  {row['bound']:<16} {end}")
    return "\n".join(lines)


def without_gpu(path: Path) -> str:
    """What is said where nothing can be timed: the counted order, if it is there."""
    said = "bench.ops.tune: there is no GPU to time anything on; the default plans stay"
    if not path.is_file():
        return f"{said} (python -m bench.counts --json {path} counts them)"
    result = json.loads(path.read_text())
    return (
        f"{said}. Their order by counts, counted and not timed, at the shapes of ffhq at 512^2 "
        f"({result['config']['command']}, commit {result['environment']['commit']}):\n{format_counted(counted(result))}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.tune", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--preset", choices=PRESETS, default="ffhq", help="whose shapes (default: ffhq)")
    parser.add_argument("--batch", type=int, help="images of a micro-batch (default: the preset's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the choices and the times")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(without_gpu(counts.RESULTS))
        return 0
    config = dataclasses.replace(preset(args.preset), data="builtin")
    device = torch.device("cuda")
    rows = tune(config, args.batch or config.micro, device, tuning.milliseconds)
    print(format_rows(rows))
    if args.json:
        choices = {"device": torch.cuda.get_device_name(device), "choices": tuning.export_choices(), "times": rows}
        args.json.write_text(json.dumps(choices, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
