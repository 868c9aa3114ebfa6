"""What the compiled kernels of a training step do, counted without a GPU: `python -m bench.counts [--arch 70 80 90]`.

A sample of blocks of every kernel is executed by `bench.ptx` at the shapes of FFHQ-512 (`counts.cases`), and
counted: instructions, sectors, wavefronts, atomics, barriers. From the counts follows the least time at assumed rates
(`counts.rates`). Nothing is timed. `--check` compares with bench/budgets.json; exit status 1 if a kernel got worse.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import results
from ..ptx import Counts, Program
from ..resources import of_csrc
from . import cases as count_cases
from . import rates, tables
from .cases import Case, Launch

RESULTS = results.FOLDER / "counts.json"
BUDGETS = results.ROOT / "bench" / "budgets.json"
ARCHS = (70, 80, 90)
BLOCKS = 8  # of a launch that are executed, at most, where they lie in one row
WHOLE = 64  # blocks of a grid of two dimensions up to which all are

# Of a budget: more of these is worse.
METRICS = {
    "warp_instructions": lambda c: c.warp_instructions,
    "load_sectors": lambda c: c.global_load_sectors,
    "load_distinct_sectors": lambda c: c.global_load_distinct,
    "store_sectors": lambda c: c.global_store_sectors,
    "atomic_sectors": lambda c: c.atomic_sectors,
    "shared_wavefronts": lambda c: c.shared_load_wavefronts + c.shared_store_wavefronts,
    "shared_conflicts": lambda c: c.shared_conflicts,
    "barriers": lambda c: c.barriers,
    "divergent_branches": lambda c: c.divergent_branches,
}
WORSE, BETTER = 0.005, 0.02  # by how much a count may rise; from what fall on the budget is to be lowered
LEAST = 1e-3  # changes below this, of a unit's counts, are none

Row = dict[str, Any]


@dataclasses.dataclass
class Sample:
    """What some blocks of a launch did, and of how many blocks each is an example."""

    launch: Launch
    blocks: list[tuple[int, int]]
    counts: list[Counts]

    @property
    def whole(self) -> Counts:
        """Of the whole launch."""
        total = Counts()
        for (_, times), counts in zip(self.blocks, self.counts, strict=True):
            total += counts.per(1 / times)
        return total

    @property
    def longest(self) -> float:
        """Warp instructions of the block that has most."""
        return max(counts.warp_instructions for counts in self.counts)


def chosen_blocks(grid: tuple[int, int, int], most: int = BLOCKS) -> list[tuple[int, int]]:
    """Blocks of a grid, evenly spread, each with how many it stands for. They are the same for the same grid.

    In a grid of two dimensions rows may have different work, and the first block of a row more than others: of every
    row the first block, and one in the middle for the rest. What z counts is alike: every row is looked at in another
    layer, which stands for all. Small grids are taken whole.
    """
    width, rows, layers = grid
    count = width * rows * layers
    if count <= (most if count == width else WHOLE):
        return [(number, 1) for number in range(count)]
    if rows == 1:
        edges = [i * count // most for i in range(most + 1)]
        return [((first + end) // 2, end - first) for first, end in itertools.pairwise(edges)]
    found = []
    for row in range(rows):
        first = (layers * row // rows * rows + row) * width
        found.append((first, layers))
        if width > 1:
            inner = 1 + (width - 1) * (2 * row + 1) // (2 * rows)  # another column in every row
            found.append((first + inner, (width - 1) * layers))
    return found


def sample(launch: Launch, most: int = BLOCKS) -> Sample:
    """Executes some blocks of a launch, one at a time. The tensors hold what these leave."""
    program = _PROGRAMS.setdefault(launch.entry.text, Program(""))
    program.entries[launch.entry.name] = launch.entry
    blocks = chosen_blocks(launch.grid, most)
    counts = [
        program.launch(
            launch.entry.name,
            grid=launch.grid,
            block=launch.block,
            params=launch.params,
            tensors=launch.tensors,
            shared=launch.shared,
            arch=launch.arch,
            blocks=[number],
            check=False,
        )
        for number, _ in blocks
    ]
    return Sample(launch, blocks, counts)


_PROGRAMS: dict[str, Program] = {}  # by the text of the kernel
_SAMPLES: dict[tuple[Any, ...], tuple[list[tuple[int, int]], list[Counts]]] = {}


def count(case: Case, launches: Callable[..., Any], arch: int, most: int = BLOCKS) -> list[Row]:
    """A row for every launch of a case.

    Args:
        launches: `count_cases.triton_launches` or `csrc_launches`.
    """
    samples: list[Sample] = []

    def run(launch: Launch) -> None:
        # sm_90's code of csrc/ is sm_80's, and is not executed again.
        same = case.name, len(samples), launch.entry.text, launch.grid, most
        if same not in _SAMPLES:
            found = sample(launch, most)
            _SAMPLES[same] = found.blocks, found.counts
        samples.append(Sample(launch, *_SAMPLES[same]))

    with launches(arch, run):
        case.call()
    return [row(case, number, one) for number, one in enumerate(samples)]


def row(case: Case, number: int, one: Sample) -> Row:
    """What a result file says of a launch: counts of a unit, and bounds of the launch."""
    launch, counts = one.launch, one.whole
    gpu = rates.GPUS[launch.arch]
    footprint = sum(x.numel() * x.element_size() for x in launch.tensors.values()) if case.streams else None
    seconds = rates.bounds(counts, gpu, footprint=footprint, longest=one.longest)
    limit = max(seconds, key=seconds.__getitem__)
    per = counts.per(case.units)
    texels = [counts.load_lines[line] for line in _texel_lines(counts)]
    warps = -(-launch.block[0] * launch.block[1] * launch.block[2] // 32)
    return {
        "arch": launch.arch,
        "case": case.name,
        "launch": number,
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "threads": list(launch.block),
        "sampled": len(one.blocks),
        "unit": case.unit,
        "units": case.units,
        "plan": None if case.plan is None else [list(config) for config in case.plan],
        "default": case.default,
        **{name: _rounded(metric(per)) for name, metric in METRICS.items()},
        "store_distinct_sectors": _rounded(per.global_store_distinct),
        "load_requests": _rounded(per.global_load_requests),
        "sectors_per_request": _ratio(counts.global_load_sectors, counts.global_load_requests),
        "texel_sectors_per_request": _ratio(sum(texels[::2]), sum(texels[1::2])),
        "useful_bytes_per_sector": _ratio(counts.global_load_bytes, counts.global_load_sectors),
        "useful_bytes_per_atomic_sector": _ratio(counts.atomic_bytes, counts.atomic_sectors),
        "lanes": _ratio(counts.thread_instructions, 32 * counts.warp_instructions),
        "barriers_of_block": _rounded(counts.barriers / counts.blocks / warps),
        "fp32_instructions": _rounded(rates.fp32_instructions(per.opcodes)),
        "tensor_flops": {kind: _rounded(n) for kind, n in rates.tensor_flops(per.opcodes).items()},
        "us": {name: _rounded(1e6 * value) for name, value in seconds.items() if value},
        "bound": limit,
        "bound_us": _rounded(1e6 * seconds[limit]),
        "floor_us": _rounded(1e6 * rates.floor(case.work, gpu, case.precision)),  # of all launches of the case
    }


def _texel_lines(counts: Counts) -> Iterator[tuple[str, str]]:
    """Keys of texels' sectors and requests, in turn."""
    from epigraf_fast.kernels.planes import gather_features

    lines, first = inspect.getsourcelines(gather_features.fn)
    named = {f"planes.py:{first + i}" for i in range(len(lines))}
    for line in sorted({line for line, _ in counts.load_lines if line.rpartition("/")[2] in named}):
        yield line, "sectors"
        yield line, "requests"


def _ratio(a: float, b: float) -> float | None:
    return _rounded(a / b) if b else None


def _rounded(x: float) -> float:
    """To six digits."""
    return float(f"{x:.6g}")


def rows(archs: Iterable[int], part: str = "", most: int = BLOCKS) -> Iterator[Row]:
    """Counts everything whose case or kernel has `part` in its name.

    Raises:
        RuntimeError: csrc's kernels cannot be compiled here.
    """
    for arch in archs:
        for launches, cases in (
            (count_cases.triton_launches, count_cases.triton_cases(arch)),
            (count_cases.csrc_launches, count_cases.csrc_cases()),
        ):
            for case in cases:
                if part in case.name:
                    yield from count(case, launches, arch, most)


def names(arch: int) -> list[str]:
    """Of all cases that are counted."""
    return [case.name for case in (*count_cases.triton_cases(arch), *count_cases.csrc_cases())]


def versions() -> dict[str, str]:
    """Of what decides the counts."""
    import triton

    nvcc = of_csrc.find_nvcc()
    found = {"torch": torch.__version__, "triton": triton.__version__}
    if nvcc is not None:
        found["nvcc"] = of_csrc._run(nvcc, "--version").rpartition("release ")[2].partition(",")[0]
    return found


# ---- budgets


def key(row: Row) -> str:
    return f"sm_{row['arch']} {row['case']}, {row['kernel'].partition('<')[0]} {row['launch']}"


def budgets_of(found: Iterable[Row]) -> dict[str, dict[str, float]]:
    """What a budget holds of rows: all that is not 0."""
    return {key(row): {name: row[name] for name in METRICS if row[name]} for row in found}


def compare(found: Iterable[Row], budgets: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """Where rows are worse than their budgets, or have none; and where they are so much better that it should fall."""
    worse, better = [], []
    for row in found:
        name = key(row)
        if name not in budgets:
            worse.append(f"{name}: has no budget: python -m bench.counts --write-budgets")
            continue
        for metric in METRICS:
            now, allowed = row[metric], budgets[name].get(metric, 0.0)
            if now > allowed * (1 + WORSE) + LEAST:
                worse.append(f"{name}: {metric} {now:g} a {row['unit']}, the budget is {allowed:g}")
            elif now < allowed * (1 - BETTER) - LEAST:
                better.append(f"{name}: {metric} {now:g} a {row['unit']}, lower the budget of {allowed:g}")
    return worse, better


def read_budgets() -> dict[str, Any]:
    return json.loads(BUDGETS.read_text())


def write_budgets(found: list[Row]) -> None:
    """Today's counts become the budgets of the cases that were counted; of others stay those that are cases still."""
    before = read_budgets()["budgets"] if BUDGETS.exists() else {}
    counted = tuple({f"sm_{row['arch']} {row['case']}, " for row in found})
    still = tuple(f"sm_{arch} {name}, " for arch in ARCHS for name in names(arch))
    others = {name: budget for name, budget in before.items() if name.startswith(still) > name.startswith(counted)}
    kept = sorted((others | budgets_of(found)).items())
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(budget)}" for name, budget in kept)
    what = "counts of a unit (point, ray, element), by python -m bench.counts --write-budgets"
    head = f' "what": {json.dumps(what)},\n "versions": {json.dumps(versions())},\n "budgets": {{'
    BUDGETS.write_text(f"{{\n{head}\n{lines}\n }}\n}}\n")


def merged(before: list[Row], found: list[Row]) -> list[Row]:
    """Rows of a result file, with the rows of cases that were counted again at the places of their old ones.

    Without those that are no cases any more.
    """
    by_case: dict[tuple[int, str], list[Row]] = {}
    for row in found:
        by_case.setdefault((row["arch"], row["case"]), []).append(row)
    rows, still = [], {arch: names(arch) for arch in ARCHS}
    for (arch, case), group in itertools.groupby(before, key=lambda row: (row["arch"], row["case"])):
        rows += by_case.pop((arch, case), group if case in still[arch] else ())
    return rows + [row for group in by_case.values() for row in group]


# ---- command


def format_rows(found: list[Row]) -> str:
    names = ("warp instr", "load sect", "/request", "B/sector", "atomic s", "wavefr", "conflicts", "barriers", "diverg")
    lines = [f"{'counted, not timed':<86} {' '.join(f'{name:>10}' for name in names)}  least us, by; floor"]
    for row in found:
        values = [row[name] for name in ("warp_instructions", "load_sectors", "sectors_per_request")]
        values += [row[name] for name in ("useful_bytes_per_sector", "atomic_sectors", "shared_wavefronts")]
        values += [row[name] for name in ("shared_conflicts", "barriers", "divergent_branches")]
        numbers = " ".join(f"{'-' if value is None else f'{value:.4g}':>10}" for value in values)
        end = f"{row['bound_us']:.4g}, {row['bound']}; {row['floor_us']:.4g}"
        lines.append(f"{key(row)[:76]:<76} a {row['unit']:<7} {numbers}  {end}")
    return "\n".join(lines)


def format_rates() -> str:
    lines = ["Rates that are assumed:"]
    for one in rates.table():
        flops = ", ".join(f"{kind} {value / 1e12:g} TFLOP/s" for kind, value in one["tensor_flops"].items())
        lines.append(
            f"  sm_{one['arch']} {one['name']}: {one['multiprocessors']} SMs at {one['ghz']} GHz; a cycle and SM "
            f"{one['warp_instructions_per_cycle_and_sm']} warp instructions, {one['fp32_lanes']} fp32 lanes, "
            f"{one['shared_wavefronts_per_cycle_and_sm']} shared wavefront, {one['l1_sectors_per_cycle_and_sm']} L1 "
            f"sectors; a cycle {one['l2_sectors']} L2 sectors, {one['atomic_sectors']} atomic sectors; DRAM "
            f"{one['dram_gb']:g} GB/s; tensor cores {flops}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--kernel", default="", metavar="PART", help="only cases that have this in their names")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"blocks of a launch to execute (default {BLOCKS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a result file; of a part, into the one there")
    parser.add_argument("--check", action="store_true", help="compare with bench/budgets.json")
    parser.add_argument("--write-budgets", action="store_true", help="make these counts the budgets")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/kernels.md from the file")
    args = parser.parse_args(argv)
    if args.page:
        path = args.json or RESULTS
        tables.write_page({**json.loads(path.read_text()), "file": path.name})
        return 0
    if os.environ.pop("TRITON_INTERPRET", None):
        print("bench.counts: TRITON_INTERPRET is ignored, kernels are compiled", file=sys.stderr)
    if args.blocks != BLOCKS and (args.check or args.write_budgets):
        parser.error(f"budgets are of {BLOCKS} blocks: leave --blocks out")
    print(format_rates())
    found = []
    for one in rows(args.arch, args.kernel, args.blocks):
        print(format_rows([one]) if not found else format_rows([one]).partition("\n")[2], flush=True)
        found.append(one)
    if args.json:
        config = {
            "command": shlex.join(["python", "-m", "bench.counts", *(sys.argv[1:] if argv is None else argv)]),
            "label": "counted, not timed",
            "batch": count_cases.BATCH,
            "size": dataclasses.asdict(count_cases.SIZE),
            "blocks": args.blocks,
            "versions": versions(),
        }
        rows_of_file = found
        if args.json.exists() and (args.kernel or set(args.arch) != set(ARCHS)):
            before = json.loads(args.json.read_text())
            rows_of_file, config["command"] = merged(before["cases"], found), before["config"]["command"]
        results.write(args.json, results.result("counts", config, rows_of_file, rates=rates.table()))
    if args.write_budgets:
        write_budgets(found)
    if not args.check:
        return 0
    known = read_budgets()
    if known["versions"] != versions():
        print(f"bench.counts: the budgets are of {known['versions']}, this is {versions()}: differences may be theirs")
    worse, better = compare(found, known["budgets"])
    print("\n".join([*(f"worse: {line}" for line in worse), *(f"better: {line}" for line in better)]))
    print(f"bench.counts: {len(found)} launches, {len(worse)} worse, {len(better)} better")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
