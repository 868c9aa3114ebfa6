"""What `bench.counts` found, as tables and a picture: a short one for the README, long ones for docs/kernels.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- counts:begin, written by python -m bench.counts --page -->", "<!-- counts:end -->"

# The short table: how a kernel is called, and its case.
SHORT = {
    "decoder, forward": "decode fwd fp32",
    "decoder, backward": "decode bwd fp32",
    "depths": "stratified",
    "importance sampling": "importance",
    "compositing, forward": "composite fwd",
    "compositing, backward": "composite bwd",
    "blur and epilogue 64x512x512, forward": "G 512 conv0 epilogue fp32 fwd",
    "blur and epilogue 64x512x512, backward": "G 512 conv0 epilogue fp32 bwd",
    "epilogue 64x512x512, forward": "G 512 conv1 epilogue fp32 fwd",
    "epilogue 64x512x512, backward": "G 512 conv1 epilogue fp32 bwd",
    "planes up 2 and add, forward": "G 512 planes up 2 and add fwd",
    "planes up 2 and add, backward": "G 512 planes up 2 and add bwd",
    "modulation 512x512, forward": "G 64 modulation 512x512x3x3 fwd",
    "modulation 512x512, backward": "G 64 modulation 512x512x3x3 bwd",
}
SHOWN_SCALE = "scale 0.35"
# How often a training step of the generator has each launch of the renderer; the decoder's backward is of both passes.
RENDERER = {
    "stratified": 1,
    "decode fwd": 2,
    "importance": 1,
    "composite fwd": 1,
    "composite bwd": 1,
    "decode bwd": 1,
}
LABEL = "counted, not timed"

Row = dict[str, Any]
Result = dict[str, Any]


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    whole = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in whole)


def called(rows: list[Row], arch: int, case: str) -> list[Row]:
    """The launches of a case with the default plan, at the scale that is shown."""
    found = [row for row in rows if row["arch"] == arch and row["default"]]
    return [row for row in found if row["case"] == case or _is_plan_of(row["case"], case)]


def _is_plan_of(name: str, case: str) -> bool:
    return name.startswith(f"{case} ") and name.endswith(SHOWN_SCALE)


def total(rows: list[Row], name: str) -> float:
    return sum(row[name] or 0 for row in rows)


def _ratio(rows: list[Row], above: str, below: str) -> float:
    count = total(rows, below)
    return total(rows, above) / count if count else 0.0


def number(x: float) -> str:
    """Three digits."""
    if x == 0:
        return "0"
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


COLUMNS: dict[str, Callable[[list[Row]], float]] = {
    "warp instructions": lambda rows: total(rows, "warp_instructions"),
    "sectors a load": lambda rows: _ratio(rows, "load_sectors", "load_requests"),
    "atomic sectors": lambda rows: total(rows, "atomic_sectors"),
    "shared wavefronts": lambda rows: total(rows, "shared_wavefronts"),
}


def gpus(result: Result) -> dict[int, str]:
    """The GPUs that are in a result, by architecture."""
    archs = {row["arch"] for row in result["cases"]}
    return {rate["arch"]: rate["name"] for rate in result["rates"] if rate["arch"] in archs}


def source(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["config"]["versions"].items())
    return f"{versions}, commit {result['environment']['commit']}, {result['date']}"


def short(result: Result) -> str:
    """For the README: counts of the three architectures beside each other, the least time and the floor."""
    names, batch = gpus(result), result["config"]["batch"]
    both = " / ".join(names.values())
    header = ["kernel", "of a", *COLUMNS, f"least us an image, {both}", "by", "floor"]
    lines = []
    for label, case in SHORT.items():
        found = {arch: called(result["cases"], arch, case) for arch in names}
        if not all(found.values()):
            continue
        cells = [" / ".join(number(of(rows)) for rows in found.values()) for of in COLUMNS.values()]
        least = " / ".join(number(total(rows, "bound_us") / batch) for rows in found.values())
        floor = " / ".join(number(rows[0]["floor_us"] / batch) for rows in found.values())
        limits = " / ".join(
            dict.fromkeys(max(rows, key=lambda row: row["bound_us"])["bound"] for rows in found.values())
        )
        lines.append([label, next(iter(found.values()))[0]["unit"], *cells, least, limits, floor])
    file = f"[{result['file']}](bench/results/{result['file']})"
    parts = [
        f"What the compiled kernels do, **{LABEL}**: their PTX for sm_70, sm_80 and sm_90, executed on a CPU at the "
        f"shapes of a micro-batch of {batch} of `ffhq` at 512^2, fp32, default plans, for each point, ray or element "
        f"({source(result)}: {file}). *Least* is what the counts need at assumed rates of a {both}, and *floor* what "
        f"the operation needs at the same rates if no two points share a texel ([docs/kernels.md](docs/kernels.md) "
        f"has the rates, all counts, and what they cannot say):",
        table(header, lines),
        f"![Least time of kernels, {LABEL}](bench/results/plots/{Path(result['file']).stem}.png)",
    ]
    sums = renderer(result)
    if sums:
        said = "; ".join(f"{name} {least:.2f} ms, floor {floor:.2f}" for name, (least, floor) in sums.items())
        parts.append(f"The renderer of a training image, forward and backward, needs at least ({LABEL}): {said}.")
    return "\n\n".join(parts)


def renderer(result: Result) -> dict[str, tuple[float, float]]:
    """GPU -> least milliseconds of an image's renderer at fp32, and its floor."""
    found = {}
    for arch, name in gpus(result).items():
        least = floor = 0.0
        for case, times in RENDERER.items():
            rows = called(result["cases"], arch, f"{case} fp32" if case.startswith("decode") else case)
            if not rows:
                return {}
            least += times * total(rows, "bound_us") / result["config"]["batch"] / 1000
            floor += times * rows[0]["floor_us"] / result["config"]["batch"] / 1000
        found[name] = least, floor
    return found


def _warps(row: Row) -> int:
    """Of a block."""
    return -(-math.prod(row["threads"]) // 32)


LONG: dict[str, Callable[[Row], Any]] = {
    "warp instr.": lambda row: row["warp_instructions"],
    "loads of a warp": lambda row: row["load_requests"] * row["units"] / (math.prod(row["grid"]) * _warps(row)),
    "load sectors": lambda row: row["load_sectors"],
    "a request": lambda row: row["sectors_per_request"],
    "texels', a request": lambda row: row["texel_sectors_per_request"],
    "bytes of use a sector": lambda row: row["useful_bytes_per_sector"],
    "store sectors": lambda row: row["store_sectors"],
    "atomic sectors": lambda row: row["atomic_sectors"],
    "shared wavefronts": lambda row: row["shared_wavefronts"],
    "of conflicts": lambda row: row["shared_conflicts"],
    "barriers of a block": lambda row: row["barriers_of_block"],
    "diverging branches": lambda row: row["divergent_branches"],
    "lanes": lambda row: row["lanes"],
}


def long(result: Result) -> str:
    """For docs/kernels.md: the rates, then every launch with its counts and bounds."""
    parts = [f"Counted by `{result['config']['command']}` ({source(result)}).", rates(result)]
    for arch, name in gpus(result).items():
        rows = [row for row in result["cases"] if row["arch"] == arch]
        shown = [row for row in rows if row["default"] and (SHOWN_SCALE in row["case"] or "scale" not in row["case"])]
        parts += [f"### sm_{arch}, {name}", _launches(shown)]
        plans = [row for row in rows if SHOWN_SCALE in row["case"]]
        parts += [f"Plans of sm_{arch}, all launches of a call:", _plans(plans)]
    return "\n\n".join(parts)


def rates(result: Result) -> str:
    header = ["GPU", "SMs", "GHz", "fp32 lanes of an SM", "L2 sectors a cycle", "atomic sectors a cycle", "DRAM GB/s"]
    header += ["tensor cores, TFLOP/s"]
    lines = []
    for one in result["rates"]:
        flops = ", ".join(f"{kind} {value / 1e12:g}" for kind, value in one["tensor_flops"].items())
        cells = [one[name] for name in ("multiprocessors", "ghz", "fp32_lanes", "l2_sectors", "atomic_sectors")]
        lines.append([f"{one['name']} (sm_{one['arch']})", *map(str, cells), f"{one['dram_gb']:g}", flops])
    of_sm = [result["rates"][0][f"{name}_per_cycle_and_sm"] for name in _OF_SM]
    said = ", ".join(f"{count} {name.replace('_', ' ')}" for count, name in zip(of_sm, _OF_SM, strict=True))
    return f"{table(header, lines)}\n\nOf every SM in a cycle: {said}."


_OF_SM = ("warp_instructions", "shared_wavefronts", "l1_sectors")


def _launches(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        counts = ["-" if of(row) is None else number(of(row)) for of in LONG.values()]
        kernel = f"`{row['kernel'].partition('<')[0].removesuffix('_kernel')}`"
        limits = sorted(row["us"].items(), key=lambda item: -item[1])[:2]
        least = ", ".join(f"{name} {number(value)}" for name, value in limits)
        lines.append([row["case"], kernel, row["unit"], *counts, least])
    return table(["case", "kernel", "of a", *LONG, "least us of a launch, by"], lines)


def _plans(rows: list[Row]) -> str:
    """Cases beside each other whose plans differ, the least time first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    kinds: dict[str, list[tuple[str, list[Row]]]] = {}
    for case, of_case in found.items():
        kinds.setdefault(" ".join(case.split()[:3]), []).append((case, of_case))
    lines = []
    for kind, plans in kinds.items():
        for case, of_case in sorted(plans, key=lambda item: total(item[1], "bound_us")):
            sums = [number(of(of_case)) for of in COLUMNS.values()]
            plan = case.split()[3] + " (default)" * of_case[0]["default"]
            lines.append([kind, plan, *sums, number(total(of_case, "bound_us")), number(of_case[0]["floor_us"])])
    return table(["case", "points x warps @ most registers", *COLUMNS, "least us", "floor us"], lines)


def plot(plt: Any, result: Result) -> None:
    """Least time over the floor, for the kernels of the short table; the marks name what needs it."""
    names = gpus(result)
    cases = [label for label, case in SHORT.items() if all(called(result["cases"], arch, case) for arch in names)]
    figure, axes = plt.subplots(1, len(names), figsize=(4 + 3 * len(names), 0.36 * len(cases) + 1.6), sharey=True)
    for axis, (arch, name) in zip([axes] if len(names) == 1 else axes, names.items(), strict=True):
        for place, label in enumerate(cases):
            rows = called(result["cases"], arch, SHORT[label])
            least = total(rows, "bound_us") / result["config"]["batch"]
            floor = rows[0]["floor_us"] / result["config"]["batch"]
            axis.barh(place, least, color="tab:blue", height=0.7, label="least, by counts" if place == 0 else None)
            axis.barh(place, floor, color="tab:orange", height=0.3, label="floor" if place == 0 else None)
            limit = max(rows, key=lambda row: row["bound_us"])["bound"]
            axis.text(least * 1.15, place, limit, va="center", fontsize=7)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 20)  # room for the names
        axis.set_title(f"{name} (sm_{arch})", fontsize=10)
        axis.set_xlabel("us an image", fontsize=8)
        axis.tick_params(labelsize=8)
    first = axes if len(names) == 1 else axes[0]
    first.set_yticks(range(len(cases)), cases)
    first.invert_yaxis()
    first.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"Least time of kernels at assumed rates: {LABEL}", fontsize=11)


def write_page(result: Result) -> None:
    """Puts the long tables into docs/kernels.md."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{long(result)}\n{END}{rest.split(END)[1]}")
