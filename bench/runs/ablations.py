"""The discriminators of the paper's Table 2, patch sizes and reused fakes, in small: `python -m bench.runs.ablations`.

Each variant is a run of the demo preset on the built-in set, with patches of 16 and fakes of D's own, by one flag, with
equal images and the same seeds. Runs go one after the other; one that was interrupted goes on, one that is done is not
repeated. After each, the result file and the table of docs/ablations.md are written anew. What follows `--` goes to
every run, as `-- --kimg 4`; results are of one such line only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from epigraf_fast.training.log import read_stats

from .. import results
from ..results import Result

RESULT = results.FOLDER / "ablations.json"
PAGE = results.ROOT / "docs" / "ablations.md"
BEGIN, END = "<!-- ablations:begin, written by python -m bench.runs.ablations -->", "<!-- ablations:end -->"
PENDING = "No runs yet: `python -m bench.runs.ablations` makes them and writes the table here."

# What the first variant has otherwise than the preset.
BASE = [
    *("--patch.resolution", "16", "--patch.anneal-kimg", "60", "--renderer.coarse-samples", "20"),
    *("--generator.z-dim", "128", "--discriminator.camera-conditioning"),
    *("--renderer.stochastic", "--optim.no-reuse-fakes"),
    *("--optim.g-lr", "0.002", "--optim.d-lr", "0.004"),
    *("--optim.lr-decay-kimg", "4", "--optim.lr-rampdown", "0"),
]
# Name -> the flag, and what D sees.
VARIANTS: dict[str, tuple[list[str], str]] = {
    "modulated": ([], "patches of 16, their scale and place, by modulation"),
    "standard": (["--discriminator.modulate", "none"], "patches of 16 alone"),
    "2 scales": (["--discriminator.scales", "2"], "patches of 16; one D for each of 2 scales"),
    "4 scales": (["--discriminator.scales", "4"], "patches of 16; one D for each of 4 scales"),
    "without position": (["--discriminator.no-patch-position"], "patches of 16, their scale, by modulation"),
    "patch 32": (["--patch.resolution", "32"], "patches of 32, their scale and place, by modulation"),
    "whole images": (["--patch.resolution", "64"], "images of 64"),
    "reused fakes": (["--optim.reuse-fakes"], "as the first, its fakes those of G's step"),
}


def command(name: str, seed: int, run_dir: Path, more: Sequence[str]) -> list[str]:
    """The run of a variant, which goes on where it was interrupted."""
    line = ["--run-dir", str(run_dir), "--resume", "auto", "--seed", str(seed), "--turntable", "0"]
    return [sys.executable, "train.py", "demo", *line, *BASE, *VARIANTS[name][0], *more]


def train(line: Sequence[str]) -> tuple[int, float]:
    """The exit code of a run, and the most memory that its process held, GiB."""
    process = subprocess.Popen(line, cwd=results.ROOT)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the run has heard it too, and saves
        os.wait4(process.pid, 0)
        raise
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 2**20


def measured(name: str, seed: int, run_dir: Path, memory_gib: float, shared: bool = False) -> Result:
    """What a finished run's files say; no speed if the machine did something else beside it."""
    entries = json.loads((run_dir / "metrics.json").read_text())
    stats = read_stats(run_dir / "stats.jsonl")
    return {
        "variant": name,
        "seed": seed,
        "images": entries[-1]["cur_nimg"],
        "fd_efficientnet": entries[-1]["fd_efficientnet"],
        "img_per_sec": None if shared else statistics.median(line["img_per_sec"] for line in stats),
        "memory_gib": max([memory_gib, *(line["gpu/memory_gib"] for line in stats if "gpu/memory_gib" in line)]),
    }


def table(cases: Sequence[Result]) -> list[str]:
    """A row a variant: medians over its seeds, of distances the range too."""
    lines = ["| variant | what D sees | seeds | `fd_efficientnet` | images a second | memory, GiB |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, (_, what) in VARIANTS.items():
        mine = [case for case in cases if case["variant"] == name]
        if not mine:
            lines.append(f"| {name} | {what} | pending |  |  |  |")
            continue
        distances = [case["fd_efficientnet"] for case in mine]
        spread = f" ({min(distances):.1f} to {max(distances):.1f})" if len(mine) > 1 else ""
        memory = statistics.median(case["memory_gib"] for case in mine)
        speeds = [case["img_per_sec"] for case in mine if case["img_per_sec"]]
        speed = f"{statistics.median(speeds):.1f}" if speeds else "-"
        distance = f"{statistics.median(distances):.1f}{spread}"
        lines.append(f"| {name} | {what} | {len(mine)} | {distance} | {speed} | {memory:.2f} |")
    return lines


def page(content: Result | None) -> str:
    """What stands between the markers."""
    if content is None:
        return PENDING
    said, machine = content["config"]["command"], content["environment"]
    return "\n".join(
        [
            f"By `{said}` on {machine['device']}, commit {machine['commit']}, {content['date']}:",
            "",
            *table(content["cases"]),
        ]
    )


def write_page(path: Path, content: Result | None) -> None:
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{page(content)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    words, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m bench.runs.ablations", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="NAME", help="default: all"
    )
    parser.add_argument("--shared", action="store_true", help="other work runs beside it: no speed is kept")
    parser.add_argument("--runs", type=Path, default=results.ROOT / "runs" / "ablations", help="folder of the runs")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(words)
    said = " ".join(["python -m bench.runs.ablations", *(["--", *more] if more else [])])
    cases: list[Result] = []
    if args.json.is_file():
        known = json.loads(args.json.read_text())
        if known["config"]["command"] != said:
            print(f"bench.runs.ablations: {args.json} is of `{known['config']['command']}`: name another --json")
            return 2
        cases = known["cases"]
    for seed in args.seeds:
        for name in args.variants:
            if any((case["variant"], case["seed"]) == (name, seed) for case in cases):
                continue
            run_dir = args.runs / f"{name.replace(' ', '-')}-{seed}"
            code, memory = train(command(name, seed, run_dir, more))
            if code:
                print(f"bench.runs.ablations: {name}, seed {seed}, ended with {code}; the same command goes on there")
                return code if code > 0 else 128 - code
            cases.append(measured(name, seed, run_dir, memory, args.shared))
            content = results.result("ablations", {"command": said}, cases)
            results.write(args.json, content)
            write_page(args.page, content)
    print("\n".join(table(cases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
