"""The README's table of what is faster by how much: measured, counted, or pending; `bench.report` writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..counts import tables
from ..results import Result

Cells = tuple[str, str, str, str]  # what, measured, counted, pending
PENDING = "on a GPU"


def link(result: Result) -> str:
    return f"[{result['file']}](bench/results/{result['file']})"


def ratios(values: list[float]) -> str:
    """From the smallest to the largest: a mean would hide the cases that gain little."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}x" if low == high else f"{low} to {high}x"


def steps(result: Result) -> Iterator[Cells]:
    """Whole iterations, on a GPU or a CPU."""
    config, on_gpu = result["config"], bool(result["environment"]["gpu"])
    rows = result["cases"]
    base = next((row for row in rows if row["variant"] == "published" and "img_per_sec" in row), None)
    for row in rows:
        if "times_as_fast" in row:
            gain = ratios([row["times_as_fast"][name]["median"] for name in ("without_r1", "with_r1")])
            two = f"`{row['variant']}` against `{row['against']}`"
            what = f"a training iteration of `{config['preset']}` on a CPU, {two}"
            yield what, f"{gain} ({link(result)})", "", PENDING
        elif on_gpu and base and row is not base and "img_per_sec" in row:
            gain = row["img_per_sec"] / base["img_per_sec"]
            name = result["environment"]["gpu"]["name"]
            what = f"a training iteration of `{config['preset']}` on {name}, `{row['variant']}` against `published`"
            yield what, f"{gain:.2f}x ({link(result)})", "", ""


def ops(result: Result) -> Iterator[Cells]:
    """Forward and backward of each op at the real shapes, on a CPU."""
    if result["environment"]["gpu"] or result["config"].get("size") != "real":
        return
    found: dict[str, list[float]] = {}
    for row in result["cases"]:
        if "times_as_fast" in row and row["mode"] == "step":
            found.setdefault(f"`{row['op']}`", []).append(row["times_as_fast"]["median"])
    if found:
        gains = "; ".join(f"{op} {ratios(values)}" for op, values in found.items())
        what = "ops on a CPU, forward and backward, the extension against plain torch"
        yield what, f"{gains} ({link(result)})", "", PENDING


def planes(result: Result) -> Iterator[Cells]:
    """Planes computed in part."""
    for phase in dict.fromkeys(row["phase"] for row in result["cases"]):
        values = [row["times_as_fast"]["median"] for row in result["cases"] if row["phase"] == phase]
        what = f"planes [where rays look](docs/region.md) against whole ones, phase {phase}, on a CPU"
        yield what, f"{ratios(values)} ({link(result)})", "", PENDING


def waits(result: Result) -> Iterator[Cells]:
    """Runs side by side."""
    by_policy = {row["policy"]: row["pair"] for row in result["cases"]}
    base = result["cases"][0]["policy"]
    if "epigraf_fast" in by_policy and base != "epigraf_fast":
        gain = by_policy["epigraf_fast"] / by_policy[base]
        yield "two runs side by side on one CPU, against OpenMP's own waiting", f"{gain:.1f}x ({link(result)})", "", ""


def flushed(result: Result) -> Iterator[Cells]:
    """Denormal numbers."""
    values = [row["times_as_fast"]["median"] for row in result["cases"]]
    what = f"an iteration of a run on `{result['config']['data']}` on a CPU, denormal numbers flushed against kept"
    yield what, f"{ratios(values)} ({link(result)})", "", ""


def counts(result: Result) -> Iterator[Cells]:
    """What the compiled kernels need at least."""
    sums = tables.renderer(result)
    if sums:
        said = "; ".join(f"{name} {least:.2f} ms, floor {floor:.2f}" for name, (least, floor) in sums.items())
        what = "the renderer of a training image on Triton kernels, forward and backward, needs at least"
        yield what, "", f"{said} ([how](docs/kernels.md))", "its time on a GPU, and against the published ops"


WRITERS: dict[str, Callable[[Result], Iterator[Cells]]] = {
    "step": steps,
    "ops": ops,
    "region": planes,
    "waiting": waits,
    "denormals": flushed,
    "counts": counts,
}


def text(found: list[Result]) -> str:
    """The table, of every result that there is."""
    rows = [cells for kind, write in WRITERS.items() for r in found if r["kind"] == kind for cells in write(r)]
    lines = [("what", "measured", "counted", "pending"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
