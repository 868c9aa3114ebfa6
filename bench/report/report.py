"""The tables of docs/benchmarks.md and of the README, and plots, from the files in bench/results.

`python -m bench.report` writes what is between their markers; every number comes from a result file. `--check` writes
nothing, and exits with 1 where a page differs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import results
from ..counts import tables
from ..results import Result
from . import brief

README, PAGE = results.ROOT / "README.md", results.ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin, written by python -m bench.report -->", "<!-- bench:end -->"
PENDING = (
    "**GPU results are pending:** no GPU has run these benchmarks yet. `bench/gpu_day.sh` measures everything on one, "
    "and `python -m bench.report` writes its tables here. What follows, if anything, was measured without a GPU."
)
BASELINES = ("published", "compile", "reference")
MODES = {"fwd": "forward", "bwd": "backward", "step": "forward + backward", "double": "second derivative"}
SHOWN_BATCH, SHOWN_SCALE = "batch=8", "scale=0.35"  # of the many cases of an op on a GPU

Row = dict[str, Any]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(result: Result) -> str:
    """Where numbers come from: device, versions, commit, file."""
    environment, versions = result["environment"], result["environment"]["versions"]
    gpu = environment["gpu"]
    device = f"{gpu['name']}, driver {gpu['driver']}" if gpu else cpu_of(environment)
    triton = f", Triton {versions['triton']}" if gpu else ""
    link = f"[{result['file']}](bench/results/{result['file']})"
    return f"{device}, torch {versions['torch']}{triton}, commit {environment['commit']}, {result['date']}: {link}"


def cpu_of(environment: Result) -> str:
    """Its name, the vectors that torch uses there, and how many threads computed."""
    cpu = environment["cpu"]
    vectors = f", {cpu['capability']}" if "capability" in cpu else ""
    return f"CPU ({cpu['name']}{vectors}, {cpu['threads']} thread{'s' * (cpu['threads'] > 1)})"


def text(found: list[Result]) -> str:
    """Everything between the markers of docs/benchmarks.md."""
    parts = []
    gpu = [r for r in found if r["kind"] in ("ops", "step") and r["environment"]["gpu"]]
    if not gpu:
        parts.append(PENDING)
    writers = {
        ("step", True): step_gpu,
        ("ops", True): ops_gpu,
        ("step", False): step_cpu,
        ("ops", False): ops_cpu,
        ("region", False): region_cpu,
        ("waiting", False): waiting_cpu,
    }
    for (kind, on_gpu), write in writers.items():
        chosen = [r for r in found if r["kind"] == kind and bool(r["environment"]["gpu"]) == on_gpu]
        parts += [write(r) for r in chosen]
    parts += [tables.short(r) for r in found if r["kind"] == "counts"]
    parts += [resources(r) for r in found if r["kind"] == "resources"]
    inside = "\n\n".join(parts)
    return inside.replace("](bench/", "](../bench/").replace("](docs/", "](")  # as seen from docs/


def step_gpu(result: Result) -> str:
    config, rows = result["config"], result["cases"]
    base = next((row for row in rows if row["variant"] == "published" and "img_per_sec" in row), None)
    phases = list(dict.fromkeys(name for row in rows for name in row.get("phase_ms", {})))
    header = ["variant", "img/s", "speed-up", "ms an iteration", *(f"{name} ms" for name in phases)]
    header += ["peak GiB", "largest micro-batch", "launches", "GPU idle", "days of this GPU, full schedule"]
    lines = []
    for row in rows:
        if "img_per_sec" not in row:
            lines.append([f"`{row['variant']}`", row.get("failed", "failed"), *[""] * (len(header) - 2)])
            continue
        gain = f"{row['img_per_sec'] / base['img_per_sec']:.2f}x" if base else "-"
        times = [f"{row['phase_ms'][name]['median']:.1f}" if name in row["phase_ms"] else "-" for name in phases]
        lines.append(
            [
                f"`{row['variant']}`",
                f"{row['img_per_sec']:.1f}",
                gain,
                f"{row['iteration_ms']:.1f}",
                *times,
                f"{row['peak_bytes'] / 2**30:.1f}",
                str(row.get("largest_micro_batch") or "-"),
                f"{row['launches']:.0f}",
                f"{row['idle']:.0%}",
                f"{row['gpu_days']:.2f}",
            ]
        )
    title = (
        f"One training iteration, `{config['preset']}` at {config['resolution']}x{config['resolution']}, batch "
        f"{config['batch']} in micro-batches of {config['micro_batch'] or config['batch']}, R1 every "
        f"{config['r1_interval']} iterations ({source(result)})"
    )
    parts = [f"{title}:", table(header, lines)]
    if config.get("paper_v100_days"):
        parts.append(
            f"Full schedule = {config['kimg'] / 1000:g} million images / (img/s), a projection from this measurement. "
            f"The paper took {config['paper_v100_days']} V100 GPU-days (Tables 1 and 2)."
        )
    parts.append("\n".join(f"- `{row['variant']}`: {row['what']}" for row in rows))
    return "\n\n".join(parts)


def speed_ups(result: Result) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """(op, case, dtype, mode) -> backend -> its row, of rows with a speed."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in result["cases"]:
        if "ms" in row:
            found.setdefault((row["op"], row["case"], row["dtype"], row["mode"]), {})[row["backend"]] = row
    return found


def fastest(rows: dict[str, Row]) -> tuple[str, Row] | None:
    """The engine's fastest backend of a case, and its row."""
    ours = {name: row for name, row in rows.items() if name not in BASELINES}
    return min(ours.items(), key=lambda item: item[1]["ms"]["cold"]["median"]) if ours else None


def ops_gpu(result: Result) -> str:
    header = ["op", "case", "arithmetic", "what", "ms, L2 cold", "share of the floor"]
    header += [f"against {name}" for name in BASELINES]
    lines = []
    for (op, case, dtype, mode), rows in speed_ups(result).items():
        best = fastest(rows)
        shown = SHOWN_BATCH in case.split() and ("scale=" not in case or SHOWN_SCALE in case.split())
        if best is None or not shown or mode not in ("fwd", "step"):
            continue
        name, row = best
        ms = row["ms"]["cold"]
        floor = row.get("fractions", {}).get("floor")
        gains = [f"{rows[b]['ms']['cold']['median'] / ms['median']:.1f}x" if b in rows else "-" for b in BASELINES]
        lines.append(
            [
                f"`{op}` ({name})",
                case.removeprefix(SHOWN_BATCH).strip() or "-",
                dtype,
                MODES[mode],
                f"{ms['median']:.3f} ({ms['p20']:.3f} to {ms['p80']:.3f})",
                "-" if floor is None else f"{floor:.0%}",
                *gains,
            ]
        )
    wrong = [row for row in result["cases"] if row.get("parity", {}).get("wrong")]
    ceilings = result["ceilings"]
    names = {
        "copy_bytes": ("copy", 1e9, "GB/s"),
        "gather_bytes": ("L2 gather", 1e9, "GB/s"),
        "atomics_scalar": ("fp32 atomics", 1e9, "G/s"),
        "atomics_vector": ("vector atomics", 1e9, "G/s"),
        "fp32_flops": ("fp32 product", 1e12, "TFLOP/s"),
        "tf32_flops": ("tf32 product", 1e12, "TFLOP/s"),
        "fp16_flops": ("fp16 product", 1e12, "TFLOP/s"),
    }
    measured = [f"{names[k][0]} {v / names[k][1]:.0f} {names[k][2]}" for k, v in ceilings.items() if k in names]
    parts = [
        f"Ops at the shapes of {SHOWN_BATCH.replace('=', ' ')} ({source(result)}); the floor is the least time that "
        f"the bytes, gathers, atomics and products of a call need at the rates measured in the same run "
        f"({', '.join(measured)}):",
        table(header, lines),
    ]
    if wrong:
        which = sorted({f"`{row['op']}` {row['backend']} {row['dtype']}" for row in wrong})
        parts.append(f"No speed is shown where the result was wrong: {', '.join(which)}.")
    return "\n\n".join(parts)


def _range(values: list[float]) -> str:
    """From the smallest to the largest, and the geometric mean."""
    low, high, mean = min(values), max(values), statistics.geometric_mean(values)
    return f"{low:.1f}x" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f}x to {high:.1f}x, {mean:.1f}x"


SHAPES = {
    "real": "shapes of `ffhq` at 512^2",
    "small": "shapes of `ffhq` at a quarter of its resolution",
    "tiny": "tiny shapes",
}


def ops_cpu(result: Result) -> str:
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in result["cases"]:
        if "times_as_fast" in row:
            key = row["op"], row["backend"], row["against"]
            found.setdefault(key, {}).setdefault(row["mode"], []).append(row["times_as_fast"]["median"])
    modes = [mode for mode in MODES if any(mode in values for values in found.values())]
    lines = [
        [f"`{op}`", backend, against, *(_range(values[m]) if m in values else "-" for m in modes)]
        for (op, backend, against), values in found.items()
    ]
    shapes = SHAPES[result["config"]["size"]]
    title = (
        f"How many times as fast a backend is as another on a CPU, both run in turn, {shapes}; of "
        f"several cases the slowest, the fastest and the geometric mean ({source(result)}):"
    )
    return f"{title}\n\n{table(['op', 'backend', 'against', *(MODES[m] for m in modes)], lines)}"


def step_cpu(result: Result) -> str:
    config = result["config"]
    rows = [row for row in result["cases"] if "times_as_fast" in row]
    lines = [
        [
            f"`{row['variant']}`",
            f"`{row['against']}`",
            *(f"{row['times_as_fast'][k]['median']:.2f}x" for k in ("without_r1", "with_r1")),
        ]
        for row in rows
    ]
    size = "" if config["size"] == "real" else f" in {config['size']} sizes"
    title = (
        f"A training iteration of `{config['preset']}`{size} on a CPU, how many times as fast as another variant, run "
        f"in turn ({source(result)}):"
    )
    said = "\n".join(f"- `{row['variant']}`: {row['what']}" for row in result["cases"])
    return f"{title}\n\n{table(['variant', 'against', 'without R1', 'with R1'], lines)}\n\n{said}"


PICTURE = "![The samples of a patch, their box on the planes, and what every level computes](docs/region.png)"


def region_cpu(result: Result) -> str:
    """Both phases side by side for every micro-batch and time of the schedule, with the picture of a box."""
    config, rows = result["config"], result["cases"]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    header = ["micro-batch", "kimg", "share of the planes"]
    header += [text for phase in phases for text in (f"{phase} phase", "counted", "its memory")]
    lines = []
    for micro, kimg in dict.fromkeys((row["micro_batch"], row["kimg"]) for row in rows):
        found = {row["phase"]: row for row in rows if (row["micro_batch"], row["kimg"]) == (micro, kimg)}
        share = statistics.mean(row["planes_share"] for row in found.values())
        line = [str(micro), f"{kimg:,g}", f"{share:.2f}"]
        for phase in phases:
            row = found.get(phase)
            line.append(_spread(row["times_as_fast"]) if row else "-")
            line.append(f"{row['multiplications_ratio']:.2f}x" if row and "multiplications_ratio" in row else "-")
            line.append(f"{row['peak_ratio']:.2f}" if row and "peak_ratio" in row else "-")
        lines.append(line)
    title = (
        f"Planes computed where rays look ([docs/region.md](docs/region.md)) against whole ones, `{config['preset']}` "
        f"at {config['resolution']}x{config['resolution']} with planes of {config['planes']}x{config['planes']}, on a "
        f"CPU with {config['threads']} {'thread' if config['threads'] == 1 else 'threads'}: how many times as fast a "
        f"phase is, median (20th to 80th percentile), *counted* how many times as many multiplications whole planes "
        f"take, and its peak of memory in parts of that of whole planes; cameras and patches as drawn at that time of "
        f"the schedule, both ways in turn on the same draws ({source(result)}):"
    )
    return f"{title}\n\n{table(header, lines)}\n\n{PICTURE}"


def _spread(times: Row) -> str:
    return f"{times['median']:.2f}x ({times['p20']:.2f} to {times['p80']:.2f})"


def waiting_cpu(result: Result) -> str:
    threads, base = result["config"]["threads"], result["cases"][0]["policy"]
    rows = [[f"`{row['policy']}`", f"{row['alone']:.2f}", f"{row['pair']:.2f}"] for row in result["cases"]]
    return (
        f"Images a second of demos of {threads} threads on {result['environment']['cpu']['cores']} cores, by how "
        f"OpenMP's threads wait, in parts of one alone under `{base}` ({source(result)}):\n\n"
        + table(["policy", "one alone", "two side by side, together"], rows)
        + "\n\n`epigraf_fast` waits as libgomp does, and takes a thread for every core that other programs leave free."
    )


def resources(result: Result) -> str:
    """Registers and spills of compiled kernels, by architecture."""
    lines = []
    for arch in sorted({row["arch"] for row in result["cases"]}):
        rows = [row for row in result["cases"] if row["arch"] == arch]
        lines.append(
            [
                f"sm_{arch}",
                str(len(rows)),
                str(max(row["registers"] for row in rows)),
                str(sum(bool(row["spill"]) for row in rows)),
                str(sum(row["load_bits"] >= 128 for row in rows)),
                str(sum(bool(row["products"]) for row in rows)),
            ]
        )
    header = ["GPU architecture", "kernels", "most registers", "with spills", "with 128-bit loads", "on tensor cores"]
    link = f"[{result['file']}](bench/results/{result['file']})"
    return f"Kernels compiled ahead of time, no GPU needed ({link}):\n\n{table(header, lines)}"


def summary(found: list[Result]) -> str:
    """The results in a screenful."""
    lines = []
    for result in found:
        rows = result["cases"]
        if result["kind"] == "ops":
            lines.append(f"{result['file']}: {len(rows)} cases on {result['environment']['device']}")
            lines += [f"  {gain:6.2f}x  {name}" for name, gain in _gains(result).items() if "step" in name][:10]
            wrong = [row for row in rows if row.get("failed") or row["parity"]["wrong"]]
            for row in wrong[:4]:
                reason = row.get("failed") or row["parity"]["wrong"]
                lines.append(f"  ! {row['op']} {row['case']} {row['mode']} {row['backend']}: {reason}")
            lines += [f"  ! and {len(wrong) - 4} more"] if len(wrong) > 4 else []
        elif result["kind"] == "step":
            lines.append(f"{result['file']}: {result['config']['preset']} on {result['environment']['device']}")
            for row in rows:
                said = row.get("failed") or "ran"
                if "img_per_sec" in row:
                    said = (
                        f"{row['img_per_sec']:.1f} img/s, {row['peak_bytes'] / 2**30:.1f} GiB, idle {row['idle']:.0%}"
                    )
                    said += f", {row['gpu_days']:.2f} days for the schedule"
                elif "times_as_fast" in row:
                    said = f"{row['times_as_fast']['without_r1']['median']:.2f}x {row['against']}"
                lines.append(f"  {row['variant']:<10} {said}")
        elif result["kind"] == "region":
            lines.append(f"{result['file']}: {result['config']['preset']}, planes in part against whole ones")
            for row in rows:
                what = f"{row['phase']}, micro-batch {row['micro_batch']}, {row['kimg']:g} kimg"
                lines.append(f"  {row['times_as_fast']['median']:6.2f}x  {what}")
        elif result["kind"] == "demo":
            last = rows[0]["last"] or {}
            speed = f", {last['img_per_sec']:.0f} img/s" if "img_per_sec" in last else ""
            lines.append(f"{result['file']}: trained to {last.get('kimg', 0):g} kimg{speed}")
    return "\n".join(line[:150] for line in lines)


def split(readme: str) -> tuple[str, str, str]:
    """What is before the markers, between and after them.

    Raises:
        ValueError: The markers are not there, once each and in this order.
    """
    before, begin, rest = readme.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page must hold the line {BEGIN!r} once, and {END!r} once after it")
    return before, inside.strip("\n"), after


def plot(found: list[Result], folder: Path) -> list[Path]:
    """Writes what the files hold enough for: speed-up of ops, phases of a step, memory, roofline."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    written = []

    def save(name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        plt.tight_layout()
        plt.savefig(folder / f"{name}.png", dpi=120)
        plt.close()
        written.append(folder / f"{name}.png")

    for result in found:
        stem = Path(result["file"]).stem
        if result["kind"] == "ops":
            gains = _gains(result)
            if gains:
                plt.figure(figsize=(8, 0.4 * len(gains) + 1.5))
                plt.barh(list(gains), list(gains.values()))
                plt.axvline(1, color="black", linewidth=0.8)
                plt.gca().invert_yaxis()
                plt.xlabel("times as fast (geometric mean over cases)")
                save(f"{stem}-speed-up")
            points = _roofline(result)
            if points:
                _plot_roofline(plt, result, points)
                save(f"{stem}-roofline")
        if result["kind"] == "counts":
            tables.plot(plt, result)
            save(stem)
        if result["kind"] == "step":
            rows = [row for row in result["cases"] if "phase_ms" in row]
            if rows:
                _plot_phases(plt, rows)
                save(f"{stem}-phases")
                plt.figure(figsize=(7, 0.5 * len(rows) + 1.5))
                plt.barh([row["variant"] for row in rows], [row["peak_bytes"] / 2**30 for row in rows])
                plt.gca().invert_yaxis()
                plt.xlabel("peak memory of an iteration, GiB")
                save(f"{stem}-memory")
    return written


def _gains(result: Result) -> dict[str, float]:
    """ "op mode, backend against other" -> geometric mean of how many times as fast."""
    found: dict[str, list[float]] = {}
    for row in result["cases"]:
        if "times_as_fast" in row:
            name = f"{row['op']} {row['mode']}, {row['backend']} / {row['against']}"
            found.setdefault(name, []).append(row["times_as_fast"]["median"])
    for (op, _, dtype, mode), rows in speed_ups(result).items():
        best = fastest(rows)
        other = next((b for b in BASELINES if b in rows), None)
        if best is not None and other is not None and mode in ("fwd", "step"):
            name, row = best
            gain = rows[other]["ms"]["cold"]["median"] / row["ms"]["cold"]["median"]
            found.setdefault(f"{op} {mode} {dtype}, {name} / {other}", []).append(gain)
    return {name: statistics.geometric_mean(values) for name, values in found.items()}


def _roofline(result: Result) -> list[tuple[str, float, float]]:
    """op, operations a byte, operations a second."""
    found = []
    for (op, *_), rows in speed_ups(result).items():
        best = fastest(rows)
        rates = best[1].get("rates") if best else None
        moved = rates["bytes"] + rates["gather_bytes"] + 4 * rates["atomics"] if rates else 0
        if rates and rates["flops"] and moved:
            found.append((op, rates["flops"] / moved, rates["flops"]))
    return found


def _plot_roofline(plt: Any, result: Result, points: list[tuple[str, float, float]]) -> None:
    ceilings = result["ceilings"]
    plt.figure(figsize=(7, 5))
    for op, group in itertools.groupby(sorted(points), key=lambda point: point[0]):
        group = list(group)
        plt.scatter([p[1] for p in group], [p[2] for p in group], s=14, label=op)
    left, right = min(p[1] for p in points) / 2, max(p[1] for p in points) * 2
    grid = [left * (right / left) ** (i / 50) for i in range(51)]
    for flops in ("fp32_flops", "tf32_flops", "fp16_flops"):
        for moved, style in (("copy_bytes", "-"), ("gather_bytes", ":")):
            if flops in ceilings and moved in ceilings:
                roof = [min(ceilings[flops], x * ceilings[moved]) for x in grid]
                plt.plot(grid, roof, style, linewidth=0.8, label=f"{flops[:4]}, {moved.removesuffix('_bytes')}")
    plt.xscale("log")
    plt.yscale("log")
    plt.xlabel("operations a byte (atomics as 4 bytes)")
    plt.ylabel("operations a second")
    plt.legend(fontsize=7)


def _plot_phases(plt: Any, rows: list[Row]) -> None:
    plt.figure(figsize=(7, 0.5 * len(rows) + 1.8))
    left = [0.0] * len(rows)
    for name in dict.fromkeys(name for row in rows for name in row["phase_ms"]):
        values = [row["phase_ms"].get(name, {}).get("median", 0.0) for row in rows]
        plt.barh([row["variant"] for row in rows], values, left=left, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    plt.gca().invert_yaxis()
    plt.xlabel("ms of a phase, each at its median (R1 runs every 16th iteration)")
    plt.legend(fontsize=8)


def main(argv: list[str] | None = None) -> int:
    out = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split(":")[0] + ".")
    out.add_argument("--results", type=Path, default=results.FOLDER, help="folder of result files")
    out.add_argument("--readme", type=Path, default=README)
    out.add_argument("--page", type=Path, default=PAGE)
    out.add_argument("--plots", type=Path, default=None, help="folder of plots; default: beside the result files")
    out.add_argument("--summary", action="store_true", help="print a screenful instead, write nothing")
    out.add_argument("--check", action="store_true", help="write nothing, compare")
    args = out.parse_args(argv)
    found = results.load(args.results)
    if args.summary:
        print(summary(found))
        return 0
    different = 0
    for page, written in ((args.page, text(found)), (args.readme, brief.text(found))):
        before, inside, after = split(page.read_text(encoding="utf-8"))
        if args.check and inside != written:
            print(f"{page} is not what the result files say: run python -m bench.report", file=sys.stderr)
            different = 1
        if not args.check:
            print(written)
            page.write_text(f"{before}{BEGIN}\n{written}\n{END}{after}", encoding="utf-8")
    if args.check:
        return different
    for path in plot(found, args.plots or args.results / "plots"):
        print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
